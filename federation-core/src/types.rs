//! Federated types: which hub kind stands for which member kind, and how far the member kind is understood.
//!
//! A type is data, made from a [`FederatedTypeConfig`]. Placement, masks, revisions and overrides treat every type alike;
//! a workload additionally has a pod template (and mostly a selector) that a cell's label, node selector and tolerations
//! go into. What is known of Kubernetes' own kinds is in one table here; any other kind counts as a plain object that is
//! ready when its `Ready` condition, should it have one, says so.

use kube::core::{ApiResource, GroupVersionKind};
use thiserror::Error;

use crate::api::{ApiResourceSpec, FederatedTypeConfig, FederatedTypeConfigSpec, Mode, Naming, Scope};
use crate::names::FEDERATION_NAMESPACE;

/// Group of every federated kind, unless its configuration says otherwise.
pub const FEDERATED_GROUP: &str = "types.kubefed.io";
/// Version of the multi-topology form, and the one that is stored.
pub const FEDERATED_VERSION: &str = "v1beta2";
/// KubeFed's version.
pub const KUBEFED_VERSION: &str = "v1beta1";
/// Annotation on a `FederatedTypeConfig`: `"true"` says that the target has `spec.selector.matchLabels` and a pod template
/// in `spec.template`, as a Deployment has, so that cells get workloads of their own.
pub const WORKLOAD_ANNOTATION: &str = "cellway.io/workload";

/// One federated kind at the hub and the kind that it becomes in members.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FederatedType {
    /// Hub group.
    pub group: String,
    /// Hub kind, for example `FederatedDeployment`.
    pub kind: String,
    /// Hub plural, for example `federateddeployments`.
    pub plural: String,
    /// Short names that kubectl takes, for example `fdeploy`.
    pub short_names: Vec<String>,
    /// What it becomes in members.
    pub target: TargetType,
    /// How an object of the target kind is known to be ready.
    pub readiness: Readiness,
    /// Whether the whole status of member objects is shown at the hub.
    pub collect_status: bool,
}

/// A member kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetType {
    /// API group; empty for the core group.
    pub group: String,
    /// API version.
    pub version: String,
    /// Kind.
    pub kind: String,
    /// Plural resource name.
    pub plural: String,
    /// Whether its objects lie in namespaces.
    pub namespaced: bool,
    /// Where its pods come from, for kinds that have some.
    pub workload: Option<Workload>,
    /// Whether an object's name says what it is (a namespace, a CRD): then no cell can have one of its own.
    pub fixed_name: bool,
}

/// Where a workload has what a cell adds to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// `spec.selector.matchLabels` and `spec.template`.
    Selected,
    /// `spec.template`; the selector is the API server's to make.
    Generated,
    /// `spec.jobTemplate.spec.template`.
    JobTemplate,
}

/// How an object of a kind is known to be ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    /// It is ready when it exists.
    Exists,
    /// `status.observedGeneration` has caught up and as many replicas are updated and available as were asked for.
    Replicas,
    /// As `Replicas`, for a kind that does not tell updated replicas apart.
    Available,
    /// Every node that is to have its pod has an updated and available one.
    Daemon,
    /// It has run to a good end: its condition `Complete` is true.
    Completed,
    /// Its condition of this name is true.
    Condition(&'static str),
    /// Its condition of this name, if it has one, is true.
    IfCondition(&'static str),
    /// `status.phase` is this.
    Phase(&'static str),
}

/// Why a configuration makes no type.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TypeError {
    /// A field that must say something is empty or cannot be a name.
    #[error("spec.{field} {value:?} cannot be a {what}: correct it")]
    Name {
        /// Which field.
        field: &'static str,
        /// What it says.
        value: String,
        /// What it should be.
        what: &'static str,
    },
    /// The target is one of the hub's own kinds.
    #[error("{target} is one of the federation's own kinds and cannot be federated")]
    Own {
        /// The kind.
        target: String,
    },
    /// Scopes that do not go together.
    #[error(
        "spec.federatedType.scope must be {wanted:?} for a target of this scope: objects of both lie side by side"
    )]
    Scope {
        /// What it should be.
        wanted: Scope,
    },
}

