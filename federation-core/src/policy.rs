//! Native objects that are federated by a policy: which policy an object goes by, and the federated object, its
//! companion, that is made of the two.
//!
//! Of several policies that select an object one counts, whole:
//!
//! 1. the one that the object's annotation `cellway.io/policy` names;
//! 2. one of the object's own namespace before one of `kube-federation-system`;
//! 3. one that names the object before one that selects by label, before one that takes the kind;
//! 4. the older one; of two of the same age the one whose name sorts first.

use kube::ResourceExt as _;
use kube::core::{ObjectMeta, SelectorExt as _};
use serde_json::{Map, Value, json};

use crate::api::{FederatedSpec, Override, PolicyOverride, PropagationPolicy, ResourceSelector};
use crate::names::{
    ADOPT_ANNOTATION, DELETE_OPTION_ANNOTATION, FEDERATION_NAMESPACE, MADE_FROM_ANNOTATION,
    ORPHAN_ANNOTATION, POLICY_ANNOTATION, POLICY_LABEL, POLICY_MASK_ANNOTATION, SYSTEM_NAMESPACE,
    TENANT_ROLE_LABEL, UNREACHABLE_ANNOTATION, is_reserved,
};
use crate::render::strip_nulls;
use crate::topology::parse_selector;
use crate::types::FederatedType;

/// Namespaces whose objects are the system's own.
const SYSTEM_NAMESPACES: [&str; 5] =
    ["kube-system", "kube-public", "kube-node-lease", SYSTEM_NAMESPACE, FEDERATION_NAMESPACE];
/// What every API server makes for itself, by kind, namespace (empty: any) and name.
const MADE_BY_SERVERS: [(&str, &str, &str); 3] = [
    ("ConfigMap", "", "kube-root-ca.crt"),
    ("ServiceAccount", "", "default"),
    ("Service", "default", "kubernetes"),
];
/// On a Secret: it is a token of this cluster's API.
const TOKEN_OF: &str = "kubernetes.io/service-account.name";
/// On the roles that an API server keeps up itself.
const BOOTSTRAPPING: &str = "kubernetes.io/bootstrapping";
/// Kinds that a policy of any namespace enables, by group: what Kubernetes' own role `edit` writes beside the kinds that come
/// enabled. Whoever may write a kind's federated objects writes that kind in members, so what else there is (roles, a
/// vendor's kinds) is the platform's to enable.
const EVERYBODYS: [(&str, &str); 5] = [
    ("", "PersistentVolumeClaim"),
    ("autoscaling", "HorizontalPodAutoscaler"),
    ("batch", "CronJob"),
    ("networking.k8s.io", "NetworkPolicy"),
    ("policy", "PodDisruptionBudget"),
];
/// Annotations that say which volume of its own cluster a claim is bound to, and by whom: one that is bound to none there is
/// lost.
const BOUND: [&str; 4] = [
    "pv.kubernetes.io/",
    "volume.kubernetes.io/selected-node",
    "volume.kubernetes.io/storage-provisioner",
    "volume.beta.kubernetes.io/storage-provisioner",
];
/// Groups of cellway's own definitions.
const OWN_DEFINITIONS: [&str; 2] = [".kubefed.io", ".cellway.io"];
/// Annotations by which an object says how it is federated: orphaned, adopted, deleted.
const HANDED_ON: [&str; 4] =
    [ADOPT_ANNOTATION, DELETE_OPTION_ANNOTATION, ORPHAN_ANNOTATION, UNREACHABLE_ANNOTATION];

/// Annotations of a companion that are its policy's and its object's.
const MARKS: [&str; 7] = [
    ADOPT_ANNOTATION,
    DELETE_OPTION_ANNOTATION,
    ORPHAN_ANNOTATION,
    UNREACHABLE_ANNOTATION,
    POLICY_ANNOTATION,
    MADE_FROM_ANNOTATION,
    POLICY_MASK_ANNOTATION,
];
/// Fields of a companion's `spec` that are its policy's and its object's. The mask is one more, while the policy has one.
const FIELDS: [&str; 6] = ["topologyType", "template", "placement", "overrides", "naming", "retainReplicas"];

/// Which policy an object goes by.
#[derive(Debug)]
pub struct Choice<'a> {
    /// The one that counts.
    pub policy: &'a PropagationPolicy,
    /// Others that select the object and do not count, the next best first.
    pub overruled: Vec<&'a PropagationPolicy>,
}

