//! The command, hubs and members as the tests of whole programs start them. All of a test lies in one folder: what `name`
//! keeps is in `name`, what it prints in `name.log`.

use std::path::Path;
use std::process::Output;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kube::config::Kubeconfig;
use serde_json::Value;
use test_support::process::Process;
use test_support::{wait_for, wait_until};
use tokio::process::Command;

/// Programs are built without optimisation and share the machine with other tests.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);

/// The command, with nothing of whoever runs the test; `folder` is its home.
pub(crate) fn command(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cellway"));
    for variable in ["CELLWAY_DATA_DIR", "CELLWAY_KUBECONFIG", "CELLWAY_STORE", "CELLWAY_LOG"] {
        command.env_remove(variable);
    }
    command.env("HOME", folder).kill_on_drop(true);
    command
}

/// Runs the command to its end, however that is.
pub(crate) async fn run(folder: &Path, args: &[&str]) -> Result<Output> {
    let done = tokio::time::timeout(LIMIT, command(folder).args(args).output()).await;
    Ok(done.with_context(|| format!("`cellway {}` does not end", args.join(" ")))??)
}

/// The same about the hub `hub`, and it must succeed; what it prints.
pub(crate) async fn printed(folder: &Path, hub: &str, args: &[&str]) -> Result<String> {
    let data = folder.join(hub).display().to_string();
    let output = run(folder, &[args, &["--data-dir", &data]].concat()).await?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`cellway {}`: {errors}", args.join(" "));
    Ok(String::from_utf8(output.stdout)?)
}

/// What starts the hub `name` on loopback. These of its ports are where there is room.
pub(crate) fn hub(folder: &Path, name: &str, ports: &[&str]) -> Command {
    let mut command = command(folder);
    command.args(["hub", "--bind-address=127.0.0.1", "--data-dir"]).arg(folder.join(name));
    command.args(ports.iter().map(|port| format!("--{port}-port=0")));
    command
}

/// Starts the hub `name` with this command, and waits until it is ready.
pub(crate) async fn start_hub(folder: &Path, name: &str, command: Command) -> Result<Process> {
    let ready = folder.join(name).join("hub.json");
    // A hub that was killed has left it.
    match std::fs::remove_file(&ready) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let mut hub = spawn(folder, name, command)?;
    let started = wait_until(
        || {
            let (there, ended) = (ready.is_file(), hub.ended());
            async move {
                ensure!(ended?.is_none(), "it has ended");
                ensure!(there, "no hub.json");
                Ok(())
            }
        },
        LIMIT,
        format!("the hub {name} to be ready"),
    )
    .await;
    started.with_context(|| hub.tail(40))?;
    Ok(hub)
}

/// Makes the member `name` known at a hub, by `cluster add` with these flags; what starts it, by token, as a person would.
pub(crate) async fn member(folder: &Path, hub: &str, name: &str, flags: &[&str]) -> Result<Command> {
    let add = [&["cluster", "add", name, "-o", "json"][..], flags].concat();
    let added: Value = serde_json::from_str(&printed(folder, hub, &add).await?)?;
    let field = |field: &str| added[field].as_str().context("not printed");
    let mut command = command(folder);
    command.args(["dev", "member", name, "--hub", field("hub")?, "--ca-hash", field("caHash")?]);
    command.env("CELLWAY_ENROLMENT_TOKEN", field("token")?);
    command.arg("--data-dir").arg(folder.join(name));
    Ok(command)
}

/// Starts what `command` says as `name`.
pub(crate) fn spawn(folder: &Path, name: &str, command: Command) -> Result<Process> {
    Process::spawn(name, command, &folder.join(format!("{name}.log")))
}

/// The kubeconfig of whoever administers what keeps its data in `data`, once it is there.
pub(crate) async fn administrator(data: &Path) -> Result<Kubeconfig> {
    let path = data.join("admin.kubeconfig");
    wait_for(|| path.is_file(), LIMIT, path.display()).await?;
    Ok(Kubeconfig::read_from(&path)?)
}
