//! What is served: one [`Resource`] per group, version and plural, in a [`Catalog`] that CRDs change at run time.

use std::collections::BTreeMap;
use std::sync::Arc;

use federation_store::Revision;
use parking_lot::RwLock;
use serde_json::Value;
use tokio::sync::watch;

use crate::config::Converter;
use crate::schema::RootType;

/// A served resource in one version.
#[derive(Clone, Debug)]
pub struct Resource {
    /// "" for the core group.
    pub group: String,
    pub version: String,
    pub kind: String,
    pub list_kind: String,
    pub plural: String,
    pub singular: String,
    pub short_names: Vec<String>,
    pub categories: Vec<String>,
    pub namespaced: bool,
    /// The status is written through `/status` only.
    pub status: bool,
    pub scale: Option<ScalePaths>,
    /// Pods: `/log` and `/binding`.
    pub pod: bool,
    /// Other than status and metadata changes count in `metadata.generation`.
    pub generation: bool,
    pub schema: RootType,
    pub origin: Origin,
    /// Converts between this version and the stored one; without one they differ in their `apiVersion` only.
    pub converter: Option<Converter>,
    /// The same by a webhook.
    pub(crate) webhook: Option<Arc<crate::crd::conversion::Webhook>>,
    /// `<group>/<version>` that objects are stored in.
    pub storage_api_version: String,
}

/// Where a resource comes from.
#[derive(Clone, Debug)]
pub enum Origin {
    /// One of the built-in kinds, with the name of its definition.
    Builtin { definition: &'static str },
    /// A CustomResourceDefinition.
    Custom(Arc<CustomInfo>),
}

/// What a CRD says about one version beyond what [`Resource`] holds.
#[derive(Debug)]
pub struct CustomInfo {
    /// Name of the CRD object.
    pub crd: String,
    /// `openAPIV3Schema` as written.
    pub schema: Option<Value>,
    /// The schemas of all versions, which decide what is left of a stored object when it is read.
    pub(crate) forms: Arc<crate::crd::forms::Forms>,
    /// `additionalPrinterColumns` as written.
    pub columns: Vec<Value>,
    /// JSON paths that may be used in field selectors, with the leading dot.
    pub selectable_fields: Vec<String>,
    /// Deprecation warning of this version, "" when it is not deprecated.
    pub warning: String,
    /// Not yet established, or being deleted: served for reading only.
    pub terminating: bool,
    /// `x-kubernetes-validations` of the schema, compiled.
    pub(crate) rules: Option<crate::crd::rules::Validator>,
}

/// JSON paths of the scale subresource (`.spec.replicas`).
#[derive(Clone, Debug)]
pub struct ScalePaths {
    pub spec_replicas: Vec<String>,
    pub status_replicas: Vec<String>,
    pub label_selector: Option<Vec<String>>,
}

/// All that is served at one moment.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    resources: BTreeMap<(String, String, String), Arc<Resource>>,
}

/// The current catalog.
#[derive(Debug, Default)]
pub struct CatalogHandle {
    current: RwLock<Arc<Catalog>>,
    /// Definitions are served as they were at this revision, if not as they are since. Told whenever the catalog changes.
    followed: watch::Sender<Revision>,
}

// === impl Resource ===

impl Resource {
    /// `apps/v1`, or `v1` in the core group.
    pub fn api_version(&self) -> String {
        api_version(&self.group, &self.version)
    }

    /// Tells the schemas apart that decide what is left of an object when it is read; 0 where none do.
    pub(crate) fn forms_id(&self) -> u32 {
        match &self.origin {
            Origin::Custom(info) => info.forms.id(),
            _ => 0,
        }
    }

    /// Is it defined by a CRD?
    pub fn is_custom(&self) -> bool {
        matches!(self.origin, Origin::Custom(_))
    }

    /// The group as it appears in keys: never empty.
    fn key_group(&self) -> &str {
        // Both event APIs are one set of objects.
        if self.group.is_empty() || self.plural == "events" { "core" } else { &self.group }
    }

