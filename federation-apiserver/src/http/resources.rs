//! Requests for resources: what the method, path and query ask of the registry.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use http::{Method, Response, StatusCode};
use serde_json::{Value, json};

use super::body::{self, Decoded};
use super::negotiate::{self, Accept, Shape};
use super::path::{Query, ResourcePath};
use super::{App, Call, response, stream};
use crate::logs::LogOptions;
use crate::registry::Target;
use crate::registry::delete::{DeleteOptions, Deleted, Propagation};
use crate::registry::read::ListOptions;
use crate::registry::resource::Resource;
use crate::registry::selectors::{FieldSelector, Filter, LabelSelector};
use crate::registry::watch::WatchOptions;
use crate::registry::write::{FieldValidation, PatchKind, WriteOptions, Written};
use crate::status::{ApiError, FieldError};
use crate::table;
use crate::value::str_at;

/// Largest `limit` of a list; more is given in pages all the same.
const MAX_LIMIT: u64 = 100_000;

/// What of a request decides what is read.
#[derive(Clone, Copy)]
struct Asked<'a> {
    query: &'a Query,
    /// [`Call::visible`].
    visible: &'a str,
}

impl<'a> Asked<'a> {
    fn of(call: &'a Call) -> Self {
        Self { query: &call.query, visible: &call.visible }
    }
}

/// Answers a request for a resource.
pub(super) async fn handle(
    app: &Arc<App>,
    path: ResourcePath,
    call: Call,
) -> Result<Response<Body>, ApiError> {
    let catalog = app.registry.catalog();
    let resource =
        catalog.get(&path.group, &path.version, &path.plural).ok_or_else(ApiError::no_such_path)?;
    if resource.namespaced && path.namespace.is_empty() && !path.name.is_empty() {
        return Err(ApiError::no_such_path());
    }
    if !resource.namespaced && !path.namespace.is_empty() {
        return Err(ApiError::no_such_path());
    }
    let watching = call.query.flag("watch")?;
    let verb = verb_of(&call.method, &path, watching)?;
    let accept = negotiate::accept(call.request.headers())?;
    if matches!(accept.shape, Shape::AggregatedV2 | Shape::AggregatedV2Beta1) {
        return Err(ApiError::not_acceptable());
    }
    let target = Target { resource, namespace: path.namespace.clone(), name: path.name.clone() };
    match (path.subresource.as_str(), verb) {
        ("", "watch") => watch(app, &target, Asked::of(&call), accept).await,
        ("", "list") => list(app, &target, Asked::of(&call), accept).await,
        ("", "get") => get(app, &target, Asked::of(&call), accept).await,
        ("", "create") => create(app, &target, call, accept).await,
        ("", "delete") => delete(app, &target, call, accept).await,
        ("", "deletecollection") => delete_collection(app, &target, call, accept).await,
        ("" | "status", "update" | "patch") => {
            let status = path.subresource == "status";
            if status && !target.resource.status {
                return Err(ApiError::no_such_path());
            }
            let subresource = if status { "status" } else { "" };
            write(app, &target, call, accept, subresource).await
        }
        ("status", "get") if target.resource.status => get(app, &target, Asked::of(&call), accept).await,
        ("scale", "get") => {
            let stored = app.registry.get(&target).await?;
            let scale = app.registry.scale_of(&target, &stored.object)?;
            Ok(response::value(StatusCode::OK, &scale, accept.encoding))
        }
        ("scale", "update" | "patch") => scale(app, &target, call, accept).await,
        ("log", "get") if target.resource.pod => log(app, &target, &call.query).await,
        ("binding", "create") if target.resource.pod => {
            let options = write_options(&call, "binding")?;
            let decoded = object_body(app, call).await?;
            app.registry.bind_pod(&target, &decoded.value, &options).await?;
            let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201});
            Ok(response::value(StatusCode::CREATED, &status, accept.encoding))
        }
        ("token", "create")
            if target.resource.plural == "serviceaccounts" && !target.resource.is_custom() =>
        {
            let accounts = app.authenticator.service_accounts().ok_or_else(ApiError::no_such_path)?;
            let options = write_options(&call, "token")?;
            let mut request = object_body(app, call).await?.value;
            if request.is_object() {
                let kind = ("authentication.k8s.io", "v1", "TokenRequest");
                app.registry.admit_subresource(&target, &options, kind, &mut request, None).await?;
            }
            let answer = accounts.request(&target, request, jiff::Timestamp::now()).await?;
            Ok(response::value(StatusCode::CREATED, &answer, accept.encoding))
        }
        ("finalize", "update") if target.resource.plural == "namespaces" => {
            finalize(app, &target, call, accept).await
        }
        (known @ ("" | "status" | "scale" | "log"), _) => {
            tracing::trace!(subresource = known, "method is not served there");
            Err(ApiError::method_not_allowed(&target.resource.group, &target.resource.plural, verb))
        }
        _ => Err(ApiError::no_such_path()),
    }
}

