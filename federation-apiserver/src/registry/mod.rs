//! Objects: the operations of the API on the store, for HTTP requests and in-process clients alike.
//!
//! An object is kept as JSON under `/registry/<group>/<resource>/[<namespace>/]<name>`, without its resourceVersion,
//! which is the store's revision of the last write. All writes are compare-and-swap on that revision.

pub mod builtin;
pub(crate) mod cache;
mod decode;
pub mod delete;
pub mod events;
pub(crate) mod kinds;
pub mod meta;
mod pods;
pub mod read;
pub mod resource;
pub mod reviews;
pub mod selectors;
pub mod services;
pub mod strategy;
mod subresources;
pub mod watch;
pub mod write;

use std::sync::Arc;

use federation_store::{KeyValue, Revision};
use serde::ser::{Serialize, SerializeMap as _, Serializer};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::config::{Converter, Role};
use crate::encryption::store::{StoreFault, StoreHandle};
use crate::status::ApiError;
use crate::value;
use cache::Cache;
use resource::{CatalogHandle, Origin, Resource};

/// The store with what is served from it.
#[derive(Debug)]
pub struct Registry {
    pub(crate) store: StoreHandle,
    /// What reads and watches are answered from.
    pub(crate) cache: Cache,
    pub(crate) catalog: CatalogHandle,
    pub(crate) role: Role,
    /// Who may do what, kept by [`crate::rbac::index::run`].
    pub(crate) rbac: crate::rbac::Index,
    /// For definitions that ask for it.
    pub(crate) converter: Option<Converter>,
    /// What CRDs make served, compiled.
    pub(crate) compiled: crate::crd::Compiled,
    /// What is asked about writes.
    pub(crate) admission: crate::admission::Admission,
    /// Connections to webhooks.
    pub(crate) webhooks: Arc<crate::webhook::Client>,
    /// How long events are kept after their last write.
    pub(crate) event_ttl: std::time::Duration,
    /// How long watches without a timeout of their own go on at least; zero: for ever.
    pub(crate) min_request_timeout: std::time::Duration,
    /// Ends watches when the server stops.
    pub(crate) shutdown: CancellationToken,
}

/// An object, or with an empty name a collection.
#[derive(Clone, Debug)]
pub struct Target {
    pub resource: Arc<Resource>,
    pub namespace: String,
    pub name: String,
}

/// An object as the API shows it, with the stored pair that it came from.
#[derive(Clone, Debug)]
pub struct Stored {
    pub object: Value,
    pub revision: Revision,
}

// === impl Target ===

impl Target {
    /// The error for an object that does not exist.
    pub fn not_found(&self) -> ApiError {
        ApiError::not_found(&self.resource.group, &self.resource.plural, &self.name)
    }

    /// The store's key.
    pub fn key(&self) -> String {
        self.resource.key(&self.namespace, &self.name)
    }

    /// The key as error messages name it: as a kube-apiserver has it, not ours.
    pub fn public_key(&self) -> String {
        let place = [self.resource.plural.as_str(), &self.namespace, &self.name];
        let group = if self.resource.is_custom() { self.resource.group.as_str() } else { "" };
        [group]
            .into_iter()
            .chain(place)
            .filter(|p| !p.is_empty())
            .fold("/registry".into(), |k, p| k + "/" + p)
    }

    /// The lost-race error.
    pub fn modified(&self) -> ApiError {
        ApiError::modified(&self.resource.group, &self.resource.plural, &self.name)
    }
}

// === impl Registry ===

impl Registry {
    /// A registry that serves the built-in kinds of a role.
    pub(crate) fn new(store: StoreHandle, role: Role, shutdown: CancellationToken) -> Self {
        let cache = Cache::new(store.clone(), shutdown.clone());
        let registry = Self {
            store,
            cache,
            catalog: CatalogHandle::default(),
            role,
            rbac: crate::rbac::Index::default(),
            converter: None,
            compiled: crate::crd::Compiled::default(),
            admission: crate::admission::Admission::default(),
            webhooks: Arc::default(),
            event_ttl: crate::config::EVENT_TTL,
            min_request_timeout: crate::config::MIN_REQUEST_TIMEOUT,
            shutdown,
        };
        registry.catalog.replace(resource::Catalog::new(builtin::resources(role)));
        registry
    }

