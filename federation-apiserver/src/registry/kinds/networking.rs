//! Ingresses, ingress classes and network policies.

use std::net::IpAddr;

use serde_json::{Value, json};

use super::{immutable, list, some, texts};
use crate::admission::validation::label_selector;
use crate::schema::names;
use crate::status::{self, FieldError};
use crate::value::{at, i64_at, str_at};

const CLASS_ANNOTATION: &str = "kubernetes.io/ingress.class";
const MAX_CONTROLLER: usize = 250;
const BAD_IN_PATHS: [&str; 5] = ["//", "/./", "/../", "%2f", "%2F"];
const BAD_ENDS_OF_PATHS: [&str; 2] = ["/..", "/."];
const NO_IP: &str = "must be a DNS name, not an IP address";

pub(super) fn default_policy(policy: &mut Value) {
    let Some(spec) = policy.get_mut("spec").and_then(Value::as_object_mut) else { return };
    spec.entry("podSelector").or_insert_with(|| json!({}));
    let has = |key: &str| spec.get(key).and_then(Value::as_array).is_some_and(|l| !l.is_empty());
    let (types, egress) = (has("policyTypes"), has("egress"));
    for key in ["ingress", "egress"] {
        // Go leaves empty lists out.
        if spec.get(key).and_then(Value::as_array).is_some_and(Vec::is_empty) {
            spec.remove(key);
        }
    }
    if !types {
        spec.insert(
            "policyTypes".into(),
            json!(if egress { vec!["Ingress", "Egress"] } else { vec!["Ingress"] }),
        );
    }
}

// Ingresses

pub(super) fn validate_ingress(old: Option<&Value>, new: &Value, errors: &mut Vec<FieldError>) {
    let spec = new.get("spec").unwrap_or(&Value::Null);
    let rules = list(spec, &["rules"]);
    let default = some(spec, "defaultBackend");
    if rules.is_empty() && default.is_none() {
        let shown = spec.get("rules").unwrap_or(&Value::Null);
        let why = "either `defaultBackend` or `rules` must be specified";
        errors.push(FieldError::invalid("spec", shown, why));
    }
    if let Some(default) = default {
        backend(default, "spec.defaultBackend", errors);
    }
    // What was wrong before may stay so.
    let bad_wildcards = old.is_some_and(|old| {
        list(old, &["spec", "rules"]).iter().any(|r| {
            let mut faults = Vec::new();
            paths(r, "", &mut faults);
            str_at(r, &["host"]).contains('*') && !faults.is_empty()
        })
    });
    for (i, rule) in rules.iter().enumerate() {
        if status::is_enough(errors) {
            break;
        }
        let path = format!("spec.rules[{i}]");
        let name = str_at(rule, &["host"]);
        if !name.is_empty() {
            host(name, &format!("{path}.host"), true, errors);
        }
        if !(name.contains('*') && bad_wildcards) {
            paths(rule, &path, errors);
        }
    }
    let bad_secrets =
        old.is_some_and(|old| list(old, &["spec", "tls"]).iter().any(|tls| !secret_faults(tls).is_empty()));
    for (i, tls) in list(spec, &["tls"]).iter().enumerate() {
        if status::is_enough(errors) {
            break;
        }
        for (h, name) in list(tls, &["hosts"]).iter().enumerate() {
            if status::is_enough(errors) {
                break;
            }
            let path = format!("spec.tls[{i}].hosts[{h}]");
            host(name.as_str().unwrap_or_default(), &path, false, errors);
        }
        let secret = json!(str_at(tls, &["secretName"]));
        let path = format!("spec.tls[{i}].secretName");
        let faults = secret_faults(tls).into_iter().filter(|_| !bad_secrets);
        errors.extend(faults.map(|why| FieldError::invalid(path.clone(), &secret, why)));
    }
    let class = some(spec, "ingressClassName").and_then(Value::as_str);
    if let Some(class) = class {
        let faults = names::dns1123_subdomain(class).into_iter();
        errors.extend(faults.map(|why| FieldError::invalid("spec.ingressClassName", &json!(class), why)));
    }
    let annotation = at(new, &["metadata", "annotations", CLASS_ANNOTATION]);
    if let (None, Some(class), Some(annotation)) = (old, class, annotation)
        && annotation != class
    {
        let path = format!("annotations.{CLASS_ANNOTATION}");
        let why = "must match `ingressClassName` when both are specified";
        errors.push(FieldError::invalid(path, annotation, why));
    }
}

