//! What the schemas of a definition leave of its objects: whatever is read is pruned and gets its defaults, as in
//! kube-apiserver.
//!
//! An object was checked against the schema of its day. What is stored of it may hold fields that the schema has lost since,
//! and lack defaults that it has got. To see that takes parsing it, so [`Entry`] remembers for which state of the definition
//! it was found to be as it is stored, and its bytes are given out as they are from then on.
//!
//! [`Entry`]: crate::registry::cache::Entry

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use serde_json::Value;

use crate::registry::resource::api_version;
use crate::schema::{RootType, defaults};
use crate::value::{at, str_at};

/// The schemas of one definition.
#[derive(Debug)]
pub(crate) struct Forms {
    id: u32,
    /// By `<group>/<version>`: of every version, be it served or not.
    schemas: BTreeMap<String, RootType>,
    /// The definition has others by now.
    superseded: AtomicBool,
}

// === impl Forms ===

impl Forms {
    /// Those of a CRD as it is now.
    pub(super) fn of(crd: &Value) -> Arc<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(2);
        let group = str_at(crd, &["spec", "group"]);
        let versions = at(crd, &["spec", "versions"]).and_then(Value::as_array).into_iter().flatten();
        let schema = |version: &Value| {
            let schema = at(version, &["schema", "openAPIV3Schema"]);
            (api_version(group, str_at(version, &["name"])), defaults::custom_root(schema))
        };
        Arc::new(Self {
            id: NEXT.fetch_add(2, Ordering::Relaxed),
            schemas: versions.map(schema).collect(),
            superseded: AtomicBool::new(false),
        })
    }

    /// Told apart from the schemas of every other definition, and of the same one at another time. Even, and not 0.
    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// Whoever goes on by these schemas (a watch) ends, or it would show objects without what they do not know.
    pub(crate) fn supersede(&self) {
        self.superseded.store(true, Ordering::Release);
    }

    pub(crate) fn is_superseded(&self) -> bool {
        self.superseded.load(Ordering::Acquire)
    }

    /// The type of objects of a version, if the definition has it, be it served or not.
    pub(crate) fn find(&self, api_version: &str) -> Option<RootType> {
        self.schemas.get(api_version).cloned()
    }

    /// The same, with no opinion on what the definition does not have.
    pub(super) fn schema(&self, api_version: &str) -> RootType {
        self.find(api_version).unwrap_or_else(|| defaults::custom_root(None))
    }

    /// Would an object stay as it is, by the schema of its own version?
    pub(crate) fn is_settled(&self, object: &Value) -> bool {
        let Some(schema) = self.schemas.get(str_at(object, &["apiVersion"])) else { return true };
        let ty = schema.as_ref();
        let Some(fields) = object.as_object() else { return true };
        // Metadata is the server's own matter.
        let mut own = fields.iter().filter(|(key, _)| *key != "metadata");
        defaults::has_defaults(ty, fields) && own.all(|(key, value)| defaults::is_settled(ty, key, value))
    }

    /// Prunes what was read from the store, and fills in defaults, by the schema of its own version.
    pub(crate) fn settle(&self, object: &mut Value) {
        self.adapt(object, |schema, object| {
            prune(schema, object);
            defaults::apply_defaults(schema.as_ref(), object);
        });
    }

    /// Prunes what was converted to its version. It gets no defaults: a converter may leave out what it means to.
    pub(crate) fn prune(&self, object: &mut Value) {
        self.adapt(object, prune);
    }

    fn adapt(&self, object: &mut Value, change: impl FnOnce(&RootType, &mut Value)) {
        let Some(schema) = self.schemas.get(str_at(object, &["apiVersion"])) else { return };
        let metadata = object.as_object_mut().and_then(|fields| fields.remove("metadata"));
        change(schema, object);
        if let (Some(fields), Some(metadata)) = (object.as_object_mut(), metadata) {
            fields.insert("metadata".into(), metadata);
        }
    }
}

/// Takes away what a schema does not know, and nulls that it does not allow.
fn prune(schema: &RootType, object: &mut Value) {
    let _told_to_nobody = defaults::prune(schema.as_ref(), object);
    defaults::drop_nulls(schema.as_ref(), object);
}