    /// With a converter for definitions that ask for one.
    pub fn with_converter(mut self, converter: Option<Converter>) -> Self {
        self.converter = converter;
        self
    }

    /// With another time for a call of a conversion webhook. Nothing may have asked one yet.
    pub fn with_conversion_timeout(mut self, timeout: std::time::Duration) -> Self {
        self.webhooks = Arc::new(crate::webhook::Client::new(timeout));
        self
    }

    /// With another life of events.
    pub fn with_event_ttl(mut self, ttl: std::time::Duration) -> Self {
        self.event_ttl = ttl;
        self
    }

    /// With another life of watches.
    pub fn with_min_request_timeout(mut self, timeout: std::time::Duration) -> Self {
        self.min_request_timeout = timeout;
        self
    }

    /// What is served now.
    pub fn catalog(&self) -> Arc<resource::Catalog> {
        self.catalog.current()
    }

    /// The target of a resource path.
    pub fn target(
        &self,
        (group, version, plural): (&str, &str, &str),
        namespace: &str,
        name: &str,
    ) -> Result<Target, ApiError> {
        let resource = self.catalog().get(group, version, plural).ok_or_else(ApiError::no_such_path)?;
        Ok(Target { resource, namespace: namespace.to_owned(), name: name.to_owned() })
    }

    /// A built-in core/v1 object's target.
    pub(crate) fn core(&self, plural: &str, namespace: &str, name: &str) -> Result<Target, ApiError> {
        self.target(("", "v1", plural), namespace, name)
    }
}

/// A value as Go prints it, at most some lines of it.
pub(crate) fn go_text(value: &Value) -> String {
    decode::go_text(value, 1024)
}

/// The API form of a stored value in the version of `resource`. Custom objects are pruned and get defaults by the schema of the
/// version that they are stored in, unless they are `settled`: it leaves them as they are, or a webhook converted them, which may
/// leave out what it means to.
pub(crate) fn to_api(
    resource: &Resource,
    kv: &KeyValue,
    settled: impl FnOnce(&Value) -> bool,
) -> Result<Value, ApiError> {
    if kv.value.starts_with(crate::encryption::ENCRYPTED) {
        return Err(ApiError::internal(format_args!(
            "{} cannot be decrypted: see the warnings about encryption",
            String::from_utf8_lossy(&kv.key)
        )));
    }
    let mut object: Value = serde_json::from_slice(&kv.value).map_err(ApiError::internal)?;
    if resource.is_new_event() {
        events::to_new(&mut object);
    }
    let api_version = resource.api_version();
    let forms = match &resource.origin {
        Origin::Custom(info) => Some(&info.forms),
        Origin::Builtin { .. } => None,
    };
    if let Some(forms) = forms
        && !settled(&object)
    {
        forms.settle(&mut object);
    }
    let other_version = value::str_at(&object, &["apiVersion"]) != api_version;
    if let Some(converter) = &resource.converter {
        object = converter.convert(object, &api_version).map_err(ApiError::internal)?;
    }
    if resource.webhook.is_some() && value::str_at(&object, &["apiVersion"]) != api_version {
        // Whoever read the entry has it converted first: an object in the wrong version is worse than none.
        return Err(ApiError::internal("an object was read before it was converted"));
    }
    value::set(&mut object, &["apiVersion"], Value::String(api_version));
    value::set(&mut object, &["kind"], Value::String(resource.kind.clone()));
    value::set(&mut object, &["metadata", "resourceVersion"], Value::String(kv.mod_revision.0.to_string()));
    if let Some(forms) = forms.filter(|_| other_version) {
        forms.prune(&mut object);
        if resource.converter.is_some() {
            // Ours know no defaults.
            crate::schema::defaults::apply_defaults(resource.schema.as_ref(), &mut object);
        }
    }
    Ok(object)
}

