//! What the functions do.

pub(crate) mod authz;
mod core;
pub(crate) mod formats;
mod lists;
mod net;
pub(crate) mod quantity;
pub(crate) mod semver;
mod strings;
pub(crate) mod time;
pub(crate) mod urls;

use std::sync::Arc;

use ::regex::Regex;

use super::value::Value;

/// How a function failed.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The arguments have types that it cannot work with; only possible where types are known at run time only.
    NoOverload,
    Text(String),
}

/// What a function gives.
pub(crate) type Answer<'a> = Result<Value<'a>, Fault>;

/// A function over evaluated arguments; a target comes first.
pub(crate) type Implementation = for<'a, 'b> fn(&'b [Value<'a>]) -> Answer<'a>;

pub(crate) fn fail<'a>(text: impl Into<String>) -> Answer<'a> {
    Err(Fault::Text(text.into()))
}

/// A pattern of an expression.
pub(crate) fn regex(pattern: &str) -> Result<Arc<Regex>, ::regex::Error> {
    crate::schema::pattern::cached(pattern)
}

/// The function of that name; `None` for what the evaluator does itself, and for names that do not exist.
pub(crate) fn implementation(name: &str) -> Option<Implementation> {
    core::implementation(name)
        .or_else(|| strings::implementation(name))
        .or_else(|| lists::implementation(name))
        .or_else(|| time::implementation(name))
        .or_else(|| net::implementation(name))
        .or_else(|| urls::implementation(name))
        .or_else(|| formats::implementation(name))
        .or_else(|| quantity::implementation(name))
        .or_else(|| authz::implementation(name))
}
