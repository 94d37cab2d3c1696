//! Roles and bindings that every server has: those of kube-apiserver that users know, and those of cellway's own
//! programs. Reconciled at start: what is missing is added, what somebody added stays.
//!
//! Left out are kube-apiserver's roles for programs that do not talk to a hub (kubelets, schedulers, the controllers
//! of the controller manager). Source: Kubernetes, "Using RBAC Authorization", default roles and role bindings.

use serde_json::{Value, json};

use super::rules::{self, Rule};
use super::{GROUP, aggregation};
use crate::auth::{ADMINS, CONTROLLERS, IMPERSONATORS, MASTERS};
use crate::config::Role;
use crate::registry::write::WriteOptions;
use crate::registry::{Registry, Target};
use crate::status::ApiError;
use crate::value::{at, str_at};

/// With the value "false", an object is left as it is.
const AUTOUPDATE: &str = "rbac.authorization.kubernetes.io/autoupdate";
const AUTHENTICATED: &str = "system:authenticated";
const UNAUTHENTICATED: &str = "system:unauthenticated";

const READ: &[&str] = &["get", "list", "watch"];
const WRITE: &[&str] = &["create", "delete", "deletecollection", "patch", "update"];
const READ_WRITE: &[&str] =
    &["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];
/// Roles that were made once and give too much: `view` is to show no Secrets, in whatever wrapping, and `edit` is to write
/// nothing that is the controller's or decides about a whole namespace.
const RETIRED: &[&str] = &["system:cellway:aggregate-to-view", "system:cellway:aggregate-to-edit"];
/// The group of federated objects and their revisions, Secrets among them. Which of its kinds `view` shows, and `edit` and
/// `admin` write, is said by the federation controller, which knows them: RBAC cannot take away.
const FEDERATED_GROUP: &str = "types.kubefed.io";
/// The groups of cellway's own kinds.
const OUR_GROUPS: &[&str] = &[
    "core.kubefed.io",
    "types.kubefed.io",
    "scheduling.kubefed.io",
    "topology.cellway.io",
    "policy.cellway.io",
    "apps.cellway.io",
    "release.cellway.io",
    "federation.cellway.io",
];

fn rule(verbs: &[&str], groups: &[&str], resources: &[&str]) -> Value {
    json!({"apiGroups": groups, "resources": resources, "verbs": verbs})
}

fn urls(urls: &[&str]) -> Value {
    json!({"nonResourceURLs": urls, "verbs": ["get"]})
}

fn cluster_role(name: &str, labels: &[&str], body: Value) -> Value {
    let mut object = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
        "metadata": {"name": name, "annotations": {AUTOUPDATE: "true"},
            "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"}}});
    for label in labels {
        object["metadata"]["labels"][format!("rbac.authorization.k8s.io/{label}")] = json!("true");
    }
    match body {
        rules @ Value::Array(_) => object["rules"] = rules,
        selected => {
            object["aggregationRule"] = json!({"clusterRoleSelectors": [{"matchLabels": selected}]});
        }
    }
    object
}

fn group(name: &str) -> Value {
    json!({"kind": "Group", "apiGroup": GROUP, "name": name})
}

fn cluster_binding(name: &str, role: &str, subjects: &[Value]) -> Value {
    json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
        "metadata": {"name": name, "annotations": {AUTOUPDATE: "true"},
            "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"}},
        "roleRef": {"apiGroup": GROUP, "kind": "ClusterRole", "name": role}, "subjects": subjects})
}

/// The roles and bindings of a server in this role, in the order in which they are made.
pub(crate) fn objects(role: Role) -> Vec<Value> {
    let mut list = users();
    list.extend(match role {
        Role::Hub => hub(),
        Role::Member => member(),
    });
    list
}

