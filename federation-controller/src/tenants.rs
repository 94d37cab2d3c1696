//! What tenants may see and do at the hub, generated from `Tenant` objects as RBAC.
//!
//! For each tenant: a ClusterRole that shows its clusters and cells (and no others: the annotation `cellway.io/visible` is
//! the hub API's own, so these are made only where that is the API), bound to its admins and viewers; and in each of its
//! namespaces a RoleBinding to what admins and viewers may do with federated objects. Cells take their cluster's tenant
//! label where they have none, so that visibility has one label to go by. Somebody else's change of what is generated is
//! put right at the next look.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use federation_core::api::{Cell, Tenant, TenantSubject};
use federation_core::names::{
    FEDERATION_NAMESPACE, FIELD_MANAGER, TENANT_INHERITED_ANNOTATION, TENANT_LABEL, TENANT_ROLE_LABEL,
    VISIBLE_ANNOTATION,
};
use kube::api::{ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::core::GroupVersionKind;
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};
use tracing::{debug, info};

use crate::Shared;
use crate::member::chain;

/// Changes of several tenants are looked at together.
const GATHER: Duration = Duration::from_millis(200);
/// Wait before what failed is tried again; a namespace that does not exist yet, for one.
const RETRY: Duration = Duration::from_secs(10);
const GROUP: &str = "rbac.authorization.k8s.io";
const READ: [&str; 3] = ["get", "list", "watch"];
const ALL: [&str; 8] = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];
/// Groups of what tenants place: objects in their namespaces.
const THEIRS: [&str; 4] =
    ["types.kubefed.io", "scheduling.kubefed.io", "apps.cellway.io", "release.cellway.io"];

/// One object that is to be there.
#[derive(Debug, Clone, PartialEq)]
struct Wanted {
    kind: &'static str,
    namespace: Option<String>,
    name: String,
    value: Value,
}

/// Keeps it up for ever.
pub(crate) async fn run(shared: Arc<Shared>) {
    // `None`: not known, as at the start, when there may be something of a tenant that is gone.
    let mut applied: Option<Vec<Wanted>> = None;
    loop {
        // A look now and then puts right what others changed.
        let told = timeout(shared.options.resync, shared.tenants_due.notified()).await.is_ok();
        if !told {
            applied = None;
        }
        sleep(GATHER).await;
        let Some((tenants, cells)) = shared.state.read().tenants_and_cells() else { continue };
        let wanted = wanted(&tenants, shared.options.visibility);
        let mut failed = inherit(&shared.hub, &cells).await;
        if applied.as_ref() != Some(&wanted) {
            let done = bring_about(&shared.hub, &wanted, applied.as_deref().unwrap_or_default()).await;
            if let Err(error) = &done {
                debug!(error = chain(error), "cannot keep up what tenants may do");
            }
            // A hub without tenants need not give the right to look.
            if done.is_ok() || wanted.is_empty() {
                applied = Some(wanted);
            } else {
                failed = true;
            }
        }
        if failed {
            sleep(RETRY).await;
            shared.tenants_due.notify_one();
        }
    }
}

