//! The certificate authority of a hub, and an agent's side of a certificate request.

use std::{
    fmt, fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber,
    SignatureAlgorithm, SigningKey,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, pem::PemObject};
use x509_parser::{certification_request::X509CertificationRequest, prelude::FromDer};

use crate::{
    certificate::{self, CaHash, CertificateError},
    files::{self, FileError},
    identity::AgentIdentity,
};

/// How long a CA is valid. Its rotation is a bundle of two CAs, and nobody should have to do that often.
const CA_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// How far the beginning of a server's, a user's or a CA's certificate is moved back, for peers whose clock is late.
///
/// Agents' certificates are not moved back: only the hub judges them, and a revocation refuses those that began before
/// it. Moved back, one issued after the revocation would be refused too.
const BACKDATE: Duration = Duration::from_secs(300);

/// The longest certificate request: one with a P-256 key takes less than 1 KiB.
const MAX_REQUEST: usize = 16 << 10;

/// An uncompressed point on P-256: 0x04, x, y.
const P256_POINT: usize = 65;

const CERTIFICATE_FILE: &str = "ca.crt";
const KEY_FILE: &str = "ca.key";

/// Why a certificate could not be made.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// The request is not a PKCS #10 request in PEM.
    #[error("failed to read the certificate request: send a PKCS #10 request in PEM, of at most 16 KiB")]
    RequestMalformed,
    /// The request was not signed by the key that it holds.
    #[error("the certificate request is not signed by its own key")]
    RequestSignature,
    /// The request holds another kind of key.
    #[error("the certificate request holds an unsupported key: use ECDSA on P-256")]
    RequestKey,
    /// A name that cannot stand in a certificate.
    #[error("{name:?} cannot stand in a certificate")]
    Name {
        /// The name.
        name: String,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
    /// Making or signing failed.
    #[error("failed to make a certificate")]
    Make(#[from] rcgen::Error),
    /// The CA's key cannot be read.
    #[error("failed to read the certificate authority's key: expected an unencrypted PKCS #8 key in PEM")]
    Key(#[source] rcgen::Error),
    /// The CA's certificate cannot be read.
    #[error("failed to read the certificate authority's certificate")]
    Certificate(#[from] CertificateError),
    /// The CA's key and certificate do not belong together.
    #[error("the certificate authority's key does not belong to its certificate")]
    KeyMismatch,
    /// The certificate is not one of a CA.
    #[error("the certificate authority's certificate is not marked as one: it may not sign others")]
    NotAnAuthority,
    /// A certificate without its key: it was lost, or only a part was restored.
    #[error(
        "{} exists but {KEY_FILE} does not: restore the key, or remove the certificate to begin a new authority",
        path.display()
    )]
    KeyMissing {
        /// The certificate.
        path: PathBuf,
    },
    /// A directory could not be made.
    #[error("failed to create {}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Reading or writing the CA's files failed.
    #[error(transparent)]
    File(#[from] FileError),
}

/// A certificate with its private key, both in PEM. `Debug` hides the key.
#[derive(Clone)]
pub struct IssuedCertificate {
    /// The certificate, followed by the CA's for a server (a client that knows the CA by its hash needs it).
    pub certificate_pem: String,
    /// The PKCS #8 key.
    pub key_pem: String,
}

/// Signs certificates with an ECDSA P-256 key that it keeps in memory.
///
/// It decides nothing: whoever calls has already authenticated the user, cluster or agent.
pub struct CertificateAuthority {
    certificate_pem: String,
    not_after: SystemTime,
    hash: CaHash,
    issuer: Issuer<'static, KeyPair>,
}

/// An agent's private key, which never leaves the agent: the hub sees a request signed by it.
pub struct AgentKey(KeyPair);

// === impl CertificateAuthority ===

impl CertificateAuthority {
    /// Makes a new authority in memory.
    ///
    /// # Errors
    /// When no key can be generated or the name cannot stand in a certificate.
    pub fn create(common_name: &str) -> Result<Self, AuthorityError> {
        Self::create_with(common_name, KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?, SystemTime::now())
    }

    fn create_with(common_name: &str, key: KeyPair, now: SystemTime) -> Result<Self, AuthorityError> {
        let mut params = parameters(now - BACKDATE, now + CA_LIFETIME)?;
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key)?;
        Self::assemble(certificate.pem(), certificate.der(), key)
    }

    /// Takes an authority from PEM.
    ///
    /// # Errors
    /// When either text cannot be read, they do not belong together, or the certificate is not a CA's.
    pub fn from_pem(certificate_pem: &str, key_pem: &str) -> Result<Self, AuthorityError> {
        let key = KeyPair::from_pem(key_pem).map_err(AuthorityError::Key)?;
        let certificates = certificate::certificates_from_pem(certificate_pem.as_bytes())?;
        // A bundle may follow the signing certificate (the former CA during a rotation).
        Self::assemble(certificate_pem.to_owned(), &certificates[0], key)
    }

    fn assemble(
        certificate_pem: String,
        certificate: &CertificateDer<'_>,
        key: KeyPair,
    ) -> Result<Self, AuthorityError> {
        let parsed = certificate::parse(certificate)?;
        if !parsed.is_ca() {
            return Err(AuthorityError::NotAnAuthority);
        }
        if parsed.public_key().raw != key.subject_public_key_info() {
            return Err(AuthorityError::KeyMismatch);
        }
        let (_, not_after) = certificate::validity(certificate)?;
        Ok(Self {
            certificate_pem,
            not_after,
            hash: CaHash::of(certificate)?,
            issuer: Issuer::from_ca_cert_der(certificate, key)?,
        })
    }

    /// Takes the authority from `ca.crt` and `ca.key` in a directory.
    ///
    /// # Errors
    /// When the files cannot be read, or are no authority.
    pub fn load(directory: &Path) -> Result<Self, AuthorityError> {
        Self::from_pem(&read_text(&directory.join(CERTIFICATE_FILE))?, &read_text(&directory.join(KEY_FILE))?)
    }

    /// Takes the authority from `ca.crt` and `ca.key` in a directory, or makes both there (the key 0600).
    ///
    /// A start that was cut off between the two files is taken up again with the same key.
    ///
    /// # Errors
    /// When the files cannot be read or written, or the key is missing beside an existing certificate.
    pub fn load_or_create(directory: &Path, common_name: &str) -> Result<Self, AuthorityError> {
        // Only for its owner, whatever the umask: it is where the key lies.
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|source| AuthorityError::Directory { path: directory.to_owned(), source })?;
        let certificate_path = directory.join(CERTIFICATE_FILE);
        let key_path = directory.join(KEY_FILE);
        let key = match (certificate_path.exists(), key_path.exists()) {
            (true, true) => return Self::load(directory),
            (true, false) => return Err(AuthorityError::KeyMissing { path: certificate_path }),
            (false, true) => KeyPair::from_pem(&read_text(&key_path)?).map_err(AuthorityError::Key)?,
            (false, false) => {
                let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
                files::write_private(&key_path, key.serialize_pem().as_bytes())?;
                key
            }
        };
        let authority = Self::create_with(common_name, key, SystemTime::now())?;
        files::write_public(&certificate_path, authority.certificate_pem.as_bytes())?;
        Ok(authority)
    }

    /// The authority's certificate (with what followed it in the bundle that it was loaded from).
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The hash that agents pin: see [`CaHash`].
    pub fn public_key_hash(&self) -> CaHash {
        self.hash
    }

    /// Issues a server's certificate for DNS names and IP addresses. The chain ends with the CA's certificate.
    ///
    /// # Errors
    /// When a name cannot stand in a certificate or signing fails.
    pub fn issue_server(&self, names: &[String], ttl: Duration) -> Result<IssuedCertificate, AuthorityError> {
        self.issue_server_at(names, ttl, SystemTime::now())
    }

    /// As [`Self::issue_server`], at a given moment.
    ///
    /// # Errors
    /// The same.
    pub fn issue_server_at(
        &self,
        names: &[String],
        ttl: Duration,
        now: SystemTime,
    ) -> Result<IssuedCertificate, AuthorityError> {
        let mut params = parameters(now - BACKDATE, self.end(now, ttl))?;
        for name in names {
            let invalid = |source| AuthorityError::Name { name: name.clone(), source };
            params.subject_alt_names.push(match name.parse() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(name.as_str().try_into().map_err(invalid)?),
            });
        }
        // Longer than a common name may be is left out: nobody reads it, the alternative names count.
        if let Some(name) = names.first().filter(|name| name.len() <= 64) {
            params.distinguished_name.push(DnType::CommonName, name.as_str());
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(IssuedCertificate {
            certificate_pem: format!("{}{}", certificate.pem(), self.certificate_pem),
            key_pem: key.serialize_pem(),
        })
    }

    /// Issues a client certificate for a Kubernetes user (common name) and its groups (organisations).
    ///
    /// # Errors
    /// When signing fails.
    pub fn issue_client(
        &self,
        user: &str,
        groups: &[String],
        ttl: Duration,
    ) -> Result<IssuedCertificate, AuthorityError> {
        self.issue_client_at(user, groups, ttl, SystemTime::now())
    }

    /// As [`Self::issue_client`], at a given moment.
    ///
    /// # Errors
    /// The same.
    pub fn issue_client_at(
        &self,
        user: &str,
        groups: &[String],
        ttl: Duration,
        now: SystemTime,
    ) -> Result<IssuedCertificate, AuthorityError> {
        let mut params = parameters(now - BACKDATE, self.end(now, ttl))?;
        params.distinguished_name.push(DnType::CommonName, user);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let der = self.with_subject(certificate.der(), user, groups)?;
        Ok(IssuedCertificate { certificate_pem: to_pem(&der), key_pem: key.serialize_pem() })
    }

    /// Signs an agent's request, and returns the certificate in PEM. Of the request only the public key is taken:
    /// whatever else it asks for is ignored.
    ///
    /// # Errors
    /// When the request is malformed, not signed by its own key, or holds another key than ECDSA P-256.
    pub fn sign_agent(
        &self,
        request_pem: &str,
        identity: &AgentIdentity,
        ttl: Duration,
    ) -> Result<String, AuthorityError> {
        self.sign_agent_at(request_pem, identity, ttl, SystemTime::now())
    }

    /// As [`Self::sign_agent`], at a given moment.
    ///
    /// # Errors
    /// The same.
    pub fn sign_agent_at(
        &self,
        request_pem: &str,
        identity: &AgentIdentity,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<String, AuthorityError> {
        let public_key = RequestedKey::from_pem(request_pem)?;
        let mut params = parameters(now, self.end(now, ttl))?;
        let uri = identity.to_string();
        let invalid = |source| AuthorityError::Name { name: uri.clone(), source };
        params.subject_alt_names.push(SanType::URI(uri.as_str().try_into().map_err(invalid)?));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        Ok(params.signed_by(&public_key, &self.issuer)?.pem())
    }

    /// No certificate outlives the CA that signed it: verifiers would refuse it anyway, with a message that misleads.
    fn end(&self, now: SystemTime, ttl: Duration) -> SystemTime {
        now.checked_add(ttl).map_or(self.not_after, |end| end.min(self.not_after))
    }

    /// The same certificate with another subject, signed again. A Kubernetes user has any number of organisations,
    /// and the builder's names hold one value of each kind.
    fn with_subject(
        &self,
        certificate: &[u8],
        user: &str,
        groups: &[String],
    ) -> Result<Vec<u8>, AuthorityError> {
        let malformed = || AuthorityError::Certificate(CertificateError::Malformed);
        let (_, parsed) =
            x509_parser::certificate::X509Certificate::from_der(certificate).map_err(|_| malformed())?;
        let old = parsed.tbs_certificate.subject.as_raw();
        let tbs = parsed.tbs_certificate.as_ref();
        // Where the subject lies within the part that is signed: both are slices of `certificate`.
        let begin = (old.as_ptr() as usize).checked_sub(tbs.as_ptr() as usize).ok_or_else(malformed)?;
        let header = der::header_length(tbs).ok_or_else(malformed)?;
        let before = tbs.get(header..begin).ok_or_else(malformed)?;
        let after = tbs.get(begin + old.len()..).ok_or_else(malformed)?;

        let mut names = Vec::new();
        for group in groups {
            names.extend(der::relative_name(der::ORGANIZATION, group));
        }
        names.extend(der::relative_name(der::COMMON_NAME, user));
        let tbs = der::sequence(&[before, &der::sequence(&[&names]), after]);

        let algorithm = der::sequence(&[der::ECDSA_WITH_SHA256]);
        let signature = der::bit_string(&self.issuer.key().sign(&tbs)?);
        Ok(der::sequence(&[&tbs, &algorithm, &signature]))
    }
}

impl fmt::Debug for CertificateAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateAuthority").field("hash", &self.hash).finish_non_exhaustive()
    }
}