/// As in kube-apiserver.
fn users() -> Vec<Value> {
    let aggregate = |to: &str| json!({ format!("rbac.authorization.k8s.io/aggregate-to-{to}"): "true" });
    let authorization = "authorization.k8s.io";
    let authentication = "authentication.k8s.io";
    vec![
        cluster_role(
            "cluster-admin",
            &[],
            json!([rule(&["*"], &["*"], &["*"]), {"nonResourceURLs": ["*"], "verbs": ["*"]}]),
        ),
        cluster_role(
            "system:discovery",
            &[],
            json!([urls(&[
                "/api",
                "/api/*",
                "/apis",
                "/apis/*",
                "/healthz",
                "/livez",
                "/openapi",
                "/openapi/*",
                "/readyz",
                "/version",
                "/version/",
            ])]),
        ),
        cluster_role(
            "system:monitoring",
            &[],
            json!([
                urls(&[
                    "/healthz",
                    "/healthz/*",
                    "/livez",
                    "/livez/*",
                    "/metrics",
                    "/metrics/slis",
                    "/readyz",
                    "/readyz/*",
                ]),
                rule(&["get"], &[""], &["nodes/metrics"]),
            ]),
        ),
        cluster_role(
            "system:basic-user",
            &[],
            json!([
                rule(&["create"], &[authorization], &["selfsubjectaccessreviews", "selfsubjectrulesreviews"]),
                rule(&["create"], &[authentication], &["selfsubjectreviews"]),
            ]),
        ),
        cluster_role(
            "system:public-info-viewer",
            &[],
            json!([urls(&["/healthz", "/livez", "/readyz", "/version", "/version/"])]),
        ),
        cluster_role(
            "system:auth-delegator",
            &[],
            json!([
                rule(&["create"], &[authentication], &["tokenreviews"]),
                rule(&["create"], &[authorization], &["subjectaccessreviews"]),
            ]),
        ),
        cluster_role(
            "system:service-account-issuer-discovery",
            &[],
            json!([urls(&[
                "/.well-known/openid-configuration",
                "/.well-known/openid-configuration/",
                "/openid/v1/jwks",
                "/openid/v1/jwks/",
            ])]),
        ),
        cluster_role("admin", &[], aggregate("admin")),
        cluster_role("edit", &["aggregate-to-admin"], aggregate("edit")),
        cluster_role("view", &["aggregate-to-edit"], aggregate("view")),
        cluster_role(
            "system:aggregate-to-admin",
            &["aggregate-to-admin"],
            json!([
                rule(&["create"], &[authorization], &["localsubjectaccessreviews"]),
                rule(READ_WRITE, &[GROUP], &["rolebindings", "roles"]),
            ]),
        ),
        cluster_role("system:aggregate-to-edit", &["aggregate-to-edit"], edit_rules()),
        cluster_role("system:aggregate-to-view", &["aggregate-to-view"], view_rules()),
        cluster_binding("cluster-admin", "cluster-admin", &[group(MASTERS)]),
        cluster_binding("system:monitoring", "system:monitoring", &[group("system:monitoring")]),
        cluster_binding("system:discovery", "system:discovery", &[group(AUTHENTICATED)]),
        cluster_binding("system:basic-user", "system:basic-user", &[group(AUTHENTICATED)]),
        cluster_binding(
            "system:public-info-viewer",
            "system:public-info-viewer",
            &[group(AUTHENTICATED), group(UNAUTHENTICATED)],
        ),
        cluster_binding(
            "system:service-account-issuer-discovery",
            "system:service-account-issuer-discovery",
            &[group("system:serviceaccounts")],
        ),
    ]
}

fn edit_rules() -> Value {
    let pods = ["pods", "pods/attach", "pods/exec", "pods/portforward", "pods/proxy"];
    json!([
        rule(
            READ,
            &[""],
            &["pods/attach", "pods/exec", "pods/portforward", "pods/proxy", "secrets", "services/proxy"]
        ),
        rule(&["impersonate"], &[""], &["serviceaccounts"]),
        rule(WRITE, &[""], &pods),
        rule(&["create"], &[""], &["pods/eviction"]),
        rule(
            WRITE,
            &[""],
            &[
                "configmaps",
                "persistentvolumeclaims",
                "replicationcontrollers",
                "replicationcontrollers/scale",
                "secrets",
                "serviceaccounts",
                "services",
                "services/proxy",
            ]
        ),
        rule(&["create"], &[""], &["serviceaccounts/token"]),
        rule(WRITE, &["", "events.k8s.io"], &["events"]),
        rule(
            WRITE,
            &["apps"],
            &[
                "daemonsets",
                "deployments",
                "deployments/rollback",
                "deployments/scale",
                "replicasets",
                "replicasets/scale",
                "statefulsets",
                "statefulsets/scale",
            ]
        ),
        rule(WRITE, &["autoscaling"], &["horizontalpodautoscalers"]),
        rule(WRITE, &["batch"], &["cronjobs", "jobs"]),
        rule(WRITE, &["policy"], &["poddisruptionbudgets"]),
        rule(WRITE, &["networking.k8s.io"], &["ingresses", "networkpolicies"]),
        rule(READ_WRITE, &["coordination.k8s.io"], &["leases"]),
    ])
}

