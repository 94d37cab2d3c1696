//! Who speaks at a frontend, once somebody has authenticated them.

use std::collections::BTreeMap;

use tls::CertificateDer;

/// An authenticated user, in Kubernetes' terms. Put into a request's extensions by whoever authenticated it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct User {
    /// Never empty for an authenticated user.
    pub name: String,
    /// Empty when the authenticator gives none.
    pub uid: String,
    /// Groups, `system:authenticated` among them or not.
    pub groups: Vec<String>,
    /// What else the authenticator says.
    pub extra: BTreeMap<String, Vec<String>>,
}

// === impl User ===

impl User {
    /// Common name and organisations of a client certificate.
    ///
    /// # Errors
    /// When it has no common name.
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Result<Self, tls::CertificateError> {
        let (name, groups) = tls::user_of(certificate)?;
        Ok(Self { name, groups, ..Self::default() })
    }
}
