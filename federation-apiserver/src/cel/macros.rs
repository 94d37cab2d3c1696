//! Macros beyond the standard ones: optionals, and comprehensions over two variables.

use cel::common::ast::{
    CallExpr, ComprehensionExpr, Expr, IdedExpr, ListExpr, LiteralValue, MapExpr, operators,
};
use cel::parser::{Macro, MacroExprHelper, ParseError};

/// Name of the accumulator of every comprehension; no identifier of a user can be written so.
pub(crate) const ACCUMULATOR: &str = "@result";
/// Iteration variable of a comprehension that only binds a name.
pub(crate) const UNUSED: &str = "#unused";

type Expansion = Result<Option<IdedExpr>, ParseError>;

/// A comprehension under construction.
struct Fold {
    variables: (String, Option<String>),
    init: IdedExpr,
    condition: IdedExpr,
    step: IdedExpr,
    result: IdedExpr,
}

/// All macros of this module.
pub(crate) fn all() -> Vec<Macro> {
    vec![
        Macro::receiver("optMap", 2, |h, target, args| optional_map(h, target, args, false)),
        Macro::receiver("optFlatMap", 2, |h, target, args| optional_map(h, target, args, true)),
        Macro::receiver("all", 3, quantifier_all),
        Macro::receiver("exists", 3, quantifier_exists),
        Macro::receiver("exists_one", 3, quantifier_one),
        Macro::receiver("existsOne", 3, quantifier_one),
        Macro::receiver("transformList", 3, transform_list),
        Macro::receiver("transformList", 4, transform_list),
        Macro::receiver("transformMap", 3, |h, t, a| transform_map(h, t, a, false)),
        Macro::receiver("transformMap", 4, |h, t, a| transform_map(h, t, a, false)),
        Macro::receiver("transformMapEntry", 3, |h, t, a| transform_map(h, t, a, true)),
        Macro::receiver("transformMapEntry", 4, |h, t, a| transform_map(h, t, a, true)),
        Macro::receiver("sortBy", 2, sort_by),
    ]
}

fn literal(h: &mut MacroExprHelper<'_>, value: LiteralValue) -> IdedExpr {
    h.next_expr(Expr::Literal(value))
}

fn ident(h: &mut MacroExprHelper<'_>, name: &str) -> IdedExpr {
    h.next_expr(Expr::Ident(name.to_owned()))
}

fn call(h: &mut MacroExprHelper<'_>, name: &str, args: Vec<IdedExpr>) -> IdedExpr {
    h.next_expr(Expr::Call(CallExpr { func_name: name.to_owned(), target: None, args }))
}

fn fold(h: &mut MacroExprHelper<'_>, range: IdedExpr, fold: Fold) -> IdedExpr {
    h.next_expr(Expr::Comprehension(Box::new(ComprehensionExpr {
        iter_range: range,
        iter_var: fold.variables.0,
        iter_var2: fold.variables.1,
        accu_var: ACCUMULATOR.to_owned(),
        accu_init: fold.init,
        loop_cond: fold.condition,
        loop_step: fold.step,
        result: fold.result,
    })))
}

fn name_of(h: &MacroExprHelper<'_>, expr: &IdedExpr, what: &str) -> Result<String, ParseError> {
    match &expr.expr {
        Expr::Ident(name) if name != ACCUMULATOR => Ok(name.clone()),
        _ => Err(h.new_error(expr.id, format!("{what} must be a simple name"))),
    }
}

/// Names of the two variables; equal ones are refused.
fn names_of(h: &MacroExprHelper<'_>, args: &[IdedExpr]) -> Result<(String, Option<String>), ParseError> {
    let (Some(first), Some(second)) = (args.first(), args.get(1)) else {
        return Err(h.new_error(0, "missing iteration variables"));
    };
    let (a, b) = (name_of(h, first, "argument")?, name_of(h, second, "argument")?);
    if a == b {
        return Err(h.new_error(second.id, format!("duplicate variable name: {b}")));
    }
    Ok((a, Some(b)))
}