/// Everything that is to be there.
fn wanted(tenants: &[Tenant], visibility: bool) -> Vec<Wanted> {
    let mut all = Vec::new();
    if tenants.is_empty() {
        return all;
    }
    for (name, verbs) in [("cellway:tenant-admin", &ALL[..]), ("cellway:tenant-viewer", &READ[..])] {
        let rules = json!([
            {"apiGroups": THEIRS, "resources": ["*"], "verbs": verbs},
            {"apiGroups": ["policy.cellway.io"], "resources": ["propagationpolicies"], "verbs": verbs},
            {"apiGroups": ["", "events.k8s.io"], "resources": ["events"], "verbs": READ},
        ]);
        all.push(Wanted::cluster("ClusterRole", name, "", json!({"rules": rules})));
    }
    for tenant in tenants {
        let name = tenant.name_any();
        let everybody: Vec<TenantSubject> =
            tenant.spec.admins.iter().chain(&tenant.spec.viewers).cloned().collect();
        let role = format!("cellway:tenant:{name}");
        if visibility && !everybody.is_empty() {
            let rules = json!([
                {"apiGroups": ["topology.cellway.io"], "resources": ["cells"], "verbs": READ},
                {"apiGroups": ["core.kubefed.io"], "resources": ["kubefedclusters"], "verbs": READ},
            ]);
            let mut made = Wanted::cluster("ClusterRole", &role, &name, json!({"rules": rules}));
            made.value["metadata"]["annotations"] =
                json!({VISIBLE_ANNOTATION: format!("{TENANT_LABEL}={name}")});
            all.push(made);
            let binding = binding(&role, &everybody);
            all.push(Wanted::cluster("ClusterRoleBinding", &role, &name, binding));
        }
        for namespace in BTreeSet::from_iter(&tenant.spec.namespaces) {
            // A namespace that two tenants name is nobody's.
            let claims = tenants.iter().filter(|one| one.spec.namespaces.contains(namespace)).count();
            if claims > 1 || is_the_platforms(namespace) {
                continue;
            }
            for (kind, subjects) in [("admin", &tenant.spec.admins), ("viewer", &tenant.spec.viewers)] {
                if subjects.is_empty() {
                    continue;
                }
                let role = format!("cellway:tenant-{kind}");
                let mut made = Wanted::cluster("RoleBinding", &role, &name, binding(&role, subjects));
                made.value["metadata"]["namespace"] = namespace.clone().into();
                made.namespace = Some(namespace.clone());
                all.push(made);
            }
        }
    }
    all
}

/// Namespaces that no tenant gets anything in, whatever its object says.
fn is_the_platforms(namespace: &str) -> bool {
    namespace == FEDERATION_NAMESPACE || namespace == "cellway-system" || namespace.starts_with("kube-")
}

fn binding(role: &str, subjects: &[TenantSubject]) -> Value {
    let subjects: Vec<Value> = subjects
        .iter()
        .map(|subject| match &subject.namespace {
            Some(namespace) => {
                json!({"kind": "ServiceAccount", "name": subject.name, "namespace": namespace})
            }
            None => json!({"kind": subject.kind, "apiGroup": GROUP, "name": subject.name}),
        })
        .collect();
    json!({"roleRef": {"apiGroup": GROUP, "kind": "ClusterRole", "name": role}, "subjects": subjects})
}

async fn bring_about(hub: &Client, wanted: &[Wanted], applied: &[Wanted]) -> Result<(), kube::Error> {
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let mut first_error = None;
    for one in wanted.iter().filter(|one| !applied.contains(one)) {
        // One namespace that is not there holds up no other.
        if let Err(error) = one.api(hub).patch(&one.name, &params, &Patch::Apply(&one.value)).await {
            first_error.get_or_insert(error);
        }
    }
    for kind in ["ClusterRoleBinding", "RoleBinding", "ClusterRole"] {
        let api: Api<DynamicObject> = Api::all_with(hub.clone(), &resource(kind));
        let found = api.list(&ListParams::default().labels(TENANT_ROLE_LABEL)).await?;
        for object in found.items {
            // The list said so; what it takes to be sure before something is deleted is not much.
            if !object.labels().contains_key(TENANT_ROLE_LABEL) {
                continue;
            }
            let (name, namespace) = (object.name_any(), object.namespace());
            let stays =
                wanted.iter().any(|one| one.kind == kind && one.name == name && one.namespace == namespace);
            if stays {
                continue;
            }
            let api: Api<DynamicObject> = match &namespace {
                Some(namespace) => Api::namespaced_with(hub.clone(), namespace, &resource(kind)),
                None => Api::all_with(hub.clone(), &resource(kind)),
            };
            match api.delete(&name, &DeleteParams::default()).await {
                Ok(_) => info!(kind, name, ?namespace, "a tenant's right is taken back"),
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(error) => {
                    first_error.get_or_insert(error);
                }
            }
        }
    }
    first_error.map_or(Ok(()), Err)
}

