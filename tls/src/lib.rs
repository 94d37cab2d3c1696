//! Identities, certificates and TLS configurations that reload.
//!
//! Of the crates that are ours only this one and `tunnel` name rustls; everybody else takes what is re-exported
//! here. The crate decides nothing about *who may do what*: it says who a certificate speaks for ([`agent_identity`],
//! [`user_of`]), signs certificates for identities that its caller has already decided on
//! ([`CertificateAuthority`]), and holds the current TLS configuration of a listener or a client while the files
//! behind it change ([`ServerTls`], [`ClientTls`]).
//!
//! Every configuration uses the aws-lc-rs provider, passed explicitly and never taken from the process, so that a
//! dependency that installs another default changes nothing here. Session resumption is off on both sides: a resumed
//! session skips the certificate check, and with it a changed CA bundle or a revocation.

mod authority;
mod certificate;
mod config;
mod files;
mod fuzz;
mod identity;
mod served;

pub use authority::{AgentKey, AuthorityError, CertificateAuthority, IssuedCertificate, requested_key};
pub use certificate::{
    CaHash, CertificateError, InvalidCaHash, agent_identity, certificates_from_pem, user_of, validity,
};
pub use config::{
    CertificateEnds, ClientAuth, ClientTls, ServerTls, TlsError, TlsVersions, refuses_identity,
};
pub use files::{FileError, read_bounded, write_private, write_public};
pub use identity::{AgentId, AgentIdentity, ClusterName, InvalidIdentity, TrustDomain};
pub use served::{REISSUE_INTERVAL, ServedCertificate, reissue, reissue_every};

pub use rustls::{ClientConfig, ServerConfig};
pub use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
pub use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream, client, server};

/// What fuzz targets call: the parsers of peer input, as plain functions.
#[doc(hidden)]
pub mod fuzzing {
    pub use crate::fuzz::{certificate, certificate_bundle, certificate_request, identity};
}
