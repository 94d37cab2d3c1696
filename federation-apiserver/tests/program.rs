//! The program as it is started: exit codes and messages that scripts and people rely on.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::process::Command;

#[test]
fn mistakes_end_with_a_code_and_a_reason() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let data = format!("--data-dir={}", folder.path().join("data").display());
    let no_folder = format!("--data-dir={}", file.join("data").display());
    for (flags, code, reason) in [
        (&["--no-such-flag"][..], 2, "--no-such-flag"),
        (&[&data, "--log", "[[["], 2, "cellway-apiserver: "),
        (&[&no_folder], 1, "cellway-apiserver: "),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cellway-apiserver"));
        let output = command.args(flags).env_remove("CELLWAY_STORE").output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{flags:?}: {text}");
        assert!(text.contains(reason), "{flags:?}: {text}");
    }
}