// === impl IssuedCertificate ===

impl fmt::Debug for IssuedCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IssuedCertificate")
            .field("certificate_pem", &self.certificate_pem)
            .field("key_pem", &"(hidden)")
            .finish()
    }
}

// === impl AgentKey ===

impl AgentKey {
    /// Generates an ECDSA P-256 key.
    ///
    /// # Errors
    /// When the system gives no randomness.
    pub fn generate() -> Result<Self, AuthorityError> {
        Ok(Self(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?))
    }

    /// Reads a PKCS #8 key in PEM.
    ///
    /// # Errors
    /// When the text is not such a key.
    pub fn from_pem(pem: &str) -> Result<Self, AuthorityError> {
        KeyPair::from_pem(pem).map(Self).map_err(AuthorityError::Key)
    }

    /// The key in PEM: write it with [`crate::write_private`].
    pub fn to_pem(&self) -> String {
        self.0.serialize_pem()
    }

    /// A request for a certificate, signed by this key, in PEM. It names nobody: the hub decides whom it is for.
    ///
    /// # Errors
    /// When signing fails.
    pub fn certificate_request(&self) -> Result<String, AuthorityError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        Ok(params.serialize_request(&self.0)?.pem()?)
    }
}

impl fmt::Debug for AgentKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AgentKey(hidden)")
    }
}

