//! Costs in cel-go's units: of calls at run time, and the worst case of an expression beforehand.
//!
//! The numbers are those of cel-go (`checker/cost.go`, `interpreter/runtimecost.go`) and of Kubernetes'
//! `k8s.io/apiserver/pkg/cel/library/cost.go`. They decide which rules a CRD may have, so they have to be the same.

use std::collections::HashMap;
use std::sync::Arc;

use super::check::{Call, FoldNode, Node, NodeKind};
use super::functions;
use super::macros::{ACCUMULATOR, UNUSED};
use super::types::{Decl, DeclKind, Type};
use super::value::Value;

/// Reading a variable or a field.
pub(crate) const IDENT: u64 = 1;
/// Making a list.
pub(crate) const LIST: u64 = 10;
/// Making a map.
pub(crate) const MAP: u64 = 30;
/// Going over a string once, per character.
const TRAVERSAL: f64 = 0.1;
/// Running a pattern, per character of the pattern.
const REGEX: f64 = 0.25;
/// Length that is assumed of the patterns behind named formats.
const FORMAT_REGEX: u64 = 128;
/// Longest text of a format's name.
const MAX_FORMAT: u64 = 64;

#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn factor(size: u64, factor: f64) -> u64 {
    // Floats saturate when they are cast, as the original does by hand.
    (size as f64 * factor).ceil() as u64
}

/// Units of a question to the authorizer.
const AUTHORIZATION: u64 = 350_000;
/// Units of one requirement of a selector.
const REQUIREMENT: u64 = 50;

/// What a call costs at run time, beyond its arguments. Without a result: what is known before it runs.
pub(crate) fn of_call(function: &str, arguments: &[Value<'_>], result: Option<&Value<'_>>) -> u64 {
    let size = |i: usize| arguments.get(i).map_or(1, Value::size);
    let traversed = |i: usize, times: f64| factor(size(i), times * TRAVERSAL);
    let pattern = |text: u64, pattern: u64| {
        factor(text.saturating_add(1), TRAVERSAL).saturating_mul(factor(pattern, REGEX))
    };
    match function {
        "isSorted" | "sum" | "max" | "min" | "indexOf" | "lastIndexOf" => match arguments.first() {
            Some(Value::List(list)) => list
                .values()
                .map_or(1, |items| items.iter().map(traversal_of).fold(0_u64, u64::saturating_add)),
            _ => traversed(0, 1.0),
        },
        "url" | "lowerAscii" | "upperAscii" | "substring" | "trim" | "cidr" | "isIP" | "isCIDR"
        | "quantity" | "isQuantity" | "semver" | "isSemver" | "startsWith" | "endsWith" | "strings.quote"
        | "format" => traversed(0, 1.0),
        "ip" if matches!(arguments.first(), Some(Value::Cidr(..))) => 1,
        "ip" => traversed(0, 1.0),
        "ip.isCanonical" | "replace" | "split" => traversed(0, 2.0),
        "join" => result.map_or(0, |r| factor(r.size(), 2.0 * TRAVERSAL)),
        "find" | "findAll" | "matches" => pattern(size(0), size(1)),
        "validate" => pattern(size(1), FORMAT_REGEX),
        "containsIP" | "containsCIDR" => {
            let mut cost = traversed(0, 2.0);
            if function == "containsCIDR" {
                cost += traversed(0, 1.0) + 1;
            }
            if matches!(arguments.get(1), Some(Value::Str(_))) {
                cost += traversed(1, 1.0);
            }
            cost
        }
        "bytes" | "string" if matches!(arguments.first(), Some(Value::Str(_) | Value::Bytes(_))) => {
            let converts = matches!(
                (function, arguments.first()),
                ("bytes", Some(Value::Str(_))) | ("string", Some(Value::Bytes(_)))
            );
            if converts { traversed(0, 1.0) } else { 1 }
        }
        "@in" => match arguments.get(1) {
            Some(Value::List(list)) => list.len() as u64,
            _ => 1,
        },
        "_==_"
            if matches!(
                arguments.first(),
                Some(
                    Value::Quantity(_)
                        | Value::Ip(_)
                        | Value::Cidr(..)
                        | Value::Format(_)
                        | Value::Url(_)
                        | Value::Semver(_)
                )
            ) =>
        {
            1
        }
        "_==_" | "_!=_" => factor(size(0).min(size(1)), TRAVERSAL),
        "_<_" | "_<=_" | "_>_" | "_>=_"
            if matches!(arguments.first(), Some(Value::Str(_) | Value::Bytes(_))) =>
        {
            factor(size(0).min(size(1)), TRAVERSAL)
        }
        "_+_" if matches!(arguments.first(), Some(Value::Str(_) | Value::Bytes(_))) => {
            factor(size(0).saturating_add(size(1)), TRAVERSAL)
        }
        "contains" => traversed(0, 1.0).saturating_mul(traversed(1, 1.0)),
        // So much that an expression has two of them.
        "check" => AUTHORIZATION,
        // A list of requirements, each of which takes two characters at least and makes a list and a struct.
        "fieldSelector" | "labelSelector" => LIST
            .saturating_add(traversed(1, 1.0))
            .saturating_add(factor(size(1), 0.5).saturating_mul(REQUIREMENT)),
        _ => 1,
    }
}

/// Units of going over a value once.
fn traversal_of(value: &Value<'_>) -> u64 {
    match value {
        Value::Str(_) | Value::Bytes(_) => factor(value.size(), TRAVERSAL),
        Value::List(list) => {
            list.values().map_or(1, |v| v.iter().map(traversal_of).fold(0, u64::saturating_add))
        }
        _ => 1,
    }
}

/// A range of sizes or costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    min: u64,
    max: u64,
}