/// What is known of a kind: group, version, kind, plural, short name.
type Row = (&'static str, &'static str, &'static str, &'static str, &'static str, bool);

/// The types that come enabled: KubeFed's samples. The order is that of the printed definitions.
const BUILTIN: [Row; 13] = [
    ("apps", "v1", "Deployment", "deployments", "fdeploy", true),
    ("", "v1", "ConfigMap", "configmaps", "fcm", true),
    ("", "v1", "Namespace", "namespaces", "fns", false),
    ("", "v1", "Secret", "secrets", "fsecret", true),
    ("", "v1", "Service", "services", "fsvc", true),
    ("", "v1", "ServiceAccount", "serviceaccounts", "fsa", true),
    ("apps", "v1", "ReplicaSet", "replicasets", "frs", true),
    ("apps", "v1", "StatefulSet", "statefulsets", "fsts", true),
    ("apps", "v1", "DaemonSet", "daemonsets", "fds", true),
    ("batch", "v1", "Job", "jobs", "fjob", true),
    ("networking.k8s.io", "v1", "Ingress", "ingresses", "fing", true),
    ("rbac.authorization.k8s.io", "v1", "ClusterRole", "clusterroles", "fclusterrole", false),
    ("apiextensions.k8s.io", "v1", "CustomResourceDefinition", "customresourcedefinitions", "fcrd", false),
];

/// Groups whose kinds are the federation's own.
const OWN_GROUPS: [&str; 7] = [
    "core.kubefed.io",
    "types.kubefed.io",
    "scheduling.kubefed.io",
    "topology.cellway.io",
    "policy.cellway.io",
    "apps.cellway.io",
    "release.cellway.io",
];

/// The types that come enabled.
pub fn builtin() -> Vec<FederatedType> {
    BUILTIN
        .iter()
        .map(|(group, version, kind, plural, _, namespaced)| {
            FederatedType::of(group, version, kind, plural, *namespaced)
        })
        .collect()
}

/// A type that comes enabled, by what people call it: plural, kind or `plural.group`.
pub fn known(name: &str) -> Option<FederatedType> {
    let name = name.to_lowercase();
    builtin().into_iter().find(|of| {
        name == of.target.plural || name == of.target.kind.to_lowercase() || name == of.config_name()
    })
}

// === impl FederatedType ===

impl FederatedType {
    /// The type of a member kind, with KubeFed's names at the hub.
    pub fn of(group: &str, version: &str, kind: &str, plural: &str, namespaced: bool) -> Self {
        let short = BUILTIN.iter().find(|row| row.0 == group && row.2 == kind).map(|row| row.4.to_owned());
        let (workload, readiness) = understood(group, kind);
        Self {
            group: FEDERATED_GROUP.into(),
            kind: format!("Federated{kind}"),
            plural: format!("federated{plural}"),
            short_names: short.into_iter().collect(),
            target: TargetType {
                group: group.into(),
                version: version.into(),
                kind: kind.into(),
                plural: plural.into(),
                namespaced,
                workload,
                fixed_name: matches!(
                    (group, kind),
                    ("", "Namespace") | ("apiextensions.k8s.io", "CustomResourceDefinition")
                ),
            },
            readiness,
            collect_status: false,
        }
    }

    /// The type that a configuration asks for.
    pub fn from_config(config: &FederatedTypeConfig) -> Result<Self, TypeError> {
        let FederatedTypeConfigSpec { target_type: target, federated_type: federated, .. } = &config.spec;
        let plural = plural_of(target);
        if OWN_GROUPS.contains(&target.group.as_str()) {
            return Err(TypeError::Own { target: format!("{} of {}", target.kind, target.group) });
        }
        check("targetType.kind", &target.kind.to_lowercase(), "kind", is_label)?;
        check("targetType.pluralName", &plural, "plural resource name", is_label)?;
        check("targetType.version", &target.version, "version", is_label)?;
        if !target.group.is_empty() {
            check("targetType.group", &target.group, "group", is_subdomain)?;
        }
        check("federatedType.kind", &federated.kind.to_lowercase(), "kind", is_label)?;
        check("federatedType.pluralName", &plural_of(federated), "plural resource name", is_label)?;
        check("federatedType.group", &federated.group, "group with a dot", |group| {
            is_subdomain(group) && group.contains('.')
        })?;
        let mut of = Self::of(
            &target.group,
            &target.version,
            &target.kind,
            &plural,
            target.scope == Scope::Namespaced,
        );
        of.group.clone_from(&federated.group);
        of.kind.clone_from(&federated.kind);
        of.plural = plural_of(federated);
        of.collect_status = config.spec.status_collection == Some(Mode::Enabled);
        let marked = config.metadata.annotations.as_ref().and_then(|all| all.get(WORKLOAD_ANNOTATION));
        if marked.is_some_and(|value| value == "true") && of.target.workload.is_none() {
            of.target.workload = Some(Workload::Selected);
        }
        let wanted = if of.namespaced() { Scope::Namespaced } else { Scope::Cluster };
        if federated.scope != wanted {
            return Err(TypeError::Scope { wanted });
        }
        Ok(of)
    }

    /// The configuration that asks for this type.
    pub fn to_config(&self) -> FederatedTypeConfig {
        let scope = |namespaced| if namespaced { Scope::Namespaced } else { Scope::Cluster };
        let spec = FederatedTypeConfigSpec {
            target_type: self.target_spec(),
            propagation: Mode::Enabled,
            federated_type: ApiResourceSpec {
                group: self.group.clone(),
                version: KUBEFED_VERSION.into(),
                kind: self.kind.clone(),
                plural_name: self.plural.clone(),
                scope: scope(self.namespaced()),
            },
            status_type: None,
            status_collection: self.collect_status.then_some(Mode::Enabled),
        };
        let mut config = FederatedTypeConfig::new(&self.config_name(), spec);
        config.metadata.namespace = Some(FEDERATION_NAMESPACE.into());
        config
    }

    /// The member resource as configurations name it.
    pub fn target_spec(&self) -> ApiResourceSpec {
        ApiResourceSpec {
            group: self.target.group.clone(),
            version: self.target.version.clone(),
            kind: self.target.kind.clone(),
            plural_name: self.target.plural.clone(),
            scope: if self.target.namespaced { Scope::Namespaced } else { Scope::Cluster },
        }
    }

    /// Name of its configuration: `<target plural>.<target group>`.
    pub fn config_name(&self) -> String {
        if self.target.group.is_empty() {
            self.target.plural.clone()
        } else {
            format!("{}.{}", self.target.plural, self.target.group)
        }
    }

    /// Name of its CustomResourceDefinition at the hub.
    pub fn crd_name(&self) -> String {
        format!("{}.{}", self.plural, self.group)
    }

    /// The hub resource.
    pub fn hub_resource(&self) -> ApiResource {
        let gvk = GroupVersionKind::gvk(&self.group, FEDERATED_VERSION, &self.kind);
        ApiResource::from_gvk_with_plural(&gvk, &self.plural)
    }

    /// Whether hub objects lie in namespaces. They do where member objects do; and a namespace's own federated object lies
    /// in that namespace, as in KubeFed.
    pub fn namespaced(&self) -> bool {
        self.target.namespaced || self.is_namespace()
    }

    /// Whether it federates namespaces themselves.
    pub fn is_namespace(&self) -> bool {
        self.target.group.is_empty() && self.target.kind == "Namespace"
    }

    /// Whether it federates Secrets: what is in them is told to nobody.
    pub fn is_secret(&self) -> bool {
        self.target.group.is_empty() && self.target.kind == "Secret"
    }

    /// The namespace of member objects, given that of the hub object; empty for kinds without.
    pub fn target_namespace<'a>(&self, hub: &'a str) -> &'a str {
        if self.target.namespaced { hub } else { "" }
    }

    /// The namespace of the hub object, given that and the name that its mark in a member says.
    pub fn hub_namespace<'a>(&self, target: &'a str, name: &'a str) -> &'a str {
        if self.is_namespace() { name } else { target }
    }

    /// Where revisions of a hub object in `namespace` are stored.
    pub fn revision_namespace<'a>(&self, namespace: &'a str) -> &'a str {
        if self.namespaced() { namespace } else { FEDERATION_NAMESPACE }
    }

    /// Whether a cell has an object of its own.
    pub fn per_cell(&self, naming: Naming) -> bool {
        !self.target.fixed_name && (self.target.workload.is_some() || naming == Naming::PerUnit)
    }

    /// Whether objects have `spec.replicas`.
    pub fn has_replicas(&self) -> bool {
        matches!(self.readiness, Readiness::Replicas | Readiness::Available)
    }
}

