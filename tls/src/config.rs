//! TLS configurations of listeners and clients that follow their files.
//!
//! [`ServerTls`] and [`ClientTls`] are cheap handles on the *current* configuration. A reload builds the new one
//! completely before it replaces the old one, so that a half-written or mismatched pair of files changes nothing:
//! handshakes go on with what was there, and the next look may find the pair whole. Connections that are already
//! established never notice.

use std::{
    collections::HashMap,
    fmt,
    future::Future,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use parking_lot::RwLock;
use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme,
    SupportedProtocolVersion,
    client::{
        Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::CryptoProvider,
    server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject};
use sha2::{Digest, Sha256};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::{
    certificate::{CaHash, CertificateError, certificates_from_pem},
    files::{FileError, read_bounded},
};

/// The most ALPN lists that a configuration is kept for. Callers use one or two; more would be a mistake of ours.
const MAX_CACHED_CONFIGS: usize = 16;

static ONLY_13: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13];
static FROM_12: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13, &rustls::version::TLS12];

/// Why there is no (new) TLS configuration.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file could not be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file or text holds no usable certificate.
    #[error("failed to read certificates from {origin}")]
    Certificates {
        /// The file, or what the text was.
        origin: String,
        /// Why.
        #[source]
        source: CertificateError,
    },
    /// A file or text holds no usable key.
    #[error("failed to read a private key from {origin}: {reason}")]
    Key {
        /// The file, or what the text was.
        origin: String,
        /// Why.
        reason: String,
    },
    /// One of certificate and key was given without the other.
    #[error("a certificate needs its key and a key its certificate: only one of them was given")]
    HalfIdentity,
    /// Client certificates are to be checked, against nothing.
    #[error("client certificates are to be checked: name the CA that signs them")]
    NoClientCa,
    /// A CA certificate cannot be a trust anchor.
    #[error("failed to use a certificate of {origin} as a trust anchor")]
    Anchor {
        /// The file, or what the text was.
        origin: String,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// The verifier for the peer's certificate could not be made.
    #[error("failed to prepare the check of the peer's certificates")]
    Verifier(#[from] VerifierBuilderError),
    /// The certificate and the key do not go together, or the key is of a kind that is not supported.
    #[error("failed to use the certificate and the key of {origin}: do they belong together?")]
    Identity {
        /// The file, or what the text was.
        origin: String,
        /// Why.
        #[source]
        source: rustls::Error,
    },
}

/// Whether a listener asks for client certificates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientAuth {
    /// A handshake without a valid one fails.
    Required,
    /// One that is presented must be valid; none is accepted too, and the caller looks at who it was.
    Optional,
    /// None is asked for.
    None,
}

/// The protocol versions spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsVersions {
    /// TLS 1.3: tunnels, whose both ends are ours or current.
    Only13,
    /// TLS 1.2 and 1.3: whoever else may come.
    From12,
}

/// The current TLS configuration of a listener. Clones share it.
#[derive(Clone)]
pub struct ServerTls(Arc<ServerInner>);

struct ServerInner {
    sources: ServerSources,
    client_auth: ClientAuth,
    versions: TlsVersions,
    current: RwLock<Current<ServerConfig>>,
}

#[derive(Clone)]
struct ServerSources {
    certificate: Source,
    key: Source,
    client_ca: Option<Source>,
}

/// The current TLS configuration of a client. Clones share it.
#[derive(Clone)]
pub struct ClientTls(Arc<ClientInner>);

struct ClientInner {
    sources: ClientSources,
    versions: TlsVersions,
    current: RwLock<Current<ClientConfig>>,
}

#[derive(Clone)]
struct ClientSources {
    trust: TrustSource,
    identity: Option<(Source, Source)>,
}

#[derive(Clone)]
enum TrustSource {
    Ca(Source),
    Hash(CaHash),
}

