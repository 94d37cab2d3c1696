//! The configuration of a listener.

use std::{fmt, future::Future, path::PathBuf, sync::Arc, time::Duration};

use rustls::{
    ServerConfig,
    server::{NoServerSessionStorage, WebPkiClientVerifier},
};
use rustls_pki_types::CertificateDer;
use tokio_rustls::TlsAcceptor;

use super::{
    ClientAuth, Current, Reloading, Source, Sources, TlsError, TlsVersions, certificates, fingerprint,
    private_key, provider, roots,
};

/// The current TLS configuration of a listener. Clones share it.
#[derive(Clone)]
pub struct ServerTls(Arc<Reloading<ServerSources>>);

#[derive(Clone)]
struct ServerSources {
    certificate: Source,
    key: Source,
    client_ca: Option<Source>,
    client_auth: ClientAuth,
    versions: TlsVersions,
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
            client_ca: client_ca.map(|pem| Source::text("the clients' CA", pem)),
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

    /// Reads the sources again; `true` when there was something new, which is then in force.
    ///
    /// # Errors
    /// When what is there now cannot be used; the former configuration stays in force.
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

    fn load(&self, former: Option<[u8; 32]>) -> Result<Option<Current<ServerConfig>>, TlsError> {
        let certificate = self.certificate.read()?;
        let key = self.key.read()?;
        let client_ca = self.client_ca.as_ref().map(Source::read).transpose()?;
        let fingerprint = fingerprint([Some(&certificate), Some(&key), client_ca.as_ref()]);
        if former == Some(fingerprint) {
            return Ok(None);
        }
        let provider = provider();
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(self.versions.supported())
            .map_err(|source| TlsError::Identity { origin: self.certificate.to_string(), source })?;
        let builder = match self.client_auth {
            ClientAuth::None => builder.with_no_client_auth(),
            ClientAuth::Required | ClientAuth::Optional => {
                let (Some(source), Some(pem)) = (&self.client_ca, client_ca) else {
                    return Err(TlsError::NoClientCa);
                };
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots(source, &pem)?), provider);
                let verifier = match self.client_auth {
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
        Ok(Some(Current::new(fingerprint, config, first)))
    }

    fn set_alpn(config: &mut ServerConfig, alpn: Vec<Vec<u8>>) {
        config.alpn_protocols = alpn;
    }
}