const UNKNOWN: Range = Range { min: 0, max: u64::MAX };

impl Range {
    const fn fixed(n: u64) -> Self {
        Self { min: n, max: n }
    }

    fn plus(self, other: Self) -> Self {
        Self { min: self.min.saturating_add(other.min), max: self.max.saturating_add(other.max) }
    }

    fn times(self, other: Self) -> Self {
        Self { min: self.min.saturating_mul(other.min), max: self.max.saturating_mul(other.max) }
    }

    fn by(self, f: f64) -> Self {
        Self { min: factor(self.min, f), max: factor(self.max, f) }
    }

    fn union(self, other: Self) -> Self {
        Self { min: self.min.min(other.min), max: self.max.max(other.max) }
    }
}

/// Sizes of what a list or map holds.
#[derive(Clone, Copy)]
struct EntrySize {
    list: bool,
    key: Range,
    value: Range,
}

#[derive(Clone)]
struct Local {
    path: Option<Vec<String>>,
    size: Option<Range>,
    entry: Option<EntrySize>,
}

struct Estimator<'a> {
    root: &'a Arc<Decl>,
    paths: HashMap<usize, Vec<String>>,
    locals: HashMap<&'a str, Vec<Local>>,
    sizes: HashMap<usize, Range>,
    entries: HashMap<usize, EntrySize>,
}

/// The most that an expression over `self` (and `oldSelf`) of this declaration can cost.
pub(crate) fn estimate(node: &Node, root: &Arc<Decl>) -> u64 {
    let mut estimator = Estimator {
        root,
        paths: HashMap::new(),
        locals: HashMap::new(),
        sizes: HashMap::new(),
        entries: HashMap::new(),
    };
    estimator.cost(node).max
}

// === impl Estimator ===