/// Where a PEM text comes from, now and at each reload.
#[derive(Clone)]
enum Source {
    File(PathBuf),
    Text { name: &'static str, pem: Arc<[u8]> },
}

struct Current<C> {
    /// Of everything that was read, to tell a change.
    fingerprint: [u8; 32],
    /// Without ALPN.
    base: Arc<C>,
    /// The end entity's certificate, where there is one.
    certificate: Option<CertificateDer<'static>>,
    by_alpn: HashMap<Vec<Vec<u8>>, Arc<C>>,
}

// === impl ServerTls ===

impl ServerTls {
    /// Reads certificate chain, key and the CA of the clients from files. TLS 1.3 only, until
    /// [`Self::with_versions`] says otherwise.
    ///
    /// # Errors
    /// When a file is missing or broken, certificate and key do not belong together, or `client_ca` is missing though
    /// `client_auth` needs it.
    pub fn from_files(
        certificate: impl Into<PathBuf>,
        key: impl Into<PathBuf>,
        client_ca: Option<PathBuf>,
        client_auth: ClientAuth,
    ) -> Result<Self, TlsError> {
        let sources = ServerSources {
            certificate: Source::File(certificate.into()),
            key: Source::File(key.into()),
            client_ca: client_ca.map(Source::File),
        };
        Self::new(sources, client_auth, TlsVersions::Only13)
    }

    /// The same from PEM texts; a reload finds nothing new.
    ///
    /// # Errors
    /// As [`Self::from_files`].
    pub fn from_pem(
        certificate: &str,
        key: &str,
        client_ca: Option<&str>,
        client_auth: ClientAuth,
    ) -> Result<Self, TlsError> {
        let sources = ServerSources {
            certificate: Source::text("the server's certificate", certificate),
            key: Source::text("the server's key", key),
            client_ca: client_ca.map(|pem| Source::text("the clients' CA", pem)),
        };
        Self::new(sources, client_auth, TlsVersions::Only13)
    }

    /// The same listener with other protocol versions.
    ///
    /// # Errors
    /// As [`Self::from_files`]: the sources are read again.
    pub fn with_versions(self, versions: TlsVersions) -> Result<Self, TlsError> {
        Self::new(self.0.sources.clone(), self.0.client_auth, versions)
    }

    fn new(sources: ServerSources, client_auth: ClientAuth, versions: TlsVersions) -> Result<Self, TlsError> {
        let current = sources.load(client_auth, versions, None)?.ok_or(TlsError::HalfIdentity)?;
        Ok(Self(Arc::new(ServerInner { sources, client_auth, versions, current: RwLock::new(current) })))
    }

    /// The current configuration for these protocols, in order of preference; the same `Arc` until a reload.
    pub fn config(&self, alpn: &[&[u8]]) -> Arc<ServerConfig> {
        config_for(&self.0.current, alpn, |config, alpn| config.alpn_protocols = alpn)
    }

    /// An acceptor with the current configuration: make one for each connection, so that a reload is seen.
    pub fn acceptor(&self, alpn: &[&[u8]]) -> TlsAcceptor {
        TlsAcceptor::from(self.config(alpn))
    }

    /// The server's own certificate.
    pub fn certificate(&self) -> Option<CertificateDer<'static>> {
        self.0.current.read().certificate.clone()
    }

    /// Reads the sources again; `true` when there was something new, which is then in force.
    ///
    /// # Errors
    /// When what is there now cannot be used; the former configuration stays in force.
    pub fn reload(&self) -> Result<bool, TlsError> {
        let inner = &self.0;
        let former = inner.current.read().fingerprint;
        Ok(match inner.sources.load(inner.client_auth, inner.versions, Some(former))? {
            Some(new) => {
                *inner.current.write() = new;
                true
            }
            None => false,
        })
    }

