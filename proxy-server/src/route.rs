//! Which member a request goes to, and by which of konnectivity's strategies when it names none.

use std::fmt;
use std::str::FromStr;

use tls::ClusterName;
use tunnel::{Hello, Target};

use crate::error::ProxyError;

/// The header by which a client names the member.
pub const CLUSTER_HEADER: &str = "cellway-cluster";

/// Host names below this are `<host>.<cluster>.cellway`.
const SUFFIX: &str = ".cellway";

/// Where a request goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The member; `None` goes through the [`Strategy`] list.
    pub cluster: Option<ClusterName>,
    /// What the member's agent dials.
    pub target: Target,
}

/// konnectivity's ways of choosing an agent for a request that names no member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strategy {
    /// An agent that says it is the destination host.
    DestHost,
    /// An agent that says it has a default route.
    DefaultRoute,
    /// Any agent.
    Default,
}

/// What an agent says it can reach, from its hello: konnectivity's agent identifiers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identifiers {
    /// `host=`, `ipv4=` and `ipv6=`.
    pub hosts: Vec<String>,
    /// `default-route=true`.
    pub default_route: bool,
}

// === impl Route ===

impl Route {
    /// Puts the sources of a member's name together: the header, the proxy user, the host's suffix.
    ///
    /// # Errors
    /// A bad target, a name that cannot be a cluster's, or two sources that disagree.
    pub fn resolve(
        authority: &str,
        header: Option<&str>,
        proxy_user: Option<&str>,
    ) -> Result<Self, ProxyError> {
        let mut target: Target = authority
            .parse()
            .map_err(|error: tunnel::ParseTargetError| ProxyError::BadTarget(error.to_string()))?;
        let mut named: Option<&str> = None;
        for source in [header, proxy_user].into_iter().flatten() {
            match named {
                Some(name) if name != source => {
                    return Err(ProxyError::BadRequest("the request names two different clusters"));
                }
                _ => named = Some(source),
            }
        }
        let suffix = if target.is_api_gateway() { None } else { split_suffix(&target.host) };
        let from_host = suffix.map(|(host, cluster)| (host.to_owned(), cluster.to_owned()));
        if let Some((host, cluster)) = &from_host {
            if named.is_some_and(|name| name != cluster) {
                return Err(ProxyError::BadRequest("the request names two different clusters"));
            }
            target.host = host.clone();
        }
        let name = named.map(str::to_owned).or(from_host.map(|(_, cluster)| cluster));
        let cluster = name.map(|name| parse_cluster(&name)).transpose()?;
        Ok(Self { cluster, target })
    }
}

/// Reads a cluster name that a client wrote. One that cannot exist is as unknown as one that does not.
///
/// # Errors
/// [`ProxyError::UnknownCluster`].
pub fn parse_cluster(name: &str) -> Result<ClusterName, ProxyError> {
    name.parse().map_err(|_| ProxyError::UnknownCluster { cluster: name.chars().take(64).collect() })
}

/// `<host>.<cluster>.cellway` → (host, cluster).
fn split_suffix(host: &str) -> Option<(&str, &str)> {
    let rest = host.strip_suffix(SUFFIX)?;
    let (host, cluster) = rest.rsplit_once('.')?;
    (!host.is_empty()).then_some((host, cluster))
}

// === impl Strategy ===

impl FromStr for Strategy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "destHost" => Ok(Self::DestHost),
            "defaultRoute" => Ok(Self::DefaultRoute),
            "default" => Ok(Self::Default),
            other => Err(format!("'{other}' is no strategy: use destHost, defaultRoute or default")),
        }
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DestHost => "destHost",
            Self::DefaultRoute => "defaultRoute",
            Self::Default => "default",
        })
    }
}

