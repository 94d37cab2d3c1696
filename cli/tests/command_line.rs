//! The command as scripts see it: exit codes, what goes to which stream, formats.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::{
    collections::BTreeMap,
    process::{Command, Output},
};

fn cellway(args: &[&str]) -> Output {
    cellway_in(&[], args)
}

/// The same with these variables in its environment.
fn cellway_in(environment: &[(&str, &str)], args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cellway"))
        .args(args)
        .env_remove("CELLWAY_DATA_DIR")
        .env_remove("CELLWAY_KUBECONFIG")
        .env_remove("CELLWAY_STORE")
        .env("HOME", "/nonexistent")
        .envs(environment.iter().copied())
        .output()
        .unwrap()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_wrong_command_line_is_2_and_says_why() {
    for args in [
        &["frobnicate"][..],
        &["ping"],
        &["tunnels", "-o", "xml"],
        &["up", "--once"],
        &["cluster", "add", "Not_A_Name"],
        &["cluster", "add", "a", "--ttl", "0s"],
        &["cluster", "add", "a", "--uses", "0"],
        &["dial", "east", "no-port"],
        &["clusters", "--kubeconfig", "/a", "--data-dir", "/b"],
        &["hub", "--agent-certificate-ttl", "1s", "--data-dir", "/nonexistent/hub"],
        &["hub", "--log", "[[[", "--data-dir", "/nonexistent/hub"],
    ] {
        let output = cellway(args);
        assert_eq!(code(&output), 2, "{args:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty(), "{args:?}");
        assert!(!output.stderr.is_empty(), "{args:?}");
    }
}

/// Nothing of a hub or of a demo that runs is taken away by a second one in the same folder.
#[test]
fn a_second_demo_leaves_the_first_alone() {
    let folder = tempfile::tempdir().unwrap();
    let mark = folder.path().join("cellway-demo");
    std::fs::write(&mark, "").unwrap();
    std::fs::write(folder.path().join("kept"), "").unwrap();
    let first = std::fs::File::open(&mark).unwrap();
    first.lock().unwrap();
    let output = cellway(&["up", "--demo", "--once", "--data-dir", folder.path().to_str().unwrap()]);
    assert_eq!(code(&output), 2, "{}", stderr(&output));
    assert!(stderr(&output).contains("a demo is running"), "{}", stderr(&output));
    assert!(folder.path().join("kept").exists());
}

#[test]
fn a_hub_that_is_not_there_is_3_and_says_what_to_do() {
    let output = cellway(&["clusters", "--data-dir", "/nonexistent"]);
    assert_eq!(code(&output), 3);
    assert!(stderr(&output).contains("cellway up"), "{}", stderr(&output));
    assert!(!stderr(&output).contains('\x1b'), "colours without a terminal");
}

/// The hub that is meant, for those that ask it and for those that look at its file: a wrong one may be revoked or replaced.
#[test]
fn a_flag_goes_before_the_environment_and_that_before_the_home_folder() {
    let all = [("CELLWAY_KUBECONFIG", "/env/file"), ("CELLWAY_DATA_DIR", "/env/dir")];
    let looks_in = |environment: &[(&str, &str)], args: &[&str], path: &str| {
        let output = cellway_in(environment, args);
        assert_eq!(code(&output), 3, "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(path), "{args:?} with {environment:?}: {}", stderr(&output));
    };
    for asks in [&["clusters"][..], &["cluster", "revoke", "east"], &["hub", "compact"], &["tunnels"]] {
        let with = |flags: &[&'static str]| [asks, flags].concat();
        looks_in(&all, &with(&["--data-dir", "/flag"]), "/flag/admin.kubeconfig");
        looks_in(&all, &with(&["--kubeconfig", "/flag"]), "no file /flag");
        looks_in(&all, asks, "/env/file");
        looks_in(&all[1..], asks, "/env/dir/admin.kubeconfig");
        looks_in(&[], asks, "/nonexistent/.cellway/admin.kubeconfig");
    }
    looks_in(&[("CELLWAY_DATA_DIR", "")], &["clusters"], "/nonexistent/.cellway/admin.kubeconfig");
    let all = [("CELLWAY_STORE", "sqlite:///env/store"), ("CELLWAY_DATA_DIR", "/env/dir")];
    let backup = std::env::temp_dir().join("cellway-never-written");
    let backup = backup.to_str().unwrap();
    for of in [&["hub", "check"][..], &["hub", "backup", backup]] {
        looks_in(&all, &[of, &["--data-dir", "/flag"]].concat(), "/flag/store.db");
        looks_in(&all, &[of, &["--store", "/flag"]].concat(), "/flag");
        looks_in(&all, of, "/env/store");
        looks_in(&all[1..], of, "/env/dir/store.db");
        looks_in(&[], of, "/nonexistent/.cellway/store.db");
    }
    let folder = tempfile::tempdir().unwrap();
    let (given, other) = (folder.path().join("backup"), folder.path().join("other"));
    std::fs::write(&given, "no database").unwrap();
    let environment = [("CELLWAY_DATA_DIR", other.to_str().unwrap())];
    let refused = cellway_in(&environment, &["hub", "restore", given.to_str().unwrap()]);
    assert!(stderr(&refused).contains(other.to_str().unwrap()), "{}", stderr(&refused));
}

#[test]
fn a_hub_that_does_not_answer_is_4() {
    let folder = tempfile::tempdir().unwrap();
    // A port that was free a moment ago and has nobody behind it.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let kubeconfig = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: hub\ncontexts: [{{name: hub, context: {{cluster: hub, user: a}}}}]\n\
         clusters: [{{name: hub, cluster: {{server: 'https://127.0.0.1:{port}'}}}}]\nusers: [{{name: a, user: {{token: t}}}}]\n"
    );
    std::fs::write(folder.path().join("admin.kubeconfig"), kubeconfig).unwrap();
    let output = cellway(&["tunnels", "--data-dir", folder.path().to_str().unwrap()]);
    assert_eq!(code(&output), 4, "{}", stderr(&output));
    // A member's kubeconfig needs no hub that answers.
    let output = cellway(&["kubeconfig", "east", "--data-dir", folder.path().to_str().unwrap()]);
    assert_eq!(code(&output), 0);
    assert!(
        String::from_utf8_lossy(&output.stdout).contains(&format!("https://127.0.0.1:{port}/clusters/east"))
    );
    let output = cellway(&["kubeconfig", "-o", "json", "--data-dir", folder.path().to_str().unwrap()]);
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["current-context"], "hub");
}

#[test]
fn completion_and_crds_print_to_standard_output() {
    for shell in ["bash", "zsh", "fish"] {
        let output = cellway(&["completion", shell]);
        assert_eq!(code(&output), 0);
        assert!(String::from_utf8_lossy(&output.stdout).contains("kubeconfig"), "{shell}");
    }
    let output = cellway(&["crds"]);
    assert_eq!(code(&output), 0);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains("kind: CustomResourceDefinition") && text.contains("federateddeployments"),
        "{text}"
    );
    let listed = cellway(&["crds", "-o", "json"]);
    let listed: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
    let documents = text.matches("kind: CustomResourceDefinition").count();
    assert_eq!((&listed["kind"], listed["items"].as_array().unwrap().len()), (&"List".into(), documents));
}

#[test]
fn the_demo_never_removes_what_is_not_a_demo() {
    let folder = tempfile::tempdir().unwrap();
    let precious = folder.path().join("precious");
    std::fs::write(&precious, "x").unwrap();
    let output = cellway(&["up", "--demo", "--once", "--data-dir", folder.path().to_str().unwrap()]);
    assert_eq!(code(&output), 2, "{}", stderr(&output));
    assert!(precious.exists());
}

#[tokio::test]
async fn a_hubs_data_is_backed_up_checked_and_restored() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let missing = cellway(&["hub", "check", "--data-dir", path]);
    assert_eq!(code(&missing), 3, "{}", stderr(&missing));

    let config = || federation_store::StoreConfig::new(folder.path().join("store.db"));
    let store = federation_store::Store::open(config()).await.unwrap();
    store.create("/a", "1").await.unwrap();
    let copy = folder.path().join("copy");
    let copy = copy.to_str().unwrap();
    let output = cellway(&["hub", "backup", copy, "--data-dir", path]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let again = cellway(&["hub", "backup", copy, "--data-dir", path]);
    assert_eq!(code(&again), 1);
    assert!(stderr(&again).contains("name a new file"), "{}", stderr(&again));
    let busy = cellway(&["hub", "restore", copy, "--data-dir", path]);
    assert_eq!(code(&busy), 1);
    assert!(stderr(&busy).contains("stop the hub"), "{}", stderr(&busy));
    store.create("/lost", "1").await.unwrap();
    store.close().await;

    let second = folder.path().join("second");
    let output = cellway(&["hub", "backup", second.to_str().unwrap(), "--data-dir", path, "-o", "json"]);
    let backup: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&backup["keys"], &backup["file"]), (&2.into(), &second.to_str().unwrap().into()));
    let output = cellway(&["hub", "restore", copy, "--data-dir", path]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("what was there is in ") && text.contains("store.db.replaced-"), "{text}");
    let output = cellway(&["hub", "check", "--data-dir", path, "-o", "json"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let checked: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((checked["keys"].as_u64(), &checked["faults"]), (Some(1), &serde_json::json!([])));
    let store = federation_store::Store::open(config()).await.unwrap();
    assert!(store.get("/lost", None).await.unwrap().0.is_none());
    store.close().await;
    let output = cellway(&["hub", "restore", copy, "--data-dir", path, "-o", "yaml"]);
    let restored: serde_json::Value = serde_yaml_ng::from_slice(&output.stdout).unwrap();
    assert!(restored["revision"].is_u64() && restored["replaced"].is_string(), "{restored}");
    std::fs::write(copy, "no database at all").unwrap();
    let damaged = cellway(&["hub", "check", "--store", copy]);
    assert_eq!(code(&damaged), 1, "{}", stderr(&damaged));
}

/// The command lines in a document: what follows `cellway` after a prompt or a backtick.
fn commands(text: &str) -> Vec<Vec<&str>> {
    let lines = text.lines().flat_map(|line| {
        let starts = line.match_indices("cellway ").filter(|(at, _)| {
            let before = &line[..*at];
            before.ends_with('`') || before.trim_start() == "$ "
        });
        starts.map(|(at, name)| {
            let rest = &line[at + name.len()..];
            &rest[..rest.find(['`', '#', '|', '>', ';', '\\']).unwrap_or(rest.len())]
        })
    });
    lines
        .map(|rest| rest.split_whitespace().map(|word| word.trim_end_matches([',', '.', ':'])).collect())
        .collect()
}

/// Every command that the documents name is there, with the flags that they give it.
#[test]
fn the_documents_name_what_there_is() {
    let mut helps: BTreeMap<Vec<&str>, String> = BTreeMap::new();
    let texts: Vec<_> =
        ["README", "docs/guide", "docs/operations", "docs/security", "docs/protocol", "docs/performance"]
            .map(|page| {
                let path = format!("{}/../{page}.md", env!("CARGO_MANIFEST_DIR"));
                (page, std::fs::read_to_string(path).unwrap())
            })
            .into();
    let mut flags = 0;
    for (page, text) in &texts {
        for command in commands(text) {
            let mut path = Vec::new();
            for word in &command {
                let text = helps.entry(path.clone()).or_insert_with(|| help_of(&path));
                let listed = text
                    .lines()
                    .any(|line| line.split_whitespace().next() == Some(*word) && line.starts_with("  "));
                if word.starts_with('-') || !listed {
                    break;
                }
                path.push(*word);
            }
            assert!(!path.is_empty() || command.is_empty(), "{page}: `cellway {}`", command.join(" "));
            let text = helps.entry(path.clone()).or_insert_with(|| help_of(&path));
            for word in command.iter().filter(|word| word.starts_with("--") && word.len() > 2) {
                let flag = word.split('=').next().unwrap();
                let there =
                    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-')).any(|word| word == flag);
                assert!(there, "{page}: `cellway {}` has no {flag}", command.join(" "));
                flags += 1;
            }
        }
    }
    assert!(flags > 20, "only {flags} flags were found: are the documents where they were?");
}

fn help_of(path: &[&str]) -> String {
    let output = cellway(&path.iter().copied().chain(["--help"]).collect::<Vec<_>>());
    assert_eq!(code(&output), 0, "{path:?}: {}", stderr(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A hub of this program, for as long as the value lives.
struct Hub(std::process::Child);

impl Drop for Hub {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Hub {
    async fn start(data: &std::path::Path) -> Self {
        Self::start_with(data, &[]).await
    }

    /// The same with these flags besides.
    async fn start_with(data: &std::path::Path, flags: &[&str]) -> Self {
        let log =
            std::fs::File::options().create(true).append(true).open(data.with_extension("log")).unwrap();
        let hub = Self(
            Command::new(env!("CARGO_BIN_EXE_cellway"))
                .args([
                    "hub",
                    "--bind-address=127.0.0.1",
                    "--api-port=0",
                    "--agent-port=0",
                    "--connect-port=0",
                ])
                .args(["--health-port=0", "--admin-port=0", "--data-dir"])
                .arg(data)
                .args(flags)
                .stdin(std::process::Stdio::null())
                .stdout(log.try_clone().unwrap())
                .stderr(log)
                .spawn()
                .unwrap(),
        );
        let ready = || data.join("hub.json").exists();
        test_support::wait_for(ready, std::time::Duration::from_secs(120), "the hub").await.unwrap();
        hub
    }
}

/// Whatever the folder was before, and whether the hub runs or not.
#[tokio::test]
async fn a_demo_never_takes_the_place_of_a_hub() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let mark = data.join("cellway-demo");
    std::fs::create_dir(&data).unwrap();
    std::fs::write(&mark, "").unwrap();
    let demo = || {
        let output = cellway(&["up", "--demo", "--once", "--data-dir", data.to_str().unwrap()]);
        assert_eq!(code(&output), 2, "{}", stderr(&output));
        stderr(&output)
    };
    // A demo that runs is not disturbed, either.
    let running = std::fs::File::open(&mark).unwrap();
    running.lock().unwrap();
    let refused = cellway(&["hub", "--data-dir", data.to_str().unwrap()]);
    assert_eq!(code(&refused), 2, "{}", stderr(&refused));
    assert!(stderr(&refused).contains("a demo is running"), "{}", stderr(&refused));
    drop(running);

    let hub = Hub::start(&data).await;
    let store = |data: &std::path::Path| {
        std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(data.join("store.db")).unwrap())
    };
    let before = store(&data);
    assert!(!mark.exists(), "the folder is the hub's from now on");
    assert!(demo().contains("not a demo's"));
    // As a hub of an earlier version leaves it.
    std::fs::write(&mark, "").unwrap();
    assert!(demo().contains("a hub is running"));
    drop(hub);
    std::fs::remove_file(&mark).unwrap();
    assert!(demo().contains("not a demo's"));
    assert_eq!(store(&data), before);
}

/// An agent of `member` in this process, whose kube-apiserver is where `flags` say; it ends with the handle.
async fn agent(
    data: &std::path::Path,
    member: &str,
    flags: &[&str],
) -> tokio_util::task::AbortOnDropHandle<()> {
    let added = cellway(&["cluster", "add", member, "-o", "json", "--data-dir", data.to_str().unwrap()]);
    assert_eq!(code(&added), 0, "{}", stderr(&added));
    let added: serde_json::Value = serde_json::from_slice(&added.stdout).unwrap();
    let text = |key: &str| added[key].as_str().unwrap();
    let own = data.with_extension(member);
    let flags = [
        "proxy-agent",
        &format!("--cluster-name={member}"),
        &format!("--server={}", text("hub")),
        &format!("--enrolment-token={}", text("token")),
        &format!("--ca-hash={}", text("caHash")),
        &format!("--data-dir={}", own.display()),
        "--transport=h2",
        "--health-server-host=127.0.0.1",
        "--health-server-port=0",
        "--admin-server-port=0",
    ]
    .into_iter()
    .chain(flags.iter().copied())
    .map(str::to_owned)
    .collect::<Vec<_>>();
    let parsed = service::flags::try_parse::<proxy_agent::Args>(flags).unwrap();
    let config = proxy_agent::Config::try_from(parsed.args).unwrap();
    let bound = proxy_agent::App::new(config).effective(parsed.effective).bind().await.unwrap();
    tokio_util::task::AbortOnDropHandle::new(tokio::spawn(async move {
        let (_signal, watch) = service::drain::channel();
        bound.run(watch).await.unwrap();
    }))
}

/// The five ways in which a member's API is not reached, each with its own status and word: all of them happen here, none is
/// played.
#[tokio::test(flavor = "multi_thread")]
async fn the_five_errors_differ_at_a_members_api() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let _hub = Hub::start(&data).await;
    let admin = std::fs::read_to_string(data.join("admin.kubeconfig")).unwrap();
    let kubeconfig = kube::config::Kubeconfig::from_yaml(&admin).unwrap();
    // A 503 is what is asked for.
    let client = test_support::api::client_without_retries(kubeconfig).await.unwrap();
    let ask = async |member: &str| {
        let request = http::Request::get(format!("/clusters/{member}/api"));
        let answer = client.send(request.body(kube::client::Body::empty()).unwrap()).await.unwrap();
        let word = answer.headers().get("cellway-error").map(|word| word.to_str().unwrap().to_owned());
        let code = answer.status().as_u16();
        let body = answer.into_body().collect_bytes().await.unwrap();
        let status: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
        assert_eq!((&status["kind"], &status["code"]), (&"Status".into(), &code.into()), "{status}");
        (code, word.unwrap_or_default())
    };
    // A kube-apiserver that refuses connections, and one that takes them and says nothing.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let leads_to = |name: &str, at: std::net::SocketAddr| {
        let mut kubeconfig: serde_yaml_ng::Value = serde_yaml_ng::from_str(&admin).unwrap();
        kubeconfig["clusters"][0]["cluster"]["server"] = format!("https://{at}").into();
        let path = folder.path().join(name);
        std::fs::write(&path, serde_yaml_ng::to_string(&kubeconfig).unwrap()).unwrap();
        format!("--kubeconfig={}", path.display())
    };
    let refused = leads_to("refused", "127.0.0.1:1".parse().unwrap());
    let timed_out = leads_to("timed-out", silent.local_addr().unwrap());
    let _agents = [
        agent(&data, "refused", &[&refused]).await,
        agent(&data, "timed-out", &[&timed_out]).await,
        agent(&data, "forbidden", &["--gateway=off"]).await,
    ];
    let at = |args: &[&str]| cellway(&[args, &["--data-dir", data.to_str().unwrap()]].concat());
    let added = at(&["cluster", "add", "alone"]);
    assert_eq!(code(&added), 0, "{}", stderr(&added));
    // A member with nothing is not one that is not there.
    for list in ["tunnels", "connections"] {
        for (member, expected) in [("alone", 0), ("nobody", 3)] {
            let listed = at(&[list, member, "-o", "json"]);
            assert_eq!(code(&listed), expected, "{list} {member}: {}", stderr(&listed));
            assert_eq!(listed.stdout.is_empty(), expected != 0, "{list} {member}");
        }
    }
    for (member, expected) in [
        ("nobody", (404, "unknown-cluster")),
        ("alone", (503, "no-tunnel")),
        ("refused", (502, "refused")),
        ("timed-out", (504, "timed-out")),
        ("forbidden", (403, "not-allowed")),
    ] {
        let settled = async || match ask(member).await {
            (404, _) if member != "nobody" => Err("not known yet"),
            (503, _) if member != "alone" => Err("no tunnel yet"),
            answer => Ok(answer),
        };
        let limit = std::time::Duration::from_secs(60);
        let (code, word) = test_support::wait_until(settled, limit, member).await.unwrap();
        assert_eq!((code, word.as_str()), expected, "{member}");
    }
    // Several answers are one document; the tunnel is well and the API is not.
    for format in ["json", "yaml"] {
        let pinged = at(&["ping", "refused", "-c", "2", "-o", format]);
        assert_eq!(code(&pinged), 4, "{}", stderr(&pinged));
        let parsed: serde_json::Value = serde_yaml_ng::from_slice(&pinged.stdout).unwrap();
        if format == "json" {
            assert_eq!(parsed, serde_json::from_slice::<serde_json::Value>(&pinged.stdout).unwrap());
        }
        assert_eq!(parsed["items"].as_array().unwrap().len(), 2, "{parsed}");
        let alone = at(&["ping", "refused", "-o", format]);
        let parsed: serde_json::Value = serde_yaml_ng::from_slice(&alone.stdout).unwrap();
        assert_eq!(parsed["cluster"], "refused", "{parsed}");
    }
}

/// What `up` has started when it is told to stop ends with it, at once when it is told twice.
#[tokio::test]
async fn up_tells_how_it_ended() {
    use rustix::process::{Signal, kill_process};
    let limit = std::time::Duration::from_secs(60);
    for (twice, expected) in [(false, 0), (true, 5)] {
        let folder = test_support::TestDir::new("up").unwrap();
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_cellway"));
        command.args(["up", "--demo", "--data-dir"]).arg(folder.join("data"));
        let mut up = test_support::process::Process::spawn("up", command, &folder.join("up.log")).unwrap();
        let pid = up.pid().unwrap();
        let hub = async || child(pid, "hub");
        let hub = test_support::wait_until(hub, limit, "the hub's process").await.unwrap();
        if twice {
            // It does not hear the farewell.
            kill_process(hub, Signal::STOP).unwrap();
        }
        up.interrupt().unwrap();
        up.wait_for_line("starting the hub", limit).await.unwrap();
        if twice {
            up.interrupt().unwrap();
        }
        assert_eq!(up.wait(limit).await.unwrap().code(), Some(expected), "{}", up.tail(20));
        assert!(rustix::process::test_kill_process(hub).is_err(), "its hub has ended as well");
    }
}

/// What a process has started and what has this word on its command line.
fn child(of: u32, word: &str) -> Result<rustix::process::Pid, String> {
    // Of whichever of the runtime's threads.
    let tasks = std::fs::read_dir(format!("/proc/{of}/task")).into_iter().flatten().flatten();
    let lists = tasks.flat_map(|task| std::fs::read_to_string(task.path().join("children")));
    let pids: Vec<i32> = lists
        .flat_map(|text| text.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>())
        .collect();
    // Until it runs its own program it has the command line of the one that starts it.
    let named = |pid: &i32| {
        let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split('\0').any(|argument| argument == word)
    };
    let found = pids.iter().copied().find(named).and_then(rustix::process::Pid::from_raw);
    found.ok_or_else(|| format!("no {word} among the children {pids:?}"))
}

/// In a network of its own: without --demo it takes ports that another hub on this machine may have.
#[tokio::test]
async fn up_runs_a_hub_until_it_is_told_to_stop() {
    test_support::require!(test_support::netns::Star::possible());
    let limit = std::time::Duration::from_secs(60);
    let namespace = test_support::netns::Namespace::new("up").unwrap();
    let folder = test_support::TestDir::new("up").unwrap();
    let data = folder.join("data");
    let program = env!("CARGO_BIN_EXE_cellway");
    let mut command = namespace.command(program);
    command.args(["up", "--data-dir"]).arg(&data);
    let mut up = test_support::process::Process::spawn("up", command, &folder.join("up.log")).unwrap();
    up.wait_for_line("The hub is up. Add a member:", limit).await.unwrap();
    up.wait_for_line("running; SIGINT or SIGTERM ends it", limit).await.unwrap();
    let hub = child(up.pid().unwrap(), "hub").unwrap();
    // It does what it says.
    let hint = format!("cluster add NAME --data-dir {}", data.canonicalize().unwrap().display());
    up.wait_for_line(&hint, limit).await.unwrap();
    let mut command = namespace.command(program);
    command.args(["cluster", "add", "east", "--data-dir"]).arg(&data).kill_on_drop(true);
    let added = tokio::time::timeout(limit, command.output()).await.unwrap().unwrap();
    assert_eq!(code(&added), 0, "{}", stderr(&added));
    up.interrupt().unwrap();
    // A hub that had not gone by itself would be killed after ten seconds, and nothing else would tell.
    let soon = std::time::Duration::from_secs(9);
    assert_eq!(up.wait(soon).await.unwrap().code(), Some(0), "{}", up.tail(20));
    up.wait_for_line("every process has ended", limit).await.unwrap();
    assert!(rustix::process::test_kill_process(hub).is_err(), "its hub has ended as well");
}

#[tokio::test]
async fn a_demo_whose_hub_is_killed_fails_and_says_why() {
    let limit = std::time::Duration::from_secs(60);
    let folder = test_support::TestDir::new("up").unwrap();
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_cellway"));
    command.args(["up", "--demo", "--once", "--data-dir"]).arg(folder.join("data"));
    let mut up = test_support::process::Process::spawn("up", command, &folder.join("up.log")).unwrap();
    let pid = up.pid().unwrap();
    // In the middle: both members have been started, and it waits until they answer.
    let all = async || Ok::<_, String>([child(pid, "hub")?, child(pid, "west")?, child(pid, "east")?]);
    let all = test_support::wait_until(all, limit, "the hub and two members").await.unwrap();
    rustix::process::kill_process(all[0], rustix::process::Signal::KILL).unwrap();
    assert_eq!(up.wait(limit).await.unwrap().code(), Some(1), "{}", up.tail(40));
    for said in ["error: cannot keep hub running: it ended (signal: 9 (SIGKILL))", "the logs are in "] {
        up.wait_for_line(said, limit).await.unwrap();
    }
    for process in all {
        assert!(rustix::process::test_kill_process(process).is_err(), "the others have ended as well");
    }
}

/// Deletes a cluster's object, not before `when`; gives the time of which the hub's record of it is.
async fn remove(data: &std::path::Path, cluster: &str, when: jiff::Timestamp) -> String {
    use k8s_openapi::api::core::v1::Secret;
    let kubeconfig = kube::config::Kubeconfig::read_from(data.join("admin.kubeconfig")).unwrap();
    let client = test_support::api::client(kubeconfig).await.unwrap();
    let secrets: kube::Api<Secret> = kube::Api::namespaced(client.clone(), "cellway-system");
    let clusters: kube::Api<federation_core::api::KubeFedCluster> =
        kube::Api::namespaced(client, "kube-federation-system");
    let name = format!("revocations-{cluster}");
    let recorded = async {
        let mut tick = tokio::time::interval(std::time::Duration::from_millis(50));
        while jiff::Timestamp::now() < when {
            tick.tick().await;
        }
        clusters.delete(cluster, &kube::api::DeleteParams::default()).await.unwrap();
        loop {
            tick.tick().await;
            if let Some(record) = secrets.get_opt(&name).await.unwrap() {
                return String::from_utf8(record.data.unwrap()["removed-at"].0.clone()).unwrap();
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), recorded).await.expect("a record of the removal")
}

/// A stolen node's certificate must not come back with the hub's data of yesterday.
#[tokio::test]
async fn a_backup_of_before_brings_nothing_revoked_back() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let at = data.to_str().unwrap();
    let run = |arguments: &[&str]| {
        let output = cellway(&[arguments, &["--data-dir", at]].concat());
        assert_eq!(code(&output), 0, "{arguments:?}: {}", stderr(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let revoked = || {
        let clusters: serde_json::Value = serde_json::from_str(&run(&["clusters", "-o", "json"])).unwrap();
        let rows = clusters["items"].as_array().unwrap().iter();
        let of =
            |name: &str, field: &str| rows.clone().find(|row| row["name"] == name).unwrap()[field].clone();
        (of("east", "revokedAt"), of("west", "revokedAgents"), of("north", "revokedAt"))
    };
    let hub = Hub::start(&data).await;
    for cluster in ["east", "west", "north"] {
        run(&["cluster", "add", cluster]);
    }
    let added = jiff::Timestamp::now();
    let copy = folder.path().join("copy");
    let copy = copy.to_str().unwrap();
    run(&["hub", "backup", copy]);
    run(&["cluster", "revoke", "east"]);
    run(&["cluster", "revoke", "west", "--agent", "node-1.example"]);
    let before = revoked();
    assert!(before.0.is_string() && before.1["node-1.example"].is_string(), "{before:?}");
    assert!(before.2.is_null(), "{before:?}");
    // Ten seconds are left to clocks: what is removed sooner is taken for an object that was made since.
    let removed = remove(&data, "north", added + jiff::SignedDuration::from_secs(12)).await;
    drop(hub);
    std::fs::remove_file(data.join("hub.json")).unwrap();

    let text = run(&["hub", "restore", copy]);
    // The three records, each with its entry.
    assert!(text.contains("revocations taken over from there: 6"), "{text}");
    assert!(text.contains("enrolment tokens of the backup are left out"), "{text}");
    let hub = Hub::start(&data).await;
    assert_eq!(
        revoked(),
        (before.0, before.1, removed.into()),
        "and nobody of the removed one is let in either"
    );
    drop(hub);
    std::fs::remove_file(data.join("hub.json")).unwrap();

    // The same backup where nothing was before: nobody knows, and that is said.
    let empty = folder.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let output = cellway(&["hub", "restore", copy, "--data-dir", empty.to_str().unwrap()]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("revocations of after the backup are not known"), "{text}");
}

#[tokio::test]
async fn a_hub_moves_to_a_key_and_keeps_nothing_of_before() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let config = folder.path().join("encryption.yaml");
    let providers = |providers: &str| {
        let text = format!(
            "apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources:\n\
             - resources: [secrets]\n  providers: [{providers}]\n"
        );
        std::fs::write(&config, text).unwrap();
    };
    providers("{identity: {}}");
    let hub = Hub::start_with(&data, &["--encryption-provider-config", config.to_str().unwrap()]).await;
    let at = data.to_str().unwrap();
    let key = format!("{}=", "A".repeat(43));
    providers(&format!("{{aesgcm: {{keys: [{{name: one, secret: {key}}}]}}}}, {{identity: {{}}}}"));
    let rewritten = cellway(&["hub", "encryption", "rewrite", "--data-dir", at]);
    assert_eq!(code(&rewritten), 0, "{}", stderr(&rewritten));
    let text = String::from_utf8_lossy(&rewritten.stdout).into_owned();
    assert!(text.contains("rewritten under the current key; the history is gone"), "{text}");
    let status = cellway(&["hub", "encryption", "status", "--data-dir", at, "-o", "json"]);
    assert_eq!(code(&status), 0, "{}", stderr(&status));
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(status["stale"], 0, "{status}");
    let compacted = cellway(&["hub", "compact", "--data-dir", at, "-o", "json"]);
    assert_eq!(code(&compacted), 0, "{}", stderr(&compacted));
    let compacted: serde_json::Value = serde_json::from_slice(&compacted.stdout).unwrap();
    assert_eq!((&compacted["step"], &compacted["problem"]), (&"finished".into(), &serde_json::Value::Null));
    // What the hub runs with is on its admin page, every flag of it, and what may be secret is not.
    let description: serde_json::Value =
        serde_json::from_slice(&std::fs::read(data.join("hub.json")).unwrap()).unwrap();
    let mut page = std::net::TcpStream::connect(description["addresses"]["admin"].as_str().unwrap()).unwrap();
    std::io::Write::write_all(&mut page, b"GET /config HTTP/1.0\r\n\r\n").unwrap();
    let mut shown = String::new();
    std::io::Read::read_to_string(&mut page, &mut shown).unwrap();
    let shown: serde_json::Value = serde_json::from_str(shown.split_once("\r\n\r\n").unwrap().1).unwrap();
    let flag = |name: &str| {
        let found = shown.as_array().unwrap().iter().find(|flag| flag["name"] == name);
        let found = found.unwrap_or_else(|| panic!("{name} is not in {shown}"));
        (found["value"].as_str().unwrap().to_owned(), found["source"].as_str().unwrap().to_owned())
    };
    assert_eq!(flag("encryption-provider-config"), (config.display().to_string(), "flag".to_owned()));
    assert_eq!(flag("data-dir").1, "flag");
    assert_eq!(flag("event-ttl"), ("1h".to_owned(), "default".to_owned()));
    assert_eq!(flag("adopt"), ("false".to_owned(), "default".to_owned()));
    // A key that is no key: said as it is, and nothing is written.
    std::fs::write(&config, "kind: X").unwrap();
    let refused = cellway(&["hub", "encryption", "rewrite", "--data-dir", at]);
    assert_eq!(code(&refused), 1, "{}", stderr(&refused));
    assert!(stderr(&refused).contains("nothing was rewritten"), "{}", stderr(&refused));
    drop(hub);
}
