//! Types of objects: one compiled form for the built-in kinds and for CustomResourceDefinitions.
//!
//! A [`Schema`] is compiled from OpenAPI v3 as Kubernetes writes it (with the `x-kubernetes-*` extensions). Built-in
//! definitions refer to each other by name and may be recursive, so references stay names and are looked up in
//! [`Definitions`] by [`TypeRef`], a cheap cursor that defaulting, pruning, validation, strategic merge patch and
//! server-side apply all walk with.

pub mod builtin;
pub mod defaults;
pub(crate) mod format;
pub(crate) mod names;
pub(crate) mod path;
pub mod pattern;
pub mod structural;
pub mod validate;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

/// How the items of a list relate to each other (`x-kubernetes-list-type`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListKind {
    /// The list is one value.
    Atomic,
    /// Scalars, each at most once.
    Set,
    /// Objects told apart by these fields.
    Map(Vec<String>),
}

/// JSON type that a schema asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JsonType {
    Object,
    Array,
    String,
    Integer,
    Number,
    Boolean,
}

/// A child schema: written in place, or a named definition.
#[derive(Clone, Debug)]
pub enum Node {
    Inline(Arc<Schema>),
    Ref(Arc<str>),
}

/// One compiled schema node.
#[derive(Clone, Debug, Default)]
pub struct Schema {
    pub json_type: Option<JsonType>,
    pub format: Option<String>,
    pub description: Option<String>,
    pub properties: BTreeMap<String, Node>,
    /// Schema of keys that are no property; `Some(None)` when anything is allowed there.
    pub additional: Option<Option<Node>>,
    pub items: Option<Node>,
    pub required: Vec<String>,
    pub default: Option<Value>,
    pub nullable: bool,
    pub int_or_string: bool,
    pub preserve_unknown: bool,
    pub embedded_resource: bool,
    pub list: Option<ListKind>,
    /// `x-kubernetes-map-type: atomic`.
    pub atomic_map: bool,
    /// `x-kubernetes-patch-merge-key`, for strategic merge patches.
    pub patch_merge_key: Option<String>,
    /// `x-kubernetes-patch-strategy` holds `merge` / `replace`.
    pub patch_merge: bool,
    pub patch_replace: bool,
    /// Value validations that only `validate` reads, in source form, compiled there.
    pub rules: Option<Arc<validate::Rules>>,
}

/// Named definitions that [`Node::Ref`] points to.
#[derive(Debug, Default)]
pub struct Definitions(BTreeMap<Arc<str>, Schema>);

/// A root type: definitions plus the schema of the object.
#[derive(Clone, Debug)]
pub struct RootType {
    pub definitions: Arc<Definitions>,
    pub root: Arc<Schema>,
}

/// A place in a type.
#[derive(Clone, Copy, Debug)]
pub struct TypeRef<'a> {
    definitions: &'a Definitions,
    schema: &'a Schema,
    /// Name of the definition that this node came from; "" for inline ones.
    name: &'a str,
}

/// The type of something that no schema describes: granular maps, atomic lists, any scalar.
fn untyped() -> &'static Schema {
    static UNTYPED: std::sync::LazyLock<Schema> =
        std::sync::LazyLock::new(|| Schema { preserve_unknown: true, ..Schema::default() });
    &UNTYPED
}

// === impl Definitions ===

impl Definitions {
    /// Compiles definitions given as OpenAPI v3 schemas by name.
    pub fn compile(source: &BTreeMap<String, Value>) -> Self {
        Self(source.iter().map(|(name, value)| (Arc::from(name.as_str()), Schema::compile(value))).collect())
    }

    /// The definition of that name.
    pub fn get(&self, name: &str) -> Option<&Schema> {
        self.0.get(name)
    }
}

// === impl Schema ===

