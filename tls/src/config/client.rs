//! The configuration of a client, and the verifier that knows its CA by hash only.

use std::{fmt, future::Future, path::PathBuf, sync::Arc, time::Duration};

use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::CryptoProvider,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::TlsConnector;

use super::{
    Current, Former, Loaded, Reloading, Source, Sources, TlsError, TlsVersions, certificates, fingerprint,
    private_key, provider, roots,
};
use crate::certificate::CaHash;

/// The current TLS configuration of a client. Clones share it.
#[derive(Clone)]
pub struct ClientTls(Arc<Reloading<ClientSources>>);

#[derive(Clone)]
struct ClientSources {
    trust: TrustSource,
    identity: Option<(Source, Source)>,
    versions: TlsVersions,
}

#[derive(Clone)]
enum TrustSource {
    Ca(Source),
    Hash(CaHash),
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
        let trust = TrustSource::Ca(Source::File(ca.into()));
        Self::new(ClientSources { trust, identity, versions: TlsVersions::Only13 })
    }

    /// The same from PEM texts; `identity` is certificate chain and key. A reload finds nothing new.
    ///
    /// # Errors
    /// As [`Self::from_files`].
    pub fn from_pem(ca: &str, identity: Option<(&str, &str)>) -> Result<Self, TlsError> {
        let trust = TrustSource::Ca(Source::text("the servers' CA", ca));
        Self::new(ClientSources { trust, identity: text_identity(identity), versions: TlsVersions::Only13 })
    }

    /// Trusts exactly the CA with this hash, which the server must send at the end of its chain. Everything else is
    /// checked as ever: signatures, the server's name, dates.
    ///
    /// # Errors
    /// When `identity` cannot be used.
    pub fn with_ca_hash(hash: CaHash, identity: Option<(&str, &str)>) -> Result<Self, TlsError> {
        let trust = TrustSource::Hash(hash);
        Self::new(ClientSources { trust, identity: text_identity(identity), versions: TlsVersions::Only13 })
    }

    /// The same client with other protocol versions.
    ///
    /// # Errors
    /// As [`Self::from_files`]: the sources are read again.
    pub fn with_versions(self, versions: TlsVersions) -> Result<Self, TlsError> {
        Self::new(ClientSources { versions, ..self.0.sources.clone() })
    }

    fn new(sources: ClientSources) -> Result<Self, TlsError> {
        Reloading::new(sources).map(Self)
    }

    /// The current configuration for these protocols, in order of preference; the same `Arc` until a reload.
    pub fn config(&self, alpn: &[&[u8]]) -> Arc<ClientConfig> {
        self.0.config(alpn)
    }

    /// A connector with the current configuration: make one for each connection, so that a reload is seen.
    pub fn connector(&self, alpn: &[&[u8]]) -> TlsConnector {
        TlsConnector::from(self.config(alpn))
    }

    /// The client's own certificate.
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
    /// and the former stays. Never ends: run it as long as the client.
    pub fn watch_files(self, interval: Duration) -> impl Future<Output = ()> + Send + 'static {
        self.0.watch_files(interval)
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
        debug
            .field("certificate", &certificate)
            .field("versions", &self.0.sources.versions)
            .finish_non_exhaustive()
    }
}

impl Sources for ClientSources {
    type Config = ClientConfig;
    const OF: &'static str = "client";

    fn load(&self, former: Option<&Former>) -> Result<Loaded<ClientConfig>, TlsError> {
        let ca = match &self.trust {
            TrustSource::Ca(source) => Some(source.read()?),
            TrustSource::Hash(_) => None,
        };
        let identity = match &self.identity {
            Some((certificate, key)) => Some((certificate.read()?, key.read()?)),
            None => None,
        };
        let (certificate, key) = identity.as_ref().map_or((None, None), |(c, k)| (Some(c), Some(k)));
        let fingerprint = fingerprint(&[ca.as_ref(), certificate, key]);
        if former.is_some_and(|former| former.fingerprint == fingerprint) {
            return Ok(Loaded::unchanged());
        }
        let provider = provider();
        let origin = || match &self.identity {
            Some((certificate, _)) => certificate.to_string(),
            None => "the client".to_owned(),
        };
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(self.versions.supported())
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
        Ok(Loaded::new(Current::new(fingerprint, config, first)))
    }

    fn set_alpn(config: &mut ClientConfig, alpn: Vec<Vec<u8>>) {
        config.alpn_protocols = alpn;
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

fn text_identity(identity: Option<(&str, &str)>) -> Option<(Source, Source)> {
    identity.map(|(certificate, key)| {
        (Source::text("the client's certificate", certificate), Source::text("the client's key", key))
    })
}