/// How exactly a policy means an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Aim {
    Kind,
    Labels,
    Name,
    /// The object itself says so.
    Annotation,
}

/// Whether a selector speaks of a type.
pub fn speaks_of(selector: &ResourceSelector, of: &FederatedType) -> bool {
    group(selector) == of.target.group && selector.kind == of.target.kind
}

/// The API group that a selector speaks of.
pub fn group(selector: &ResourceSelector) -> &str {
    selector.api_version.split_once('/').map_or("", |(group, _)| group)
}

/// Whether a policy may have a kind that it speaks of federated which nobody has enabled or disabled: the platform's may, and
/// others where the kind is one that teams write.
pub fn may_enable(policy: &PropagationPolicy, selector: &ResourceSelector) -> bool {
    let is_everybodys = EVERYBODYS.contains(&(group(selector), selector.kind.as_str()));
    policy.metadata.deletion_timestamp.is_none() && (is_system(policy) || is_everybodys)
}

/// The policy that a native object goes by, if any.
pub fn choose<'a>(
    of: &FederatedType,
    object: &ObjectMeta,
    policies: impl IntoIterator<Item = &'a PropagationPolicy>,
) -> Option<Choice<'a>> {
    if !may_be_federated(of, object) {
        return None;
    }
    let mut aims: Vec<(Aim, &PropagationPolicy)> = policies
        .into_iter()
        .filter(|policy| policy.metadata.deletion_timestamp.is_none())
        .filter_map(|policy| Some((aim(of, object, policy)?, policy)))
        .collect();
    aims.sort_by_cached_key(|(aim, policy)| {
        (
            *aim != Aim::Annotation,
            is_system(policy),
            std::cmp::Reverse(*aim),
            policy.metadata.creation_timestamp.clone(),
            policy.name_any(),
        )
    });
    let mut best_first = aims.into_iter().map(|(_, policy)| policy);
    Some(Choice { policy: best_first.next()?, overruled: best_first.collect() })
}

fn is_system(policy: &PropagationPolicy) -> bool {
    policy.metadata.namespace.as_deref() == Some(FEDERATION_NAMESPACE)
}

/// What belongs to the system, or to another object that makes it, is nobody's to federate.
fn may_be_federated(of: &FederatedType, object: &ObjectMeta) -> bool {
    let kind = of.target.kind.as_str();
    let name = object.name.as_deref().unwrap_or_default();
    let owned = object.owner_references.iter().flatten().any(|owner| owner.controller == Some(true));
    // A namespace lies in itself here: its federated object does.
    let home = if of.is_namespace() { name } else { object.namespace.as_deref().unwrap_or_default() };
    let made = MADE_BY_SERVERS
        .iter()
        .any(|(of, place, called)| kind == *of && (place.is_empty() || home == *place) && name == *called);
    let labelled = |key| object.labels.as_ref().is_some_and(|all| all.contains_key(key));
    let the_systems = match kind {
        "Secret" => object.annotations.as_ref().is_some_and(|all| all.contains_key(TOKEN_OF)),
        "ClusterRole" => {
            name.starts_with("system:") || labelled(BOOTSTRAPPING) || labelled(TENANT_ROLE_LABEL)
        }
        "CustomResourceDefinition" => OWN_DEFINITIONS.iter().any(|group| name.ends_with(group)),
        _ => false,
    };
    let system = SYSTEM_NAMESPACES.contains(&home) || made || the_systems;
    !owned && !system && object.deletion_timestamp.is_none()
}

fn aim(of: &FederatedType, object: &ObjectMeta, policy: &PropagationPolicy) -> Option<Aim> {
    let system = is_system(policy);
    let home = object.namespace.as_deref();
    if !system && (home.is_none() || home != policy.metadata.namespace.as_deref()) {
        return None;
    }
    let of_kind = policy.spec.resources.iter().filter(|selector| speaks_of(selector, of));
    // Nor does an object that names a policy widen where that reaches.
    let mut of_kind = of_kind.filter(|selector| !system || reaches(selector, home)).peekable();
    of_kind.peek()?;
    let named = object.annotations.as_ref().and_then(|all| all.get(POLICY_ANNOTATION));
    if let Some(named) = named {
        // Whoever names a policy means that one and no other.
        return (*named == policy.name_any()).then_some(Aim::Annotation);
    }
    of_kind.filter_map(|selector| selects(selector, object)).max()
}