impl Registry {
    /// Entries in the version of a resource, which a webhook may have to be asked for.
    pub(crate) async fn converted(
        &self,
        resource: &Resource,
        entries: Vec<Arc<cache::Entry>>,
    ) -> Result<Vec<Arc<cache::Entry>>, ApiError> {
        match &resource.webhook {
            Some(webhook) => webhook.entries(self.cache.objects().await?, resource, entries).await,
            None => Ok(entries),
        }
    }

    /// The stored form of an object.
    pub(crate) async fn to_stored(&self, resource: &Resource, object: &Value) -> Result<Vec<u8>, ApiError> {
        let Some(webhook) = &resource.webhook else { return to_stored(resource, object) };
        let mut object = object.clone();
        // It is not stored, and webhooks would see it come and go.
        value::remove(&mut object, &["metadata", "resourceVersion"]);
        let objects = self.cache.objects().await?;
        let converted = webhook.convert(objects, vec![object], &resource.storage_api_version).await?;
        to_stored(resource, converted.first().unwrap_or(&Value::Null))
    }

    /// The API form of an object that has just been written, without reading it back.
    pub(crate) async fn written_form(
        &self,
        resource: &Resource,
        object: Value,
        kv: &KeyValue,
    ) -> Result<Value, ApiError> {
        if resource.webhook.is_none() {
            return written_form(resource, object, kv);
        }
        let entries = self.converted(resource, vec![Arc::new(cache::Entry::new(kv.clone()))]).await?;
        let entry = entries.first().ok_or_else(|| ApiError::internal("a conversion lost an object"))?;
        entry.object(resource, kv.mod_revision)
    }
}

fn written_form(resource: &Resource, mut object: Value, kv: &KeyValue) -> Result<Value, ApiError> {
    let pruned = resource.is_custom() && !resource.is_stored_version();
    if resource.is_new_event() || resource.converter.is_some() || pruned {
        return to_api(resource, kv, |_| false);
    }
    value::set(&mut object, &["apiVersion"], Value::String(resource.api_version()));
    value::set(&mut object, &["metadata", "resourceVersion"], Value::String(kv.mod_revision.0.to_string()));
    Ok(object)
}

/// The deepest object that is stored: serde_json reads no deeper one.
const MAX_STORED_DEPTH: usize = 127;

/// The stored form of an object.
pub(crate) fn to_stored(resource: &Resource, object: &Value) -> Result<Vec<u8>, ApiError> {
    // Patches and managedFields can nest deeper than any request; deeper ones could not be read from the store again.
    if !value::is_within(object, MAX_STORED_DEPTH) {
        return Err(ApiError::unprocessable(format!(
            "the object is nested more than {MAX_STORED_DEPTH} levels deep, with what is kept about its fields"
        )));
    }
    let version = resource.storage_api_version.as_str();
    let bytes = if resource.is_new_event() {
        let mut object = object.clone();
        events::to_core(&mut object);
        serde_json::to_vec(&StoredForm { object: &object, version })
    } else if let Some(converter) = &resource.converter {
        let mut object = converter
            .convert(object.clone(), version)
            .map_err(|reason| ApiError::unprocessable(format!("cannot be stored: {reason}")))?;
        prune_stored(resource, &mut object);
        if !value::is_within(&object, MAX_STORED_DEPTH) {
            return Err(ApiError::unprocessable("the converted object is nested too deep"));
        }
        serde_json::to_vec(&StoredForm { object: &object, version })
    } else if resource.is_custom() && !resource.is_stored_version() && resource.webhook.is_none() {
        let mut object = object.clone();
        prune_stored(resource, &mut object);
        serde_json::to_vec(&StoredForm { object: &object, version })
    } else {
        serde_json::to_vec(&StoredForm { object, version })
    };
    let bytes = bytes.map_err(ApiError::internal)?;
    if bytes.len() > federation_store::MAX_VALUE_BYTES {
        return Err(ApiError::too_large(federation_store::MAX_VALUE_BYTES));
    }
    // They are kept in memory as they are, and grew by doubling. A copy, as allocators leave what shrinks by less than half in
    // its place.
    Ok(bytes.as_slice().to_vec())
}

