//! Bad input, answered as a stock kube-apiserver answers it.
//!
//! `golden/bad-input.json` holds one request a line with the stock server's answer: code, reason, message, details and, of
//! watches, the first events. When `KUBEBUILDER_ASSETS` names a folder with kube-apiserver and etcd, the same requests go
//! to that server, too, and have to give the same. Where our words differ on purpose, a case holds our answer as `ours`
//! with the reason as `why`; one marked `own` goes to our server only. `CELLWAY_WRITE_GOLDEN=1` writes the answers of the stock server into the file.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use common::Server;
use common::stock::Stock;
use regex::Regex;
use serde_json::{Map, Value, json};
use test_support::{require, tools};

fn file() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bad-input.json")
}

fn cases() -> Vec<Value> {
    let text = std::fs::read_to_string(file()).expect("the cases");
    serde_json::from_str(&text).expect("the cases are JSON")
}

/// What differs from run to run, and the texts in which two JSON parsers cannot agree on a whole object.
fn normalise(text: &str) -> String {
    static RULES: LazyLock<Vec<(Regex, &str)>> = LazyLock::new(|| {
        [
            (r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b", "UID"),
            (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", "TIME"),
            (r"(current: |resource version: |ResourceVersion in object meta: |\()\d+", "${1}N"),
            // The patched object as JSON, with its fields in another order.
            (r#"(?s)(patch: )?Invalid value: "\{.*\}": "#, "${1}Invalid value: OBJECT: "),
            (r"x{60,}", "xx"),
            (r"127\.0\.0\.1:\d+", "ADDRESS"),
        ]
        .into_iter()
        .map(|(pattern, with)| (Regex::new(pattern).expect("a pattern"), with))
        .collect()
    });
    RULES.iter().fold(text.to_owned(), |text, (rule, with)| rule.replace_all(&text, *with).into_owned())
}

fn normal(value: &Value) -> Value {
    match value {
        Value::String(text) => json!(normalise(text)),
        Value::Array(items) => items.iter().map(normal).collect(),
        Value::Object(map) => map.iter().map(|(k, v)| (k.clone(), normal(v))).collect::<Map<_, _>>().into(),
        other => other.clone(),
    }
}

fn text<'a>(case: &'a Value, key: &str) -> &'a str {
    case[key].as_str().unwrap_or_default()
}

/// Values saved from earlier answers, as `{name}` in paths and bodies.
fn filled(template: &str, saved: &BTreeMap<String, String>) -> String {
    saved.iter().fold(template.to_owned(), |text, (name, value)| text.replace(&format!("{{{name}}}"), value))
}

fn body_of(case: &Value) -> String {
    let part = |key: &str, i: usize| case[key][i].as_str().unwrap_or_default().to_owned();
    let times = |key: &str| usize::try_from(case[key][2].as_u64().unwrap_or_default()).expect("a count");
    if case["repeat"].is_array() {
        return format!(
            "{}{}{}",
            part("repeat", 0),
            part("repeat", 1).repeat(times("repeat")),
            part("repeat", 3)
        );
    }
    if case["repeat2"].is_array() {
        let n = times("repeat2");
        let open = part("repeat2", 1).repeat(n);
        let close = part("repeat2", 4).repeat(n);
        return format!("{}{open}{}{close}{}", part("repeat2", 0), part("repeat2", 3), part("repeat2", 5));
    }
    if case["keys"].is_array() {
        let keys: Vec<String> = (0..times("keys")).map(|i| format!("\"k{i}\":\"\"")).collect();
        return format!("{}{}{}", part("keys", 0), keys.join(","), part("keys", 1));
    }
    text(case, "body").to_owned()
}

/// The comparable part of an answer.
fn answer_of(case: &Value, answer: &common::Answer) -> Value {
    let mut out = Map::new();
    out.insert("code".into(), json!(answer.code));
    let body = &answer.body;
    if body["kind"] == "Status" && answer.code >= 400 {
        for key in ["reason", "message", "details"] {
            if let Some(value) = body.get(key) {
                out.insert(key.into(), value.clone());
            }
        }
    } else if answer.code >= 400 {
        out.insert("text".into(), json!(answer.text.trim()));
    } else if case["stream"] == true {
        // Types of the events; of errors all.
        let events = answer.text.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok());
        let events: Vec<Value> = events
            .filter(|e| e["type"] != "BOOKMARK" || e["object"]["metadata"]["annotations"].is_object())
            .map(|e| match e["type"].as_str() {
                Some("ERROR") => json!({"code": e["object"]["code"], "reason": e["object"]["reason"],
                    "message": e["object"]["message"]}),
                _ => json!(format!("{} {}", text(&e, "type"), e["object"]["metadata"]["name"])),
            })
            .collect();
        out.insert("events".into(), json!(events));
    }
    if case["warnings"] == true {
        let all = answer.headers.get_all("warning").iter();
        let all: Vec<&str> = all.filter_map(|v| v.to_str().ok()).collect();
        out.insert("warnings".into(), json!(all));
    }
    normal(&Value::Object(out))
}

