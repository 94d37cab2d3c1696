//! `up`: a hub, and with `--demo` two simulated members, as separate processes of this same program.

mod children;
mod demo;
mod live;
mod progress;

use std::{
    fs,
    io::{self, IsTerminal as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use proxy_server::rows::Server;
use serde::{Deserialize, Serialize};
use service::signals::Signals;

use self::{
    children::{Children, Program},
    progress::Progress,
};
use crate::{
    args::UpArgs,
    error::{Error, Result},
    folder,
    hub::Hub,
    kubeconfig::{default_data_dir, default_demo_dir},
    output::{own_command, text_out},
};

/// The hub makes its keys at the first start, which is slow on a slow machine.
const START_LIMIT: Duration = Duration::from_secs(90);
/// How often something that has no event to wait for is looked at.
const POLL: Duration = Duration::from_millis(150);
/// So often, after something has failed, it is looked whether a process has ended.
const LOOKS_AFTER_A_FAILURE: usize = 4;

/// What the programs write when they are ready, as far as it is needed here.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct HubFile {
    #[serde(flatten)]
    pub(crate) server: Server,
}

pub(crate) async fn run(args: UpArgs) -> Result<ExitCode> {
    let mut signals = Signals::install().map_err(|error| Error::failed("listen for Ctrl-C", error))?;
    let folder = match (&args.data_dir, args.demo) {
        (Some(folder), _) => folder.clone(),
        (None, true) => default_demo_dir()?,
        (None, false) => default_data_dir()?,
    };
    let _ours = match args.demo {
        true => Some(folder::begin_demo(&folder)?),
        false => folder::keep(&folder, false).map(|()| None)?,
    };
    let made = folder::make(&folder.join("logs")).and_then(|()| folder.canonicalize());
    let folder = made.map_err(|error| Error::failed(format!("use {}", folder.display()), error))?;
    let mut children = Children::new(folder.join("logs"));
    let result = tokio::select! {
        result = story(&args, &folder, &mut children) => result.map(Some),
        signal = signals.recv() => match args.once {
            true => Err(Error::failed("run the demo to its end", format!("{signal} came"))),
            false => Ok(None),
        },
    };
    let mut progress = Progress::new();
    let result = match result {
        Ok(Some(hub)) if !args.once => tokio::select! {
            result = live::run(&hub, &mut children, args.demo) => result,
            _ = signals.recv() => Ok(()),
        },
        // It has run to its end, or was told to stop before it was up.
        Ok(_) => Ok(()),
        Err(error) => Err(error.remedy(format!("the logs are in {}", folder.join("logs").display()))),
    };
    let step = progress.step("ending the processes");
    let ending = children.stop(&mut signals).await;
    step.finish("every process has ended");
    result.map(|()| ending.into())
}

async fn story(args: &UpArgs, folder: &Path, children: &mut Children) -> Result<Hub> {
    let mut progress = Progress::new();
    let hub = start_hub(args, folder, children, &mut progress).await?;
    if args.demo {
        if let Err(error) = demo::run(&hub, folder, children, &mut progress).await {
            // What failed may only be what comes of a process that has ended, which is told a moment later than its connections.
            for _ in 0..LOOKS_AFTER_A_FAILURE {
                tokio::time::sleep(POLL).await;
                children.check()?;
            }
            return Err(error);
        }
        if !args.once {
            text_out(&format!("To look around, in another terminal:\n\n{}\n", demo::commands(&hub, folder)))?;
        }
    } else {
        text_out(&format!(
            "\nThe hub is up. Add a member:\n  {} cluster add NAME{}\nkubectl:\n  kubectl --kubeconfig {} get kubefedclusters -A\n\n",
            own_command(),
            data_dir_flag(args, folder),
            hub.kubeconfig().display(),
        ))?;
    }
    Ok(hub)
}

/// The flag that makes other commands find this hub, when they would not by themselves.
fn data_dir_flag(args: &UpArgs, folder: &Path) -> String {
    if args.data_dir.is_some() { format!(" --data-dir {}", folder.display()) } else { String::new() }
}

async fn start_hub(
    args: &UpArgs,
    folder: &Path,
    children: &mut Children,
    progress: &mut Progress,
) -> Result<Hub> {
    let step = progress.step("starting the hub: API, proxy server, federation controller");
    // The demo takes free ports: it must work beside whatever runs here already.
    let port =
        |given: Option<u16>, usual: u16| given.unwrap_or(if args.demo { 0 } else { usual }).to_string();
    let mut hub = Program::new("hub", ["hub"])
        .arg("--data-dir", folder)
        .arg("--api-port", port(args.api_port, 6443))
        .arg("--agent-port", port(args.agent_port, 8091));
    if args.demo {
        for flag in ["--connect-port", "--health-port", "--admin-port"] {
            hub = hub.arg(flag, "0");
        }
        // Nobody else has business with a demo, and nobody waits long for its end.
        hub = hub.arg("--bind-address", "127.0.0.1").arg("--graceful-shutdown-timeout", "5s");
    }
    let path = folder.join("hub.json");
    // One that was killed left its file behind, and one that runs here has it.
    let former = fs::read_to_string(&path).ok();
    children.start(hub)?;
    let file: HubFile = wait_for_file(&path, former.as_deref(), "hub", children).await?;
    let hub = Hub::from_kubeconfig(folder.join("admin.kubeconfig")).await?;
    let server = hub.server().await?;
    step.finish(&format!(
        "hub is up: API {}, agents dial {}",
        file.server.addresses.api, server.advertised_agents
    ));
    Ok(hub)
}

/// Waits until a program has written its file, or has ended instead. The `former` file is somebody else's.
async fn wait_for_file<T: for<'a> Deserialize<'a>>(
    path: &Path,
    former: Option<&str>,
    who: &str,
    children: &mut Children,
) -> Result<T> {
    let start = tokio::time::Instant::now();
    loop {
        children.check()?;
        if let Ok(text) = fs::read_to_string(path)
            && former != Some(text.as_str())
        {
            // The file appears whole: it is renamed into place.
            return serde_json::from_str(&text)
                .map_err(|error| Error::failed(format!("read {}", path.display()), error));
        }
        if start.elapsed() > START_LIMIT {
            return Err(Error::failed(
                format!("start the {who}"),
                format!("{} has not appeared within {START_LIMIT:?}\n{}", path.display(), children.tail(who)),
            ));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Whether somebody watches.
fn on_terminal() -> bool {
    io::stdout().is_terminal()
}

/// The folder of a simulated member.
fn member_dir(folder: &Path, name: &str) -> PathBuf {
    folder.join("members").join(name)
}
