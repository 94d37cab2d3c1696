//! Which destinations may be dialled: the rules that an agent, and the hub for its part, hold every dial against.
//!
//! A policy is a list of rules and allows nothing but what a rule allows; the empty policy allows nothing.
//!
//! ```text
//! *                           every name and every ordinary address, every port
//! *:443                       the same on one port
//! 10.0.0.0/8:443              addresses of a block
//! [2001:db8::]/32:*           the same for IPv6
//! 10.1.2.3:80-90,443          one address, ports and ranges
//! db.internal:5432,5433       one name, whatever it resolves to
//! *.svc.cluster.local:80-90   every name below a domain
//! ```
//!
//! Without a port a rule holds for every port. Rules are separated by white space or semicolons.
//!
//! **Names and addresses.** A destination that is an address is held against the address rules. A name is resolved
//! first and the address that is going to be dialled is the one that is judged ([`DestinationPolicy::allows_resolved`]):
//! it is allowed when a name rule holds for the name, or an address rule for the address. So what a name resolves to a
//! moment later makes no difference.
//!
//! **Special addresses.** Loopback, link-local, unspecified, multicast and broadcast addresses and the metadata
//! services of the clouds hold what their host trusts without asking: the node's own ports, its credentials. `*` and
//! name rules therefore never reach them, whatever a name resolves to; an address rule must name them
//! (`127.0.0.1:9100`, `169.254.0.0/16:80`). One name does so too: a rule for `localhost` reaches loopback. A block
//! reaches those that lie within it, except for one of length 0, which is `*` in another spelling.
//! [`DestinationPolicy::allow_everything`] (file-certificate mode) knows no such exception, as upstream does not.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

/// Rules in one policy. Every dial is held against all of them; a thousand take a few microseconds.
const MAX_RULES: usize = 1024;

/// Ports and ranges in one rule.
const MAX_PORT_RANGES: usize = 64;

/// The longest host name, as DNS has it.
const MAX_HOST: usize = 253;

/// The metadata services of clouds that lie outside the link-local block: Alibaba Cloud, Azure, AWS over IPv6.
const METADATA_V4: [Ipv4Addr; 2] = [Ipv4Addr::new(100, 100, 100, 200), Ipv4Addr::new(168, 63, 129, 16)];
const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);

/// What may be dialled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DestinationPolicy {
    everything: bool,
    rules: Vec<Rule>,
}

/// Why a text is not a policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPolicy {
    /// Neither a name, nor a pattern, nor an address or block.
    #[error(
        "{0:?} is not a destination: expected *, a name, *.domain, an address or a block such as 10.0.0.0/8"
    )]
    Host(String),
    /// A block whose address has bits beyond its length: a slip in one of the two.
    #[error("{0:?} is not a block: the address has bits set beyond the prefix length")]
    HostBits(String),
    /// Not ports.
    #[error("{0:?} are not ports: expected *, or numbers and ranges from 1 to 65535 such as 80,8000-8010")]
    Ports(String),
    /// More rules than a policy may hold.
    #[error("more than {MAX_RULES} rules in one policy: use blocks and domains")]
    TooMany,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    host: HostRule,
    /// Inclusive ranges; empty: every port.
    ports: Vec<(u16, u16)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum HostRule {
    Any,
    /// Lower case, without the final dot.
    Name(String),
    /// What follows `*`, with its dot: `.svc.cluster.local`.
    Below(String),
    Block(IpAddr, u8),
}

// === impl DestinationPolicy ===

impl DestinationPolicy {
    /// Allows nothing.
    pub fn nothing() -> Self {
        Self::default()
    }

    /// Allows everything, special addresses too: what upstream's agent does.
    pub fn allow_everything() -> Self {
        Self { everything: true, rules: Vec::new() }
    }

    /// A policy of several texts, each of one or more rules.
    ///
    /// # Errors
    /// When one of them is not a rule, or there are more than 1024.
    pub fn parse_all<T: AsRef<str>>(texts: impl IntoIterator<Item = T>) -> Result<Self, InvalidPolicy> {
        let mut policy = Self::nothing();
        for text in texts {
            let rules =
                text.as_ref().split(|c: char| c.is_whitespace() || c == ';').filter(|rule| !rule.is_empty());
            for rule in rules {
                if policy.rules.len() == MAX_RULES {
                    return Err(InvalidPolicy::TooMany);
                }
                policy.rules.push(rule.parse()?);
            }
        }
        Ok(policy)
    }