    /// Looks at the files at each interval and takes what is new. A new content that cannot be used is warned of once
    /// and the former stays. Never ends: run it as long as the listener.
    pub fn watch_files(self, interval: Duration) -> impl Future<Output = ()> + Send + 'static {
        watch_files(interval, "listener", move || self.reload())
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerTls")
            .field("certificate", &self.0.sources.certificate)
            .field("client_auth", &self.0.client_auth)
            .field("versions", &self.0.versions)
            .finish_non_exhaustive()
    }
}

impl ServerSources {
    /// `None`: unchanged since `former`.
    fn load(
        &self,
        client_auth: ClientAuth,
        versions: TlsVersions,
        former: Option<[u8; 32]>,
    ) -> Result<Option<Current<ServerConfig>>, TlsError> {
        let certificate = self.certificate.read()?;
        let key = self.key.read()?;
        let client_ca = self.client_ca.as_ref().map(Source::read).transpose()?;
        let fingerprint = fingerprint([Some(&certificate), Some(&key), client_ca.as_ref()]);
        if former == Some(fingerprint) {
            return Ok(None);
        }
        let provider = provider();
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(versions.supported())
            .map_err(|source| TlsError::Identity { origin: self.certificate.to_string(), source })?;
        let builder = match client_auth {
            ClientAuth::None => builder.with_no_client_auth(),
            ClientAuth::Required | ClientAuth::Optional => {
                let (Some(source), Some(pem)) = (&self.client_ca, client_ca) else {
                    return Err(TlsError::NoClientCa);
                };
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots(source, &pem)?), provider);
                let verifier = match client_auth {
                    ClientAuth::Optional => verifier.allow_unauthenticated().build()?,
                    _ => verifier.build()?,
                };
                builder.with_client_cert_verifier(verifier)
            }
        };
        let chain = certificates(&self.certificate, &certificate)?;
        let first = chain.first().cloned();
        let mut config = builder
            .with_single_cert(chain, private_key(&self.key, &key)?)
            .map_err(|source| TlsError::Identity { origin: self.certificate.to_string(), source })?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Some(Current { fingerprint, base: Arc::new(config), certificate: first, by_alpn: HashMap::new() }))
    }
}

// === impl ClientTls ===

impl ClientTls {
    /// Reads the servers' CA bundle and, if the client has one, its certificate and key from files. TLS 1.3 only,
    /// until [`Self::with_versions`] says otherwise.
    ///
    /// # Errors
    /// When a file is missing or broken, only one of certificate and key is given, or they do not belong together.
    pub fn from_files(
        ca: impl Into<PathBuf>,
        certificate: Option<PathBuf>,
        key: Option<PathBuf>,
    ) -> Result<Self, TlsError> {
        let identity = match (certificate, key) {
            (Some(certificate), Some(key)) => Some((Source::File(certificate), Source::File(key))),
            (None, None) => None,
            _ => return Err(TlsError::HalfIdentity),
        };
        Self::new(
            ClientSources { trust: TrustSource::Ca(Source::File(ca.into())), identity },
            TlsVersions::Only13,
        )
    }

    /// The same from PEM texts; `identity` is certificate chain and key. A reload finds nothing new.
    ///
    /// # Errors
    /// As [`Self::from_files`].
    pub fn from_pem(ca: &str, identity: Option<(&str, &str)>) -> Result<Self, TlsError> {
        let trust = TrustSource::Ca(Source::text("the servers' CA", ca));
        Self::new(ClientSources { trust, identity: text_identity(identity) }, TlsVersions::Only13)
    }

    /// Trusts exactly the CA with this hash, which the server must send at the end of its chain. Everything else is
    /// checked as ever: signatures, the server's name, dates.
    ///
    /// # Errors
    /// When `identity` cannot be used.
    pub fn with_ca_hash(hash: CaHash, identity: Option<(&str, &str)>) -> Result<Self, TlsError> {
        let trust = TrustSource::Hash(hash);
        Self::new(ClientSources { trust, identity: text_identity(identity) }, TlsVersions::Only13)
    }