fn optional_map(
    h: &mut MacroExprHelper<'_>,
    target: &mut Option<IdedExpr>,
    args: &mut Vec<IdedExpr>,
    flat: bool,
) -> Expansion {
    let what = if flat { "optFlatMap() variable name" } else { "optMap() variable name" };
    let Some(first) = args.first() else { return Ok(None) };
    let name = name_of(h, first, what)?;
    let (Some(range), Some(body)) = (target.take(), args.pop()) else { return Ok(None) };
    let member = |h: &mut MacroExprHelper<'_>, name: &str, target: IdedExpr| {
        h.next_expr(Expr::Call(CallExpr {
            func_name: name.to_owned(),
            target: Some(Box::new(target)),
            args: Vec::new(),
        }))
    };
    let optional = |h: &mut MacroExprHelper<'_>, name: &str, args: Vec<IdedExpr>| {
        let target = ident(h, "optional");
        h.next_expr(Expr::Call(CallExpr { func_name: name.to_owned(), target: Some(Box::new(target)), args }))
    };
    let has = member(h, "hasValue", range.clone());
    let value = member(h, "value", range);
    let nothing = h.next_expr(Expr::List(ListExpr::new(Vec::new())));
    let never = literal(h, LiteralValue::Boolean(false.into()));
    let step = ident(h, &name);
    // A comprehension over nothing binds the name to the value.
    let bound = h.next_expr(Expr::Comprehension(Box::new(ComprehensionExpr {
        iter_range: nothing,
        iter_var: UNUSED.to_owned(),
        iter_var2: None,
        accu_var: name,
        accu_init: value,
        loop_cond: never,
        loop_step: step,
        result: body,
    })));
    let some = if flat { bound } else { optional(h, "of", vec![bound]) };
    let none = optional(h, "none", Vec::new());
    Ok(Some(call(h, operators::CONDITIONAL, vec![has, some, none])))
}

fn quantifier_all(
    h: &mut MacroExprHelper<'_>,
    target: &mut Option<IdedExpr>,
    args: &mut Vec<IdedExpr>,
) -> Expansion {
    let variables = names_of(h, args)?;
    let (Some(range), Some(body)) = (target.take(), args.pop()) else { return Ok(None) };
    let init = literal(h, LiteralValue::Boolean(true.into()));
    let accumulator = ident(h, ACCUMULATOR);
    let condition = call(h, operators::NOT_STRICTLY_FALSE, vec![accumulator]);
    let accumulator = ident(h, ACCUMULATOR);
    let step = call(h, operators::LOGICAL_AND, vec![accumulator, body]);
    let result = ident(h, ACCUMULATOR);
    Ok(Some(fold(h, range, Fold { variables, init, condition, step, result })))
}

fn quantifier_exists(
    h: &mut MacroExprHelper<'_>,
    target: &mut Option<IdedExpr>,
    args: &mut Vec<IdedExpr>,
) -> Expansion {
    let variables = names_of(h, args)?;
    let (Some(range), Some(body)) = (target.take(), args.pop()) else { return Ok(None) };
    let init = literal(h, LiteralValue::Boolean(false.into()));
    let accumulator = ident(h, ACCUMULATOR);
    let not = call(h, operators::LOGICAL_NOT, vec![accumulator]);
    let condition = call(h, operators::NOT_STRICTLY_FALSE, vec![not]);
    let accumulator = ident(h, ACCUMULATOR);
    let step = call(h, operators::LOGICAL_OR, vec![accumulator, body]);
    let result = ident(h, ACCUMULATOR);
    Ok(Some(fold(h, range, Fold { variables, init, condition, step, result })))
}

