//! Long transfers through the tunnel, each way over each carrier, every byte checked; also while certificates are
//! renewed over each. And what the hub lists of a connection that is open.

#![allow(clippy::print_stdout, reason = "a test's output is its report")]

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use e2e_tests::{Fleet, LIMIT, Options, START_LIMIT, TARGET_PORT, download, needs, upload};
use serde_json::Value;
use test_support::{
    netns::{HUB, MEMBER_INSIDE},
    process::Process,
    stream::{Checker, Stream},
    wait_until,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    process::{ChildStdin, ChildStdout},
};

/// Programs built without optimisation move some tens of MiB a second.
const TRANSFER_LIMIT: Duration = Duration::from_secs(240);

fn length() -> u64 {
    let mib =
        std::env::var("CELLWAY_E2E_TRANSFER_MIB").ok().and_then(|text| text.parse().ok()).unwrap_or(1024);
    mib * 1024 * 1024
}

async fn fleet_with_target(transport: &str) -> Result<Option<(Fleet, String)>> {
    fleet_with_targets(&[("west", transport)], &[]).await
}

/// Members, each with what carries its tunnel, and the target that is open in all of them.
async fn fleet_with_targets(members: &[(&str, &str)], hub: &[&str]) -> Result<Option<(Fleet, String)>> {
    let needs = match needs() {
        Ok(needs) => needs,
        Err(reason) => {
            test_support::not_run(&reason);
            return Ok(None);
        }
    };
    let target = format!("{MEMBER_INSIDE}:{TARGET_PORT}");
    let member = vec!["--allow".to_owned(), target.clone()];
    let options = Options { hub: hub.iter().map(|flag| (*flag).to_owned()).collect(), member };
    let names: Vec<&str> = members.iter().map(|(name, _)| *name).collect();
    let mut fleet = Fleet::hub_only(needs, &names, options).await?;
    for &(name, transport) in members {
        fleet.enrol(name, &["--transport", transport]).await?;
    }
    for &(name, transport) in members {
        fleet.wait_for_member(name, START_LIMIT).await?;
        let carriers: Vec<_> =
            fleet.tunnels(name).await?.iter().map(|tunnel| tunnel["carrier"].to_string()).collect();
        ensure!(
            transport == "auto" || carriers.iter().all(|carrier| carrier.contains(transport)),
            "{name}: {carriers:?}"
        );
        fleet.start_target(name).await?;
        fleet.allow_at_hub(name, &target).await?;
        wait_until(|| fleet.connected(name, &target), LIMIT, "the destination to be open").await?;
    }
    Ok(Some((fleet, target)))
}