fn secret_faults(tls: &Value) -> Vec<String> {
    match str_at(tls, &["secretName"]) {
        "" => Vec::new(),
        name => names::dns1123_subdomain(name),
    }
}

fn host(name: &str, path: &str, of_rule: bool, errors: &mut Vec<FieldError>) {
    let shown = json!(name);
    if of_rule && parse_ip(name).is_some() {
        errors.push(FieldError::invalid(path, &shown, NO_IP));
    }
    let faults =
        if name.contains('*') { names::wildcard_subdomain(name) } else { names::dns1123_subdomain(name) };
    errors.extend(faults.into_iter().map(|why| FieldError::invalid(path, &shown, why)));
}

fn paths(rule: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let Some(http) = some(rule, "http") else { return };
    let path = format!("{path}.http.paths");
    let all = list(http, &["paths"]);
    if all.is_empty() {
        errors.push(FieldError::required(path.clone(), ""));
    }
    for (i, one) in all.iter().enumerate() {
        if status::is_enough(errors) {
            break;
        }
        http_path(one, &format!("{path}[{i}]"), errors);
    }
}

fn http_path(one: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let Some(kind) = some(one, "pathType") else {
        errors.push(FieldError::required(format!("{path}.pathType"), "pathType must be specified"));
        return;
    };
    let text = str_at(one, &["path"]);
    let refuse = |why: String| FieldError::invalid(format!("{path}.path"), &json!(text), why);
    let relative = || refuse("must be an absolute path".into());
    match kind.as_str().unwrap_or_default() {
        "Exact" | "Prefix" => {
            if !text.starts_with('/') {
                errors.push(relative());
            }
            for bad in BAD_IN_PATHS.iter().filter(|bad| text.contains(**bad)) {
                errors.push(refuse(format!("must not contain '{bad}'")));
            }
            for bad in BAD_ENDS_OF_PATHS.iter().filter(|bad| text.ends_with(**bad)) {
                errors.push(refuse(format!("cannot end with '{bad}'")));
            }
        }
        "ImplementationSpecific" => {
            if !text.is_empty() && !text.starts_with('/') {
                errors.push(relative());
            }
        }
        _ => {
            let allowed = texts(&["Exact", "ImplementationSpecific", "Prefix"]);
            errors.push(FieldError::not_supported(format!("{path}.pathType"), kind, &allowed));
        }
    }
    backend(one.get("backend").unwrap_or(&Value::Null), &format!("{path}.backend"), errors);
}

fn backend(backend: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let refuse = |why: &str| FieldError::invalid(path, &json!(""), why);
    match (some(backend, "resource"), some(backend, "service")) {
        (Some(_), Some(_)) => errors.push(refuse("cannot set both resource and service backends")),
        (Some(resource), None) => reference(resource, &format!("{path}.resource"), errors),
        (None, Some(service)) => {
            let name = str_at(service, &["name"]);
            let field = format!("{path}.service.name");
            if name.is_empty() {
                errors.push(FieldError::required(field.clone(), ""));
            } else {
                let faults = names::dns1123_label(name).into_iter();
                errors.extend(faults.map(|why| FieldError::invalid(field.clone(), &json!(name), why)));
            }
            let port = service.get("port").unwrap_or(&Value::Null);
            let (name, number) = (str_at(port, &["name"]), i64_at(port, &["number"]).unwrap_or(0));
            match (name.is_empty(), number) {
                (true, 0) => errors.push(FieldError::required(path, "port name or number is required")),
                (true, number) => {
                    let faults = names::port_number(number).into_iter();
                    let field = format!("{path}.service.port.number");
                    errors.extend(faults.map(|why| FieldError::invalid(field.clone(), &json!(number), why)));
                }
                (false, 0) => {
                    let field = format!("{path}.service.port.name");
                    let faults = names::port_name(name).into_iter();
                    errors.extend(faults.map(|why| FieldError::invalid(field.clone(), &json!(name), why)));
                }
                (false, _) => errors.push(refuse("cannot set both port name & port number")),
            }
        }
        (None, None) => errors.push(refuse("resource or service backend is required")),
    }
}