/// The public key of a certificate request, as the point of an ECDSA P-256 key.
///
/// # Errors
/// When the request is malformed, not signed by its own key, or holds another kind of key.
pub fn requested_key(request_pem: &str) -> Result<Vec<u8>, AuthorityError> {
    Ok(RequestedKey::from_pem(request_pem)?.0)
}

// === helpers ===

/// The public key of a request whose signature was verified.
struct RequestedKey(Vec<u8>);

impl RequestedKey {
    fn from_pem(pem: &str) -> Result<Self, AuthorityError> {
        if pem.len() > MAX_REQUEST {
            return Err(AuthorityError::RequestMalformed);
        }
        let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes())
            .map_err(|_| AuthorityError::RequestMalformed)?;
        let Ok(([], request)) = X509CertificationRequest::from_der(&der) else {
            return Err(AuthorityError::RequestMalformed);
        };
        let key = &request.certification_request_info.subject_pki;
        let point = key.subject_public_key.data.to_vec();
        if point.len() != P256_POINT || !is_p256(key.raw, &point) {
            return Err(AuthorityError::RequestKey);
        }
        request.verify_signature().map_err(|_| AuthorityError::RequestSignature)?;
        Ok(Self(point))
    }
}

impl PublicKeyData for RequestedKey {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

/// Whether a SubjectPublicKeyInfo is exactly what P-256 and this point give: curve and encoding are compared at once.
fn is_p256(key_info: &[u8], point: &[u8]) -> bool {
    RequestedKey(point.to_vec()).subject_public_key_info() == key_info
}

fn parameters(not_before: SystemTime, not_after: SystemTime) -> Result<CertificateParams, AuthorityError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.not_before = not_before.into();
    params.not_after = not_after.into();
    let mut serial: [u8; 16] = rand::random();
    // Positive, and of full length: 0x40 keeps the first byte from being dropped.
    serial[0] = (serial[0] & 0x7f) | 0x40;
    params.serial_number = Some(SerialNumber::from(serial.to_vec()));
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    Ok(params)
}

