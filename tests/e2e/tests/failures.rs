//! What goes wrong between a hub and its members: cut links, killed programs, and those who may not.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use e2e_tests::{Fleet, LIMIT, Options, START_LIMIT, TARGET_PORT, counter, download, errors, needs};
use serde_json::Value;
use test_support::{
    netns::{HUB, MEMBER_INSIDE},
    process::Process,
    require, wait_for, wait_until,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    process::ChildStdout,
};

/// How soon a member is back once its hub is.
const RETURN_LIMIT: Duration = Duration::from_secs(15);
/// How soon a dead path is found: 30 s are promised, and the command that looks is started anew each time, on busy cores.
const FOUND_LIMIT: Duration = Duration::from_secs(30 + 10);
/// Longer than that.
const CUT: Duration = Duration::from_secs(60);
/// How soon a member is back on a link that is whole again: an attempt of before may last as long as a handshake may, 10 s;
/// the longest pause between two is 10 s; then one succeeds, on busy cores.
const HEALED_LIMIT: Duration = Duration::from_secs(10 + 10 + 10);
/// What the target is asked for: endless for a test's purposes.
const ENDLESS: &[u8] = b"down 5 1000000000000\n";
/// The hub's count of agents that it has turned away.
const REFUSED: &str = "cellway_server_rejected_handshakes_total";

fn allow() -> Options {
    Options { member: vec!["--allow".into(), format!("{MEMBER_INSIDE}:{TARGET_PORT}")], ..Options::default() }
}