impl<'a> Estimator<'a> {
    fn cost(&mut self, node: &'a Node) -> Range {
        match &node.kind {
            NodeKind::Literal(_) => Range::fixed(0),
            NodeKind::TypeName(name) => {
                // Counted as large as `self`, as every name is that has no declaration of its own.
                self.paths.insert(node.id, vec![name.clone()]);
                Range::fixed(IDENT)
            }
            NodeKind::Variable(name) => {
                let local = self.locals.get(name.as_str()).and_then(|l| l.last());
                let path = match local {
                    Some(local) => local.path.clone(),
                    None => Some(vec![name.clone()]),
                };
                if let Some(path) = path {
                    self.paths.insert(node.id, path);
                }
                Range::fixed(IDENT)
            }
            NodeKind::Select { operand, field, test } => {
                let mut sum = self.cost(operand);
                if *test {
                    return sum;
                }
                if matches!(operand.ty, Type::Map(..) | Type::Object(_) | Type::Param(_)) {
                    sum = sum.plus(Range::fixed(IDENT));
                }
                let mut path = self.path(operand).unwrap_or_default();
                path.push(field.clone());
                self.paths.insert(node.id, path);
                sum
            }
            NodeKind::Call(call) => self.call(node, call),
            NodeKind::List { items, .. } => {
                let mut sum = Range::fixed(0);
                let mut size = Range { min: if items.is_empty() { 0 } else { u64::MAX }, max: 0 };
                for item in items {
                    sum = sum.plus(self.cost(item));
                    size = size.union(self.size_or_unknown(item));
                }
                self.entries.insert(node.id, EntrySize { list: true, key: Range::fixed(1), value: size });
                sum.plus(Range::fixed(LIST))
            }
            NodeKind::Map(entries) => {
                let mut sum = Range::fixed(0);
                let empty = Range { min: if entries.is_empty() { 0 } else { u64::MAX }, max: 0 };
                let (mut keys, mut values) = (empty, empty);
                for entry in entries {
                    sum = sum.plus(self.cost(&entry.key)).plus(self.cost(&entry.value));
                    keys = keys.union(self.size_or_unknown(&entry.key));
                    values = values.union(self.size_or_unknown(&entry.value));
                }
                self.entries.insert(node.id, EntrySize { list: false, key: keys, value: values });
                sum.plus(Range::fixed(MAP))
            }
            NodeKind::Fold(fold) => self.fold(node, fold),
        }
    }

    fn push(&mut self, name: &'a str, local: Local) {
        self.locals.entry(name).or_default().push(local);
    }

    fn pop(&mut self, name: &str) {
        if let Some(stack) = self.locals.get_mut(name) {
            stack.pop();
        }
    }

    fn fold(&mut self, node: &'a Node, fold: &'a FoldNode) -> Range {
        let mut sum = self.cost(&fold.range).plus(self.cost(&fold.init));
        let accumulator =
            Local { path: self.path(&fold.init), size: self.size(&fold.init), entry: self.entry(&fold.init) };
        if fold.variable == UNUSED && fold.accumulator != ACCUMULATOR {
            // Only binds a name.
            self.push(&fold.accumulator, accumulator);
            sum = sum.plus(self.cost(&fold.result));
            self.pop(&fold.accumulator);
            if let Some(size) = self.size(&fold.result) {
                self.sizes.insert(node.id, size);
            }
            if let Some(entry) = self.entry(&fold.result) {
                self.entries.insert(node.id, entry);
            }
            return sum;
        }
        self.push(&fold.accumulator, accumulator);
        let entry = self.entry(&fold.range);
        let is_list = entry.map_or(matches!(fold.range.ty, Type::List(_)), |e| e.list);
        let step_path = |estimator: &Self, step: &str| {
            let mut path = estimator.path(&fold.range).unwrap_or_default();
            path.push(step.to_owned());
            Some(path)
        };
        match &fold.second {
            Some(second) => {
                let key = step_path(self, if is_list { "@indices" } else { "@keys" });
                self.push(&fold.variable, Local { path: key, size: entry.map(|e| e.key), entry: None });
                let value = step_path(self, if is_list { "@items" } else { "@values" });
                self.push(second, Local { path: value, size: entry.map(|e| e.value), entry: None });
            }
            None => {
                let path = step_path(self, if is_list { "@items" } else { "@keys" });
                let size = entry.map(|e| if is_list { e.value } else { e.key });
                self.push(&fold.variable, Local { path, size, entry: None });
            }
        }
        let condition = self.cost(&fold.condition);
        let step = self.cost(&fold.step);
        self.pop(&fold.variable);
        if let Some(second) = &fold.second {
            self.pop(second);
        }
        sum = sum.plus(self.cost(&fold.result));
        self.pop(&fold.accumulator);
        let count = self.size_or_unknown(&fold.range);
        sum = sum.plus(count.times(step.plus(condition)));
        match &fold.init.kind {
            NodeKind::Literal(_) => {
                if let Some(size) = self.size(&fold.init) {
                    self.sizes.insert(node.id, size);
                }
            }
            NodeKind::List { .. } | NodeKind::Map(_) => {
                self.sizes.insert(node.id, count);
                if let Some(entry) = self.entry(&fold.step) {
                    self.entries.insert(node.id, entry);
                }
            }
            _ => {}
        }
        sum
    }

