//! Type checking: from the parsed expression to a tree whose nodes know their types and overloads.
//!
//! Follows cel-go's checker (`google/cel-go/checker`), because its messages are what users of Kubernetes know.

use std::collections::HashMap;
use std::sync::Arc;

use cel::common::ast::{EntryExpr, Expr, IdedExpr, LiteralValue, SourceInfo, operators};

use super::functions::{self, Overload};
use super::library::{self, Implementation};
use super::types::{DeclKind, Type};
use super::value::Value;

/// A checked expression.
#[derive(Debug)]
pub(crate) struct Node {
    /// Unique within the expression.
    pub(crate) id: usize,
    /// The parsed expression that it came from, for messages.
    origin: u64,
    pub(crate) ty: Type,
    pub(crate) kind: NodeKind,
}

/// What a node does.
#[derive(Debug)]
pub(crate) enum NodeKind {
    Literal(Value<'static>),
    Variable(String),
    /// The name of a type, as a value.
    TypeName(String),
    Select {
        operand: Box<Node>,
        field: String,
        test: bool,
    },
    Call(Box<Call>),
    List {
        items: Vec<Node>,
        optional: Vec<usize>,
    },
    Map(Vec<Entry>),
    Fold(Box<FoldNode>),
}

/// A call; the target of a member function comes first among the arguments.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) function: &'static str,
    pub(crate) overloads: Vec<&'static str>,
    pub(crate) arguments: Vec<Node>,
    /// `None` for what the evaluator does itself (logic, indexes).
    pub(crate) implementation: Option<Implementation>,
}

/// One entry of a map literal.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) key: Node,
    pub(crate) value: Node,
    pub(crate) optional: bool,
}

/// A comprehension.
#[derive(Debug)]
pub(crate) struct FoldNode {
    pub(crate) range: Node,
    pub(crate) variable: String,
    pub(crate) second: Option<String>,
    pub(crate) accumulator: String,
    pub(crate) init: Node,
    pub(crate) condition: Node,
    pub(crate) step: Node,
    pub(crate) result: Node,
}

/// Declared variables: name and type.
pub(crate) type Variables = [(String, Type)];

/// Type checks an expression. Errors come one per line group, as cel-go prints them.
pub(crate) fn check(
    expression: &IdedExpr,
    source: &SourceInfo,
    variables: &Variables,
) -> Result<Node, String> {
    let mut checker = Checker {
        source,
        scopes: vec![variables.iter().cloned().collect()],
        bound: HashMap::new(),
        trail: Vec::new(),
        fresh: 0,
        nodes: 0,
        errors: Vec::new(),
    };
    let mut node = checker.check(expression);
    if checker.errors.is_empty() {
        checker.finish(&mut node);
        checker.check_literals(&node);
    }
    if checker.errors.is_empty() {
        return Ok(node);
    }
    // In the order of the text, each once.
    checker.errors.sort_by_key(|(position, _)| *position);
    checker.errors.dedup();
    let texts: Vec<String> = checker.errors.iter().map(|(p, m)| describe(&source.source, *p, m)).collect();
    Err(texts.join("\n"))
}

/// `ERROR: <input>:1:5: message` with the line and a mark below the place.
pub(crate) fn describe(source: &str, position: (usize, usize), message: &str) -> String {
    /// Longest line that is shown.
    const MAX_SNIPPET: usize = 16_384;
    let (line, column) = position;
    let mut text = format!("ERROR: <input>:{line}:{}: {message}", column + 1);
    if let Some(snippet) = source.split('\n').nth(line.saturating_sub(1)).filter(|s| s.len() <= MAX_SNIPPET) {
        let mark: String =
            snippet.chars().take(column).map(|c| if c.len_utf8() > 1 { '\u{ff0e}' } else { '.' }).collect();
        let wide = snippet.chars().nth(column).is_some_and(|c| c.len_utf8() > 1);
        let head = if wide { '\u{ff3e}' } else { '^' };
        text.push_str(&format!("\n | {}\n | {mark}{head}", snippet.replace('\t', " ")));
    }
    text
}

