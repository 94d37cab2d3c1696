//! A unit's member object: the template, the unit's overrides, and what the unit itself adds.
//!
//! Order matters. Overrides see the user's template and nothing else, so their paths mean what the user wrote; then the
//! cell adds its node selector, tolerations and label, which no override can take away; last come the names and the
//! marks of ownership.

use base64::Engine as _;
use serde_json::{Map, Value, json};
use thiserror::Error;

use crate::api::{Naming, Snapshot};
use crate::names::{
    self, CELL_LABEL, MANAGED_LABEL, NameError, RENDERED_ANNOTATION, REVISION_ANNOTATION, SOURCE_ANNOTATION,
};
use crate::overrides::{self, OverrideError};
use crate::revision::hash;
use crate::topology::{CellTraits, Unit};
use crate::types::{FederatedType, Workload};

/// Digits of the rendered hash: enough that a change is never mistaken for no change.
const RENDERED_HASH_DIGITS: usize = 20;

/// A member object as the hub wants it.
#[derive(Debug, Clone, PartialEq)]
pub struct Rendered {
    /// Its name.
    pub name: String,
    /// Whether the member decides about `spec.replicas` once the object is there.
    pub retain_replicas: bool,
    /// Hash of the object but for the revision's name: equal hashes are equal objects.
    pub hash: String,
    value: Value,
}

/// Why a unit's object cannot be rendered.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RenderError {
    /// An override does not apply.
    #[error(transparent)]
    Override(#[from] OverrideError),
    /// The name does not fit.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A cell's name cannot be a label value.
    #[error("cell name {cell:?} is longer than {max} characters and cannot be a label value", max = names::MAX_CELL_NAME)]
    CellName {
        /// The cell.
        cell: String,
    },
    /// A workload that would select other cells' pods.
    #[error(
        "the template has no spec.selector.matchLabels: a workload in a cell needs one, and the same labels in spec.template.metadata.labels"
    )]
    NoSelector,
    /// Something on the way to a field is not an object.
    #[error("{path} of the template is not an object")]
    NotAnObject { path: &'static str },
    /// An API server would refuse it. What it is instead is not said: it is a secret.
    #[error("stringData.{key} of the template is not a string: put it in quotes")]
    NotAText {
        /// The key.
        key: String,
    },
}

/// The name of a unit's object under a naming.
pub fn object_name(
    of: &FederatedType,
    object: &str,
    unit: &Unit,
    naming: Naming,
) -> Result<String, NameError> {
    let own = unit.cell.is_some() && of.per_cell(naming);
    if own { names::per_unit(object, &unit.name) } else { Ok(object.to_owned()) }
}

/// Renders a snapshot for a unit as it is labelled now.
pub fn render(
    of: &FederatedType,
    namespace: &str,
    object: &str,
    snapshot: &Snapshot,
    unit: &Unit,
) -> Result<Rendered, RenderError> {
    render_as(of, namespace, object, snapshot, unit, None)
}