    fn call(&mut self, node: &'a Node, call: &'a Call) -> Range {
        if call.function == "dyn"
            && let Some(argument) = call.arguments.first()
        {
            let cost = self.cost(argument);
            if let Some(size) = self.size(argument) {
                self.sizes.insert(node.id, size);
            }
            if let Some(entry) = self.entry(argument) {
                self.entries.insert(node.id, entry);
            }
            return cost.plus(Range::fixed(1));
        }
        let costs: Vec<Range> = call.arguments.iter().map(|a| self.cost(a)).collect();
        let mut cost = Range { min: u64::MAX, max: 0 };
        let mut result_size: Option<Range> = None;
        for overload in &call.overloads {
            let (own, size) = self.overload(node, call, overload, &costs);
            cost = cost.union(own);
            if let Some(size) = size {
                result_size = Some(result_size.map_or(size, |s| s.union(size)));
            }
            if let (true, Some(base)) =
                (*overload == "index_list" || *overload == "index_map", call.arguments.first())
            {
                result_size = self.entry(base).map(|e| e.value);
                let mut path = self.path(base).unwrap_or_default();
                path.push(if *overload == "index_list" { "@items" } else { "@values" }.to_owned());
                self.paths.insert(node.id, path);
            }
            if result_size.is_none() {
                result_size = self.size(node);
            }
        }
        if let Some(size) = result_size {
            self.sizes.insert(node.id, size);
        }
        cost
    }