struct Checker<'a> {
    source: &'a SourceInfo,
    scopes: Vec<HashMap<String, Type>>,
    bound: HashMap<i32, Type>,
    /// What bindings were before they changed, to go back when an overload does not fit after all.
    trail: Vec<(i32, Option<Type>)>,
    fresh: i32,
    nodes: usize,
    errors: Vec<((usize, usize), String)>,
}

// === impl Checker ===

impl Checker<'_> {
    fn error(&mut self, id: u64, message: impl Into<String>) {
        let offset = self.source.offset_for(id).map_or(0, |(start, _)| start as usize);
        let (mut line, mut column) = (1, 0);
        for c in self.source.source.chars().take(offset) {
            if c == '\n' {
                line += 1;
                column = 0;
            } else {
                column += 1;
            }
        }
        self.errors.push(((line, column), message.into()));
    }

    fn node(&mut self, ty: Type, kind: NodeKind) -> Node {
        self.nodes += 1;
        Node { id: self.nodes, origin: 0, ty, kind }
    }

    fn fresh(&mut self) -> Type {
        self.fresh += 1;
        Type::Param(self.fresh - 1)
    }

    fn lookup(&self, name: &str) -> Option<Type> {
        self.scopes.iter().rev().find_map(|s| s.get(name)).cloned()
    }

    fn check(&mut self, e: &IdedExpr) -> Node {
        let mut node = self.check_expression(e);
        node.origin = e.id;
        node
    }

    fn check_expression(&mut self, e: &IdedExpr) -> Node {
        match &e.expr {
            Expr::Literal(literal) => {
                let (ty, value) = match literal {
                    LiteralValue::Boolean(v) => (Type::Bool, Value::Bool(*v.inner())),
                    LiteralValue::Int(v) => (Type::Int, Value::Int(*v.inner())),
                    LiteralValue::UInt(v) => (Type::Uint, Value::Uint(*v.inner())),
                    LiteralValue::Double(v) => (Type::Double, Value::Double(*v.inner())),
                    LiteralValue::String(v) => (Type::Str, Value::string(v.inner().to_owned())),
                    LiteralValue::Bytes(v) => (Type::Bytes, Value::Bytes(Arc::from(v.inner()))),
                    LiteralValue::Null => (Type::Null, Value::Null),
                };
                self.node(ty, NodeKind::Literal(value))
            }
            Expr::Ident(name) => self.check_ident(e, name),
            Expr::Select(select) => {
                // A variable whose name has a dot: `authorizer.requestResource`.
                if let Some((name, ty)) =
                    qualified(e).and_then(|name| Some((name.clone(), self.lookup(&name)?)))
                {
                    return self.node(ty, NodeKind::Variable(name));
                }
                if let Some(ty) = qualified(e).as_deref().and_then(qualified_type) {
                    return self.node(Type::Type(ty.clone().into()), NodeKind::TypeName(ty.name()));
                }
                let operand = self.check(&select.operand);
                let ty = self.check_field(e.id, &operand, &select.field, false);
                let ty = if select.test { Type::Bool } else { self.substitute(&ty, false) };
                let kind = NodeKind::Select {
                    operand: Box::new(operand),
                    field: select.field.clone(),
                    test: select.test,
                };
                self.node(ty, kind)
            }
            Expr::Call(_) => self.check_call(e),
            Expr::List(list) => {
                let mut items = Vec::new();
                let mut joined: Option<Type> = None;
                for (i, item) in list.elements.iter().enumerate() {
                    let node = self.check(item);
                    let mut ty = self.substitute(&node.ty, false);
                    if list.optional_indices.contains(&i) {
                        ty = self.unwrap_optional(item.id, ty);
                    }
                    joined = Some(self.join(item.id, joined, ty));
                    items.push(node);
                }
                let item = joined.unwrap_or_else(|| self.fresh());
                self.node(Type::list(item), NodeKind::List { items, optional: list.optional_indices.clone() })
            }
            Expr::Map(map) => {
                let (mut key_type, mut value_type) = (None, None);
                let mut entries = Vec::new();
                for entry in &map.entries {
                    let EntryExpr::MapEntry(entry) = &entry.expr else { continue };
                    let key = self.check(&entry.key);
                    let ty = self.substitute(&key.ty, false);
                    key_type = Some(self.join(entry.key.id, key_type, ty));
                    let value = self.check(&entry.value);
                    let mut ty = self.substitute(&value.ty, false);
                    if entry.optional {
                        ty = self.unwrap_optional(entry.value.id, ty);
                    }
                    value_type = Some(self.join(entry.value.id, value_type, ty));
                    entries.push(Entry { key, value, optional: entry.optional });
                }
                let key = key_type.unwrap_or_else(|| self.fresh());
                let value = value_type.unwrap_or_else(|| self.fresh());
                self.node(Type::map(key, value), NodeKind::Map(entries))
            }
            Expr::Struct(message) => {
                self.error(
                    e.id,
                    format!("undeclared reference to '{}' (in container '')", message.type_name),
                );
                self.node(Type::Error, NodeKind::Literal(Value::Null))
            }
            Expr::Comprehension(_) => self.check_fold(e),
            Expr::Unspecified => {
                self.error(e.id, "unexpected unspecified type");
                self.node(Type::Error, NodeKind::Literal(Value::Null))
            }
        }
    }

    fn check_ident(&mut self, e: &IdedExpr, name: &str) -> Node {
        if let Some(ty) = self.lookup(name.trim_start_matches('.')) {
            return self.node(ty, NodeKind::Variable(name.trim_start_matches('.').to_owned()));
        }
        if let Some(ty) = named_type(name) {
            return self.node(Type::Type(ty.clone().into()), NodeKind::TypeName(ty.name()));
        }
        self.error(e.id, format!("undeclared reference to '{name}' (in container '')"));
        self.node(Type::Error, NodeKind::Literal(Value::Null))
    }

    /// The type of a field; `optional` for `.?`.
    fn check_field(&mut self, id: u64, operand: &Node, field: &str, optional: bool) -> Type {
        let operand = self.substitute(&operand.ty, false);
        let (target, wrapped) = match &operand {
            Type::Optional(inner) => (self.substitute(inner, false), true),
            other => (other.clone(), false),
        };
        let result = match &target {
            Type::Map(_, value) => (**value).clone(),
            Type::Object(decl) => match &decl.kind {
                DeclKind::Object(_, fields) => match fields.get(field) {
                    Some(field) => field.decl.ty(),
                    None => {
                        self.error(id, format!("undefined field '{field}'"));
                        Type::Error
                    }
                },
                _ => Type::Dyn,
            },
            Type::Param(_) => {
                self.assignable(&Type::Dyn, &target);
                Type::Dyn
            }
            other => {
                if !other.is_dyn_or_error() {
                    self.error(id, format!("type '{other}' does not support field selection"));
                }
                Type::Dyn
            }
        };
        if wrapped || optional { Type::optional(result) } else { result }
    }

    fn check_call(&mut self, e: &IdedExpr) -> Node {
        let Expr::Call(call) = &e.expr else { return self.node(Type::Error, NodeKind::Literal(Value::Null)) };
        let name = call.func_name.as_str();
        if name == operators::OPT_SELECT {
            let (Some(operand), Some(field)) = (call.args.first(), call.args.get(1)) else {
                self.error(e.id, "unsupported optional field selection");
                return self.node(Type::Error, NodeKind::Literal(Value::Null));
            };
            let Expr::Literal(LiteralValue::String(text)) = &field.expr else {
                self.error(field.id, "unsupported optional field selection");
                return self.node(Type::Error, NodeKind::Literal(Value::Null));
            };
            let operand = self.check(operand);
            let ty = self.check_field(e.id, &operand, text.inner(), true);
            let ty = self.substitute(&ty, false);
            let field = self.node(Type::Str, NodeKind::Literal(Value::string(text.inner().to_owned())));
            let call = Call {
                function: operators::OPT_SELECT,
                overloads: vec!["select_optional_field"],
                arguments: vec![operand, field],
                implementation: None,
            };
            return self.node(ty, NodeKind::Call(Box::new(call)));
        }
        let mut arguments: Vec<Node> = call.args.iter().map(|a| self.check(a)).collect();
        let ids: Vec<u64> = call.args.iter().map(|a| a.id).collect();
        let Some(target) = &call.target else {
            return match functions::table().get_key_value(name) {
                Some((function, overloads)) => {
                    self.resolve(e.id, function, overloads, arguments, &ids, false)
                }
                None => {
                    self.error(e.id, format!("undeclared reference to '{name}' (in container '')"));
                    self.node(Type::Error, NodeKind::Literal(Value::Null))
                }
            };
        };
        // A namespaced function: `sets.contains(…)`.
        if let Some(prefix) = qualified(target)
            && let Some((function, overloads)) =
                functions::table().get_key_value(format!("{prefix}.{name}").as_str())
        {
            return self.resolve(e.id, function, overloads, arguments, &ids, false);
        }
        let target_node = self.check(target);
        arguments.insert(0, target_node);
        match functions::table().get_key_value(name) {
            Some((function, overloads)) => self.resolve(e.id, function, overloads, arguments, &ids, true),
            None => {
                self.error(e.id, format!("undeclared reference to '{name}' (in container '')"));
                self.node(Type::Error, NodeKind::Literal(Value::Null))
            }
        }
    }

    fn resolve(
        &mut self,
        id: u64,
        function: &'static str,
        overloads: &'static [Overload],
        arguments: Vec<Node>,
        ids: &[u64],
        member: bool,
    ) -> Node {
        let types: Vec<Type> = arguments.iter().map(|a| self.substitute(&a.ty, false)).collect();
        let mut matched = Vec::new();
        let mut result: Option<Type> = None;
        let logical = function == operators::LOGICAL_AND || function == operators::LOGICAL_OR;
        for overload in overloads.iter().filter(|o| o.member == member) {
            if logical {
                for (ty, id) in types.iter().zip(ids) {
                    if !self.assignable(ty, &Type::Bool) {
                        self.error(*id, format!("expected type 'bool' but found '{ty}'"));
                    }
                }
                matched.push(overload.id);
                result = Some(Type::Bool);
                break;
            }
            let mut names = HashMap::new();
            let wanted: Vec<Type> =
                overload.arguments.iter().map(|t| self.instantiate(t, &mut names)).collect();
            let produced = self.instantiate(&overload.result, &mut names);
            if wanted.len() != types.len() {
                continue;
            }
            let before = self.trail.len();
            if types.iter().zip(&wanted).all(|(t, w)| self.assignable_in(t, w)) {
                matched.push(overload.id);
                let produced = self.substitute(&produced, false);
                result = Some(match result {
                    None => produced,
                    Some(Type::Dyn) => Type::Dyn,
                    Some(earlier) if earlier.same(&produced) => earlier,
                    Some(_) => Type::Dyn,
                });
            } else {
                self.undo(before);
            }
        }
        let Some(result) = result else {
            let shown: Vec<String> = types.iter().map(|t| self.substitute(t, true).to_string()).collect();
            let signature = match shown.split_first() {
                Some((target, rest)) if member => format!("{target}.({})", rest.join(", ")),
                _ => format!("({})", shown.join(", ")),
            };
            self.error(id, format!("found no matching overload for '{function}' applied to '{signature}'"));
            return self.node(Type::Error, NodeKind::Literal(Value::Null));
        };
        let call = Call {
            function,
            overloads: matched,
            arguments,
            implementation: library::implementation(function),
        };
        self.node(result, NodeKind::Call(Box::new(call)))
    }

    fn check_fold(&mut self, e: &IdedExpr) -> Node {
        let Expr::Comprehension(c) = &e.expr else {
            return self.node(Type::Error, NodeKind::Literal(Value::Null));
        };
        let range = self.check(&c.iter_range);
        let init = self.check(&c.accu_init);
        let range_type = self.substitute(&range.ty, false);
        let accumulator_type = init.ty.clone();
        let two = c.iter_var2.is_some();
        let (first, second) = match &range_type {
            Type::List(item) if two => (Type::Int, Some((**item).clone())),
            Type::List(item) => ((**item).clone(), None),
            Type::Map(key, value) => ((**key).clone(), two.then(|| (**value).clone())),
            Type::Dyn | Type::Error | Type::Param(_) => {
                self.assignable(&Type::Dyn, &range_type);
                (Type::Dyn, two.then_some(Type::Dyn))
            }
            other => {
                self.error(
                    c.iter_range.id,
                    format!(
                        "expression of type '{other}' cannot be range of a comprehension (must be list, map, or dynamic)"
                    ),
                );
                (Type::Error, two.then_some(Type::Error))
            }
        };
        self.scopes.push(HashMap::from([(c.accu_var.clone(), accumulator_type.clone())]));
        let mut inner = HashMap::from([(c.iter_var.clone(), first)]);
        if let (Some(name), Some(ty)) = (&c.iter_var2, second) {
            inner.insert(name.clone(), ty);
        }
        self.scopes.push(inner);
        let condition = self.check(&c.loop_cond);
        self.expect(c.loop_cond.id, &Type::Bool, &condition);
        let step = self.check(&c.loop_step);
        self.expect(c.loop_step.id, &accumulator_type, &step);
        self.scopes.pop();
        let result = self.check(&c.result);
        self.scopes.pop();
        let ty = self.substitute(&result.ty, false);
        let fold = FoldNode {
            range,
            variable: c.iter_var.clone(),
            second: c.iter_var2.clone(),
            accumulator: c.accu_var.clone(),
            init,
            condition,
            step,
            result,
        };
        self.node(ty, NodeKind::Fold(Box::new(fold)))
    }

    fn expect(&mut self, id: u64, wanted: &Type, node: &Node) {
        let found = node.ty.clone();
        if !self.assignable(wanted, &found) {
            let (wanted, found) = (self.substitute(wanted, true), self.substitute(&found, true));
            self.error(id, format!("expected type '{wanted}' but found '{found}'"));
        }
    }

    fn unwrap_optional(&mut self, id: u64, ty: Type) -> Type {
        match ty {
            Type::Optional(inner) => (*inner).clone(),
            Type::Dyn => Type::Dyn,
            other => {
                self.error(id, format!("expected type 'optional_type({other})' but found '{other}'"));
                other
            }
        }
    }

    /// Items of literals have one type.
    fn join(&mut self, id: u64, previous: Option<Type>, current: Type) -> Type {
        let Some(previous) = previous else { return current };
        if self.assignable(&previous, &current) {
            return if less_specific(&previous, &current) { previous } else { current };
        }
        self.error(id, format!("expected type '{previous}' but found '{current}'"));
        Type::Error
    }

    fn instantiate(&mut self, ty: &Type, names: &mut HashMap<i32, Type>) -> Type {
        match ty {
            Type::Param(n) => {
                if let Some(known) = names.get(n) {
                    return known.clone();
                }
                let fresh = self.fresh();
                names.insert(*n, fresh.clone());
                fresh
            }
            Type::List(a) => Type::list(self.instantiate(a, names)),
            Type::Optional(a) => Type::optional(self.instantiate(a, names)),
            Type::Type(a) => Type::Type(self.instantiate(a, names).into()),
            Type::Map(a, b) => Type::map(self.instantiate(a, names), self.instantiate(b, names)),
            other => other.clone(),
        }
    }

    /// Puts in what type variables stand for; free ones become `dyn` when asked.
    fn substitute(&self, ty: &Type, free_to_dyn: bool) -> Type {
        match ty {
            Type::Param(n) => match self.bound.get(n) {
                Some(bound) => self.substitute(bound, free_to_dyn),
                None if free_to_dyn => Type::Dyn,
                None => ty.clone(),
            },
            Type::List(a) => Type::list(self.substitute(a, free_to_dyn)),
            Type::Optional(a) => Type::optional(self.substitute(a, free_to_dyn)),
            Type::Type(a) => Type::Type(self.substitute(a, free_to_dyn).into()),
            Type::Map(a, b) => Type::map(self.substitute(a, free_to_dyn), self.substitute(b, free_to_dyn)),
            other => other.clone(),
        }
    }

    /// Does a value of one type fit the other? Binds type variables only when it does.
    fn assignable(&mut self, a: &Type, b: &Type) -> bool {
        let before = self.trail.len();
        let fits = self.assignable_in(a, b);
        if !fits {
            self.undo(before);
        }
        fits
    }

    fn undo(&mut self, to: usize) {
        for (variable, before) in self.trail.drain(to..).rev() {
            match before {
                Some(ty) => self.bound.insert(variable, ty),
                None => self.bound.remove(&variable),
            };
        }
    }

    fn set(&mut self, variable: i32, ty: Type) {
        let before = self.bound.insert(variable, ty);
        self.trail.push((variable, before));
    }

    fn assignable_in(&mut self, a: &Type, b: &Type) -> bool {
        if let Type::Param(_) = b {
            match self.bind(a, b) {
                (true, _) => return true,
                (false, true) => return false,
                (false, false) => {}
            }
        }
        if let Type::Param(_) = a {
            return self.bind(b, a).0;
        }
        if a.is_dyn_or_error() || b.is_dyn_or_error() {
            return true;
        }
        let nullable = |t: &Type| {
            matches!(
                t,
                Type::Null
                    | Type::Object(_)
                    | Type::Opaque(_)
                    | Type::Optional(_)
                    | Type::Duration
                    | Type::Timestamp
            )
        };
        match (a, b) {
            (Type::Null, other) | (other, Type::Null) => nullable(other),
            (Type::Type(_), Type::Type(_)) => true,
            (Type::List(x), Type::List(y)) | (Type::Optional(x), Type::Optional(y)) => {
                self.assignable_in(x, y)
            }
            (Type::Map(k, v), Type::Map(l, w)) => self.assignable_in(k, l) && self.assignable_in(v, w),
            _ => a.same(b),
        }
    }

    /// Tries `ty` for the variable. Returns whether it fits, and whether the variable was bound before.
    fn bind(&mut self, ty: &Type, variable: &Type) -> (bool, bool) {
        let Type::Param(n) = variable else { return (false, false) };
        if ty.same(variable) {
            return (true, true);
        }
        if let Some(bound) = self.bound.get(n).cloned() {
            if ty.same(&bound) {
                return (true, true);
            }
            if self.assignable_in(ty, &bound) {
                let general = if less_specific(ty, &bound) { ty.clone() } else { bound };
                if !self.occurs(*n, &general) {
                    self.set(*n, general);
                }
                return (true, true);
            }
            return (false, true);
        }
        if self.occurs(*n, ty) {
            return (false, false);
        }
        self.set(*n, ty.clone());
        (true, false)
    }

    fn occurs(&self, variable: i32, within: &Type) -> bool {
        match within {
            Type::Param(n) if *n == variable => true,
            Type::Param(n) => self.bound.get(n).is_some_and(|t| self.occurs(variable, t)),
            other => other.parameters().into_iter().any(|p| self.occurs(variable, p)),
        }
    }

    /// Puts final types into the tree.
    fn finish(&self, node: &mut Node) {
        node.ty = self.substitute(&node.ty, true);
        for child in node.children_mut() {
            self.finish(child);
        }
    }

    /// Literal patterns, durations and times have to be right before they are used.
    fn check_literals(&mut self, node: &Node) {
        if let NodeKind::Call(call) = &node.kind
            && let Some(argument) = call.arguments.last()
            && let NodeKind::Literal(Value::Str(text)) = &argument.kind
        {
            let wrong = match call.function {
                "matches" => library::regex(text).is_err(),
                "duration" => service::duration::nanoseconds(text).is_err(),
                "timestamp" => library::time::parse_timestamp(text).is_none(),
                _ => false,
            };
            if wrong {
                self.error(argument.origin, format!("invalid {} argument", call.function));
            }
        }
        for child in node.children() {
            self.check_literals(child);
        }
    }
}

