//! The agents' side: who may hold a tunnel, and each tunnel's life from admission to its end.
//!
//! ```text
//! accept ▶ certificate ▶ directory (known? revoked?) ▶ hellos ▶ hello = certificate? ▶ token good?
//!        ▶ admitted ▶ registered ▶ … ▶ closed
//!                                    ▲ revoked, drained
//! ```
//!
//! An agent is told that it is taken when all has been looked at, and is ready from then on: one that is turned away never was.
//!
//! An agent is what its certificate says. Its hello may only repeat that: an agent of one member that claims another is
//! refused. In file-certificate mode certificates name no cluster; such agents serve only requests that name none.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use service::drain::DrainWatch;
use service::http::{Entrance, Gate};
use tls::{CertificateDer, CertificateError, TrustDomain};
use tokio::task::JoinSet;
use tracing::Instrument;
use tunnel::{
    Accepted, Hello, HttpsConnection, PendingTunnel, RefusalKind, Rejections, ServerHello, ServerTunnel,
    TunnelError, TunnelListener,
};

use crate::agent_tokens::AgentTokens;
use crate::directory::{Admission, ClusterDirectory, Lookup};
use crate::enrol::Enrolment;
use crate::limit::{ClientPlace, ConcurrencyLimiter};
use crate::metrics::RejectLabels;
use crate::registry::{Member, Registry};
use crate::route::Identifiers;

/// Tunnels of one member. Agents are replicas of one deployment, each holding one or two.
const MAX_TUNNELS_PER_CLUSTER: usize = 256;

/// Tunnels of agents without a cluster: a konnectivity fleet has one on every node.
const MAX_PLAIN_TUNNELS: usize = 16 * 1024;

/// Enrolment requests at one time, and as many connections that have not asked yet, of which the oldest makes room;
/// each lives for at most [`ENROLMENT_TIMEOUT`].
const MAX_ENROLMENTS: usize = 128;

/// One request and its answer.
const ENROLMENT_TIMEOUT: Duration = Duration::from_secs(30);

/// As metrics call the place where certificates are asked for.
const ENROLMENT_DOOR: &str = "enrolment";

/// How long an agent waits for a hub that has just started and does not know its members yet.
const SYNC_TIMEOUT: Duration = Duration::from_secs(20);

/// How often the listener's own counters are read.
const REJECTIONS_INTERVAL: Duration = Duration::from_secs(2);

/// How often a draining tunnel is looked at for its last connection.
const IDLE_POLL: Duration = Duration::from_millis(100);

/// Which certificates may be an agent's.
#[derive(Debug, Clone)]
pub struct IdentityRules {
    /// Only this trust domain; `None`: any that the CA has signed for.
    pub trust_domain: Option<TrustDomain>,
    /// Accept certificates that name no cluster, as upstream does.
    pub plain: bool,
    /// Accept agents without a certificate: no client CA is configured.
    pub anonymous: bool,
}

/// What a certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerIdentity {
    /// Empty for plain ones.
    pub cluster: String,
    /// `None`: whatever the hello says.
    pub agent_id: Option<String>,
    /// Of the certificate; the beginning of time without one.
    pub not_before: SystemTime,
    /// Of the certificate.
    pub not_after: Option<SystemTime>,
}