    pub(crate) fn is_stored_version(&self) -> bool {
        self.storage_api_version == self.api_version()
    }

    /// Is it the same kind of objects, in whatever version?
    pub(crate) fn is_same_kind(&self, other: &Self) -> bool {
        self.plural == other.plural && self.key_group() == other.key_group()
    }

    /// Key prefix of all objects, or those of one namespace. Ends with a slash.
    pub fn prefix(&self, namespace: &str) -> String {
        if namespace.is_empty() {
            format!("/registry/{}/{}/", self.key_group(), self.plural)
        } else {
            format!("/registry/{}/{}/{namespace}/", self.key_group(), self.plural)
        }
    }

    /// Key of one object.
    pub fn key(&self, namespace: &str, name: &str) -> String {
        if self.namespaced {
            format!("/registry/{}/{}/{namespace}/{name}", self.key_group(), self.plural)
        } else {
            format!("/registry/{}/{}/{name}", self.key_group(), self.plural)
        }
    }

    /// Is what is stored with this apiVersion what clients get, but for the resourceVersion and, of custom objects, for what
    /// their schema says by now?
    pub(crate) fn is_verbatim(&self, stored: &[u8]) -> bool {
        let (group, version) = match stored.iter().position(|b| *b == b'/') {
            Some(slash) => (&stored[..slash], &stored[slash + 1..]),
            None => (&b""[..], stored),
        };
        // A converter leaves those of its own version as they are.
        group == self.group.as_bytes() && version == self.version.as_bytes()
    }

    /// Is this the events.k8s.io form of events, which are stored in the core form?
    pub fn is_new_event(&self) -> bool {
        self.group == "events.k8s.io" && self.plural == "events"
    }
}

/// `group/version`, without the slash in the core group.
pub fn api_version(group: &str, version: &str) -> String {
    if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") }
}

/// Splits `group/version`.
pub fn split_api_version(text: &str) -> (&str, &str) {
    text.split_once('/').unwrap_or(("", text))
}

// === impl ScalePaths ===

impl ScalePaths {
    /// Parses a simple JSON path (`.spec.replicas`) into its keys.
    pub fn parse(path: &str) -> Option<Vec<String>> {
        let rest = path.strip_prefix('.')?;
        let keys: Vec<String> = rest.split('.').map(str::to_owned).collect();
        (!keys.iter().any(String::is_empty)).then_some(keys)
    }
}

// === impl Catalog ===

impl Catalog {
    /// A catalog of these resources.
    pub fn new(resources: impl IntoIterator<Item = Resource>) -> Self {
        let resources = resources
            .into_iter()
            .map(|r| ((r.group.clone(), r.version.clone(), r.plural.clone()), Arc::new(r)))
            .collect();
        Self { resources }
    }

    /// A resource by its path.
    pub fn get(&self, group: &str, version: &str, plural: &str) -> Option<Arc<Resource>> {
        self.resources.get(&(group.to_owned(), version.to_owned(), plural.to_owned())).cloned()
    }

    /// A resource by kind.
    pub fn by_kind(&self, group: &str, version: &str, kind: &str) -> Option<Arc<Resource>> {
        self.iter().find(|r| r.group == group && r.version == version && r.kind == kind).cloned()
    }

    /// A resource by the group and plural of a key, in the version that is stored where that is served.
    pub fn by_key(&self, key_group: &str, plural: &str) -> Option<Arc<Resource>> {
        let mut found = self.iter().filter(|r| r.key_group() == key_group && r.plural == plural);
        let first = found.next()?;
        let stored = std::iter::once(first).chain(found).find(|r| r.is_stored_version());
        Some(stored.unwrap_or(first).clone())
    }

