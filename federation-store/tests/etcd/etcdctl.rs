//! A script of `etcdctl` commands, with the same output from our server as from etcd.

use std::path::PathBuf;
use std::process::Stdio;

use federation_store::etcd::EtcdConfig;
use serde_json::Value;
use test_support::process::Process;
use test_support::{TestDir, require, tools, wait_until};
use tls::{CertificateAuthority, ClientAuth, ServerTls};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use super::support::{DAY, LONG, Server, etcd, ours, ours_behind};

/// One command a line; what stands behind `<` goes to its input, with `;` for the ends of lines.
const SCRIPT: &str = r#"
put a 1
put a 2 --prev-kv
put b 1
put b 2
put c 1
put dir/1 x
put dir/2 y
put dir/3 z
get a
get a --print-value-only
get none
get a c
get a --from-key
get "" --prefix
get dir/ --prefix
get dir/ --prefix --keys-only
get dir/ --prefix --limit 2
get dir/ --prefix --limit 3
get dir/ --prefix --order DESCEND
get dir/ --prefix --order DESCEND --limit 1
get dir/ --prefix --sort-by CREATE --order DESCEND
get "" --prefix --sort-by MODIFY --order ASCEND
get "" --prefix --sort-by KEY --order DESCEND
get dir/ --prefix --sort-by VALUE --order DESCEND
get a --rev 2
get a --rev 3
get "" --prefix --rev 4
get a --rev 99
get "" --prefix --limit 2 --rev 6
put dir/2 yy --prev-kv
put dir/2 --ignore-value < 
put nothing --ignore-value < 
get dir/2
del none
del none --prev-kv
del b --prev-kv
del a c --prev-kv
del dir/2
del dir/ --prefix --prev-kv
get "" --prefix
put a 1
put b 2
put c 3
del b --from-key
put a 1
txn < mod("a") > "0";;put t1 yes;get a;;put t1 no;;
txn < mod("a") = "0";;put t2 yes;;put t2 no;get t1;;
txn < val("a") = "1";;del t1;;get a;;
txn < val("none") = "1";;put t3 yes;;put t3 no;;
txn < ver("a") < "9";create("a") > "1";;put t4 yes;;put t4 no;;
txn < ver("none") = "0";;put t5 yes;;put t5 no;;
txn < create("a") = "0";;put t6 yes;;put t6 no;;
txn < ;put t7 a;put t8 b;del t7;;
txn < ;put t9 a;put t9 b;;
txn < ;put u1 1;put u2 2;put u3 3;get u --prefix;;
txn < ;del u --prefix;get u --prefix;;
txn < ;get u1;get a;;
txn < mod("a") = "0";;;
get "" --prefix
lease grant 100
lease timetolive 5
lease revoke 5
lease keep-alive --once 5
put leased x --lease 5
lease list
put k1 v1
put k1 v2
put k1 v3
del k1
put k1 v4
get k1
get k1 --rev 40
compaction 20
compaction 20
compaction 10
compaction 9999
get "" --prefix --rev 10
get a --rev 10
get a --rev 20
get "" --prefix --rev 20
compaction --physical 30
get "" --prefix --rev 25
get "" --prefix --rev 30
put "key with spaces" "value with spaces"
get "key with spaces"
put unicode/ключ значение
get unicode/ --prefix
put upper/KEY 1
put upper/key 2
get upper/ --prefix
get upper/K --prefix
del upper/KEY
get upper/ --prefix
put empty ""
get empty
put empty full
put x/1 1
put x/10 1
put x/2 1
get x/1 x/2
get x/1 --prefix
get x/1 x/1
get x/2 x/1
del x/2 x/1
get x/ --prefix --sort-by VERSION --order ASCEND --limit 1 --keys-only
del "" --prefix
get "" --prefix
put last one
get last
"#;