fn read_text(path: &Path) -> Result<String, FileError> {
    String::from_utf8(files::read_bounded(path)?)
        .map_err(|error| FileError::Read { path: path.to_owned(), source: io::Error::other(error) })
}

fn to_pem(certificate: &[u8]) -> String {
    pem(certificate, "CERTIFICATE")
}

/// A certificate request in PEM.
pub(crate) fn request_to_pem(request: &[u8]) -> String {
    pem(request, "CERTIFICATE REQUEST")
}

fn pem(content: &[u8], label: &str) -> String {
    use base64::{Engine, prelude::BASE64_STANDARD};

    let text = BASE64_STANDARD.encode(content);
    let mut pem = format!("-----BEGIN {label}-----\n");
    for line in text.as_bytes().chunks(64) {
        // Base64 is ASCII.
        pem.extend(line.iter().map(|byte| char::from(*byte)));
        pem.push('\n');
    }
    pem.push_str(&format!("-----END {label}-----\n"));
    pem
}

/// The little DER that a subject with several organisations takes.
mod der {
    /// 2.5.4.3
    pub(super) const COMMON_NAME: &[u8] = &[0x06, 0x03, 0x55, 0x04, 0x03];
    /// 2.5.4.10
    pub(super) const ORGANIZATION: &[u8] = &[0x06, 0x03, 0x55, 0x04, 0x0a];
    /// 1.2.840.10045.4.3.2
    pub(super) const ECDSA_WITH_SHA256: &[u8] = &[0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];

