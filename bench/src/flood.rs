//! Many tunnels from one process: what a server that holds thousands of agents costs.

use std::{path::PathBuf, time::Instant};

use anyhow::{Context, Result, bail};
use futures::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};
use tls::ClientTls;
use tokio::{runtime, task::JoinSet};
use tunnel::{AgentTunnel, Budget, CarrierChoice, ConnectOptions, DialError, Hello, Limits};

use crate::{certificates::SERVER_NAME, process};

/// Handshakes under way at once: a fleet that reconnects, not one that attacks.
const AT_ONCE: usize = 32;

/// Tries for each tunnel before the flood is given up: a busy server may turn one away.
const TRIES: usize = 5;

/// What each tunnel may promise as receive windows, as if it were an agent of its own. Nothing is sent here.
const BUDGET: usize = 1 << 30;

/// What to open, and where.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Flood {
    /// The server's agents' listener.
    pub(crate) address: String,
    /// `h2` or `quic`.
    pub(crate) transport: String,
    pub(crate) authority: PathBuf,
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
    pub(crate) tunnels: usize,
}

/// The line printed when all tunnels are attached.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Flooded {
    pub(crate) tunnels: usize,
    pub(crate) seconds: f64,
}

/// Opens the tunnels given as JSON, says so, and keeps them until standard input ends. One that ends by itself ends
/// the process with an error.
pub(crate) fn run(flood: &str) -> Result<()> {
    let flood: Flood = serde_json::from_str(flood).context("failed to parse what to open")?;
    let runtime = runtime::Runtime::new().context("failed to start a runtime")?;
    process::run_helper(runtime, hold(&flood))
}

async fn hold(flood: &Flood) -> Result<()> {
    let tls =
        ClientTls::from_files(&flood.authority, Some(flood.certificate.clone()), Some(flood.key.clone()))
            .context("failed to load the agents' certificate")?;
    let carrier: CarrierChoice = flood.transport.parse().map_err(anyhow::Error::msg)?;
    let begun = Instant::now();
    let tunnels: Vec<AgentTunnel> = stream::iter(0..flood.tunnels)
        .map(|number| open(flood, number, carrier, &tls))
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await?;
    process::say(&Flooded { tunnels: tunnels.len(), seconds: begun.elapsed().as_secs_f64() })?;
    let mut tasks = JoinSet::new();
    for tunnel in tunnels {
        tasks.spawn(refuse_dials(tunnel));
    }
    match tasks.join_next().await {
        Some(_) => bail!("a tunnel ended by itself"),
        None => Ok(()),
    }
}

async fn open(flood: &Flood, number: usize, carrier: CarrierChoice, tls: &ClientTls) -> Result<AgentTunnel> {
    let agent = format!("flood-{number}");
    let mut tries = 1;
    loop {
        let options = ConnectOptions {
            address: flood.address.clone(),
            server_name: SERVER_NAME.to_owned(),
            tls: tls.clone(),
            carrier,
            egress_proxy: None,
            hello: Hello {
                version: tunnel::VERSION.to_owned(),
                agent_id: agent.clone(),
                instance: agent.clone(),
                ..Hello::default()
            },
            limits: Limits::default(),
            budget: Budget::new(BUDGET),
        };
        match tunnel::connect(options).await {
            Ok(tunnel) => return Ok(tunnel),
            Err(error) if tries == TRIES => {
                return Err(error)
                    .with_context(|| format!("failed to open tunnel {number} after {TRIES} tries"));
            }
            Err(_) => tries += 1,
        }
    }
}

async fn refuse_dials(mut tunnel: AgentTunnel) {
    while let Some(dial) = tunnel.accept().await {
        dial.refuse(DialError::Refused).await;
    }
}