    /// The same client with other protocol versions.
    ///
    /// # Errors
    /// As [`Self::from_files`]: the sources are read again.
    pub fn with_versions(self, versions: TlsVersions) -> Result<Self, TlsError> {
        Self::new(self.0.sources.clone(), versions)
    }

    fn new(sources: ClientSources, versions: TlsVersions) -> Result<Self, TlsError> {
        let current = sources.load(versions, None)?.ok_or(TlsError::HalfIdentity)?;
        Ok(Self(Arc::new(ClientInner { sources, versions, current: RwLock::new(current) })))
    }

    /// The current configuration for these protocols, in order of preference; the same `Arc` until a reload.
    pub fn config(&self, alpn: &[&[u8]]) -> Arc<ClientConfig> {
        config_for(&self.0.current, alpn, |config, alpn| config.alpn_protocols = alpn)
    }

    /// A connector with the current configuration: make one for each connection, so that a reload is seen.
    pub fn connector(&self, alpn: &[&[u8]]) -> TlsConnector {
        TlsConnector::from(self.config(alpn))
    }

    /// The client's own certificate.
    pub fn certificate(&self) -> Option<CertificateDer<'static>> {
        self.0.current.read().certificate.clone()
    }

    /// Reads the sources again; `true` when there was something new, which is then in force.
    ///
    /// # Errors
    /// When what is there now cannot be used; the former configuration stays in force.
    pub fn reload(&self) -> Result<bool, TlsError> {
        let inner = &self.0;
        let former = inner.current.read().fingerprint;
        Ok(match inner.sources.load(inner.versions, Some(former))? {
            Some(new) => {
                *inner.current.write() = new;
                true
            }
            None => false,
        })
    }

    /// Looks at the files at each interval and takes what is new. A new content that cannot be used is warned of once
    /// and the former stays. Never ends: run it as long as the client.
    pub fn watch_files(self, interval: Duration) -> impl Future<Output = ()> + Send + 'static {
        watch_files(interval, "client", move || self.reload())
    }
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("ClientTls");
        match &self.0.sources.trust {
            TrustSource::Ca(source) => debug.field("ca", source),
            TrustSource::Hash(hash) => debug.field("ca_hash", hash),
        };
        let certificate = self.0.sources.identity.as_ref().map(|(certificate, _)| certificate);
        debug.field("certificate", &certificate).field("versions", &self.0.versions).finish_non_exhaustive()
    }
}

impl ClientSources {
    fn load(
        &self,
        versions: TlsVersions,
        former: Option<[u8; 32]>,
    ) -> Result<Option<Current<ClientConfig>>, TlsError> {
        let ca = match &self.trust {
            TrustSource::Ca(source) => Some(source.read()?),
            TrustSource::Hash(_) => None,
        };
        let identity = match &self.identity {
            Some((certificate, key)) => Some((certificate.read()?, key.read()?)),
            None => None,
        };
        let (certificate, key) = identity.as_ref().map_or((None, None), |(c, k)| (Some(c), Some(k)));
        let fingerprint = fingerprint([ca.as_ref(), certificate, key]);
        if former == Some(fingerprint) {
            return Ok(None);
        }
        let provider = provider();
        let origin = || match &self.identity {
            Some((certificate, _)) => certificate.to_string(),
            None => "the client".to_owned(),
        };
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(versions.supported())
            .map_err(|source| TlsError::Identity { origin: origin(), source })?;
        let builder = match (&self.trust, ca) {
            (TrustSource::Ca(source), Some(pem)) => builder.with_root_certificates(roots(source, &pem)?),
            (TrustSource::Hash(hash), _) => builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(PinnedCaVerifier { hash: *hash, provider })),
            // `ca` was read just above for this very variant.
            (TrustSource::Ca(_), None) => return Err(TlsError::NoClientCa),
        };
        let (mut config, first) = match (&self.identity, identity) {
            (Some((certificate_source, key_source)), Some((certificate, key))) => {
                let chain = certificates(certificate_source, &certificate)?;
                let first = chain.first().cloned();
                let config = builder
                    .with_client_auth_cert(chain, private_key(key_source, &key)?)
                    .map_err(|source| TlsError::Identity { origin: origin(), source })?;
                (config, first)
            }
            _ => (builder.with_no_client_auth(), None),
        };
        config.resumption = Resumption::disabled();
        Ok(Some(Current { fingerprint, base: Arc::new(config), certificate: first, by_alpn: HashMap::new() }))
    }
}