/// Why an agent is turned away.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// No certificate where one is needed.
    #[error("no client certificate: enrol the agent first")]
    NoCertificate,
    /// The certificate names no agent where one must.
    #[error("the certificate names no agent")]
    NotAnAgent,
    /// The certificate is not to be used as an identity.
    #[error("the certificate is not usable: {0}")]
    BadCertificate(CertificateError),
    /// Another hub's.
    #[error("the certificate is of trust domain '{0}'")]
    TrustDomain(String),
    /// The hub has no such member.
    #[error("cluster '{0}' is not known to this hub")]
    UnknownCluster(String),
    /// The certificate begins before the revocation, or before the member was added.
    #[error(
        "cluster '{0}' has been revoked, or removed and added again, since this was issued: enrol it again with a new token"
    )]
    Revoked(String),
    /// The certificate begins before its agent's revocation.
    #[error(
        "agent '{agent}' of cluster '{cluster}' has been revoked since this was issued: enrol it again with a new token"
    )]
    RevokedAgent {
        /// The member.
        cluster: String,
        /// By the certificate.
        agent: String,
    },
    /// The hub does not know its members yet.
    #[error("the hub is starting: try again")]
    Starting,
    /// The hello claims something else.
    #[error("the hello says cluster '{hello}' but the certificate says '{certificate}'")]
    WrongCluster {
        /// Claimed.
        hello: String,
        /// Proved.
        certificate: String,
    },
    /// The hello claims something else.
    #[error("the hello says agent '{hello}' but the certificate says '{certificate}'")]
    WrongAgent {
        /// Claimed.
        hello: String,
        /// Proved.
        certificate: String,
    },
    /// Too many tunnels already.
    #[error("cluster '{0}' has too many tunnels")]
    TooManyTunnels(String),
    /// Agents have tokens here.
    #[error(
        "no service account token: give the agent --service-account-token-path, with a token for this server's audience"
    )]
    NoToken,
    /// Not the agents'.
    #[error("the service account token has expired, or is of another account or for another audience")]
    BadToken,
    /// Nobody could be asked about the token.
    #[error("the Kubernetes API that knows the token does not answer: try again")]
    TokenUnchecked,
}

impl Rejection {
    /// Ends a tunnel that was attached already.
    fn turn_away(&self, tunnel: &ServerTunnel) {
        match self.kind() {
            RefusalKind::Temporary => tunnel.close(&self.to_string()),
            RefusalKind::Lasting => tunnel.refuse(&self.to_string()),
        }
    }

    /// Whether the agent may try again soon.
    fn kind(&self) -> RefusalKind {
        match self {
            Self::Starting | Self::TooManyTunnels(_) | Self::TokenUnchecked => RefusalKind::Temporary,
            Self::NoCertificate
            | Self::NotAnAgent
            | Self::BadCertificate(_)
            | Self::TrustDomain(_)
            | Self::UnknownCluster(_)
            | Self::Revoked(_)
            | Self::RevokedAgent { .. }
            | Self::WrongCluster { .. }
            | Self::WrongAgent { .. }
            | Self::NoToken
            | Self::BadToken => RefusalKind::Lasting,
        }
    }
}

/// Admits agents and keeps their tunnels.
#[derive(Debug)]
pub struct Agents {
    /// Where tunnels go.
    pub registry: Registry<ServerTunnel>,
    /// Which certificates may be an agent's.
    pub rules: IdentityRules,
    /// What this server says of itself.
    pub hello: ServerHello,
    /// Serves enrolment on the agents' port, when there is a CA to enrol with.
    pub enrolment: Option<Arc<Enrolment>>,
    /// How many tunnels one member may hold.
    pub places: TunnelPlaces,
    /// Whose token an agent has to show, where none has a certificate.
    pub tokens: Option<AgentTokens>,
}

/// The places of tunnels, those of hellos under way included. By the certificate's cluster, so that one member's agents
/// take nothing from another's.
#[derive(Debug)]
pub struct TunnelPlaces {
    members: Arc<ConcurrencyLimiter<String>>,
    plain: Arc<ConcurrencyLimiter<String>>,
}

// === impl Agents ===

