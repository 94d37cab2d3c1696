//! Who the agent is: certificates from files, or from the hub by enrolment, kept valid for as long as it runs.
//!
//! ```text
//!            token, CA hash               2/3 of its life                 its end
//!   nothing ───────────────▶ certificate ───────────────▶ renewed ─ … ─▶ expired: enrol again
//!                 ▲ retry, slowly when refused     ▲ retry through any server
//! ```
//!
//! At enrolment the hub is known by the hash of its CA and nothing else; the agent makes a key, sends a request signed
//! by it and the single-use token, and gets a short-lived certificate. Each renewal has a new key. Key and certificate
//! lie in one file (`agent.pem`, 0600), replaced at once, so that a restart never finds one without the other.

pub(crate) mod fuzz;
mod request;

use std::{
    fmt, fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rand::Rng;
use serde::{Deserialize, Serialize};
use service::error_chain;
use tls::{
    AgentId, AgentIdentity, AgentKey, CaHash, CertificateError, ClientTls, ClusterName, TlsError,
    agent_identity,
};
use tokio::sync::watch;

pub use request::{CertificateClient, RequestError};

use crate::metrics::{Metrics, RequestLabels, RequestOutcome};

/// Key and certificate chain of an enrolled agent, in its data folder.
const AGENT_FILE: &str = "agent.pem";

/// The hub's CA, in the data folder.
const CA_FILE: &str = "ca.crt";

/// The id of the token that the agent was enrolled with, in the data folder. A start with another token enrols anew.
const TOKEN_FILE: &str = "enrolled-with";

/// In the data folder, until the hub has answered: whom the agent enrols as, and with which key.
const PENDING_FILE: &str = "enrolling.json";

/// How often certificates in files are looked at: a replaced file is in force within this time.
const FILES_INTERVAL: Duration = Duration::from_secs(10);

/// Enrolment is tried again after at most this long when the hub cannot be reached …
const UNREACHABLE_CAP: Duration = Duration::from_secs(30);

/// … and after about this long when it has refused: somebody has to do something first.
const REFUSED_DELAY: Duration = Duration::from_secs(60);

/// The part of a certificate's life by which its renewal may come early, so that agents that were enrolled together
/// do not renew together.
const RENEWAL_JITTER: f64 = 0.05;

/// Bounds of the delay between attempts to renew: a tenth of what is left, within these.
const RENEWAL_RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(600));

/// No sleep is longer, so that a clock that was set, or a machine that slept, is noticed.
const LONGEST_SLEEP: Duration = Duration::from_secs(600);

/// How the agent proves who it is.
#[derive(Debug, Clone)]
pub enum IdentityConfig {
    /// With certificates from files, which somebody else replaces.
    Files {
        /// The certificate chain.
        certificate: PathBuf,
        /// The key.
        key: PathBuf,
        /// The CA of the servers.
        ca: PathBuf,
        /// The member; `None`: file-certificate mode.
        cluster: Option<ClusterName>,
        /// The id; the certificate's, or a random one, when not given.
        agent_id: Option<String>,
    },
    /// With a service account's token instead of a certificate, as upstream's agents may.
    ServiceAccount {
        /// The token's file, which somebody else replaces.
        token: PathBuf,
        /// The CA of the servers.
        ca: PathBuf,
        /// The id; a random one when not given.
        agent_id: Option<String>,
    },
    /// With a certificate that the hub issues.
    Enrolled {
        /// Where it is kept.
        data_dir: PathBuf,
        /// For the first start.
        token: Option<EnrolmentToken>,
        /// What the hub is known by at the first start.
        ca_hash: Option<CaHash>,
        /// The member, when the hub's word is to be checked.
        cluster: Option<ClusterName>,
        /// The id; a random one when not given.
        agent_id: Option<AgentId>,
    },
}

/// A single-use token, `<token-id>.<secret>`. `Debug` hides the secret.
#[derive(Clone)]
pub struct EnrolmentToken {
    id: String,
    secret: String,
}

/// What tunnels are established with.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// The current certificate, and the CA of the servers.
    pub tls: ClientTls,
    /// The member; empty in file-certificate mode.
    pub cluster: String,
    /// The agent.
    pub agent_id: String,
}

