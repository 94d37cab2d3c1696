//! The configuration of a listener.

use std::{
    fmt,
    future::Future,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::{
    RootCertStore, ServerConfig,
    server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier},
    sign::CertifiedKey,
};
use rustls_pki_types::CertificateDer;
use tokio_rustls::TlsAcceptor;

use super::{
    CertificateEnds, ClientAuth, Current, Former, Loaded, Reloading, Source, Sources, TlsError, TlsVersions,
    certificates, client_cas, fingerprint, private_key, provider, roots,
};
use crate::certificate::validity;

/// The current TLS configuration of a listener. Clones share it.
#[derive(Clone)]
pub struct ServerTls(Arc<Reloading<ServerSources>>);

#[derive(Clone)]
struct ServerSources {
    certificate: Source,
    key: Source,
    /// For those who ask for this name: its certificate and key.
    named: Option<(&'static str, Source, Source)>,
    client_cas: Vec<Source>,
    client_auth: ClientAuth,
    versions: TlsVersions,
}

/// One certificate for a name, another for everybody else.
#[derive(Debug)]
struct ByName {
    name: &'static str,
    named: Arc<CertifiedKey>,
    others: Arc<CertifiedKey>,
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
            named: None,
            client_cas: client_ca.into_iter().map(Source::File).collect(),
            client_auth,
            versions: TlsVersions::Only13,
        };
        Self::new(sources)
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
            named: None,
            client_cas: client_ca.into_iter().map(|pem| Source::text("the clients' CA", pem)).collect(),
            client_auth,
            versions: TlsVersions::Only13,
        };
        Self::new(sources)
    }

    /// The same listener with other protocol versions.
    ///
    /// # Errors
    /// As [`Self::from_files`]: the sources are read again.
    pub fn with_versions(self, versions: TlsVersions) -> Result<Self, TlsError> {
        Self::new(ServerSources { versions, ..self.0.sources.clone() })
    }

    /// The same listener with another certificate for those who ask for `name`.
    ///
    /// # Errors
    /// As [`Self::from_files`]: the sources are read again.
    pub fn with_named(
        self,
        name: &'static str,
        certificate: impl Into<PathBuf>,
        key: impl Into<PathBuf>,
    ) -> Result<Self, TlsError> {
        let named = Some((name, Source::File(certificate.into()), Source::File(key.into())));
        Self::new(ServerSources { named, ..self.0.sources.clone() })
    }

    /// The same listener that also takes clients whose certificates a CA of this file signed.
    ///
    /// # Errors
    /// As [`Self::from_files`]: the sources are read again.
    pub fn with_client_ca(self, file: impl Into<PathBuf>) -> Result<Self, TlsError> {
        let mut sources = self.0.sources.clone();
        sources.client_cas.push(Source::File(file.into()));
        Self::new(sources)
    }

    fn new(sources: ServerSources) -> Result<Self, TlsError> {
        Reloading::new(sources).map(Self)
    }

    /// The current configuration for these protocols, in order of preference; the same `Arc` until a reload.
    pub fn config(&self, alpn: &[&[u8]]) -> Arc<ServerConfig> {
        self.0.config(alpn)
    }

    /// An acceptor with the current configuration: make one for each connection, so that a reload is seen.
    pub fn acceptor(&self, alpn: &[&[u8]]) -> TlsAcceptor {
        TlsAcceptor::from(self.config(alpn))
    }

    /// The server's own certificate.
    pub fn certificate(&self) -> Option<CertificateDer<'static>> {
        self.0.certificate()
    }

    /// When the certificates in force end.
    pub fn ends(&self) -> CertificateEnds {
        self.0.ends()
    }

    /// Reads the sources again; `true` when there was something new, which is then in force.
    ///
    /// # Errors
    /// When what is there now cannot be used; the former configuration stays in force. Of a clients' CA only the former
    /// of that file does: what else is new is taken all the same.
    pub fn reload(&self) -> Result<bool, TlsError> {
        self.0.reload()
    }

    /// Looks at the files at each interval and takes what is new. A new content that cannot be used is warned of once
    /// and the former stays. Never ends: run it as long as the listener.
    pub fn watch_files(self, interval: Duration) -> impl Future<Output = ()> + Send + 'static {
        self.0.watch_files(interval)
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerTls")
            .field("certificate", &self.0.sources.certificate)
            .field("client_auth", &self.0.sources.client_auth)
            .field("versions", &self.0.sources.versions)
            .finish_non_exhaustive()
    }
}