/// Group, kind and name of another object.
fn reference(object: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let mut check = |key: &str, faults: Vec<String>| {
        let shown = object.get(key).unwrap_or(&Value::Null);
        let faults = faults.into_iter();
        errors.extend(faults.map(|why| FieldError::invalid(format!("{path}.{key}"), shown, why)));
    };
    if let Some(group) = some(object, "apiGroup").and_then(Value::as_str) {
        check("apiGroup", names::dns1123_subdomain(group));
    }
    for key in ["kind", "name"] {
        match str_at(object, &[key]) {
            "" => errors.push(FieldError::required(format!("{path}.{key}"), "")),
            text => {
                let faults = names::path_segment(text).into_iter();
                let shown = json!(text);
                errors.extend(faults.map(|why| FieldError::invalid(format!("{path}.{key}"), &shown, why)));
            }
        }
    }
}

pub(super) fn ingress_warnings(old: Option<&Value>, new: &Value) -> Vec<String> {
    let annotated = at(new, &["metadata", "annotations", CLASS_ANNOTATION]).is_some();
    let classed = at(new, &["spec", "ingressClassName"]).is_some();
    let warn = old.is_none() && annotated && !classed;
    let text =
        format!("annotation {CLASS_ANNOTATION:?} is deprecated, please use 'spec.ingressClassName' instead");
    warn.then_some(text).into_iter().collect()
}

const ADDRESSES: &[&str] = &["status", "loadBalancer", "ingress"];

pub(super) fn validate_ingress_status(old: &Value, new: &Value, errors: &mut Vec<FieldError>) {
    let known: Vec<&str> = list(old, ADDRESSES).iter().map(|one| str_at(one, &["ip"])).collect();
    for (i, one) in list(new, ADDRESSES).iter().enumerate() {
        if status::is_enough(errors) {
            break;
        }
        let path = format!("status.loadBalancer.ingress[{i}]");
        let (ip, name) = (str_at(one, &["ip"]), str_at(one, &["hostname"]));
        if !ip.is_empty() && !known.contains(&ip) {
            let faults = ip_faults(ip).into_iter();
            errors.extend(faults.map(|why| FieldError::invalid(format!("{path}.ip"), &json!(ip), why)));
        }
        if !name.is_empty() {
            let mut faults = names::dns1123_subdomain(name);
            if parse_ip(name).is_some() {
                faults.push(NO_IP.into());
            }
            let shown = json!(name);
            let faults = faults.into_iter();
            errors.extend(faults.map(|why| FieldError::invalid(format!("{path}.hostname"), &shown, why)));
        }
    }
}

pub(super) fn ingress_status_warnings(new: &Value) -> Vec<String> {
    let mut all = Vec::new();
    for (i, one) in list(new, ADDRESSES).iter().enumerate() {
        let text = str_at(one, &["ip"]);
        if let Ok(IpAddr::V6(ip)) = text.parse::<IpAddr>()
            && ip.to_string() != text
        {
            all.push(format!(
                "status.loadBalancer.ingress[{i}]: IPv6 address {text:?} should be in RFC 5952 canonical format ({:?})",
                ip.to_string()
            ));
        }
    }
    all
}

// Ingress classes

