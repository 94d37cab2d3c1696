//! What both sides say of themselves when a tunnel is attached, translated from and to the wire in one place.

use std::{collections::BTreeMap, fmt, str::FromStr};

use proto::tunnel::v1;

use crate::error::TunnelError;

/// The capability of a server that tells its agents that they are taken: they wait for it.
pub(crate) const ADMISSION: &str = "admission";

/// Entries of any list or map in a hello; an agent has a handful of labels, a federation a handful of servers.
const MAX_ENTRIES: usize = 256;

/// Bytes of any one text in a hello: label values are at most 63, host names 253.
const MAX_TEXT: usize = 1024;

/// A token; the service accounts' have some 1 KiB.
const MAX_TOKEN: usize = 16 * 1024;

/// A bearer token. `Debug` hides it.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct BearerToken(String);

/// The agent's hello.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hello {
    pub version: String,
    /// Must equal the cluster of the agent's certificate; empty in file-certificate mode.
    pub cluster: String,
    pub agent_id: String,
    /// Different at every start of the agent's process.
    pub instance: String,
    pub labels: BTreeMap<String, String>,
    /// konnectivity's agent identifiers, `host=…`, `ipv4=…`, `default-route=true`.
    pub identifiers: Vec<String>,
    pub capabilities: Vec<String>,
    /// Of an agent that has no certificate; empty without one.
    pub token: BearerToken,
}

/// The proxy server's hello.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerHello {
    pub version: String,
    pub server_id: String,
    /// `host:port` of every server that an agent may hold a tunnel to.
    pub servers: Vec<String>,
    pub capabilities: Vec<String>,
}

/// What carries a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Carrier {
    H2,
    Quic,
}

/// What an agent may use as carrier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CarrierChoice {
    /// QUIC, unless it is blocked or slower to establish than HTTP/2.
    #[default]
    Auto,
    Quic,
    H2,
}

// === impl BearerToken ===

impl BearerToken {
    pub fn new(token: impl Into<String>) -> Self {
        Self(token.into())
    }

    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for BearerToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "(none)" } else { "(hidden)" })
    }
}

// === impl Hello ===

impl Hello {
    pub(crate) fn to_proto(&self) -> v1::AgentHello {
        v1::AgentHello {
            version: self.version.clone(),
            cluster: self.cluster.clone(),
            agent_id: self.agent_id.clone(),
            instance: self.instance.clone(),
            labels: self.labels.clone().into_iter().collect(),
            identifiers: self.identifiers.clone(),
            capabilities: self.capabilities.clone(),
            token: self.token.0.clone(),
        }
    }

    pub(crate) fn from_proto(hello: v1::AgentHello) -> Result<Self, TunnelError> {
        check_texts([&hello.version, &hello.cluster, &hello.agent_id, &hello.instance])?;
        check_list(&hello.identifiers)?;
        check_list(&hello.capabilities)?;
        if hello.labels.len() > MAX_ENTRIES {
            return Err(too_large());
        }
        check_texts(hello.labels.iter().flat_map(|(key, value)| [key, value]))?;
        if hello.token.len() > MAX_TOKEN || !hello.token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(TunnelError::Protocol("the token in a hello is none".to_owned()));
        }
        Ok(Self {
            version: hello.version,
            cluster: hello.cluster,
            agent_id: hello.agent_id,
            instance: hello.instance,
            labels: hello.labels.into_iter().collect(),
            identifiers: hello.identifiers,
            capabilities: hello.capabilities,
            token: BearerToken(hello.token),
        })
    }
}

// === impl ServerHello ===

impl ServerHello {
    pub(crate) fn to_proto(&self) -> v1::ServerHello {
        v1::ServerHello {
            version: self.version.clone(),
            server_id: self.server_id.clone(),
            servers: self.servers.clone(),
            capabilities: self.capabilities.clone(),
        }
    }

    pub(crate) fn from_proto(hello: v1::ServerHello) -> Result<Self, TunnelError> {
        check_texts([&hello.version, &hello.server_id])?;
        check_list(&hello.servers)?;
        check_list(&hello.capabilities)?;
        Ok(Self {
            version: hello.version,
            server_id: hello.server_id,
            servers: hello.servers,
            capabilities: hello.capabilities,
        })
    }
}