    const BIT_STRING: u8 = 0x03;
    const UTF8_STRING: u8 = 0x0c;
    const SEQUENCE: u8 = 0x30;
    const SET: u8 = 0x31;

    pub(super) fn sequence(parts: &[&[u8]]) -> Vec<u8> {
        element(SEQUENCE, &parts.concat())
    }

    pub(super) fn bit_string(bytes: &[u8]) -> Vec<u8> {
        // The first byte counts the unused bits of the last.
        element(BIT_STRING, &[&[0], bytes].concat())
    }

    pub(super) fn relative_name(kind: &[u8], value: &str) -> Vec<u8> {
        element(SET, &sequence(&[kind, &element(UTF8_STRING, value.as_bytes())]))
    }

    /// The length of tag and length of an element.
    pub(super) fn header_length(element: &[u8]) -> Option<usize> {
        let first = *element.get(1)?;
        Some(if first < 0x80 { 2 } else { 2 + usize::from(first & 0x7f) })
    }

    fn element(tag: u8, content: &[u8]) -> Vec<u8> {
        let mut element = vec![tag];
        let length = content.len();
        if length < 0x80 {
            element.push(length as u8);
        } else {
            let bytes = length.to_be_bytes();
            let significant = &bytes[bytes.iter().take_while(|byte| **byte == 0).count()..];
            element.push(0x80 | significant.len() as u8);
            element.extend_from_slice(significant);
        }
        element.extend_from_slice(content);
        element
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::{agent_identity, certificates_from_pem, user_of, validity};

    fn first(pem: &str) -> CertificateDer<'static> {
        certificates_from_pem(pem.as_bytes()).unwrap().remove(0)
    }

    fn identity() -> AgentIdentity {
        "spiffe://cellway.local/cluster/prod-hz/agent/a1".parse().unwrap()
    }

    #[test]
    fn an_authority_is_the_same_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pki");
        let one = CertificateAuthority::load_or_create(&path, "hub").unwrap();
        let two = CertificateAuthority::load_or_create(&path, "hub").unwrap();
        assert_eq!(one.public_key_hash(), two.public_key_hash());
        assert_eq!(one.certificate_pem(), two.certificate_pem());
        assert_eq!(one.public_key_hash().to_string().len(), "sha256:".len() + 64);
        let mode = fs::metadata(path.join(KEY_FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);

        // Cut off before the certificate was written: the key, and with it the hash, stays.
        fs::remove_file(path.join(CERTIFICATE_FILE)).unwrap();
        let three = CertificateAuthority::load_or_create(&path, "hub").unwrap();
        assert_eq!(one.public_key_hash(), three.public_key_hash());

        // Without the key, never a new one in silence: all that trust the old would be cut off.
        fs::remove_file(path.join(KEY_FILE)).unwrap();
        let error = CertificateAuthority::load_or_create(&path, "hub").unwrap_err();
        assert!(matches!(error, AuthorityError::KeyMissing { .. }));
    }

    #[test]
    fn a_key_must_belong_to_its_certificate() {
        let one = CertificateAuthority::create("one").unwrap();
        let key = KeyPair::generate().unwrap().serialize_pem();
        let error = CertificateAuthority::from_pem(one.certificate_pem(), &key).unwrap_err();
        assert!(matches!(error, AuthorityError::KeyMismatch));
        let leaf = one.issue_client("user", &[], Duration::from_secs(60)).unwrap();
        let error = CertificateAuthority::from_pem(&leaf.certificate_pem, &leaf.key_pem).unwrap_err();
        assert!(matches!(error, AuthorityError::NotAnAuthority));
    }

