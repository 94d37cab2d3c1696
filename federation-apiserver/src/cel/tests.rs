//! Expressions with what they give, what they cost, and how they fail.

use std::collections::HashMap;

use serde_json::{Value as Json, json};

use super::types::Decl;
use super::*;

fn declared(schema: &Json) -> Arc<Decl> {
    schema::declare(schema, false, "self").expect("a declaration")
}

fn run(schema: &Json, object: &Json, source: &str) -> (Result<String, String>, u64) {
    let decl = declared(schema);
    let program = match Program::compile(source, &[("self", decl.ty())]) {
        Ok(program) => program,
        Err(error) => return (Err(error), 0),
    };
    let value = Value::of_declared(object, &decl).expect("data of its declaration");
    let variables = HashMap::from([("self", value)]);
    let outcome = program.evaluate(&variables, PER_CALL_LIMIT);
    let shown = outcome.value.map(|v| match v {
        Value::Bool(b) => b.to_string(),
        Value::Int(n) => n.to_string(),
        Value::Str(s) => s.to_string(),
        other => format!("{other:?}"),
    });
    (shown.map_err(|e| e.to_string()), outcome.cost)
}

fn sample() -> (Json, Json) {
    let text = json!({"type": "string"});
    let schema = json!({"type": "object", "properties": {
        "n": {"type": "integer"}, "d": {"type": "number"}, "s": text, "b": {"type": "boolean"},
        "l": {"type": "array", "items": {"type": "integer"}},
        "names": {"type": "array", "items": text},
        "m": {"type": "object", "additionalProperties": text},
        "ios": {"x-kubernetes-int-or-string": true},
        "when": {"type": "string", "format": "date-time"},
        "raw": {"type": "string", "format": "byte"},
        "long": {"type": "string", "format": "duration"},
        "a-b": text, "namespace": text, "absent": text, "nothing": {"type": "string", "nullable": true},
        "set": {"type": "array", "x-kubernetes-list-type": "set", "items": text},
        "map": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"],
            "items": {"type": "object", "properties": {"k": text, "v": {"type": "integer"}}}},
    }});
    let object = json!({"n": 3, "d": 2, "s": "hello", "b": true, "l": [1, 2, 3], "names": ["x", "y"],
        "m": {"k": "v"}, "ios": "25%", "when": "2026-01-02T03:04:05Z", "raw": "YWI=", "long": "1h",
        "a-b": "dash", "namespace": "ns", "nothing": null, "set": ["b", "a"],
        "map": [{"k": "one", "v": 1}, {"k": "two", "v": 2}]});
    (schema, object)
}

#[test]
fn expressions() {
    let (schema, object) = sample();
    let cases = [
        ("self.n + 2 == 5", "true"),
        ("self.d * 1.5 > 2.9", "true"),
        ("self.n > 2.5", "true"),
        ("self.s.startsWith('he') && self.s.contains('ell') && self.s.endsWith('o')", "true"),
        ("self.s.matches('^h.*o$')", "true"),
        ("size(self.l) + self.names.size()", "5"),
        ("self.l.all(x, x > 0) && self.l.exists(x, x == 2) && self.l.exists_one(x, x == 3)", "true"),
        ("self.l.map(x, x * 2).filter(x, x > 2).sum()", "10"),
        ("self.l.all(i, x, i < x)", "true"),
        ("self.l.transformList(i, x, i + x).sum()", "9"),
        ("{'a': 1, 'b': 2}.transformMap(k, v, v + 1)['b']", "3"),
        ("'k' in self.m && self.m.k == 'v' && self.m['k'] == 'v'", "true"),
        ("has(self.absent) || has(self.nothing)", "false"),
        ("self.?absent.orValue('none')", "none"),
        ("self.?s.hasValue()", "true"),
        ("self.?s.optMap(x, x + '!').orValue('')", "hello!"),
        ("self.m[?'missing'].orValue('none')", "none"),
        ("type(self.ios) == string && int(self.ios.replace('%', '')) == 25", "true"),
        ("self.when.getFullYear() + self.when.getMonth() + self.when.getDate()", "2028"),
        ("self.when < timestamp('2027-01-01T00:00:00Z')", "true"),
        ("string(self.raw)", "ab"),
        ("self.long + duration('30m') == duration('90m')", "true"),
        ("self.a__dash__b + self.__namespace__", "dashns"),
        ("self.set == ['a', 'b'] || self.set == self.set", "true"),
        ("self.map.exists(e, e.k == 'two' && e.v == 2)", "true"),
        ("self.names.join(',') + self.s.upperAscii().substring(1, 3)", "x,yEL"),
        ("'%s is %d of %.2f'.format(['a', dyn(1), dyn(2.5)])", "a is 1 of 2.50"),
        ("self.l.isSorted() && self.l.min() == 1 && self.l.max() == 3 && self.l.indexOf(2) == 1", "true"),
        ("quantity('1Gi').isGreaterThan(quantity('1G')) && quantity('1').add(2).asInteger() == 3", "true"),
        ("url('https://a.b:80/c?d=e').getHostname() == 'a.b'", "true"),
        ("ip('10.0.0.1').family() == 4 && cidr('10.0.0.0/8').containsIP('10.1.2.3')", "true"),
        ("!format.dns1123Label().validate('Bad').hasValue() || isSemver('1.2.3')", "true"),
        ("semver('1.2.3').isLessThan(semver('1.10.0'))", "true"),
        ("sets.contains(self.names, ['x']) && !sets.intersects(self.names, ['z'])", "true"),
        ("self.l.exists(x, 1 / (x - 1) > 0) || true", "true"),
        // One item's failure does not matter when another decides.
        ("[0, 1].exists(x, 2 / x == 2)", "true"),
        ("self.l.sortBy(x, -x)[0]", "3"),
        ("self.names.exists(n, n == 'y') ? 'yes' : 'no'", "yes"),
        ("[1, 2, 3].slice(1, 3).size() + [3, 1, 2].sort()[0] + [1, 1].distinct().size()", "4"),
        ("'a,b'.split(',').size() + 'abc'.find('b').size() + 'abab'.findAll('a').size()", "5"),
    ];
    for (source, wanted) in cases {
        let (found, _) = run(&schema, &object, source);
        assert_eq!(found.as_deref(), Ok(wanted), "{source}");
    }
}