fn view_rules() -> Value {
    json!([
        rule(
            READ,
            &[""],
            &[
                "configmaps",
                "endpoints",
                "persistentvolumeclaims",
                "persistentvolumeclaims/status",
                "pods",
                "replicationcontrollers",
                "replicationcontrollers/scale",
                "serviceaccounts",
                "services",
                "services/status",
            ]
        ),
        rule(
            READ,
            &[""],
            &[
                "bindings",
                "limitranges",
                "namespaces/status",
                "pods/log",
                "pods/status",
                "replicationcontrollers/status",
                "resourcequotas",
                "resourcequotas/status",
            ]
        ),
        rule(READ, &[""], &["namespaces"]),
        rule(READ, &["", "events.k8s.io"], &["events"]),
        rule(READ, &["discovery.k8s.io"], &["endpointslices"]),
        rule(
            READ,
            &["apps"],
            &[
                "controllerrevisions",
                "daemonsets",
                "daemonsets/status",
                "deployments",
                "deployments/scale",
                "deployments/status",
                "replicasets",
                "replicasets/scale",
                "replicasets/status",
                "statefulsets",
                "statefulsets/scale",
                "statefulsets/status",
            ]
        ),
        rule(READ, &["autoscaling"], &["horizontalpodautoscalers", "horizontalpodautoscalers/status"]),
        rule(READ, &["batch"], &["cronjobs", "cronjobs/status", "jobs", "jobs/status"]),
        rule(READ, &["policy"], &["poddisruptionbudgets", "poddisruptionbudgets/status"]),
        rule(READ, &["networking.k8s.io"], &["ingresses", "ingresses/status", "networkpolicies"]),
    ])
}

/// Of the hub: its own programs, and its kinds for `view` and `edit`.
fn hub() -> Vec<Value> {
    // The way to members' own APIs, which decide what is done there.
    let members = || json!({"nonResourceURLs": ["/clusters/*"], "verbs": ["*"]});
    let seen: Vec<&str> = OUR_GROUPS.iter().copied().filter(|group| *group != FEDERATED_GROUP).collect();
    vec![
        cluster_role("system:cellway:view", &["aggregate-to-view"], json!([rule(READ, &seen, &["*"])])),
        cluster_role(
            "system:cellway:edit",
            &["aggregate-to-edit"],
            json!([
                // As Kubernetes' own `edit` reads Secrets.
                rule(READ, &[FEDERATED_GROUP], &["*"]),
                // Objects of a namespace, without their statuses; clusters, cells, tenants and classes are an administrator's.
                rule(WRITE, &["scheduling.kubefed.io"], &["replicaschedulingpreferences"]),
                rule(WRITE, &["policy.cellway.io"], &["propagationpolicies"])
            ]),
        ),
        // For whom an administrator binds to it: nobody has it by default.
        cluster_role("system:cellway:cluster-proxy", &[], json!([members()])),
        // The federation controller, and the hub's directory of members.
        cluster_role(
            "system:cellway:hub",
            &[],
            json!([
                rule(READ_WRITE, OUR_GROUPS, &["*"]),
                rule(READ, &[""], &["namespaces", "configmaps"]),
                // What propagation policies may federate. Secrets are not among it: whoever wants that says so.
                rule(READ, &[""], &["serviceaccounts", "services"]),
                rule(READ, &["apps"], &["daemonsets", "deployments", "replicasets", "statefulsets"]),
                rule(READ, &["batch"], &["cronjobs", "jobs"]),
                rule(READ, &["networking.k8s.io"], &["ingresses", "networkpolicies"]),
                rule(READ, &["policy"], &["poddisruptionbudgets"]),
                // Enabling a type makes the definition of its federated kind.
                rule(
                    &["create", "get", "list", "patch", "update", "watch"],
                    &["apiextensions.k8s.io"],
                    &["customresourcedefinitions"]
                ),
                rule(READ_WRITE, &["", "events.k8s.io"], &["events"]),
                // What tenants get is made from their Tenant objects; no more can be given than is had.
                rule(
                    READ_WRITE,
                    &["rbac.authorization.k8s.io"],
                    &["clusterroles", "clusterrolebindings", "rolebindings"]
                ),
                members(),
                rule(
                    &["create", "delete", "get", "list", "patch", "update", "watch"],
                    &["coordination.k8s.io"],
                    &["leases"]
                ),
            ]),
        ),
        cluster_binding("system:cellway:hub", "system:cellway:hub", &[group(CONTROLLERS)]),
        // Enrolment tokens, and members' credentials that the hub holds.
        namespaced(
            "Role",
            "cellway-system",
            json!({"rules": [
            rule(&["create", "delete", "get", "list", "patch", "update", "watch"], &[""], &["secrets"])]}),
        ),
        namespaced("RoleBinding", "cellway-system", json!({"subjects": [group(CONTROLLERS)]})),
        namespaced(
            "Role",
            "kube-federation-system",
            json!({"rules": [
            rule(&["get", "list", "watch"], &[""], &["secrets"])]}),
        ),
        namespaced("RoleBinding", "kube-federation-system", json!({"subjects": [group(CONTROLLERS)]})),
    ]
}

