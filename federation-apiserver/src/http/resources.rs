//! Requests for resources: what the method, path and query ask of the registry.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use federation_store::Revision;
use http::{Method, Response, StatusCode};
use serde_json::{Value, json};

use super::body::{self, Decoded};
use super::negotiate::{self, Accept, Shape};
use super::path::{Query, ResourcePath};
use super::{App, Call, response, stream, within};
use crate::fairness;
use crate::logs::LogOptions;
use crate::rbac::{self, Attributes};
use crate::registry::delete::{DeleteOptions, Deleted, IGNORE_READ_ERROR, Propagation};
use crate::registry::read::ListOptions;
use crate::registry::resource::Resource;
use crate::registry::selectors::{FieldSelector, Filter, LabelSelector};
use crate::registry::watch::WatchOptions;
use crate::registry::write::{FieldValidation, PatchKind, WriteOptions, Written};
use crate::registry::{Registry, Target};
use crate::status::{ApiError, FieldError};
use crate::table;
use crate::value::str_at;

/// How long the answer to a write of a role or binding waits for it to be in force: it takes milliseconds, unless the database has
/// just gone away.
const IN_FORCE: Duration = Duration::from_secs(1);
/// Largest `limit` of a list; more is given in pages all the same.
const MAX_LIMIT: u64 = 100_000;
/// Longest field manager's name, as in Kubernetes.
const MAX_MANAGER: usize = 128;

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
    let mut catalog = app.registry.catalog();
    if catalog.get(&path.group, &path.version, &path.plural).is_none() && path.group.contains('.') {
        let definition = format!("{}.{}", path.plural, path.group);
        crate::crd::keep_up(&app.registry, Some(&definition)).await;
        catalog = app.registry.catalog();
    }
    // What only CustomResourceDefinitions could serve is no resource at all without one.
    let own = catalog.iter().any(|r| r.group == path.group && r.version == path.version && !r.is_custom());
    let unknown = if own || path.group.is_empty() { ApiError::no_such_path } else { ApiError::no_such_page };
    let resource = catalog.get(&path.group, &path.version, &path.plural).ok_or_else(unknown)?;
    if resource.namespaced == path.namespace.is_empty() && (!resource.namespaced || !path.name.is_empty()) {
        return Err(unknown());
    }
    let watching = call.query.flag("watch");
    let verb = verb_of(&call.method, &path, watching, &resource)?;
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
        ("", "deletecollection") if has_deletecollection(&target) => {
            delete_collection(app, &target, call, accept).await
        }
        ("" | "status", "update" | "patch") => {
            let status = path.subresource == "status";
            if status && !target.resource.status {
                return Err(ApiError::no_such_path());
            }
            let subresource = if status { "status" } else { "" };
            write(app, &target, call, accept, subresource).await
        }
        ("status", "get") if target.resource.status => get(app, &target, Asked::of(&call), accept).await,
        ("scale", "get") if target.resource.scale.is_some() => {
            let stored = app.registry.get(&target).await?;
            let scale = app.registry.scale_of(&target, &stored.object)?;
            let scale = if accept.shape == Shape::Table { table::of_scale(&scale) } else { scale };
            Ok(response::value(StatusCode::OK, &scale, accept.encoding))
        }
        ("scale", "update" | "patch") if target.resource.scale.is_some() => {
            scale(app, &target, call, accept).await
        }
        ("log", "get") if target.resource.pod => log(app, &target, &call.query).await,
        ("binding", "create") if target.resource.pod => {
            let options = write_options(&call, "binding")?;
            let decoded = object_body(app, call, "Binding").await?;
            app.registry.bind_pod(&target, &decoded.value, &options).await?;
            let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201});
            Ok(response::value(StatusCode::CREATED, &status, accept.encoding))
        }
        ("token", "create")
            if target.resource.plural == "serviceaccounts" && !target.resource.is_custom() =>
        {
            let accounts = app.authenticator.service_accounts().ok_or_else(ApiError::no_such_path)?;
            let options = write_options(&call, "token")?;
            let mut request = object_body(app, call, "TokenRequest").await?.value;
            if request.is_object() {
                let kind = ("authentication.k8s.io", "v1", "TokenRequest");
                app.registry.admit_subresource(&target, &options, kind, &mut request, None).await?;
            }
            let answer = accounts.request(&target, request, jiff::Timestamp::now()).await?;
            Ok(response::value(StatusCode::CREATED, &answer, accept.encoding))
        }
        ("token", _) if target.resource.plural == "serviceaccounts" && !target.resource.is_custom() => {
            Err(ApiError::method_unknown())
        }
        ("finalize", "update") if is_namespaces(&target.resource) => {
            finalize(app, &target, call, accept).await
        }
        ("finalize", _) if is_namespaces(&target.resource) => Err(ApiError::method_unknown()),
        (subresource, _) => {
            let resource = &target.resource;
            let known = match subresource {
                "" => true,
                "status" => resource.status,
                "scale" => resource.scale.is_some(),
                "log" => resource.pod,
                _ => false,
            };
            Err(match (known, resource.is_custom()) {
                (true, _) => no_method(resource, verb),
                (false, true) => target.not_found(),
                (false, false) => ApiError::no_such_path(),
            })
        }
    }
}

