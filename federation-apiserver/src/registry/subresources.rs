//! Subresources that are views of an object: scale, and the binding of a pod.

use serde_json::{Value, json};

use super::builtin;
use super::resource::api_version;
use super::reviews::Review;
use super::write::versions::KindVersions;
use super::write::{
    Ownership, PATCH_ATTEMPTS, PatchKind, WriteOptions, Written, apply_error, check_uid, nameless, writer_of,
};
use super::{Registry, Target};
use crate::admission::{self, Operation};
use crate::status::{ApiError, FieldError};
use crate::value::{self, at, set, str_at};
use crate::{apply, patch};

// === impl Registry ===

impl Registry {
    /// The scale subresource of an object.
    pub fn scale_of(&self, target: &Target, object: &Value) -> Result<Value, ApiError> {
        let paths = target.resource.scale.as_ref().ok_or_else(ApiError::no_such_path)?;
        let get = |path: &[String]| {
            let keys: Vec<&str> = path.iter().map(String::as_str).collect();
            at(object, &keys).cloned()
        };
        let selector = match &paths.label_selector {
            Some(path) => get(path).and_then(|v| v.as_str().map(str::to_owned)),
            None => at(object, &["spec", "selector"]).map(selector_text),
        };
        let mut meta = json!({});
        for key in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
            if let Some(v) = at(object, &["metadata", key]) {
                meta[key] = v.clone();
            }
        }
        let mut scale = json!({"apiVersion": "autoscaling/v1", "kind": "Scale", "metadata": meta,
            "spec": {"replicas": get(&paths.spec_replicas).unwrap_or(json!(0))},
            "status": {"replicas": get(&paths.status_replicas).unwrap_or(json!(0))}});
        if let Some(selector) = selector.filter(|s| !s.is_empty()) {
            scale["status"]["selector"] = json!(selector);
        }
        Ok(scale)
    }

    /// Asks webhooks about the object of a subresource that has a kind of its own.
    pub(crate) async fn admit_subresource(
        &self,
        target: &Target,
        options: &WriteOptions,
        (group, version, kind): (&str, &str, &str),
        object: &mut Value,
        old: Option<&Value>,
    ) -> Result<(), ApiError> {
        let Some(user) = options.user.as_deref() else { return Ok(()) };
        let Some(asked) = self.asked(Some(user)).await? else { return Ok(()) };
        let operation = if old.is_some() { Operation::Update } else { Operation::Create };
        let request = admission::Request {
            kind: (group.to_owned(), version.to_owned(), kind.to_owned()),
            ..options.admission(target, operation, user)
        };
        set(object, &["apiVersion"], json!(api_version(group, version)));
        set(object, &["kind"], json!(kind));
        self.mutate(&asked, &request, Some(&mut *object), old, &|_| Ok(())).await?;
        self.validate_admission(&asked, &request, Some(object), old).await
    }

    /// Asks webhooks about a review, which is answered and not stored.
    pub(crate) async fn admit_review(
        &self,
        review: Review,
        namespace: &str,
        options: &WriteOptions,
        object: &mut Value,
    ) -> Result<(), ApiError> {
        let resource = builtin::review(review.plural).ok_or_else(ApiError::no_such_path)?;
        let target = Target { resource, namespace: namespace.to_owned(), name: String::new() };
        let kind = (review.group, review.version, review.kind);
        self.admit_subresource(&target, options, kind, object, None).await
    }

    /// `namespaces/finalize`: says who still has to let a namespace go. Of the namespace that is sent only that counts, and
    /// which one is meant: its resourceVersion and its uid, where it has them.
    pub async fn finalize_namespace(
        &self,
        target: &Target,
        mut sent: Value,
        options: &WriteOptions,
    ) -> Result<Value, ApiError> {
        self.identify(target, &mut sent)?;
        let finalizers = at(&sent, &["spec", "finalizers"]).cloned().unwrap_or_else(|| json!([]));
        let version = str_at(&sent, &["metadata", "resourceVersion"]);
        for _ in 0..PATCH_ATTEMPTS {
            let current = self.get(target).await?;
            let old = &current.object;
            check_uid(target, &sent, old)?;
            if !version.is_empty() && version != str_at(old, &["metadata", "resourceVersion"]) {
                return Err(target.modified());
            }
            let mut object = old.clone();
            set(&mut object, &["spec", "finalizers"], finalizers.clone());
            if let (Some(asked), Some(user)) =
                (self.asked(options.user.as_deref()).await?, options.user.as_deref())
            {
                let request = options.admission(target, Operation::Update, user);
                let mut asked_about = object.clone();
                self.mutate(&asked, &request, Some(&mut asked_about), Some(old), &|_| Ok(())).await?;
                // Nothing else is written here.
                let finalizers = at(&asked_about, &["spec", "finalizers"]).cloned().unwrap_or(json!([]));
                set(&mut object, &["spec", "finalizers"], finalizers);
                self.validate_admission(&asked, &request, Some(&object), Some(old)).await?;
            }
            if options.dry_run {
                return Ok(object);
            }
            if let Some(object) = self.store_changed(target, current.revision, object).await? {
                return Ok(object);
            }
        }
        Err(target.modified())
    }

    /// Writes a scale: a PUT body, or a patch of the current scale.
    pub async fn write_scale(
        &self,
        target: &Target,
        kind: Option<PatchKind>,
        body: &Value,
        options: &WriteOptions,
    ) -> Result<Written, ApiError> {
        let paths = target.resource.scale.clone().ok_or_else(ApiError::no_such_path)?;
        let options = WriteOptions { subresource: "scale", ..options.clone() };
        if kind.is_none() {
            check_scale(target, body)?;
        }
        for _ in 0..PATCH_ATTEMPTS {
            let current = self.get(target).await?;
            let scale = self.scale_of(target, &current.object)?;
            let mut new_scale = match kind {
                None => body.clone(),
                Some(PatchKind::Json) => patch::json_patch(&scale, body)?,
                Some(_) => {
                    let mut s = scale.clone();
                    patch::merge_patch(&mut s, body);
                    s
                }
            };
            let of_scale = ("autoscaling", "v1", "Scale");
            self.admit_subresource(target, &options, of_scale, &mut new_scale, Some(&scale)).await?;
            let replicas = at(&new_scale, &["spec", "replicas"]).cloned().unwrap_or(json!(0));
            if !replicas.as_i64().is_some_and(|n| (0..=i64::from(i32::MAX)).contains(&n)) {
                let error =
                    FieldError::invalid("spec.replicas", &replicas, "must be greater than or equal to 0");
                return Err(ApiError::invalid("autoscaling", "Scale", &target.name, &[error]));
            }
            let keys: Vec<&str> = paths.spec_replicas.iter().map(String::as_str).collect();
            let (mut object, ownership) = if kind == Some(PatchKind::Apply) {
                let named = at(body, &["spec", "replicas"]).is_some_and(|n| !n.is_null());
                let applied = named.then_some((keys.as_slice(), replicas));
                (self.applied_scale(target, &current.object, applied, &options).await?, Ownership::Applied)
            } else {
                let mut object = current.object.clone();
                set(&mut object, &keys, replicas);
                (object, Ownership::Update)
            };
            // Which object, and which state of it, is meant.
            check_uid(target, &new_scale, &current.object)?;
            let meant = str_at(&new_scale, &["metadata", "resourceVersion"]);
            if !meant.is_empty() {
                set(&mut object, &["metadata", "resourceVersion"], json!(meant));
            }
            if let Some(written) = self.replace(target, &current, object, &options, ownership).await? {
                return Ok(Written { object: self.scale_of(target, &written.object)?, ..written });
            }
        }
        Err(target.modified())
    }

    /// The object with an applied scale merged in: who applies it owns the number, and takes it from others by force only.
    async fn applied_scale(
        &self,
        target: &Target,
        live: &Value,
        replicas: Option<(&[&str], Value)>,
        options: &WriteOptions,
    ) -> Result<Value, ApiError> {
        let resource = &target.resource;
        let mut config = json!({"apiVersion": resource.api_version(), "kind": resource.kind,
            "metadata": {"name": target.name}});
        if resource.namespaced {
            set(&mut config, &["metadata", "namespace"], json!(target.namespace));
        }
        if let Some((path, replicas)) = replicas {
            set(&mut config, path, replicas);
        }
        let (now, api_version) = (value::timestamp(), resource.api_version());
        let writer = writer_of(resource, &api_version, options, &now);
        let versions = KindVersions { registry: self, resource };
        let applied =
            apply::apply(resource.schema.as_ref(), live, &config, &writer, options.force, &versions);
        applied.await.map_err(apply_error)
    }

    /// `pods/binding`: assigns a node.
    pub async fn bind_pod(
        &self,
        target: &Target,
        binding: &Value,
        options: &WriteOptions,
    ) -> Result<(), ApiError> {
        let mut binding = binding.clone();
        self.admit_subresource(target, options, ("", "v1", "Binding"), &mut binding, None).await?;
        let node = str_at(&binding, &["target", "name"]);
        if node.is_empty() {
            return Err(ApiError::bad_request("target.name: Required value"));
        }
        for _ in 0..PATCH_ATTEMPTS {
            let current = self.get(target).await?;
            if !str_at(&current.object, &["spec", "nodeName"]).is_empty() {
                let why = format!("pod {} is already assigned to a node", target.name);
                return Err(ApiError::conflict("", "pods/binding", &target.name, &why));
            }
            let mut pod = current.object.clone();
            set(&mut pod, &["spec", "nodeName"], json!(node));
            let now = value::timestamp();
            let condition = json!({"type": "PodScheduled", "status": "True", "lastProbeTime": null,
                "lastTransitionTime": now});
            set(&mut pod, &["status", "conditions"], json!([condition]));
            let options = WriteOptions { subresource: "binding", ..options.clone() };
            if self.replace(target, &current, pod, &options, Ownership::Update).await?.is_some() {
                return Ok(());
            }
        }
        Err(target.modified())
    }
}