    /// All resources, by group, version and plural.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.resources.values()
    }

    /// One resource per stored kind (not one per version), in the version that is stored where that is served.
    pub fn stored(&self) -> Vec<Arc<Resource>> {
        let mut kinds: BTreeMap<(&str, &str), &Arc<Resource>> = BTreeMap::new();
        for resource in self.iter() {
            let known = kinds.entry((resource.key_group(), &resource.plural)).or_insert(resource);
            if resource.is_stored_version() {
                *known = resource;
            }
        }
        kinds.into_values().cloned().collect()
    }

    /// Groups with their versions, most preferred first; the core group is left out.
    pub fn groups(&self) -> Vec<(String, Vec<String>)> {
        let mut groups: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for resource in self.iter().filter(|r| !r.group.is_empty()) {
            let versions = groups.entry(resource.group.clone()).or_default();
            if !versions.contains(&resource.version) {
                versions.push(resource.version.clone());
            }
        }
        // Groups that are served without objects of their own.
        for (group, version) in super::reviews::GROUPS {
            groups.entry((*group).to_owned()).or_insert_with(|| vec![(*version).to_owned()]);
        }
        for versions in groups.values_mut() {
            versions.sort_by_key(|v| std::cmp::Reverse(version_priority(v)));
        }
        let mut list: Vec<(String, Vec<String>)> = groups.into_iter().collect();
        // Built-in groups first, then custom ones, each in order.
        list.sort_by_key(|(g, _)| (!is_builtin_group(g), g.clone()));
        list
    }

    /// Is anything served in this group and version?
    pub fn serves(&self, group: &str, version: &str) -> bool {
        self.iter().any(|r| r.group == group && r.version == version)
            || super::reviews::GROUPS.contains(&(group, version))
    }
}

fn is_builtin_group(group: &str) -> bool {
    group.is_empty() || !group.contains('.') || group.ends_with(".k8s.io")
}

/// Kubernetes' order of versions: GA before beta before alpha, newer before older, others last.
pub fn version_priority(version: &str) -> (u8, u32, u32) {
    let parse = || -> Option<(u8, u32, u32)> {
        let rest = version.strip_prefix('v')?;
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let major: u32 = rest[..digits].parse().ok()?;
        let tail = &rest[digits..];
        if tail.is_empty() {
            Some((3, major, 0))
        } else if let Some(minor) = tail.strip_prefix("beta") {
            Some((2, major, minor.parse().ok()?))
        } else {
            Some((1, major, tail.strip_prefix("alpha")?.parse().ok()?))
        }
    };
    parse().unwrap_or((0, 0, 0))
}

// === impl CatalogHandle ===

impl CatalogHandle {
    /// What is served now.
    pub fn current(&self) -> Arc<Catalog> {
        self.current.read().clone()
    }

    /// Serves something else from now on.
    pub fn replace(&self, catalog: Catalog) {
        let now = Arc::new(catalog);
        let former = std::mem::replace(&mut *self.current.write(), now.clone());
        for old in former.iter() {
            let Origin::Custom(was) = &old.origin else { continue };
            let Some(new) = now.get(&old.group, &old.version, &old.plural) else { continue };
            // Names and conditions make it another state of the definition, too, by which the objects look as before.
            if let Origin::Custom(is) = &new.origin
                && is.forms.id() != was.forms.id()
                && (is.schema != was.schema || new.storage_api_version != old.storage_api_version)
            {
                was.forms.supersede();
            }
        }
        self.followed.send_modify(|_| ());
    }

    /// Serves these, too, or in the place of what was there by their names.
    pub(crate) fn add(&self, resources: impl IntoIterator<Item = Resource>) {
        let mut catalog = Catalog::clone(&self.current());
        catalog.resources.extend(Catalog::new(resources).resources);
        self.replace(catalog);
    }

    /// Nothing is missing that definitions made served up to this revision.
    pub(crate) fn note_followed(&self, revision: Revision) {
        self.followed.send_replace(revision);
    }

    /// The last such revision, and when there is news.
    pub(crate) fn followed(&self) -> watch::Receiver<Revision> {
        self.followed.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_as_kubernetes_does() {
        let mut versions = ["v1alpha1", "v2", "foo", "v1", "v10beta3", "v3beta1", "v1beta2"];
        versions.sort_by_key(|v| std::cmp::Reverse(version_priority(v)));
        assert_eq!(versions, ["v2", "v1", "v10beta3", "v3beta1", "v1beta2", "v1alpha1", "foo"]);
    }
}