/// Renders a snapshot for a unit that gets these of the overrides which go by labels; see [`overrides::by_label`].
pub fn render_as(
    of: &FederatedType,
    namespace: &str,
    object: &str,
    snapshot: &Snapshot,
    unit: &Unit,
    by_label: Option<&[u32]>,
) -> Result<Rendered, RenderError> {
    let name = object_name(of, object, unit, snapshot.naming)?;
    let own = unit.cell.is_some() && of.per_cell(snapshot.naming);
    let text = |map: &std::collections::BTreeMap<String, String>| -> Map<String, Value> {
        map.iter().map(|(key, value)| (key.clone(), Value::String(value.clone()))).collect()
    };

    let mut document =
        overrides::document(&snapshot.template, text(&snapshot.labels), text(&snapshot.annotations));
    overrides::apply(&mut document, &snapshot.overrides, unit, by_label)?;
    let split = snapshot.replicas.get(&unit.name);
    if let Some(replicas) = split {
        object_at(&mut document, "spec", "spec")?["replicas"] = (*replicas).into();
    }
    let retain = snapshot.retain_replicas
        && of.has_replicas()
        && split.is_none()
        && !overrides::touches(&snapshot.overrides, unit, by_label, "/spec/replicas");

    if let (Some(cell), true) = (&unit.cell, own) {
        if unit.name.len() > names::MAX_CELL_NAME {
            return Err(RenderError::CellName { cell: unit.name.clone() });
        }
        if let Some(workload) = of.target.workload {
            decorate(&mut document, workload, &unit.name, cell)?;
        }
    }

    let mut overridden = document["metadata"].take();
    let mut labels = match overridden["labels"].take() {
        Value::Object(labels) => labels,
        _ => Map::new(),
    };
    let mut annotations = match overridden["annotations"].take() {
        Value::Object(annotations) => annotations,
        _ => Map::new(),
    };
    labels.insert(MANAGED_LABEL.into(), "true".into());
    if own {
        labels.insert(CELL_LABEL.into(), unit.name.clone().into());
    }
    annotations.insert(SOURCE_ANNOTATION.into(), names::source(&of.plural, object).into());

    document["apiVersion"] = of.target.api_version().into();
    document["kind"] = of.target.kind.clone().into();
    document["metadata"] = json!({ "name": name, "labels": labels, "annotations": annotations });
    if of.target.namespaced {
        document["metadata"]["namespace"] = namespace.into();
    }
    if of.is_secret() {
        encode_string_data(&mut document)?;
    }
    strip_nulls(&mut document);

    let mut rendered = Rendered { name, hash: String::new(), retain_replicas: retain, value: document };
    rendered.sign();
    Ok(rendered)
}

// === impl Rendered ===

impl Rendered {
    /// The object to apply, marked as coming from `revision`.
    pub fn at(&self, revision: &str) -> Value {
        let mut value = self.value.clone();
        value["metadata"]["annotations"][REVISION_ANNOTATION] = revision.into();
        value
    }

    /// The replicas that it asks for; one, as the API has it, when it does not say.
    pub fn replicas(&self) -> i64 {
        self.value["spec"]["replicas"].as_i64().unwrap_or(1).clamp(0, i64::from(i32::MAX))
    }

    /// The same object with so many replicas.
    pub fn scaled(&self, replicas: i64) -> Self {
        if replicas == self.replicas() {
            return self.clone();
        }
        let mut scaled = self.clone();
        scaled.value["spec"]["replicas"] = replicas.max(0).into();
        scaled.sign();
        scaled
    }

    /// Marks the object with the hash of everything else in it.
    fn sign(&mut self) {
        if let Value::Object(annotations) = &mut self.value["metadata"]["annotations"] {
            annotations.remove(RENDERED_ANNOTATION);
        }
        self.hash = hash(&self.value);
        self.hash.truncate(RENDERED_HASH_DIGITS);
        self.value["metadata"]["annotations"][RENDERED_ANNOTATION] = self.hash.clone().into();
    }
}

