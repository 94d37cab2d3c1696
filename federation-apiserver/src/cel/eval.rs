//! Evaluation with a budget: every step is counted in cel-go's cost units and the count is bounded.

use std::collections::HashMap;
use std::sync::Arc;

use cel::common::ast::operators;

use super::check::{Call, FoldNode, Node, NodeKind};
use super::cost;
use super::library::Fault;
use super::macros::UNUSED;
use super::value::{Key, List, Map, Value};

/// Most units that one expression may cost, as in Kubernetes: about 0.1 s.
pub(crate) const PER_CALL_LIMIT: u64 = 1_000_000;

/// How an evaluation failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum EvalError {
    /// An error of the expression: `no such key: x`, `divide by zero`.
    Fault(String),
    /// It cost too much.
    CostExceeded,
}

impl std::fmt::Display for EvalError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Fault(text) => f.write_str(text),
            Self::CostExceeded => f.write_str("operation cancelled: actual cost limit exceeded"),
        }
    }
}

type Outcome<'a> = Result<Value<'a>, EvalError>;

/// A value or how it failed, and what it cost.
pub(crate) struct Evaluated<'a> {
    pub(crate) value: Result<Value<'a>, EvalError>,
    pub(crate) cost: u64,
}

/// Functions that the evaluator carries out itself.
#[cfg(test)]
pub(crate) fn is_syntax(function: &str) -> bool {
    matches!(
        function,
        operators::CONDITIONAL
            | operators::LOGICAL_AND
            | operators::LOGICAL_OR
            | operators::NOT_STRICTLY_FALSE
            | operators::OPT_SELECT
    )
}

/// Evaluates a checked expression.
pub(crate) fn evaluate<'a>(
    node: &'a Node,
    variables: &HashMap<&'a str, Value<'a>>,
    limit: u64,
) -> Evaluated<'a> {
    let mut evaluator = Evaluator { variables, locals: Vec::new(), cost: 0, limit };
    let value = evaluator.eval(node);
    Evaluated { value, cost: evaluator.cost }
}

struct Evaluator<'a, 'v> {
    variables: &'v HashMap<&'a str, Value<'a>>,
    /// Variables of comprehensions, innermost last.
    locals: Vec<(&'a str, Value<'a>)>,
    cost: u64,
    limit: u64,
}

fn fault(text: impl Into<String>) -> EvalError {
    EvalError::Fault(text.into())
}

// === impl Evaluator ===

