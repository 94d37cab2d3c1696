//! Which crate may depend on which, checked against what cargo says.
//!
//! The table is the picture in ARCHITECTURE.md in another form: an edge that is not here is an error, so a boundary is
//! moved on purpose or not at all.

use anyhow::{Context as _, Result};
use serde_json::Value;

/// What each of our crates may name among our own, outside its tests.
const ALLOWED: &[(&str, &[&str])] = &[
    ("proto", &[]),
    ("tls", &[]),
    ("service", &[]),
    ("tunnel", &["proto", "tls"]),
    ("federation-core", &[]),
    ("federation-controller", &["federation-core"]),
    ("federation-store", &["proto", "tls", "service"]),
    ("federation-apiserver", &["federation-store", "proto", "tls", "service"]),
    ("proxy-agent", &["tunnel", "tls", "service"]),
    (
        "proxy-server",
        &["tunnel", "tls", "service", "federation-core", "federation-controller", "federation-apiserver"],
    ),
    (
        "cli",
        &[
            "proxy-server",
            "proxy-agent",
            "federation-apiserver",
            "federation-store",
            "federation-core",
            "tunnel",
            "tls",
            "service",
        ],
    ),
    ("test-support", &[]),
    ("integration-tests", &[]),
    ("e2e-tests", &["test-support", "tunnel", "tls"]),
    ("bench", &["tunnel", "tls", "service", "test-support"]),
    ("xtask", &[]),
];

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

/// Every edge that the tables do not allow, one line each.
pub(crate) fn violations(metadata: &Value) -> Result<Vec<String>> {
    let packages = metadata["packages"].as_array().context("cargo metadata has no packages")?;
    let ours: Vec<&str> = packages.iter().filter_map(|package| package["name"].as_str()).collect();
    let mut found = Vec::new();
    for package in packages {
        let name = package["name"].as_str().context("a package without a name")?;
        let Some((_, allowed)) = ALLOWED.iter().find(|(of, _)| *of == name) else {
            found.push(format!(
                "{name}: not in the table of xtask/src/arrows.rs; add it and ARCHITECTURE.md's picture"
            ));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let to = dependency["name"].as_str().unwrap_or_default();
            let for_tests = dependency["kind"].as_str() == Some("dev");
            if ours.contains(&to) {
                let refused = if for_tests { NEVER.contains(&(name, to)) } else { !allowed.contains(&to) };
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
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::violations;

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
        assert_eq!(violations(&metadata).unwrap(), Vec::<String>::new());
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
            violations(&metadata).unwrap(),
            [
                "proto may not depend on tls",
                "proxy-agent may not depend on proxy-server",
                "proxy-agent may not name quinn: only tunnel may",
                "federation-core is pure: it may not name tokio",
                "newcomer: not in the table of xtask/src/arrows.rs; add it and ARCHITECTURE.md's picture",
            ]
        );
    }
}