fn verb_of(method: &Method, path: &ResourcePath, watching: bool) -> Result<&'static str, ApiError> {
    let collection = path.name.is_empty();
    Ok(match *method {
        Method::GET | Method::HEAD if watching && path.subresource.is_empty() => "watch",
        Method::GET | Method::HEAD if collection => "list",
        Method::GET | Method::HEAD => "get",
        Method::POST if collection || !path.subresource.is_empty() => "create",
        Method::PUT if !collection => "update",
        Method::PATCH if !collection => "patch",
        Method::DELETE if collection => "deletecollection",
        Method::DELETE => "delete",
        _ => return Err(ApiError::method_not_allowed(&path.group, &path.plural, method.as_str())),
    })
}

/// The object in the shape that was asked for.
fn shaped(
    code: StatusCode,
    resource: &Resource,
    object: Value,
    accept: Accept,
    query: &Query,
) -> Response<Body> {
    let value = match accept.shape {
        Shape::Table => {
            table::of_objects(resource, std::slice::from_ref(&object), query.get("includeObject"), true, None)
        }
        Shape::Metadata => table::metadata_only(&object),
        _ => object,
    };
    response::value(code, &value, accept.encoding)
}

fn filter_of(asked: Asked<'_>, target: &Target) -> Result<Filter, ApiError> {
    let query = asked.query;
    let mut fields = FieldSelector::parse(query.get("fieldSelector"))?;
    fields.check(&target.resource)?;
    if !target.name.is_empty() {
        fields = fields.with_name(&target.name);
    }
    let visible = LabelSelector::parse(asked.visible)?;
    Ok(Filter { labels: LabelSelector::parse(query.get("labelSelector"))?.and(visible), fields })
}

async fn get(
    app: &Arc<App>,
    target: &Target,
    asked: Asked<'_>,
    accept: Accept,
) -> Result<Response<Body>, ApiError> {
    let query = asked.query;
    let entry = app.registry.entry(target, query.get("resourceVersion")).await?;
    let (resource, revision) = (&target.resource, entry.kv.mod_revision);
    if !asked.visible.is_empty() {
        let object = entry.object(resource, revision)?;
        if !LabelSelector::parse(asked.visible)?.matches(object["metadata"].get("labels")) {
            // As if it were not there: that it is, is not theirs to know.
            return Err(ApiError::not_found(&resource.group, &resource.plural, &target.name));
        }
    }
    if accept == Accept::default() {
        let mut text = Vec::with_capacity(entry.kv.value.len() + 64);
        entry.encode(resource, revision, true, &mut text)?;
        return Ok(response::with_type(StatusCode::OK, text, "application/json"));
    }
    Ok(shaped(StatusCode::OK, resource, entry.object(resource, revision)?, accept, query))
}