fn quantifier_one(
    h: &mut MacroExprHelper<'_>,
    target: &mut Option<IdedExpr>,
    args: &mut Vec<IdedExpr>,
) -> Expansion {
    let variables = names_of(h, args)?;
    let (Some(range), Some(body)) = (target.take(), args.pop()) else { return Ok(None) };
    let init = literal(h, LiteralValue::Int(0.into()));
    let condition = literal(h, LiteralValue::Boolean(true.into()));
    let (accumulator, one) = (ident(h, ACCUMULATOR), literal(h, LiteralValue::Int(1.into())));
    let more = call(h, operators::ADD, vec![accumulator, one]);
    let same = ident(h, ACCUMULATOR);
    let step = call(h, operators::CONDITIONAL, vec![body, more, same]);
    let (accumulator, one) = (ident(h, ACCUMULATOR), literal(h, LiteralValue::Int(1.into())));
    let result = call(h, operators::EQUALS, vec![accumulator, one]);
    Ok(Some(fold(h, range, Fold { variables, init, condition, step, result })))
}

fn transform_list(
    h: &mut MacroExprHelper<'_>,
    target: &mut Option<IdedExpr>,
    args: &mut Vec<IdedExpr>,
) -> Expansion {
    let variables = names_of(h, args)?;
    let (Some(range), Some(body)) = (target.take(), args.pop()) else { return Ok(None) };
    let filter = (args.len() == 3).then(|| args.pop()).flatten();
    let init = h.next_expr(Expr::List(ListExpr::new(Vec::new())));
    let accumulator = ident(h, ACCUMULATOR);
    let item = h.next_expr(Expr::List(ListExpr::new(vec![body])));
    let step = call(h, operators::ADD, vec![accumulator, item]);
    Ok(Some(collect(h, range, variables, init, step, filter)))
}

fn transform_map(
    h: &mut MacroExprHelper<'_>,
    target: &mut Option<IdedExpr>,
    args: &mut Vec<IdedExpr>,
    entry: bool,
) -> Expansion {
    let variables = names_of(h, args)?;
    let (Some(range), Some(body)) = (target.take(), args.pop()) else { return Ok(None) };
    let filter = (args.len() == 3).then(|| args.pop()).flatten();
    let init = h.next_expr(Expr::Map(MapExpr::default()));
    let accumulator = ident(h, ACCUMULATOR);
    let arguments =
        if entry { vec![accumulator, body] } else { vec![accumulator, ident(h, &variables.0), body] };
    let step = call(h, "cel.@mapInsert", arguments);
    Ok(Some(collect(h, range, variables, init, step, filter)))
}

/// A fold that collects; items that the filter refuses leave the accumulator as it is.
fn collect(
    h: &mut MacroExprHelper<'_>,
    range: IdedExpr,
    variables: (String, Option<String>),
    init: IdedExpr,
    step: IdedExpr,
    filter: Option<IdedExpr>,
) -> IdedExpr {
    let condition = literal(h, LiteralValue::Boolean(true.into()));
    let step = match filter {
        None => step,
        Some(filter) => {
            let same = ident(h, ACCUMULATOR);
            call(h, operators::CONDITIONAL, vec![filter, step, same])
        }
    };
    let result = ident(h, ACCUMULATOR);
    fold(h, range, Fold { variables, init, condition, step, result })
}

/// `list.sortBy(x, key)`: the list sorted by the list of its keys.
fn sort_by(
    h: &mut MacroExprHelper<'_>,
    target: &mut Option<IdedExpr>,
    args: &mut Vec<IdedExpr>,
) -> Expansion {
    let Some(first) = args.first() else { return Ok(None) };
    let name = name_of(h, first, "sortBy variable")?;
    let (Some(list), Some(body)) = (target.take(), args.pop()) else { return Ok(None) };
    let init = h.next_expr(Expr::List(ListExpr::new(Vec::new())));
    let accumulator = ident(h, ACCUMULATOR);
    let item = h.next_expr(Expr::List(ListExpr::new(vec![body])));
    let step = call(h, operators::ADD, vec![accumulator, item]);
    let keys = collect(h, list.clone(), (name, None), init, step, None);
    Ok(Some(h.next_expr(Expr::Call(CallExpr {
        func_name: "@sortByAssociatedKeys".to_owned(),
        target: Some(Box::new(list)),
        args: vec![keys],
    }))))
}