    /// Whether nothing at all is allowed.
    pub fn is_empty(&self) -> bool {
        !self.everything && self.rules.is_empty()
    }

    /// Whether a name rule holds for this name. Where the name leads must still be judged, with
    /// [`Self::allows_resolved`].
    pub fn allows_name(&self, host: &str, port: u16) -> bool {
        if self.everything {
            return true;
        }
        let host = normal(host);
        self.rules.iter().any(|rule| rule.allows_port(port) && rule.host.allows_name(&host))
    }

    /// Whether an address rule holds for this address.
    pub fn allows_addr(&self, addr: IpAddr, port: u16) -> bool {
        let addr = addr.to_canonical();
        self.everything || self.rules.iter().any(|rule| rule.allows_port(port) && rule.host.allows_addr(addr))
    }

    /// Whether this address may be dialled for this name, which resolved to it.
    pub fn allows_resolved(&self, host: &str, addr: IpAddr, port: u16) -> bool {
        if self.allows_addr(addr, port) {
            return true;
        }
        let addr = addr.to_canonical();
        let reachable = !is_special(addr) || (addr.is_loopback() && normal(host) == "localhost");
        // `*` and `*.domain` do not name loopback: only a rule for exactly this name does.
        let host = normal(host);
        reachable
            && self.rules.iter().any(|rule| {
                rule.allows_port(port)
                    && rule.host.allows_name(&host)
                    && (!is_special(addr) || matches!(rule.host, HostRule::Name(_)))
            })
    }

    /// Whether resolving this name can lead to an allowed dial at all: there is a name rule for it, or some address
    /// rule for the port. Otherwise the member's DNS need not be asked.
    pub fn may_allow(&self, host: &str, port: u16) -> bool {
        self.allows_name(host, port)
            || self.rules.iter().any(|rule| {
                rule.allows_port(port) && matches!(rule.host, HostRule::Any | HostRule::Block(..))
            })
    }
}

impl FromStr for DestinationPolicy {
    type Err = InvalidPolicy;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse_all([text])
    }
}

impl fmt::Display for DestinationPolicy {
    /// The rules, separated by spaces; reads back to the same policy, except for "everything", which only the
    /// program grants.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.everything {
            return f.write_str("(everything)");
        }
        for (index, rule) in self.rules.iter().enumerate() {
            if index > 0 {
                f.write_str(" ")?;
            }
            fmt::Display::fmt(rule, f)?;
        }
        Ok(())
    }
}

// === impl Rule ===

impl Rule {
    fn allows_port(&self, port: u16) -> bool {
        self.ports.is_empty() || self.ports.iter().any(|(first, last)| (*first..=*last).contains(&port))
    }
}

impl FromStr for Rule {
    type Err = InvalidPolicy;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (host, ports) = match text.strip_prefix('[') {
            // [2001:db8::]/32:443, and [2001:db8::/32]:443 for those who put the length inside.
            Some(rest) => {
                let (inside, after) =
                    rest.split_once(']').ok_or_else(|| InvalidPolicy::Host(shorten(text)))?;
                let (length, ports) = match after.split_once(':') {
                    Some((length, ports)) => (length, Some(ports)),
                    None => (after, None),
                };
                if !length.is_empty() && !length.starts_with('/') {
                    return Err(InvalidPolicy::Host(shorten(text)));
                }
                let block = format!("{inside}{length}");
                if !inside.contains(':') {
                    return Err(InvalidPolicy::Host(shorten(text)));
                }
                (block, ports)
            }
            None => match text.split_once(':') {
                Some((host, ports)) => (host.to_owned(), Some(ports)),
                None => (text.to_owned(), None),
            },
        };
        Ok(Self { host: host.parse()?, ports: ports.map_or_else(|| Ok(Vec::new()), parse_ports)? })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            HostRule::Any => f.write_str("*")?,
            HostRule::Name(name) => f.write_str(name)?,
            HostRule::Below(domain) => write!(f, "*{domain}")?,
            HostRule::Block(IpAddr::V4(addr), 32) => write!(f, "{addr}")?,
            HostRule::Block(IpAddr::V4(addr), length) => write!(f, "{addr}/{length}")?,
            HostRule::Block(IpAddr::V6(addr), 128) => write!(f, "[{addr}]")?,
            HostRule::Block(IpAddr::V6(addr), length) => write!(f, "[{addr}]/{length}")?,
        }
        for (index, (first, last)) in self.ports.iter().enumerate() {
            f.write_str(if index == 0 { ":" } else { "," })?;
            if first == last { write!(f, "{first}")? } else { write!(f, "{first}-{last}")? }
        }
        Ok(())
    }
}