/// Accepts a server whose chain ends in the one CA that is known by its hash.
#[derive(Debug)]
struct PinnedCaVerifier {
    hash: CaHash,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedCaVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        // Only found, not trusted for being there: the chain is then verified against this certificate, and whoever
        // presents it without holding its key has no chain that leads to it.
        let ca = intermediates
            .iter()
            .find(|certificate| CaHash::of(certificate).is_ok_and(|hash| hash == self.hash))
            .ok_or(rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer))?;
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone())
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

// === impl TlsVersions ===

impl TlsVersions {
    fn supported(self) -> &'static [&'static SupportedProtocolVersion] {
        match self {
            Self::Only13 => ONLY_13,
            Self::From12 => FROM_12,
        }
    }
}

// === impl Source ===

impl Source {
    fn text(name: &'static str, pem: &str) -> Self {
        Self::Text { name, pem: pem.as_bytes().into() }
    }

    fn read(&self) -> Result<Vec<u8>, FileError> {
        match self {
            Self::File(path) => read_bounded(path),
            Self::Text { pem, .. } => Ok(pem.to_vec()),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => fmt::Display::fmt(&Path::display(path), f),
            Self::Text { name, .. } => f.write_str(name),
        }
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

// === helpers ===

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn text_identity(identity: Option<(&str, &str)>) -> Option<(Source, Source)> {
    identity.map(|(certificate, key)| {
        (Source::text("the client's certificate", certificate), Source::text("the client's key", key))
    })
}

fn certificates(source: &Source, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    certificates_from_pem(pem)
        .map_err(|error| TlsError::Certificates { origin: source.to_string(), source: error })
}

fn private_key(source: &Source, pem: &[u8]) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(pem)
        .map_err(|error| TlsError::Key { origin: source.to_string(), reason: error.to_string() })
}

fn roots(source: &Source, pem: &[u8]) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(source, pem)? {
        roots
            .add(certificate)
            .map_err(|error| TlsError::Anchor { origin: source.to_string(), source: error })?;
    }
    Ok(roots)
}

fn fingerprint(contents: [Option<&Vec<u8>>; 3]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for content in contents {
        // The length first, so that a byte cannot move from one file to the next unseen.
        hasher.update(content.map_or(u64::MAX, |content| content.len() as u64).to_be_bytes());
        hasher.update(content.map_or(&[][..], Vec::as_slice));
    }
    hasher.finalize().into()
}

fn config_for<C: Clone>(
    current: &RwLock<Current<C>>,
    alpn: &[&[u8]],
    set: impl FnOnce(&mut C, Vec<Vec<u8>>),
) -> Arc<C> {
    let alpn: Vec<Vec<u8>> = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    if let Some(config) = current.read().by_alpn.get(&alpn) {
        return config.clone();
    }
    let mut current = current.write();
    if let Some(config) = current.by_alpn.get(&alpn) {
        return config.clone();
    }
    let mut config = C::clone(&current.base);
    set(&mut config, alpn.clone());
    let config = Arc::new(config);
    if current.by_alpn.len() < MAX_CACHED_CONFIGS {
        current.by_alpn.insert(alpn, config.clone());
    }
    config
}

