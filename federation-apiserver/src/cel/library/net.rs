//! IP addresses and networks.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::super::value::Value;
use super::{Answer, Fault, Implementation, fail};

pub(super) fn implementation(name: &str) -> Option<Implementation> {
    Some(match name {
        "ip" => |a| match a {
            [Value::Cidr(ip, _)] => Ok(Value::Ip(*ip)),
            [Value::Str(s)] => parse_ip(s).map(Value::Ip).map_err(Fault::Text),
            _ => Err(Fault::NoOverload),
        },
        "isIP" => |a| match a {
            [Value::Str(s)] => Ok(Value::Bool(parse_ip(s).is_ok())),
            _ => Err(Fault::NoOverload),
        },
        "ip.isCanonical" => |a| match a {
            [Value::Str(s)] => match parse_ip(s) {
                Ok(ip) => Ok(Value::Bool(ip.to_string() == **s)),
                Err(why) => fail(why),
            },
            _ => Err(Fault::NoOverload),
        },
        "family" => |a| one(a, |ip| Value::Int(if ip.is_ipv4() { 4 } else { 6 })),
        "isUnspecified" => |a| one(a, |ip| Value::Bool(ip.is_unspecified())),
        "isLoopback" => |a| one(a, |ip| Value::Bool(ip.is_loopback())),
        "isLinkLocalMulticast" => |a| {
            one(a, |ip| {
                Value::Bool(match ip {
                    IpAddr::V4(ip) => ip.octets()[..3] == [224, 0, 0],
                    IpAddr::V6(ip) => ip.octets()[0] == 0xff && ip.octets()[1] & 0x0f == 0x02,
                })
            })
        },
        "isLinkLocalUnicast" => |a| one(a, |ip| Value::Bool(is_link_local(ip))),
        "isGlobalUnicast" => |a| {
            one(a, |ip| {
                let broadcast = matches!(ip, IpAddr::V4(v4) if v4 == Ipv4Addr::BROADCAST);
                let other = ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || is_link_local(ip);
                Value::Bool(!broadcast && !other)
            })
        },
        "cidr" => |a| match a {
            [Value::Str(s)] => match parse_cidr(s) {
                Ok((ip, length)) => Ok(Value::Cidr(ip, length)),
                Err(why) => fail(format!("network address parse error during conversion from string: {why}")),
            },
            _ => Err(Fault::NoOverload),
        },
        "isCIDR" => |a| match a {
            [Value::Str(s)] => Ok(Value::Bool(parse_cidr(s).is_ok())),
            _ => Err(Fault::NoOverload),
        },
        "containsIP" => |a| {
            let (net, length, ip) = match a {
                [Value::Cidr(net, length), Value::Ip(ip)] => (net, length, *ip),
                [Value::Cidr(net, length), Value::Str(s)] => (net, length, parse_ip(s).map_err(Fault::Text)?),
                _ => return Err(Fault::NoOverload),
            };
            Ok(Value::Bool(same_network(*net, ip, *length)))
        },
        "containsCIDR" => |a| {
            let (net, length, (other, other_length)) = match a {
                [Value::Cidr(net, length), Value::Cidr(o, l)] => (net, length, (*o, *l)),
                [Value::Cidr(net, length), Value::Str(s)] => {
                    let other = parse_cidr(s).map_err(|why| {
                        Fault::Text(format!(
                            "network address parse error during conversion from string: {why}"
                        ))
                    })?;
                    (net, length, other)
                }
                _ => return Err(Fault::NoOverload),
            };
            Ok(Value::Bool(*length <= other_length && same_network(*net, other, *length)))
        },
        "prefixLength" => |a| match a {
            [Value::Cidr(_, length)] => Ok(Value::Int(i64::from(*length))),
            _ => Err(Fault::NoOverload),
        },
        "masked" => |a| match a {
            [Value::Cidr(ip, length)] => Ok(Value::Cidr(masked(*ip, *length), *length)),
            _ => Err(Fault::NoOverload),
        },
        _ => return None,
    })
}

fn one<'a>(a: &[Value<'a>], f: fn(IpAddr) -> Value<'a>) -> Answer<'a> {
    match a {
        [Value::Ip(ip)] => Ok(f(*ip)),
        _ => Err(Fault::NoOverload),
    }
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// An address without a zone; IPv4 addresses in IPv6 clothes are refused, as in Kubernetes.
fn parse_ip(text: &str) -> Result<IpAddr, String> {
    if text.contains('%') && text.contains(':') {
        return Err(format!("IP address {text:?} with zone value is not allowed"));
    }
    let ip: IpAddr = text.parse().map_err(|_| {
        format!("IP Address {text:?} parse error during conversion from string: ParseAddr({text:?}): unable to parse IP")
    })?;
    match ip {
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => {
            Err(format!("IPv4-mapped IPv6 address {text:?} is not allowed"))
        }
        ip => Ok(ip),
    }
}

fn parse_cidr(text: &str) -> Result<(IpAddr, u8), String> {
    let bad = |why: &str| {
        format!(
            "network address parse error during conversion from string: netip.ParsePrefix({text:?}): {why}"
        )
    };
    let (ip, length) = text.rsplit_once('/').ok_or_else(|| bad("no '/'"))?;
    if ip.contains('%') {
        return Err(bad("IPv6 zones cannot be present in a prefix"));
    }
    let ip: IpAddr = ip.parse().map_err(|_| bad(&format!("ParseAddr({ip:?}): unable to parse IP")))?;
    let well_formed = !length.is_empty()
        && length.bytes().all(|b| b.is_ascii_digit())
        && (length.len() == 1 || !length.starts_with('0'));
    let length: u8 = length
        .parse()
        .ok()
        .filter(|_| well_formed)
        .ok_or_else(|| bad(&format!("bad bits after slash: {length:?}")))?;
    if length > if ip.is_ipv4() { 32 } else { 128 } {
        return Err(bad("prefix length out of range"));
    }
    match ip {
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => {
            Err(format!("IPv4-mapped IPv6 address {text:?} is not allowed"))
        }
        ip => Ok((ip, length)),
    }
}

fn masked(ip: IpAddr, length: u8) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
            IpAddr::V4(Ipv4Addr::from(u32::from(ip) & mask))
        }
        IpAddr::V6(ip) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
            IpAddr::V6(Ipv6Addr::from(u128::from(ip) & mask))
        }
    }
}

fn same_network(net: IpAddr, ip: IpAddr, length: u8) -> bool {
    net.is_ipv4() == ip.is_ipv4() && masked(net, length) == masked(ip, length)
}