fn is_namespaces(resource: &Resource) -> bool {
    resource.plural == "namespaces" && resource.group.is_empty()
}

/// The error for a method that a resource does not have.
fn no_method(resource: &Resource, verb: &str) -> ApiError {
    if resource.is_custom() {
        ApiError::method_not_allowed(&resource.group, &resource.plural, verb)
    } else {
        ApiError::method_unknown()
    }
}

/// Collections go one namespace at a time, and namespaces one by one.
fn has_deletecollection(target: &Target) -> bool {
    !is_namespaces(&target.resource) && target.resource.namespaced != target.namespace.is_empty()
}

fn verb_of(
    method: &Method,
    path: &ResourcePath,
    watching: bool,
    resource: &Resource,
) -> Result<&'static str, ApiError> {
    let collection = path.name.is_empty();
    Ok(match *method {
        // Of one object there is no watch by its path.
        Method::GET | Method::HEAD if watching && collection => "watch",
        Method::GET | Method::HEAD if collection => "list",
        Method::GET | Method::HEAD => "get",
        Method::POST if collection || !path.subresource.is_empty() => "create",
        Method::PUT if !collection => "update",
        Method::PATCH if !collection => "patch",
        Method::DELETE if collection => "deletecollection",
        Method::DELETE => "delete",
        _ => return Err(no_method(resource, &method.as_str().to_lowercase())),
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

/// How many places a list takes. What is wrong with it is told when it is carried out.
pub(super) fn width_of_list(registry: &Registry, path: &ResourcePath, query: &Query, visible: &str) -> usize {
    let Some(resource) = registry.catalog().get(&path.group, &path.version, &path.plural) else { return 1 };
    let target = Target { resource, namespace: path.namespace.clone(), name: String::new() };
    let Ok(options) = list_options(Asked { query, visible }, &target) else { return 1 };
    fairness::width_of_list(registry.list_cost(&target, &options, fairness::MAX_COUNTED))
}

fn list_options(asked: Asked<'_>, target: &Target) -> Result<ListOptions, ApiError> {
    let query = asked.query;
    check_options(query, false)?;
    query.number("timeoutSeconds")?;
    let limit = query.count("limit")?.filter(|l| *l > 0).map(|l| l.min(MAX_LIMIT));
    Ok(ListOptions {
        filter: filter_of(asked, target)?,
        limit: limit.map(|l| usize::try_from(l).unwrap_or(usize::MAX)),
        token: query.get("continue").to_owned(),
        resource_version: query.get("resourceVersion").to_owned(),
        version_match: query.get("resourceVersionMatch").to_owned(),
    })
}

async fn list(
    app: &Arc<App>,
    target: &Target,
    asked: Asked<'_>,
    accept: Accept,
) -> Result<Response<Body>, ApiError> {
    let query = asked.query;
    let options = list_options(asked, target)?;
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

/// Which options of lists and watches go together.
fn check_options(query: &Query, watching: bool) -> Result<(), ApiError> {
    const MATCH: &str = "resourceVersionMatch";
    let rule = query.get(MATCH);
    let mut errors = Vec::new();
    let mut forbidden = |field: &str, detail: &str| errors.push(FieldError::forbidden(field, detail));
    let initial = query.optional_flag("sendInitialEvents").is_some();
    let continued = !query.get("continue").is_empty();
    let mut unknown: Option<&[&str]> = None;
    if watching {
        if initial && rule != "NotOlderThan" {
            forbidden(MATCH, "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan");
        }
        if !rule.is_empty() && !initial {
            forbidden(
                MATCH,
                "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
            );
        }
        if !rule.is_empty() && rule != "NotOlderThan" {
            unknown = Some(&["NotOlderThan"]);
        }
        if continued {
            forbidden(MATCH, "resourceVersionMatch is forbidden when continue is provided");
        }
    } else {
        if !rule.is_empty() {
            if query.get("resourceVersion").is_empty() {
                forbidden(MATCH, "resourceVersionMatch is forbidden unless resourceVersion is provided");
            }
            if continued {
                forbidden(MATCH, "resourceVersionMatch is forbidden when continue is provided");
            }
            if !matches!(rule, "Exact" | "NotOlderThan") {
                unknown = Some(&["Exact", "NotOlderThan", ""]);
            }
            if rule == "Exact" && query.get("resourceVersion") == "0" {
                forbidden(MATCH, "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"");
            }
        }
        if initial {
            forbidden("sendInitialEvents", "sendInitialEvents is forbidden for list");
        }
    }
    if let Some(allowed) = unknown {
        let allowed: Vec<Value> = allowed.iter().map(|a| json!(a)).collect();
        let error = FieldError::not_supported(MATCH, &json!(rule), &allowed);
        let place = errors.iter().position(|e| e.field != MATCH).unwrap_or(errors.len());
        errors.insert(place, error);
    }
    if errors.is_empty() {
        return Ok(());
    }
    Err(ApiError::invalid("meta.k8s.io", "ListOptions", "", &errors))
}

async fn watch(
    app: &Arc<App>,
    target: &Target,
    asked: Asked<'_>,
    accept: Accept,
) -> Result<Response<Body>, ApiError> {
    let query = asked.query;
    check_options(query, true)?;
    let options = WatchOptions {
        filter: filter_of(asked, target)?,
        resource_version: query.get("resourceVersion").to_owned(),
        version_match: query.get("resourceVersionMatch").to_owned(),
        bookmarks: query.flag("allowWatchBookmarks"),
        send_initial: query.optional_flag("sendInitialEvents"),
        timeout: query.count("timeoutSeconds")?.filter(|s| *s > 0).map(Duration::from_secs),
    };
    // A watch of one object by its path is a watch of the collection with a name.
    let watch = within(app.limits.request_timeout, app.registry.watch(target, options)).await?;
    Ok(stream::watch(watch, accept, query.get("includeObject").to_owned()))
}

/// Does a request only ask what it would do?
fn dry_run(query: &Query, kind: &str) -> Result<bool, ApiError> {
    match query.all("dryRun") {
        [] => Ok(false),
        values if values.iter().all(|v| v == "All") => Ok(true),
        values => {
            let error = FieldError::not_supported("dryRun", &json!(values), &[json!("All")]);
            Err(ApiError::invalid("meta.k8s.io", kind, "", &[error]))
        }
    }
}

pub(super) fn write_options(call: &Call, subresource: &'static str) -> Result<WriteOptions, ApiError> {
    let query = &call.query;
    let kind = match call.method {
        Method::POST => "CreateOptions",
        Method::PUT => "UpdateOptions",
        _ => "PatchOptions",
    };
    let invalid = |error: FieldError| Err(ApiError::invalid("meta.k8s.io", kind, "", &[error]));
    let dry_run = dry_run(query, kind)?;
    let validation = match query.get("fieldValidation") {
        "" | "Warn" => FieldValidation::Warn,
        "Ignore" => FieldValidation::Ignore,
        "Strict" => FieldValidation::Strict,
        other => {
            let allowed = ["", "Ignore", "Strict", "Warn"].map(Value::from);
            return invalid(FieldError::not_supported("fieldValidation", &json!(other), &allowed));
        }
    };
    let manager = query.get("fieldManager");
    if manager.len() > MAX_MANAGER {
        let detail = format!("may not be more than {MAX_MANAGER} bytes");
        return invalid(FieldError::too_long("fieldManager", detail));
    }
    if let Some((at, odd)) = manager.char_indices().find(|(_, c)| c.is_control()) {
        let detail = format!("invalid character U+{:04X} (at position {at})", u32::from(odd));
        return invalid(FieldError::invalid("fieldManager", &json!(manager), detail));
    }
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
        force: query.flag("force"),
        duplicates: Vec::new(),
        user: Some(call.user.clone()),
        sent,
        notes: call.notes.clone(),
    })
}

/// Reads a body that is an object of some kind (or nothing, which is null).
pub(super) async fn object_body(app: &Arc<App>, call: Call, kind: &str) -> Result<Decoded, ApiError> {
    let (parts, body) = call.request.into_parts();
    let media = body::media_type(&parts.headers);
    let bytes = body::read(&parts.headers, body, app.limits.body).await?;
    let wrong = |error: ApiError| {
        error.reworded(|why| {
            let read = if media.contains("json") { NO_KIND } else { "" };
            let summary = body::summary(&bytes);
            format!("the object provided is unrecognized (must be of type {kind}): {read}{why} ({summary})")
        })
    };
    let decoded = body::decode(&media, &bytes).map_err(|e| if e.code() == 400 { wrong(e) } else { e })?;
    if !decoded.value.is_null() && !decoded.value.is_object() {
        let why =
            format!("{}{}", if media.contains("json") { "" } else { NO_KIND }, not_an_object(&decoded.value));
        return Err(wrong(ApiError::bad_request(why)));
    }
    let version = str_at(&decoded.value, &["apiVersion"]);
    if version.matches('/').count() > 1 {
        let why = format!("unexpected GroupVersion string: {version}");
        return Err(ApiError::bad_request(why).reworded(|why| {
            format!(
                "the object provided is unrecognized (must be of type {kind}): {why} ({})",
                body::summary(&bytes)
            )
        }));
    }
    Ok(decoded)
}

/// What the words about a body that does not even say its kind begin with.
const NO_KIND: &str = "couldn't get version/kind; json parse error: ";

fn not_an_object(value: &Value) -> String {
    format!(
        "json: cannot unmarshal {} into Go value of type struct {{ APIVersion string \"json:\\\"apiVersion,omitempty\\\"\"; Kind string \"json:\\\"kind,omitempty\\\"\" }}",
        crate::patch::go_kind(value)
    )
}

/// Reads the `DeleteOptions` of a request, if it has any.
async fn options_body(app: &Arc<App>, call: Call) -> Result<Value, ApiError> {
    let (parts, body) = call.request.into_parts();
    let media = body::media_type(&parts.headers);
    let bytes = body::read(&parts.headers, body, app.limits.body).await?;
    let wrong = |error: ApiError| error.reworded(|why| format!("{NO_KIND}{why}"));
    let value = body::decode(&media, &bytes).map_err(|e| if e.code() == 400 { wrong(e) } else { e })?.value;
    if !value.is_null() && !value.is_object() {
        return Err(wrong(ApiError::bad_request(not_an_object(&value))));
    }
    Ok(value)
}

fn written(target: &Target, result: Written, accept: Accept, query: &Query) -> Response<Body> {
    let code = if result.created { StatusCode::CREATED } else { StatusCode::OK };
    let mut answer = shaped(code, &target.resource, result.object, accept, query);
    response::warn(&mut answer, &result.warnings);
    answer
}

/// Waits until a role or binding counts here: whoever has made a role binds it next, and is refused while nobody knows it. What
/// kube-apiserver does not promise, and other replicas do not either.
async fn in_force(app: &App, target: &Target, result: &Written) {
    if !rbac::validation::is_ours(&target.resource) {
        return;
    }
    if let Ok(revision) = str_at(&result.object, &["metadata", "resourceVersion"]).parse() {
        let _late = tokio::time::timeout(IN_FORCE, app.registry.rbac.seen(Revision(revision))).await;
    }
}

async fn create(
    app: &Arc<App>,
    target: &Target,
    call: Call,
    accept: Accept,
) -> Result<Response<Body>, ApiError> {
    if target.resource.namespaced && target.namespace.is_empty() {
        return Err(no_method(&target.resource, "create"));
    }
    let mut options = write_options(&call, "")?;
    let query = call.query.clone();
    let mut decoded = whole_body(app, target, call).await?;
    options.duplicates = std::mem::take(&mut decoded.duplicates);
    let result = app.registry.create(target, decoded.value, &options).await?;
    in_force(app, target, &result).await;
    Ok(written(target, result, accept, &query))
}

/// A body with an object of the target's kind in it.
async fn whole_body(app: &Arc<App>, target: &Target, call: Call) -> Result<Decoded, ApiError> {
    let kind = &target.resource.kind;
    let decoded = something(object_body(app, call, kind).await?, kind)?;
    if target.resource.is_custom() && str_at(&decoded.value, &["kind"]).is_empty() {
        let text = decoded.value.to_string();
        return Err(ApiError::bad_request(format!(
            "the object provided is unrecognized (must be of type {kind}): Object 'Kind' is missing in '{text}' ({})",
            body::summary(text.as_bytes())
        )));
    }
    Ok(decoded)
}

/// Refuses no body at all, which is not an object without content.
fn something(mut decoded: Decoded, kind: &str) -> Result<Decoded, ApiError> {
    if decoded.empty {
        return Err(ApiError::bad_request(format!(
            "the object provided is unrecognized (must be of type {kind}): {NO_KIND}unexpected end of JSON input (<empty>)"
        )));
    }
    if decoded.value.is_null() {
        decoded.value = json!({});
    }
    Ok(decoded)
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
        let decoded = whole_body(app, target, call).await?;
        options.duplicates = decoded.duplicates;
        app.registry.update(target, decoded.value, &options).await?
    } else {
        let (kind, decoded) = patch_body(app, call, &mut options).await?;
        options.duplicates = decoded.duplicates;
        app.registry.patch(target, kind, &decoded.value, &options).await?
    };
    in_force(app, target, &result).await;
    Ok(written(target, result, accept, &query))
}

async fn patch_body(
    app: &Arc<App>,
    call: Call,
    options: &mut WriteOptions,
) -> Result<(PatchKind, Decoded), ApiError> {
    let media = body::media_type(call.request.headers());
    let kind = match media.as_str() {
        "application/json-patch+json" => PatchKind::Json,
        "application/merge-patch+json" => PatchKind::Merge,
        "application/strategic-merge-patch+json" => PatchKind::Strategic,
        "application/apply-patch+yaml" | "application/apply-patch+json" => PatchKind::Apply,
        _ => return Err(ApiError::unsupported_patch()),
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
    if kind != PatchKind::Apply {
        let decoded = body::decode_json(&bytes).map_err(|error| match kind {
            PatchKind::Strategic => error,
            _ => error.reworded(|why| format!("error decoding patch: {why}")),
        })?;
        return Ok((kind, decoded));
    }
    let mut decoded = body::decode_yaml(&bytes).map_err(|error| {
        error.reworded(|why| format!("error decoding YAML: error converting YAML to JSON: {why}"))
    })?;
    if decoded.value.is_null() {
        decoded.value = json!({});
    }
    if !decoded.value.is_object() {
        let found = crate::patch::go_kind(&decoded.value);
        return Err(ApiError::bad_request(format!(
            "error decoding YAML: error unmarshaling JSON: while decoding JSON: json: cannot unmarshal {found} into Go value of type map[string]interface {{}}"
        )));
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
        let decoded = something(object_body(app, call, "Scale").await?, "Scale")?;
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
    let options = write_options(&call, "finalize")?;
    let decoded = something(object_body(app, call, "Namespace").await?, "Namespace")?;
    let object = app.registry.finalize_namespace(target, decoded.value, &options).await?;
    Ok(response::value(StatusCode::OK, &object, accept.encoding))
}

fn delete_options(call: &Call) -> Result<DeleteOptions, ApiError> {
    let query = &call.query;
    let mut options = DeleteOptions {
        user: Some(call.user.clone()),
        notes: call.notes.clone(),
        ..DeleteOptions::default()
    };
    options.grace_seconds = query.number("gracePeriodSeconds")?;
    options.propagation =
        Propagation::choose(query.get("propagationPolicy"), query.optional_flag("orphanDependents"))?;
    options.dry_run = dry_run(query, "DeleteOptions")?;
    options.ignore_read_error = query.flag(IGNORE_READ_ERROR);
    Ok(options)
}

/// The verb that deleting what cannot be read takes besides `delete`, as in kube-apiserver.
const DELETE_UNREAD: &str = "unsafe-delete-ignore-read-errors";

async fn delete(
    app: &Arc<App>,
    target: &Target,
    call: Call,
    accept: Accept,
) -> Result<Response<Body>, ApiError> {
    let mut options = delete_options(&call)?;
    let user = call.user.clone();
    let body = options_body(app, call).await?;
    options.read(&body)?;
    options.check()?;
    let resource = &target.resource;
    if options.ignore_read_error {
        let (namespace, name) = (&target.namespace, &target.name);
        let attributes =
            Attributes::of_resource(DELETE_UNREAD, &resource.group, &resource.plural, namespace, name);
        app.registry.rbac.check(&user, &attributes)?;
    }
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
    let body = options_body(app, call).await?;
    options.read(&body)?;
    options.check()?;
    if options.ignore_read_error {
        let detail = "is not allowed with DELETECOLLECTION, try again after removing the option";
        let error = FieldError::invalid(IGNORE_READ_ERROR, &json!(true), detail);
        return Err(ApiError::invalid("meta.k8s.io", "DeleteOptions", "", &[error]));
    }
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
        follow: query.flag("follow"),
        tail_lines: query.count("tailLines")?,
        since_seconds: query.count("sinceSeconds")?,
        timestamps: query.flag("timestamps"),
        previous: query.flag("previous"),
        limit_bytes: query.count("limitBytes")?,
    };
    let stream = source.open(&pod, options)?;
    Ok(stream::log(stream, app.registry.shutdown.clone()))
}
