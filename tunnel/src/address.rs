//! Where a connection goes: the `host:port` that a member's agent is asked to dial.

use std::{fmt, str::FromStr};

use thiserror::Error;

/// The longest host name that is accepted: RFC 1035 allows 253 characters, a scoped IPv6 literal is shorter.
const MAX_HOST: usize = 253;

/// The reserved name behind which an agent serves its API gateway instead of dialling.
const API_GATEWAY_HOST: &str = "kube-apiserver.gateway.cellway";

/// A destination inside a member: a host name or address as the member resolves it, and a port.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Target {
    /// A name or an IP address; IPv6 without brackets.
    pub host: String,
    pub port: u16,
}

/// Why a text is no `host:port`.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ParseTargetError {
    #[error("{0:?} has no port: write host:port, with IPv6 addresses in brackets")]
    NoPort(String),
    #[error("{0:?} is no port: expected a number from 1 to 65535")]
    Port(String),
    #[error("{0:?} is no host name or address")]
    Host(String),
}

// === impl Target ===

impl Target {
    /// The member's Kubernetes API, answered by the agent's own gateway: plain HTTP/1.1 inside the tunnel.
    pub fn api_gateway() -> Self {
        Self { host: API_GATEWAY_HOST.to_owned(), port: 80 }
    }

    /// Whether this is [`Target::api_gateway`].
    pub fn is_api_gateway(&self) -> bool {
        self.host == API_GATEWAY_HOST && self.port == 80
    }
}

impl FromStr for Target {
    type Err = ParseTargetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let shown = || text.chars().take(MAX_HOST).collect::<String>();
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => rest.split_once("]:").ok_or_else(|| ParseTargetError::NoPort(shown()))?,
            None => text.rsplit_once(':').ok_or_else(|| ParseTargetError::NoPort(shown()))?,
        };
        let bracketed = text.starts_with('[');
        let valid = !host.is_empty()
            && host.len() <= MAX_HOST
            && if bracketed {
                let (address, zone) = host.split_once('%').unwrap_or((host, "eth0"));
                address.parse::<std::net::Ipv6Addr>().is_ok()
                    && !zone.is_empty()
                    && zone
                        .bytes()
                        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b'~'))
            } else {
                // Underscores occur in real DNS names (SRV owners, docker networks).
                host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
            };
        if !valid {
            return Err(ParseTargetError::Host(shown()));
        }
        let number = if port.len() <= 5 && port.bytes().all(|b| b.is_ascii_digit()) {
            port.parse::<u16>().ok()
        } else {
            None
        };
        match number {
            Some(port) if port > 0 => Ok(Self { host: host.to_owned(), port }),
            _ => Err(ParseTargetError::Port(port.chars().take(16).collect())),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn parses_names_and_addresses() {
        for (text, host, port) in [
            ("db.internal:5432", "db.internal", 5432),
            ("198.51.100.7:443", "198.51.100.7", 443),
            ("[2001:db8::1]:443", "2001:db8::1", 443),
            ("[fe80::1%eth0]:1", "fe80::1%eth0", 1),
        ] {
            let target = text.parse::<Target>().unwrap();
            assert_eq!((target.host.as_str(), target.port), (host, port));
            assert_eq!(target.to_string(), text);
        }
    }

    #[test]
    fn refuses_what_is_no_destination() {
        for text in [
            "",
            "host",
            ":80",
            "host:",
            "host:0",
            "host:65536",
            "host:+1",
            "a b:1",
            "2001:db8::1:443x",
            "[::1]443",
            "[x]:1",
            "h\r\n:1",
        ] {
            assert!(text.parse::<Target>().is_err(), "{text:?}");
        }
        assert!(format!("{}:1", "a".repeat(254)).parse::<Target>().is_err());
    }

    proptest! {
        #[test]
        fn what_parses_prints_back(text in "\\PC{0,40}") {
            if let Ok(target) = text.parse::<Target>() {
                prop_assert_eq!(target.to_string().parse::<Target>().unwrap(), target);
            }
        }
    }
}