/// Gives cells the tenant of their cluster; `(cell, tenant)`, `None` where an inherited one is to go. Returns whether
/// something failed.
async fn inherit(hub: &Client, cells: &[(String, Option<String>)]) -> bool {
    let api: Api<Cell> = Api::all(hub.clone());
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
    let mut failed = false;
    for (name, tenant) in cells {
        let mark = tenant.as_ref().map(|_| "true");
        let patch = json!({"metadata": {
            "labels": {TENANT_LABEL: tenant},
            "annotations": {TENANT_INHERITED_ANNOTATION: mark},
        }});
        if let Err(error) = api.patch(name, &params, &Patch::Merge(patch)).await {
            debug!(cell = name, error = chain(&error), "cannot label a cell with its cluster's tenant");
            failed = true;
        }
    }
    failed
}

fn resource(kind: &str) -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk(GROUP, "v1", kind))
}

// === impl Wanted ===

impl Wanted {
    fn cluster(kind: &'static str, name: &str, tenant: &str, body: Value) -> Self {
        let mut value = body;
        value["apiVersion"] = format!("{GROUP}/v1").into();
        value["kind"] = kind.into();
        value["metadata"] = json!({"name": name, "labels": {TENANT_ROLE_LABEL: tenant}});
        Self { kind, namespace: None, name: name.to_owned(), value }
    }

    fn api(&self, hub: &Client) -> Api<DynamicObject> {
        match &self.namespace {
            Some(namespace) => Api::namespaced_with(hub.clone(), namespace, &resource(self.kind)),
            None => Api::all_with(hub.clone(), &resource(self.kind)),
        }
    }
}

#[cfg(test)]
mod tests {
    use federation_core::api::TenantSpec;

    use super::*;

    fn tenant(name: &str, namespaces: &[&str]) -> Tenant {
        let jo = TenantSubject { kind: "User".into(), name: format!("{name}-jo"), namespace: None };
        let spec = TenantSpec {
            namespaces: namespaces.iter().map(|name| (*name).to_owned()).collect(),
            admins: vec![jo],
            viewers: Vec::new(),
        };
        Tenant::new(name, spec)
    }

    fn names(wanted: &[Wanted]) -> Vec<String> {
        wanted
            .iter()
            .map(|one| format!("{} {}/{}", one.kind, one.namespace.as_deref().unwrap_or(""), one.name))
            .collect()
    }

    #[test]
    fn a_tenant_gets_its_own_and_nothing_else() {
        assert!(wanted(&[], true).is_empty());
        let made = wanted(&[tenant("red", &["shop", "kube-system", "kube-federation-system"])], true);
        assert_eq!(
            names(&made),
            [
                "ClusterRole /cellway:tenant-admin",
                "ClusterRole /cellway:tenant-viewer",
                "ClusterRole /cellway:tenant:red",
                "ClusterRoleBinding /cellway:tenant:red",
                "RoleBinding shop/cellway:tenant-admin",
            ]
        );
        assert_eq!(made[2].value["metadata"]["annotations"]["cellway.io/visible"], "cellway.io/tenant=red");
    }

    #[test]
    fn without_visibility_nobody_is_shown_everything() {
        let made = wanted(&[tenant("red", &["shop"])], false);
        assert!(made.iter().all(|one| one.kind != "ClusterRoleBinding"), "{:?}", names(&made));
    }

    #[test]
    fn a_namespace_of_two_is_nobodys() {
        let made = wanted(&[tenant("red", &["shop", "a"]), tenant("blue", &["shop"])], true);
        let bindings: Vec<_> = made.iter().filter(|one| one.kind == "RoleBinding").collect();
        assert_eq!(bindings.len(), 1);
        assert_eq!(bindings[0].namespace.as_deref(), Some("a"));
    }
}
