//! Discovery: which groups, versions and resources there are; in the legacy and in the aggregated form.

use axum::body::Body;
use http::{Response, StatusCode};
use serde_json::{Value, json};

use crate::config::Role;
use crate::http::negotiate::{Accept, Encoding, Shape};
use crate::http::response;
use crate::registry::resource::{Catalog, Resource, api_version};
use crate::registry::reviews;

const AGGREGATED_V2: &str = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
const AGGREGATED_V2BETA1: &str = "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList";

/// The Kubernetes version whose API is followed.
const MINOR: &str = "37";

/// `/version`. A simulation says that it is one: the hub shows its members' versions.
pub(crate) fn version(role: Role) -> Value {
    let platform = format!("{}/{}", std::env::consts::OS, std::env::consts::ARCH);
    let simulation = match role {
        Role::Hub => "",
        Role::Member => "-simulation",
    };
    json!({"major": "1", "minor": MINOR, "gitVersion": format!("{}{simulation}", git_version()),
        "gitCommit": "", "gitTreeState": "", "buildDate": "", "goVersion": "", "compiler": "rustc", "platform": platform})
}

/// The version of Kubernetes with that of the program.
pub(crate) fn git_version() -> String {
    format!("v1.{MINOR}.0-cellway.{}", env!("CARGO_PKG_VERSION"))
}

/// Paths that `/` lists.
pub(crate) fn paths(catalog: &Catalog) -> Vec<String> {
    let mut list = vec!["/api".to_owned(), "/api/v1".into(), "/apis".into(), "/apis/".into()];
    for (group, versions) in catalog.groups() {
        list.push(format!("/apis/{group}"));
        list.extend(versions.iter().map(|v| format!("/apis/{group}/{v}")));
    }
    list.extend(
        [
            "/.well-known/openid-configuration",
            "/healthz",
            "/livez",
            "/openapi/v2",
            "/openapi/v3",
            "/openid/v1/jwks",
            "/readyz",
            "/version",
        ]
        .map(str::to_owned),
    );
    list
}

/// Answers a discovery path, `None` when it is none.
pub(crate) fn answer(catalog: &Catalog, path: &str, accept: Accept) -> Option<Response<Body>> {
    let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    let aggregated = matches!(accept.shape, Shape::AggregatedV2 | Shape::AggregatedV2Beta1);
    let value = match parts.as_slice() {
        ["api"] if aggregated => return Some(aggregate(catalog, true, accept)),
        ["apis"] if aggregated => return Some(aggregate(catalog, false, accept)),
        ["api"] => json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}),
        ["apis"] => {
            let groups: Vec<Value> = catalog.groups().iter().map(|(g, v)| group(g, v)).collect();
            json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
        }
        ["api", version] => resource_list(catalog, "", version)?,
        ["apis", name] => {
            let (_, versions) = catalog.groups().into_iter().find(|(g, _)| g == name)?;
            let mut value = group(name, &versions);
            value["kind"] = json!("APIGroup");
            value["apiVersion"] = json!("v1");
            value
        }
        ["apis", group, version] => resource_list(catalog, group, version)?,
        _ => return None,
    };
    Some(response::value(StatusCode::OK, &value, accept.encoding))
}

fn group(name: &str, versions: &[String]) -> Value {
    let list: Vec<Value> =
        versions.iter().map(|v| json!({"groupVersion": format!("{name}/{v}"), "version": v})).collect();
    json!({"name": name, "preferredVersion": list.first(), "versions": list})
}

/// Verbs of a resource or (not empty) subresource, in kube-apiserver's order.
fn verbs(resource: &Resource, subresource: &str) -> &'static [&'static str] {
    match subresource {
        "" if resource.is_custom() => {
            &["delete", "deletecollection", "get", "list", "patch", "create", "update", "watch"]
        }
        "" if resource.plural == "namespaces" && resource.group.is_empty() => {
            &["create", "delete", "get", "list", "patch", "update", "watch"]
        }
        "" => &["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"],
        "log" => &["get"],
        "binding" | "token" => &["create"],
        "finalize" => &["update"],
        _ => &["get", "patch", "update"],
    }
}

/// Subresources with the kind that they speak: name, group, version, kind.
fn subresources(resource: &Resource) -> Vec<(&'static str, String, String, String)> {
    let own = |name| (name, resource.group.clone(), resource.version.clone(), resource.kind.clone());
    let mut list = Vec::new();
    if resource.pod {
        list.push(("binding", String::new(), "v1".into(), "Binding".into()));
        list.push(own("log"));
    }
    if resource.plural == "namespaces" && resource.group.is_empty() {
        list.push(own("finalize"));
    }
    if resource.plural == "serviceaccounts" && resource.group.is_empty() {
        list.push(("token", "authentication.k8s.io".into(), "v1".into(), "TokenRequest".into()));
    }
    if resource.scale.is_some() {
        list.push(("scale", "autoscaling".into(), "v1".into(), "Scale".into()));
    }
    if resource.status {
        list.push(own("status"));
    }
    list
}

