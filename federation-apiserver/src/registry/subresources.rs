//! Subresources that are views of an object: scale, and the binding of a pod.

use serde_json::{Value, json};

use super::builtin;
use super::resource::api_version;
use super::reviews::Review;
use super::write::{Ownership, PATCH_ATTEMPTS, PatchKind, WriteOptions, Written};
use super::{Registry, Target};
use crate::admission::{self, Operation};
use crate::patch;
use crate::status::{ApiError, FieldError};
use crate::value::{self, at, set, str_at};

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

    /// `namespaces/finalize`: says who still has to let a namespace go.
    pub async fn finalize_namespace(
        &self,
        target: &Target,
        finalizers: &Value,
        options: &WriteOptions,
    ) -> Result<Value, ApiError> {
        for _ in 0..PATCH_ATTEMPTS {
            let current = self.get(target).await?;
            let old = &current.object;
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
            let kind = ("autoscaling", "v1", "Scale");
            let sent = WriteOptions { subresource: "scale", ..options.clone() };
            self.admit_subresource(target, &sent, kind, &mut new_scale, Some(&scale)).await?;
            let replicas = at(&new_scale, &["spec", "replicas"]).cloned().unwrap_or(json!(0));
            if !replicas.as_i64().is_some_and(|n| (0..=i64::from(i32::MAX)).contains(&n)) {
                let error =
                    FieldError::invalid("spec.replicas", &replicas, "must be greater than or equal to 0");
                return Err(ApiError::invalid("autoscaling", "Scale", &target.name, &[error]));
            }
            let mut object = current.object.clone();
            let keys: Vec<&str> = paths.spec_replicas.iter().map(String::as_str).collect();
            set(&mut object, &keys, replicas);
            let version = str_at(&new_scale, &["metadata", "resourceVersion"]);
            if !version.is_empty() {
                set(&mut object, &["metadata", "resourceVersion"], json!(version));
            }
            let options = WriteOptions { subresource: "scale", ..options.clone() };
            if let Some(written) = self.replace(target, &current, object, &options, Ownership::Update).await?
            {
                return Ok(Written { object: self.scale_of(target, &written.object)?, ..written });
            }
        }
        Err(target.modified())
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