pub(super) fn validate_class(old: Option<&Value>, new: &Value, errors: &mut Vec<FieldError>) {
    let none = Value::Null;
    let spec = new.get("spec").unwrap_or(&none);
    if let Some(old) = old {
        immutable(old.get("spec").unwrap_or(&none), spec, "controller", "spec", errors);
    }
    let controller = str_at(spec, &["controller"]);
    if controller.len() > MAX_CONTROLLER {
        let why = format!("may not be more than {MAX_CONTROLLER} bytes");
        errors.push(FieldError::too_long("spec.controller", why));
    }
    errors.extend(names::domain_prefixed_path("spec.controller", controller));
    let Some(parameters) = some(spec, "parameters") else { return };
    let path = "spec.parameters";
    reference(parameters, path, errors);
    let namespace = some(parameters, "namespace").and_then(Value::as_str);
    let field = format!("{path}.namespace");
    match str_at(parameters, &["scope"]) {
        "Namespace" => match namespace {
            None => errors.push(FieldError::required(field, "`parameters.scope` is set to 'Namespace'")),
            Some(name) => {
                let faults = names::dns1123_label(name).into_iter();
                errors.extend(faults.map(|why| FieldError::invalid(field.clone(), &json!(name), why)));
            }
        },
        "Cluster" => {
            if namespace.is_some() {
                errors.push(FieldError::forbidden(field, "`parameters.scope` is set to 'Cluster'"));
            }
        }
        scope => {
            let allowed = texts(&["Cluster", "Namespace"]);
            errors.push(FieldError::not_supported(format!("{path}.scope"), &json!(scope), &allowed));
        }
    }
}

// Network policies

/// Rules of both directions with their peers' field.
const DIRECTIONS: [(&str, &str); 2] = [("ingress", "from"), ("egress", "to")];

pub(super) fn validate_policy(old: Option<&Value>, new: &Value, errors: &mut Vec<FieldError>) {
    let spec = new.get("spec").unwrap_or(&Value::Null);
    // What was there may stay, whatever it is.
    let known: Vec<&str> =
        old.map(|old| blocks(old).flat_map(|(_, block)| cidrs(block)).collect()).unwrap_or_default();
    if let Some(selector) = some(spec, "podSelector") {
        label_selector(selector, "spec.podSelector", errors);
    }
    for (direction, peers) in DIRECTIONS {
        for (i, rule) in list(spec, &[direction]).iter().enumerate() {
            if status::is_enough(errors) {
                break;
            }
            let path = format!("spec.{direction}[{i}]");
            for (p, one) in list(rule, &["ports"]).iter().enumerate() {
                if status::is_enough(errors) {
                    break;
                }
                port(one, &format!("{path}.ports[{p}]"), errors);
            }
            for (p, one) in list(rule, &[peers]).iter().enumerate() {
                if status::is_enough(errors) {
                    break;
                }
                peer(one, &format!("{path}.{peers}[{p}]"), &known, errors);
            }
        }
    }
    let types = list(spec, &["policyTypes"]);
    if types.len() > 2 {
        let why = "may not specify more than two policyTypes";
        errors.push(FieldError::invalid("spec.policyTypes", &json!(types), why));
        return;
    }
    for (i, kind) in types.iter().enumerate().filter(|(_, kind)| **kind != "Ingress" && **kind != "Egress") {
        let allowed = texts(&["Ingress", "Egress"]);
        errors.push(FieldError::not_supported(format!("spec.policyTypes[{i}]"), kind, &allowed));
    }
}

/// All address blocks of a policy with their paths.
fn blocks(policy: &Value) -> impl Iterator<Item = (String, &Value)> {
    DIRECTIONS.into_iter().flat_map(move |(direction, peers)| {
        list(policy, &["spec", direction]).iter().enumerate().flat_map(move |(i, rule)| {
            list(rule, &[peers]).iter().enumerate().filter_map(move |(p, peer)| {
                let path = format!("spec.{direction}[{i}].{peers}[{p}].ipBlock");
                Some((path, some(peer, "ipBlock")?))
            })
        })
    })
}

fn cidrs(block: &Value) -> impl Iterator<Item = &str> {
    let except = list(block, &["except"]).iter().filter_map(Value::as_str);
    std::iter::once(str_at(block, &["cidr"])).chain(except)
}