/// The role `system:cellway:hub` of a namespace, or its binding.
fn namespaced(kind: &str, namespace: &str, body: Value) -> Value {
    let mut object = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind,
        "metadata": {"name": "system:cellway:hub", "namespace": namespace, "annotations": {AUTOUPDATE: "true"},
            "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"}}});
    if kind == "RoleBinding" {
        object["roleRef"] = json!({"apiGroup": GROUP, "kind": "Role", "name": "system:cellway:hub"});
    }
    for (key, value) in body.as_object().into_iter().flatten() {
        object[key] = value.clone();
    }
    object
}

/// Of a simulated member: its agent, and what the hub's administrators and controller do through it.
fn member() -> Vec<Value> {
    vec![
        cluster_role(
            "system:cellway:agent",
            &[],
            json!([
                rule(&["impersonate"], &[""], &["users", "groups", "serviceaccounts"]),
                rule(&["impersonate"], &["authentication.k8s.io"], &["userextras/*", "uids", "userextras"])
            ]),
        ),
        cluster_binding("system:cellway:agent", "system:cellway:agent", &[group(IMPERSONATORS)]),
        cluster_binding("cellway:admins", "cluster-admin", &[group(ADMINS)]),
        // Any kind can be federated, so the controller manages any; it may neither escalate, bind nor impersonate, and
        // what it is to give through roles it has to be given first.
        cluster_role(
            "system:cellway:federation-controller",
            &[],
            json!([rule(READ_WRITE, &["*"], &["*"]), urls(&["/healthz", "/livez", "/readyz", "/version"])]),
        ),
        cluster_binding(
            "system:cellway:federation-controller",
            "system:cellway:federation-controller",
            &[group(CONTROLLERS)],
        ),
    ]
}

/// Makes what is missing, adds what is missing to what is there, and fills aggregated roles.
pub(crate) async fn reconcile(registry: &Registry) -> Result<(), ApiError> {
    for object in objects(registry.role) {
        let resource = match str_at(&object, &["kind"]) {
            "ClusterRole" => "clusterroles",
            "Role" => "roles",
            "RoleBinding" => "rolebindings",
            _ => "clusterrolebindings",
        };
        let meta = |key| str_at(&object, &["metadata", key]);
        let target = registry.target((GROUP, "v1", resource), meta("namespace"), meta("name"))?;
        if registry.is_out_of_reach(&target).await? {
            tracing::warn!(key = target.key(), "left as it is: it, or its namespace, cannot be decrypted");
            continue;
        }
        if !target.namespace.is_empty() {
            // Namespaces of the embedding program, made before or, where there is no such program, not at all.
            match registry.get(&registry.core("namespaces", "", &target.namespace)?).await {
                Ok(_) => {}
                Err(error) if error.is_not_found() => continue,
                Err(error) => return Err(error),
            }
        }
        one(registry, &target, &object).await?;
    }
    for name in RETIRED {
        retire(registry, &registry.target((GROUP, "v1", "clusterroles"), "", name)?).await?;
    }
    aggregation::aggregate(registry).await.map(drop)
}