/// Whether a platform's policy speaks of a namespace.
fn reaches(selector: &ResourceSelector, home: Option<&str>) -> bool {
    let Some(namespaces) = &selector.namespaces else { return true };
    home.is_some_and(|home| namespaces.iter().any(|namespace| namespace == home))
}

fn selects(selector: &ResourceSelector, object: &ObjectMeta) -> Option<Aim> {
    let mut aim = Aim::Kind;
    if let Some(labels) = &selector.label_selector {
        let empty = Default::default();
        if !parse_selector(labels).ok()?.matches(object.labels.as_ref().unwrap_or(&empty)) {
            return None;
        }
        aim = Aim::Labels;
    }
    if let Some(name) = &selector.name {
        if object.name.as_ref() != Some(name) {
            return None;
        }
        aim = Aim::Name;
    }
    Some(aim)
}

/// What is wrong with a policy that nobody can see from its objects, but for kinds that are not federated.
pub fn complaints(policy: &PropagationPolicy, federated: &[&FederatedType]) -> Vec<String> {
    let mut complaints = Vec::new();
    for selector in &policy.spec.resources {
        let what = format!("{} {}", selector.api_version, selector.kind);
        let of = federated.iter().find(|of| speaks_of(selector, of));
        if of.is_some_and(|of| !of.target.namespaced && !is_system(policy)) {
            complaints
                .push(format!("{what} has no namespace: a policy for it lies in {FEDERATION_NAMESPACE}"));
        }
        if let Some(Err(error)) = selector.label_selector.as_ref().map(parse_selector) {
            complaints.push(format!("the labelSelector of {what} cannot be read: {error}"));
        }
    }
    complaints
}

/// The value of [`POLICY_LABEL`] on a policy's companions.
pub fn label(policy: &PropagationPolicy) -> String {
    // Labels are short; of two policies with one label the companions are listed together, no more.
    let mut label = policy.name_any();
    label.truncate(63);
    label.trim_end_matches(['-', '.']).to_owned()
}

/// The native object of a federated one, as a person finds it: `ConfigMap shop/settings`.
pub fn native_name(of: &FederatedType, namespace: &str, name: &str) -> String {
    let kind = &of.target.kind;
    if of.target.namespaced { format!("{kind} {namespace}/{name}") } else { format!("{kind} {name}") }
}

/// Whether a federated object is the companion of the native one of its name.
pub fn is_companion(of: &FederatedType, object: &ObjectMeta) -> bool {
    let name = object.name.as_deref().unwrap_or_default();
    let native = native_name(of, object.namespace.as_deref().unwrap_or_default(), name);
    let labelled = object.labels.as_ref().is_some_and(|all| all.contains_key(POLICY_LABEL));
    let made_from = object.annotations.as_ref().and_then(|all| all.get(MADE_FROM_ANNOTATION));
    labelled && made_from == Some(&native)
}