async fn list(
    app: &Arc<App>,
    target: &Target,
    asked: Asked<'_>,
    accept: Accept,
) -> Result<Response<Body>, ApiError> {
    let query = asked.query;
    let limit = query.number("limit")?.filter(|l| *l > 0).map(|l| l.min(MAX_LIMIT));
    let options = ListOptions {
        filter: filter_of(asked, target)?,
        limit: limit.map(|l| usize::try_from(l).unwrap_or(usize::MAX)),
        token: query.get("continue").to_owned(),
        resource_version: query.get("resourceVersion").to_owned(),
        version_match: query.get("resourceVersionMatch").to_owned(),
    };
    let page = app.registry.list_entries(target, &options).await?;
    let resource = &target.resource;
    let mut meta = json!({"resourceVersion": page.revision.0.to_string()});
    if !page.token.is_empty() {
        meta["continue"] = json!(page.token);
    }
    if let Some(remaining) = page.remaining {
        meta["remainingItemCount"] = json!(remaining);
    }
    if accept == Accept::default() {
        return Ok(stream::list(page, resource.clone(), &meta));
    }
    let items = page.items.iter().map(|entry| entry.object(resource, entry.kv.mod_revision));
    let mut items: Vec<Value> = items.collect::<Result<_, _>>()?;
    let value = match accept.shape {
        Shape::Table => table::of_objects(resource, &items, query.get("includeObject"), true, Some(meta)),
        Shape::Metadata => {
            json!({"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "metadata": meta,
            "items": items.iter().map(table::metadata_only).collect::<Vec<_>>()})
        }
        _ => {
            if !resource.is_custom() {
                // Items of typed lists carry no type of their own.
                for item in &mut items {
                    if let Some(map) = item.as_object_mut() {
                        map.remove("kind");
                        map.remove("apiVersion");
                    }
                }
            }
            json!({"kind": resource.list_kind, "apiVersion": resource.api_version(), "metadata": meta, "items": items})
        }
    };
    Ok(response::value(StatusCode::OK, &value, accept.encoding))
}

async fn watch(
    app: &Arc<App>,
    target: &Target,
    asked: Asked<'_>,
    accept: Accept,
) -> Result<Response<Body>, ApiError> {
    let query = asked.query;
    let options = WatchOptions {
        filter: filter_of(asked, target)?,
        resource_version: query.get("resourceVersion").to_owned(),
        version_match: query.get("resourceVersionMatch").to_owned(),
        bookmarks: query.flag("allowWatchBookmarks")?,
        send_initial: query.optional_flag("sendInitialEvents")?,
        timeout: query.number("timeoutSeconds")?.filter(|s| *s > 0).map(Duration::from_secs),
    };
    // A watch of one object by its path is a watch of the collection with a name.
    let watch = app.registry.watch(target, options).await?;
    Ok(stream::watch(watch, accept, query.get("includeObject").to_owned()))
}

fn write_options(call: &Call, subresource: &'static str) -> Result<WriteOptions, ApiError> {
    let query = &call.query;
    let dry_run = match query.all("dryRun") {
        [] => false,
        values if values.iter().all(|v| v == "All") => true,
        values => {
            let error = FieldError::not_supported("dryRun", &json!(values), &[json!("All")]);
            return Err(ApiError::invalid("meta.k8s.io", "CreateOptions", "", &[error]));
        }
    };
    let validation = match query.get("fieldValidation") {
        "" | "Warn" => FieldValidation::Warn,
        "Ignore" => FieldValidation::Ignore,
        "Strict" => FieldValidation::Strict,
        other => {
            let allowed = ["Ignore", "Strict", "Warn"].map(Value::from);
            let error = FieldError::not_supported("fieldValidation", &json!(other), &allowed);
            return Err(ApiError::invalid("meta.k8s.io", "CreateOptions", "", &[error]));
        }
    };
    let mut manager = query.get("fieldManager").to_owned();
    if manager.is_empty() {
        let agent = call.request.headers().get(http::header::USER_AGENT).and_then(|v| v.to_str().ok());
        manager = agent.and_then(|a| a.split('/').next()).unwrap_or_default().chars().take(128).collect();
    }
    if manager.is_empty() {
        manager = "unknown".into();
    }
    let mut sent = serde_json::Map::new();
    for field in ["fieldManager", "fieldValidation"] {
        if !query.get(field).is_empty() {
            sent.insert(field.into(), json!(query.get(field)));
        }
    }
    if dry_run {
        sent.insert("dryRun".into(), json!(["All"]));
    }
    Ok(WriteOptions {
        manager,
        dry_run,
        validation,
        subresource,
        force: query.flag("force")?,
        duplicates: Vec::new(),
        user: Some(call.user.clone()),
        sent,
        notes: call.notes.clone(),
    })
}

pub(super) async fn object_body(app: &Arc<App>, call: Call) -> Result<Decoded, ApiError> {
    let (parts, body) = call.request.into_parts();
    let media = body::media_type(&parts.headers);
    let bytes = body::read(&parts.headers, body, app.limits.body).await?;
    body::decode(&media, &bytes)
}