/// Removes a role that gives too much, unless somebody has taken it over.
async fn retire(registry: &Registry, role: &Target) -> Result<(), ApiError> {
    if registry.is_out_of_reach(role).await? {
        // It grants nothing as long as that is so.
        return Ok(());
    }
    match registry.get(role).await {
        Ok(found) if str_at(&found.object, &["metadata", "annotations", AUTOUPDATE]) == "false" => Ok(()),
        Ok(_) => {
            match registry.delete(role, &crate::registry::delete::DeleteOptions::default()).await {
                // Another replica was faster.
                Err(error) if error.is_not_found() => Ok(()),
                done => done.map(|_| ()),
            }
        }
        Err(error) if error.is_not_found() => Ok(()),
        Err(error) => Err(error),
    }
}

async fn one(registry: &Registry, target: &Target, wanted: &Value) -> Result<(), ApiError> {
    let create = Target { name: String::new(), ..target.clone() };
    match registry.get(target).await {
        Err(error) if error.is_not_found() => {
            match registry.create(&create, wanted.clone(), &WriteOptions::by("cellway")).await {
                // Another replica was faster.
                Err(error) if error.is_already_exists() => Ok(()),
                other => other.map(|_| ()),
            }
        }
        Err(error) => Err(error),
        Ok(found) if str_at(&found.object, &["metadata", "annotations", AUTOUPDATE]) == "false" => Ok(()),
        Ok(found) if found.object.get("roleRef") != wanted.get("roleRef") => {
            // A role reference cannot be changed in place.
            registry.delete(target, &crate::registry::delete::DeleteOptions::default()).await?;
            registry.create(&create, wanted.clone(), &WriteOptions::by("cellway")).await.map(|_| ())
        }
        Ok(_) => registry.modify(target, |object| merge(object, wanted)).await.map(|_| ()),
    }
}