/// Why the agent has no identity, for good: no retry would help.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The files cannot be used.
    #[error("failed to use the agent's certificates")]
    Tls(#[from] TlsError),
    /// The certificate cannot be read.
    #[error("failed to read the agent's certificate")]
    Certificate(#[from] CertificateError),
    /// A certificate of an enrolled agent without the name of its cluster.
    #[error("the certificate belongs to an agent of the cluster {0}: say so with --cluster-name={0}")]
    ClusterNotNamed(ClusterName),
    /// The certificate is another cluster's.
    #[error("the certificate belongs to the cluster {certificate}, but --cluster-name is {configured}")]
    OtherCluster {
        /// In the certificate.
        certificate: ClusterName,
        /// In the flags.
        configured: ClusterName,
    },
    /// The certificate is another agent's.
    #[error("the certificate belongs to the agent {certificate}, but --agent-id is {configured}")]
    OtherAgent {
        /// In the certificate.
        certificate: AgentId,
        /// In the flags.
        configured: String,
    },
    /// No key to enrol with.
    #[error("failed to make the agent's key")]
    Key(#[from] tls::AuthorityError),
    /// Neither certificate nor token.
    #[error(
        "{} holds no valid certificate and there is no enrolment token: run `cellway cluster add` at the hub and start \
         the agent with the token and the CA hash that it prints", .0.display()
    )]
    NotEnrolled(PathBuf),
    /// A token without the hub's hash.
    #[error("enrolment needs --ca-hash, by which the hub is known: `cellway cluster add` prints it")]
    NoCaHash,
    /// The data folder cannot be used.
    #[error("failed to create {}", path.display())]
    DataDir {
        /// The folder.
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

/// Why one attempt to get a certificate failed.
#[derive(Debug, thiserror::Error)]
enum AttemptError {
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error("failed to make a key")]
    Key(#[from] tls::AuthorityError),
    #[error("the hub's certificate cannot be used")]
    Tls(#[from] TlsError),
    #[error("the hub's certificate cannot be read")]
    Certificate(#[from] CertificateError),
    #[error("the hub answered with a certificate of {0}, which is not what was asked for")]
    Other(AgentIdentity),
    #[error("the hub answered with a CA that is not the one of --ca-hash")]
    OtherCa,
    #[error("failed to keep the certificate")]
    File(#[from] tls::FileError),
}

/// Gets and keeps the identity.
pub(crate) struct IdentityKeeper {
    config: IdentityConfig,
    client: CertificateClient,
    /// The servers known at the moment, the first to ask first.
    servers: watch::Receiver<Vec<String>>,
    metrics: Metrics,
}

// === impl IdentityConfig ===

impl IdentityConfig {
    /// Whether the agent behaves as upstream's does: certificates or a token of files, no cluster, any destination.
    pub fn is_plain(&self) -> bool {
        matches!(self, Self::Files { cluster: None, .. } | Self::ServiceAccount { .. })
    }

    /// The file of the token that is shown to servers.
    pub(crate) fn token_file(&self) -> Option<&Path> {
        match self {
            Self::ServiceAccount { token, .. } => Some(token),
            Self::Files { .. } | Self::Enrolled { .. } => None,
        }
    }
}

// === impl EnrolmentToken ===

impl EnrolmentToken {
    /// Reads `<token-id>.<secret>`; white space around it is ignored.
    pub fn parse(text: &str) -> Option<Self> {
        let (id, secret) = text.trim().split_once('.')?;
        let valid = |part: &str| {
            !part.is_empty()
                && part.len() <= 256
                && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        };
        (valid(id) && valid(secret)).then(|| Self { id: id.to_owned(), secret: secret.to_owned() })
    }

    fn bearer(&self) -> String {
        format!("Bearer {}.{}", self.id, self.secret)
    }
}

impl fmt::Debug for EnrolmentToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.(hidden)", self.id)
    }
}

// === impl IdentityKeeper ===

impl IdentityKeeper {
    pub(crate) fn new(
        config: IdentityConfig,
        client: CertificateClient,
        servers: watch::Receiver<Vec<String>>,
        metrics: Metrics,
    ) -> Self {
        Self { config, client, servers, metrics }
    }

    /// The credentials that are there without asking the hub; `None`: the agent has to enrol first.
    pub(crate) fn load(&self) -> Result<Option<Credentials>, IdentityError> {
        let credentials = match &self.config {
            IdentityConfig::Files { certificate, key, ca, cluster, agent_id } => {
                let tls = ClientTls::from_files(ca, Some(certificate.clone()), Some(key.clone()))?;
                Some(from_files(tls, cluster.as_ref(), agent_id.as_deref())?)
            }
            IdentityConfig::ServiceAccount { ca, agent_id, .. } => Some(Credentials {
                tls: ClientTls::from_files(ca, None, None)?,
                cluster: String::new(),
                agent_id: agent_id.clone().unwrap_or_else(|| uuid::Uuid::new_v4().to_string()),
            }),
            IdentityConfig::Enrolled { data_dir, token, ca_hash, cluster, agent_id } => {
                private_folder(data_dir)
                    .map_err(|source| IdentityError::DataDir { path: data_dir.clone(), source })?;
                match stored(data_dir)? {
                    // A new token is an operator's word that the old identity is not wanted any more: the cluster was
                    // revoked and added again, perhaps under another name.
                    Some(_)
                        if token.as_ref().is_some_and(|token| is_new(data_dir, token))
                            && ca_hash.is_some() =>
                    {
                        None
                    }
                    Some(tls) => {
                        let credentials = from_files(tls, cluster.as_ref(), None)?;
                        if let Some(configured) = agent_id.as_ref().map(AgentId::as_str)
                            && configured != credentials.agent_id
                        {
                            tracing::warn!(
                                configured,
                                enrolled = credentials.agent_id,
                                "--agent-id is not what this agent was enrolled as: the certificate's id is used"
                            );
                        }
                        Some(credentials)
                    }
                    None if token.is_none() => return Err(IdentityError::NotEnrolled(data_dir.clone())),
                    None if ca_hash.is_none() => return Err(IdentityError::NoCaHash),
                    None => None,
                }
            }
        };
        if let Some(credentials) = &credentials {
            self.show_expiry(&credentials.tls);
        }
        Ok(credentials)
    }

    /// Enrols: tries until it works. Only for [`IdentityConfig::Enrolled`] with token and hash.
    pub(crate) async fn enrol(&self) -> Result<Credentials, IdentityError> {
        let IdentityConfig::Enrolled { data_dir, token: Some(token), ca_hash: Some(hash), cluster, agent_id } =
            &self.config
        else {
            return self.load()?.ok_or(IdentityError::NoCaHash);
        };
        let former = stored(data_dir)?;
        let Pending { agent_id, key } = Pending::of(data_dir, token, agent_id.as_ref())?;
        let mut delay = Duration::from_secs(1);
        for attempt in 0.. {
            let server = self.server(attempt);
            let outcome = self.enrol_at(&server, token, *hash, &key, cluster.as_ref(), &agent_id).await;
            self.count(&outcome);
            match outcome {
                Ok(issued) => {
                    keep_new(data_dir, token, &issued, &key).await;
                    tracing::info!(server, agent.id = agent_id, "enrolled");
                    break;
                }
                Err(error) => {
                    let refused = matches!(&error, AttemptError::Request(error) if error.is_refusal())
                        || matches!(error, AttemptError::OtherCa | AttemptError::Other(_));
                    let wait = if refused {
                        REFUSED_DELAY.mul_f64(rand::rng().random_range(0.75..1.25))
                    } else {
                        let wait = delay.mul_f64(rand::rng().random_range(0.1..1.0));
                        delay = (delay * 2).min(UNREACHABLE_CAP);
                        wait
                    };
                    if refused && let Some(tls) = &former {
                        tracing::warn!(
                            server,
                            error = %error_chain(&error),
                            "failed to enrol with the new token: the agent goes on as what it was enrolled as before"
                        );
                        let credentials = from_files(tls.clone(), cluster.as_ref(), None)?;
                        self.show_expiry(&credentials.tls);
                        return Ok(credentials);
                    }
                    tracing::warn!(server, error = %error_chain(&error), retry.after = ?wait, "failed to enrol");
                    tokio::time::sleep(wait).await;
                }
            }
        }
        let tls = stored(data_dir)?.ok_or_else(|| IdentityError::NotEnrolled(data_dir.clone()))?;
        self.show_expiry(&tls);
        from_files(tls, cluster.as_ref(), None)
    }

    /// Keeps the credentials current for as long as it is polled: follows the files, or renews the certificate.
    pub(crate) async fn keep(&self, credentials: &Credentials) {
        match &self.config {
            IdentityConfig::Files { .. } | IdentityConfig::ServiceAccount { .. } => {
                let watch = credentials.tls.clone().watch_files(FILES_INTERVAL);
                let show = async {
                    loop {
                        tokio::time::sleep(FILES_INTERVAL).await;
                        self.show_expiry(&credentials.tls);
                    }
                };
                tokio::join!(watch, show);
            }
            IdentityConfig::Enrolled { data_dir, .. } => self.renew(data_dir, credentials).await,
        }
    }

    async fn renew(&self, data_dir: &Path, credentials: &Credentials) {
        loop {
            let Some((begin, end)) = validity(&credentials.tls) else {
                // It was read when it was loaded; without dates there is nothing to wait for.
                return std::future::pending().await;
            };
            let due = renewal_time(begin, end, rand::rng().random());
            sleep_until(due).await;
            for attempt in 0.. {
                let server = self.server(attempt);
                let outcome = self.renew_at(&server, data_dir, credentials).await;
                self.count(&outcome);
                match outcome {
                    Ok(()) => {
                        self.show_expiry(&credentials.tls);
                        tracing::info!(server, "the agent's certificate was renewed: new tunnels use it");
                        break;
                    }
                    Err(error) => {
                        let now = SystemTime::now();
                        let left = end.duration_since(now).unwrap_or_default();
                        let (shortest, longest) = RENEWAL_RETRY;
                        let wait = (left / 10).clamp(shortest, longest);
                        let wait = wait.mul_f64(rand::rng().random_range(0.75..1.25));
                        if left.is_zero() {
                            tracing::error!(
                                server,
                                error = %error_chain(&error),
                                "the agent's certificate has expired and cannot be renewed: enrol it again with a \
                                 token of `cellway cluster add`"
                            );
                            tokio::time::sleep(REFUSED_DELAY).await;
                        } else {
                            tracing::warn!(
                                server,
                                error = %error_chain(&error),
                                expires.after = ?left,
                                retry.after = ?wait,
                                "failed to renew the agent's certificate"
                            );
                            tokio::time::sleep(wait).await;
                        }
                    }
                }
            }
        }
    }

    /// Shows the token, once, and gives back what the hub has issued.
    async fn enrol_at(
        &self,
        server: &str,
        token: &EnrolmentToken,
        hash: CaHash,
        key: &AgentKey,
        cluster: Option<&ClusterName>,
        agent_id: &str,
    ) -> Result<request::Issued, AttemptError> {
        let tls = ClientTls::with_ca_hash(hash, None)?;
        let bearer = token.bearer();
        let request = key.certificate_request()?;
        let issued = self.client.request(server, &tls, Some(&bearer), agent_id, request).await?;
        let authorities = tls::certificates_from_pem(issued.ca.as_bytes())?;
        if !authorities.iter().any(|ca| CaHash::of(ca).is_ok_and(|found| found == hash)) {
            return Err(AttemptError::OtherCa);
        }
        let identity = check(&issued, key)?;
        if identity.agent.as_str() != agent_id || cluster.is_some_and(|cluster| *cluster != identity.cluster)
        {
            return Err(AttemptError::Other(identity));
        }
        Ok(issued)
    }

    async fn renew_at(
        &self,
        server: &str,
        data_dir: &Path,
        credentials: &Credentials,
    ) -> Result<(), AttemptError> {
        let key = AgentKey::generate()?;
        let request = key.certificate_request()?;
        let tls = &credentials.tls;
        let issued = self.client.request(server, tls, None, &credentials.agent_id, request).await?;
        let identity = check(&issued, &key)?;
        if identity.agent.as_str() != credentials.agent_id || identity.cluster.as_str() != credentials.cluster
        {
            return Err(AttemptError::Other(identity));
        }
        store(data_dir, &issued, &key)?;
        tls.reload()?;
        Ok(())
    }

    /// One server after the other, from attempt to attempt.
    fn server(&self, attempt: usize) -> String {
        let servers = self.servers.borrow();
        // The list begins with the configuration and is never emptied; an empty text fails as an address would.
        servers.get(attempt % servers.len().max(1)).cloned().unwrap_or_default()
    }

    fn count<T>(&self, outcome: &Result<T, AttemptError>) {
        let outcome = if outcome.is_ok() { RequestOutcome::issued } else { RequestOutcome::failed };
        self.metrics.certificate_requests.get_or_create(&RequestLabels { outcome }).inc();
    }

    fn show_expiry(&self, tls: &ClientTls) {
        if let Some((begin, end)) = validity(tls) {
            let since = |from| {
                let duration = end.duration_since(from).unwrap_or_default();
                i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)
            };
            self.metrics.certificate_expiry.set(since(SystemTime::UNIX_EPOCH));
            self.metrics.certificate_lifetime.set(since(begin));
        }
    }
}

// === impl Pending ===

/// An agent that asks for its first certificate: one name and one key for all attempts, since the hub may have used the
/// token up for them and its answer may have been lost.
struct Pending {
    agent_id: String,
    key: AgentKey,
}

/// [`Pending`] in [`PENDING_FILE`].
#[derive(Serialize, Deserialize)]
struct PendingFile {
    /// The token's public half.
    token: String,
    agent_id: String,
    key: String,
}

impl Pending {
    /// What an earlier process began with this token, or something new, which a later one can take up.
    fn of(
        data_dir: &Path,
        token: &EnrolmentToken,
        agent_id: Option<&AgentId>,
    ) -> Result<Self, IdentityError> {
        let file = data_dir.join(PENDING_FILE);
        if let Some(begun) = Self::read(&file, token, agent_id) {
            return Ok(begun);
        }
        let agent_id = agent_id.map_or_else(|| uuid::Uuid::new_v4().to_string(), ToString::to_string);
        let key = AgentKey::generate()?;
        let content = PendingFile { token: token.id.clone(), agent_id: agent_id.clone(), key: key.to_pem() };
        let written = serde_json::to_vec(&content)
            .map_err(|error| error_chain(&error))
            .and_then(|content| tls::write_private(&file, &content).map_err(|error| error_chain(&error)));
        if let Err(error) = written {
            tracing::warn!(
                error,
                "failed to note whom the agent enrols as: should it be stopped while the hub answers, it needs a new token"
            );
        }
        Ok(Self { agent_id, key })
    }

    /// One that is damaged, or of another token or name, counts for nothing.
    fn read(file: &Path, token: &EnrolmentToken, agent_id: Option<&AgentId>) -> Option<Self> {
        let begun: PendingFile = serde_json::from_slice(&tls::read_bounded(file).ok()?).ok()?;
        if begun.token != token.id || agent_id.is_some_and(|id| id.as_str() != begun.agent_id) {
            return None;
        }
        let agent_id = begun.agent_id.parse::<AgentId>().ok()?.to_string();
        Some(Self { agent_id, key: AgentKey::from_pem(&begun.key).ok()? })
    }
}

// === helpers ===

/// The stored certificate, if there is one that has not expired.
fn stored(data_dir: &Path) -> Result<Option<ClientTls>, IdentityError> {
    let (agent, ca) = (data_dir.join(AGENT_FILE), data_dir.join(CA_FILE));
    if !agent.exists() || !ca.exists() {
        return Ok(None);
    }
    let tls = ClientTls::from_files(ca, Some(agent.clone()), Some(agent))?;
    let expired = validity(&tls).is_none_or(|(_, end)| end <= SystemTime::now());
    if expired {
        tracing::warn!(
            "the stored certificate has expired: the agent was stopped for longer than it was valid"
        );
    }
    Ok((!expired).then_some(tls))
}

/// Whether the agent was enrolled with another token than this one.
fn is_new(data_dir: &Path, token: &EnrolmentToken) -> bool {
    tls::read_bounded(&data_dir.join(TOKEN_FILE)).is_ok_and(|used| used != token.id.as_bytes())
}

/// Writes down what was enrolled for. The token is spent, so the hub is not asked again when a write fails: the agent
/// waits for its disk, with the certificate in hand.
async fn keep_new(data_dir: &Path, token: &EnrolmentToken, issued: &request::Issued, key: &AgentKey) {
    let mut delay = Duration::from_secs(1);
    while let Err(error) = store(data_dir, issued, key) {
        tracing::error!(
            error = %error_chain(&error),
            retry.after = ?delay,
            "the agent is enrolled, but its certificate cannot be kept: the token is used up, so leave the agent running \
             and make room"
        );
        tokio::time::sleep(delay).await;
        delay = (delay * 2).min(UNREACHABLE_CAP);
    }
    // Its key is the agent's now. Should it stay, the next token is another one.
    let _ = fs::remove_file(data_dir.join(PENDING_FILE));
    let file = data_dir.join(TOKEN_FILE);
    if let Err(error) = tls::write_public(&file, token.id.as_bytes()) {
        // Without the note no token counts as new, and the stored certificate is used. A note of a former token would
        // make the next start show this one again.
        let stale = fs::remove_file(&file).is_err() && file.exists();
        tracing::warn!(error = %error_chain(&error), stale, "failed to note which token the agent was enrolled with");
    }
}

/// Creates a folder that only its owner may enter, or makes it one.
fn private_folder(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)?;
    match fs::set_permissions(path, fs::Permissions::from_mode(0o700)) {
        // A volume that is mounted for the agent may belong to somebody else. The key's own file is 0600.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            tracing::warn!(folder = %path.display(), "the data folder belongs to another user: its mode stays");
            Ok(())
        }
        set => set,
    }
}