fn port(port: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let protocol = str_at(port, &["protocol"]);
    let allowed = ["TCP", "UDP", "SCTP"];
    if some(port, "protocol").is_some() && !allowed.contains(&protocol) {
        let path = format!("{path}.protocol");
        errors.push(FieldError::not_supported(path, &json!(protocol), &texts(&allowed)));
    }
    let (field, end_field) = (format!("{path}.port"), format!("{path}.endPort"));
    let end = i64_at(port, &["endPort"]);
    let refuse = |field: &str, value: &Value, why: &str| FieldError::invalid(field, value, why);
    match (some(port, "port"), end) {
        (None, Some(end)) => {
            let why = "may not be specified when `port` is not specified";
            errors.push(refuse(&end_field, &json!(end), why));
        }
        (None, None) => {}
        (Some(Value::String(name)), end) => {
            if let Some(end) = end {
                let why = "may not be specified when `port` is non-numeric";
                errors.push(refuse(&end_field, &json!(end), why));
            }
            let faults = names::port_name(name).into_iter();
            errors.extend(faults.map(|why| refuse(&field, &json!(name), &why)));
        }
        (Some(value), end) => {
            let number = value.as_i64().unwrap_or(0);
            let faults = names::port_number(number).into_iter();
            errors.extend(faults.map(|why| refuse(&field, value, &why)));
            let Some(end) = end else { return };
            if end < number {
                // kube-apiserver shows the other port here.
                errors.push(refuse(&end_field, value, "must be greater than or equal to `port`"));
            }
            let faults = names::port_number(end).into_iter();
            errors.extend(faults.map(|why| refuse(&end_field, &json!(end), &why)));
        }
    }
}

fn peer(peer: &Value, path: &str, known: &[&str], errors: &mut Vec<FieldError>) {
    let mut count = 0;
    for key in ["podSelector", "namespaceSelector"] {
        if let Some(selector) = some(peer, key) {
            count += 1;
            label_selector(selector, &format!("{path}.{key}"), errors);
        }
    }
    let block = some(peer, "ipBlock");
    if let Some(block) = block {
        ip_block(block, &format!("{path}.ipBlock"), known, errors);
    }
    match (count, block) {
        (0, None) => errors.push(FieldError::required(path, "must specify a peer")),
        (1.., Some(_)) => {
            errors.push(FieldError::forbidden(path, "may not specify both ipBlock and another peer"));
        }
        _ => {}
    }
}

fn ip_block(block: &Value, path: &str, known: &[&str], errors: &mut Vec<FieldError>) {
    let text = str_at(block, &["cidr"]);
    if text.is_empty() {
        errors.push(FieldError::required(format!("{path}.cidr"), ""));
        return;
    }
    let check = |field: String, text: &str, errors: &mut Vec<FieldError>| {
        if let Some(why) = cidr_fault(text).filter(|_| !known.contains(&text)) {
            errors.push(FieldError::invalid(field, &json!(text), why));
        }
    };
    check(format!("{path}.cidr"), text, errors);
    let Some(whole) = parse_cidr(text) else { return };
    for (i, except) in list(block, &["except"]).iter().enumerate() {
        if status::is_enough(errors) {
            break;
        }
        let field = format!("{path}.except[{i}]");
        let text = except.as_str().unwrap_or_default();
        check(field.clone(), text, errors);
        let Some(part) = parse_cidr(text) else { continue };
        if !contains(whole, part.0) || whole.1 >= part.1 {
            errors.push(FieldError::invalid(field, except, "must be a strict subset of `cidr`"));
        }
    }
}

pub(super) fn policy_warnings(new: &Value) -> Vec<String> {
    let mut all = Vec::new();
    for (path, block) in blocks(new) {
        for (i, text) in cidrs(block).enumerate() {
            let path = if i == 0 { format!("{path}.cidr") } else { format!("{path}.except[{}]", i - 1) };
            if let Some((IpAddr::V6(ip), length)) = parse_cidr(text)
                && cidr_fault(text).is_none()
                && format!("{ip}/{length}") != text
            {
                let right = format!("{ip}/{length}");
                all.push(format!(
                    "{path}: IPv6 CIDR value {text:?} should be in RFC 5952 canonical format ({right:?})"
                ));
            }
        }
    }
    all
}

