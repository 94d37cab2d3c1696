//! The program starts its subjects and measures them. How fast they are is for whoever runs it with nothing beside it; here
//! it is only that a figure comes of each.

use std::process::Command;

#[test]
fn a_small_run_has_a_figure_for_each_subject() {
    let folder = tempfile::tempdir().expect("a folder");
    let table = folder.path().join("table.md");
    // The programs of this build lie beside this one.
    let output = Command::new(env!("CARGO_BIN_EXE_bench"))
        .args([
            "--only",
            "ping-pong-1,connect",
            "--subjects",
            "direct,cellway-h2,cellway-quic",
            "--scale",
            "0.02",
        ])
        .arg("--markdown")
        .arg(&table)
        .output()
        .expect("the program starts");
    let said = String::from_utf8_lossy(&output.stderr);
    let table = std::fs::read_to_string(&table).unwrap_or_else(|error| panic!("{error}: {said}"));
    let rows: Vec<Vec<f64>> = table
        .lines()
        .map(|line| line.split('|').filter_map(|cell| cell.trim().replace(',', "").parse().ok()).collect())
        .filter(|figures: &Vec<f64>| !figures.is_empty())
        .collect();
    assert!(rows.len() == 2 && rows.iter().all(|row| row.len() >= 3), "{table}\n{said}");
    assert!(rows.iter().flatten().all(|figure| *figure > 0.0), "{table}");
}