/// Takes from a custom object what its definition does not know in the version that it is about to be stored in.
fn prune_stored(resource: &Resource, object: &mut Value) {
    if let Origin::Custom(info) = &resource.origin
        && !resource.is_stored_version()
    {
        value::set(object, &["apiVersion"], Value::String(resource.storage_api_version.clone()));
        info.forms.prune(object);
    }
}

/// An object as it is written down: in the storage version and without its resourceVersion.
struct StoredForm<'a> {
    object: &'a Value,
    version: &'a str,
}

/// The same of its metadata.
struct StoredMetadata<'a>(&'a Value);

impl Serialize for StoredForm<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Some(fields) = self.object.as_object() else { return self.object.serialize(serializer) };
        let mut map = serializer.serialize_map(None)?;
        if !fields.contains_key("apiVersion") {
            map.serialize_entry("apiVersion", self.version)?;
        }
        for (key, value) in fields {
            match key.as_str() {
                "apiVersion" => map.serialize_entry(key, self.version)?,
                "metadata" => map.serialize_entry(key, &StoredMetadata(value))?,
                _ => map.serialize_entry(key, value)?,
            }
        }
        map.end()
    }
}

impl Serialize for StoredMetadata<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.as_object() {
            Some(fields) => {
                serializer.collect_map(fields.iter().filter(|(key, _)| *key != "resourceVersion"))
            }
            None => self.0.serialize(serializer),
        }
    }
}

/// A store error as a client sees it.
pub(crate) fn store_error(error: impl Into<StoreFault>) -> ApiError {
    use federation_store::Error;
    let error = match error.into() {
        StoreFault::Store(error) => error,
        fault @ StoreFault::Encryption { .. } => {
            return ApiError::internal(service::error_chain(&fault));
        }
    };
    match error {
        Error::Compacted { requested, compacted } => {
            ApiError::expired(format!("too old resource version: {} ({})", requested.0, compacted.0))
        }
        Error::FutureRevision { requested, current } => {
            ApiError::too_large_resource_version(requested.0, current.0)
        }
        Error::InvalidKey { .. } => ApiError::bad_request("the name of the object is too long to be stored"),
        Error::ValueTooLarge { .. } => ApiError::too_large(federation_store::MAX_VALUE_BYTES),
        // A client lists again after this one.
        Error::WentBack { revision, seen } => {
            ApiError::expired(format!("the store went back: {} ({})", seen.0, revision.0))
        }
        Error::InvalidTransaction { .. } => ApiError::bad_request(error.to_string()),
        Error::Closed => ApiError::unavailable("the server is shutting down"),
        Error::Database { .. } if error.is_full() => ApiError::internal_told(&format!(
            "the database of this API server has no room left ({}): nothing was written; make room on the disk that \
             holds it, then try again",
            source_text(&error)
        )),
        Error::Database { .. } if error.passes() => {
            // Metrics and readiness tell of it; a line for each request would fill the log for as long as it lasts.
            tracing::debug!(error = service::error_chain(&error), "the database is away or busy");
            ApiError::unavailable("the database of this API server is away or busy: try again")
        }
        Error::Unresolved { .. } => {
            tracing::warn!(error = service::error_chain(&error), "the database was lost during a write");
            ApiError::outcome_unknown()
        }
        Error::Database { .. } => ApiError::internal(format_args!("{error}: {}", source_text(&error))),
    }
}

fn source_text(error: &dyn std::error::Error) -> String {
    error.source().map(ToString::to_string).unwrap_or_default()
}

/// Parses a resourceVersion; "" and "0" are 0.
pub(crate) fn parse_revision(text: &str) -> Result<u64, ApiError> {
    if text.is_empty() {
        return Ok(0);
    }
    text.parse().map_err(|_| {
        ApiError::unexplained(format!(
            "resourceVersion: Invalid value: {text:?}: strconv.ParseUint: parsing {text:?}: invalid syntax"
        ))
    })
}
