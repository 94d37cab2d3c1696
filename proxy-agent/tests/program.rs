//! The program as it is started: exit codes and messages that scripts and people rely on.

#![allow(clippy::unwrap_used, reason = "clippy takes helpers of a test for a program")]

use std::process::{Command, Output};

fn run(flags: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_proxy-agent")).args(flags).env_remove("PROXY_AGENT_ID").output().unwrap()
}

#[test]
fn help_shows_every_flag_of_upstream_that_has_a_meaning_here() {
    let output = run(&["--help"]);
    assert_eq!(output.status.code(), Some(0));
    let help = String::from_utf8(output.stdout).unwrap();
    for flag in [
        "agent-cert",
        "agent-key",
        "ca-cert",
        "proxy-server-host",
        "proxy-server-port",
        "agent-id",
        "agent-identifiers",
        "health-server-host",
        "health-server-port",
        "admin-server-port",
        "admin-bind-address",
        "sync-interval",
        "sync-interval-cap",
        "keepalive-time",
        "kubeconfig",
    ] {
        assert!(help.contains(&format!("--{flag} ")), "{flag}");
    }
}

#[test]
fn mistakes_end_with_a_code_and_a_reason() {
    let directory = tempfile::tempdir().unwrap();
    let data_dir = format!("--data-dir={}", directory.path().display());
    let config = directory.path().join("config.yaml");
    std::fs::write(&config, "no-such-key: 1\n").unwrap();
    let config = format!("--config={}", config.display());
    for (flags, code, reason) in [
        (&["--no-such-flag"][..], 2, "--no-such-flag"),
        (&["--server=nowhere", &data_dir], 2, "--server=nowhere"),
        (&[&config], 2, "no-such-key"),
        (&[], 2, "no identity"),
        (&[&data_dir], 1, "cellway cluster add"),
        (
            &["--agent-cert=/nonexistent/a", "--agent-key=/nonexistent/b", "--ca-cert=/nonexistent/c"],
            1,
            "/nonexistent/",
        ),
    ] {
        let output = run(flags);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{flags:?}: {text}");
        assert!(text.contains(reason), "{flags:?}: {text}");
    }
}
