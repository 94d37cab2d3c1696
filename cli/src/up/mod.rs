//! `up`: a hub, and with `--demo` two simulated members, as separate processes of this same program.

mod children;
mod demo;
mod live;
mod progress;

use std::{
    fs,
    io::{self, IsTerminal as _},
    path::{Path, PathBuf},
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
    hub::Hub,
    kubeconfig::{default_data_dir, default_demo_dir},
    output::{own_command, text_out},
};

/// The hub makes its keys at the first start, which is slow on a slow machine.
const START_LIMIT: Duration = Duration::from_secs(90);
/// How often something that has no event to wait for is looked at.
const POLL: Duration = Duration::from_millis(150);
/// In the data folder of a demo: it may be thrown away and made anew.
const DEMO_MARK: &str = "cellway-demo";

/// What the programs write when they are ready, as far as it is needed here.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct HubFile {
    #[serde(flatten)]
    pub(crate) server: Server,
}

pub(crate) async fn run(args: UpArgs) -> Result<()> {
    let mut signals = Signals::install().map_err(|error| Error::failed("listen for Ctrl-C", error))?;
    let folder = match (&args.data_dir, args.demo) {
        (Some(folder), _) => folder.clone(),
        (None, true) => default_demo_dir()?,
        (None, false) => default_data_dir()?,
    };
    let _ours = prepare(&folder, args.demo)?;
    let folder =
        folder.canonicalize().map_err(|error| Error::failed(format!("use {}", folder.display()), error))?;
    let mut children = Children::new(folder.join("logs"));
    let result = tokio::select! {
        result = story(&args, &folder, &mut children) => result,
        signal = signals.recv() => Err(Error::failed("go on", format!("{signal} came"))),
    };
    let mut progress = Progress::new();
    let result = match result {
        Ok(_) if args.once => Ok(()),
        Ok(hub) => tokio::select! {
            result = live::run(&hub, &mut children, args.demo) => result,
            _ = signals.recv() => Ok(()),
        },
        Err(error) => Err(error.remedy(format!("the logs are in {}", folder.join("logs").display()))),
    };
    progress.step("ending the processes").finish(&{
        children.stop(&mut signals).await;
        "every process has ended".to_owned()
    });
    result
}

async fn story(args: &UpArgs, folder: &Path, children: &mut Children) -> Result<Hub> {
    let mut progress = Progress::new();
    let hub = start_hub(args, folder, children, &mut progress).await?;
    if args.demo {
        demo::run(&hub, folder, children, &mut progress).await?;
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

/// Makes the data folder. A demo begins afresh; nothing but a former demo that has ended is ever removed. The file keeps
/// others out for as long as it is held.
fn prepare(folder: &Path, demo: bool) -> Result<Option<fs::File>> {
    let tried = format!("use the data folder {}", folder.display());
    let failed = |error: io::Error| Error::failed(&tried, error);
    let mark = folder.join(DEMO_MARK);
    if demo && folder.exists() {
        let empty = fs::read_dir(folder).map_err(failed)?.next().is_none();
        if mark.is_file() {
            let former = fs::File::open(&mark).map_err(failed)?;
            if former.try_lock().is_err() {
                return Err(Error::usage(&tried, "a demo is running in it")
                    .remedy("end that one, or name another folder with --data-dir"));
            }
            fs::remove_dir_all(folder).map_err(failed)?;
        } else if !empty {
            return Err(Error::usage(&tried, "it holds something that is not a demo's")
                .remedy("name an empty folder with --data-dir"));
        }
    }
    fs::create_dir_all(folder.join("logs")).map_err(failed)?;
    if !demo {
        return Ok(None);
    }
    fs::write(&mark, "Written by `cellway up --demo`, which removes this folder when it starts.\n")
        .map_err(failed)?;
    let ours = fs::File::open(&mark).map_err(failed)?;
    // Where locks are not to be had, the demo works all the same.
    let _ = ours.try_lock();
    Ok(Some(ours))
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