/// Checks a list of texts that a peer sent.
pub(crate) fn check_list(list: &[String]) -> Result<(), TunnelError> {
    if list.len() > MAX_ENTRIES {
        return Err(too_large());
    }
    check_texts(list)
}

fn check_texts<'a>(texts: impl IntoIterator<Item = &'a String>) -> Result<(), TunnelError> {
    let control = |text: &String| text.chars().any(char::is_control);
    if texts.into_iter().any(|text| text.len() > MAX_TEXT || control(text)) {
        return Err(TunnelError::Protocol(
            "a text in a hello is too long or holds control characters".to_owned(),
        ));
    }
    Ok(())
}

fn too_large() -> TunnelError {
    TunnelError::Protocol(format!("a hello holds a list of more than {MAX_ENTRIES} entries"))
}

// === impl Carrier ===

impl Carrier {
    /// The name in flags, tables and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::H2 => "h2",
            Self::Quic => "quic",
        }
    }
}

impl fmt::Display for Carrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for CarrierChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Quic => "quic",
            Self::H2 => "h2",
        })
    }
}

impl FromStr for CarrierChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "quic" => Ok(Self::Quic),
            "h2" => Ok(Self::H2),
            other => Err(format!("{other:?} is no carrier: expected auto, quic or h2")),
        }
    }
}

/// What must hold of a hello that is taken, for fuzz targets.
pub(crate) mod fuzz {
    use proto::tunnel::v1;

    use super::{Hello, MAX_ENTRIES, MAX_TEXT, MAX_TOKEN, ServerHello};

    /// Takes an agent's hello, or does not.
    pub(crate) fn agent_hello(hello: v1::AgentHello) {
        let Ok(hello) = Hello::from_proto(hello) else { return };
        let Hello { version, cluster, agent_id, instance, labels, identifiers, capabilities, token } = &hello;
        entries(&[labels.len(), identifiers.len(), capabilities.len()]);
        texts([version, cluster, agent_id, instance]);
        texts(labels.iter().flat_map(|(key, value)| [key, value]));
        texts(identifiers.iter().chain(capabilities));
        let token = token.reveal();
        assert!(token.len() <= MAX_TOKEN && token.bytes().all(|byte| byte.is_ascii_graphic()));
        assert_eq!(Hello::from_proto(hello.to_proto()).ok(), Some(hello));
    }

    /// Takes a server's hello, or does not.
    pub(crate) fn server_hello(hello: v1::ServerHello) {
        let Ok(hello) = ServerHello::from_proto(hello) else { return };
        let ServerHello { version, server_id, servers, capabilities } = &hello;
        entries(&[servers.len(), capabilities.len()]);
        texts([version, server_id].into_iter().chain(servers).chain(capabilities));
        assert_eq!(ServerHello::from_proto(hello.to_proto()).ok(), Some(hello));
    }

    fn entries(lists: &[usize]) {
        assert!(lists.iter().all(|entries| *entries <= MAX_ENTRIES), "{lists:?} entries");
    }