impl Agents {
    /// Accepts agents until the drain; then tells every agent, and returns when the last tunnel has ended.
    pub async fn serve(self: Arc<Self>, mut listener: TunnelListener, drain: DrainWatch) {
        let metrics = self.registry.metrics().clone();
        let enrolments = Gate::counted(MAX_ENROLMENTS, move |cut| metrics.reject(ENROLMENT_DOOR, cut.code()));
        let mut tasks = JoinSet::new();
        let mut sample = tokio::time::interval(REJECTIONS_INTERVAL);
        let mut counted = Rejections::default();
        loop {
            let accepted = tokio::select! {
                () = drain.signaled() => break,
                _ = sample.tick() => {
                    self.count_rejections(&mut counted, listener.rejected());
                    self.registry.metrics().show_quic_handshakes(listener.quic_handshakes());
                    continue;
                }
                Some(_) = tasks.join_next(), if !tasks.is_empty() => continue,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                None => break,
                Some(Accepted::Tunnel(pending)) => {
                    let span = tracing::info_span!("agent", agent.addr = %pending.remote_addr());
                    let (agents, drain) = (self.clone(), drain.clone());
                    tasks.spawn(async move { agents.run_tunnel(pending, drain).await }.instrument(span));
                }
                Some(Accepted::Https(connection)) => {
                    let Some(enrolment) = self.enrolment.clone() else {
                        self.registry.metrics().reject_handshake("no-enrolment");
                        continue;
                    };
                    let entrance = enrolments.enter();
                    let span = tracing::info_span!("enrolment", agent.addr = %connection.remote_addr);
                    let (agents, drain) = (self.clone(), drain.clone());
                    tasks.spawn(
                        async move { agents.serve_enrolment(&enrolment, connection, entrance, drain).await }
                            .instrument(span),
                    );
                }
            }
        }
        drop(listener);
        while tasks.join_next().await.is_some() {}
    }

    /// Puts what the listener turned away by itself into the metrics.
    fn count_rejections(&self, counted: &mut Rejections, now: Rejections) {
        let metrics = self.registry.metrics();
        for (reason, before, after) in [
            ("tls", counted.tls, now.tls),
            ("timed-out", counted.timed_out, now.timed_out),
            ("overload", counted.overload, now.overload),
            ("closed", counted.closed, now.closed),
            // Not agents at all, and no alert is about them.
            ("probe", counted.probes, now.probes),
        ] {
            metrics
                .rejected_handshakes
                .get_or_create(&RejectLabels { reason })
                .inc_by(after.saturating_sub(before));
        }
        *counted = now;
    }

    async fn run_tunnel(&self, pending: PendingTunnel, drain: DrainWatch) {
        let identity = match self.identify(pending.peer_certificates()).await {
            Ok(identity) => identity,
            Err(rejection) => {
                self.reject(&rejection);
                pending.refuse(&rejection.to_string(), rejection.kind()).await;
                return;
            }
        };
        // Taken before the hellos: they take time, and a count that is looked at after them would not hold.
        let Some(_place) = self.places.enter(&identity.cluster) else {
            let rejection = Rejection::TooManyTunnels(identity.cluster.clone());
            self.reject(&rejection);
            pending.refuse(&rejection.to_string(), rejection.kind()).await;
            return;
        };
        let carrier = pending.carrier();
        let remote_addr = pending.remote_addr();
        let greeted = match pending.greet(self.hello.clone()).await {
            Ok(greeted) => greeted,
            Err(error) => return self.not_established(&error),
        };
        let hello = greeted.hello().clone();
        let judged = tokio::select! {
            biased;
            judged = self.judge(&identity, &hello) => judged,
            // Nobody waits for the answer any more.
            _ = greeted.closed() => return self.not_established(&TunnelError::Closed("the admission")),
            () = drain.signaled() => {
                return greeted.refuse("the server has drained", RefusalKind::Temporary).await;
            }
        };
        if let Err(rejection) = judged {
            self.reject(&rejection);
            greeted.refuse(&rejection.to_string(), rejection.kind()).await;
            return;
        }
        let tunnel = match greeted.admit().await {
            Ok(tunnel) => tunnel,
            Err(error) => return self.not_established(&error),
        };
        let member = Member {
            cluster: identity.cluster.clone(),
            agent_id: hello.agent_id.clone(),
            instance: hello.instance.clone(),
            version: hello.version.clone(),
            labels: hello.labels.clone(),
            identifiers: Identifiers::of(&hello),
            carrier,
            remote_addr,
            connected_at: SystemTime::now(),
            not_before: identity.not_before,
            not_after: identity.not_after,
        };
        let registration = self.registry.register(member, tunnel.clone());
        tracing::info!(
            cluster = %identity.cluster, agent.id = %hello.agent_id, %carrier, tunnel.id = registration.entry.id,
            "tunnel established"
        );
        let (code, reason) = tokio::select! {
            reason = tunnel.closed() => (reason.code(), reason.to_string()),
            rejection = self.revocation(&identity) => self.end(&tunnel, &rejection),
            () = drain.signaled() => {
                tunnel.drain();
                tokio::select! {
                    reason = tunnel.closed() => (reason.code(), reason.to_string()),
                    // A drain may take as long as its deadline says; a revocation does not wait for it.
                    rejection = self.revocation(&identity) => self.end(&tunnel, &rejection),
                    () = idle(&registration) => {
                        tunnel.close("the server has drained");
                        ("drained", "drained".to_owned())
                    }
                }
            }
        };
        self.registry.metrics().end_tunnel(code);
        tracing::info!(
            cluster = %identity.cluster, agent.id = %hello.agent_id, tunnel.id = registration.entry.id, reason,
            "tunnel ended"
        );
    }

