//! The program as it is started: exit codes and messages that scripts and people rely on.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::process::Command;

#[test]
fn mistakes_end_with_a_code_and_a_reason() {
    let busy = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let busy = format!("--listen-client-urls=http://{}", busy.local_addr().unwrap());
    for (flags, code, reason) in [
        (&["--no-such-flag"][..], 2, "--no-such-flag"),
        (&["--log", "[[["], 2, "cellway-store: "),
        (&["--client-cert-auth"], 2, "--client-cert-auth needs"),
        (&["--watch-progress-notify-interval=0s"], 2, "--watch-progress-notify-interval"),
        (&["--auto-compaction-retention=many"], 2, "--auto-compaction-retention"),
        (&["--store=floppy://a"], 2, "cellway-store: "),
        (&[busy.as_str()], 1, "cellway-store: "),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cellway-store"));
        let output = command.args(flags).env_remove("CELLWAY_STORE").output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{flags:?}: {text}");
        assert!(text.contains(reason), "{flags:?}: {text}");
    }
}