/// The companion, as it is made: the policy's placement around the object's content.
pub fn companion(of: &FederatedType, object: &Value, policy: &PropagationPolicy) -> Value {
    let meta = &object["metadata"];
    let spec = &policy.spec;
    let mut template = template(of, object);
    let own = |field: &str| -> Map<String, Value> {
        let kept = |key: &str| {
            !is_reserved(key)
                && key != "kubectl.kubernetes.io/last-applied-configuration"
                && key != "deployment.kubernetes.io/revision"
                && key != "deprecated.daemonset.template.generation"
                && key != "kubernetes.io/metadata.name"
                && !BOUND.iter().any(|bound| key.starts_with(bound))
        };
        let all = meta[field].as_object().into_iter().flatten();
        all.filter(|(key, _)| kept(key)).map(|(key, value)| (key.clone(), value.clone())).collect()
    };
    let (labels, annotations) = (own("labels"), own("annotations"));
    if !labels.is_empty() || !annotations.is_empty() {
        let mut metadata = Map::new();
        for (field, map) in [("labels", labels), ("annotations", annotations)] {
            if !map.is_empty() {
                metadata.insert(field.into(), Value::Object(map));
            }
        }
        template.insert("metadata".into(), Value::Object(metadata));
    }
    let meant =
        |one: &&PolicyOverride| one.kinds.as_ref().is_none_or(|kinds| kinds.contains(&of.target.kind));
    let overrides: Vec<Override> = spec
        .overrides
        .iter()
        .filter(meant)
        .map(|one| Override {
            units: one.units.clone(),
            unit_selector: one.unit_selector.clone(),
            patches: one.patches.clone(),
        })
        .collect();
    let resource = of.hub_resource();
    let mut marks = handed_on(meta);
    marks.insert(POLICY_ANNOTATION.into(), full_name(policy).into());
    let text = |field: &str| meta[field].as_str().unwrap_or_default();
    let native = native_name(of, text("namespace"), text("name"));
    marks.insert(MADE_FROM_ANNOTATION.into(), native.into());
    if spec.placement_mask.is_some() {
        marks.insert(POLICY_MASK_ANNOTATION.into(), "true".into());
    }
    let mut result = json!({
        "apiVersion": resource.api_version,
        "kind": of.kind,
        "metadata": {
            "name": meta["name"],
            "labels": {POLICY_LABEL: label(policy)},
            "annotations": marks,
        },
        "spec": {
            "topologyType": spec.topology_type,
            "template": template,
            "placement": spec.placement,
            "overrides": overrides,
            "naming": spec.naming,
            "retainReplicas": spec.retain_replicas,
        },
    });
    if let Some(mask) = &spec.placement_mask {
        result["spec"]["placementMask"] = json!(mask);
    }
    // Neither a member nor a comparison sees them.
    strip_nulls(&mut result["spec"]["template"]);
    result
}

/// Whether a companion asks for what it is to ask for. What its policy does not say (how many revisions are kept, a mask where
/// the policy has none) is whoever's who wrote it.
pub fn is_right(companion: &Value, wanted: &Value) -> bool {
    let spec = |of: &Value| serde_json::from_value::<FederatedSpec>(of["spec"].clone()).ok();
    let (Some(found), Some(asked)) = (spec(companion), spec(wanted)) else { return false };
    mark_label(companion) == mark_label(wanted)
        && MARKS.iter().all(|key| mark(companion, key) == mark(wanted, key))
        && found.topology_type == asked.topology_type
        && found.template == asked.template
        && found.placement == asked.placement
        && found.overrides == asked.overrides
        && found.naming == asked.naming
        && found.retain_replicas == asked.retain_replicas
        && (asked.placement_mask.is_none() || found.placement_mask == asked.placement_mask)
}

/// The merge patch (RFC 7396) that makes a companion right: of what its policy and its object say nothing is left as somebody
/// else made it. It holds for this state of the companion only.
pub fn correction(companion: &Value, wanted: &Value) -> Value {
    let mut spec = companion["spec"].as_object().cloned().unwrap_or_default();
    for field in FIELDS {
        spec.insert(field.into(), wanted["spec"][field].clone());
    }
    match wanted["spec"].get("placementMask") {
        Some(mask) => {
            spec.insert("placementMask".into(), mask.clone());
        }
        // It was the policy's.
        None if mark(companion, POLICY_MASK_ANNOTATION).is_some() => {
            spec.remove("placementMask");
        }
        None => {}
    }
    let mut marks = Map::new();
    for key in MARKS {
        let (found, asked) = (mark(companion, key), mark(wanted, key));
        if found != asked {
            marks.insert(key.into(), asked.cloned().unwrap_or_default());
        }
    }
    let meta = &companion["metadata"];
    json!({
        "metadata": {
            "uid": meta["uid"],
            "resourceVersion": meta["resourceVersion"],
            "labels": {POLICY_LABEL: mark_label(wanted)},
            "annotations": marks,
        },
        "spec": difference(&companion["spec"], &Value::Object(spec)),
    })
}

/// What makes one of the other as a merge patch; neither has nulls.
fn difference(from: &Value, to: &Value) -> Value {
    let (Value::Object(from), Value::Object(to)) = (from, to) else { return to.clone() };
    let gone = from.keys().filter(|key| !to.contains_key(*key)).map(|key| (key.clone(), Value::Null));
    let set = to.iter().filter(|(key, value)| from.get(*key) != Some(value));
    let set = set.map(|(key, value)| (key.clone(), difference(from.get(key).unwrap_or(&Value::Null), value)));
    Value::Object(gone.chain(set).collect())
}