// Addresses, read as loosely as kube-apiserver reads them

/// An address whose parts may have leading zeros.
fn parse_ip(text: &str) -> Option<IpAddr> {
    if let Ok(ip) = text.parse() {
        return Some(ip);
    }
    let part = |part: &str| -> Option<String> {
        if part.is_empty() || !part.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let short = part.trim_start_matches('0');
        Some(if short.is_empty() { "0".to_owned() } else { short.to_owned() })
    };
    let parts: Vec<String> = text.split('.').map(part).collect::<Option<_>>()?;
    parts.join(".").parse::<std::net::Ipv4Addr>().ok().map(IpAddr::V4)
}

fn parse_cidr(text: &str) -> Option<(IpAddr, u8)> {
    let (ip, length) = text.split_once('/')?;
    let ip = parse_ip(ip)?;
    if length.is_empty() || !length.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let length: u8 = length.parse().ok()?;
    let most = if ip.is_ipv4() { 32 } else { 128 };
    (length <= most).then_some((ip, length))
}

fn bits(ip: IpAddr) -> (u128, u8) {
    match ip {
        IpAddr::V4(ip) => (u128::from(u32::from(ip)) << 96, 32),
        IpAddr::V6(ip) => (u128::from(ip), 128),
    }
}

fn masked(ip: IpAddr, length: u8) -> u128 {
    let mask = if length == 0 { 0 } else { u128::MAX << (128 - u32::from(length)) };
    bits(ip).0 & mask
}

fn contains((network, length): (IpAddr, u8), ip: IpAddr) -> bool {
    network.is_ipv4() == ip.is_ipv4() && masked(network, length) == masked(ip, length)
}

fn is_mapped(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some())
}

fn ip_faults(text: &str) -> Vec<String> {
    let Some(ip) = parse_ip(text) else {
        return vec!["must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)".into()];
    };
    let mut faults = Vec::new();
    if text.parse::<IpAddr>().is_err() {
        faults.push("must not have leading 0s".to_owned());
    }
    if is_mapped(ip) {
        faults.push("must not be an IPv4-mapped IPv6 address".to_owned());
    }
    faults
}

fn cidr_fault(text: &str) -> Option<&'static str> {
    let Some((ip, length)) = parse_cidr(text) else {
        return Some("must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)");
    };
    let (own, own_length) = text.split_once('/')?;
    if own.parse::<IpAddr>().is_err() || own_length != length.to_string() {
        return Some("must not have leading 0s in IP or prefix length");
    }
    if is_mapped(ip) {
        return Some("must not have an IPv4-mapped IPv6 address");
    }
    (masked(ip, length) != bits(ip).0).then_some("must not have bits set beyond the prefix length")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn blocks_of_addresses() {
        for good in ["10.0.0.0/8", "0.0.0.0/0", "2001:db8::/32", "::/0", "10.1.2.3/32"] {
            assert_eq!(cidr_fault(good), None, "{good}");
        }
        for (bad, why) in [
            ("10.0.0.1/8", "bits set"),
            ("010.0.0.0/8", "leading 0s"),
            ("10.0.0.0/08", "leading 0s"),
            ("::ffff:1.2.3.0/120", "mapped"),
            ("10.0.0.0/33", "valid CIDR"),
            ("x", "valid CIDR"),
        ] {
            let fault = cidr_fault(bad).expect(bad);
            assert!(fault.contains(why), "{bad}: {fault}");
        }
        let block = |text| parse_cidr(text).expect(text);
        assert!(contains(block("10.0.0.0/8"), "10.9.9.9".parse().expect("an address")));
        assert!(!contains(block("10.0.0.0/8"), "11.0.0.0".parse().expect("an address")));
        assert!(contains(block("::/0"), "::1".parse().expect("an address")));
        assert!(!contains(block("0.0.0.0/0"), "::1".parse().expect("an address")));
    }

    proptest! {
        #[test]
        fn reading_never_panics(text in "[0-9a-f.:/]{0,24}") {
            cidr_fault(&text);
            ip_faults(&text);
        }
    }
}
