//! Types of the expression language, and what is declared about a variable's shape.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// A static type.
#[derive(Clone, Debug)]
pub(crate) enum Type {
    Dyn,
    /// The type of an expression that is wrong already; fits everything, so that one fault is told once.
    Error,
    Null,
    Bool,
    Int,
    Uint,
    Double,
    Str,
    Bytes,
    Duration,
    Timestamp,
    List(Arc<Type>),
    Map(Arc<Type>, Arc<Type>),
    Optional(Arc<Type>),
    /// The type of a type; CEL calls it so.
    #[allow(clippy::enum_variant_names)]
    Type(Arc<Type>),
    /// A type of a library: `kubernetes.Quantity`, `net.IP` and so on.
    Opaque(&'static str),
    /// Fields known from a schema.
    Object(Arc<Decl>),
    /// A type variable: negative in signatures, fresh ones counted up from 0.
    Param(i32),
}

/// What is known about a value from its schema: its type, and how large it can get.
#[derive(Debug)]
pub(crate) struct Decl {
    pub(crate) kind: DeclKind,
    /// Most characters, items or entries.
    pub(crate) max_elements: u64,
    /// Bytes of the shortest JSON text.
    pub(crate) min_size: u64,
}

/// Shape of a declared value.
#[derive(Debug)]
pub(crate) enum DeclKind {
    /// Whatever the JSON is.
    Dyn,
    Bool,
    Int,
    Double,
    Str,
    Bytes,
    Duration,
    Timestamp,
    List(Arc<Decl>, ListRelation),
    Map(Arc<Decl>),
    /// Name for messages, fields by their escaped names.
    Object(String, BTreeMap<String, Field>),
}

/// One field of an object.
#[derive(Debug)]
pub(crate) struct Field {
    /// The name in JSON.
    pub(crate) name: String,
    pub(crate) decl: Arc<Decl>,
}

/// How the items of a list relate (`x-kubernetes-list-type`): decides what `==` and `+` mean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ListRelation {
    Atomic,
    Set,
    Map(Vec<String>),
}

// === impl Decl ===

impl Decl {
    /// A declaration of a scalar, or of something unknown.
    pub(crate) fn new(kind: DeclKind, max_elements: u64, min_size: u64) -> Arc<Self> {
        Arc::new(Self { kind, max_elements, min_size })
    }

    /// The static type.
    pub(crate) fn ty(self: &Arc<Self>) -> Type {
        match &self.kind {
            DeclKind::Dyn => Type::Dyn,
            DeclKind::Bool => Type::Bool,
            DeclKind::Int => Type::Int,
            DeclKind::Double => Type::Double,
            DeclKind::Str => Type::Str,
            DeclKind::Bytes => Type::Bytes,
            DeclKind::Duration => Type::Duration,
            DeclKind::Timestamp => Type::Timestamp,
            DeclKind::List(item, _) => Type::list(item.ty()),
            DeclKind::Map(value) => Type::map(Type::Str, value.ty()),
            DeclKind::Object(..) => Type::Object(self.clone()),
        }
    }
}

// === impl Type ===

impl Type {
    pub(crate) fn list(item: Type) -> Self {
        Self::List(Arc::new(item))
    }

    pub(crate) fn map(key: Type, value: Type) -> Self {
        Self::Map(Arc::new(key), Arc::new(value))
    }

    pub(crate) fn optional(inner: Type) -> Self {
        Self::Optional(Arc::new(inner))
    }

    pub(crate) fn is_dyn_or_error(&self) -> bool {
        matches!(self, Self::Dyn | Self::Error)
    }

    /// Parameters of a parametrised type.
    pub(crate) fn parameters(&self) -> Vec<&Type> {
        match self {
            Self::List(a) | Self::Optional(a) | Self::Type(a) => vec![a],
            Self::Map(a, b) => vec![a, b],
            _ => Vec::new(),
        }
    }

    /// Is it of one size whatever its value?
    pub(crate) fn is_scalar(&self) -> bool {
        match self {
            Self::Bool | Self::Double | Self::Duration | Self::Int | Self::Timestamp | Self::Uint => true,
            Self::Optional(inner) => inner.is_scalar(),
            _ => false,
        }
    }

    /// Name of the type's value: what `type(x)` is equal to.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::List(_) => "list".into(),
            Self::Map(..) => "map".into(),
            Self::Optional(_) => "optional_type".into(),
            Self::Type(_) => "type".into(),
            Self::Null => "null_type".into(),
            Self::Duration => "google.protobuf.Duration".into(),
            Self::Timestamp => "google.protobuf.Timestamp".into(),
            other => other.to_string(),
        }
    }

    /// The same type, without looking into what may stand for it?
    pub(crate) fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Object(a), Self::Object(b)) => Arc::ptr_eq(a, b),
            (Self::Opaque(a), Self::Opaque(b)) => a == b,
            (Self::Param(a), Self::Param(b)) => a == b,
            _ => {
                std::mem::discriminant(self) == std::mem::discriminant(other)
                    && self.parameters().iter().zip(other.parameters()).all(|(a, b)| a.same(b))
            }
        }
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dyn => f.write_str("dyn"),
            Self::Error => f.write_str("!error!"),
            Self::Null => f.write_str("null"),
            Self::Bool => f.write_str("bool"),
            Self::Int => f.write_str("int"),
            Self::Uint => f.write_str("uint"),
            Self::Double => f.write_str("double"),
            Self::Str => f.write_str("string"),
            Self::Bytes => f.write_str("bytes"),
            Self::Duration => f.write_str("duration"),
            Self::Timestamp => f.write_str("timestamp"),
            Self::List(a) => write!(f, "list({a})"),
            Self::Map(a, b) => write!(f, "map({a}, {b})"),
            Self::Optional(a) => write!(f, "optional_type({a})"),
            Self::Type(a) => write!(f, "type({a})"),
            Self::Opaque(name) => f.write_str(name),
            Self::Object(decl) => match &decl.kind {
                DeclKind::Object(name, _) => f.write_str(name),
                _ => f.write_str("object"),
            },
            Self::Param(n) => write!(f, "_var{n}"),
        }
    }
}