fn written(target: &Target, result: Written, accept: Accept, query: &Query) -> Response<Body> {
    let code = if result.created { StatusCode::CREATED } else { StatusCode::OK };
    let mut answer = shaped(code, &target.resource, result.object, accept, query);
    response::warn(&mut answer, &result.warnings);
    answer
}

async fn create(
    app: &Arc<App>,
    target: &Target,
    call: Call,
    accept: Accept,
) -> Result<Response<Body>, ApiError> {
    if target.resource.namespaced && target.namespace.is_empty() {
        return Err(ApiError::method_not_allowed(&target.resource.group, &target.resource.plural, "create"));
    }
    let mut options = write_options(&call, "")?;
    let query = call.query.clone();
    let decoded = object_body(app, call).await?;
    if decoded.value.is_null() {
        return Err(ApiError::bad_request("the body of the request is empty"));
    }
    options.duplicates = decoded.duplicates;
    let result = app.registry.create(target, decoded.value, &options).await?;
    Ok(written(target, result, accept, &query))
}

/// PUT and PATCH.
async fn write(
    app: &Arc<App>,
    target: &Target,
    call: Call,
    accept: Accept,
    subresource: &'static str,
) -> Result<Response<Body>, ApiError> {
    let mut options = write_options(&call, subresource)?;
    let query = call.query.clone();
    let result = if call.method == Method::PUT {
        let decoded = object_body(app, call).await?;
        options.duplicates = decoded.duplicates;
        app.registry.update(target, decoded.value, &options).await?
    } else {
        let (kind, decoded) = patch_body(app, call, &mut options).await?;
        options.duplicates = decoded.duplicates;
        app.registry.patch(target, kind, &decoded.value, &options).await?
    };
    Ok(written(target, result, accept, &query))
}

async fn patch_body(
    app: &Arc<App>,
    call: Call,
    options: &mut WriteOptions,
) -> Result<(PatchKind, Decoded), ApiError> {
    const KINDS: &str = "application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json, application/apply-patch+yaml";
    let media = body::media_type(call.request.headers());
    let kind = match media.as_str() {
        "application/json-patch+json" => PatchKind::Json,
        "application/merge-patch+json" => PatchKind::Merge,
        "application/strategic-merge-patch+json" => PatchKind::Strategic,
        "application/apply-patch+yaml" | "application/apply-patch+json" => PatchKind::Apply,
        _ => return Err(ApiError::unsupported_media_type(KINDS)),
    };
    let invalid = |error: FieldError| ApiError::invalid("meta.k8s.io", "PatchOptions", "", &[error]);
    if kind == PatchKind::Apply {
        if call.query.get("fieldManager").is_empty() {
            return Err(invalid(FieldError::required("fieldManager", "is required for apply patch")));
        }
    } else if options.force {
        return Err(invalid(FieldError::forbidden("force", "may not be specified for non-apply patch")));
    }
    let (parts, body) = call.request.into_parts();
    let bytes = body::read(&parts.headers, body, app.limits.body).await?;
    let decoded =
        if kind == PatchKind::Apply { body::decode_yaml(&bytes)? } else { body::decode_json(&bytes)? };
    if kind == PatchKind::Apply {
        for field in ["apiVersion", "kind"] {
            if str_at(&decoded.value, &[field]).is_empty() {
                return Err(ApiError::bad_request(format!(
                    "error decoding YAML: Object '{field}' is missing"
                )));
            }
        }
    }
    Ok((kind, decoded))
}

async fn scale(
    app: &Arc<App>,
    target: &Target,
    call: Call,
    accept: Accept,
) -> Result<Response<Body>, ApiError> {
    let mut options = write_options(&call, "scale")?;
    let result = if call.method == Method::PUT {
        let decoded = object_body(app, call).await?;
        app.registry.write_scale(target, None, &decoded.value, &options).await?
    } else {
        let (kind, decoded) = patch_body(app, call, &mut options).await?;
        app.registry.write_scale(target, Some(kind), &decoded.value, &options).await?
    };
    Ok(response::value(StatusCode::OK, &result.object, accept.encoding))
}