impl Sources for ServerSources {
    type Config = ServerConfig;
    const OF: &'static str = "listener";

    fn load(&self, former: Option<&Former>) -> Result<Loaded<ServerConfig>, TlsError> {
        let certificate = self.certificate.read()?;
        let key = self.key.read()?;
        let named = match &self.named {
            Some((_, certificate, key)) => Some((certificate.read()?, key.read()?)),
            None => None,
        };
        // One that is broken keeps no renewed certificate out: without that one nobody gets in before long.
        let (client_cas, problem) = client_cas(&self.client_cas, former)?;
        let mut contents = vec![Some(&certificate), Some(&key)];
        contents
            .extend([named.as_ref().map(|(certificate, _)| certificate), named.as_ref().map(|(_, key)| key)]);
        contents.extend(client_cas.iter().map(Some));
        let fingerprint = fingerprint(&contents);
        if former.is_some_and(|former| former.fingerprint == fingerprint) {
            return Ok(Loaded::unchanged().with_problem(problem));
        }
        let provider = provider();
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(self.versions.supported())
            .map_err(|source| TlsError::Identity { origin: self.certificate.to_string(), source })?;
        let builder = match self.client_auth {
            ClientAuth::None => builder.with_no_client_auth(),
            ClientAuth::Required | ClientAuth::Optional => {
                let mut anchors = RootCertStore::empty();
                for (source, pem) in self.client_cas.iter().zip(&client_cas) {
                    anchors.roots.extend(roots(source, pem)?.roots);
                }
                if anchors.is_empty() {
                    return Err(TlsError::NoClientCa);
                }
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(anchors), provider.clone());
                let verifier = match self.client_auth {
                    ClientAuth::Optional => verifier.allow_unauthenticated().build()?,
                    _ => verifier.build()?,
                };
                builder.with_client_cert_verifier(verifier)
            }
        };
        let chain = certificates(&self.certificate, &certificate)?;
        let first = chain.first().cloned();
        let mut ends = CertificateEnds { served: first.as_ref().and_then(end), ..CertificateEnds::default() };
        for (source, pem) in self.client_cas.iter().zip(&client_cas) {
            ends.client_cas.extend(certificates(source, pem)?.iter().filter_map(end).max());
        }
        let refused = |source: &Source| {
            let origin = source.to_string();
            move |source| TlsError::Identity { origin, source }
        };
        let secret = private_key(&self.key, &key)?;
        let mut config = match (&self.named, named) {
            (Some((name, certificate_source, key_source)), Some((certificate, key))) => {
                let others =
                    CertifiedKey::from_der(chain, secret, &provider).map_err(refused(&self.certificate))?;
                let chain = certificates(certificate_source, &certificate)?;
                ends.named = chain.first().and_then(end);
                let secret = private_key(key_source, &key)?;
                let named =
                    CertifiedKey::from_der(chain, secret, &provider).map_err(refused(certificate_source))?;
                let resolver = ByName { name, named: Arc::new(named), others: Arc::new(others) };
                builder.with_cert_resolver(Arc::new(resolver))
            }
            _ => builder.with_single_cert(chain, secret).map_err(refused(&self.certificate))?,
        };
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        let current = Current::new(fingerprint, config, first).with_ends(ends).with_client_cas(client_cas);
        Ok(Loaded::new(current).with_problem(problem))
    }

    fn set_alpn(config: &mut ServerConfig, alpn: Vec<Vec<u8>>) {
        config.alpn_protocols = alpn;
    }
}

fn end(certificate: &CertificateDer<'static>) -> Option<SystemTime> {
    validity(certificate).ok().map(|(_, end)| end)
}

// === impl ByName ===

impl ResolvesServerCert for ByName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let asked = hello.server_name().is_some_and(|name| name == self.name);
        Some(if asked { self.named.clone() } else { self.others.clone() })
    }
}