// === impl Node ===

impl Node {
    /// The nodes directly below.
    pub(crate) fn children(&self) -> Vec<&Node> {
        match &self.kind {
            NodeKind::Literal(_) | NodeKind::Variable(_) | NodeKind::TypeName(_) => Vec::new(),
            NodeKind::Select { operand, .. } => vec![operand],
            NodeKind::Call(call) => call.arguments.iter().collect(),
            NodeKind::List { items, .. } => items.iter().collect(),
            NodeKind::Map(entries) => entries.iter().flat_map(|e| [&e.key, &e.value]).collect(),
            NodeKind::Fold(f) => vec![&f.range, &f.init, &f.condition, &f.step, &f.result],
        }
    }

    fn children_mut(&mut self) -> Vec<&mut Node> {
        match &mut self.kind {
            NodeKind::Literal(_) | NodeKind::Variable(_) | NodeKind::TypeName(_) => Vec::new(),
            NodeKind::Select { operand, .. } => vec![operand],
            NodeKind::Call(call) => call.arguments.iter_mut().collect(),
            NodeKind::List { items, .. } => items.iter_mut().collect(),
            NodeKind::Map(entries) => entries.iter_mut().flat_map(|e| [&mut e.key, &mut e.value]).collect(),
            NodeKind::Fold(f) => {
                vec![&mut f.range, &mut f.init, &mut f.condition, &mut f.step, &mut f.result]
            }
        }
    }