/// Sends all requests, in order; the answers.
async fn run(server: &Server, cases: &[Value], stock: bool) -> Vec<Value> {
    let mut saved = BTreeMap::new();
    let mut answers = Vec::new();
    for case in cases {
        if stock && case["own"] == true {
            answers.push(case["answer"].clone());
            continue;
        }
        let path = filled(text(case, "path"), &saved);
        let body = filled(&body_of(case), &saved);
        let mut headers: Vec<(&str, &str)> = Vec::new();
        for (key, header) in [("type", "content-type"), ("accept", "accept")] {
            if !text(case, key).is_empty() {
                headers.push((header, text(case, key)));
            }
        }
        for (key, value) in case["headers"].as_object().into_iter().flatten() {
            headers.push((key, value.as_str().unwrap_or_default()));
        }
        let method = text(case, "method");
        let mut answer = server.ask(case["anonymous"] != true, method, &path, &headers, body.clone()).await;
        if let Some(code) = case["until"].as_u64() {
            answer = server.until(&path, text(case, "name"), |a| u64::from(a.code) == code).await;
        }
        for (name, pointer) in case["save"].as_object().into_iter().flatten() {
            let value = answer.body.pointer(pointer.as_str().unwrap_or_default());
            let value = value.and_then(Value::as_str).unwrap_or_else(|| panic!("{name} in {}", answer.text));
            saved.insert(name.clone(), value.to_owned());
        }
        answers.push(answer_of(case, &answer));
    }
    answers
}

fn compare(cases: &[Value], found: &[Value], wanted: impl Fn(&Value) -> Value) {
    let mut differences = Vec::new();
    for (case, found) in cases.iter().zip(found) {
        let wanted = wanted(case);
        if *found != wanted {
            let [w, f] = [&wanted, found].map(|v| v.to_string());
            differences.push(format!("{}\n  wanted {w}\n  found  {f}", text(case, "name")));
        }
    }
    assert!(differences.is_empty(), "{} differences\n{}", differences.len(), differences.join("\n"));
}

#[tokio::test]
async fn bad_input_is_answered_as_by_a_stock_server() {
    let server = Server::hub().await;
    let cases = cases();
    let found = run(&server, &cases, false).await;
    compare(&cases, &found, |case| case.get("ours").unwrap_or(&case["answer"]).clone());
    // Nothing of it has hurt the server.
    assert_eq!(server.get("/readyz").await.code, 200);
    server.stop().await;
}

#[tokio::test]
async fn a_stock_server_answers_as_the_file_says() {
    let assets = require!(tools::kubebuilder_assets());
    let stock = Stock::start(&assets).await;
    let mut cases = cases();
    let found = run(&stock.server, &cases, true).await;
    if !tools::write_golden() {
        compare(&cases, &found, |case| case["answer"].clone());
        return;
    }
    for (case, answer) in cases.iter_mut().zip(found) {
        case["answer"] = answer;
    }
    let lines: Vec<String> = cases.iter().map(Value::to_string).collect();
    std::fs::write(file(), format!("[\n{}\n]\n", lines.join(",\n"))).expect("the file is written");
}
