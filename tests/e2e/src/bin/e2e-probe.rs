//! What a test has to do from inside a namespace of the fleet.
//!
//! `e2e-probe attach ADDRESS FOLDER CLUSTER INSTANCE CARRIER` dials a hub with the certificate in FOLDER and a hello that
//! claims CLUSTER. It prints `attached` when the hub takes it, and `ended: REASON` when the hub ends or refuses it.
//! `e2e-probe get ADDRESS PATH` prints the page.

use std::{io::Write as _, path::Path};

use anyhow::{Context as _, Error, Result, bail};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tunnel::{Budget, CarrierChoice, ConnectError, ConnectOptions, Hello, Limits, Target};

/// Plenty for a tunnel that carries nothing.
const MEMORY: usize = 64 << 20;

#[tokio::main]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["attach", address, folder, cluster, instance, carrier] => {
            attach(address, Path::new(folder), cluster, instance, carrier.parse().map_err(Error::msg)?).await
        }
        ["get", address, path] => get(address, path).await,
        _ => bail!("usage: e2e-probe attach ADDRESS FOLDER CLUSTER INSTANCE CARRIER | get ADDRESS PATH"),
    }
}

async fn attach(
    address: &str,
    folder: &Path,
    cluster: &str,
    instance: &str,
    carrier: CarrierChoice,
) -> Result<()> {
    let agent = folder.join("agent.pem");
    let tls = tls::ClientTls::from_files(folder.join("ca.crt"), Some(agent.clone()), Some(agent))?;
    let certificate = tls.certificate().context("no certificate")?;
    let hello = Hello {
        version: tunnel::VERSION.to_owned(),
        cluster: cluster.to_owned(),
        agent_id: tls::agent_identity(&certificate)?.agent.to_string(),
        instance: instance.to_owned(),
        ..Hello::default()
    };
    let options = ConnectOptions {
        address: address.to_owned(),
        server_name: address.parse::<Target>()?.host,
        tls,
        carrier,
        egress_proxy: None,
        hello,
        limits: Limits::default(),
        budget: Budget::new(MEMORY),
    };
    // The hub may say no before it takes it, or later.
    let reason = match tunnel::connect(options).await {
        Ok(tunnel) => {
            eprintln!("attached");
            tunnel.handle().closed().await.to_string()
        }
        Err(ConnectError::Refused(reason)) => reason.to_string(),
        Err(error) => return Err(error.into()),
    };
    eprintln!("ended: {reason}");
    Ok(())
}

async fn get(address: &str, path: &str) -> Result<()> {
    let mut stream = TcpStream::connect(address).await.with_context(|| format!("cannot reach {address}"))?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut page = Vec::new();
    stream.read_to_end(&mut page).await?;
    std::io::stdout().write_all(&page)?;
    Ok(())
}