    fn texts<'a>(texts: impl IntoIterator<Item = &'a String>) {
        for text in texts {
            assert!(text.len() <= MAX_TEXT && !text.chars().any(char::is_control), "{text:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is made of a hello, and its name.
    type Change<T> = (&'static str, fn(&mut T));

    /// What clears a terminal that a table of agents is shown in.
    const ESCAPE: &str = "\x1b[2J";

    #[test]
    fn an_agents_hello_is_taken_at_its_limits_and_not_beyond_them() {
        let longest = "a".repeat(MAX_TEXT);
        let full = v1::AgentHello {
            version: longest.clone(),
            cluster: longest.clone(),
            agent_id: longest.clone(),
            instance: longest.clone(),
            labels: (0..MAX_ENTRIES).map(|n| (format!("{n:0>MAX_TEXT$}"), longest.clone())).collect(),
            identifiers: vec![longest.clone(); MAX_ENTRIES],
            capabilities: vec![longest.clone(); MAX_ENTRIES],
            token: "a".repeat(MAX_TOKEN),
        };
        let hello = Hello::from_proto(full.clone()).unwrap();
        assert!(hello.to_proto() == full, "it is taken with something left out");
        // Each alone makes it too large, or unfit to be shown.
        let changes: [Change<v1::AgentHello>; 17] = [
            ("a label more", |hello| {
                hello.labels.insert("one more".to_owned(), String::new());
            }),
            ("an identifier more", |hello| hello.identifiers.push(String::new())),
            ("a capability more", |hello| hello.capabilities.push(String::new())),
            ("a long version", |hello| hello.version.push('a')),
            ("a long cluster", |hello| hello.cluster.push('a')),
            ("a long id", |hello| hello.agent_id.push('a')),
            ("a long instance", |hello| hello.instance.push('a')),
            ("a label's long key", |hello| hello.labels = label(&"a".repeat(MAX_TEXT + 1), "")),
            ("a label's long value", |hello| hello.labels = label("", &"a".repeat(MAX_TEXT + 1))),
            ("a long identifier", |hello| hello.identifiers[MAX_ENTRIES - 1].push('a')),
            ("a long capability", |hello| hello.capabilities[MAX_ENTRIES - 1].push('a')),
            ("a long token", |hello| hello.token.push('a')),
            ("an escape in the cluster", |hello| hello.cluster = ESCAPE.to_owned()),
            ("an escape in the id", |hello| hello.agent_id = ESCAPE.to_owned()),
            ("an escape in a label's key", |hello| hello.labels = label(ESCAPE, "")),
            ("an escape in a label's value", |hello| hello.labels = label("", ESCAPE)),
            ("an escape in an identifier", |hello| hello.identifiers[0] = ESCAPE.to_owned()),
        ];
        for (what, change) in changes {
            let mut hello = full.clone();
            change(&mut hello);
            assert!(matches!(Hello::from_proto(hello), Err(TunnelError::Protocol(_))), "{what} is taken");
        }
    }

    fn label(key: &str, value: &str) -> BTreeMap<String, String> {
        BTreeMap::from([(key.to_owned(), value.to_owned())])
    }

    #[test]
    fn a_servers_hello_is_taken_at_its_limits_and_not_beyond_them() {
        let longest = "a".repeat(MAX_TEXT);
        let full = v1::ServerHello {
            version: longest.clone(),
            server_id: longest.clone(),
            servers: vec![longest.clone(); MAX_ENTRIES],
            capabilities: vec![longest.clone(); MAX_ENTRIES],
        };
        let hello = ServerHello::from_proto(full.clone()).unwrap();
        assert!(hello.to_proto() == full, "it is taken with something left out");
        let changes: [Change<v1::ServerHello>; 8] = [
            ("a server more", |hello| hello.servers.push(String::new())),
            ("a capability more", |hello| hello.capabilities.push(String::new())),
            ("a long version", |hello| hello.version.push('a')),
            ("a long id", |hello| hello.server_id.push('a')),
            ("a long server", |hello| hello.servers[MAX_ENTRIES - 1].push('a')),
            ("a long capability", |hello| hello.capabilities[MAX_ENTRIES - 1].push('a')),
            ("an escape in the id", |hello| hello.server_id = ESCAPE.to_owned()),
            ("an escape in a server", |hello| hello.servers[0] = ESCAPE.to_owned()),
        ];
        for (what, change) in changes {
            let mut hello = full.clone();
            change(&mut hello);
            assert!(
                matches!(ServerHello::from_proto(hello), Err(TunnelError::Protocol(_))),
                "{what} is taken"
            );
        }
    }

    #[test]
    fn a_token_is_passed_on_and_never_shown() {
        let hello = Hello { token: BearerToken::new("abc.DEF-1_2"), ..Hello::default() };
        assert!(!format!("{hello:?}").contains("abc"), "{hello:?}");
        assert_eq!(Hello::from_proto(hello.to_proto()).unwrap(), hello);
        for token in ["two words", "line\n", "\u{e9}", &"a".repeat(MAX_TOKEN + 1)] {
            let hello = v1::AgentHello { token: token.to_owned(), ..v1::AgentHello::default() };
            let error = Hello::from_proto(hello).unwrap_err().to_string();
            assert!(!error.contains(token), "{error}");
        }
    }
}