// === impl TargetType ===

impl TargetType {
    /// The member resource.
    pub fn resource(&self) -> ApiResource {
        let gvk = GroupVersionKind::gvk(&self.group, &self.version, &self.kind);
        ApiResource::from_gvk_with_plural(&gvk, &self.plural)
    }

    /// `apiVersion` as it stands in objects.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }
}

fn understood(group: &str, kind: &str) -> (Option<Workload>, Readiness) {
    match (group, kind) {
        ("apps", "Deployment" | "StatefulSet") => (Some(Workload::Selected), Readiness::Replicas),
        ("apps", "ReplicaSet") => (Some(Workload::Selected), Readiness::Available),
        ("apps", "DaemonSet") => (Some(Workload::Selected), Readiness::Daemon),
        ("batch", "Job") => (Some(Workload::Generated), Readiness::Completed),
        ("batch", "CronJob") => (Some(Workload::JobTemplate), Readiness::Exists),
        ("apiextensions.k8s.io", "CustomResourceDefinition") => (None, Readiness::Condition("Established")),
        ("", "Namespace") => (None, Readiness::Phase("Active")),
        // Kubernetes' own kinds that have nothing to become ready; an Ingress or a Service may never get an address.
        ("" | "networking.k8s.io" | "rbac.authorization.k8s.io", _) => (None, Readiness::Exists),
        _ => (None, Readiness::IfCondition("Ready")),
    }
}

