//! A real kubectl against a server of a test.

use std::path::PathBuf;
use std::process::Stdio;

use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use super::{LIMIT, Server};

/// kubectl as the administrator of a server.
pub(crate) struct Kubectl<'a> {
    pub(crate) program: PathBuf,
    pub(crate) server: &'a Server,
}

impl Kubectl<'_> {
    /// Runs kubectl with a line of arguments and some input; returns success and output (stdout, then stderr).
    pub(crate) async fn run(&self, line: &str, input: &str) -> (bool, String) {
        let mut child = Command::new(&self.program)
            .args(line.split_whitespace())
            .env("KUBECONFIG", &self.server.kubeconfig)
            .env("HOME", &self.server.dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("kubectl starts");
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes()).await.expect("input is taken");
        }
        let output = tokio::time::timeout(LIMIT, child.wait_with_output()).await;
        let output = output.expect("kubectl ends in time").expect("kubectl's output");
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    }

    /// Succeeds, and its output contains each of these.
    pub(crate) async fn ok(&self, line: &str, contains: &[&str]) -> String {
        self.with(line, "", contains).await
    }

    /// The same with some input.
    pub(crate) async fn with(&self, line: &str, input: &str, contains: &[&str]) -> String {
        let (success, text) = self.run(line, input).await;
        assert!(success, "kubectl {line}: {text}");
        for wanted in contains {
            assert!(text.contains(wanted), "kubectl {line}: {wanted:?} is not in\n{text}");
        }
        text
    }

    /// Fails, and says each of these.
    pub(crate) async fn fails(&self, line: &str, input: &str, contains: &[&str]) {
        let (success, text) = self.run(line, input).await;
        assert!(!success, "kubectl {line} should have failed: {text}");
        for wanted in contains {
            assert!(text.contains(wanted), "kubectl {line}: {wanted:?} is not in\n{text}");
        }
    }
}
