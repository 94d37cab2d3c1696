//! Which crate may depend on which, checked against what cargo says.
//!
//! The table is the picture in ARCHITECTURE.md, read from there: an edge that is not in it is an error, and so is one in it that
//! nobody has, so a boundary is moved on purpose or not at all.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result};
use serde_json::Value;

/// Pairs that may not meet even in a package's tests.
const NEVER: &[(&str, &str)] = &[("proxy-server", "proxy-agent"), ("proxy-agent", "proxy-server")];

/// Crates of others that only these of ours may name. What a dependency pulls in itself does not count.
const RESERVED: &[(&str, &[&str])] = &[
    ("rustls", &["tls", "tunnel"]),
    ("tokio-rustls", &["tls", "tunnel"]),
    ("rcgen", &["tls"]),
    ("x509-parser", &["tls"]),
    ("quinn", &["tunnel"]),
    ("h2", &["tunnel"]),
    ("loona-hpack", &["tunnel"]),
    ("sqlx", &["federation-store"]),
];

/// What a pure crate may not name: it has no clock, no socket and no client.
const PURE: &[(&str, &[&str])] = &[
    ("federation-core", &["tokio", "hyper", "hyper-util", "tower", "axum", "kube-runtime", "kube-client"]),
    ("proto", &["tokio", "hyper", "tower", "tracing"]),
];

/// Features that a pure crate may not ask of a dependency which is pure without them.
const PURE_WITHOUT: &[(&str, &str, &[&str])] = &[(
    "federation-core",
    "kube",
    &["default", "client", "config", "runtime", "ws", "rustls-tls", "openssl-tls"],
)];

/// What each of our crates may name among our own, outside its tests.
type Allowed = BTreeMap<String, BTreeSet<String>>;

/// Reads the picture: lines `crate, crate ─► crate, crate`, or `─► nothing`, between "```arrows" and "```".
fn picture(architecture: &str) -> Result<Allowed> {
    let (_, after) = architecture.split_once("```arrows\n").context("ARCHITECTURE.md has no ```arrows")?;
    let (lines, _) = after.split_once("```").context("```arrows of ARCHITECTURE.md has no end")?;
    let names = |text: &str| -> Vec<String> { text.split(',').map(|name| name.trim().to_owned()).collect() };
    let mut allowed = Allowed::new();
    for line in lines.lines() {
        let (from, to) =
            line.split_once("─►").with_context(|| format!("{line:?} in ARCHITECTURE.md has no arrow"))?;
        for from in names(from) {
            let to = names(to).into_iter().filter(|to| to != "nothing").collect();
            anyhow::ensure!(
                allowed.insert(from.clone(), to).is_none(),
                "{from} is twice in ARCHITECTURE.md's picture"
            );
        }
    }
    Ok(allowed)
}

/// Every edge that the picture of `architecture` and the tables do not allow, one line each.
pub(crate) fn violations(metadata: &Value, architecture: &str) -> Result<Vec<String>> {
    let allowed = picture(architecture)?;
    let packages = metadata["packages"].as_array().context("cargo metadata has no packages")?;
    let ours: Vec<&str> = packages.iter().filter_map(|package| package["name"].as_str()).collect();
    let mut found = Vec::new();
    for package in packages {
        let name = package["name"].as_str().context("a package without a name")?;
        let Some(allowed) = allowed.get(name) else {
            found.push(format!("{name}: not in ARCHITECTURE.md's picture; add it there"));
            continue;
        };
        let mut unused = allowed.clone();
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let to = dependency["name"].as_str().unwrap_or_default();
            let for_tests = dependency["kind"].as_str() == Some("dev");
            if ours.contains(&to) {
                let refused = if for_tests { NEVER.contains(&(name, to)) } else { !allowed.contains(to) };
                unused.retain(|other| for_tests || other != to);
                if refused {
                    found.push(format!("{name} may not depend on {to}"));
                }
            }
            if let Some((_, holders)) = RESERVED.iter().find(|(reserved, _)| *reserved == to)
                && !holders.contains(&name)
                && !for_tests
            {
                found.push(format!("{name} may not name {to}: only {} may", holders.join(", ")));
            }
            if let Some((_, banned)) = PURE.iter().find(|(pure, _)| *pure == name)
                && banned.contains(&to)
                && !for_tests
            {
                found.push(format!("{name} is pure: it may not name {to}"));
            }
            let without = PURE_WITHOUT.iter().find(|(pure, of, _)| *pure == name && *of == to);
            if let Some((_, _, without)) = without
                && !for_tests
            {
                let asked = dependency["features"].as_array().into_iter().flatten().filter_map(Value::as_str);
                let default =
                    dependency["uses_default_features"].as_bool().unwrap_or(true).then_some("default");
                for feature in asked.chain(default).filter(|feature| without.contains(feature)) {
                    found.push(format!("{name} is pure: it may not ask {to} for its feature {feature:?}"));
                }
            }
        }
        found.extend(
            unused.iter().map(|to| format!("{name} does not depend on {to}, and the picture says so")),
        );
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::violations;

    const PICTURE: &str = "```arrows\ntunnel ─► proto, tls\nproxy-agent ─► tls\n\
                           proto, tls, proxy-server, federation-core ─► nothing\n```\n";

    fn package(name: &str, dependencies: &[(&str, Option<&str>)]) -> serde_json::Value {
        let dependencies: Vec<_> =
            dependencies.iter().map(|(name, kind)| json!({"name": name, "kind": kind})).collect();
        json!({"name": name, "dependencies": dependencies})
    }

    #[test]
    fn allows_what_the_picture_shows() {
        let metadata = json!({"packages": [
            package("tunnel", &[("proto", None), ("tls", None), ("rustls", None), ("tokio", None)]),
            package("proto", &[("prost", None)]),
            package("tls", &[("rustls", None)]),
        ]});
        assert_eq!(violations(&metadata, PICTURE).unwrap(), Vec::<String>::new());
        assert!(violations(&metadata, "no picture").is_err());
    }

    #[test]
    fn names_each_edge_that_is_not_allowed() {
        let metadata = json!({"packages": [
            package("proto", &[("tls", None)]),
            package("tls", &[]),
            package("proxy-agent", &[("proxy-server", Some("dev")), ("quinn", None)]),
            package("proxy-server", &[]),
            package("federation-core", &[("tokio", None), ("tokio", Some("dev"))]),
            package("newcomer", &[]),
        ]});
        assert_eq!(
            violations(&metadata, PICTURE).unwrap(),
            [
                "proto may not depend on tls",
                "proxy-agent may not depend on proxy-server",
                "proxy-agent may not name quinn: only tunnel may",
                "proxy-agent does not depend on tls, and the picture says so",
                "federation-core is pure: it may not name tokio",
                "newcomer: not in ARCHITECTURE.md's picture; add it there",
            ]
        );
    }

    #[test]
    fn features_make_a_pure_crate_impure() {
        let kube = |features: &[&str], default: bool| {
            let kube =
                json!({"name": "kube", "kind": null, "features": features, "uses_default_features": default});
            json!({"packages": [{"name": "federation-core", "dependencies": [kube]}]})
        };
        let found = |metadata| violations(&metadata, PICTURE).unwrap();
        assert_eq!(found(kube(&["derive"], false)), Vec::<String>::new());
        assert_eq!(found(kube(&["client"], true)).len(), 2);
    }
}
