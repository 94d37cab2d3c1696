//! How the program `proxy-agent` proves who it is: enrolled at a hub that it reaches through an egress proxy only, and with a
//! service account's token.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use test_support::{NotRun, TestDir, egress::EgressProxy, process::Process, tools, wait_for, wait_until};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    process::Command,
};

/// Programs are built without optimisation and share the machine with other tests.
const LIMIT: Duration = Duration::from_secs(90);
/// `user:p@ss` in base64.
const AUTHORIZATION: &str = "Basic dXNlcjpwQHNz";

/// A command about the hub whose data is in `data`, which must succeed; its result.
async fn cellway(program: &Path, data: &Path, args: &[&str]) -> Result<Value> {
    let mut command = Command::new(program);
    command.args(args).args(["-o", "json", "--data-dir"]).arg(data).env_remove("CELLWAY_KUBECONFIG");
    let output = tokio::time::timeout(LIMIT, command.kill_on_drop(true).output()).await??;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`cellway {}`: {errors}", args.join(" "));
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// A hub that has started, with its data in `data`.
async fn hub(program: &Path, data: &Path) -> Result<Process> {
    let mut command = Command::new(program);
    command.args(["hub", "--bind-address=127.0.0.1", "--data-dir"]).arg(data);
    for port in ["api", "agent", "connect", "health", "admin"] {
        command.arg(format!("--{port}-port=0"));
    }
    let hub = Process::spawn("hub", command, &data.with_extension("log"))?;
    let ready = data.join("hub.json");
    wait_for(|| ready.is_file(), LIMIT, "the hub to be ready").await.with_context(|| hub.tail(40))?;
    Ok(hub)
}

/// A line of the metrics of an agent that has tried to establish a tunnel, without the number.
fn tried(outcome: &str) -> String {
    format!("cellway_agent_connects_total{{outcome=\"{outcome}\"}}")
}

/// The metrics of an agent, once it has counted an attempt that ended so.
async fn metrics(agent: &mut Process, outcome: &str) -> Result<String> {
    let started = agent.wait_for_line("the agent has started", LIMIT).await?;
    let admin = started.split(' ').find_map(|field| field.strip_prefix("admin=")).context("no address")?;
    let request = format!("GET /metrics HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n");
    let page = wait_until(
        || async {
            let mut stream = TcpStream::connect(admin).await?;
            stream.write_all(request.as_bytes()).await?;
            let mut page = String::new();
            stream.read_to_string(&mut page).await?;
            ensure!(page.contains(&tried(outcome)), "{page}");
            anyhow::Ok(page)
        },
        LIMIT,
        "the agent to count it",
    )
    .await?;
    Ok(page)
}

/// The name that the agent is given for the hub exists at the proxy only: there is no other way.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_enrols_and_joins_through_an_egress_proxy() -> Result<()> {
    let programs =
        tools::program("cellway").and_then(|cellway| Ok((cellway, tools::program("proxy-agent")?)));
    let (program, agent_program) = match programs {
        Ok(programs) => programs,
        Err(reason) => {
            test_support::not_run(&reason);
            return NotRun::not_run();
        }
    };
    let dir = TestDir::new("egress")?;
    let data = dir.join("hub");
    let _hub = hub(&program, &data).await?;
    let added = cellway(&program, &data, &["cluster", "add", "east"]).await?;
    let field = |name: &str| added[name].as_str().map(str::to_owned).context("not printed");
    let (token, hash, address) = (field("token")?, field("caHash")?, field("hub")?);
    let (_, port) = address.rsplit_once(':').context("no port")?;
    let proxy = EgressProxy::start(format!("127.0.0.1:{port}").parse()?, AUTHORIZATION).await?;
    let target = format!("hub.invalid:{port}");
    let start = |name: &str, password: &str| {
        let mut command = Command::new(&agent_program);
        command
            .arg("--cluster-name=east")
            .arg(format!("--server={target}"))
            .arg("--server-name=localhost")
            .arg(format!("--egress-proxy=http://user:{password}@{}", proxy.address()))
            .arg(format!("--ca-hash={hash}"))
            .arg(format!("--data-dir={}", dir.join("agent").display()))
            .args(["--agent-id=east-1", "--gateway=off", "--health-server-host=127.0.0.1"])
            .args(["--health-server-port=0", "--admin-server-port=0"])
            .env("CELLWAY_ENROLMENT_TOKEN", &token);
        Process::spawn(name, command, &dir.join(format!("{name}.log")))
    };

    // The proxy's refusal is told as such, and costs no token.
    let mut stranger = start("stranger", "mistaken-one")?;
    stranger.wait_for_line("407 Proxy Authentication Required", LIMIT).await?;
    stranger.kill().await?;
    let asked = proxy.asked();
    ensure!(asked.iter().all(|asked| *asked == (target.clone(), false)), "{asked:?}");

    let agent = start("agent", "p%40ss")?;
    let tunnels = wait_until(
        || async {
            let listed = cellway(&program, &data, &["tunnels", "east"]).await?;
            let rows = listed["items"].as_array().cloned().unwrap_or_default();
            ensure!(!rows.is_empty(), "no tunnel yet");
            Ok(rows)
        },
        LIMIT,
        "the agent's tunnel",
    )
    .await
    .with_context(|| agent.tail(30))?;
    // A proxy carries HTTP/2 only, and nobody had to say so.
    ensure!(tunnels.iter().all(|row| row["agentId"] == "east-1" && row["carrier"] == "h2"), "{tunnels:?}");
    let granted = proxy.asked().into_iter().filter(|(to, granted)| *granted && *to == target).count();
    ensure!(granted >= 2, "the enrolment and the tunnel: {:?}", proxy.asked());
    for process in [&stranger, &agent] {
        let log = process.lines().join("\n");
        let secrets = ["p@ss", "p%40ss", "mistaken-one", "dXNlcjpwQHNz", token.as_str()];
        for secret in secrets {
            ensure!(!log.contains(secret), "{secret:?} is in the log: {log}");
        }
    }
    Ok(())
}