// === impl HostRule ===

impl HostRule {
    fn allows_name(&self, host: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Name(name) => name == host,
            // `strip_suffix` and not empty: the domain itself is not below itself.
            Self::Below(domain) => host.strip_suffix(domain.as_str()).is_some_and(|rest| !rest.is_empty()),
            Self::Block(..) => false,
        }
    }

    fn allows_addr(&self, addr: IpAddr) -> bool {
        match self {
            Self::Any | Self::Block(_, 0) if is_special(addr) => false,
            Self::Any => true,
            Self::Name(_) | Self::Below(_) => false,
            Self::Block(block, length) => match (block, addr) {
                (IpAddr::V4(block), IpAddr::V4(addr)) => {
                    (block.to_bits() ^ addr.to_bits()).leading_zeros() >= u32::from(*length)
                }
                (IpAddr::V6(block), IpAddr::V6(addr)) => {
                    (block.to_bits() ^ addr.to_bits()).leading_zeros() >= u32::from(*length)
                }
                _ => false,
            },
        }
    }
}

impl FromStr for HostRule {
    type Err = InvalidPolicy;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidPolicy::Host(shorten(text));
        if text == "*" {
            return Ok(Self::Any);
        }
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        if let Ok(address) = address.parse::<IpAddr>() {
            let full: u8 = if address.is_ipv4() { 32 } else { 128 };
            let length = match length {
                None => full,
                Some(length) if length.bytes().all(|byte| byte.is_ascii_digit()) => {
                    length.parse().ok().filter(|length| *length <= full).ok_or_else(invalid)?
                }
                Some(_) => return Err(invalid()),
            };
            let beyond = match address {
                IpAddr::V4(address) => address.to_bits().checked_shl(length.into()).unwrap_or(0) != 0,
                IpAddr::V6(address) => address.to_bits().checked_shl(length.into()).unwrap_or(0) != 0,
            };
            if beyond {
                return Err(InvalidPolicy::HostBits(shorten(text)));
            }
            return Ok(Self::Block(address, length));
        }
        if length.is_some() {
            return Err(invalid());
        }
        let name = normal(text);
        let (below, labels) = match name.strip_prefix("*.") {
            Some(domain) => (true, domain),
            None => (false, name.as_str()),
        };
        let label = |label: &str| {
            !label.is_empty()
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        };
        // A last label of digits alone is an address that was mistyped (10.0.0.256), never a name.
        let numeric =
            labels.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit()));
        if labels.len() > MAX_HOST || numeric || !labels.split('.').all(label) {
            return Err(invalid());
        }
        Ok(if below { Self::Below(format!(".{labels}")) } else { Self::Name(labels.to_owned()) })
    }
}

// === helpers ===

/// Whether an address holds what its host trusts without asking: see the module's documentation.
pub fn is_special(addr: IpAddr) -> bool {
    match addr.to_canonical() {
        IpAddr::V4(addr) => {
            addr.is_loopback()
                || addr.is_link_local()
                || addr.is_multicast()
                || addr.is_broadcast()
                // 0.0.0.0/8, "this network": Linux connects 0.0.0.0 to loopback.
                || addr.octets()[0] == 0
                || METADATA_V4.contains(&addr)
        }
        IpAddr::V6(addr) => {
            addr.is_loopback()
                || addr.is_unspecified()
                || addr.is_multicast()
                || addr.is_unicast_link_local()
                || addr == METADATA_V6
        }
    }
}