    /// Who the peer is, by its certificate and the directory.
    async fn identify(&self, certificates: &[CertificateDer<'static>]) -> Result<PeerIdentity, Rejection> {
        let identity = identity_of(certificates, &self.rules)?;
        if !identity.cluster.is_empty() {
            let directory = self.registry.directory();
            // Agents of a hub that has just been restarted come at once; its own list takes a moment.
            let _ = tokio::time::timeout(SYNC_TIMEOUT, directory.synced()).await;
            check_directory(directory, &identity)?;
        }
        Ok(identity)
    }

    /// Whether the agent may be what it says it is, as far as its certificate does not tell.
    async fn judge(&self, identity: &PeerIdentity, hello: &Hello) -> Result<(), Rejection> {
        compare_hello(identity, hello)?;
        match &self.tokens {
            Some(tokens) => tokens.check(hello.token.reveal()).await,
            None => Ok(()),
        }
    }

    fn not_established(&self, error: &TunnelError) {
        self.registry.metrics().reject_handshake("handshake");
        tracing::debug!(error = %service::error_chain(error), "the tunnel was not established");
    }

    /// Returns when the directory no longer admits this agent.
    async fn revocation(&self, identity: &PeerIdentity) -> Rejection {
        let directory = self.registry.directory();
        let changes = directory.changes().filter(|_| !identity.cluster.is_empty());
        if let Some(mut changes) = changes {
            loop {
                if let Err(rejection) = check_directory(directory, identity) {
                    return rejection;
                }
                if changes.changed().await.is_err() {
                    break;
                }
            }
        }
        std::future::pending().await
    }

    /// Ends an established tunnel; gives the reason as metrics have it, and in words.
    fn end(&self, tunnel: &ServerTunnel, rejection: &Rejection) -> (&'static str, String) {
        self.reject(rejection);
        rejection.turn_away(tunnel);
        (rejection.code(), rejection.to_string())
    }

    fn reject(&self, rejection: &Rejection) {
        self.registry.metrics().reject_handshake(rejection.code());
        // Agents try again for ever: the operator sees the counter and one line each time.
        tracing::info!(code = rejection.code(), "agent refused: {rejection}");
    }

    async fn serve_enrolment(
        &self,
        enrolment: &Arc<Enrolment>,
        connection: HttpsConnection,
        entrance: Entrance,
        drain: DrainWatch,
    ) {
        let HttpsConnection { stream, peer_certificates, remote_addr } = connection;
        let router = enrolment.router(peer_certificates.first().cloned());
        let limits = service::http::Limits::default();
        let serving = service::http::serve_connection(stream, remote_addr, router, &limits, entrance, drain);
        if tokio::time::timeout(ENROLMENT_TIMEOUT, serving).await.is_err() {
            self.registry.metrics().reject(ENROLMENT_DOOR, "timed-out");
            tracing::debug!("enrolment connection cut: it was open for too long");
        }
    }
}

/// Returns when the tunnel has no connections left.
async fn idle(registration: &crate::registry::Registration<ServerTunnel>) {
    let mut poll = tokio::time::interval(IDLE_POLL);
    loop {
        poll.tick().await;
        if registration.entry.load() == 0 {
            return;
        }
    }
}

/// What the first certificate of the chain says, by the rules.
///
/// # Errors
/// As [`Rejection`] says.
pub fn identity_of(
    certificates: &[CertificateDer<'_>],
    rules: &IdentityRules,
) -> Result<PeerIdentity, Rejection> {
    let Some(certificate) = certificates.first() else {
        if !rules.anonymous {
            return Err(Rejection::NoCertificate);
        }
        return Ok(PeerIdentity {
            cluster: String::new(),
            agent_id: None,
            not_before: SystemTime::UNIX_EPOCH,
            not_after: None,
        });
    };
    let (not_before, not_after) = tls::validity(certificate).map_err(Rejection::BadCertificate)?;
    match tls::agent_identity(certificate) {
        Ok(identity) => {
            if rules.trust_domain.as_ref().is_some_and(|domain| *domain != identity.trust_domain) {
                return Err(Rejection::TrustDomain(identity.trust_domain.to_string()));
            }
            Ok(PeerIdentity {
                cluster: identity.cluster.to_string(),
                agent_id: Some(identity.agent.to_string()),
                not_before,
                not_after: Some(not_after),
            })
        }
        Err(CertificateError::NoIdentity) if rules.plain => Ok(PeerIdentity {
            cluster: String::new(),
            agent_id: None,
            not_before,
            not_after: Some(not_after),
        }),
        Err(CertificateError::NoIdentity) => Err(Rejection::NotAnAgent),
        Err(error) => Err(Rejection::BadCertificate(error)),
    }
}

fn check_directory(directory: &ClusterDirectory, identity: &PeerIdentity) -> Result<(), Rejection> {
    let agent = identity.agent_id.as_deref();
    match directory.admits(&identity.cluster, agent, identity.not_before) {
        Lookup::Known(Admission::Good) => Ok(()),
        Lookup::Known(Admission::Revoked) => Err(Rejection::Revoked(identity.cluster.clone())),
        Lookup::Known(Admission::AgentRevoked) => Err(Rejection::RevokedAgent {
            cluster: identity.cluster.clone(),
            agent: agent.unwrap_or_default().to_owned(),
        }),
        Lookup::Unknown => Err(Rejection::UnknownCluster(identity.cluster.clone())),
        Lookup::NotSynced => Err(Rejection::Starting),
    }
}

/// The hello may repeat what the certificate says, and nothing else.
///
/// # Errors
/// [`Rejection::WrongCluster`] and [`Rejection::WrongAgent`].
pub fn compare_hello(identity: &PeerIdentity, hello: &Hello) -> Result<(), Rejection> {
    if hello.cluster != identity.cluster {
        return Err(Rejection::WrongCluster {
            hello: hello.cluster.clone(),
            certificate: identity.cluster.clone(),
        });
    }
    match &identity.agent_id {
        Some(agent) if *agent != hello.agent_id => {
            Err(Rejection::WrongAgent { hello: hello.agent_id.clone(), certificate: agent.clone() })
        }
        _ => Ok(()),
    }
}

// === impl TunnelPlaces ===

impl TunnelPlaces {
    /// At most so many tunnels for each member, and for all agents without a cluster together.
    pub fn new(per_member: usize, plain: usize) -> Self {
        Self { members: ConcurrencyLimiter::new(per_member), plain: ConcurrencyLimiter::new(plain) }
    }

    fn enter(&self, cluster: &String) -> Option<ClientPlace<String>> {
        if cluster.is_empty() { self.plain.enter(cluster) } else { self.members.enter(cluster) }
    }
}

impl Default for TunnelPlaces {
    fn default() -> Self {
        Self::new(MAX_TUNNELS_PER_CLUSTER, MAX_PLAIN_TUNNELS)
    }
}

// === impl Rejection ===

impl Rejection {
    /// A word for metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoCertificate => "no-certificate",
            Self::NotAnAgent => "not-an-agent",
            Self::BadCertificate(_) => "bad-certificate",
            Self::TrustDomain(_) => "trust-domain",
            Self::UnknownCluster(_) => "unknown-cluster",
            Self::Revoked(_) => "revoked",
            Self::RevokedAgent { .. } => "revoked-agent",
            Self::Starting => "starting",
            Self::WrongCluster { .. } => "wrong-cluster",
            Self::WrongAgent { .. } => "wrong-agent",
            Self::TooManyTunnels(_) => "too-many-tunnels",
            Self::NoToken => "no-token",
            Self::BadToken => "bad-token",
            Self::TokenUnchecked => "token-unchecked",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tls::{AgentIdentity, AgentKey, CertificateAuthority};

    const HOUR: Duration = Duration::from_secs(3600);

    fn agent_certificate(uri: &str) -> CertificateDer<'static> {
        let ca = CertificateAuthority::create("test").unwrap();
        let csr = AgentKey::generate().unwrap().certificate_request().unwrap();
        let pem = ca.sign_agent(&csr, &uri.parse::<AgentIdentity>().unwrap(), HOUR).unwrap();
        tls::certificates_from_pem(pem.as_bytes()).unwrap().remove(0)
    }

    fn plain_certificate() -> CertificateDer<'static> {
        let ca = CertificateAuthority::create("test").unwrap();
        let pem = ca.issue_client("agent", &[], HOUR).unwrap().certificate_pem;
        tls::certificates_from_pem(pem.as_bytes()).unwrap().remove(0)
    }