/// As Kubernetes' own konnectivity add-on is set up. The API that knows the account is a hub's here.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_joins_with_a_service_accounts_token() -> Result<()> {
    let program = |name: &str| tools::program(name);
    let programs = program("cellway").and_then(|cellway| {
        Ok((cellway, program("proxy-server")?, program("proxy-agent")?, tools::kubectl()?))
    });
    let (cellway, server_program, agent_program, kubectl) = match programs {
        Ok(programs) => programs,
        Err(reason) => {
            test_support::not_run(&reason);
            return NotRun::not_run();
        }
    };
    let dir = TestDir::new("token")?;
    let data = dir.join("hub");
    let mut api = hub(&cellway, &data).await?;
    let kubeconfig = data.join("admin.kubeconfig");
    let kubectl = async |args: &[&str]| -> Result<String> {
        let mut command = Command::new(&kubectl);
        command.arg("--kubeconfig").arg(&kubeconfig).args(args).env("HOME", dir.path());
        let output = tokio::time::timeout(LIMIT, command.kill_on_drop(true).output()).await??;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "`kubectl {}`: {errors}", args.join(" "));
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    };
    kubectl(&["create", "namespace", "konnectivity"]).await?;
    kubectl(&["create", "serviceaccount", "agent", "-n", "konnectivity"]).await?;
    let token = async |audience: &str| {
        kubectl(&["create", "token", "agent", "-n", "konnectivity", "--audience", audience]).await
    };
    let (good, other, late) = (token("tunnels").await?, token("others").await?, token("tunnels").await?);
    ensure!(good != late, "what is said of one is known of the other");

    let authority = tls::CertificateAuthority::create("test servers' CA")?;
    let certificate = authority.issue_server(&["127.0.0.1".to_owned()], Duration::from_secs(86_400))?;
    std::fs::write(dir.join("ca.crt"), authority.certificate_pem())?;
    std::fs::write(dir.join("server.crt"), &certificate.certificate_pem)?;
    std::fs::write(dir.join("server.key"), &certificate.key_pem)?;
    let ready = dir.join("ready.json");
    let file = |flag: &str, path: &Path| format!("--{flag}={}", path.display());
    let mut command = Command::new(server_program);
    command
        .args([
            "--mode=http-connect",
            "--server-port=0",
            "--agent-port=0",
            "--health-port=0",
            "--admin-port=0",
        ])
        .args(["--agent-bind-address=127.0.0.1", "--health-bind-address=127.0.0.1"])
        .args(["--agent-namespace=konnectivity", "--agent-service-account=agent"])
        .arg("--authentication-audience=tunnels")
        .arg(file("kubeconfig", &kubeconfig))
        .arg(file("cluster-cert", &dir.join("server.crt")))
        .arg(file("cluster-key", &dir.join("server.key")))
        .arg(file("uds-name", &dir.join("connect.sock")))
        .arg(file("ready-file", &ready));
    let mut server = Process::spawn("proxy-server", command, &dir.join("server.log"))?;
    wait_for(|| ready.is_file(), LIMIT, "the server to be ready").await.with_context(|| server.tail(30))?;
    let addresses: Value = wait_until(
        || async { anyhow::Ok(serde_json::from_slice(&std::fs::read(&ready)?)?) },
        LIMIT,
        "the server's addresses",
    )
    .await?;
    let (_, port) =
        addresses["agents"].as_str().and_then(|address| address.rsplit_once(':')).context("no address")?;

    let token_file = |name: &str| dir.join(format!("{name}.token"));
    let start = |name: &str| {
        let mut command = Command::new(&agent_program);
        command
            .arg("--proxy-server-host=127.0.0.1")
            .arg(format!("--proxy-server-port={port}"))
            .arg(file("ca-cert", &dir.join("ca.crt")))
            .arg(file("service-account-token-path", &token_file(name)))
            .arg(format!("--agent-id={name}"))
            .args(["--sync-interval=100ms", "--health-server-host=127.0.0.1"])
            .args(["--health-server-port=0", "--admin-server-port=0"]);
        Process::spawn(name, command, &dir.join(format!("{name}.log")))
    };
    let established =
        |process: &Process| process.lines().iter().any(|line| line.contains("tunnel established"));
    // It is turned away, and told why. It never thought that it had a tunnel, and so never said that it is ready.
    std::fs::write(token_file("agent"), &other)?;
    let mut agent = start("agent")?;
    agent.wait_for_line("for another audience", LIMIT).await?;
    server.wait_for_line("bad-token", LIMIT).await?;
    ensure!(!established(&server) && !established(&agent), "a token for another audience was taken");
    let counted = metrics(&mut agent, "refused").await?;
    ensure!(!counted.contains(&tried("connected")), "{counted}");
    // The file is read again for each tunnel.
    std::fs::write(token_file("agent"), &good)?;
    server.wait_for_line("tunnel established", LIMIT).await.with_context(|| agent.tail(30))?;
    metrics(&mut agent, "connected").await?;

    // When nobody can be asked it is not ready either; it is told to try again.
    api.kill().await?;
    std::fs::write(token_file("late"), &late)?;
    let mut waiting = start("late")?;
    waiting.wait_for_line("does not answer: try again", LIMIT).await?;
    server.wait_for_line("token-unchecked", LIMIT).await?;
    let counted = metrics(&mut waiting, "failed").await?;
    ensure!(!counted.contains(&tried("refused")) && !counted.contains(&tried("connected")), "{counted}");
    ensure!(!established(&waiting), "a token was taken that nobody has looked at");
    for process in [&server, &agent, &waiting] {
        let log = process.lines().join("\n");
        let told = [&good, &other, &late].into_iter().any(|token| log.contains(token.as_str()));
        ensure!(!told, "a token is in the log: {log}");
    }
    Ok(())
}