async fn watch_files(
    interval: Duration,
    of: &'static str,
    reload: impl Fn() -> Result<bool, TlsError> + Send + Sync + 'static,
) {
    let reload = Arc::new(reload);
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut warned = None;
    loop {
        ticks.tick().await;
        let reload = reload.clone();
        // The files may lie on a volume that hangs; and building a configuration takes milliseconds.
        let Ok(outcome) = tokio::task::spawn_blocking(move || reload()).await else {
            // Cancelled: the runtime is shutting down.
            return;
        };
        match outcome {
            Ok(true) => {
                warned = None;
                tracing::info!(of, "certificates were reloaded");
            }
            Ok(false) => warned = None,
            Err(error) => {
                let text = chain(&error);
                if warned.as_ref() != Some(&text) {
                    tracing::warn!(of, error = %text, "failed to reload certificates, the former stay in use");
                    warned = Some(text);
                }
            }
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::{fs, io, time::SystemTime};

    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    use super::*;
    use crate::{AgentKey, CertificateAuthority, IssuedCertificate, agent_identity, client, server, user_of};

    const HOUR: Duration = Duration::from_secs(3600);

    fn authority() -> CertificateAuthority {
        CertificateAuthority::create("test hub").unwrap()
    }

    fn hub_names() -> Vec<String> {
        vec!["hub.example".to_owned(), "192.0.2.1".to_owned()]
    }

    fn server(authority: &CertificateAuthority, issued: &IssuedCertificate, auth: ClientAuth) -> ServerTls {
        let ca = Some(authority.certificate_pem());
        ServerTls::from_pem(&issued.certificate_pem, &issued.key_pem, ca, auth).unwrap()
    }

    /// A handshake and one byte each way (in TLS 1.3 the client learns of a refused certificate only when it reads).
    async fn connect(
        server: &ServerTls,
        client: &ClientTls,
        name: &str,
    ) -> io::Result<(client::TlsStream<DuplexStream>, server::TlsStream<DuplexStream>)> {
        let (near, far) = tokio::io::duplex(64 << 10);
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let accept = async {
            let mut stream = server.acceptor(&[b"cellway/1"]).accept(far).await?;
            stream.write_all(b"x").await?;
            stream.read_u8().await?;
            io::Result::Ok(stream)
        };
        let connect = async {
            let mut stream = client.connector(&[b"cellway/1"]).connect(name, near).await?;
            stream.read_u8().await?;
            stream.write_all(b"x").await?;
            io::Result::Ok(stream)
        };
        let (accepted, connected) = tokio::join!(accept, connect);
        Ok((connected?, accepted?))
    }

    #[tokio::test]
    async fn an_agent_and_a_server_know_each_other() {
        let authority = authority();
        let issued = authority.issue_server(&hub_names(), HOUR).unwrap();
        let server = self::server(&authority, &issued, ClientAuth::Required);
        let identity = "spiffe://cellway.local/cluster/a/agent/1".parse().unwrap();
        let key = AgentKey::generate().unwrap();
        let certificate = authority.sign_agent(&key.certificate_request().unwrap(), &identity, HOUR).unwrap();
        let client =
            ClientTls::from_pem(authority.certificate_pem(), Some((&certificate, &key.to_pem()))).unwrap();
        for name in ["hub.example", "192.0.2.1"] {
            let (near, far) = connect(&server, &client, name).await.unwrap();
            assert_eq!(near.get_ref().1.alpn_protocol(), Some(&b"cellway/1"[..]));
            assert_eq!(near.get_ref().1.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
            let presented = far.get_ref().1.peer_certificates().unwrap();
            assert_eq!(agent_identity(&presented[0]).unwrap(), identity);
        }
        connect(&server, &client, "other.example").await.unwrap_err();
        // Without a certificate, and with one of another authority.
        let nobody = ClientTls::from_pem(authority.certificate_pem(), None).unwrap();
        connect(&server, &nobody, "hub.example").await.unwrap_err();
        let foreign =
            self::authority().sign_agent(&key.certificate_request().unwrap(), &identity, HOUR).unwrap();
        let foreign =
            ClientTls::from_pem(authority.certificate_pem(), Some((&foreign, &key.to_pem()))).unwrap();
        connect(&server, &foreign, "hub.example").await.unwrap_err();
        // Optional: none is accepted, a bad one is not.
        let server = self::server(&authority, &issued, ClientAuth::Optional);
        let (_, far) = connect(&server, &nobody, "hub.example").await.unwrap();
        assert!(far.get_ref().1.peer_certificates().is_none());
        connect(&server, &foreign, "hub.example").await.unwrap_err();
    }

    #[tokio::test]
    async fn an_expired_certificate_is_refused_on_either_side() {
        let authority = authority();
        let past = SystemTime::now() - 10 * HOUR;
        let good = authority.issue_server(&hub_names(), HOUR).unwrap();
        let old = authority.issue_server_at(&hub_names(), HOUR, past).unwrap();
        let client = ClientTls::from_pem(authority.certificate_pem(), None).unwrap();
        let server = self::server(&authority, &old, ClientAuth::None);
        connect(&server, &client, "hub.example").await.unwrap_err();

        let old = authority.issue_client_at("user", &[], HOUR, past).unwrap();
        let identity = Some((old.certificate_pem.as_str(), old.key_pem.as_str()));
        let client = ClientTls::from_pem(authority.certificate_pem(), identity).unwrap();
        let server = self::server(&authority, &good, ClientAuth::Required);
        connect(&server, &client, "hub.example").await.unwrap_err();
    }

    #[tokio::test]
    async fn a_hash_pins_the_authority_and_nothing_less() {
        let authority = authority();
        let hash = authority.public_key_hash();
        assert_eq!(hash.to_string().parse::<CaHash>().unwrap(), hash);
        let issued = authority.issue_server(&hub_names(), HOUR).unwrap();
        let server = self::server(&authority, &issued, ClientAuth::None);
        let pinned = ClientTls::with_ca_hash(hash, None).unwrap();
        connect(&server, &pinned, "hub.example").await.unwrap();
        connect(&server, &pinned, "other.example").await.unwrap_err();

        let wrong = ClientTls::with_ca_hash(self::authority().public_key_hash(), None).unwrap();
        connect(&server, &wrong, "hub.example").await.unwrap_err();

        // An impostor adds the true CA's certificate, which is public, to a chain of its own.
        let impostor = self::authority();
        let forged = impostor.issue_server(&hub_names(), HOUR).unwrap();
        let chain = format!("{}{}", forged.certificate_pem, authority.certificate_pem());
        let server = ServerTls::from_pem(&chain, &forged.key_pem, None, ClientAuth::None).unwrap();
        connect(&server, &pinned, "hub.example").await.unwrap_err();

        let past = SystemTime::now() - 10 * HOUR;
        let old = authority.issue_server_at(&hub_names(), HOUR, past).unwrap();
        let server = self::server(&authority, &old, ClientAuth::None);
        connect(&server, &pinned, "hub.example").await.unwrap_err();

        for bad in ["", "sha256:", "sha256:zz", "md5:00", &format!("sha256:{}", "0".repeat(63))] {
            assert!(bad.parse::<CaHash>().is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_reload_takes_the_new_files_and_only_good_ones() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let authority = authority();
        let write = |issued: &IssuedCertificate| {
            fs::write(at("crt"), &issued.certificate_pem).unwrap();
            fs::write(at("key"), &issued.key_pem).unwrap();
        };
        write(&authority.issue_server(&["one.example".to_owned()], HOUR).unwrap());
        fs::write(at("ca"), authority.certificate_pem()).unwrap();
        let server = ServerTls::from_files(at("crt"), at("key"), None, ClientAuth::None).unwrap();
        let client = ClientTls::from_files(at("ca"), None, None).unwrap();
        let before = server.config(&[b"a"]);
        assert!(Arc::ptr_eq(&before, &server.config(&[b"a"])));
        assert!(!server.reload().unwrap());
        assert!(Arc::ptr_eq(&before, &server.config(&[b"a"])), "nothing was new");
        let established = connect(&server, &client, "one.example").await.unwrap();

        let two = authority.issue_server(&["two.example".to_owned()], HOUR).unwrap();
        write(&two);
        assert!(server.reload().unwrap());
        assert!(!Arc::ptr_eq(&before, &server.config(&[b"a"])));
        connect(&server, &client, "two.example").await.unwrap();
        connect(&server, &client, "one.example").await.unwrap_err();
        let (mut near, mut far) = established;
        near.write_all(b"y").await.unwrap();
        assert_eq!(far.read_u8().await.unwrap(), b'y');

        // The certificate has been replaced, the key not yet; then garbage; then nothing at all.
        let three = authority.issue_server(&["three.example".to_owned()], HOUR).unwrap();
        fs::write(at("crt"), &three.certificate_pem).unwrap();
        assert!(matches!(server.reload(), Err(TlsError::Identity { .. })));
        fs::write(at("crt"), "garbage").unwrap();
        assert!(matches!(server.reload(), Err(TlsError::Certificates { .. })));
        fs::remove_file(at("key")).unwrap();
        assert!(matches!(server.reload(), Err(TlsError::File(_))));
        connect(&server, &client, "two.example").await.unwrap();
        write(&three);
        assert!(server.reload().unwrap());
        connect(&server, &client, "three.example").await.unwrap();
    }

    #[tokio::test]
    async fn watched_files_are_taken_up() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let authority = authority();
        let write = |user: &str| {
            let issued = authority.issue_client(user, &[], HOUR).unwrap();
            fs::write(at("crt"), &issued.certificate_pem).unwrap();
            fs::write(at("key"), &issued.key_pem).unwrap();
        };
        fs::write(at("ca"), authority.certificate_pem()).unwrap();
        write("one");
        let client = ClientTls::from_files(at("ca"), Some(at("crt")), Some(at("key"))).unwrap();
        let user = |client: &ClientTls| user_of(&client.certificate().unwrap()).unwrap().0;
        assert_eq!(user(&client), "one");
        write("two");
        let watch = client.clone().watch_files(Duration::from_millis(5));
        let seen = async {
            while user(&client) != "two" {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), async {
            tokio::select! { () = watch => {}, () = seen => {} }
        })
        .await
        .unwrap();
    }

    #[tokio::test]
    async fn older_versions_only_where_allowed() {
        let authority = authority();
        let issued = authority.issue_server(&hub_names(), HOUR).unwrap();
        let server = self::server(&authority, &issued, ClientAuth::None);
        let mut old = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS12])
            .unwrap()
            .with_root_certificates(
                roots(&Source::text("ca", ""), authority.certificate_pem().as_bytes()).unwrap(),
            )
            .with_no_client_auth();
        old.alpn_protocols = vec![b"cellway/1".to_vec()];
        let handshake = async |server: &ServerTls| {
            let (near, far) = tokio::io::duplex(64 << 10);
            let connector = TlsConnector::from(Arc::new(old.clone()));
            let name = ServerName::try_from("hub.example").unwrap();
            let acceptor = server.acceptor(&[b"cellway/1"]);
            tokio::join!(acceptor.accept(far), connector.connect(name, near)).1.map(drop)
        };
        handshake(&server).await.unwrap_err();
        let server = server.with_versions(TlsVersions::From12).unwrap();
        handshake(&server).await.unwrap();
    }

    #[test]
    fn what_is_missing_is_said() {
        let authority = authority();
        let issued = authority.issue_server(&hub_names(), HOUR).unwrap();
        let error = ServerTls::from_pem(&issued.certificate_pem, &issued.key_pem, None, ClientAuth::Required)
            .unwrap_err();
        assert!(matches!(error, TlsError::NoClientCa));
        let error = ClientTls::from_files("ca", Some("crt".into()), None).unwrap_err();
        assert!(matches!(error, TlsError::HalfIdentity));
        let error = ClientTls::from_files("/nonexistent/ca", None, None).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/ca"));
    }
}