/// What is put has to be a scale, and this object's: anything else, or nothing, would be read as a scale of none.
fn check_scale(target: &Target, scale: &Value) -> Result<(), ApiError> {
    let text = |path: &[&str]| str_at(scale, path);
    let (version, kind) = (text(&["apiVersion"]), text(&["kind"]));
    if !matches!(version, "" | "autoscaling/v1") || !matches!(kind, "" | "Scale") {
        return Err(ApiError::bad_request(format!(
            "{kind} in version {version:?} cannot be handled as a Scale"
        )));
    }
    let (name, namespace) = (text(&["metadata", "name"]), text(&["metadata", "namespace"]));
    if name.is_empty() {
        return Err(nameless(target));
    }
    if name != target.name {
        return Err(ApiError::bad_request(format!(
            "the name of the object ({name}) does not match the name on the URL ({})",
            target.name
        )));
    }
    if !namespace.is_empty() && namespace != target.namespace {
        return Err(ApiError::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    Ok(())
}

/// `a=b,c in (d)`: the text form of a `LabelSelector` object.
fn selector_text(selector: &Value) -> String {
    let mut parts: Vec<String> = Vec::new();
    for (k, v) in selector.get("matchLabels").and_then(Value::as_object).into_iter().flatten() {
        parts.push(format!("{k}={}", v.as_str().unwrap_or_default()));
    }
    parts.sort();
    for e in selector.get("matchExpressions").and_then(Value::as_array).into_iter().flatten() {
        let key = str_at(e, &["key"]);
        let values = e.get("values").and_then(Value::as_array);
        let values: Vec<&str> = values.into_iter().flatten().filter_map(Value::as_str).collect();
        parts.push(match str_at(e, &["operator"]) {
            "In" => format!("{key} in ({})", values.join(",")),
            "NotIn" => format!("{key} notin ({})", values.join(",")),
            "DoesNotExist" => format!("!{key}"),
            _ => key.to_owned(),
        });
    }
    parts.join(",")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use federation_store::{Store, StoreConfig};
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::config::Role;
    use crate::encryption::store::StoreHandle;

    async fn registry() -> Registry {
        let store = Store::open(StoreConfig::in_memory()).await.expect("a store");
        Registry::new(StoreHandle::new(store, Arc::default()), Role::Hub, CancellationToken::new())
    }

    async fn make(registry: &Registry, collection: &Target, object: Value) -> (Target, Value) {
        let made = registry.create(collection, object, &WriteOptions::by("maker")).await.expect("created");
        let name = str_at(&made.object, &["metadata", "name"]).to_owned();
        (Target { name, ..collection.clone() }, made.object)
    }

    /// A Deployment of one replica, of the manager `maker`.
    async fn deployment(registry: &Registry) -> Target {
        let namespaces = registry.core("namespaces", "", "").expect("served");
        make(registry, &namespaces, json!({"metadata": {"name": "shop"}})).await;
        let deployments = registry.target(("apps", "v1", "deployments"), "shop", "").expect("served");
        let labels = json!({"app": "web"});
        let web = json!({"metadata": {"name": "web"}, "spec": {"replicas": 1, "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", "image": "x"}]}}}});
        make(registry, &deployments, web).await.0
    }

    #[tokio::test]
    async fn only_the_namespace_that_was_meant_is_let_go() {
        let registry = registry().await;
        let namespaces = registry.core("namespaces", "", "").expect("served");
        let (shop, made) = make(&registry, &namespaces, json!({"metadata": {"name": "shop"}})).await;
        let finalize = async |sent: Value| {
            let done = registry.finalize_namespace(&shop, sent, &WriteOptions::by("test")).await;
            done.map(|object| object["spec"]["finalizers"].clone()).map_err(|error| error.code())
        };
        let sent = |meta: Value, finalizers: Value| {
            let mut object = json!({"metadata": meta, "spec": {"finalizers": finalizers}});
            set(&mut object, &["metadata", "name"], json!("shop"));
            object
        };
        let none = || json!([]);
        assert_eq!(finalize(Value::Null).await, Err(400));
        assert_eq!(finalize(sent(json!({}), json!("kubernetes"))).await, Err(400), "nobody could read it");
        assert_eq!(finalize(sent(json!({"uid": "another"}), none())).await, Err(409));
        assert_eq!(finalize(sent(json!({"resourceVersion": "1"}), none())).await, Err(409));
        let stays = registry.get(&shop).await.expect("there").object;
        assert_eq!(stays["spec"]["finalizers"], made["spec"]["finalizers"]);
        let meant =
            json!({"uid": made["metadata"]["uid"], "resourceVersion": made["metadata"]["resourceVersion"]});
        assert_eq!(
            finalize(sent(meant, json!(["kubernetes", "example.com/hold"]))).await.expect("written")[1],
            "example.com/hold"
        );
        assert_eq!(finalize(sent(json!({}), none())).await, Ok(none()));
    }

    #[tokio::test]
    async fn what_is_no_scale_scales_nothing() {
        let registry = registry().await;
        let web = deployment(&registry).await;
        let put = async |scale: Value| {
            let written = registry.write_scale(&web, None, &scale, &WriteOptions::by("test")).await;
            written.map(|written| written.object["spec"]["replicas"].clone()).map_err(|error| error.code())
        };
        let scale = |meta: Value| json!({"metadata": meta, "spec": {"replicas": 2}});
        for wrong in [
            Value::Null,
            json!({}),
            scale(json!({})),
            scale(json!({"name": "other"})),
            scale(json!({"name": "web", "namespace": "elsewhere"})),
            json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}}),
        ] {
            assert_eq!(put(wrong.clone()).await, Err(400), "{wrong}");
        }
        assert_eq!(put(scale(json!({"name": "web", "uid": "another"}))).await, Err(409));
        assert_eq!(put(scale(json!({"name": "web", "resourceVersion": "1"}))).await, Err(409));
        assert_eq!(registry.get(&web).await.expect("there").object["spec"]["replicas"], 1);
        assert_eq!(put(scale(json!({"name": "web"}))).await, Ok(json!(2)));
    }

    #[tokio::test]
    async fn a_scale_that_is_applied_is_owned_and_conflicts() {
        let registry = registry().await;
        let web = deployment(&registry).await;
        let apply = async |manager: &str, replicas: Value, force: bool| {
            let scale =
                json!({"apiVersion": "autoscaling/v1", "kind": "Scale", "spec": {"replicas": replicas}});
            let options = WriteOptions { force, ..WriteOptions::by(manager) };
            let written = registry.write_scale(&web, Some(PatchKind::Apply), &scale, &options).await;
            written.map(|written| written.object["spec"]["replicas"].clone()).map_err(|error| error.code())
        };
        let owner = async || {
            let found = registry.get(&web).await.expect("there").object;
            let entries = found["metadata"]["managedFields"].as_array().cloned().unwrap_or_default();
            let of = |e: &Value| e["fieldsV1"]["f:spec"].get("f:replicas").is_some();
            entries
                .iter()
                .filter(|e| of(e))
                .map(|e| {
                    ["manager", "operation", "subresource"].map(|key| str_at(e, &[key]).to_owned()).join(" ")
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(apply("scaler", json!(3), false).await, Err(409), "it is the maker's");
        assert_eq!(apply("scaler", json!(3), true).await, Ok(json!(3)));
        assert_eq!(owner().await, ["scaler Apply scale"]);
        assert_eq!(apply("scaler", json!(4), false).await, Ok(json!(4)));
        assert_eq!(apply("other", json!(5), false).await, Err(409));
        assert_eq!(apply("other", json!(4), false).await, Ok(json!(4)));
        assert_eq!(owner().await, ["other Apply scale", "scaler Apply scale"]);
    }
}
