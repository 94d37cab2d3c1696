//! What goes wrong between a hub and its members: cut links, killed programs, and those who may not.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e_tests::{Fleet, LIMIT, Options, START_LIMIT, TARGET_PORT, download, errors, needs};
use serde_json::Value;
use test_support::{
    netns::{HUB, MEMBER_INSIDE},
    process::Process,
    require, wait_for, wait_until,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Longer than the keep-alive needs to find a dead path.
const CUT: Duration = Duration::from_secs(60);

fn allow() -> Options {
    Options { member: vec!["--allow".into(), format!("{MEMBER_INSIDE}:{TARGET_PORT}")], ..Options::default() }
}

fn id(tunnel: &Value) -> u64 {
    tunnel["id"].as_u64().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_link_is_found_and_healed_and_disturbs_nobody_else() -> Result<()> {
    let needs = require!(needs());
    let mut fleet = Fleet::start(needs, &["west", "east"], Options::default()).await?;
    let before = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: before}\n";
    fleet.kubectl_member("west", &["apply", "-f", "-"], Some(before)).await?;
    let east: Vec<u64> = fleet.tunnels("east").await?.iter().map(id).collect();

    let began = Instant::now();
    fleet.star.cut(0)?;
    // Found within the keep-alive, and said as what it is.
    wait_until(
        || async {
            let tunnels = fleet.tunnels("west").await?;
            ensure!(tunnels.is_empty(), "{} tunnels", tunnels.len());
            anyhow::Ok(())
        },
        CUT,
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
    fleet.wait_for_member("west", LIMIT).await?;
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
    fleet.wait_for_member("west", START_LIMIT).await?;
    fleet.kubectl_member("west", &["get", "nodes"], None).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_agent_resets_its_connections_and_joins_again() -> Result<()> {
    let needs = require!(needs());
    let mut fleet = Fleet::start(needs, &["west"], allow()).await?;
    let target = fleet.start_target("west").await?;
    fleet.allow_at_hub("west", &target).await?;
    let mut stream = connected(&fleet, &target).await?;
    // Endless for the test's purposes; a part of it has arrived when the agent is killed.
    stream.write_all(b"down 5 1000000000000\n").await?;
    let mut buffer = vec![0; 1024 * 1024];
    stream.read_exact(&mut buffer).await?;
    fleet.member("west")?.process.kill().await?;
    // What is under way may still arrive; then the end, which must not take long and may not pass for an orderly one:
    // the length says that it is not.
    let end = tokio::time::timeout(LIMIT, async {
        loop {
            match stream.read(&mut buffer).await {
                Ok(0) => return "an end".to_owned(),
                Ok(_) => {}
                Err(error) => return error.to_string(),
            }
        }
    })
    .await
    .context("the connection hangs after its agent was killed")?;
    println!("the client saw: {end}");
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
    let refused = enrolment_of(&fleet, "late", &expired).await?;
    ensure!(refused.contains("expired") || refused.contains("401") || refused.contains("403"), "{refused}");
    ensure!(fleet.tunnels("late").await?.is_empty(), "an expired token opened a tunnel");

    // The certificate of west claiming to be east.
    let stolen = fleet.member("west")?.data.clone();
    let mut command = fleet.star.member(0).command(&fleet.needs.proxy_agent);
    command.args(["--cluster-name", "east", "--server", &format!("{HUB}:8091"), "--admin-server-port", "0"]);
    command.args(["--health-server-port", "0"]).arg("--data-dir").arg(copy_of_identity(&fleet, &stolen)?);
    let before: Vec<u64> = fleet.tunnels("east").await?.iter().map(id).collect();
    let mut thief = Process::spawn("thief", command, &fleet.dir.join("thief.log"))?;
    test_support::wait_for(
        || {
            let text = thief.tail(200).to_lowercase();
            thief.ended().is_ok_and(|ended| ended.is_some())
                || ["refused", "does not match", "not match", "belongs to", "is for"]
                    .iter()
                    .any(|word| text.contains(word))
        },
        LIMIT,
        "the thief to be turned away",
    )
    .await
    .with_context(|| thief.tail(40))?;
    thief.kill().await.ok();
    ensure!(fleet.tunnels("east").await?.iter().map(id).collect::<Vec<_>>() == before, "a thief serves east");

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
    fleet.enrol("west").await?;
    fleet.wait_for_member("west", START_LIMIT).await
}

/// Starts a member with the token and gives back what it says when it is turned away.
async fn enrolment_of(fleet: &Fleet, name: &str, added: &Value) -> Result<String> {
    let data = fleet.dir.join(format!("{name}-agent"));
    let mut command = fleet.star.member(0).command(&fleet.needs.proxy_agent);
    command.args(["--cluster-name", name, "--server", &format!("{HUB}:8091")]);
    command.args(["--admin-server-port", "0", "--health-server-port", "0"]);
    command.args(["--enrolment-token", added["token"].as_str().context("no token")?]);
    command.args(["--ca-hash", added["caHash"].as_str().context("no hash")?]).arg("--data-dir").arg(&data);
    let agent = Process::spawn(name, command, &fleet.dir.join(format!("{name}-agent.log")))?;
    let mut said = String::new();
    test_support::wait_for(
        || {
            said = agent.tail(100);
            let text = said.to_lowercase();
            text.contains("token")
                && ["expired", "refused", "401", "403"].iter().any(|word| text.contains(word))
        },
        LIMIT,
        "the agent to say that its token is refused",
    )
    .await
    .with_context(|| agent.tail(40))?;
    Ok(said)
}

/// What a thief has: the member's files, without its enrolled name.
fn copy_of_identity(fleet: &Fleet, data: &std::path::Path) -> Result<std::path::PathBuf> {
    let copy = fleet.dir.join("stolen");
    let mut folders = vec![(data.to_path_buf(), copy.clone())];
    // The identity is kept in the data folder itself or in one of its own; a database is of no use to a thief.
    while let Some((from, to)) = folders.pop() {
        std::fs::create_dir_all(&to)?;
        for entry in std::fs::read_dir(&from)? {
            let entry = entry?;
            let kind = entry.metadata()?;
            if kind.is_dir() {
                folders.push((entry.path(), to.join(entry.file_name())));
            } else if kind.is_file() && kind.len() < 1024 * 1024 {
                std::fs::copy(entry.path(), to.join(entry.file_name()))?;
            }
        }
    }
    let agent = copy.join("agent");
    Ok(if agent.is_dir() { agent } else { copy })
}
