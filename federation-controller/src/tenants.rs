//! What people may see and do at the hub, generated as RBAC: of tenants from `Tenant` objects, and of everybody with the roles
//! `view`, `edit` and `admin` from the federated types.
//!
//! Kubernetes' `view` shows no Secrets, so neither a viewer of ours nor a tenant's sees FederatedSecrets or the revisions, which
//! hold what a FederatedSecret held. RBAC cannot take away, so the role names every other type: [`VIEW`] joins `view`. Nor do
//! `edit` and `admin` write statuses or namespaces: [`EDIT`], which joins both, names what a tenant's admin writes too.
//!
//! For each tenant: a ClusterRole that shows its clusters and cells (and no others: the annotation `cellway.io/visible` is
//! the hub API's own, so these are made only where that is the API), and one for the way to its clusters' own APIs, which then
//! decide themselves, both bound to its admins and viewers; a binding of those to [`CONFIG`], which is the same for all tenants:
//! how types are federated and whose keys are, what the commands about an object ask first and what says nothing of any
//! tenant; and in each of its namespaces a RoleBinding to what admins and viewers may do with federated objects. Of statuses, which are the controller's, and of FederatedNamespaces, whose labels
//! may switch off in members what admission enforces there by label, an admin writes none: as RBAC cannot take away, what is
//! written is named too. Cells take their cluster's tenant label where they have none, so that visibility has one label to go
//! by. Somebody else's change of what is generated is heard of and put right at once, and then every few seconds for as long
//! as somebody keeps changing it. So rights are back when a namespace is deleted and made anew.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use federation_core::answers;
use federation_core::api::{Cell, Tenant, TenantSubject};
use federation_core::drift;
use federation_core::names::{
    FIELD_MANAGER, TENANT_INHERITED_ANNOTATION, TENANT_LABEL, TENANT_ROLE_LABEL, VISIBLE_ANNOTATION,
};
use federation_core::tenancy::is_the_platforms;
use federation_core::types::{FEDERATED_GROUP, FederatedType};
use k8s_openapi::api::core::v1::Namespace;
use kube::api::{ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::core::GroupVersionKind;
use kube::runtime::watcher;
use kube::{Api, Client, Resource as _, ResourceExt as _};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tracing::{Instrument as _, debug, info, info_span, warn};

use crate::Shared;
use crate::events::Events;
use crate::follow::{Change, Source, Unread, admit_all, follow_as};
use crate::hub::Tenants;
use crate::member::chain;
use crate::reader::{ReadError, Reader};

/// Changes of several tenants are looked at together.
const GATHER: Duration = Duration::from_millis(200);
/// Wait before what failed is tried again, and before a namespace that does not exist is asked for again.
const RETRY: Duration = Duration::from_secs(10);
const GROUP: &str = "rbac.authorization.k8s.io";
/// Pages of what is generated, and how long each is waited for.
const LIST: (usize, Duration) = (1000, Duration::from_secs(30));
/// Objects in one page.
const PAGE: u32 = 500;
/// The kinds that are generated.
const KINDS: [&str; 3] = ["ClusterRole", "RoleBinding", "ClusterRoleBinding"];
const READ: [&str; 3] = ["get", "list", "watch"];
const WRITE: [&str; 5] = ["create", "delete", "deletecollection", "patch", "update"];
/// Groups of what tenants have, besides federated objects: objects in their namespaces.
const THEIRS: [&str; 3] = ["scheduling.kubefed.io", "apps.cellway.io", "release.cellway.io"];
/// What of those, and of the platform's own groups, tenants' admins write; of none of them the status.
const PLACED: [(&str, &str); 2] =
    [("scheduling.kubefed.io", "replicaschedulingpreferences"), ("policy.cellway.io", "propagationpolicies")];
/// The role by which `view` shows federated objects.
const VIEW: &str = "cellway:view";
/// The role by which `edit`, and with it `admin`, writes them.
const EDIT: &str = "cellway:edit";
/// The role by which tenants read how types are federated, and whose annotations and labels are.
const CONFIG: &str = "cellway:tenant-config";

/// One object that is to be there.
#[derive(Debug, Clone, PartialEq)]
struct Wanted {
    kind: &'static str,
    namespace: Option<String>,
    name: String,
    value: Value,
}

/// Names of federated kinds, as rules name them.
#[derive(Debug, Default)]
struct Names {
    /// What a viewer sees.
    viewed: BTreeSet<String>,
    /// What `edit` and a tenant's admin write.
    written: BTreeSet<String>,
}

/// Keeps it up for ever.
pub(crate) async fn run(shared: Arc<Shared>) {
    // `None`: not known, as at the start, when there may be something of a tenant that is gone.
    let mut applied: Option<Vec<Wanted>> = None;
    let resync = shared.options.resync;
    let (mut wait, mut checked) = (resync, Instant::now());
    // Something generated has changed, by whomever; and until when nothing is put right for that, as it was a moment ago.
    let touched = Arc::new(AtomicBool::new(false));
    let mut calm = Instant::now();
    let mut watches = JoinSet::new();
    for kind in KINDS {
        let span = info_span!("watch", kind);
        watches.spawn(watch(Arc::clone(&shared), kind, Arc::clone(&touched)).instrument(span));
    }
    // Tenants and their namespaces that do not exist, as far as that has been told.
    let mut told = BTreeSet::new();
    // What stood in the way last.
    let mut troubled: Option<String> = None;
    loop {
        // Told or not: what is awaited may be there by now.
        tokio::select! {
            _ = timeout(wait, shared.tenants_due.notified()) => {}
            Some(ended) = watches.join_next() => {
                crate::outcome(ended);
                continue;
            }
        }
        sleep(GATHER).await;
        let now = Instant::now();
        let mut puts_right = checked.elapsed() >= resync;
        if now >= calm {
            puts_right |= touched.swap(false, Ordering::Relaxed);
        }
        if puts_right {
            applied = None;
            checked = now;
        }
        let Tenants { tenants, clusters, cells } = {
            let state = shared.state.read();
            match state.tenants() {
                Some(known) if state.types_known() => known,
                // Once they are known they are looked at.
                _ => continue,
            }
        };
        let names = Names::of(&shared.types.live());
        let mut wanted = wanted(&tenants, &clusters, &names, shared.options.visibility);
        let missing = missing(&shared.hub, &wanted, applied.as_deref().unwrap_or_default()).await;
        wanted.retain(|one| one.namespace.as_ref().is_none_or(|namespace| !missing.contains(namespace)));
        tell(&shared.events, &tenants, &missing, &mut told);
        wait = if missing.is_empty() { resync } else { RETRY };
        let mut failed = inherit(&shared.hub, &cells).await;
        if applied.as_ref() != Some(&wanted) {
            let done = bring_about(&shared.hub, &wanted, applied.as_deref().unwrap_or_default()).await;
            // Told once: it is tried again and again.
            let trouble = done.as_ref().err().map(|error| chain(error));
            if let Some(error) = trouble.as_ref().filter(|_| trouble != troubled) {
                warn!(
                    error,
                    "cannot keep up what tenants may do; on a stock Kubernetes API the hub needs the rights of docs/stock-hub.yaml"
                );
            }
            troubled = trouble;
            match done {
                Ok(written) => {
                    applied = Some(wanted);
                    if puts_right && written > 0 {
                        // Should somebody else want it otherwise, neither is to write without end.
                        calm = Instant::now() + RETRY;
                    }
                }
                Err(_) => failed = true,
            }
        }
        if touched.load(Ordering::Relaxed) {
            wait = wait.min(calm.saturating_duration_since(Instant::now()).max(GATHER));
        }
        if failed {
            sleep(RETRY).await;
            shared.tenants_due.notify_one();
        }
    }
}

/// Follows one kind of what is generated for ever.
async fn watch(shared: Arc<Shared>, kind: &'static str, touched: Arc<AtomicBool>) {
    let api: Api<DynamicObject> = Api::all_with(shared.hub.clone(), &resource(kind));
    let config = watcher::Config::default().labels(TENANT_ROLE_LABEL);
    // After a gap something may have happened in it: a listing counts as a change.
    let change = |_: Change<()>| {
        touched.store(true, Ordering::Relaxed);
        shared.tenants_due.notify_one();
        true
    };
    let trouble = crate::hub_trouble("generated rights");
    let keep = (|_| Ok(()), Unread::Kept(drop));
    follow_as(Source::of_hub(api, config), keep, admit_all, change, trouble).await;
}

/// Namespaces in which there is something to write and that do not exist, or are going: a write there would fail.
async fn missing(hub: &Client, wanted: &[Wanted], applied: &[Wanted]) -> BTreeSet<String> {
    let api: Api<Namespace> = Api::all(hub.clone());
    let new = wanted.iter().filter(|one| !applied.contains(one));
    let mut missing = BTreeSet::new();
    for name in new.filter_map(|one| one.namespace.clone()).collect::<BTreeSet<String>>() {
        match api.get_opt(&name).await {
            Ok(Some(found)) if found.metadata.deletion_timestamp.is_none() => {}
            Ok(_) => {
                missing.insert(name);
            }
            // The write tells.
            Err(error) => debug!(name, error = chain(&error), "cannot read a tenant's namespace"),
        }
    }
    missing
}

/// Tells tenants, once each, that a namespace of theirs does not exist.
fn tell(
    events: &Events,
    tenants: &[Tenant],
    missing: &BTreeSet<String>,
    told: &mut BTreeSet<(Option<String>, String)>,
) {
    told.retain(|(_, namespace)| missing.contains(namespace));
    for tenant in tenants {
        for namespace in tenant.spec.namespaces.iter().filter(|name| missing.contains(*name)) {
            if told.insert((tenant.uid(), namespace.clone())) {
                let message = format!(
                    "the namespace {namespace} does not exist: create it, or take it out of spec.namespaces; until then \
                     nobody has rights there by this tenant"
                );
                events.warning(&tenant.object_ref(&()), "NamespaceMissing", message);
            }
        }
    }
}

/// Everything that is to be there. `clusters`: those of each tenant.
fn wanted(
    tenants: &[Tenant],
    clusters: &BTreeMap<String, BTreeSet<String>>,
    names: &Names,
    visibility: bool,
) -> Vec<Wanted> {
    let mut all = Vec::new();
    // A rule without a resource is none.
    let federated = |names: &BTreeSet<String>, verbs: &[&str]| -> Vec<Value> {
        let rule = json!({"apiGroups": [FEDERATED_GROUP], "resources": names, "verbs": verbs});
        (!names.is_empty()).then_some(rule).into_iter().collect()
    };
    let seen = federated(&names.viewed, &READ);
    let mut writes = federated(&names.written, &WRITE);
    for (name, joined, rules) in [(VIEW, "view", &seen), (EDIT, "edit", &writes)] {
        let mut role = Wanted::cluster("ClusterRole", name, "", json!({"rules": rules}));
        role.value["metadata"]["labels"][format!("rbac.authorization.k8s.io/aggregate-to-{joined}")] =
            "true".into();
        all.push(role);
    }
    if tenants.is_empty() {
        return all;
    }
    let everything = vec![json!({"apiGroups": [FEDERATED_GROUP], "resources": ["*"], "verbs": READ})];
    writes.extend(PLACED.map(|(group, of)| json!({"apiGroups": [group], "resources": [of], "verbs": WRITE})));
    for (name, seen, writes) in
        [("cellway:tenant-admin", everything, writes), ("cellway:tenant-viewer", seen, Vec::new())]
    {
        let mut rules = seen;
        rules.extend([
            json!({"apiGroups": THEIRS, "resources": ["*"], "verbs": READ}),
            json!({"apiGroups": ["policy.cellway.io"], "resources": ["propagationpolicies"], "verbs": READ}),
            json!({"apiGroups": ["", "events.k8s.io"], "resources": ["events"], "verbs": READ}),
        ]);
        rules.extend(writes);
        all.push(Wanted::cluster("ClusterRole", name, "", json!({"rules": rules})));
    }
    let rules = json!([
        {"apiGroups": ["core.kubefed.io"], "resources": ["federatedtypeconfigs"], "verbs": READ},
        {"apiGroups": ["policy.cellway.io"], "resources": ["propagationconfigs"], "verbs": READ},
    ]);
    all.push(Wanted::cluster("ClusterRole", CONFIG, "", json!({"rules": rules})));
    for tenant in tenants {
        let name = tenant.name_any();
        let everybody: Vec<TenantSubject> =
            tenant.spec.admins.iter().chain(&tenant.spec.viewers).cloned().collect();
        if !everybody.is_empty() {
            let bound = format!("{CONFIG}:{name}");
            all.push(Wanted::cluster("ClusterRoleBinding", &bound, &name, binding(CONFIG, &everybody)));
        }
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
        if let (false, Some(own)) = (everybody.is_empty(), clusters.get(&name)) {
            let role = format!("cellway:tenant-clusters:{name}");
            let urls: Vec<String> = own.iter().map(|cluster| format!("/clusters/{cluster}/*")).collect();
            // What is done there is for the member to allow, to them by their own names.
            let rules = json!({"rules": [{"nonResourceURLs": urls, "verbs": ["*"]}]});
            all.push(Wanted::cluster("ClusterRole", &role, &name, rules));
            all.push(Wanted::cluster("ClusterRoleBinding", &role, &name, binding(&role, &everybody)));
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

/// Writes what is not as it is to be; returns how much that was.
async fn bring_about(hub: &Client, wanted: &[Wanted], applied: &[Wanted]) -> Result<usize, ReadError> {
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let mut first_error: Option<kube::Error> = None;
    let mut written = 0;
    let mut found = Vec::new();
    // One by one: whoever may write such objects must not be able to hide the others behind one.
    let reader = Reader::of_hub(hub.clone());
    for kind in KINDS {
        let path = kube::core::Request::new(DynamicObject::url_path(&resource(kind), None));
        let params = ListParams::default().labels(TENANT_ROLE_LABEL).limit(PAGE);
        let take = |object| {
            // The list said so; what it takes to be sure before something is deleted is not much.
            let object = answers::dynamic(object).ok();
            found.extend(
                object.filter(|one| one.labels().contains_key(TENANT_ROLE_LABEL)).map(|one| (kind, one)),
            );
            true
        };
        reader.list(|params| path.list(params), params, LIST, take).await?;
    }
    let is_it = |one: &Wanted, kind: &str, object: &DynamicObject| {
        one.kind == kind && one.name == object.name_any() && one.namespace == object.namespace()
    };
    for one in wanted.iter().filter(|one| !applied.contains(one)) {
        let known = found.iter().find(|(kind, object)| is_it(one, kind, object));
        if known.is_some_and(|(_, object)| one.is_there(object)) {
            continue;
        }
        // One that fails holds up no other.
        written += 1;
        if let Err(error) = one.api(hub).patch(&one.name, &params, &Patch::Apply(&one.value)).await {
            first_error.get_or_insert(error);
        }
    }
    // Bindings before the roles that they give.
    for (kind, object) in found.iter().rev() {
        if wanted.iter().any(|one| is_it(one, kind, object)) {
            continue;
        }
        let (name, namespace) = (object.name_any(), object.namespace());
        let api: Api<DynamicObject> = match &namespace {
            Some(namespace) => Api::namespaced_with(hub.clone(), namespace, &resource(kind)),
            None => Api::all_with(hub.clone(), &resource(kind)),
        };
        match api.delete(&name, &DeleteParams::default()).await {
            Ok(_) => {
                written += 1;
                info!(kind, name, ?namespace, "a right is taken back");
            }
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => {
                first_error.get_or_insert(error);
            }
        }
    }
    first_error.map_or(Ok(written), |error| Err(error.into()))
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

// === impl Names ===

impl Names {
    /// Of nothing outside the group that is the hub's to give.
    fn of(types: &[(usize, Arc<FederatedType>)]) -> Self {
        // Roles in a template are not held against what their writer may do, as those at the hub are; a namespace's quotas and
        // ranges are what its writers are held to.
        let is_the_platforms = |of: &FederatedType| {
            let target = (of.target.group.as_str(), of.target.kind.as_str());
            target.0 == GROUP || matches!(target, ("", "LimitRange" | "ResourceQuota"))
        };
        let mut names = Self::default();
        for of in types.iter().map(|(_, of)| of).filter(|of| of.group == FEDERATED_GROUP) {
            if !of.is_secret() {
                names.viewed.extend([of.plural.clone(), format!("{}/status", of.plural)]);
            }
            // As Kubernetes' own: `edit` writes neither namespaces nor what has none, such as ClusterRoles.
            if of.namespaced() && !of.is_namespace() && !is_the_platforms(of) {
                names.written.insert(of.plural.clone());
                names.written.extend(of.has_replicas().then(|| format!("{}/scale", of.plural)));
            }
        }
        names
    }
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

    /// Whether an object is this one already: what it gives, to whom, and its marks.
    fn is_there(&self, object: &DynamicObject) -> bool {
        let object = serde_json::to_value(object).unwrap_or_default();
        ["rules", "roleRef", "subjects"].iter().all(|field| object.get(*field) == self.value.get(*field))
            && ["labels", "annotations"].iter().all(|field| {
                let wanted = &self.value["metadata"][*field];
                wanted.is_null() || drift::covers(&object["metadata"][*field], wanted)
            })
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
            ..TenantSpec::default()
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
        assert_eq!(names(&made(&[], true)), ["ClusterRole /cellway:view", "ClusterRole /cellway:edit"]);
        let made = made(&[tenant("red", &["shop", "kube-system", "kube-federation-system"])], true);
        assert_eq!(
            names(&made),
            [
                "ClusterRole /cellway:view",
                "ClusterRole /cellway:edit",
                "ClusterRole /cellway:tenant-admin",
                "ClusterRole /cellway:tenant-viewer",
                "ClusterRole /cellway:tenant-config",
                "ClusterRoleBinding /cellway:tenant-config:red",
                "ClusterRole /cellway:tenant:red",
                "ClusterRoleBinding /cellway:tenant:red",
                "ClusterRole /cellway:tenant-clusters:red",
                "ClusterRoleBinding /cellway:tenant-clusters:red",
                "RoleBinding shop/cellway:tenant-admin",
            ]
        );
        assert_eq!(made[6].value["metadata"]["annotations"]["cellway.io/visible"], "cellway.io/tenant=red");
        let rules = json!([{"nonResourceURLs": ["/clusters/east/*", "/clusters/west/*"], "verbs": ["*"]}]);
        assert_eq!(made[8].value["rules"], rules, "and not the cluster of another");
        assert_eq!(made[8].value["metadata"]["annotations"], Value::Null, "or it would be without effect");
    }

    /// With what a tenant's admin is given: nothing of the platform's, no status, and no namespace in members.
    #[test]
    fn a_tenants_admin_writes_what_the_tenant_places_and_nothing_else() {
        let made = made(&[tenant("red", &["shop"])], true);
        let may = |role: &Wanted, group: &str, resource: &str, verb: &str| {
            let has = |rule: &Value, field: &str, wanted: &str| {
                rule[field].as_array().into_iter().flatten().any(|one| one == wanted || one == "*")
            };
            role.value["rules"].as_array().into_iter().flatten().any(|rule| {
                has(rule, "apiGroups", group) && has(rule, "resources", resource) && has(rule, "verbs", verb)
            })
        };
        let admin = made.iter().find(|one| one.name == "cellway:tenant-admin").expect("made");
        for (group, resource) in [
            (FEDERATED_GROUP, "federateddeployments"),
            (FEDERATED_GROUP, "federateddeployments/scale"),
            (FEDERATED_GROUP, "federatedsecrets"),
            ("scheduling.kubefed.io", "replicaschedulingpreferences"),
            ("policy.cellway.io", "propagationpolicies"),
        ] {
            for verb in READ.iter().chain(&WRITE) {
                assert!(may(admin, group, resource, verb), "{verb} {resource}");
            }
        }
        let edit = made.iter().find(|one| one.name == EDIT).expect("made");
        assert_eq!(edit.value["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-edit"], "true");
        for resource in ["federateddeployments", "federateddeployments/scale", "federatedsecrets"] {
            for verb in WRITE {
                assert!(may(edit, FEDERATED_GROUP, resource, verb), "{verb} {resource}");
            }
        }
        for resource in ["federatednamespaces", "federatedrevisions", "federateddeployments/status"] {
            assert!(may(admin, FEDERATED_GROUP, resource, "get"), "{resource}");
        }
        for role in made.iter().filter(|one| one.kind == "ClusterRole") {
            for (group, resource) in [
                (FEDERATED_GROUP, "federateddeployments/status"),
                (FEDERATED_GROUP, "federatedsecrets/status"),
                (FEDERATED_GROUP, "federatednamespaces"),
                (FEDERATED_GROUP, "federatednamespaces/status"),
                (FEDERATED_GROUP, "federatedrevisions"),
                ("scheduling.kubefed.io", "replicaschedulingpreferences/status"),
                ("policy.cellway.io", "propagationpolicies/status"),
                ("policy.cellway.io", "tenants"),
                ("policy.cellway.io", "tombstones"),
                ("policy.cellway.io", "propagationconfigs"),
                ("core.kubefed.io", "kubefedclusters"),
                ("core.kubefed.io", "federatedtypeconfigs"),
                ("topology.cellway.io", "cells"),
            ] {
                for verb in WRITE {
                    assert!(!may(role, group, resource, verb), "{}: {verb} {resource}", role.name);
                }
            }
        }
    }

    /// Before anything else: what a name such as `deployment/web` means, and whose the keys are that `rollback` puts back.
    #[test]
    fn everybody_of_a_tenant_reads_what_the_commands_about_an_object_ask_first() {
        let mut red = tenant("red", &["shop"]);
        red.spec.viewers =
            vec![TenantSubject { kind: "Group".into(), name: "lookers".into(), namespace: None }];
        // Also where nobody is shown clusters and cells.
        for visibility in [true, false] {
            let made = made(std::slice::from_ref(&red), visibility);
            let role = made.iter().find(|one| one.name == CONFIG).expect("made");
            let rules = json!([
                {"apiGroups": ["core.kubefed.io"], "resources": ["federatedtypeconfigs"], "verbs": ["get", "list", "watch"]},
                {"apiGroups": ["policy.cellway.io"], "resources": ["propagationconfigs"], "verbs": ["get", "list", "watch"]},
            ]);
            assert_eq!(role.value["rules"], rules, "and nothing else of those groups");
            assert_eq!(role.value["metadata"]["annotations"], Value::Null, "or it would be without effect");
            let bound = made.iter().find(|one| one.name == "cellway:tenant-config:red").expect("made");
            assert_eq!((bound.kind, &bound.value["roleRef"]["name"]), ("ClusterRoleBinding", &json!(CONFIG)));
            let subjects = bound.value["subjects"].as_array().expect("subjects");
            let names: Vec<_> = subjects.iter().map(|subject| subject["name"].as_str()).collect();
            assert_eq!(names, [Some("red-jo"), Some("lookers")]);
        }
        let mut nobodys = tenant("red", &["shop"]);
        nobodys.spec.admins.clear();
        let made = made(&[nobodys], true);
        assert!(made.iter().all(|one| one.kind != "ClusterRoleBinding" || !one.name.starts_with(CONFIG)));
    }

    #[test]
    fn the_way_to_clusters_needs_clusters_and_people() {
        let mut viewed = tenant("red", &["shop"]);
        viewed.spec.admins.clear();
        let reach = |tenants: &[Tenant]| -> usize {
            made(tenants, false).iter().filter(|one| one.name.starts_with("cellway:tenant-clusters:")).count()
        };
        assert_eq!(reach(&[tenant("red", &["shop"])]), 2, "also at a hub that does not show clusters");
        assert_eq!(reach(&[viewed]), 0, "it has neither admins nor viewers");
        assert_eq!(reach(&[tenant("pink", &["shop"])]), 0, "it has no clusters");
    }

    #[test]
    fn whoever_only_looks_sees_no_secrets() {
        let made = made(&[tenant("red", &["shop"])], true);
        let federated = |role: &str| -> Vec<String> {
            let role = made.iter().find(|one| one.name == role).expect("made");
            let rules = role.value["rules"].as_array().expect("rules");
            let of_types = rules.iter().filter(|rule| rule["apiGroups"][0] == FEDERATED_GROUP);
            let names = of_types.flat_map(|rule| rule["resources"].as_array().into_iter().flatten());
            names.filter_map(|name| name.as_str().map(str::to_owned)).collect()
        };
        for viewer in [VIEW, "cellway:tenant-viewer"] {
            let names = federated(viewer);
            assert!(names.contains(&"federateddeployments/status".to_owned()), "{names:?}");
            for hidden in ["*", "federatedsecrets", "federatedsecrets/status", "federatedrevisions"] {
                assert!(!names.contains(&hidden.to_owned()), "{viewer} shows {hidden}");
            }
        }
        assert!(federated("cellway:tenant-admin").contains(&"*".to_owned()));
    }

    #[test]
    fn what_holds_its_writers_is_the_platforms_to_write() {
        let of = |group: &str, kind: &str, plural: &str| {
            (0, Arc::new(FederatedType::of(group, "v1", kind, plural, true)))
        };
        let names = Names::of(&[
            of(GROUP, "RoleBinding", "rolebindings"),
            of(GROUP, "Role", "roles"),
            of("", "ResourceQuota", "resourcequotas"),
            of("", "LimitRange", "limitranges"),
            of("batch", "CronJob", "cronjobs"),
        ]);
        assert_eq!(Vec::from_iter(&names.written), ["federatedcronjobs"]);
        assert!(names.viewed.contains("federatedrolebindings"));
    }

    #[test]
    fn what_is_there_is_not_written_again() {
        let made = made(&[tenant("red", &["shop"])], true);
        for one in &made {
            let mut object = one.value.clone();
            object["metadata"]["uid"] = "u".into();
            let check = |object: &Value| {
                one.is_there(&serde_json::from_value::<DynamicObject>(object.clone()).expect("an object"))
            };
            assert!(check(&object), "{object}");
            for field in ["rules", "subjects"] {
                if let Some(list) = object.get_mut(field).and_then(Value::as_array_mut) {
                    list.push(json!({"name": "more"}));
                    assert!(!check(&object), "{object}");
                }
            }
        }
    }

    /// With two clusters of `red`, and one of `blue`.
    fn made(tenants: &[Tenant], visibility: bool) -> Vec<Wanted> {
        let types: Vec<_> = federation_core::types::builtin().into_iter().map(Arc::new).enumerate().collect();
        let clusters = [("red", &["west", "east"][..]), ("blue", &["north"][..])].map(|(tenant, names)| {
            (tenant.to_owned(), names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>())
        });
        let clusters = BTreeMap::from(clusters);
        wanted(tenants, &clusters, &Names::of(&types), visibility)
    }

    #[test]
    fn without_visibility_nobody_is_shown_everything() {
        let made = made(&[tenant("red", &["shop"])], false);
        assert!(made.iter().all(|one| one.name != "cellway:tenant:red"), "{:?}", names(&made));
    }

    #[test]
    fn a_namespace_of_two_is_nobodys() {
        let made = made(&[tenant("red", &["shop", "a"]), tenant("blue", &["shop"])], true);
        let bindings: Vec<_> = made.iter().filter(|one| one.kind == "RoleBinding").collect();
        assert_eq!(bindings.len(), 1);
        assert_eq!(bindings[0].namespace.as_deref(), Some("a"));
    }
}
