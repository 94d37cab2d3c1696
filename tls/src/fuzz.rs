//! Bodies of fuzz targets for names and certificates: each asserts what must hold for any input.

use std::{sync::LazyLock, time::Duration};

use rustls_pki_types::CertificateDer;

use crate::{
    AgentId, AgentIdentity, CaHash, CertificateAuthority, ClusterName, TrustDomain, agent_identity,
    certificates_from_pem, user_of, validity,
};

/// Reads `input` as an identity and each of its names: there is one spelling of each, and errors are short.
pub fn identity(input: &[u8]) {
    /// An error quotes at most 300 characters, each of which takes at most ten when it is escaped.
    const LONGEST_ERROR: usize = 4096;

    let Ok(text) = std::str::from_utf8(input) else { return };
    let shown = [
        text.parse::<AgentIdentity>().map(|identity| identity.to_string()),
        text.parse::<ClusterName>().map(|name| name.to_string()),
        text.parse::<AgentId>().map(|id| id.to_string()),
        text.parse::<TrustDomain>().map(|domain| domain.to_string()),
    ];
    for shown in shown {
        match shown {
            Ok(shown) => assert_eq!(shown, text),
            Err(error) => assert!(error.to_string().len() < LONGEST_ERROR),
        }
    }
    if let Ok(hash) = text.parse::<CaHash>() {
        assert!(hash.to_string().eq_ignore_ascii_case(text.trim()));
    }
}

/// Reads `input` as a certificate in DER.
pub fn certificate(input: &[u8]) {
    let certificate = CertificateDer::from(input);
    if let Ok(identity) = agent_identity(&certificate) {
        assert_eq!(identity.to_string().parse(), Ok(identity));
    }
    if let Ok((user, _)) = user_of(&certificate) {
        assert!(!user.is_empty());
    }
    if let Ok(hash) = CaHash::of(&certificate) {
        assert_eq!(hash.to_string().parse(), Ok(hash));
        assert!(validity(&certificate).is_ok(), "whoever parses it once parses it twice");
    }
}

/// Reads `input` as certificates in PEM.
pub fn certificate_bundle(input: &[u8]) {
    if let Ok(certificates) = certificates_from_pem(input) {
        assert!(!certificates.is_empty());
        certificates.iter().for_each(|der| certificate(der));
    }
}

/// Reads `input` as a certificate request, in PEM or in DER: whatever it asks for, what is signed is the agent that
/// the hub decided on.
pub fn certificate_request(input: &[u8]) {
    static AUTHORITY: LazyLock<CertificateAuthority> =
        LazyLock::new(|| CertificateAuthority::create("fuzz").expect("a key can be generated in a test"));
    static IDENTITY: LazyLock<AgentIdentity> = LazyLock::new(|| {
        "spiffe://cellway.local/cluster/a/agent/b".parse().expect("an identity as in the docs")
    });

    let pem = match std::str::from_utf8(input) {
        Ok(text) if text.starts_with("-----") => text.to_owned(),
        _ => crate::authority::request_to_pem(input),
    };
    if let Ok(signed) = AUTHORITY.sign_agent(&pem, &IDENTITY, Duration::from_secs(60)) {
        let certificates = certificates_from_pem(signed.as_bytes()).expect("we made it");
        assert_eq!(agent_identity(&certificates[0]).as_ref(), Ok(&*IDENTITY));
        assert!(user_of(&certificates[0]).is_err(), "an agent is no user");
    }
}