async fn finalize(
    app: &Arc<App>,
    target: &Target,
    call: Call,
    accept: Accept,
) -> Result<Response<Body>, ApiError> {
    let decoded = object_body(app, call).await?;
    let finalizers =
        crate::value::at(&decoded.value, &["spec", "finalizers"]).cloned().unwrap_or_else(|| json!([]));
    let object = app
        .registry
        .modify(target, |object| {
            crate::value::set(object, &["spec", "finalizers"], finalizers.clone());
            true
        })
        .await?
        .ok_or_else(|| target.not_found())?;
    Ok(response::value(StatusCode::OK, &object, accept.encoding))
}

fn delete_options(call: &Call) -> Result<DeleteOptions, ApiError> {
    let query = &call.query;
    let mut options = DeleteOptions {
        user: Some(call.user.clone()),
        notes: call.notes.clone(),
        ..DeleteOptions::default()
    };
    let grace = query.number("gracePeriodSeconds")?;
    options.grace_seconds = grace.map(|g| i64::try_from(g).unwrap_or(i64::MAX));
    if !query.get("propagationPolicy").is_empty() {
        options.propagation = Some(Propagation::parse(query.get("propagationPolicy"))?);
    } else if let Some(orphan) = query.optional_flag("orphanDependents")? {
        options.propagation = Some(if orphan { Propagation::Orphan } else { Propagation::Background });
    }
    options.dry_run = !query.all("dryRun").is_empty();
    Ok(options)
}

async fn delete(
    app: &Arc<App>,
    target: &Target,
    call: Call,
    accept: Accept,
) -> Result<Response<Body>, ApiError> {
    let mut options = delete_options(&call)?;
    let decoded = object_body(app, call).await?;
    options.read(&decoded.value)?;
    let resource = &target.resource;
    Ok(match app.registry.delete(target, &options).await? {
        Deleted::Marked(object) => response::value(StatusCode::OK, &object, accept.encoding),
        Deleted::Removed(object) if resource.pod => response::value(StatusCode::OK, &object, accept.encoding),
        Deleted::Removed(object) => {
            let mut details = json!({"name": target.name, "kind": resource.plural,
                "uid": str_at(&object, &["metadata", "uid"])});
            if !resource.group.is_empty() {
                details["group"] = json!(resource.group);
            }
            let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details});
            response::value(StatusCode::OK, &status, accept.encoding)
        }
    })
}

async fn delete_collection(
    app: &Arc<App>,
    target: &Target,
    call: Call,
    accept: Accept,
) -> Result<Response<Body>, ApiError> {
    let mut options = delete_options(&call)?;
    let filter = filter_of(Asked::of(&call), target)?;
    let decoded = object_body(app, call).await?;
    options.read(&decoded.value)?;
    let items = app.registry.delete_collection(target, &filter, &options).await?;
    let list = json!({"kind": target.resource.list_kind, "apiVersion": target.resource.api_version(),
        "metadata": {"resourceVersion": app.registry.store.revision().0.to_string()}, "items": items});
    Ok(response::value(StatusCode::OK, &list, accept.encoding))
}

async fn log(app: &Arc<App>, target: &Target, query: &Query) -> Result<Response<Body>, ApiError> {
    let pod = app.registry.get(target).await?.object;
    let source = app.logs.as_ref().ok_or_else(|| ApiError::unavailable("this server has no logs of pods"))?;
    let container = Some(query.get("container").to_owned()).filter(|c| !c.is_empty());
    let names: Vec<&str> = ["containers", "initContainers"]
        .iter()
        .flat_map(|list| {
            crate::value::at(&pod, &["spec", list]).and_then(Value::as_array).into_iter().flatten()
        })
        .map(|c| str_at(c, &["name"]))
        .collect();
    match &container {
        Some(name) if !names.contains(&name.as_str()) => {
            return Err(ApiError::bad_request(format!(
                "container {name} is not valid for pod {}",
                target.name
            )));
        }
        None if names.len() > 1 => {
            return Err(ApiError::bad_request(format!(
                "a container name must be specified for pod {}, choose one of: [{}]",
                target.name,
                names.join(" ")
            )));
        }
        _ => {}
    }
    let options = LogOptions {
        container,
        follow: query.flag("follow")?,
        tail_lines: query.number("tailLines")?,
        since_seconds: query.number("sinceSeconds")?,
        timestamps: query.flag("timestamps")?,
        previous: query.flag("previous")?,
        limit_bytes: query.number("limitBytes")?,
    };
    let stream = source.open(&pod, options)?;
    Ok(stream::log(stream, app.registry.shutdown.clone()))
}
