//! The names that a member and its agents are known by, and the SPIFFE URI that binds them to a certificate.

use std::{fmt, str::FromStr};

/// The longest cluster name: an RFC 1123 label, because the name is also a DNS label of `<host>.<cluster>.cellway`.
const MAX_CLUSTER_NAME: usize = 63;

/// The longest agent id. A UUID needs 36 and a pod name at most 253; SPIFFE bounds the whole URI to 2048.
const MAX_AGENT_ID: usize = 253;

/// The longest trust domain, as SPIFFE says.
const MAX_TRUST_DOMAIN: usize = 255;

/// Why a text is not a name of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidIdentity {
    /// Not an RFC 1123 label.
    #[error(
        "{0:?} is not a cluster name: use 1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit"
    )]
    ClusterName(String),
    /// Not usable as one segment of a URI path.
    #[error("{0:?} is not an agent id: use 1 to 253 letters, digits, '.', '-' and '_', and not only dots")]
    AgentId(String),
    /// Not a SPIFFE trust domain.
    #[error("{0:?} is not a trust domain: use 1 to 255 of a-z, 0-9, '.', '-' and '_'")]
    TrustDomain(String),
    /// Not the URI of an agent.
    #[error("{0:?} is not an agent's identity: expected spiffe://<trust-domain>/cluster/<name>/agent/<id>")]
    Uri(String),
}

/// The name of a member cluster: an RFC 1123 label of at most 63 characters.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClusterName(String);

/// The id of one agent of a member, unique within the member: usually a UUID or a pod name.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AgentId(String);

/// The SPIFFE trust domain of one hub.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(String);

/// Whom an agent's certificate speaks for: `spiffe://<trust-domain>/cluster/<name>/agent/<id>`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct AgentIdentity {
    /// The hub's trust domain.
    pub trust_domain: TrustDomain,
    /// The member.
    pub cluster: ClusterName,
    /// The agent within the member.
    pub agent: AgentId,
}

// === impl ClusterName ===

impl ClusterName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ClusterName {
    type Err = InvalidIdentity;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bytes = text.as_bytes();
        let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let valid = bytes.len() <= MAX_CLUSTER_NAME
            && bytes.first().is_some_and(alphanumeric)
            && bytes.last().is_some_and(alphanumeric)
            && bytes.iter().all(|byte| alphanumeric(byte) || *byte == b'-');
        if valid { Ok(Self(text.to_owned())) } else { Err(InvalidIdentity::ClusterName(shorten(text))) }
    }
}

// === impl AgentId ===

impl AgentId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for AgentId {
    type Err = InvalidIdentity;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let valid = (1..=MAX_AGENT_ID).contains(&text.len())
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'))
            // "." and ".." would be removed by whatever normalises the path.
            && text.bytes().any(|byte| byte != b'.');
        if valid { Ok(Self(text.to_owned())) } else { Err(InvalidIdentity::AgentId(shorten(text))) }
    }
}

// === impl TrustDomain ===

impl TrustDomain {
    /// The domain as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for TrustDomain {
    /// `cellway.local`: enough for one hub; several hubs whose agents meet need their own.
    fn default() -> Self {
        Self("cellway.local".to_owned())
    }
}

impl FromStr for TrustDomain {
    type Err = InvalidIdentity;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let valid = (1..=MAX_TRUST_DOMAIN).contains(&text.len())
            && text.bytes().all(|byte| {
                byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'.' | b'-' | b'_')
            })
            && text.bytes().any(|byte| byte != b'.');
        if valid { Ok(Self(text.to_owned())) } else { Err(InvalidIdentity::TrustDomain(shorten(text))) }
    }
}

// === impl AgentIdentity ===

impl AgentIdentity {
    /// Puts an identity together.
    pub fn new(trust_domain: TrustDomain, cluster: ClusterName, agent: AgentId) -> Self {
        Self { trust_domain, cluster, agent }
    }
}

impl FromStr for AgentIdentity {
    type Err = InvalidIdentity;

    /// Strict: no query, fragment, port, user, empty segment, escape or trailing slash. Two spellings of one
    /// identity would be a way round a comparison.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidIdentity::Uri(shorten(text));
        let rest = text.strip_prefix("spiffe://").ok_or_else(invalid)?;
        let mut segments = rest.split('/');
        let mut next = || segments.next().ok_or_else(invalid);
        let trust_domain = next()?.parse()?;
        if next()? != "cluster" {
            return Err(invalid());
        }
        let cluster = next()?.parse()?;
        if next()? != "agent" {
            return Err(invalid());
        }
        let agent = next()?.parse()?;
        if segments.next().is_some() {
            return Err(invalid());
        }
        Ok(Self { trust_domain, cluster, agent })
    }
}

impl fmt::Display for AgentIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { trust_domain, cluster, agent } = self;
        write!(f, "spiffe://{trust_domain}/cluster/{cluster}/agent/{agent}")
    }
}

impl fmt::Debug for AgentIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

// === helpers ===

macro_rules! as_text {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidIdentity;

            fn try_from(text: String) -> Result<Self, Self::Error> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }
    )*};
}

as_text!(ClusterName, AgentId, TrustDomain);

/// The beginning of a peer's text, so that an error about a megabyte of it is not a megabyte long.
fn shorten(text: &str) -> String {
    const LONGEST: usize = 300;
    if text.len() <= LONGEST { text.to_owned() } else { text.chars().take(LONGEST).chain(['…']).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cluster_names_are_labels() {
        let longest = "a".repeat(63);
        for good in ["a", "0", "prod-hz", "a--b", longest.as_str()] {
            assert_eq!(good.parse::<ClusterName>().unwrap().as_str(), good);
        }
        let too_long = "a".repeat(64);
        for bad in ["", "-a", "a-", "A", "a.b", "a_b", "a/b", "ä", "a b", "a\n", too_long.as_str()] {
            assert!(bad.parse::<ClusterName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_identity_survives_its_uri() {
        let uri = "spiffe://cellway.local/cluster/prod-hz/agent/1b4e28ba-2fa1-11d2-883f-0016d3cca427";
        let identity: AgentIdentity = uri.parse().unwrap();
        assert_eq!(identity.cluster.as_str(), "prod-hz");
        assert_eq!(identity.to_string(), uri);
    }

    #[test]
    fn there_is_one_spelling_of_an_identity() {
        for bad in [
            "",
            "spiffe://",
            "SPIFFE://d/cluster/a/agent/b",
            "spiffe://d/cluster/a/agent/b/",
            "spiffe://d/cluster/a/agent/b?x",
            "spiffe://d/cluster/a/agent/b#x",
            "spiffe://d/cluster/a/agent/..",
            "spiffe://d/cluster//agent/b",
            "spiffe://d/cluster/a/agent/%62",
            "spiffe://d:1/cluster/a/agent/b",
            "spiffe://u@d/cluster/a/agent/b",
            "spiffe://D/cluster/a/agent/b",
            "spiffe://d/cluster/A/agent/b",
            "spiffe://d/agent/a/cluster/b",
            "spiffe://d//cluster/a/agent/b",
            "https://d/cluster/a/agent/b",
        ] {
            assert!(bad.parse::<AgentIdentity>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_error_about_a_long_text_is_short() {
        let error = "x".repeat(1 << 20).parse::<ClusterName>().unwrap_err();
        assert!(error.to_string().len() < 1000);
    }
}