fn id(tunnel: &Value) -> u64 {
    tunnel["id"].as_u64().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_link_is_found_and_healed_and_disturbs_nobody_else() -> Result<()> {
    let needs = require!(needs());
    let mut fleet = Fleet::start(needs, &["west", "east"], allow()).await?;
    let target = fleet.start_target("west").await?;
    fleet.allow_at_hub("west", &target).await?;
    let before = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: before}\n";
    fleet.kubectl_member("west", &["apply", "-f", "-"], Some(before)).await?;
    let east: Vec<u64> = fleet.tunnels("east").await?.iter().map(id).collect();
    connected(&fleet, &target).await?;
    let (mut dial, mut output) = downloading(&fleet, &target).await?;

    let began = Instant::now();
    fleet.star.cut(0)?;
    // Whoever has a connection open learns of it when the dead path is found: with an error, not an orderly end.
    breaks(&mut dial, &mut output, FOUND_LIMIT).await?;
    // Found within the keep-alive, and said as what it is.
    wait_until(
        || async {
            let tunnels = fleet.tunnels("west").await?;
            ensure!(tunnels.is_empty(), "{} tunnels", tunnels.len());
            anyhow::Ok(())
        },
        FOUND_LIMIT.saturating_sub(began.elapsed()),
        "the hub to notice the cut",
    )
    .await?;
    let output = fleet.cellway(&["ping", "west"]).await?;
    ensure!(output.status.code() == Some(4), "{} {}", output.status, errors(&output));
    // The other member never notices: the same tunnels, and it answers.
    wait_for(|| began.elapsed() >= CUT, CUT * 2, "the minute to pass").await?;
    fleet.wait_for_member("east", LIMIT).await?;
    ensure!(
        fleet.tunnels("east").await?.iter().map(id).collect::<Vec<_>>() == east,
        "east's tunnels changed"
    );

    fleet.star.restore(0)?;
    fleet.wait_for_member("west", HEALED_LIMIT).await?;
    fleet.kubectl_member("west", &["get", "configmap", "before"], None).await?;
    ensure!(fleet.member("west")?.process.ended()?.is_none(), "the member's program ended");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_hub_comes_back_with_everything() -> Result<()> {
    let needs = require!(needs());
    let mut fleet = Fleet::start(needs, &["west"], Options::default()).await?;
    fleet
        .apply("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: kept, namespace: default}\ndata: {a: b}\n")
        .await?;
    fleet.kill_hub().await?;
    fleet.start_hub().await?;
    // What was acknowledged is there, and the member dials again by itself with the certificate that it has.
    let kept = fleet.get(None, &["configmap", "kept"]).await?;
    ensure!(kept["data"]["a"] == "b");
    fleet.wait_for_member("west", RETURN_LIMIT).await?;
    fleet.kubectl_member("west", &["get", "nodes"], None).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_agent_resets_its_connections_and_joins_again() -> Result<()> {
    let needs = require!(needs());
    let mut fleet = Fleet::start(needs, &["west"], allow()).await?;
    let target = fleet.start_target("west").await?;
    fleet.allow_at_hub("west", &target).await?;
    // A part has arrived at both clients when the agent is killed.
    let mut stream = connected(&fleet, &target).await?;
    stream.write_all(ENDLESS).await?;
    let (mut dial, mut output) = downloading(&fleet, &target).await?;
    let mut buffer = vec![0; 1024 * 1024];
    stream.read_exact(&mut buffer).await?;
    fleet.member("west")?.process.kill().await?;
    // What is under way may still arrive; then the connections end, soon. A Unix socket has no reset that a reader
    // could tell from an end, so there the length must say it.
    tokio::time::timeout(LIMIT, async {
        while stream.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
    })
    .await
    .context("the connection hangs after its agent was killed")?;
    breaks(&mut dial, &mut output, LIMIT).await?;
    wait_until(
        || async {
            let tunnels = fleet.tunnels("west").await?;
            ensure!(tunnels.is_empty(), "{} tunnels", tunnels.len());
            anyhow::Ok(())
        },
        LIMIT,
        "the hub to forget the agent's tunnels",
    )
    .await?;
    let (status, head, _) = fleet.connect("west", &target).await?;
    ensure!(status == 503, "without a tunnel the answer is 503, not {head}");
    // It needs no new token.
    fleet.start_member("west", &[]).await?;
    fleet.wait_for_member("west", START_LIMIT).await?;
    let mut stream = connected(&fleet, &target).await?;
    download(&mut stream, 6, 3_000_000).await
}

/// The annotation that opens a destination takes a moment to arrive.
async fn connected(fleet: &Fleet, target: &str) -> Result<tokio::net::UnixStream> {
    Ok(wait_until(|| fleet.connected("west", target), LIMIT, "the destination to be open").await?)
}

/// `cellway dial` with a download that does not end by itself; a part of it has arrived.
async fn downloading(fleet: &Fleet, target: &str) -> Result<(Process, ChildStdout)> {
    let mut command = fleet.star.hub().command(&fleet.needs.cellway);
    command.args(["dial", "west", target, "--data-dir"]).arg(fleet.hub_dir());
    let (dial, mut input, mut output) = Process::spawn_piped("dial", command, &fleet.dir.join("dial.log"))?;
    input.write_all(ENDLESS).await?;
    drop(input);
    let mut buffer = vec![0; 1024 * 1024];
    let arrived = tokio::time::timeout(LIMIT, output.read_exact(&mut buffer)).await;
    arrived.context("the download does not begin")?.with_context(|| dial.tail(20))?;
    Ok((dial, output))
}

/// Waits until its connection has ended. What is under way may still arrive. Over TLS the rest may not pass for an orderly
/// end: the command fails.
async fn breaks(dial: &mut Process, output: &mut ChildStdout, limit: Duration) -> Result<()> {
    let mut buffer = vec![0; 1024 * 1024];
    tokio::time::timeout(limit, async {
        while output.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
    })
    .await
    .context("the command hangs although its connection is dead")?;
    let status = dial.wait(LIMIT).await?;
    ensure!(!status.success(), "a broken transfer ended as if it were whole\n{}", dial.tail(20));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn those_who_may_not_are_refused() -> Result<()> {
    let needs = require!(needs());
    let mut fleet = Fleet::start(needs, &["west", "east"], allow()).await?;
    let target = fleet.start_target("west").await?;

    // Open at the agent, but not at the hub: forbidden. Open at both: connected.
    let (status, head, _) = fleet.connect("west", &target).await?;
    ensure!(status == 403, "not opened at the hub: {head}");
    fleet.allow_at_hub("west", "*").await?;
    connected(&fleet, &target).await?;
    // Open at the hub, but not at the agent: forbidden, and a different destination than a refused one.
    let (status, head, _) = fleet.connect("west", &format!("{MEMBER_INSIDE}:7001")).await?;
    ensure!(status == 403, "not opened at the agent: {head}");
    let (status, head, _) = fleet.connect("nowhere", &target).await?;
    ensure!(status == 404, "an unknown member: {head}");
    // A token that has expired, and one that was used.
    let expired = fleet.cellway_json(&["cluster", "add", "late", "--ttl", "1s"]).await?;
    let until = expired["expiresAt"].as_str().context("no time")?.to_owned();
    wait_until(
        || async {
            let mut date = tokio::process::Command::new("date");
            date.args(["-u", "+%Y-%m-%dT%H:%M:%SZ"]);
            let now = String::from_utf8(e2e_tests::run(date, None).await?.stdout)?;
            ensure!(now.trim() > until.as_str(), "{now}");
            anyhow::Ok(())
        },
        LIMIT,
        "the token to expire",
    )
    .await?;
    says(&agent_with(&fleet, "late", "late", &expired)?, "the enrolment token has expired").await?;
    ensure!(fleet.tunnels("late").await?.is_empty(), "an expired token opened a tunnel");
    let once = fleet.cellway_json(&["cluster", "add", "once"]).await?;
    let mut first = agent_with(&fleet, "once", "first", &once)?;
    says(&first, "enrolled").await?;
    first.kill().await?;
    says(&agent_with(&fleet, "once", "second", &once)?, "the enrolment token is not valid").await?;

    // The certificate of west claiming to be east: the hub itself refuses it, over either carrier, and counts it. The
    // same certificate with an honest hello is served, so nothing else is wrong with the attempt.
    let before: Vec<u64> = fleet.tunnels("east").await?.iter().map(id).collect();
    for carrier in ["h2", "quic"] {
        let honest = format!("honest-{carrier}");
        let mut own = fleet.probe("west", "west", &honest, carrier)?;
        own.wait_for_line("attached", LIMIT).await?;
        wait_until(
            || async {
                let tunnels = fleet.tunnels("west").await?;
                ensure!(tunnels.iter().any(|tunnel| tunnel["instance"] == *honest), "{tunnels:?}");
                anyhow::Ok(())
            },
            LIMIT,
            "the hub to serve west's certificate as west",
        )
        .await
        .with_context(|| own.tail(20))?;
        own.kill().await?;

        let refusals =
            async || anyhow::Ok(counter(&fleet.metrics().await?, REFUSED, &["reason=\"wrong-cluster\""]));
        let counted = refusals().await?;
        let mut thief = fleet.probe("west", "east", &format!("thief-{carrier}"), carrier)?;
        let said = thief.wait_for_line("ended: ", LIMIT).await?;
        ensure!(said.contains("certificate says 'west'"), "over {carrier} the thief is told {said:?}");
        ensure!(refusals().await? == counted + 1.0, "the hub did not count the thief over {carrier}");
    }
    ensure!(fleet.tunnels("east").await?.iter().map(id).collect::<Vec<_>>() == before, "a thief serves east");

    // One agent of two is revoked: its tunnel ends and it is told why, the other one's stays.
    let agents = async || -> Result<BTreeSet<String>> {
        let tunnels = fleet.tunnels("west").await?;
        Ok(tunnels.iter().filter_map(|tunnel| tunnel["agentId"].as_str()).map(str::to_owned).collect())
    };
    let first = agents().await?;
    let added = fleet.cellway_json(&["cluster", "add", "west"]).await?;
    let second = agent_with(&fleet, "west", "node-2", &added)?;
    let both = wait_until(
        || async {
            let both = agents().await?;
            ensure!(both.len() == first.len() + 1, "{both:?}");
            anyhow::Ok(both)
        },
        START_LIMIT,
        "a second agent",
    )
    .await
    .with_context(|| second.tail(20))?;
    let id = both.difference(&first).next().context("no second agent")?;
    let revoked = fleet.cellway_json(&["cluster", "revoke", "west", "--agent", id]).await?;
    ensure!(revoked["tunnels"] == 1, "{revoked}");
    says(&second, "has been revoked").await?;
    ensure!(agents().await? == first, "another agent than the revoked one lost its tunnel, or it came back");

    // Revoked: the tunnels end within seconds, and the certificate opens no new one.
    let output = fleet.cellway(&["cluster", "revoke", "west"]).await?;
    ensure!(output.status.success(), "{}", errors(&output));
    wait_until(
        || async {
            let tunnels = fleet.tunnels("west").await?;
            ensure!(tunnels.is_empty(), "{} tunnels", tunnels.len());
            anyhow::Ok(())
        },
        Duration::from_secs(15),
        "revocation to end the tunnels",
    )
    .await?;
    fleet.wait_for_member("east", LIMIT).await?;
    ensure!(fleet.tunnels("west").await?.is_empty(), "a revoked member came back");

    // A new token is a new beginning.
    fleet.member("west")?.process.kill().await?;
    fleet.enrol("west", &[]).await?;
    fleet.wait_for_member("west", START_LIMIT).await
}

/// An agent that enrols with a token, into a folder of its own.
fn agent_with(fleet: &Fleet, cluster: &str, agent: &str, added: &Value) -> Result<Process> {
    let data = fleet.dir.join(format!("{agent}-agent"));
    let mut command = fleet.star.member(0).command(&fleet.needs.proxy_agent);
    command.args(["--cluster-name", cluster, "--server", &format!("{HUB}:8091")]);
    command.args(["--admin-server-port", "0", "--health-server-port", "0"]);
    command.args(["--enrolment-token", added["token"].as_str().context("no token")?]);
    command.args(["--ca-hash", added["caHash"].as_str().context("no hash")?]).arg("--data-dir").arg(&data);
    Process::spawn(agent, command, &fleet.dir.join(format!("{agent}-agent.log")))
}

/// Waits until the agent has said so.
async fn says(agent: &Process, what: &str) -> Result<()> {
    test_support::wait_for(|| agent.tail(100).contains(what), LIMIT, what)
        .await
        .with_context(|| agent.tail(40))?;
    Ok(())
}