    #[test]
    fn a_user_has_any_number_of_groups() {
        let authority = CertificateAuthority::create("hub").unwrap();
        for groups in
            [vec![], vec!["system:masters"], vec!["a", "b", "c", "a-much-longer-group-name-than-the-others"]]
        {
            let groups: Vec<String> = groups.into_iter().map(str::to_owned).collect();
            let issued = authority.issue_client("cellway:admin", &groups, Duration::from_secs(60)).unwrap();
            let certificate = first(&issued.certificate_pem);
            assert_eq!(user_of(&certificate).unwrap(), ("cellway:admin".to_owned(), groups));
            let ca = first(authority.certificate_pem());
            let ca = certificate::parse(&ca).unwrap();
            certificate::parse(&certificate).unwrap().verify_signature(Some(ca.public_key())).unwrap();
            assert_eq!(agent_identity(&certificate), Err(CertificateError::NoIdentity));
        }
    }

    #[test]
    fn of_a_request_only_the_key_is_taken() {
        let authority = CertificateAuthority::create("hub").unwrap();
        // The request asks to be another cluster, a CA, and a server.
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let mut params = CertificateParams::new(vec!["hub.example".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::OrganizationName, "system:masters");
        params
            .subject_alt_names
            .push(SanType::URI("spiffe://cellway.local/cluster/other/agent/a1".try_into().unwrap()));
        let request = params.serialize_request(&key).unwrap().pem().unwrap();

        let now = SystemTime::now();
        let pem = authority.sign_agent_at(&request, &identity(), Duration::from_secs(3600), now).unwrap();
        let certificate = first(&pem);
        assert_eq!(agent_identity(&certificate).unwrap(), identity());
        assert_eq!(user_of(&certificate), Err(CertificateError::NoUser));
        let parsed = certificate::parse(&certificate).unwrap();
        assert!(!parsed.is_ca());
        assert_eq!(parsed.public_key().raw, key.subject_public_key_info());
        let names = parsed.subject_alternative_name().unwrap().unwrap();
        assert_eq!(names.value.general_names.len(), 1);
        let (not_before, not_after) = validity(&certificate).unwrap();
        assert!(not_before <= now && now.duration_since(not_before).unwrap() < Duration::from_secs(2));
        assert_eq!(not_after.duration_since(not_before).unwrap(), Duration::from_secs(3600));
    }

    #[test]
    fn a_bad_request_is_refused() {
        let authority = CertificateAuthority::create("hub").unwrap();
        let sign = |request: &str| authority.sign_agent(request, &identity(), Duration::from_secs(60));
        assert!(matches!(sign(""), Err(AuthorityError::RequestMalformed)));
        assert!(matches!(sign(&"x".repeat(1 << 20)), Err(AuthorityError::RequestMalformed)));

        // The signature of another key.
        let good = AgentKey::generate().unwrap().certificate_request().unwrap();
        let other = AgentKey::generate().unwrap().certificate_request().unwrap();
        let der = |pem: &str| CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec();
        let (mut forged, other) = (der(&good), der(&other));
        let end = forged.len().min(other.len());
        // Within the signature's second half: the lengths stay true.
        let at = end - 20;
        forged[at..end].copy_from_slice(&other[at..end]);
        let forged = request_to_pem(&forged);
        assert!(matches!(sign(&forged), Err(AuthorityError::RequestSignature)));

        let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let request = CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
        assert!(matches!(sign(&request), Err(AuthorityError::RequestKey)));
        assert!(sign(&good).is_ok());
    }

    #[test]
    fn nothing_outlives_the_authority() {
        let authority = CertificateAuthority::create("hub").unwrap();
        let issued = authority.issue_server(&["hub".to_owned()], 100 * CA_LIFETIME).unwrap();
        let (_, end) = validity(&first(&issued.certificate_pem)).unwrap();
        assert!(end <= authority.not_after);
    }

    #[test]
    fn secrets_do_not_reach_the_log() {
        let authority = CertificateAuthority::create("hub").unwrap();
        let issued = authority.issue_server(&["hub".to_owned()], Duration::from_secs(60)).unwrap();
        let key = AgentKey::generate().unwrap();
        let text = format!("{issued:?} {authority:?} {key:?}");
        assert!(!text.contains("PRIVATE"));
    }
}