fn store(data_dir: &Path, issued: &request::Issued, key: &AgentKey) -> Result<(), AttemptError> {
    // The CA first: with the new CA and the old certificate the agent can still be served, the other way round not.
    tls::write_public(&data_dir.join(CA_FILE), issued.ca.as_bytes())?;
    let agent = format!("{}{}", key.to_pem(), issued.certificate);
    tls::write_private(&data_dir.join(AGENT_FILE), agent.as_bytes())?;
    Ok(())
}

/// Whether an answer is a certificate for our key, of a CA that came with it; and whom it is for.
fn check(issued: &request::Issued, key: &AgentKey) -> Result<AgentIdentity, AttemptError> {
    ClientTls::from_pem(&issued.ca, Some((&issued.certificate, &key.to_pem())))?;
    let certificates = tls::certificates_from_pem(issued.certificate.as_bytes())?;
    Ok(agent_identity(&certificates[0])?)
}

fn from_files(
    tls: ClientTls,
    cluster: Option<&ClusterName>,
    agent_id: Option<&str>,
) -> Result<Credentials, IdentityError> {
    let certificate = tls.certificate().ok_or(IdentityError::Certificate(CertificateError::NoCertificate))?;
    let random = || uuid::Uuid::new_v4().to_string();
    match agent_identity(&certificate) {
        Ok(identity) => {
            if let Some(configured) = cluster
                && *configured != identity.cluster
            {
                let configured = configured.clone();
                return Err(IdentityError::OtherCluster { certificate: identity.cluster, configured });
            }
            if let Some(configured) = agent_id
                && configured != identity.agent.as_str()
            {
                let configured = configured.to_owned();
                return Err(IdentityError::OtherAgent { certificate: identity.agent, configured });
            }
            let (cluster, agent_id) = (identity.cluster.to_string(), identity.agent.to_string());
            Ok(Credentials { tls, cluster, agent_id })
        }
        Err(CertificateError::NoIdentity) => {
            let cluster = cluster.map(ToString::to_string).unwrap_or_default();
            Ok(Credentials { tls, cluster, agent_id: agent_id.map_or_else(random, str::to_owned) })
        }
        Err(error) => Err(error.into()),
    }
}