fn etcdctl() -> Result<PathBuf, String> {
    if let Some(path) = std::env::var_os("ETCDCTL") {
        return Ok(path.into());
    }
    let found = || {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).map(|folder| folder.join("etcdctl")).find(|file| file.is_file())
    };
    if let Some(path) = found() {
        return Ok(path);
    }
    let missing = "no etcdctl: name one with ETCDCTL, or install the Debian package etcd-client";
    tools::root().map_err(|_| missing.to_owned())?;
    let installed = std::process::Command::new("apt-get")
        .args(["install", "-y", "-qq", "--no-install-recommends", "etcd-client"])
        .env("DEBIAN_FRONTEND", "noninteractive")
        .output();
    match installed {
        Ok(output) if output.status.success() => found().ok_or_else(|| missing.to_owned()),
        _ => Err(missing.to_owned()),
    }
}

/// Words, where quotes hold spaces together.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quoted = false;
    for c in line.chars() {
        match c {
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            ' ' if !quoted => words.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// What it prints, and its complaint.
async fn run(etcdctl: &PathBuf, server: &Server, line: &str) -> String {
    run_at(etcdctl, &["--endpoints".to_owned(), server.address().to_string()], line).await
}

/// The same with other flags that say where the server is.
async fn run_at(etcdctl: &PathBuf, place: &[String], line: &str) -> String {
    let (line, input) = match line.split_once(" < ") {
        Some((line, input)) => (line, Some(input.replace(';', "\n"))),
        None => (line.trim_end_matches(" <"), line.ends_with(" <").then(String::new)),
    };
    let mut child = Command::new(etcdctl)
        .env("ETCDCTL_API", "3")
        .args(place)
        .args(["-w", "json"])
        .args(words(line))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.unwrap_or_default().as_bytes()).await.unwrap();
    drop(stdin);
    let output = child.wait_with_output().await.unwrap();
    let mut text = String::new();
    for line in String::from_utf8(output.stdout).unwrap().lines() {
        match serde_json::from_str::<Value>(line) {
            Ok(mut value) => {
                strip(&mut value);
                text.push_str(&value.to_string());
            }
            Err(_) => text.push_str(line),
        }
        text.push('\n');
    }
    let complaint = String::from_utf8(output.stderr).unwrap();
    for line in complaint.lines().filter(|line| line.starts_with("Error")) {
        text.push_str(line);
        text.push('\n');
    }
    text
}

/// Removes who answered, and the number that etcd chose for a lease.
fn strip(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for key in ["cluster_id", "member_id", "raft_term", "ID", "id"] {
                fields.remove(key);
            }
            fields.values_mut().for_each(strip);
        }
        Value::Array(items) => items.iter_mut().for_each(strip),
        _ => {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_script_has_the_same_output_as_from_etcd() {
    let etcdctl = require!(etcdctl());
    let commands: Vec<&str> = SCRIPT.lines().filter(|line| !line.is_empty()).collect();
    assert!(commands.len() >= 100);
    let server = ours().await;
    let mut transcript = Vec::new();
    for command in &commands {
        transcript.push(run(&etcdctl, &server, command).await);
    }
    // Without an etcd to compare with, these say that the commands did what they should.
    assert!(transcript.last().unwrap().contains(r#""value":"b25l""#), "{transcript:?}");
    let complaints = transcript.iter().filter(|text| text.contains("Error")).count();
    assert_eq!(complaints, 20, "{transcript:#?}");
    let etcd = match etcd().await {
        Ok(etcd) => etcd,
        Err(missing) => {
            println!("{} commands of etcdctl, not compared with a real etcd: {missing}", commands.len());
            return;
        }
    };
    for (command, ours) in commands.iter().zip(&transcript) {
        assert_eq!(*ours, run(&etcdctl, &etcd, command).await, "etcdctl {command}");
    }
    println!("{} commands of etcdctl have the same output as from a real etcd", commands.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn etcdctl_finds_the_endpoint_healthy() {
    let etcdctl = require!(etcdctl());
    let server = ours().await;
    for (command, part) in [
        ("endpoint health", "\"health\":true"),
        ("endpoint status", "\"version\":\"3."),
        ("member list", "\"name\":\"default\""),
        ("alarm list", "{"),
    ] {
        let text = run(&etcdctl, &server, command).await;
        assert!(text.contains(part), "etcdctl {command}: {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn etcdctl_works_with_a_certificate_and_with_no_other() {
    let etcdctl = require!(etcdctl());
    let dir = TestDir::new("etcdctl-tls").unwrap();
    let authority = CertificateAuthority::create("clients").unwrap();
    let serving = authority.issue_server(&["127.0.0.1".to_owned()], DAY).unwrap();
    let ca = authority.certificate_pem();
    let server_tls =
        ServerTls::from_pem(&serving.certificate_pem, &serving.key_pem, Some(ca), ClientAuth::Required)
            .unwrap();
    let server = ours_behind(EtcdConfig::default(), Some(&server_tls)).await;
    let file = |name: &str, text: &str| {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let ca = file("ca.crt", ca);
    let place = |rest: &[String]| {
        let mut place = vec!["--endpoints".to_owned(), server.url.clone(), "--cacert".to_owned(), ca.clone()];
        place.extend_from_slice(rest);
        place
    };
    let known_by = |authority: &CertificateAuthority, name: &str| {
        let issued = authority.issue_client(name, &[], DAY).unwrap();
        let certificate = file(&format!("{name}.crt"), &issued.certificate_pem);
        let key = file(&format!("{name}.key"), &issued.key_pem);
        place(&["--cert".to_owned(), certificate, "--key".to_owned(), key])
    };
    let known = known_by(&authority, "operator");

    // From the first write on, whenever it begins.
    let mut watch = Command::new(&etcdctl);
    watch.env("ETCDCTL_API", "3").args(&known).args(["watch", "w/", "--prefix", "--rev", "2"]);
    let watch = Process::spawn("etcdctl watch", watch, &dir.join("watch.log")).unwrap();
    for (command, part) in [
        ("put w/1 one", "\"revision\":2"),
        ("put w/1 two --prev-kv", "\"value\":\"b25l\""),
        ("txn < mod(\"w/1\") = \"3\";;del w/1;;get w/1;;", "\"succeeded\":true"),
        ("txn < mod(\"w/1\") = \"3\";;put w/1 no;;get w/1;;", "\"header\""),
        ("lease grant 100", "\"TTL\":100"),
        ("lease list", "{"),
        ("endpoint status", "\"version\":\"3."),
        ("endpoint health", "\"health\":true"),
    ] {
        let text = run_at(&etcdctl, &known, command).await;
        assert!(text.contains(part) && !text.contains("Error:"), "etcdctl {command}: {text}");
    }
    let told = ["PUT", "w/1", "one", "PUT", "w/1", "two", "DELETE", "w/1"];
    let seen = async || {
        // The value of a key that is gone is an empty line.
        let lines: Vec<String> = watch.lines().into_iter().filter(|line| !line.is_empty()).collect();
        if lines == told { Ok(()) } else { Err(format!("{lines:?}")) }
    };
    wait_until(seen, LONG, "the watch to tell all").await.unwrap();
    let text = run_at(&etcdctl, &known, "compaction 2").await;
    assert!(text.contains("compacted revision 2"), "{text}");

    let revision = server.store.as_ref().unwrap().revision();
    let strangers = CertificateAuthority::create("others").unwrap();
    for unknown in [place(&[]), known_by(&strangers, "stranger")] {
        let text = run_at(&etcdctl, &unknown, "--command-timeout=2s put w/2 no").await;
        assert!(text.contains("Error"), "{text}");
    }
    assert_eq!(server.store.as_ref().unwrap().revision(), revision);
    let text = run_at(&etcdctl, &known, "get w/ --prefix").await;
    assert!(text.contains("\"header\"") && !text.contains("Error:"), "{text}");
}