    /// Cost of one overload with its arguments, and the size of its result where that is known.
    fn overload(
        &mut self,
        node: &'a Node,
        call: &'a Call,
        overload: &str,
        costs: &[Range],
    ) -> (Range, Option<Range>) {
        let arguments = call.arguments.as_slice();
        let all = costs.iter().fold(Range::fixed(0), |sum, c| sum.plus(*c));
        let one = Range::fixed(1);
        // A missing argument cannot be: the overload has matched.
        let Some(first) = arguments.first() else { return (one.plus(all), None) };
        let second = arguments.get(1);
        let size = self.size_or_unknown(first);
        let second_size = second.map_or(one, |s| self.size_or_unknown(s));
        let pattern =
            |text: Range, pattern: Range| text.plus(Range::fixed(1)).by(TRAVERSAL).times(pattern.by(REGEX));
        let (own, result) = match call.function {
            "isSorted" | "sum" | "max" | "min" | "indexOf" | "lastIndexOf" => match &first.ty {
                Type::List(item) => {
                    let mut each = one;
                    if matches!(**item, Type::Str | Type::Bytes) {
                        each = each.plus(self.item_size(first).by(TRAVERSAL));
                    }
                    (size.times(each), None)
                }
                _ => (size.by(TRAVERSAL), None),
            },
            "url" | "lowerAscii" | "upperAscii" | "substring" | "trim" => (size.by(TRAVERSAL), Some(size)),
            "replace" => (size.by(2.0 * TRAVERSAL), Some(self.replaced(size, arguments))),
            "split" => {
                let mut most = size.max;
                if let Some(NodeKind::Literal(Value::Int(n))) = arguments.get(2).map(|a| &a.kind) {
                    most = u64::try_from(*n).unwrap_or(u64::MAX);
                }
                (size.by(2.0 * TRAVERSAL), Some(Range { min: 0, max: most }))
            }
            "join" => {
                let mut total = match &first.ty {
                    Type::List(_) => size.times(self.item_size(first)),
                    _ => Range::fixed(0),
                };
                if second.is_some() {
                    let separators =
                        Range { min: size.min.saturating_sub(1), max: size.max.saturating_sub(1) };
                    total = total.plus(second_size.times(separators));
                }
                (total.by(TRAVERSAL), Some(total))
            }
            "find" | "findAll" => (pattern(size, second_size), Some(Range { min: 0, max: size.max })),
            "cidr" | "isIP" | "isCIDR" | "quantity" | "isQuantity" | "semver" | "isSemver" => {
                (size.by(TRAVERSAL), None)
            }
            "ip" if overload == "cidr_ip" => (one, None),
            "ip" => (size.by(TRAVERSAL), None),
            "ip.isCanonical" => (size.by(2.0 * TRAVERSAL), None),
            "containsIP" | "containsCIDR" => {
                let address = Range { min: 4, max: 16 };
                let mut cost = address.plus(address).by(TRAVERSAL);
                if call.function == "containsCIDR" {
                    cost = cost.plus(address.by(TRAVERSAL)).plus(one);
                }
                if overload.ends_with("_string") {
                    cost = cost.plus(second_size.by(TRAVERSAL));
                }
                (cost, None)
            }
            #[allow(clippy::cast_precision_loss)]
            "validate" => (second_size.by(TRAVERSAL).by(FORMAT_REGEX as f64 * REGEX), None),
            "_==_" if is_library(first) && second.is_some_and(|s| s.ty.same(&first.ty)) => {
                let cost = match &first.ty {
                    Type::Opaque(functions::FORMAT) => Range { min: 1, max: MAX_FORMAT }.by(TRAVERSAL),
                    Type::Opaque(functions::URL) => one.by(TRAVERSAL),
                    _ => one,
                };
                (cost, None)
            }
            _ => match overload {
                "string_format" => (size.by(TRAVERSAL), None),
                "string_to_bytes" => {
                    (size.by(TRAVERSAL), Some(Range { min: size.min, max: size.max.saturating_mul(4) }))
                }
                "bytes_to_string" => (size.by(TRAVERSAL), Some(Range { min: size.min / 4, max: size.max })),
                "strings_quote" => (
                    size.by(TRAVERSAL),
                    Some(Range {
                        min: size.min.saturating_add(2),
                        max: size.max.saturating_mul(2).saturating_add(2),
                    }),
                ),
                "starts_with_string" | "ends_with_string" => (second_size.by(TRAVERSAL), None),
                "in_list" => (second_size.by(1.0), None),
                "matches_string" => (pattern(size, second_size), None),
                "contains_string" => (size.by(TRAVERSAL).times(second_size.by(TRAVERSAL)), None),
                "logical_or" | "logical_and" => {
                    let (left, right) = (costs[0], costs.get(1).copied().unwrap_or(one));
                    return (Range { min: left.min, max: left.plus(right).max }, None);
                }
                "conditional" => {
                    let (Some(yes), Some(no)) = (second, arguments.get(2)) else { return (all, None) };
                    let size = self.size_or_unknown(yes).union(self.size_or_unknown(no));
                    if let Some(entry) = joined(self.entry(yes), self.entry(no)) {
                        self.entries.insert(node.id, entry);
                    }
                    return (costs[0].plus(costs[1].union(costs[2])), Some(size));
                }
                "add_string" | "add_bytes" | "add_list" => {
                    let total = size.plus(second_size);
                    if let Some(second) = second
                        && let Some(entry) = joined(self.entry(first), self.entry(second))
                    {
                        self.entries.insert(node.id, entry);
                    }
                    let cost = if overload == "add_list" { one } else { total.by(TRAVERSAL) };
                    (cost, Some(total))
                }
                "equals"
                | "not_equals"
                | "less_string"
                | "greater_string"
                | "less_equals_string"
                | "greater_equals_string"
                | "less_bytes"
                | "greater_bytes"
                | "less_equals_bytes"
                | "greater_equals_bytes" => {
                    let max = size.max.min(second_size.max);
                    (Range { min: u64::from(max > 0), max }.by(TRAVERSAL), None)
                }
                _ => (one, None),
            },
        };
        (own.plus(all), result)
    }