/// Adds what the cell adds to a workload.
fn decorate(
    document: &mut Value,
    workload: Workload,
    cell_name: &str,
    cell: &CellTraits,
) -> Result<(), RenderError> {
    let mut spec = object_at(document, "spec", "spec")?;
    match workload {
        Workload::Selected => {
            let selector = object_at(spec, "selector", "spec.selector")?;
            let match_labels = object_at(selector, "matchLabels", "spec.selector.matchLabels")?;
            if match_labels.as_object().is_none_or(Map::is_empty) {
                return Err(RenderError::NoSelector);
            }
            match_labels[CELL_LABEL] = cell_name.into();
        }
        // Its API server makes a selector that no other object has.
        Workload::Generated => {}
        Workload::JobTemplate => {
            spec = object_at(spec, "jobTemplate", "spec.jobTemplate")?;
            spec = object_at(spec, "spec", "spec.jobTemplate.spec")?;
        }
    }

    let template = object_at(spec, "template", "spec.template")?;
    let metadata = object_at(template, "metadata", "spec.template.metadata")?;
    object_at(metadata, "labels", "spec.template.metadata.labels")?[CELL_LABEL] = cell_name.into();

    let pod = object_at(template, "spec", "spec.template.spec")?;
    if !cell.node_selector.is_empty() {
        let node_selector = object_at(pod, "nodeSelector", "spec.template.spec.nodeSelector")?;
        for (key, value) in &cell.node_selector {
            node_selector[key] = value.clone().into();
        }
    }
    if !cell.tolerations.is_empty() {
        if pod.get("tolerations").is_none_or(Value::is_null) {
            pod["tolerations"] = Value::Array(Vec::new());
        }
        let Some(Value::Array(tolerations)) = pod.get_mut("tolerations") else {
            return Err(RenderError::NotAnObject { path: "spec.template.spec.tolerations" });
        };
        for toleration in &cell.tolerations {
            // A toleration is made of strings and numbers: it always serialises.
            let toleration = serde_json::to_value(toleration).unwrap_or_default();
            if !tolerations.contains(&toleration) {
                tolerations.push(toleration);
            }
        }
    }
    Ok(())
}

/// The object under `key`, made when absent. `path` is for the error.
fn object_at<'a>(parent: &'a mut Value, key: &str, path: &'static str) -> Result<&'a mut Value, RenderError> {
    let Value::Object(map) = parent else { return Err(RenderError::NotAnObject { path }) };
    let child = map.entry(key).or_insert(Value::Null);
    if child.is_null() {
        *child = Value::Object(Map::new());
    }
    if child.is_object() { Ok(child) } else { Err(RenderError::NotAnObject { path }) }
}

/// A Secret's `stringData` as `data`: an API server turns it into that, and what is not there afterwards would read as a
/// difference.
fn encode_string_data(document: &mut Value) -> Result<(), RenderError> {
    let Some(map) = document.as_object_mut() else { return Ok(()) };
    let texts = match map.remove("stringData") {
        None | Some(Value::Null) => return Ok(()),
        Some(Value::Object(texts)) => texts,
        Some(_) => return Err(RenderError::NotAnObject { path: "stringData" }),
    };
    let data = object_at(document, "data", "data")?;
    for (key, text) in texts {
        match text {
            // Its absence, as everywhere in an applied object.
            Value::Null => {}
            Value::String(text) => {
                data[key] = base64::engine::general_purpose::STANDARD.encode(text).into();
            }
            _ => return Err(RenderError::NotAText { key }),
        }
    }
    Ok(())
}