impl<'a> Evaluator<'a, '_> {
    fn spend(&mut self, cost: u64) -> Result<(), EvalError> {
        self.cost = self.cost.saturating_add(cost);
        if self.cost > self.limit { Err(EvalError::CostExceeded) } else { Ok(()) }
    }

    fn eval(&mut self, node: &'a Node) -> Outcome<'a> {
        match &node.kind {
            NodeKind::Literal(value) => Ok(value.clone()),
            NodeKind::TypeName(name) => Ok(Value::Type(Arc::from(name.as_str()))),
            NodeKind::Variable(name) => {
                self.spend(cost::IDENT)?;
                self.variable(name)
            }
            NodeKind::Select { operand, field, test } => {
                let value = self.eval(operand)?;
                if !*test {
                    self.spend(cost::IDENT)?;
                }
                select(&value, field, *test)
            }
            NodeKind::Call(call) => self.call(call),
            NodeKind::List { items, optional } => {
                let mut values = Vec::with_capacity(items.len());
                for (i, item) in items.iter().enumerate() {
                    let value = self.eval(item)?;
                    if !optional.contains(&i) {
                        values.push(value);
                        continue;
                    }
                    match value {
                        Value::Optional(Some(inner)) => values.push((*inner).clone()),
                        Value::Optional(None) => {}
                        other => {
                            return Err(fault(format!(
                                "cannot initialize optional list element from non-optional value {}",
                                other.type_name()
                            )));
                        }
                    }
                }
                self.spend(cost::LIST)?;
                Ok(Value::list(values))
            }
            NodeKind::Map(entries) => {
                let mut map = std::collections::BTreeMap::new();
                for entry in entries {
                    let key = self.eval(&entry.key)?;
                    let key = key
                        .to_key()
                        .ok_or_else(|| fault(format!("unsupported key type: {}", key.type_name())))?;
                    let value = self.eval(&entry.value)?;
                    let value = match (entry.optional, value) {
                        (false, value) => value,
                        (true, Value::Optional(None)) => continue,
                        (true, Value::Optional(Some(inner))) => (*inner).clone(),
                        (true, other) => {
                            return Err(fault(format!(
                                "cannot initialize optional entry from non-optional value {}",
                                other.type_name()
                            )));
                        }
                    };
                    map.insert(key, value);
                }
                self.spend(cost::MAP)?;
                Ok(Value::Map(Map::Values(Arc::new(map))))
            }
            NodeKind::Fold(fold) => self.fold(fold),
        }
    }

    fn variable(&self, name: &str) -> Outcome<'a> {
        let local = self.locals.iter().rev().find(|(n, _)| *n == name).map(|(_, v)| v);
        local
            .or_else(|| self.variables.get(name))
            .cloned()
            .ok_or_else(|| fault(format!("no such attribute(s): {name}")))
    }

    fn call(&mut self, call: &'a Call) -> Outcome<'a> {
        let arguments = &call.arguments;
        match (call.function, arguments.as_slice()) {
            (operators::CONDITIONAL, [condition, yes, no]) => match self.eval(condition)? {
                Value::Bool(true) => self.eval(yes),
                Value::Bool(false) => self.eval(no),
                _ => Err(fault("no such overload")),
            },
            (operators::LOGICAL_AND, [left, right]) => self.logic(left, right, false),
            (operators::LOGICAL_OR, [left, right]) => self.logic(left, right, true),
            (operators::NOT_STRICTLY_FALSE, [inner]) => {
                let value = self.eval(inner);
                self.spend(1)?;
                match value {
                    Ok(Value::Bool(b)) => Ok(Value::Bool(b)),
                    Err(EvalError::CostExceeded) => Err(EvalError::CostExceeded),
                    _ => Ok(Value::Bool(true)),
                }
            }
            (operators::OPT_SELECT, [operand, field]) => {
                let value = self.eval(operand)?;
                self.spend(cost::IDENT)?;
                match &field.kind {
                    NodeKind::Literal(Value::Str(name)) => optional_select(&value, name),
                    _ => Err(fault("no such overload")),
                }
            }
            // Collecting comprehensions append to their accumulator: in place, as nobody else sees it.
            (operators::ADD, [Node { kind: NodeKind::Variable(name), .. }, right])
                if name.starts_with('@') =>
            {
                self.spend(cost::IDENT)?;
                let right = self.eval(right)?;
                self.spend(1)?;
                let accumulator = self.locals.iter_mut().rev().find(|(n, _)| n == name).map(|(_, v)| v);
                match (accumulator.map(|v| std::mem::replace(v, Value::Null)), right) {
                    (Some(Value::List(List::Values(mut items))), Value::List(more)) => {
                        Arc::make_mut(&mut items).extend(more.values().map_err(EvalError::Fault)?);
                        Ok(Value::List(List::Values(items)))
                    }
                    (Some(Value::Int(a)), Value::Int(b)) => {
                        a.checked_add(b).map(Value::Int).ok_or_else(|| fault("integer overflow"))
                    }
                    _ => Err(fault("no such overload")),
                }
            }
            ("cel.@mapInsert", [Node { kind: NodeKind::Variable(name), .. }, rest @ ..])
                if name.starts_with('@') =>
            {
                self.spend(cost::IDENT + 1)?;
                let added = rest.iter().map(|a| self.eval(a)).collect::<Result<Vec<_>, _>>()?;
                let accumulator = self.locals.iter_mut().rev().find(|(n, _)| n == name).map(|(_, v)| v);
                let Some(Value::Map(Map::Values(mut map))) =
                    accumulator.map(|v| std::mem::replace(v, Value::Null))
                else {
                    return Err(fault("no such overload"));
                };
                let entries = match added.as_slice() {
                    [Value::Map(more)] => more.entries().map_err(EvalError::Fault)?.into_iter().collect(),
                    [key, value] => {
                        let key = key
                            .to_key()
                            .ok_or_else(|| fault(format!("unsupported key type: {}", key.type_name())))?;
                        vec![(key, value.clone())]
                    }
                    _ => return Err(fault("no such overload")),
                };
                for (key, value) in entries {
                    let shown = match &key {
                        Key::Bool(b) => b.to_string(),
                        Key::Int(n) => n.to_string(),
                        Key::Str(s) => s.to_string(),
                    };
                    if Arc::make_mut(&mut map).insert(key, value).is_some() {
                        return Err(fault(format!("insert failed: key {shown} already exists")));
                    }
                }
                Ok(Value::Map(Map::Values(map)))
            }
            _ => {
                let mut values = Vec::with_capacity(arguments.len());
                for argument in arguments {
                    values.push(self.eval(argument)?);
                }
                // What is too expensive is not even begun.
                let before = cost::of_call(call.function, &values, None);
                self.spend(before)?;
                let Some(implementation) = call.implementation else { return Err(fault("no such overload")) };
                let result = implementation(&values).map_err(|e| match e {
                    Fault::NoOverload => fault("no such overload"),
                    Fault::Text(text) => EvalError::Fault(text),
                })?;
                let after = cost::of_call(call.function, &values, Some(&result));
                self.spend(after.saturating_sub(before))?;
                Ok(result)
            }
        }
    }

    /// `&&` and `||`: an error on one side does not matter when the other decides.
    fn logic(&mut self, left: &'a Node, right: &'a Node, decisive: bool) -> Outcome<'a> {
        let first = self.eval(left);
        match first {
            Ok(Value::Bool(b)) if b == decisive => return Ok(Value::Bool(decisive)),
            Err(EvalError::CostExceeded) => return Err(EvalError::CostExceeded),
            _ => {}
        }
        match (first, self.eval(right)) {
            (_, Ok(Value::Bool(b))) if b == decisive => Ok(Value::Bool(decisive)),
            (_, Err(EvalError::CostExceeded)) => Err(EvalError::CostExceeded),
            (Err(error), _) | (Ok(_), Err(error)) => Err(error),
            (Ok(Value::Bool(_)), Ok(Value::Bool(_))) => Ok(Value::Bool(!decisive)),
            _ => Err(fault("no such overload")),
        }
    }

    fn fold(&mut self, fold: &'a FoldNode) -> Outcome<'a> {
        let range = self.eval(&fold.range)?;
        let accumulator = self.eval(&fold.init)?;
        let base = self.locals.len();
        self.locals.push((&fold.accumulator, accumulator));
        let result = self.fold_over(fold, &range, base);
        self.locals.truncate(base);
        result
    }

    fn fold_over(&mut self, fold: &'a FoldNode, range: &Value<'a>, base: usize) -> Outcome<'a> {
        let two = fold.second.as_deref();
        let keys = match range {
            Value::Map(map) => map.keys(),
            _ => Vec::new(),
        };
        let count = match range {
            Value::List(list) => list.len(),
            Value::Map(_) => keys.len(),
            _ => return Err(fault("no such overload")),
        };
        for i in 0..count {
            let (first, second) = match range {
                Value::List(list) => {
                    let item = list.get(i).unwrap_or(Ok(Value::Null)).map_err(EvalError::Fault)?;
                    match two {
                        Some(_) => (Value::Int(i64::try_from(i).unwrap_or(i64::MAX)), Some(item)),
                        None => (item, None),
                    }
                }
                Value::Map(map) => {
                    let second = two
                        .map(|_| map.get(&keys[i]).unwrap_or(Ok(Value::Null)))
                        .transpose()
                        .map_err(EvalError::Fault)?;
                    (keys[i].to_value(), second)
                }
                _ => return Err(fault("no such overload")),
            };
            if fold.variable != UNUSED {
                self.locals.push((&fold.variable, first));
            }
            if let (Some(name), Some(value)) = (two, second) {
                self.locals.push((name, value));
            }
            let go_on = self.eval(&fold.condition)?;
            if matches!(go_on, Value::Bool(false)) {
                self.locals.truncate(base + 1);
                break;
            }
            let step = self.eval(&fold.step);
            self.locals.truncate(base + 1);
            match step {
                Ok(value) => self.locals[base].1 = value,
                Err(EvalError::CostExceeded) => return Err(EvalError::CostExceeded),
                // The condition and the result of quantifiers look past an error of one item.
                Err(error) => return self.fold_error(fold, range, i + 1, base, &keys, error),
            }
        }
        self.eval(&fold.result)
    }

    /// One item failed. `exists` and `all` may still be decided by a later item; anything else fails.
    fn fold_error(
        &mut self,
        fold: &'a FoldNode,
        range: &Value<'a>,
        from: usize,
        base: usize,
        keys: &[Key],
        error: EvalError,
    ) -> Outcome<'a> {
        let NodeKind::Call(call) = &fold.step.kind else { return Err(error) };
        let decisive = match call.function {
            operators::LOGICAL_OR => true,
            operators::LOGICAL_AND => false,
            _ => return Err(error),
        };
        let Some(body) = call.arguments.get(1) else { return Err(error) };
        let count = match range {
            Value::List(list) => list.len(),
            _ => keys.len(),
        };
        for i in from..count {
            let (first, second) = match range {
                Value::List(list) => {
                    let item = list.get(i).unwrap_or(Ok(Value::Null)).map_err(EvalError::Fault)?;
                    if fold.second.is_some() {
                        (Value::Int(i64::try_from(i).unwrap_or(i64::MAX)), Some(item))
                    } else {
                        (item, None)
                    }
                }
                Value::Map(map) => {
                    let Some(key) = keys.get(i) else { break };
                    (key.to_value(), map.get(key).transpose().map_err(EvalError::Fault)?)
                }
                _ => return Err(error),
            };
            self.locals.push((&fold.variable, first));
            if let (Some(name), Some(value)) = (fold.second.as_deref(), second) {
                self.locals.push((name, value));
            }
            self.spend(3)?;
            let value = self.eval(body);
            self.locals.truncate(base + 1);
            match value {
                Ok(Value::Bool(b)) if b == decisive => return Ok(Value::Bool(decisive)),
                Err(EvalError::CostExceeded) => return Err(EvalError::CostExceeded),
                _ => {}
            }
        }
        Err(error)
    }
}

