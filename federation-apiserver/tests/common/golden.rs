//! Golden files of cases that a stock kube-apiserver has answered.
//!
//! A case is an object with the stock server's answer as its `outcome`; where our words differ on purpose, it holds our
//! answer as `ours` with the reason as `why`. Our server has to answer so. When `KUBEBUILDER_ASSETS` names a folder with
//! kube-apiserver and etcd, the same cases go to that server, too, and have to give the outcomes;
//! `CELLWAY_WRITE_GOLDEN=1` writes its answers into the file instead.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use test_support::tools;

/// A file: sections of cases, and what these have in common.
pub(crate) struct Golden {
    file: PathBuf,
    sections: Value,
}

/// What a server has answered to a case.
pub(crate) struct Answered {
    /// Where the case is in the file, as a JSON pointer.
    pub(crate) at: String,
    /// The case, for people.
    pub(crate) what: String,
    pub(crate) outcome: Value,
}

// === impl Golden ===

impl Golden {
    /// Reads `golden/NAME.json`.
    pub(crate) fn read(name: &str) -> Self {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.json"));
        let text = std::fs::read_to_string(&file).expect("the golden file");
        let sections = serde_json::from_str(&text).expect("the golden file is JSON");
        Self { file, sections }
    }

    /// The cases of a section, each with its place.
    pub(crate) fn cases(&self, section: &str) -> Vec<(String, &Value)> {
        let cases = self[section].as_array().expect("cases");
        cases.iter().enumerate().map(|(i, case)| (format!("/{section}/{i}"), case)).collect()
    }

    /// Our server answers as the file says it should. Of answers, what `comparable` leaves of them is compared.
    pub(crate) fn judge_ours(&self, answered: &[Answered], comparable: impl Fn(&Value) -> Value) {
        self.compare(answered, |case| case.get("ours").unwrap_or(&case["outcome"]), comparable);
    }

    /// A stock server answers as the file says it does, or the file says what it answers from now on.
    pub(crate) fn judge_stock(mut self, answered: Vec<Answered>, comparable: impl Fn(&Value) -> Value) {
        if !tools::write_golden() {
            return self.compare(&answered, |case| &case["outcome"], comparable);
        }
        for Answered { at, outcome, .. } in answered {
            self.sections.pointer_mut(&at).expect("a case")["outcome"] = outcome;
        }
        std::fs::write(&self.file, self.text()).expect("the file is written");
    }

    fn compare(
        &self,
        answered: &[Answered],
        wanted: impl Fn(&Value) -> &Value,
        comparable: impl Fn(&Value) -> Value,
    ) {
        let mut differences = Vec::new();
        for Answered { at, what, outcome } in answered {
            let case = self.sections.pointer(at).expect("a case");
            let [found, wanted] = [outcome, wanted(case)].map(&comparable);
            if found != wanted {
                differences.push(format!("{what}\n  found:  {found}\n  wanted: {wanted}"));
            }
        }
        assert!(differences.is_empty(), "{} differ:\n{}", differences.len(), differences.join("\n"));
    }

    /// The file: one case a line, so that differences can be read.
    fn text(&self) -> String {
        let mut sections = Vec::new();
        for (name, section) in self.sections.as_object().expect("sections") {
            let name = json!(name);
            sections.push(match section {
                Value::Object(map) => {
                    let lines: Vec<String> =
                        map.iter().map(|(k, v)| format!("  {}: {v}", json!(k))).collect();
                    format!(" {name}: {{\n{}\n }}", lines.join(",\n"))
                }
                Value::Array(cases) => {
                    let lines: Vec<String> = cases.iter().map(|case| format!("  {case}")).collect();
                    format!(" {name}: [\n{}\n ]", lines.join(",\n"))
                }
                other => format!(" {name}: {other}"),
            });
        }
        format!("{{\n{}\n}}\n", sections.join(",\n"))
    }
}

impl std::ops::Index<&str> for Golden {
    type Output = Value;

    fn index(&self, section: &str) -> &Value {
        &self.sections[section]
    }
}
