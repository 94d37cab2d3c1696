//! Two whole hubs on one stock kube-apiserver: each of them, when it leads, is killed in the middle of a stream of changes. The
//! other one takes over when the lease has run out, the member gets every change once, and whichever hub is there converts.
//! Joins when `KUBEBUILDER_ASSETS` names a folder with `kube-apiserver` and `etcd`.

mod common;
#[path = "common/fleet.rs"]
mod fleet;
#[path = "common/stock.rs"]
mod stock;

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result, ensure};
use kube::Client;
use kube::config::Kubeconfig;
use test_support::{TestDir, api, free_port, require, tools, wait_until};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use self::common::LIMIT;
use self::fleet::{Fleet, HUBS, federated};
use self::stock::Stock;

const MEMBER: &str = "east";
const OBJECTS: usize = 8;
const MOST_KILLS: usize = 6;

/// Passes each connection on to the first of these ports that takes it, as a Service before both hubs would.
async fn balance(listener: TcpListener, ports: [u16; 2]) {
    let mut passing = JoinSet::new();
    while let Ok((mut from, _)) = listener.accept().await {
        passing.spawn(async move {
            for port in ports {
                if let Ok(mut to) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
                    // A side that goes away is how connections end here.
                    let _ended = tokio::io::copy_bidirectional(&mut from, &mut to).await;
                    return;
                }
            }
        });
    }
}

/// Waits until KubeFed's form is there, which whichever hub is there has made.
async fn until_converted(root: &Client, name: &str) -> Result<()> {
    let old = federated(root, "v1beta1");
    let look = async || {
        let object = old.get(name).await?;
        ensure!(object.data["spec"]["placement"]["clusters"][0]["name"] == MEMBER, "{:?}", object.data);
        Ok(())
    };
    Ok(wait_until(look, LIMIT, "a conversion").await?)
}

/// So many patches of config maps the member has taken, whether they changed anything or not.
async fn patches(member: &Client) -> Result<usize> {
    let metrics = api::text(member, "/metrics").await?;
    let is_counted = |line: &&str| {
        let has = |label: &str| line.contains(label);
        line.starts_with("apiserver_request_total{")
            && has(r#"verb="PATCH""#)
            && has(r#"resource="configmaps""#)
            && (has(r#"code="200""#) || has(r#"code="201""#))
    };
    let mut all = 0;
    for line in metrics.lines().filter(is_counted) {
        all += line.rsplit(' ').next().unwrap_or_default().parse::<usize>().context(line.to_owned())?;
    }
    Ok(all)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_stock_server_leaders_are_killed_and_nothing_is_done_twice() -> Result<()> {
    let assets = require!(tools::kubebuilder_assets());
    let kubectl = require!(tools::kubectl());
    let folder = TestDir::new("stock-hubs")?;
    let stock = Stock::start(&assets, folder.path()).await?;
    stock.grant(&kubectl).await?;
    let root = api::client(Kubeconfig::read_from(&stock.root)?).await?;

    let webhooks = [free_port()?, free_port()?];
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let conversions = format!("https://{}/cellway/v1/convert", listener.local_addr()?);
    let _balancing = AbortOnDropHandle::new(tokio::spawn(balance(listener, webhooks)));
    let on_stock = |number: usize, command: &mut Command| {
        command.arg("--kubeconfig").arg(&stock.hub).args(["--webhook-url", &conversions]);
        command.arg(format!("--webhook-port={}", webhooks[number]));
    };
    let mut fleet = Fleet::start(folder.path(), &[MEMBER], Some(root.clone()), on_stock).await?;
    fleet.change(OBJECTS).await?;

    let mut killed = [0; 2];
    // On a busy machine the same one may lead again before the other one's turn comes.
    for _ in 0..MOST_KILLS {
        if !killed.contains(&0) {
            break;
        }
        let (leader, pause) = fleet.kill_leader().await?;
        eprintln!("{} was killed; {pause:.1?} without a change", HUBS[leader]);
        killed[leader] += 1;
        until_converted(&root, "map-0").await.with_context(|| fleet.story())?;
        fleet.start_hub(leader).await?;
        // The next to be killed is the one that leads now: the other one must be able to do its work.
        fleet.until_tunnels().await?;
    }
    ensure!(!killed.contains(&0), "each is to have led and been killed: {killed:?}");

    fleet.until_moved(1).await?;
    let mut last = fleet.stop().await?;
    last.insert("after".to_owned(), 1);
    fleet.ensure_written_once(&last).await?;
    // Nor was anything written that was there already, which no watch tells.
    let member = api::client(common::administrator(&folder.join(MEMBER)).await?).await?;
    let (patches, contents) = (patches(&member).await?, last.values().sum::<usize>());
    ensure!(patches == contents, "the member took {patches} patches for {contents} contents");
    Ok(())
}
