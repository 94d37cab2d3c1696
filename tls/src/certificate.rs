//! Reading certificates: whom one speaks for, when it is valid, and the hash that a CA is known by.

use std::{
    fmt,
    str::FromStr,
    time::{Duration, SystemTime},
};

use rustls_pki_types::{CertificateDer, pem::PemObject};
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::identity::{AgentIdentity, InvalidIdentity};

/// The most certificates read from one bundle: the system bundles hold about 150, and a bundle is read into memory.
const MAX_CERTIFICATES: usize = 1024;

/// Why a certificate says nothing that can be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// Not DER of an X.509 certificate.
    #[error("failed to parse the certificate")]
    Malformed,
    /// No URI among the subject's alternative names: not an agent that was enrolled.
    #[error("the certificate holds no SPIFFE URI: it was not issued to an enrolled agent")]
    NoIdentity,
    /// SPIFFE allows exactly one.
    #[error("the certificate holds several URIs, where exactly one names its owner")]
    SeveralIdentities,
    /// The URI is not that of an agent.
    #[error("the certificate's URI does not name an agent")]
    Identity(#[source] InvalidIdentity),
    /// No common name in the subject.
    #[error("the certificate's subject has no common name")]
    NoUser,
    /// A PEM text without certificates.
    #[error("the PEM text holds no certificate")]
    NoCertificate,
    /// A PEM text that is broken or too long.
    #[error("failed to read certificates from the PEM text: {0}")]
    Pem(String),
}

/// The agent that a certificate speaks for.
///
/// # Errors
/// [`CertificateError::NoIdentity`] when it has no URI at all, which is how one looks in file-certificate mode;
/// every other error means that the certificate must not be used as an identity.
pub fn agent_identity(certificate: &CertificateDer<'_>) -> Result<AgentIdentity, CertificateError> {
    let certificate = parse(certificate)?;
    let names = certificate.subject_alternative_name().map_err(|_| CertificateError::Malformed)?;
    let mut uris = names.iter().flat_map(|names| &names.value.general_names).filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    let uri = uris.next().ok_or(CertificateError::NoIdentity)?;
    if uris.next().is_some() {
        return Err(CertificateError::SeveralIdentities);
    }
    uri.parse().map_err(CertificateError::Identity)
}

/// The user and the groups that a client certificate names, as Kubernetes reads them: common name and organisations.
///
/// # Errors
/// When the certificate cannot be parsed or has no common name.
pub fn user_of(certificate: &CertificateDer<'_>) -> Result<(String, Vec<String>), CertificateError> {
    let certificate = parse(certificate)?;
    let subject = certificate.subject();
    let user = subject
        .iter_common_name()
        .next()
        .and_then(|name| name.as_str().ok())
        .filter(|name| !name.is_empty())
        .ok_or(CertificateError::NoUser)?;
    let groups =
        subject.iter_organization().filter_map(|name| name.as_str().ok()).map(str::to_owned).collect();
    Ok((user.to_owned(), groups))
}

/// When a certificate begins and ends to be valid.
///
/// # Errors
/// When the certificate cannot be parsed.
pub fn validity(certificate: &CertificateDer<'_>) -> Result<(SystemTime, SystemTime), CertificateError> {
    let certificate = parse(certificate)?;
    let validity = certificate.validity();
    let time = |timestamp: i64| match u64::try_from(timestamp) {
        Ok(seconds) => SystemTime::UNIX_EPOCH + Duration::from_secs(seconds),
        // Before 1970: no certificate of ours, and nothing is valid then.
        Err(_) => SystemTime::UNIX_EPOCH,
    };
    Ok((time(validity.not_before.timestamp()), time(validity.not_after.timestamp())))
}

/// Reads all certificates of a PEM text, in its order.
///
/// # Errors
/// When there is none, a block is broken, or there are more than a bundle may hold (1024).
pub fn certificates_from_pem(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    let mut certificates = Vec::new();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        if certificates.len() == MAX_CERTIFICATES {
            return Err(CertificateError::Pem(format!("more than {MAX_CERTIFICATES} certificates")));
        }
        certificates.push(certificate.map_err(|error| CertificateError::Pem(error.to_string()))?);
    }
    if certificates.is_empty() { Err(CertificateError::NoCertificate) } else { Ok(certificates) }
}

pub(crate) fn parse<'a>(
    certificate: &'a CertificateDer<'_>,
) -> Result<X509Certificate<'a>, CertificateError> {
    match X509Certificate::from_der(certificate) {
        Ok(([], certificate)) => Ok(certificate),
        _ => Err(CertificateError::Malformed),
    }
}

/// The hash of a CA's public key, which pins a hub before its certificate is known:
/// `sha256:<hex of SHA-256 over the certificate's SubjectPublicKeyInfo>`, the form that kubeadm uses.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct CaHash([u8; 32]);

/// A text that is not a [`CaHash`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a CA hash: expected sha256: followed by 64 hexadecimal digits")]
pub struct InvalidCaHash;

// === impl CaHash ===

impl CaHash {
    /// The hash of a certificate's public key.
    ///
    /// # Errors
    /// When the certificate cannot be parsed.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, CertificateError> {
        Ok(Self(Sha256::digest(parse(certificate)?.public_key().raw).into()))
    }
}

impl fmt::Display for CaHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", hex::encode(self.0))
    }
}

impl fmt::Debug for CaHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for CaHash {
    type Err = InvalidCaHash;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.trim().strip_prefix("sha256:").ok_or(InvalidCaHash)?;
        let mut hash = [0; 32];
        hex::decode_to_slice(digits, &mut hash).map_err(|_| InvalidCaHash)?;
        Ok(Self(hash))
    }
}
