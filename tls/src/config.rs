//! TLS configurations of listeners and clients that follow their files.
//!
//! [`ServerTls`] and [`ClientTls`] are cheap handles on the *current* configuration. A reload builds the new one
//! completely before it replaces the old one, so that a half-written or mismatched pair of files changes nothing:
//! handshakes go on with what was there, and the next look may find the pair whole. Connections that are already
//! established never notice.

mod client;
mod server;

use std::{
    collections::HashMap,
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use parking_lot::RwLock;
use rustls::{
    CipherSuite, RootCertStore, SupportedProtocolVersion, crypto::CryptoProvider,
    server::VerifierBuilderError,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use sha2::{Digest, Sha256};

pub use self::{client::ClientTls, server::ServerTls};
use crate::{
    certificate::{CertificateError, certificates_from_pem},
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

/// Whether a handshake failed because one side does not take the other for whom it should be, rather than because the
/// connection broke or something else was at the other end.
pub fn refuses_identity(error: &io::Error) -> bool {
    use rustls::AlertDescription as Alert;

    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match inner {
        Some(rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented) => true,
        Some(rustls::Error::AlertReceived(alert)) => matches!(
            alert,
            Alert::BadCertificate
                | Alert::UnsupportedCertificate
                | Alert::CertificateRevoked
                | Alert::CertificateExpired
                | Alert::CertificateUnknown
                | Alert::UnknownCA
                // Of an authority that was made anew under the old one's name.
                | Alert::DecryptError
                | Alert::AccessDenied
                | Alert::CertificateRequired
        ),
        _ => false,
    }
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

/// When the certificates that a listener has in force end. What cannot be parsed is left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CertificateEnds {
    /// The listener's own.
    pub served: Option<SystemTime>,
    /// The one for those who ask for a name.
    pub named: Option<SystemTime>,
    /// Of each source of clients' CAs the last one: with it no client gets in any more.
    pub client_cas: Vec<SystemTime>,
}

/// Where a PEM text comes from, now and at each reload.
#[derive(Clone)]
enum Source {
    File(PathBuf),
    Text { name: &'static str, pem: Arc<[u8]> },
}

/// What a configuration is built from, at first and at each reload.
trait Sources: Send + Sync + 'static {
    type Config: Clone + Send + Sync;
    /// Whose it is, for the log.
    const OF: &'static str;

    /// An error where nothing can be made of what is there now; what can be done without a part of it is in [`Loaded`].
    fn load(&self, former: Option<&Former>) -> Result<Loaded<Self::Config>, TlsError>;

    fn set_alpn(config: &mut Self::Config, alpn: Vec<Vec<u8>>);
}

/// What a listener's and a client's handle share: the sources and what they gave last.
struct Reloading<S: Sources> {
    sources: S,
    current: RwLock<Current<S::Config>>,
}

/// What a reload has to know of what is in force.
#[derive(Debug, Clone)]
struct Former {
    /// Of everything that it was made from, to tell a change.
    fingerprint: [u8; 32],
    /// The clients' CAs, for those that cannot be read any more.
    client_cas: Arc<[Vec<u8>]>,
}

/// What sources gave.
struct Loaded<C> {
    /// `None`: unchanged.
    current: Option<Current<C>>,
    /// What of it could not be used, and is as it was.
    problem: Option<TlsError>,
}

struct Current<C> {
    from: Former,
    /// Without ALPN.
    base: Arc<C>,
    /// The end entity's certificate, where there is one.
    certificate: Option<CertificateDer<'static>>,
    ends: CertificateEnds,
    by_alpn: HashMap<Vec<Vec<u8>>, Arc<C>>,
}

// === impl Current ===

impl<C> Current<C> {
    fn new(fingerprint: [u8; 32], base: C, certificate: Option<CertificateDer<'static>>) -> Self {
        let (from, ends) = (Former { fingerprint, client_cas: Arc::default() }, CertificateEnds::default());
        Self { from, base: Arc::new(base), certificate, ends, by_alpn: HashMap::new() }
    }

    fn with_client_cas(mut self, client_cas: Vec<Vec<u8>>) -> Self {
        self.from.client_cas = client_cas.into();
        self
    }

    fn with_ends(self, ends: CertificateEnds) -> Self {
        Self { ends, ..self }
    }
}

// === impl Loaded ===

impl<C> Loaded<C> {
    fn unchanged() -> Self {
        Self { current: None, problem: None }
    }

    fn new(current: Current<C>) -> Self {
        Self { current: Some(current), problem: None }
    }

    fn with_problem(self, problem: Option<TlsError>) -> Self {
        Self { problem, ..self }
    }
}

// === impl Reloading ===

impl<S: Sources> Reloading<S> {
    fn new(sources: S) -> Result<Arc<Self>, TlsError> {
        let current = sources.load(None)?.current.ok_or(TlsError::HalfIdentity)?;
        Ok(Arc::new(Self { sources, current: RwLock::new(current) }))
    }

    fn config(&self, alpn: &[&[u8]]) -> Arc<S::Config> {
        let alpn: Vec<Vec<u8>> = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        if let Some(config) = self.current.read().by_alpn.get(&alpn) {
            return config.clone();
        }
        let mut current = self.current.write();
        if let Some(config) = current.by_alpn.get(&alpn) {
            return config.clone();
        }
        let mut config = S::Config::clone(&current.base);
        S::set_alpn(&mut config, alpn.clone());
        let config = Arc::new(config);
        if current.by_alpn.len() < MAX_CACHED_CONFIGS {
            current.by_alpn.insert(alpn, config.clone());
        }
        config
    }

    fn certificate(&self) -> Option<CertificateDer<'static>> {
        self.current.read().certificate.clone()
    }

    fn ends(&self) -> CertificateEnds {
        self.current.read().ends.clone()
    }

    fn reload(&self) -> Result<bool, TlsError> {
        // Not held while files are read.
        let former = self.current.read().from.clone();
        let Loaded { current, problem } = self.sources.load(Some(&former))?;
        let changed = current.is_some();
        if let Some(new) = current {
            *self.current.write() = new;
        }
        match problem {
            Some(problem) => {
                if changed {
                    tracing::info!(of = S::OF, "certificates were reloaded, but for one that cannot be used");
                }
                Err(problem)
            }
            None => Ok(changed),
        }
    }

    async fn watch_files(self: Arc<Self>, interval: Duration) {
        let mut ticks = tokio::time::interval(interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut warned = None;
        loop {
            ticks.tick().await;
            let this = self.clone();
            // The files may lie on a volume that hangs; and building a configuration takes milliseconds.
            let Ok(outcome) = tokio::task::spawn_blocking(move || this.reload()).await else {
                // Cancelled: the runtime is shutting down.
                return;
            };
            match outcome {
                Ok(true) => {
                    warned = None;
                    tracing::info!(of = S::OF, "certificates were reloaded");
                }
                Ok(false) => warned = None,
                Err(error) => {
                    let text = chain(&error);
                    if warned.as_ref() != Some(&text) {
                        tracing::warn!(of = S::OF, error = %text, "failed to reload a certificate, the former stays in use");
                        warned = Some(text);
                    }
                }
            }
        }
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

/// The library's choice of algorithms, but of TLS 1.3's AES-128 before AES-256, as Go's `crypto/tls` offers them: ten rounds for
/// each block instead of fourteen. A peer that insists on 256 bits gets them.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
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

/// The clients' CAs as they are now, each of which can be used; in the place of one that cannot, the former one. The error is
/// that of the first such.
fn client_cas(
    sources: &[Source],
    former: Option<&Former>,
) -> Result<(Vec<Vec<u8>>, Option<TlsError>), TlsError> {
    let (mut contents, mut problem) = (Vec::with_capacity(sources.len()), None);
    for (index, source) in sources.iter().enumerate() {
        let read = || -> Result<Vec<u8>, TlsError> {
            let pem = source.read()?;
            roots(source, &pem)?;
            Ok(pem)
        };
        match (read(), former.and_then(|former| former.client_cas.get(index))) {
            (Ok(pem), _) => contents.push(pem),
            (Err(error), Some(kept)) => {
                problem.get_or_insert(error);
                contents.push(kept.clone());
            }
            (Err(error), None) => return Err(error),
        }
    }
    Ok((contents, problem))
}

fn fingerprint(contents: &[Option<&Vec<u8>>]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for content in contents {
        // The length first, so that a byte cannot move from one file to the next unseen.
        hasher.update(content.map_or(u64::MAX, |content| content.len() as u64).to_be_bytes());
        hasher.update(content.map_or(&[][..], Vec::as_slice));
    }
    hasher.finalize().into()
}

pub(crate) fn chain(error: &dyn std::error::Error) -> String {
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
mod tests;