fn parse_ports(text: &str) -> Result<Vec<(u16, u16)>, InvalidPolicy> {
    if text == "*" {
        return Ok(Vec::new());
    }
    let invalid = || InvalidPolicy::Ports(shorten(text));
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| text.parse::<u16>().ok()).flatten().filter(|port| *port > 0).ok_or_else(invalid)
    };
    let mut ports = Vec::new();
    for range in text.split(',') {
        let (first, last) = match range.split_once('-') {
            Some((first, last)) => (number(first)?, number(last)?),
            None => (number(range)?, number(range)?),
        };
        if first > last || ports.len() == MAX_PORT_RANGES {
            return Err(invalid());
        }
        ports.push((first, last));
    }
    Ok(ports)
}

/// Names compare without case and without the final dot of the root.
fn normal(host: &str) -> String {
    host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase()
}

fn shorten(text: &str) -> String {
    text.chars().take(MAX_HOST).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn policy(text: &str) -> DestinationPolicy {
        text.parse().unwrap()
    }

    fn addr(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn nothing_is_allowed_by_default() {
        let policy = DestinationPolicy::default();
        assert!(policy.is_empty());
        assert!(!policy.allows_name("a", 1));
        assert!(!policy.allows_addr(addr("10.0.0.1"), 1));
        assert!(!policy.allows_resolved("a", addr("10.0.0.1"), 1));
        assert!(!policy.may_allow("a", 1));
        assert_eq!(self::policy("  ; \n"), policy);
    }

    #[test]
    fn blocks() {
        let policy =
            policy("10.0.0.0/8:443 192.0.2.7:80-90,8080 [2001:db8::]/32:* [2001:db9::1]:80 0.0.0.0/0:7");
        for (allowed, ip, port) in [
            (true, "10.255.0.1", 443),
            (false, "10.255.0.1", 444),
            (false, "11.0.0.1", 443),
            (true, "192.0.2.7", 85),
            (true, "192.0.2.7", 8080),
            (false, "192.0.2.7", 91),
            (false, "192.0.2.8", 85),
            (true, "2001:db8:1::1", 9),
            (false, "2001:dba::1", 9),
            (true, "2001:db9::1", 80),
            (false, "2001:db9::2", 80),
            // An IPv4 address in IPv6's clothes is judged as what it is.
            (true, "::ffff:10.0.0.1", 443),
            (true, "8.8.8.8", 7),
            (false, "127.0.0.1", 7),
            (false, "169.254.169.254", 7),
        ] {
            assert_eq!(policy.allows_addr(addr(ip), port), allowed, "{ip}:{port}");
        }
        assert!(!policy.allows_name("a", 443));
        // A name that leads into the block may be dialled there, and only there.
        assert!(policy.may_allow("a", 443));
        assert!(policy.allows_resolved("a", addr("10.1.1.1"), 443));
        assert!(!policy.allows_resolved("a", addr("11.1.1.1"), 443));
    }

    #[test]
    fn names() {
        let policy = policy("db.internal:5432,5433; *.svc.cluster.local:80-90");
        for (allowed, host, port) in [
            (true, "db.internal", 5432),
            (true, "DB.Internal.", 5433),
            (false, "db.internal", 5434),
            (false, "x.db.internal", 5432),
            (true, "web.shop.svc.cluster.local", 80),
            (false, "svc.cluster.local", 80),
            (false, ".svc.cluster.local.evil", 80),
            (false, "evilsvc.cluster.local", 80),
        ] {
            assert_eq!(policy.allows_name(host, port), allowed, "{host}:{port}");
        }
        assert!(policy.allows_resolved("db.internal", addr("203.0.113.1"), 5432));
        assert!(!policy.allows_addr(addr("203.0.113.1"), 5432));
        assert!(!policy.may_allow("other", 5432));
    }

    #[test]
    fn special_addresses_are_reached_by_their_own_rules_only() {
        let special = [
            "127.0.0.1",
            "127.8.8.8",
            "0.0.0.0",
            "169.254.169.254",
            "100.100.100.200",
            "168.63.129.16",
            "224.0.0.1",
            "255.255.255.255",
            "::1",
            "::",
            "fe80::1",
            "ff02::1",
            "fd00:ec2::254",
            "::ffff:127.0.0.1",
        ];
        let all = policy("* *.internal db.internal:80");
        for ip in special {
            assert!(is_special(addr(ip)), "{ip}");
            assert!(!all.allows_addr(addr(ip), 80), "{ip}");
            // A name under somebody else's control is pointed at the metadata service.
            for host in ["db.internal", "x.internal", "other", "2130706433"] {
                assert!(!all.allows_resolved(host, addr(ip), 80), "{host} -> {ip}");
            }
        }
        assert!(all.allows_resolved("db.internal", addr("10.0.0.1"), 80));
        assert!(all.allows_addr(addr("10.0.0.1"), 1));
        assert!(!all.allows_resolved("localhost", addr("127.0.0.1"), 80), "* does not name it");

        let explicit = policy("127.0.0.1:9100 169.254.0.0/16:80 localhost:8080");
        assert!(explicit.allows_addr(addr("127.0.0.1"), 9100));
        assert!(!explicit.allows_addr(addr("127.0.0.2"), 9100));
        assert!(explicit.allows_addr(addr("169.254.169.254"), 80));
        assert!(explicit.allows_resolved("metadata", addr("169.254.169.254"), 80));
        for ip in ["127.0.0.1", "::1"] {
            assert!(explicit.allows_resolved("LocalHost", addr(ip), 8080));
            assert!(!explicit.allows_resolved("other", addr(ip), 8080));
        }

        let everything = DestinationPolicy::allow_everything();
        assert!(special.iter().all(|ip| everything.allows_addr(addr(ip), 80)));
        assert!(everything.allows_name("anything", 1) && !everything.is_empty());
    }

    #[test]
    fn what_is_printed_reads_back() {
        let text = "* *:443 10.0.0.0/8:443 [2001:db8::]/32 [2001:db9::1]:80 10.1.2.3:80-90,443 db.internal \
                    *.svc.cluster.local:80-90";
        let policy = policy(text);
        assert_eq!(policy.to_string().parse(), Ok(policy.clone()));
        assert_eq!(policy.to_string(), text);
        assert_eq!(self::policy("[2001:db8::/32]:443").to_string(), "[2001:db8::]/32:443");
    }

    #[test]
    fn slips_are_refused() {
        for bad in [
            "10.0.0.1/8",
            "10.0.0.0/33",
            "10.0.0.0/+8",
            "10.0.0.256:80",
            "10.0.0:80",
            "2001:db8::1:80",
            "[10.0.0.1]:80",
            "[2001:db8::1",
            "[2001:db8::1]x:80",
            "[2001:db8::1/64]:80",
            "db.internal:",
            "db.internal:0",
            "db.internal:65536",
            "db.internal:90-80",
            "db.internal:80,",
            "db.internal:http",
            "db.internal/8",
            "*internal:80",
            "a.*.internal:80",
            "-.-..",
            ":80",
            "a b:80,x",
            "ä:80",
        ] {
            assert!(bad.parse::<DestinationPolicy>().is_err(), "{bad:?}");
        }
        assert_eq!("a ".repeat(MAX_RULES + 1).parse::<DestinationPolicy>(), Err(InvalidPolicy::TooMany));
        let ports = vec!["1"; MAX_PORT_RANGES + 1].join(",");
        assert!(format!("a:{ports}").parse::<DestinationPolicy>().is_err());
    }

    proptest! {
        #[test]
        fn what_parses_prints_back(text in r"[*a-f0-9.:/\[\],; -]{0,40}|\PC{0,40}") {
            if let Ok(policy) = text.parse::<DestinationPolicy>() {
                prop_assert_eq!(policy.to_string().parse(), Ok(policy));
            }
        }

        #[test]
        fn nothing_special_is_reached_through_a_star(bits in any::<u128>(), v4 in any::<u32>(), port in 1u16..) {
            let all: DestinationPolicy = "*".parse().unwrap();
            for addr in [IpAddr::V6(Ipv6Addr::from(bits)), IpAddr::V4(Ipv4Addr::from(v4))] {
                prop_assert_eq!(all.allows_addr(addr, port), !is_special(addr));
                prop_assert_eq!(all.allows_resolved("host", addr, port), !is_special(addr));
            }
        }
    }
}