    /// Sizes that `replace` can lead to.
    fn replaced(&mut self, size: Range, arguments: &'a [Node]) -> Range {
        let (Some(from), Some(to)) = (arguments.get(1), arguments.get(2)) else { return UNKNOWN };
        let (from, to) = (self.size_or_unknown(from), self.size_or_unknown(to));
        let (mut count, mut kept) = (Range::fixed(0), Range::fixed(0));
        if from.min == 0 {
            count.max = size.max.saturating_add(1);
            kept.max = size.max;
        } else if to.max <= from.min {
            kept.max = size.max;
        } else {
            count.max = size.max.div_ceil(from.min);
        }
        if from.max == 0 {
            count.min = size.min.saturating_add(1);
            kept.min = size.min;
        } else if from.max <= to.min {
            kept.min = size.min;
        } else {
            count.min = size.min.div_ceil(from.max);
        }
        count.times(to).plus(kept)
    }

    /// Size of a list's items, by the schema where there is one.
    fn item_size(&self, list: &Node) -> Range {
        let Some(mut path) = self.known_path(list) else { return UNKNOWN };
        path.push("@items".into());
        self.declared(&path).unwrap_or(UNKNOWN)
    }

    fn path(&self, node: &Node) -> Option<Vec<String>> {
        if let NodeKind::Variable(name) = &node.kind
            && let Some(local) = self.locals.get(name.as_str()).and_then(|l| l.last())
        {
            return local.path.clone();
        }
        self.paths.get(&node.id).cloned()
    }

    /// A path that starts at a variable of the environment.
    fn known_path(&self, node: &Node) -> Option<Vec<String>> {
        self.path(node).filter(|p| !p.is_empty() && p[0] != ACCUMULATOR)
    }

    /// Size of what the schema has at a path.
    fn declared(&self, path: &[String]) -> Option<Range> {
        let mut decl = self.root;
        for step in path.get(1..)? {
            decl = match (&decl.kind, step.as_str()) {
                (DeclKind::List(item, _), "@items") => item,
                (DeclKind::Map(value), "@values" | "@items") => value,
                // Keys count as if they had no length, as in Kubernetes.
                (DeclKind::Map(_), "@keys") => return Some(Range::fixed(0)),
                (DeclKind::Object(_, fields), name) => &fields.get(name)?.decl,
                _ => return None,
            };
        }
        Some(Range { min: 0, max: decl.max_elements })
    }

    fn size(&mut self, node: &Node) -> Option<Range> {
        if let Some(size) = self.sizes.get(&node.id) {
            return Some(*size);
        }
        match &node.kind {
            NodeKind::Literal(value) => return Some(Range::fixed(value.size())),
            NodeKind::List { items, .. } => return Some(Range::fixed(items.len() as u64)),
            NodeKind::Map(entries) => return Some(Range::fixed(entries.len() as u64)),
            _ => {}
        }
        if let Some(size) = self.path(node).filter(|p| !p.is_empty()).and_then(|p| self.declared(&p)) {
            self.sizes.insert(node.id, size);
            return Some(size);
        }
        if node.ty.is_scalar() {
            return Some(Range::fixed(1));
        }
        match &node.kind {
            NodeKind::Variable(name) => self.locals.get(name.as_str())?.last()?.size,
            _ => None,
        }
    }

    fn size_or_unknown(&mut self, node: &Node) -> Range {
        self.size(node).unwrap_or(UNKNOWN)
    }

    fn entry(&self, node: &Node) -> Option<EntrySize> {
        if let Some(entry) = self.entries.get(&node.id) {
            return Some(*entry);
        }
        match &node.kind {
            NodeKind::Variable(name) => self.locals.get(name.as_str())?.last()?.entry,
            _ => None,
        }
    }
}

fn joined(a: Option<EntrySize>, b: Option<EntrySize>) -> Option<EntrySize> {
    let (a, b) = (a?, b?);
    Some(EntrySize { list: a.list, key: a.key.union(b.key), value: a.value.union(b.value) })
}

fn is_library(node: &Node) -> bool {
    matches!(node.ty, Type::Opaque(_))
}