impl Schema {
    /// Compiles one schema. Keys that are not understood are ignored: `structural` is where CRDs are judged.
    pub fn compile(value: &Value) -> Self {
        let text = |key: &str| value.get(key).and_then(Value::as_str);
        let flag = |key: &str| value.get(key).and_then(Value::as_bool).unwrap_or(false);
        let json_type = text("type").and_then(JsonType::parse);
        let properties = value
            .get("properties")
            .and_then(Value::as_object)
            .map(|map| map.iter().map(|(k, v)| (k.clone(), Node::compile(v))).collect())
            .unwrap_or_default();
        let additional = match value.get("additionalProperties") {
            None | Some(Value::Bool(false)) => None,
            Some(Value::Bool(true)) => Some(None),
            Some(schema) => Some(Some(Node::compile(schema))),
        };
        let keys = || -> Vec<String> {
            value
                .get("x-kubernetes-list-map-keys")
                .and_then(Value::as_array)
                .map(|k| k.iter().filter_map(Value::as_str).map(str::to_owned).collect())
                .unwrap_or_default()
        };
        let list = match text("x-kubernetes-list-type") {
            Some("map") => Some(ListKind::Map(keys())),
            Some("set") => Some(ListKind::Set),
            Some("atomic") => Some(ListKind::Atomic),
            _ => None,
        };
        let strategy = text("x-kubernetes-patch-strategy").unwrap_or_default();
        Self {
            json_type,
            format: text("format").map(str::to_owned),
            description: text("description").map(str::to_owned),
            properties,
            additional,
            items: value.get("items").filter(|v| v.is_object()).map(Node::compile),
            required: value
                .get("required")
                .and_then(Value::as_array)
                .map(|r| r.iter().filter_map(Value::as_str).map(str::to_owned).collect())
                .unwrap_or_default(),
            default: value.get("default").cloned(),
            nullable: flag("nullable"),
            int_or_string: flag("x-kubernetes-int-or-string") || text("format") == Some("int-or-string"),
            preserve_unknown: flag("x-kubernetes-preserve-unknown-fields"),
            embedded_resource: flag("x-kubernetes-embedded-resource"),
            list,
            atomic_map: text("x-kubernetes-map-type") == Some("atomic"),
            patch_merge_key: text("x-kubernetes-patch-merge-key").map(str::to_owned),
            patch_merge: strategy.split(',').any(|s| s == "merge"),
            patch_replace: strategy.split(',').any(|s| s == "replace"),
            rules: validate::Rules::compile(value).map(Arc::new),
        }
    }
}

impl Node {
    fn compile(value: &Value) -> Self {
        let reference = value
            .get("$ref")
            .or_else(|| value.get("allOf").and_then(|a| a.get(0)).and_then(|v| v.get("$ref")))
            .and_then(Value::as_str);
        let extended = value
            .as_object()
            .is_some_and(|map| map.keys().any(|k| k.starts_with("x-kubernetes-") || k == "default"));
        match reference {
            Some(path) if !extended => Self::Ref(Arc::from(path.rsplit('/').next().unwrap_or(path))),
            Some(path) => {
                // A reference with a default or extension of its own: keep both, looked up through `Ref` on use.
                let mut schema = Schema::compile(value);
                schema.items = Some(Self::Ref(Arc::from(path.rsplit('/').next().unwrap_or(path))));
                schema.format = Some(REFERENCE_WITH_EXTRAS.into());
                Self::Inline(Arc::new(schema))
            }
            None => Self::Inline(Arc::new(Schema::compile(value))),
        }
    }
}

/// Marks an inline node that stands for a reference (held in `items`) plus a default or patch strategy of the field.
const REFERENCE_WITH_EXTRAS: &str = "cellway-reference";

impl JsonType {
    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "object" => Self::Object,
            "array" => Self::Array,
            "string" => Self::String,
            "integer" => Self::Integer,
            "number" => Self::Number,
            "boolean" => Self::Boolean,
            _ => return None,
        })
    }

    /// The name in schemas.
    pub fn name(self) -> &'static str {
        match self {
            Self::Object => "object",
            Self::Array => "array",
            Self::String => "string",
            Self::Integer => "integer",
            Self::Number => "number",
            Self::Boolean => "boolean",
        }
    }
}