/// Adds to `object` what it lacks of `wanted`; tells whether it did.
fn merge(object: &mut Value, wanted: &Value) -> bool {
    let mut changed = false;
    for map in ["labels", "annotations"] {
        for (key, value) in at(wanted, &["metadata", map]).and_then(Value::as_object).into_iter().flatten() {
            if at(object, &["metadata", map, key]).is_none() {
                crate::value::set(object, &["metadata", map, key], value.clone());
                changed = true;
            }
        }
    }
    if wanted.get("rules").is_some() {
        let missing = rules::missing(&Rule::read_all(object), &Rule::read_all(wanted));
        if !missing.is_empty() {
            let mut rules = object.get("rules").and_then(Value::as_array).cloned().unwrap_or_default();
            rules.extend(missing.iter().map(Rule::to_value));
            object["rules"] = json!(rules);
            changed = true;
        }
    }
    for (field, list) in [("subjects", "subjects"), ("aggregationRule", "clusterRoleSelectors")] {
        let path: &[&str] = if field == list { &["subjects"] } else { &[field, list] };
        let wanted = at(wanted, path).and_then(Value::as_array).cloned().unwrap_or_default();
        let mut found = at(object, path).and_then(Value::as_array).cloned().unwrap_or_default();
        let missing: Vec<Value> = wanted.into_iter().filter(|w| !found.contains(w)).collect();
        if !missing.is_empty() {
            found.extend(missing);
            crate::value::set(object, path, json!(found));
            changed = true;
        }
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same rights for a hub API that is a stock kube-apiserver, in the documentation. `UPDATE_GOLDEN=1` writes them.
    #[test]
    fn the_documentation_holds_the_hubs_rights() {
        let namespaces = ["kube-federation-system", "cellway-system"]
            .map(|name| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}));
        let mut text =
            "# The namespaces and rights that cellway needs on a stock kube-apiserver as hub API.\n"
                .to_owned();
        // There the hub asks who its callers are and what they may; our own API server knows.
        let asks = cluster_binding(
            "system:cellway:hub:auth-delegator",
            "system:auth-delegator",
            &[group(CONTROLLERS)],
        );
        for mut object in namespaces.into_iter().chain(hub()).chain([asks]) {
            if let Some(meta) = object["metadata"].as_object_mut() {
                meta.remove("annotations");
                if let Some(labels) = meta.get_mut("labels").and_then(Value::as_object_mut) {
                    labels.remove("kubernetes.io/bootstrapping");
                }
                if meta.get("labels").is_some_and(|labels| *labels == json!({})) {
                    meta.remove("labels");
                }
            }
            let document = serde_yaml_ng::to_string(&object).expect("serialises");
            text.push_str(&format!("---\n{document}"));
        }
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/stock-hub.yaml");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(path, &text).expect("written");
        }
        let written = std::fs::read_to_string(path).expect("docs/stock-hub.yaml");
        assert!(written == text, "docs/stock-hub.yaml is stale: UPDATE_GOLDEN=1 writes it");
    }

    #[test]
    fn what_is_taken_away_comes_back_and_what_is_added_stays() {
        let wanted = objects(Role::Hub).swap_remove(1);
        let mut object = wanted.clone();
        assert!(!merge(&mut object, &wanted));
        object["rules"][0]["nonResourceURLs"] = json!(["/api", "/mine"]);
        object["metadata"]["labels"] = json!({"own": "1"});
        assert!(merge(&mut object, &wanted));
        assert!(rules::missing(&Rule::read_all(&object), &Rule::read_all(&wanted)).is_empty());
        assert_eq!(object["rules"][0]["nonResourceURLs"], json!(["/api", "/mine"]));
        assert_eq!(object["metadata"]["labels"]["own"], "1");
        assert!(!merge(&mut object, &wanted));
        let binding = cluster_binding("a", "b", &[group("x")]);
        let mut changed = cluster_binding("a", "b", &[group("y")]);
        assert!(merge(&mut changed, &binding));
        assert_eq!(changed["subjects"], json!([group("y"), group("x")]));
    }

    /// What they write besides, the federation controller says.
    #[test]
    fn whoever_edits_writes_what_places_and_no_status() {
        let objects = objects(Role::Hub);
        let joins = |object: &&Value| {
            ["view", "edit", "admin"].iter().any(|role| {
                let label = format!("rbac.authorization.k8s.io/aggregate-to-{role}");
                object["metadata"]["labels"][label] == "true"
            })
        };
        let held: Vec<Rule> = objects.iter().filter(joins).flat_map(Rule::read_all).collect();
        let may = |verb: &str, group: &str, resource: &str| {
            let wanted = json!({"rules": [rule(&[verb], &[group], &[resource])]});
            rules::missing(&held, &Rule::read_all(&wanted)).is_empty()
        };
        for verb in WRITE {
            assert!(may(verb, "scheduling.kubefed.io", "replicaschedulingpreferences"), "{verb}");
            assert!(may(verb, "policy.cellway.io", "propagationpolicies"), "{verb}");
            for (group, resource) in [
                (FEDERATED_GROUP, "federatednamespaces"),
                (FEDERATED_GROUP, "federatedrevisions"),
                (FEDERATED_GROUP, "federateddeployments/status"),
                ("scheduling.kubefed.io", "replicaschedulingpreferences/status"),
                ("policy.cellway.io", "propagationpolicies/status"),
                ("policy.cellway.io", "tenants"),
                ("policy.cellway.io", "propagationconfigs"),
                ("topology.cellway.io", "cells"),
                ("core.kubefed.io", "kubefedclusters"),
            ] {
                assert!(!may(verb, group, resource), "{verb} {resource}");
            }
        }
        for verb in READ {
            assert!(may(verb, FEDERATED_GROUP, "federatedsecrets"), "{verb}");
            assert!(may(verb, FEDERATED_GROUP, "federateddeployments/status"), "{verb}");
        }
    }

    #[test]
    fn every_default_is_valid() {
        for role in [Role::Hub, Role::Member] {
            let resources = crate::registry::builtin::resources(role);
            for object in objects(role) {
                let kind = str_at(&object, &["kind"]);
                let resource = resources.iter().find(|r| r.kind == kind && r.group == GROUP).expect("served");
                let errors = super::super::validation::validate(resource, None, &object);
                assert!(errors.is_empty(), "{object}: {errors:?}");
            }
        }
    }
}
