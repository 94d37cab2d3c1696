//! `dev member`: a simulated member, its API server and its agent in this process.

use std::{net::SocketAddr, path::Path, process::ExitCode, time::Duration};

use federation_apiserver::{
    ApiServer, Config, Role,
    simulation::{NodeConfig, SimulationConfig},
};
use service::signals::Signals;
use tokio_util::sync::CancellationToken;

use crate::{
    args::MemberArgs,
    error::{Error, Result, chain},
    kubeconfig::default_data_dir,
    membership::cluster_name,
    output::text_out,
    parent,
};

/// A simulated member has nothing worth a long farewell.
const DRAIN: Duration = Duration::from_secs(5);
/// Nodes get addresses of one small range.
const MAX_ZONES: usize = 64;

pub(crate) async fn run(args: MemberArgs) -> Result<ExitCode> {
    args.log.init().map_err(|error| Error::usage("set up the log", chain(&error)))?;
    cluster_name(&args.name)?;
    let mut signals = Signals::install().map_err(|error| Error::failed("listen for signals", error))?;
    let data = match &args.data_dir {
        Some(folder) => folder.clone(),
        None => default_data_dir()?.join("members").join(&args.name),
    };
    let tried = format!("start the simulated member {}", args.name);
    let mut config = Config::new(&data, Role::Member);
    config.bind = SocketAddr::new(args.bind_address, args.api_port);
    config.simulation = SimulationConfig { nodes: nodes(&args)?, ..SimulationConfig::default() };
    let api = ApiServer::bind(config).await.map_err(|error| Error::failed(&tried, chain(&error)))?;
    let kubeconfig = api.admin_kubeconfig();
    text_out(&format!(
        "simulated member {}: API https://{}, kubeconfig {}\n",
        args.name,
        api.local_addr(),
        kubeconfig.display()
    ))?;

    // The agent's own user may impersonate and little else, as a service account would in a real member.
    let agent = match agent_flags(&args, &data, &api.agent_kubeconfig()) {
        Some(flags) => Some(agent(flags, &tried).await?),
        None => {
            tracing::info!("no --hub given: the member runs alone");
            None
        }
    };
    let (drain, watch) = service::drain::channel();
    let api_stop = CancellationToken::new();
    let work = async {
        // Held to the end: the drain waits for the API server too.
        let held = watch;
        let agent = async {
            match agent {
                Some(agent) => agent
                    .run(held.clone())
                    .await
                    .map_err(|error| Error::failed("keep the agent running", chain(&error)))?,
                None => held.signaled().await,
            }
            // Streams of the API end last: the agent drains them first.
            api_stop.cancel();
            Ok(())
        };
        let api = async {
            let ended = api.run(api_stop.clone()).await;
            ended.map_err(|error| Error::failed("keep the member's API running", chain(&error)))
        };
        tokio::try_join!(agent, api).map(|_| ())
    };
    let stop = async {
        tokio::select! {
            signal = signals.recv() => tracing::info!(signal, "draining; a second signal cuts"),
            () = parent::gone(args.child.until_input_closes) => tracing::info!("whoever started this has ended"),
        }
        service::signals::drain(drain, DRAIN + DRAIN, &mut signals).await
    };
    parent::run(work, stop).await
}

fn nodes(args: &MemberArgs) -> Result<Vec<NodeConfig>> {
    let zones = if args.zone.is_empty() {
        vec![format!("{}-a", args.name), format!("{}-b", args.name)]
    } else {
        args.zone.clone()
    };
    if zones.len() > MAX_ZONES {
        return Err(Error::usage(
            "simulate the nodes",
            format!("{} zones are more than {MAX_ZONES}", zones.len()),
        ));
    }
    let numbered = (0..u8::MAX).zip(&zones);
    Ok(numbered
        .map(|(index, zone)| NodeConfig::in_zone(index, format!("{}-node-{index}", args.name), zone))
        .collect())
}

/// The agent's own flags, or nothing when there is no hub to dial.
fn agent_flags(args: &MemberArgs, data: &Path, kubeconfig: &Path) -> Option<Vec<String>> {
    if args.hub.is_empty() {
        return None;
    }
    let mut flags = vec![
        "proxy-agent".to_owned(),
        format!("--cluster-name={}", args.name),
        format!("--server={}", args.hub.join(",")),
        format!("--data-dir={}", data.join("agent").display()),
        format!("--kubeconfig={}", kubeconfig.display()),
        format!("--transport={}", args.transport),
        "--health-server-host=127.0.0.1".to_owned(),
        format!("--health-server-port={}", args.health_port),
        format!("--admin-server-port={}", args.admin_port),
        format!("--drain-timeout={}s", DRAIN.as_secs()),
    ];
    flags.extend(args.enrolment_token.iter().map(|token| format!("--enrolment-token={token}")));
    flags.extend(
        args.enrolment_token_file.iter().map(|file| format!("--enrolment-token-file={}", file.display())),
    );
    flags.extend(args.ca_hash.iter().map(|hash| format!("--ca-hash={hash}")));
    flags.extend(args.allow.iter().map(|rule| format!("--allow={rule}")));
    Some(flags)
}

async fn agent(flags: Vec<String>, tried: &str) -> Result<proxy_agent::Bound> {
    let parsed = service::flags::try_parse::<proxy_agent::Args>(flags)
        .map_err(|error| Error::usage(tried, chain(&error)))?;
    let config =
        proxy_agent::Config::try_from(parsed.args).map_err(|error| Error::usage(tried, chain(&error)))?;
    let bound = proxy_agent::App::new(config)
        .effective(parsed.effective)
        .bind()
        .await
        .map_err(|error| Error::failed(tried, chain(&error)))?;
    tracing::info!(health = %bound.health_addr(), admin = %bound.admin_addr(), "the agent has started");
    Ok(bound)
}