impl Strategy {
    /// Whether an agent with these identifiers may serve a dial to `target` by this strategy.
    pub fn matches(self, identifiers: &Identifiers, target: &Target) -> bool {
        match self {
            Self::DestHost => identifiers.hosts.iter().any(|host| host.eq_ignore_ascii_case(&target.host)),
            Self::DefaultRoute => identifiers.default_route,
            Self::Default => true,
        }
    }
}

// === impl Identifiers ===

impl Identifiers {
    /// Reads what an agent said. Unknown kinds are ignored, as upstream does.
    pub fn of(hello: &Hello) -> Self {
        let mut own = Self::default();
        for identifier in &hello.identifiers {
            match identifier.split_once('=') {
                Some(("host" | "ipv4" | "ipv6", value)) => own.hosts.push(value.to_owned()),
                Some(("default-route", "true")) => own.default_route = true,
                _ => {}
            }
        }
        own
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(
        authority: &str,
        header: Option<&str>,
        user: Option<&str>,
        expect: Result<(Option<&str>, &str), &'static str>,
    ) {
        let route = Route::resolve(authority, header, user);
        let seen = route
            .as_ref()
            .map(|route| (route.cluster.as_ref().map(ClusterName::as_str), route.target.to_string()))
            .map_err(ProxyError::code);
        assert_eq!(seen, expect.map(|(c, t)| (c, t.to_owned())), "{authority} {header:?} {user:?}");
    }

    #[test]
    fn a_member_is_named_in_three_ways() {
        check("db:5432", None, None, Ok((None, "db:5432")));
        check("db:5432", Some("east"), None, Ok((Some("east"), "db:5432")));
        check("db:5432", None, Some("east"), Ok((Some("east"), "db:5432")));
        check("db.shop.east.cellway:5432", None, None, Ok((Some("east"), "db.shop:5432")));
        check("db.east.cellway:5432", Some("east"), Some("east"), Ok((Some("east"), "db:5432")));
        check("[2001:db8::1]:443", Some("east"), None, Ok((Some("east"), "[2001:db8::1]:443")));
        check("10.0.0.1.east.cellway:443", None, None, Ok((Some("east"), "10.0.0.1:443")));
    }

    #[test]
    fn disagreement_and_nonsense_are_refused() {
        check("db:5432", Some("east"), Some("west"), Err("bad-request"));
        check("db.east.cellway:5432", Some("west"), None, Err("bad-request"));
        check("db", Some("east"), None, Err("bad-target"));
        check("db:5432", Some("East_1"), None, Err("unknown-cluster"));
        check("db:5432", Some(""), None, Err("unknown-cluster"));
        check(".cellway:1", None, None, Ok((None, ".cellway:1")));
        check("east.cellway:1", None, None, Ok((None, "east.cellway:1")));
    }

    #[test]
    fn the_gateways_name_is_not_a_member() {
        let name = Target::api_gateway().to_string();
        check(&name, Some("east"), None, Ok((Some("east"), &name)));
        check(&name, None, None, Ok((None, &name)));
    }

    #[test]
    fn strategies_read_identifiers() {
        let hello = Hello {
            identifiers: ["host=Node-1", "ipv4=10.0.0.7", "cidr=10.0.0.0/8", "default-route=true", "junk"]
                .map(str::to_owned)
                .to_vec(),
            ..Hello::default()
        };
        let identifiers = Identifiers::of(&hello);
        let target = |text: &str| text.parse::<Target>().unwrap();
        assert!(Strategy::DestHost.matches(&identifiers, &target("node-1:1")));
        assert!(Strategy::DestHost.matches(&identifiers, &target("10.0.0.7:1")));
        assert!(!Strategy::DestHost.matches(&identifiers, &target("10.0.0.8:1")));
        assert!(Strategy::DefaultRoute.matches(&identifiers, &target("x:1")));
        assert!(!Strategy::DefaultRoute.matches(&Identifiers::default(), &target("x:1")));
        assert!(Strategy::Default.matches(&Identifiers::default(), &target("x:1")));
    }
}