/// A null in an applied object means the same as its absence, but reads as a difference for ever.
pub fn strip_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            map.values_mut().for_each(strip_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(strip_nulls),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Toleration;

    use super::*;
    use crate::api::Override;
    use crate::types;

    fn cell(name: &str) -> Unit {
        Unit {
            name: name.into(),
            cluster: "prod-hz".into(),
            labels: Default::default(),
            cell: Some(CellTraits {
                node_selector: [("zone".to_owned(), "hz-a".to_owned())].into(),
                tolerations: vec![Toleration { key: Some("cell".into()), ..Toleration::default() }],
            }),
        }
    }

    fn deployment() -> Snapshot {
        Snapshot {
            template: json!({"spec": {
                "replicas": 2,
                "selector": {"matchLabels": {"app": "web"}},
                "template": {
                    "metadata": {"labels": {"app": "web"}},
                    "spec": {
                        "nodeSelector": {"zone": "user", "disk": "ssd"},
                        "tolerations": [{"key": "gpu"}],
                        "containers": [{"name": "web", "image": "web:1"}],
                    },
                },
            }}),
            labels: [("app".to_owned(), "web".to_owned())].into(),
            ..Snapshot::default()
        }
    }

    #[test]
    fn a_workload_in_a_cell() {
        let rendered =
            render(&types::builtin()[0], "shop", "web", &deployment(), &cell("cell-a")).expect("renders");
        let expect = json!({
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {
                "name": "web-cell-a",
                "namespace": "shop",
                "labels": {"app": "web", "kubefed.io/managed": "true", "cellway.io/cell": "cell-a"},
                "annotations": {
                    "cellway.io/source": "federateddeployments/web",
                    "cellway.io/revision": "web-1",
                    "cellway.io/rendered": rendered.hash,
                },
            },
            "spec": {
                "replicas": 2,
                "selector": {"matchLabels": {"app": "web", "cellway.io/cell": "cell-a"}},
                "template": {
                    "metadata": {"labels": {"app": "web", "cellway.io/cell": "cell-a"}},
                    "spec": {
                        "nodeSelector": {"zone": "hz-a", "disk": "ssd"},
                        "tolerations": [{"key": "gpu"}, {"key": "cell"}],
                        "containers": [{"name": "web", "image": "web:1"}],
                    },
                },
            },
        });
        assert_eq!(rendered.at("web-1"), expect);
    }

    #[test]
    fn a_workload_in_a_whole_cluster_is_untouched() {
        let unit = Unit { cell: None, ..cell("prod-hz") };
        let rendered =
            render(&types::builtin()[0], "shop", "web", &deployment(), &unit).expect("renders").at("r");
        assert_eq!(rendered["metadata"]["name"], "web");
        assert_eq!(rendered["spec"], deployment().template["spec"]);
    }

    #[test]
    fn overrides_come_before_the_cell_and_cannot_undo_it() {
        let mut snapshot = deployment();
        snapshot.overrides = vec![Override {
            units: Some(vec!["cell-a".into()]),
            patches: serde_json::from_value(json!([
                {"path": "/spec/template/spec/nodeSelector", "value": {"zone": "mine"}},
                {"op": "add", "path": "/metadata/annotations/team", "value": "red"},
            ]))
            .expect("patches"),
            ..Override::default()
        }];
        let rendered =
            render(&types::builtin()[0], "shop", "web", &snapshot, &cell("cell-a")).expect("renders").at("r");
        assert_eq!(rendered["spec"]["template"]["spec"]["nodeSelector"], json!({"zone": "hz-a"}));
        assert_eq!(rendered["metadata"]["annotations"]["team"], "red");
    }

    #[test]
    fn a_workload_without_a_selector_is_refused() {
        for selector in [json!(null), json!({}), json!({"matchLabels": {}})] {
            let mut snapshot = deployment();
            snapshot.template["spec"]["selector"] = selector;
            let error = render(&types::builtin()[0], "shop", "web", &snapshot, &cell("cell-a")).unwrap_err();
            assert_eq!(error, RenderError::NoSelector);
        }
    }

    #[test]
    fn a_template_of_the_wrong_shape_is_an_error() {
        for template in [json!({"spec": 3}), json!({"spec": {"selector": {"matchLabels": []}}})] {
            let snapshot = Snapshot { template, ..Snapshot::default() };
            let error = render(&types::builtin()[0], "shop", "web", &snapshot, &cell("cell-a")).unwrap_err();
            assert!(matches!(error, RenderError::NotAnObject { .. }), "{error}");
        }
    }

    #[test]
    fn other_kinds_are_shared_unless_named_per_unit() {
        let config = &types::builtin()[1];
        let mut snapshot = Snapshot { template: json!({"data": {"k": "v"}}), ..Snapshot::default() };
        let (a, b) = (
            render(config, "shop", "cfg", &snapshot, &cell("cell-a")).expect("renders"),
            render(config, "shop", "cfg", &snapshot, &cell("cell-b")).expect("renders"),
        );
        assert_eq!(a, b);
        assert_eq!(a.name, "cfg");
        snapshot.naming = Naming::PerUnit;
        let own = render(config, "shop", "cfg", &snapshot, &cell("cell-a")).expect("renders");
        assert_eq!(own.name, "cfg-cell-a");
        assert_eq!(own.at("r")["metadata"]["labels"][CELL_LABEL], "cell-a");
    }
}