    fn rules(plain: bool, anonymous: bool) -> IdentityRules {
        IdentityRules { trust_domain: Some(TrustDomain::default()), plain, anonymous }
    }

    #[test]
    fn the_certificate_decides() {
        let agent = agent_certificate("spiffe://cellway.local/cluster/east/agent/a1");
        let identity = identity_of(&[agent], &rules(false, false)).unwrap();
        assert_eq!((identity.cluster.as_str(), identity.agent_id.as_deref()), ("east", Some("a1")));
        let foreign = agent_certificate("spiffe://other.hub/cluster/east/agent/a1");
        assert_eq!(
            identity_of(&[foreign], &rules(true, true)),
            Err(Rejection::TrustDomain("other.hub".to_owned()))
        );
        assert_eq!(identity_of(&[], &rules(true, false)), Err(Rejection::NoCertificate));
        assert_eq!(identity_of(&[], &rules(false, true)).unwrap().cluster, "");
        assert_eq!(identity_of(&[plain_certificate()], &rules(false, true)), Err(Rejection::NotAnAgent));
        assert_eq!(identity_of(&[plain_certificate()], &rules(true, false)).unwrap().cluster, "");
    }

    #[test]
    fn a_hello_cannot_claim_another_member() {
        let agent = agent_certificate("spiffe://cellway.local/cluster/east/agent/a1");
        let identity = identity_of(&[agent], &rules(false, false)).unwrap();
        let plain = identity_of(&[plain_certificate()], &rules(true, false)).unwrap();
        let hello = |cluster: &str, agent: &str| Hello {
            cluster: cluster.to_owned(),
            agent_id: agent.to_owned(),
            ..Hello::default()
        };
        for (identity, hello, expect) in [
            (&identity, hello("east", "a1"), None),
            (&identity, hello("west", "a1"), Some("wrong-cluster")),
            (&identity, hello("", "a1"), Some("wrong-cluster")),
            (&identity, hello("east", "a2"), Some("wrong-agent")),
            (&plain, hello("", "whatever"), None),
            (&plain, hello("east", "whatever"), Some("wrong-cluster")),
        ] {
            let seen = compare_hello(identity, &hello).err().map(|rejection| rejection.code());
            assert_eq!(seen, expect, "{hello:?}");
        }
    }

    #[test]
    fn a_member_has_its_own_places() {
        let places = TunnelPlaces::new(2, 3);
        let enter = |cluster: &str| places.enter(&cluster.to_owned());
        let one = enter("east");
        let _two = enter("east");
        assert!(one.is_some() && enter("east").is_none());
        assert!(enter("west").is_some());
        let plain = [enter(""), enter(""), enter("")];
        assert!(plain.iter().all(Option::is_some) && enter("").is_none());
        drop(one);
        assert!(enter("east").is_some());
    }
}