#[test]
fn expressions_that_fail_when_they_run() {
    let (schema, object) = sample();
    let cases = [
        ("self.absent == ''", "no such key: absent"),
        ("self.m['x'] == ''", "no such key: x"),
        ("self.l[7] == 1", "index out of bounds: 7"),
        ("1 / (self.n - 3) == 1", "division by zero"),
        ("9223372036854775807 + self.n == 1", "integer overflow"),
        ("self.ios < 5", "no such overload"),
    ];
    for (source, wanted) in cases {
        let (found, _) = run(&schema, &object, source);
        assert_eq!(found, Err(wanted.to_owned()), "{source}");
    }
}

#[test]
fn expressions_that_are_refused() {
    let (schema, object) = sample();
    let cases = [
        (
            "self.n == 'a'",
            "ERROR: <input>:1:8: found no matching overload for '_==_' applied to '(int, string)'\n | self.n == 'a'\n | .......^",
        ),
        ("self.foo > 1", "ERROR: <input>:1:5: undefined field 'foo'\n | self.foo > 1\n | ....^"),
        ("foo > 1", "ERROR: <input>:1:1: undeclared reference to 'foo' (in container '')\n | foo > 1\n | ^"),
        (
            "self.n.bar()",
            "ERROR: <input>:1:11: undeclared reference to 'bar' (in container '')\n | self.n.bar()\n | ..........^",
        ),
        (
            "[1, 'a'].size() == 1",
            "ERROR: <input>:1:5: expected type 'int' but found 'string'\n | [1, 'a'].size() == 1\n | ....^",
        ),
        (
            "self.s.matches('(')",
            "ERROR: <input>:1:16: invalid matches argument\n | self.s.matches('(')\n | ...............^",
        ),
        (
            "self.n.all(x, true)",
            "ERROR: <input>:1:5: expression of type 'int' cannot be range of a comprehension (must be list, map, or dynamic)\n | self.n.all(x, true)\n | ....^",
        ),
    ];
    for (source, wanted) in cases {
        let (found, _) = run(&schema, &object, source);
        assert_eq!(found, Err(wanted.to_owned()), "{source}");
    }
    let (syntax, _) = run(&schema, &object, "self.n ==");
    assert!(
        syntax.as_ref().is_err_and(|e| e.starts_with("ERROR: <input>:1:10: Syntax error:")),
        "{syntax:?}"
    );
}

#[test]
fn costs_are_counted_and_bounded() {
    let (schema, object) = sample();
    // An identifier and a field: two; the comparison: one.
    assert_eq!(run(&schema, &object, "self.n == 3").1, 3);
    let many = json!({"l": (0..2000).collect::<Vec<i32>>()});
    let (found, _) = run(&schema, &many, "self.l.all(x, self.l.all(y, x != y || x == y))");
    assert_eq!(found, Err("operation cancelled: actual cost limit exceeded".to_owned()));
}

#[test]
fn the_worst_case_is_known_beforehand() {
    let worst = |schema: Json, source: &str| {
        let decl = declared(&schema);
        let program = Program::compile(source, &[("self", decl.ty())]).expect("a valid expression");
        program.worst_case(&decl)
    };
    let bounded = json!({"type": "array", "maxItems": 10, "items": {"type": "string", "maxLength": 10}});
    // 10 × (condition 2, step: accumulator 1, x 1, startsWith 'ab' 1) + range 1 + result 1.
    assert_eq!(worst(bounded, "self.all(x, x.startsWith('ab'))"), 52);
    let open = json!({"type": "array", "items": {"type": "string"}});
    assert!(worst(open, "self.all(x, self.all(y, x == y))") > 10_000_000);
}

#[test]
fn hostile_expressions_are_refused_quickly() {
    let any = [("self", Type::Dyn)];
    let deep = format!("{}1{}", "(".repeat(20_000), ")".repeat(20_000));
    assert!(Program::compile(&deep, &any).is_err());
    let nots = format!("{}true", "!".repeat(90_000));
    let _ = Program::compile(&nots, &any);
    assert!(Program::compile(&"a".repeat(200_000), &any).is_err());
    let lists = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
    assert!(Program::compile(&lists, &any).is_err());
    let sum = vec!["1"; 20_000].join("+");
    let _ = Program::compile(&sum, &any);
    let member = format!("self{}", ".a".repeat(20_000));
    let _ = Program::compile(&member, &any);
}
