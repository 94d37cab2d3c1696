//! The binary itself: its help, its exit codes.

// What helps a test is a test.
#![allow(clippy::unwrap_used)]

use std::process::Command;

#[test]
fn help_and_usage_errors() {
    let run = |arguments: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_proxy-server")).args(arguments).output().unwrap()
    };
    let help = run(&["--help"]);
    assert!(help.status.success());
    assert!(String::from_utf8_lossy(&help.stdout).contains("--cluster-ca-cert"));
    assert_eq!(run(&["--no-such-flag"]).status.code(), Some(2));
    let missing = run(&["--server-port=0", "--uds-name=/nonexistent/x.sock"]);
    assert_eq!(missing.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&missing.stderr).contains("--cluster-cert is needed"));
    assert_eq!(run(&["--uds-name=/nonexistent/x.sock", "--mode=grpc"]).status.code(), Some(2));
    let unreadable = run(&[
        "--server-port=0",
        "--uds-name=/nonexistent/x.sock",
        "--mode=http-connect",
        "--cluster-cert=/nonexistent/crt",
        "--cluster-key=/nonexistent/key",
    ]);
    assert_eq!(unreadable.status.code(), Some(1), "{unreadable:?}");
}
