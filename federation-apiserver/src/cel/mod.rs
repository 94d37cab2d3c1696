//! The Common Expression Language as Kubernetes uses it: rules of CRDs, conditions and policies of admission.
//!
//! The grammar comes from the `cel` crate. Types, costs and evaluation are ours, because Kubernetes promises three things
//! that a plain interpreter does not have: expressions are type-checked against the schema before they are stored, their
//! worst case is estimated then, and what they cost is counted and bounded while they run.
//!
//! ```text
//!  text ─▶ cel::Parser ─▶ check (types, overloads) ─▶ cost::estimate
//!                              └─▶ eval (budget) ◀── value (JSON in place, by its declaration) ◀── schema
//! ```

mod check;
mod cost;
mod eval;
pub(crate) mod functions;
mod guard;
pub(crate) mod library;
mod macros;
pub(crate) mod schema;
pub(crate) mod types;
pub(crate) mod value;

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use cel::Env;

pub(crate) use eval::{EvalError, PER_CALL_LIMIT};
use types::{Decl, Type};
pub(crate) use value::Value;

/// Longest expression, as in cel-go.
const MAX_LENGTH: usize = 100_000;

/// Stack of the thread that compiles: enough for the deepest expression in a build without optimisation.
const COMPILE_STACK: usize = 32 << 20;

/// A compiled expression.
#[derive(Debug)]
pub(crate) struct Program {
    root: check::Node,
}

/// The outcome of an evaluation, and what it cost.
pub(crate) struct Outcome<'a> {
    pub(crate) value: Result<Value<'a>, EvalError>,
    pub(crate) cost: u64,
}

/// Macros do not depend on anything: one environment serves all.
static MACROS: LazyLock<Env> = LazyLock::new(|| {
    let mut env = Env::stdlib();
    for one in macros::all() {
        // Names are distinct from the standard macros'; a test expands each.
        if let Err(error) = env.add_macro(one) {
            tracing::error!(?error, "an expression macro is declared twice");
        }
    }
    env
});

// === impl Program ===

impl Program {
    /// Parses and checks an expression over declared variables. The error is what cel-go would print.
    pub(crate) fn compile(source: &str, variables: &[(&str, Type)]) -> Result<Self, String> {
        let length = source.chars().count();
        if length > MAX_LENGTH {
            return Err(format!(
                "ERROR: <input>:1:1: expression code point size exceeds limit: size: {length}, limit {MAX_LENGTH}"
            ));
        }
        if guard::is_too_deep(source) {
            return Err(format!(
                "ERROR: <input>:1:1: expression recursion limit exceeded: {}",
                guard::MAX_DEPTH
            ));
        }
        // The parser needs more stack for one bracket than a worker thread can spare for all of them.
        std::thread::scope(|scope| {
            std::thread::Builder::new()
                .name("cel-compile".into())
                .stack_size(COMPILE_STACK)
                .spawn_scoped(scope, || Self::compile_here(source, variables))
                .map_err(|e| format!("failed to start a thread for compiling: {e}"))?
                .join()
                .unwrap_or_else(|_| Err("the expression could not be compiled".into()))
        })
    }

    fn compile_here(source: &str, variables: &[(&str, Type)]) -> Result<Self, String> {
        let parser = MACROS.parser().enable_optional_syntax(true);
        let (expression, info) = parser.parse_with_source_info(source).map_err(|errors| {
            let texts: Vec<String> = errors
                .errors
                .iter()
                .map(|e| {
                    let line = usize::try_from(e.pos.0).unwrap_or(1).max(1);
                    let column = usize::try_from(e.pos.1).unwrap_or(1).saturating_sub(1);
                    check::describe(source, (line, column), &e.msg)
                })
                .collect();
            texts.join("\n")
        })?;
        let variables: Vec<(String, Type)> =
            variables.iter().map(|(n, t)| ((*n).to_owned(), t.clone())).collect();
        Ok(Self { root: check::check(&expression, &info, &variables)? })
    }

    /// The type of what it evaluates to.
    pub(crate) fn output(&self) -> &Type {
        &self.root.ty
    }

    /// Does it read this variable?
    pub(crate) fn uses(&self, variable: &str) -> bool {
        self.root.uses(variable)
    }

    /// The most that it can cost when its variables are of this declaration.
    pub(crate) fn worst_case(&self, root: &Arc<Decl>) -> u64 {
        cost::estimate(&self.root, root)
    }

    /// Evaluates it.
    pub(crate) fn evaluate<'a>(&'a self, variables: &HashMap<&'a str, Value<'a>>, limit: u64) -> Outcome<'a> {
        let evaluated = eval::evaluate(&self.root, variables, limit);
        Outcome { value: evaluated.value, cost: evaluated.cost }
    }
}

#[cfg(test)]
mod tests;