    /// Is this variable of the environment read anywhere?
    pub(crate) fn uses(&self, variable: &str) -> bool {
        match &self.kind {
            NodeKind::Variable(name) => name == variable,
            _ => self.children().into_iter().any(|c| c.uses(variable)),
        }
    }
}

/// `a.b.c` as a name.
fn qualified(e: &IdedExpr) -> Option<String> {
    match &e.expr {
        Expr::Ident(name) => Some(name.clone()),
        Expr::Select(select) if !select.test => {
            Some(format!("{}.{}", qualified(&select.operand)?, select.field))
        }
        _ => None,
    }
}

/// Types that have a name in expressions.
fn named_type(name: &str) -> Option<Type> {
    Some(match name {
        "bool" => Type::Bool,
        "bytes" => Type::Bytes,
        "double" => Type::Double,
        "dyn" => Type::Dyn,
        "int" => Type::Int,
        "list" => Type::list(Type::Dyn),
        "map" => Type::map(Type::Dyn, Type::Dyn),
        "null_type" => Type::Null,
        "string" => Type::Str,
        "type" => Type::Type(Type::Dyn.into()),
        "uint" => Type::Uint,
        "optional_type" => Type::optional(Type::Dyn),
        _ => return None,
    })
}

/// Types whose name has dots.
fn qualified_type(name: &str) -> Option<Type> {
    Some(match name {
        "google.protobuf.Timestamp" => Type::Timestamp,
        "google.protobuf.Duration" => Type::Duration,
        _ => Type::Opaque(functions::LIBRARY_TYPES.iter().find(|t| **t == name)?),
    })
}

/// Is the first type as general as the second, or more so?
fn less_specific(a: &Type, b: &Type) -> bool {
    match (a, b) {
        (Type::Dyn | Type::Error | Type::Param(_), _) => true,
        (_, Type::Dyn | Type::Error | Type::Param(_)) => false,
        (Type::List(x), Type::List(y)) | (Type::Optional(x), Type::Optional(y)) => less_specific(x, y),
        (Type::Map(k, v), Type::Map(l, w)) => less_specific(k, l) && less_specific(v, w),
        (Type::Type(_), Type::Type(_)) => true,
        _ => a.same(b),
    }
}