fn mark<'a>(object: &'a Value, key: &str) -> Option<&'a Value> {
    object["metadata"]["annotations"].get(key)
}

fn mark_label(object: &Value) -> Option<&Value> {
    object["metadata"]["labels"].get(POLICY_LABEL)
}

/// Annotations of a native object that its companion has too. `meta`: the object's metadata.
pub fn handed_on(meta: &Value) -> Map<String, Value> {
    let all = HANDED_ON.into_iter();
    all.filter_map(|key| Some((key.to_owned(), meta["annotations"].get(key)?.clone()))).collect()
}

/// `namespace/name` of a policy.
pub fn full_name(policy: &PropagationPolicy) -> String {
    format!("{}/{}", policy.namespace().unwrap_or_default(), policy.name_any())
}

/// The object's content, without what the hub's API server has put in for this one cluster.
fn template(of: &FederatedType, object: &Value) -> Map<String, Value> {
    let mut template = object.as_object().cloned().unwrap_or_default();
    for key in ["apiVersion", "kind", "metadata", "status"] {
        template.remove(key);
    }
    let remove: &[&str] = match (of.target.group.as_str(), of.target.kind.as_str()) {
        ("", "Service") => &["clusterIP", "clusterIPs", "healthCheckNodePort", "ipFamilies"],
        ("", "PersistentVolumeClaim") => &["volumeName"],
        ("", "Namespace") => &["finalizers"],
        // The API server of each member makes its own, unless the object says otherwise.
        ("batch", "Job") if object["spec"]["manualSelector"] != true => &["selector"],
        _ => &[],
    };
    if let Some(spec) = template.get_mut("spec").and_then(Value::as_object_mut) {
        // A headless service says so.
        let headless = spec.get("clusterIP").is_some_and(|ip| ip == "None");
        for key in remove.iter().filter(|key| !headless || !key.starts_with("clusterIP")) {
            spec.remove(*key);
        }
        // What every cluster has by itself, of whichever family.
        if spec.get("ipFamilyPolicy").is_some_and(|policy| policy == "SingleStack") {
            spec.remove("ipFamilyPolicy");
        }
        if remove.contains(&"selector")
            && let Some(labels) = spec
                .get_mut("template")
                .and_then(|template| template.pointer_mut("/metadata/labels"))
                .and_then(Value::as_object_mut)
        {
            labels.retain(|key, _| !key.ends_with("controller-uid") && !key.ends_with("job-name"));
        }
    }
    template
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types;

    fn policy(namespace: &str, name: &str, selector: Value) -> PropagationPolicy {
        let mut selectors = vec![json!({"apiVersion": "v1", "kind": "ConfigMap"})];
        if !selector.is_null() {
            for (key, value) in selector.as_object().expect("a map") {
                selectors[0][key] = value.clone();
            }
        }
        serde_json::from_value(json!({
            "apiVersion": "policy.cellway.io/v1alpha1", "kind": "PropagationPolicy",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"resources": selectors, "placement": {"units": [{"name": "a"}]}},
        }))
        .expect("a policy")
    }

    fn config_maps() -> FederatedType {
        types::builtin().into_iter().find(|of| of.target.kind == "ConfigMap").expect("known")
    }

    fn meta(value: Value) -> ObjectMeta {
        let mut whole = json!({"name": "settings", "namespace": "shop"});
        for (key, value) in value.as_object().into_iter().flatten() {
            whole[key] = value.clone();
        }
        serde_json::from_value(whole).expect("metadata")
    }

    fn check(object: Value, policies: &[PropagationPolicy], expect: Option<&str>) {
        let found = choose(&config_maps(), &meta(object.clone()), policies).map(|all| all.policy.name_any());
        assert_eq!(found.as_deref(), expect, "{object}");
    }

    #[test]
    fn the_policy_that_means_the_object_most_exactly_counts() {
        let labels = json!({"labelSelector": {"matchLabels": {"app": "web"}}});
        let all = [
            policy("shop", "kind", Value::Null),
            policy("shop", "labels", labels),
            policy("shop", "name", json!({"name": "named"})),
            policy("kube-federation-system", "platform", json!({"name": "settings"})),
            policy("other", "elsewhere", json!({"name": "settings"})),
        ];
        check(json!({}), &all, Some("kind"));
        check(json!({"labels": {"app": "web"}}), &all, Some("labels"));
        check(json!({"name": "named", "labels": {"app": "web"}}), &all, Some("name"));
        check(json!({"annotations": {"cellway.io/policy": "platform"}}), &all, Some("platform"));
        check(json!({"annotations": {"cellway.io/policy": "nobody"}}), &all, None);
        check(json!({"annotations": {"cellway.io/policy": "elsewhere"}}), &all, None);
        check(json!({}), &all[3..], Some("platform"));
        check(json!({}), &all[4..], None);
        let chosen = choose(&config_maps(), &meta(json!({"labels": {"app": "web"}})), &all).expect("chosen");
        let overruled: Vec<_> = chosen.overruled.iter().map(|policy| full_name(policy)).collect();
        assert_eq!(overruled, ["shop/kind", "kube-federation-system/platform"]);
    }

    #[test]
    fn of_two_alike_the_older_one_counts() {
        let mut one = policy("shop", "a", Value::Null);
        let mut two = policy("shop", "b", Value::Null);
        check(json!({}), &[two.clone(), one.clone()], Some("a"));
        let time = |text: &str| serde_json::from_value(json!(text)).expect("a time");
        one.metadata.creation_timestamp = Some(time("2026-11-22T00:00:01Z"));
        two.metadata.creation_timestamp = Some(time("2026-11-22T00:00:00Z"));
        check(json!({}), &[one, two], Some("b"));
    }

    #[test]
    fn what_is_the_systems_is_left_alone() {
        let platform = [policy("kube-federation-system", "all", Value::Null)];
        check(json!({}), &platform, Some("all"));
        check(json!({"name": "kube-root-ca.crt"}), &platform, None);
        for (kind, own, name) in [
            ("ServiceAccount", "default", "builder"),
            ("ClusterRole", "system:node", "reader"),
            ("CustomResourceDefinition", "cells.topology.cellway.io", "widgets.example.com"),
        ] {
            let of = types::builtin().into_iter().find(|of| of.target.kind == kind).expect("known");
            assert!(!may_be_federated(&of, &meta(json!({"name": own}))), "{own}");
            assert!(may_be_federated(&of, &meta(json!({"name": name}))), "{name}");
        }
        check(json!({"namespace": "kube-system"}), &platform, None);
        let owner = json!([{"apiVersion": "v1", "kind": "X", "name": "x", "uid": "u", "controller": true}]);
        check(json!({"ownerReferences": owner}), &platform, None);
        check(json!({"deletionTimestamp": "2026-11-22T00:00:00Z"}), &platform, None);
        let one = [policy("kube-federation-system", "one", json!({"namespaces": ["bank"]}))];
        check(json!({}), &one, None);
        check(json!({"annotations": {"cellway.io/policy": "one"}}), &one, None);
        check(json!({"namespace": "bank"}), &one, Some("one"));
    }

    #[test]
    fn complaints_name_what_to_do() {
        let types = types::builtin();
        let federated: Vec<_> = types.iter().collect();
        let mut policy = policy("shop", "p", Value::Null);
        assert_eq!(complaints(&policy, &federated), Vec::<String>::new());
        let selector = |value: Value| serde_json::from_value(value).expect("a selector");
        policy.spec.resources = vec![
            selector(json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole"})),
            selector(json!({"apiVersion": "v1", "kind": "Secret",
                "labelSelector": {"matchExpressions": [{"key": "a", "operator": "Near"}]}})),
        ];
        let found = complaints(&policy, &federated);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("a policy for it lies in kube-federation-system"), "{found:?}");
    }

    #[test]
    fn the_platform_has_any_kind_enabled_and_teams_what_teams_write() {
        let may = |namespace: &str, api_version: &str, kind: &str, going: bool| {
            let mut policy = policy(namespace, "p", Value::Null);
            let at = || serde_json::from_value(json!("2026-11-22T00:00:00Z")).expect("a time");
            policy.metadata.deletion_timestamp = going.then(at);
            let selector = ResourceSelector {
                api_version: api_version.into(),
                kind: kind.into(),
                ..ResourceSelector::default()
            };
            may_enable(&policy, &selector)
        };
        let (platform, team) = ("kube-federation-system", "shop");
        assert!(may(platform, "example.com/v1", "Widget", false));
        assert!(!may(platform, "example.com/v1", "Widget", true));
        assert!(!may(team, "example.com/v1", "Widget", false));
        assert!(!may(team, "rbac.authorization.k8s.io/v1", "RoleBinding", false));
        assert!(may(team, "batch/v1", "CronJob", false));
        assert!(!may(team, "example.com/v1", "CronJob", false));
    }

    #[test]
    fn a_companion_has_the_objects_content_and_the_policys_placement() {
        let mut policy = policy("shop", "p", Value::Null);
        policy.spec.placement_mask = Some(Default::default());
        let patched = |kinds: Option<&str>, units: &str| PolicyOverride {
            kinds: kinds.map(|kind| vec![kind.to_owned()]),
            units: Some(vec![units.to_owned()]),
            ..PolicyOverride::default()
        };
        policy.spec.overrides =
            vec![patched(None, "all"), patched(Some("Deployment"), "no"), patched(Some("ConfigMap"), "yes")];
        let object = json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "settings", "namespace": "shop", "uid": "u-1", "resourceVersion": "7",
                "labels": {"app": "web"}, "managedFields": [],
                "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}", "kubefed.io/orphan": "true"}},
            "data": {"k": "v"},
        });
        let found = companion(&config_maps(), &object, &policy);
        assert_eq!(found["kind"], "FederatedConfigMap");
        assert_eq!(
            found["spec"]["template"],
            json!({"metadata": {"labels": {"app": "web"}}, "data": {"k": "v"}})
        );
        assert_eq!(found["spec"]["placement"], json!({"units": [{"name": "a"}]}));
        assert_eq!(found["spec"]["placementMask"], json!({"units": []}));
        let meant: Vec<_> =
            found["spec"]["overrides"].as_array().into_iter().flatten().map(|one| &one["units"][0]).collect();
        assert_eq!(meant, ["all", "yes"]);
        assert_eq!(
            found["metadata"]["annotations"],
            json!({"kubefed.io/orphan": "true", "cellway.io/policy": "shop/p", "cellway.io/policy-mask": "true",
                "cellway.io/made-from": "ConfigMap shop/settings"})
        );
        assert_eq!(found["metadata"]["labels"], json!({"cellway.io/policy": "p"}));
    }

    /// As an API server merges (RFC 7396).
    fn merged(mut target: Value, patch: &Value) -> Value {
        let Value::Object(patch) = patch else { return patch.clone() };
        if !target.is_object() {
            target = json!({});
        }
        for (key, value) in patch {
            if value.is_null() {
                target.as_object_mut().expect("a map").remove(key);
            } else {
                target[key] = merged(target[key].take(), value);
            }
        }
        target
    }

    #[test]
    fn what_somebody_changed_in_a_companion_is_put_back_whole() {
        let object =
            json!({"metadata": {"name": "settings", "namespace": "shop"}, "data": {"k": "v", "null": null}});
        let plain = policy("shop", "p", Value::Null);
        let wanted = companion(&config_maps(), &object, &plain);
        let mut masked = plain.clone();
        masked.spec.placement_mask = Some(Default::default());
        let mut masked = companion(&config_maps(), &object, &masked);
        masked["metadata"]["uid"] = "u".into();
        let changed = |pointer: &str, value: Value| {
            let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
            let mut found = wanted.clone();
            found["metadata"]["resourceVersion"] = "7".into();
            found.pointer_mut(parent).expect("there")[key.replace("~1", "/")] = value;
            found
        };
        // What the policy does not say.
        for (pointer, value) in [
            ("/status", json!({"summary": "1 unit"})),
            ("/spec/revisionHistoryLimit", json!(3)),
            ("/spec/placementMask", json!({"units": ["a"]})),
            ("/metadata/annotations/other", json!("1")),
        ] {
            let found = changed(pointer, value);
            assert!(is_right(&found, &wanted), "{pointer}");
            assert_eq!(correction(&found, &wanted)["spec"], json!({}), "{pointer}");
        }
        // What it says, and its object.
        for (pointer, value) in [
            ("/spec/placement/units", json!([{"name": "a"}, {"name": "b"}])),
            ("/spec/placement/unitSelector", json!({})),
            ("/spec/template/data", json!({"k": "v", "more": "w"})),
            ("/spec/template/binaryData", json!({"k": "dg=="})),
            ("/spec/template", json!("rubbish")),
            ("/spec/overrides", json!([{"units": ["a"], "patches": []}])),
            ("/spec/topologyType", json!("cluster")),
            ("/spec/retainReplicas", json!(true)),
            ("/metadata/annotations/kubefed.io~1orphan", json!("true")),
            ("/metadata/annotations/cellway.io~1policy", json!("shop/other")),
            ("/metadata/labels", json!({})),
        ] {
            let found = changed(pointer, value);
            assert!(!is_right(&found, &wanted), "{pointer}");
            let patch = correction(&found, &wanted);
            assert_eq!(patch["metadata"]["resourceVersion"], "7");
            let mut put_right = merged(found, &patch);
            put_right["metadata"].as_object_mut().expect("a map").remove("resourceVersion");
            assert_eq!(put_right, wanted, "{pointer}");
        }
        // The policy's mask comes and goes with it.
        for (found, wanted) in [(&wanted, &masked), (&masked, &wanted)] {
            assert!(!is_right(found, wanted));
            let put_right = merged(found.clone(), &correction(found, wanted));
            assert!(is_right(&put_right, wanted), "{put_right}");
            assert_eq!(put_right["spec"], wanted["spec"]);
        }
    }

    #[test]
    fn a_copy_of_a_companion_is_nobodys() {
        let object = json!({"metadata": {"name": "settings", "namespace": "shop"}, "data": {"k": "v"}});
        let of = config_maps();
        let made = companion(&of, &object, &policy("shop", "p", Value::Null));
        let check = |change: fn(&mut Value), expect: bool| {
            let mut meta = made["metadata"].clone();
            meta["namespace"] = "shop".into();
            change(&mut meta);
            let meta: ObjectMeta = serde_json::from_value(meta).expect("metadata");
            assert_eq!(is_companion(&of, &meta), expect, "{meta:?}");
        };
        check(|_| (), true);
        check(|meta| meta["name"] = "copy".into(), false);
        check(|meta| meta["namespace"] = "bank".into(), false);
        check(|meta| meta["annotations"] = json!({}), false);
        check(|meta| meta["labels"] = json!({}), false);
        let namespaces = types::builtin().into_iter().find(FederatedType::is_namespace).expect("known");
        assert_eq!(native_name(&namespaces, "shop", "shop"), "Namespace shop");
    }

    #[test]
    fn what_the_hub_put_in_for_itself_stays_there() {
        let of = |kind: &str| types::builtin().into_iter().find(|of| of.target.kind == kind).expect("known");
        let service = json!({"spec": {"clusterIP": "10.0.0.7", "clusterIPs": ["10.0.0.7"], "ports": [{"port": 80}],
            "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack"}});
        assert_eq!(json!(template(&of("Service"), &service)), json!({"spec": {"ports": [{"port": 80}]}}));
        let headless = json!({"spec": {"clusterIP": "None"}});
        assert_eq!(json!(template(&of("Service"), &headless)), headless);
        let job = json!({"spec": {"selector": {"matchLabels": {"controller-uid": "u"}},
            "template": {"metadata": {"labels": {"app": "x", "batch.kubernetes.io/controller-uid": "u", "job-name": "j"}}}}});
        assert_eq!(
            json!(template(&of("Job"), &job)),
            json!({"spec": {"template": {"metadata": {"labels": {"app": "x"}}}}})
        );
        // A claim that is bound at the hub is not yet in a member.
        let claims = FederatedType::of("", "v1", "PersistentVolumeClaim", "persistentvolumeclaims", true);
        let claim = json!({"metadata": {"name": "data", "namespace": "shop", "annotations": {"team": "one",
                "pv.kubernetes.io/bind-completed": "yes", "volume.kubernetes.io/selected-node": "hub-1",
                "volume.kubernetes.io/storage-provisioner": "csi"}},
            "spec": {"volumeName": "pv-7", "accessModes": ["ReadWriteOnce"]}});
        let made = companion(&claims, &claim, &policy("shop", "p", Value::Null));
        let expect =
            json!({"metadata": {"annotations": {"team": "one"}}, "spec": {"accessModes": ["ReadWriteOnce"]}});
        assert_eq!(made["spec"]["template"], expect);
    }
}