fn resource_list(catalog: &Catalog, group: &str, version: &str) -> Option<Value> {
    if !catalog.serves(group, version) {
        return None;
    }
    let mut resources = Vec::new();
    for resource in catalog.iter().filter(|r| r.group == group && r.version == version) {
        let mut entry = json!({"name": resource.plural, "singularName": resource.singular,
            "namespaced": resource.namespaced, "kind": resource.kind, "verbs": verbs(resource, "")});
        if !resource.short_names.is_empty() {
            entry["shortNames"] = json!(resource.short_names);
        }
        if !resource.categories.is_empty() {
            entry["categories"] = json!(resource.categories);
        }
        resources.push(entry);
        for (name, sub_group, sub_version, kind) in subresources(resource) {
            let mut entry = json!({"name": format!("{}/{name}", resource.plural), "singularName": "",
                "namespaced": resource.namespaced, "kind": kind, "verbs": verbs(resource, name)});
            if sub_group != resource.group || sub_version != resource.version {
                entry["group"] = json!(sub_group);
                entry["version"] = json!(sub_version);
            }
            resources.push(entry);
        }
    }
    for r in reviews::RESOURCES.iter().filter(|r| r.group == group && r.version == version) {
        resources.push(
            json!({"name": r.plural, "singularName": r.kind.to_lowercase(), "namespaced": r.namespaced,
            "kind": r.kind, "verbs": ["create"]}),
        );
    }
    Some(json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api_version(group, version),
        "resources": resources}))
}

fn aggregate(catalog: &Catalog, core: bool, accept: Accept) -> Response<Body> {
    let groups = if core { vec![(String::new(), vec!["v1".to_owned()])] } else { catalog.groups() };
    let items: Vec<Value> = groups
        .iter()
        .map(|(group, versions)| {
            let versions: Vec<Value> = versions
                .iter()
                .map(|version| {
                    json!({"version": version, "freshness": "Current",
                        "resources": aggregated_resources(catalog, group, version)})
                })
                .collect();
            let mut item = json!({"metadata": {}, "versions": versions});
            if !group.is_empty() {
                item["metadata"]["name"] = json!(group);
            }
            item
        })
        .collect();
    let (version, media) = match accept.shape {
        Shape::AggregatedV2Beta1 => ("v2beta1", AGGREGATED_V2BETA1),
        _ => ("v2", AGGREGATED_V2),
    };
    let list = json!({"kind": "APIGroupDiscoveryList", "apiVersion": format!("apidiscovery.k8s.io/{version}"),
        "metadata": {}, "items": items});
    // Always JSON: no client asks for it in YAML.
    debug_assert!(accept.encoding == Encoding::Json || accept.encoding == Encoding::Yaml);
    response::with_type(StatusCode::OK, list.to_string(), media)
}

fn aggregated_resources(catalog: &Catalog, group: &str, version: &str) -> Vec<Value> {
    let kind_of = |g: &str, v: &str, k: &str| json!({"group": g, "version": v, "kind": k});
    let mut list: Vec<Value> = catalog
        .iter()
        .filter(|r| r.group == group && r.version == version)
        .map(|r| {
            let mut entry = json!({"resource": r.plural, "responseKind": kind_of(group, version, &r.kind),
                "scope": if r.namespaced { "Namespaced" } else { "Cluster" }, "singularResource": r.singular,
                "verbs": verbs(r, "")});
            if !r.short_names.is_empty() {
                entry["shortNames"] = json!(r.short_names);
            }
            if !r.categories.is_empty() {
                entry["categories"] = json!(r.categories);
            }
            let subs: Vec<Value> = subresources(r)
                .into_iter()
                .map(|(name, g, v, k)| {
                    json!({"subresource": name, "responseKind": kind_of(&g, &v, &k), "verbs": verbs(r, name)})
                })
                .collect();
            if !subs.is_empty() {
                entry["subresources"] = json!(subs);
            }
            entry
        })
        .collect();
    for r in reviews::RESOURCES.iter().filter(|r| r.group == group && r.version == version) {
        list.push(json!({"resource": r.plural, "responseKind": kind_of(group, version, r.kind),
            "scope": if r.namespaced { "Namespaced" } else { "Cluster" }, "singularResource": r.kind.to_lowercase(),
            "verbs": ["create"]}));
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_simulation_says_that_it_is_one() {
        let of = |role| version(role)["gitVersion"].as_str().unwrap_or_default().to_owned();
        assert_eq!(of(Role::Member), format!("{}-simulation", of(Role::Hub)));
        assert!(of(Role::Hub).starts_with("v1.37.0-cellway."), "{}", of(Role::Hub));
    }
}