/// `x.field`, or `has(x.field)`.
fn select<'a>(value: &Value<'a>, field: &str, test: bool) -> Outcome<'a> {
    match value {
        Value::Map(map) => {
            let found = map.field(field);
            if test {
                // A declared field that is null is not there.
                return Ok(Value::Bool(match found {
                    Some(Ok(Value::Null)) => !matches!(map, Map::Object(..)),
                    Some(_) => true,
                    None => false,
                }));
            }
            match found {
                Some(value) => value.map_err(EvalError::Fault),
                None if map.knows(field) => Err(fault(format!("no such key: {field}"))),
                None => Err(fault(format!("no such field '{field}'"))),
            }
        }
        Value::Optional(None) if test => Ok(Value::Bool(false)),
        Value::Optional(None) => Ok(Value::Optional(None)),
        Value::Optional(Some(inner)) if test => select(inner, field, true),
        Value::Optional(Some(_)) => optional_select(value, field),
        _ if test => Err(fault(format!("no such overload: {}", value.type_name()))),
        other => Err(fault(format!("no such overload: {}.{field}", other.type_name()))),
    }
}

fn optional_select<'a>(value: &Value<'a>, field: &str) -> Outcome<'a> {
    match value {
        Value::Optional(None) => Ok(Value::Optional(None)),
        Value::Optional(Some(inner)) => optional_select(inner, field),
        Value::Map(map) => match map.field(field) {
            Some(value) => Ok(Value::some(value.map_err(EvalError::Fault)?)),
            None => Ok(Value::Optional(None)),
        },
        other => Err(fault(format!("no such overload: {}.?{field}", other.type_name()))),
    }
}