/// A plain agent may dial anything: it must not be one of an enrolled cluster by oversight.
pub(crate) fn check_plain(config: &IdentityConfig, credentials: &Credentials) -> Result<(), IdentityError> {
    if config.is_plain()
        && let Some(certificate) = credentials.tls.certificate()
        && let Ok(identity) = agent_identity(&certificate)
    {
        return Err(IdentityError::ClusterNotNamed(identity.cluster));
    }
    Ok(())
}

fn validity(tls: &ClientTls) -> Option<(SystemTime, SystemTime)> {
    tls::validity(&tls.certificate()?).ok()
}

/// Two thirds of the certificate's life, or up to a twentieth of it earlier. `draw` is from 0 to 1.
fn renewal_time(begin: SystemTime, end: SystemTime, draw: f64) -> SystemTime {
    let life = end.duration_since(begin).unwrap_or_default();
    begin + life.mul_f64(2.0 / 3.0 - RENEWAL_JITTER * draw.clamp(0.0, 1.0))
}

async fn sleep_until(time: SystemTime) {
    while let Ok(left) = time.duration_since(SystemTime::now()) {
        tokio::time::sleep(left.min(LONGEST_SLEEP)).await;
        if left.is_zero() {
            return;
        }
    }
}

#[cfg(test)]
mod tests;