fn plural_of(resource: &ApiResourceSpec) -> String {
    if resource.plural_name.is_empty() {
        format!("{}s", resource.kind.to_lowercase())
    } else {
        resource.plural_name.clone()
    }
}

fn check(
    field: &'static str,
    value: &str,
    what: &'static str,
    good: impl Fn(&str) -> bool,
) -> Result<(), TypeError> {
    if good(value) { Ok(()) } else { Err(TypeError::Name { field, value: value.to_owned(), what }) }
}

/// An RFC 1123 label.
fn is_label(text: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&text.len()) && text.bytes().all(good) && !text.starts_with('-') && !text.ends_with('-')
}

/// An RFC 1123 subdomain.
fn is_subdomain(text: &str) -> bool {
    text.len() <= crate::names::MAX_OBJECT_NAME && text.split('.').all(is_label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configurations_round_trip() {
        for of in builtin() {
            assert_eq!(FederatedType::from_config(&of.to_config()).as_ref(), Ok(&of), "{}", of.kind);
            assert_eq!(known(&of.config_name()), Some(of.clone()));
            assert_eq!(known(&of.target.kind), Some(of));
        }
    }

    #[test]
    fn a_custom_resource_is_a_plain_object_unless_it_says_otherwise() {
        let mut config = FederatedType::of("example.com", "v1", "Widget", "widgets", true).to_config();
        let of = FederatedType::from_config(&config).expect("type");
        assert_eq!((of.crd_name().as_str(), of.target.workload), ("federatedwidgets.types.kubefed.io", None));
        assert_eq!(of.readiness, Readiness::IfCondition("Ready"));
        config.metadata.annotations = Some([(WORKLOAD_ANNOTATION.to_owned(), "true".to_owned())].into());
        config.spec.target_type.plural_name.clear();
        let of = FederatedType::from_config(&config).expect("type");
        assert_eq!((of.target.plural.as_str(), of.target.workload), ("widgets", Some(Workload::Selected)));
    }

    /// What `ReplicaSchedulingPreferenceSpec::target_kind` says.
    #[test]
    fn the_kinds_whose_replicas_are_divided() {
        let mut kinds: Vec<_> = builtin().into_iter().filter(FederatedType::has_replicas).collect();
        kinds.sort_by(|a, b| a.kind.cmp(&b.kind));
        let kinds: Vec<_> = kinds.iter().map(|of| of.kind.as_str()).collect();
        assert_eq!(kinds, ["FederatedDeployment", "FederatedReplicaSet", "FederatedStatefulSet"]);
        let mut config = FederatedType::of("example.com", "v1", "Widget", "widgets", true).to_config();
        config.metadata.annotations = Some([(WORKLOAD_ANNOTATION.to_owned(), "true".to_owned())].into());
        assert!(!FederatedType::from_config(&config).expect("type").has_replicas());
    }

    #[test]
    fn what_makes_no_type_is_told() {
        let refused = |change: &dyn Fn(&mut FederatedTypeConfigSpec), text: &str| {
            let mut config = FederatedType::of("example.com", "v1", "Widget", "widgets", true).to_config();
            change(&mut config.spec);
            let error = FederatedType::from_config(&config).expect_err("no type").to_string();
            assert!(error.contains(text), "{error}");
        };
        refused(&|spec| spec.target_type.kind = "Bad Kind".into(), "targetType.kind");
        refused(&|spec| spec.target_type.group = "a/b".into(), "targetType.group");
        refused(&|spec| spec.federated_type.group.clear(), "federatedType.group");
        refused(&|spec| spec.federated_type.scope = Scope::Cluster, "scope must be");
        refused(&|spec| spec.target_type.group = "core.kubefed.io".into(), "own kinds");
    }

    #[test]
    fn where_things_lie() {
        let of = |name: &str| known(name).expect(name);
        let namespace = of("namespaces");
        assert!(namespace.namespaced() && !namespace.target.namespaced);
        assert_eq!(namespace.target_namespace("shop"), "");
        assert_eq!(namespace.hub_namespace("", "shop"), "shop");
        let role = of("clusterroles.rbac.authorization.k8s.io");
        assert!(!role.namespaced());
        assert_eq!(role.revision_namespace(""), FEDERATION_NAMESPACE);
        assert!(!of("namespaces").per_cell(Naming::PerUnit));
        assert!(of("configmaps").per_cell(Naming::PerUnit) && !of("configmaps").per_cell(Naming::Shared));
        assert!(of("jobs").per_cell(Naming::Shared));
    }
}