// === impl RootType ===

impl RootType {
    /// The type of the whole object.
    pub fn as_ref(&self) -> TypeRef<'_> {
        TypeRef { definitions: &self.definitions, schema: &self.root, name: "" }
    }

    /// A type that accepts anything.
    pub fn any() -> Self {
        Self { definitions: builtin::definitions(), root: Arc::new(untyped().clone()) }
    }
}

// === impl TypeRef ===

impl<'a> TypeRef<'a> {
    /// The schema node itself.
    pub fn schema(&self) -> &'a Schema {
        self.schema
    }

    /// Name of the definition, "" when written in place.
    pub fn name(&self) -> &'a str {
        self.name
    }

    /// The child node as a type.
    fn descend(&self, node: &'a Node) -> Self {
        match node {
            Node::Inline(schema) if schema.format.as_deref() == Some(REFERENCE_WITH_EXTRAS) => {
                match &schema.items {
                    Some(inner) => self.descend(inner),
                    None => Self { definitions: self.definitions, schema: untyped(), name: "" },
                }
            }
            Node::Inline(schema) => Self { definitions: self.definitions, schema, name: "" },
            Node::Ref(name) => match self.definitions.0.get_key_value(name.as_ref()) {
                Some((name, schema)) => Self { definitions: self.definitions, schema, name },
                None => Self { definitions: self.definitions, schema: untyped(), name: "" },
            },
        }
    }

    /// The type of a declared property.
    pub fn property(&self, key: &str) -> Option<Self> {
        if let Some(node) = self.schema.properties.get(key) {
            return Some(self.descend(node));
        }
        if self.schema.embedded_resource && key == "metadata" {
            return Some(self.object_meta());
        }
        if self.schema.embedded_resource && (key == "apiVersion" || key == "kind") {
            return Some(Self { definitions: self.definitions, schema: untyped(), name: "" });
        }
        None
    }

    /// The node of a declared property as written at the field: holds the field's own default and patch strategy.
    pub fn property_node(&self, key: &str) -> Option<&'a Schema> {
        match self.schema.properties.get(key)? {
            Node::Inline(schema) => Some(schema),
            Node::Ref(_) => None,
        }
    }

    /// The type of whatever is found under `key`: a property, an additional property, or untyped.
    pub fn field(&self, key: &str) -> Self {
        self.property(key)
            .or_else(|| match &self.schema.additional {
                Some(Some(node)) => Some(self.descend(node)),
                _ => None,
            })
            .unwrap_or(Self { definitions: self.definitions, schema: untyped(), name: "" })
    }

    /// The type of the list's items.
    pub fn items(&self) -> Self {
        match &self.schema.items {
            Some(node) => self.descend(node),
            None => Self { definitions: self.definitions, schema: untyped(), name: "" },
        }
    }

    /// The standard object metadata type.
    pub fn object_meta(&self) -> Self {
        match self.definitions.0.get_key_value(builtin::OBJECT_META) {
            Some((name, schema)) => Self { definitions: self.definitions, schema, name },
            None => Self { definitions: self.definitions, schema: untyped(), name: "" },
        }
    }

    /// How list items relate; lists without a word on it are atomic, as in server-side apply.
    pub fn list_kind(&self) -> ListKind {
        self.schema.list.clone().unwrap_or(ListKind::Atomic)
    }

    /// Is an unknown key kept here?
    pub fn keeps(&self, key: &str) -> bool {
        self.schema.preserve_unknown || self.schema.additional.is_some() || self.property(key).is_some()
    }

    /// Does the schema say nothing about objects here (no properties, no additional ones)?
    pub fn is_untyped(&self) -> bool {
        self.schema.properties.is_empty() && self.schema.additional.is_none() && self.schema.preserve_unknown
    }
}