async fn both_ways(transport: &str) -> Result<()> {
    let Some((fleet, target)) = fleet_with_target(transport).await? else { return Ok(()) };
    let length = length();
    for (way, seed) in [("down", 11), ("up", 12)] {
        let began = Instant::now();
        let mut stream = fleet.connected("west", &target).await?;
        let transfer = async {
            if way == "down" {
                download(&mut stream, seed, length).await
            } else {
                upload(&mut stream, seed, length).await
            }
        };
        tokio::time::timeout(TRANSFER_LIMIT, transfer)
            .await
            .with_context(|| format!("{way} over {transport} hangs"))?
            .with_context(|| format!("{way} over {transport}\nhub:\n{}", fleet.hub_log()))?;
        let rate = length as f64 / 1_048_576.0 / began.elapsed().as_secs_f64();
        println!("{way} over {transport}: {} MiB, {rate:.0} MiB/s", length / 1_048_576);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gigabyte_each_way_over_h2() -> Result<()> {
    both_ways("h2").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gigabyte_each_way_over_quic() -> Result<()> {
    both_ways("quic").await
}

/// Nothing is lost, and no connection fails, on a path that loses one packet in a hundred while it is full.
async fn through_a_lossy_path(transport: &str) -> Result<()> {
    const LENGTH: u64 = 24 * 1024 * 1024;
    const SHORT: usize = 64 * 1024;
    test_support::require!(test_support::tools::nft());
    let Some((fleet, target)) = fleet_with_target(transport).await? else { return Ok(()) };
    let before = tunnel_ids(&fleet, "west").await?;
    fleet.star.lose(100)?;
    let full = |seed| {
        let (fleet, target) = (&fleet, &target);
        async move { download(&mut fleet.connected("west", target).await?, seed, LENGTH).await }
    };
    let mut downloads = std::pin::pin!(async { tokio::try_join!(full(41), full(42), full(43), full(44)) });
    let began = Instant::now();
    let mut short = 0;
    loop {
        let echo = async {
            let mut stream = fleet.connected("west", &target).await?;
            stream.write_all(b"echo\n").await?;
            let sent = vec![short as u8; SHORT];
            let mut back = vec![0; SHORT];
            let (mut read, mut write) = stream.split();
            tokio::try_join!(write.write_all(&sent), read.read_exact(&mut back))?;
            ensure!(back == sent, "the echo differs");
            anyhow::Ok(())
        };
        tokio::select! {
            done = &mut downloads => {
                done.with_context(|| format!("a download over {transport}\nhub:\n{}", fleet.hub_log()))?;
                break;
            }
            done = echo => {
                done.with_context(|| format!("echo {short} over {transport}\nhub:\n{}", fleet.hub_log()))?;
            }
        }
        ensure!(began.elapsed() < TRANSFER_LIMIT, "the downloads hang");
        short += 1;
    }
    ensure!(tunnel_ids(&fleet, "west").await? == before, "a tunnel was given up");
    println!("{transport}: {short} echoes beside the downloads, {:.1} s", began.elapsed().as_secs_f64());
    Ok(())
}

async fn tunnel_ids(fleet: &Fleet, member: &str) -> Result<Vec<String>> {
    Ok(fleet.tunnels(member).await?.iter().map(|tunnel| tunnel["id"].to_string()).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_packets_fail_no_connection_over_h2() -> Result<()> {
    through_a_lossy_path("h2").await
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_packets_fail_no_connection_over_quic() -> Result<()> {
    through_a_lossy_path("quic").await
}

#[tokio::test(flavor = "multi_thread")]
async fn dial_joins_standard_input_and_output_over_mtls() -> Result<()> {
    let Some((fleet, target)) = fleet_with_target("auto").await? else { return Ok(()) };
    const LENGTH: u64 = 32 * 1024 * 1024;
    for way in ["down", "up"] {
        let (mut dial, mut input, mut output) = start_dial(&fleet, &target)?;
        input.write_all(format!("{way} 21 {LENGTH}\n").as_bytes()).await?;
        if way == "down" {
            // A half-close towards the target must not cut what it sends.
            drop(input);
            let mut checker = Checker::new(21, LENGTH);
            let mut buffer = vec![0; 256 * 1024];
            loop {
                let count = output.read(&mut buffer).await?;
                if count == 0 {
                    break;
                }
                checker.take(&buffer[..count]).map_err(anyhow::Error::msg)?;
            }
            ensure!(checker.complete(), "only {} bytes came\n{}", checker.seen(), dial.tail(20));
        } else {
            let mut source = Stream::new(21, LENGTH);
            while let Some(piece) = source.next_piece() {
                input.write_all(&piece).await?;
            }
            drop(input);
            let mut verdict = String::new();
            output.read_to_string(&mut verdict).await?;
            ensure!(verdict == "ok\n", "{verdict:?}\n{}", dial.tail(20));
        }
        let status = dial.wait(LIMIT).await?;
        ensure!(status.success(), "{status}");
    }

    // The hub lists one for as long as it is open, with what has gone through it.
    const GREETING: &[u8] = b"hello";
    let (mut dial, mut input, mut output) = start_dial(&fleet, &target)?;
    input.write_all(b"echo\n").await?;
    input.write_all(GREETING).await?;
    let mut back = vec![0; GREETING.len()];
    let echoed = tokio::time::timeout(LIMIT, output.read_exact(&mut back)).await;
    echoed.context("nothing comes back")?.with_context(|| dial.tail(20))?;
    ensure!(back == GREETING, "the echo differs");
    wait_until(
        || async {
            let rows = connections(&fleet, &target).await?;
            ensure!(rows.len() == 1, "{rows:?}");
            let row = &rows[0];
            ensure!(row["cluster"] == "west" && row["frontend"] == "connect", "{row}");
            let whose = format!("cellway:admin at {HUB}:");
            ensure!(row["client"].as_str().is_some_and(|client| client.starts_with(&whose)), "{row}");
            let bytes = (row["bytesReceived"].as_u64(), row["bytesSent"].as_u64());
            // The line before the greeting went there only.
            ensure!(bytes == (Some(5), Some(10)), "{row}");
            anyhow::Ok(())
        },
        LIMIT,
        "the connection's row",
    )
    .await?;
    drop(input);
    let status = dial.wait(LIMIT).await?;
    ensure!(status.success(), "{status}\n{}", dial.tail(20));
    wait_until(
        || async {
            let rows = connections(&fleet, &target).await?;
            ensure!(rows.is_empty(), "{rows:?}");
            anyhow::Ok(())
        },
        LIMIT,
        "the connection's row to go",
    )
    .await?;
    Ok(())
}

fn start_dial(fleet: &Fleet, target: &str) -> Result<(Process, ChildStdin, ChildStdout)> {
    let mut command = fleet.star.hub().command(&fleet.needs.cellway);
    command.args(["dial", "west", target, "--data-dir"]).arg(fleet.hub_dir());
    Process::spawn_piped("dial", command, &fleet.dir.join("dial.log"))
}

/// What the hub lists of connections to the target; those to the member's API come and go.
async fn connections(fleet: &Fleet, target: &str) -> Result<Vec<Value>> {
    let mut listed = fleet.cellway_json(&["connections", "west"]).await?;
    let rows = listed["items"].as_array_mut().context("no items")?;
    rows.retain(|row| row["target"] == target);
    Ok(std::mem::take(rows))
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_renewed_under_load() -> Result<()> {
    // Side by side: it is the certificates' age that takes the time.
    let members = [("west", "quic"), ("east", "h2")];
    let Some((mut fleet, target)) = fleet_with_targets(&members, &["--agent-certificate-ttl", "40s"]).await?
    else {
        return Ok(());
    };
    let west = fleet.member("west")?.data.clone();
    let east = fleet.member("east")?.data.clone();
    let (west_end, east_end) = tokio::try_join!(
        renewed_under_load(&fleet, "west", &target, &west),
        renewed_under_load(&fleet, "east", &target, &east),
    )?;
    // The next tunnel is dialled with the certificate that was renewed last, and the hub takes it.
    fleet.kill_hub().await?;
    fleet.start_hub().await?;
    for (member, first_end) in [("west", west_end), ("east", east_end)] {
        fleet.wait_for_member(member, LIMIT).await?;
        let end = newest_end(&fleet, member).await?;
        ensure!(
            end > first_end,
            "the certificate of {member}'s new tunnel ends at {end}, the first one's did at {first_end}"
        );
        let mut stream =
            wait_until(|| fleet.connected(member, &target), LIMIT, "the destination to be open again")
                .await?;
        download(&mut stream, 33, 1_000_000).await?;
    }
    Ok(())
}

/// Gives back when the certificate of before all renewals ends, as the hub said.
async fn renewed_under_load(fleet: &Fleet, member: &str, target: &str, files: &Path) -> Result<String> {
    let (first_end, first_ids) = (newest_end(fleet, member).await?, tunnel_ids(fleet, member).await?);
    let before = certificates(files)?;
    ensure!(!before.is_empty(), "no certificate in {}", files.display());
    // An echo that never pauses, until the certificate on disk has changed twice.
    let mut stream = fleet.connected(member, target).await?;
    stream.write_all(b"echo\n").await?;
    let mut seen = vec![before];
    let began = Instant::now();
    let mut source = Stream::new(31, u64::MAX);
    while seen.len() < 3 {
        let limit = Duration::from_secs(180);
        ensure!(began.elapsed() < limit, "{member} has renewed {} times only", seen.len() - 1);
        let piece = source.next_piece().context("an endless stream ended")?;
        stream.write_all(&piece).await?;
        let mut back = vec![0; piece.len()];
        stream.read_exact(&mut back).await?;
        ensure!(piece == back, "the echo from {member} differs");
        let now = certificates(files)?;
        if seen.last() != Some(&now) {
            seen.push(now);
        }
    }
    // The tunnel that is there serves on, and the hub hears of each new certificate through it.
    let mut stream = fleet.connected(member, target).await?;
    download(&mut stream, 32, 1_000_000).await?;
    let told = || async {
        let end = newest_end(fleet, member).await?;
        ensure!(end > first_end, "the hub says {end}, as before the renewal");
        Ok(())
    };
    wait_until(told, LIMIT, "the hub to know of the renewed certificate").await?;
    ensure!(tunnel_ids(fleet, member).await? == first_ids, "{member}'s tunnels changed during the transfer");
    Ok(first_end)
}

/// When the certificate of the member's newest tunnel ends, as the hub says; RFC 3339, so texts compare as times do.
async fn newest_end(fleet: &Fleet, member: &str) -> Result<String> {
    let tunnels = fleet.tunnels(member).await?;
    let ends = tunnels.iter().filter_map(|tunnel| tunnel["certificateNotAfter"].as_str());
    Ok(ends.max().context("no tunnel says when its certificate ends")?.to_owned())
}

/// The certificates under a folder, without keys: what changes at a renewal.
fn certificates(folder: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "pem" || ending == "crt")
                && let Ok(text) = std::fs::read_to_string(&path)
                && text.contains("BEGIN CERTIFICATE")
            {
                found.push(text);
            }
        }
    }
    found.sort();
    Ok(found)
}
