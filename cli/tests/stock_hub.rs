//! A hub on a stock kube-apiserver: `cellway hub --kubeconfig`, with the rights that the documentation gives and nothing
//! else done by hand. Joins when `KUBEBUILDER_ASSETS` names a folder with `kube-apiserver` and `etcd`.

mod common;
#[path = "common/stock.rs"]
mod stock;

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use http::Method;
use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::{Value, json};
use test_support::api::{ask, client_without_retries, code, create, get, merge};
use test_support::process::Process;
use test_support::{TestDir, require, tools, wait_until};
use tls::{ClientTls, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::process::Command;

use self::common::LIMIT;
use self::stock::Stock;

/// Of the webhook's certificate, which is renewed at a third of it.
const TTL: Duration = Duration::from_secs(15);
const CLUSTERS: &str = "/apis/core.kubefed.io/v1beta1/namespaces/kube-federation-system/kubefedclusters";
/// Converted: `v1beta2` is what is stored.
const OLD: &str = "/apis/types.kubefed.io/v1beta1/namespaces/shop/federatedconfigmaps";
const NEW: &str = "/apis/types.kubefed.io/v1beta2/namespaces/shop/federatedconfigmaps";
const DEFINITION: &str =
    "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/federatedconfigmaps.types.kubefed.io";

/// Connections that say nothing: more than either of the hub's ports has places for.
const SILENT: usize = 4_500;
/// A slow head or handshake is not waited for longer than this.
const PATIENCE: Duration = Duration::from_secs(75);

/// Everything ends on drop, the servers last.
struct World {
    hub: Option<Process>,
    member: Option<Process>,
    /// `system:masters` at the stock server.
    root: Client,
    stock: Stock,
    dir: TestDir,
}

#[test]
fn flags_of_our_own_api_server_are_refused() {
    for (flag, value) in [
        ("--store", "sqlite:///tmp/x"),
        ("--token-auth-file", "x"),
        ("--encryption-provider-config", "x"),
        ("--oidc-issuer-url", "https://x"),
        ("--event-ttl", "1m"),
        ("--min-request-timeout", "60"),
        ("--http2-max-streams-per-connection", "100"),
    ] {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_cellway"));
        let output = command.args(["hub", "--kubeconfig", "x", flag, value]).output().expect("it runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(
            said.contains("--kubeconfig") && said.contains(flag) && said.contains("cannot be used"),
            "{said}"
        );
    }
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_cellway"));
    let output = command.args(["hub", "--webhook-port", "1"]).output().expect("it runs");
    assert!(String::from_utf8_lossy(&output.stderr).contains("--kubeconfig"), "{output:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hub_on_a_stock_server() -> Result<()> {
    let assets = require!(tools::kubebuilder_assets());
    let kubectl = require!(tools::kubectl());
    require!(tools::descriptors(2 * SILENT as u64 + 2_000));
    let mut world = World::start(&assets).await?;
    without_rights(&mut world).await?;
    world.stock.grant(&kubectl).await?;
    let shop = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}});
    create(&world.root, "/api/v1/namespaces", &shop).await?;

    world.start_hub().await?;
    world.join("east").await?;
    the_commands(&world).await?;
    placed(&world).await?;
    callers(&world).await?;
    offenders(&world).await?;
    renewed(&world).await?;
    registered_again(&mut world).await?;
    let said = world.cellway(&["cluster", "revoke", "east"]).await?;
    ensure!(said.contains("east"), "{said}");
    world
        .until("the tunnel to end", async || {
            let tunnels = world.items(&["tunnels"]).await?;
            ensure!(tunnels.is_empty(), "{tunnels:?}");
            Ok(())
        })
        .await
}

/// A hub that may nothing says what to do.
async fn without_rights(world: &mut World) -> Result<()> {
    let output = tokio::time::timeout(LIMIT, world.hub_command().output()).await??;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && said.contains("docs/stock-hub.yaml"), "{said}");
    Ok(())
}

/// The command line finds objects in the one API and everything else in the other.
async fn the_commands(world: &World) -> Result<()> {
    let clusters = world.items(&["clusters"]).await?;
    ensure!(clusters.iter().any(|one| one["name"] == "east"), "{clusters:?}");
    let tunnels = world.items(&["tunnels"]).await?;
    ensure!(tunnels.len() == 1 && tunnels[0]["cluster"] == "east", "{tunnels:?}");
    let ping: Value = serde_json::from_str(&world.cellway(&["ping", "east", "-o", "json"]).await?)?;
    ensure!(ping["api"]["ok"] == true, "{ping}");
    // The certificate is taken; the destination is the hub's to refuse.
    let output = world.run(&["dial", "east", "192.0.2.1:1"]).await?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && said.contains("allowed"), "{said}");
    for without_a_store in
        [&["hub", "compact"][..], &["hub", "encryption", "status"], &["hub", "encryption", "rewrite"]]
    {
        let output = world.run(without_a_store).await?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success() && said.contains("somebody else"), "{said}");
    }
    let output = tokio::time::timeout(LIMIT, world.hub_command().output()).await??;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && said.contains("another hub runs in"), "{said}");
    let metrics = world.metrics().await?;
    for certificate in ["agents", "serving", "ca", "webhook"] {
        let series =
            format!("cellway_server_certificate_expiry_timestamp_seconds{{certificate=\"{certificate}\"}} ");
        ensure!(metrics.contains(&series), "{series} is not in\n{metrics}");
    }
    // Through the hub's port to the member's API.
    let text = world.cellway(&["kubeconfig", "east"]).await?;
    let member = client_without_retries(Kubeconfig::from_yaml(&text)?).await?;
    get(&member, "/api/v1/nodes").await.map(drop)
}

/// KubeFed's form is applied, converted and placed.
async fn placed(world: &World) -> Result<()> {
    let hub = world.admin().await?;
    // As in KubeFed, nothing goes where its namespace does not.
    let namespace = json!({"apiVersion": "types.kubefed.io/v1beta1", "kind": "FederatedNamespace",
        "metadata": {"name": "shop", "namespace": "shop"}, "spec": {"placement": {"clusters": [{"name": "east"}]}}});
    create(&hub, &OLD.replace("configmaps", "namespaces"), &namespace).await?;
    let object = json!({"apiVersion": "types.kubefed.io/v1beta1", "kind": "FederatedConfigMap",
        "metadata": {"name": "settings", "namespace": "shop"},
        "spec": {"template": {"data": {"colour": "blue", "flags.json": "[{\"a\":[1,2,3]},{},{},".repeat(1000)}},
            "placement": {"clusters": [{"name": "east"}]}}});
    create(&hub, OLD, &object).await?;
    let stored = get(&hub, &format!("{NEW}/settings")).await?;
    ensure!(stored["spec"]["placement"]["units"] == json!([{"name": "east"}]), "{stored}");
    let east = client_without_retries(common::administrator(&world.dir.join("east")).await?).await?;
    let arrived = world
        .until("the config map to arrive", async || {
            get(&east, "/api/v1/namespaces/shop/configmaps/settings").await
        })
        .await?;
    ensure!(arrived["data"]["colour"] == "blue", "{arrived}");
    world
        .until("KubeFed's status", async || {
            let object = get(&hub, &format!("{OLD}/settings")).await?;
            let clusters = &object["status"]["clusters"];
            ensure!(clusters[0]["name"] == "east", "{}", object["status"]);
            Ok(())
        })
        .await
}

/// Whom the stock server knows, the hub's own paths know; what they may, it says.
async fn callers(world: &World) -> Result<()> {
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "viewer"}});
    let accounts = "/api/v1/namespaces/default/serviceaccounts";
    create(&world.root, accounts, &account).await?;
    let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}});
    let answer = create(&world.root, &format!("{accounts}/viewer/token"), &request).await?;
    let token = answer["status"]["token"].as_str().context("no token")?;
    let viewer = world.at_port(json!({"token": token})).await?;
    ensure!(code(get(&viewer, "/cellway/v1/tunnels").await) == 403);
    ensure!(code(get(&viewer, "/clusters/east/api/v1/nodes").await) == 403);
    ensure!(
        code(get(&world.at_port(json!({"token": "made-up"})).await?, "/cellway/v1/tunnels").await) == 401
    );
    ensure!(code(get(&world.at_port(json!({})).await?, "/api/v1/namespaces").await) == 401);

    let role = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
        "metadata": {"name": "fleet-viewer"},
        "rules": [{"nonResourceURLs": ["/cellway/v1/*", "/clusters/east/*"], "verbs": ["get"]}]});
    let binding = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
        "metadata": {"name": "fleet-viewer"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "fleet-viewer"},
        "subjects": [{"kind": "ServiceAccount", "name": "viewer", "namespace": "default"}]});
    for (kind, object) in [("clusterroles", role), ("clusterrolebindings", binding)] {
        create(&world.root, &format!("/apis/rbac.authorization.k8s.io/v1/{kind}"), &object).await?;
    }
    // The refusal is remembered for ten seconds.
    world.until("the right to be seen", async || get(&viewer, "/cellway/v1/tunnels").await).await?;
    // As far as the member, where an account of the hub's is not the member's own of that name.
    let refused = world
        .until("the member to be asked", async || {
            let Err(error) = get(&viewer, "/clusters/east/api/v1/nodes").await else {
                anyhow::bail!("it is allowed")
            };
            let said = format!("{error:#}");
            ensure!(said.contains("nodes is forbidden"), "{said}");
            Ok(said)
        })
        .await?;
    ensure!(refused.contains("cellway:hub:serviceaccount:default:viewer"), "{refused}");
    ensure!(code(get(&viewer, "/clusters/west/api/v1/nodes").await) == 403);
    let revoke = "/cellway/v1/clusters/east/revoke";
    ensure!(code(ask(&viewer, Method::POST, revoke, "application/json", &Value::Null).await) == 403);
    let kept = common::administrator(&world.data()).await?;
    let options = KubeConfigOptions { context: Some("cellway:hub".to_owned()), ..Default::default() };
    let admin = Client::try_from(kube::Config::from_custom_kubeconfig(kept, &options).await?)?;
    let said = match get(&admin, "/api/v1/namespaces").await {
        Err(error) => format!("{error:#}"),
        Ok(found) => anyhow::bail!("{found}"),
    };
    ensure!(said.contains("the hub's objects are in the Kubernetes API at https://"), "{said}");
    Ok(())
}

/// Bad input at the two ports that such a hub has of its own: an end for whoever sends it, and nothing for others.
async fn offenders(world: &World) -> Result<()> {
    let hub = world.admin().await?;
    let serves = async |beside: &str| {
        let object = format!("{OLD}/settings");
        let answered = tokio::time::timeout(LIMIT, get(&hub, &object)).await;
        answered.context("no answer").flatten().with_context(|| format!("a conversion beside {beside}"))?;
        world.cellway(&["ping", "east"]).await.with_context(|| format!("a ping beside {beside}"))
    };
    let memory = world.hub.as_ref().context("no hub")?.resident_kib()?;
    let mut held = Vec::new();
    for port in ["api", "webhook"] {
        let address = world.address(port)?;
        // No TLS; TLS and no HTTP; a head that never ends; one that never goes on.
        let noise: Vec<u8> = (0..60_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let mut endless = b"GET / HTTP/1.1\r\n".to_vec();
        (0..40_000).for_each(|line| endless.extend_from_slice(format!("x-{line}: {line}\r\n").as_bytes()));
        for (what, secured, bytes) in [
            ("noise", false, noise.as_slice()),
            ("noise within TLS", true, noise.as_slice()),
            ("an endless head", true, endless.as_slice()),
            ("a slow head", true, b"GET / HTT"),
        ] {
            let tcp = tokio::net::TcpStream::connect(&address).await?;
            let ended = async {
                if secured {
                    until_ended(world.secured(tcp).await?, bytes).await
                } else {
                    until_ended(tcp, bytes).await
                }
            };
            let ended = tokio::time::timeout(PATIENCE, ended).await;
            ended.with_context(|| format!("{what} at the port {port}: its connection is kept"))??;
        }
        serves(&format!("bad input at the port {port}")).await?;
        for _ in 0..SILENT {
            held.push(tokio::net::TcpStream::connect(&address).await?);
        }
        serves(&format!("silent connections at the port {port}")).await?;
    }
    let grown = world.hub.as_ref().context("no hub")?.resident_kib()?.saturating_sub(memory);
    ensure!(grown < 256 * 1024, "the hub grew by {grown} KiB");
    Ok(())
}

/// Writes, and reads until the other side ends it. Errors are ends too.
async fn until_ended<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, bytes: &[u8]) -> Result<()> {
    let _ = stream.write_all(bytes).await;
    let mut buffer = [0; 4096];
    let mut read = 0;
    while let Ok(count) = stream.read(&mut buffer).await {
        read += count;
        ensure!(read < 1 << 20, "it is answered without end");
        if count == 0 {
            break;
        }
    }
    Ok(())
}

/// The webhook's certificate changes under running requests, none of which fails.
async fn renewed(world: &World) -> Result<()> {
    let hub = world.admin().await?;
    let began = Instant::now();
    let mut seen = vec![world.webhook_certificate().await?];
    let mut conversions = 0_u32;
    while seen.len() < 4 || began.elapsed() < TTL + TTL / 3 {
        ensure!(began.elapsed() < LIMIT, "{} certificates and {conversions} conversions", seen.len());
        let object = get(&hub, &format!("{OLD}/settings")).await?;
        ensure!(object["spec"]["placement"]["clusters"] == json!([{"name": "east"}]), "{object}");
        conversions += 1;
        let now = world.webhook_certificate().await?;
        if seen.last() != Some(&now) {
            seen.push(now);
        }
    }
    ensure!(conversions > 20, "{conversions}");
    Ok(())
}

/// What somebody takes out of the definitions comes back, and a hub that comes back at another address says so there.
async fn registered_again(world: &mut World) -> Result<()> {
    let registered = async |world: &World| -> Result<()> {
        let definition = get(&world.root, DEFINITION).await?;
        let port = world.webhook_address()?.1;
        let url = definition["spec"]["conversion"]["webhook"]["clientConfig"]["url"].as_str().unwrap_or("");
        ensure!(url == format!("https://127.0.0.1:{port}/cellway/v1/convert"), "{url}");
        get(&world.root, &format!("{OLD}/settings")).await.map(drop)
    };
    registered(world).await?;
    let none = json!({"spec": {"conversion": {"strategy": "None", "webhook": null}}});
    merge(&world.root, DEFINITION, &none).await?;
    world.until("the webhook to be registered again", async || registered(world).await).await?;

    let before = world.webhook_address()?.1;
    let mut hub = world.hub.take().context("no hub")?;
    hub.terminate()?;
    hub.wait(LIMIT).await?;
    // Taken, so that the next hub has another port.
    let _taken = tokio::net::TcpListener::bind(("127.0.0.1", before)).await?;
    ensure!(get(&world.root, &format!("{OLD}/settings")).await.is_err(), "nobody converts");
    get(&world.root, &format!("{NEW}/settings")).await?;
    world.start_hub().await?;
    ensure!(world.webhook_address()?.1 != before);
    world.until("conversions to go on", async || registered(world).await).await
}

// === impl World ===

impl World {
    async fn start(assets: &Path) -> Result<Self> {
        let dir = TestDir::new("stock-hub")?;
        let stock = Stock::start(assets, dir.path()).await?;
        let root = client_without_retries(Kubeconfig::read_from(&stock.root)?).await?;
        Ok(Self { hub: None, member: None, root, stock, dir })
    }

    fn data(&self) -> PathBuf {
        self.dir.join("hub")
    }

    fn hub_command(&self) -> Command {
        let ports = ["api", "agent", "connect", "health", "admin", "webhook"];
        let mut command = common::hub(self.dir.path(), "hub", &ports);
        command.arg("--kubeconfig").arg(&self.stock.hub);
        command.arg(format!("--webhook-certificate-ttl={}s", TTL.as_secs()));
        command
    }

    async fn start_hub(&mut self) -> Result<()> {
        self.hub = Some(common::start_hub(self.dir.path(), "hub", self.hub_command()).await?);
        Ok(())
    }

    async fn join(&mut self, name: &str) -> Result<()> {
        let command = common::member(self.dir.path(), "hub", name, &[]).await?;
        self.member = Some(common::spawn(self.dir.path(), name, command)?);
        let hub = self.admin().await?;
        self.until("the member to be ready", async || {
            let cluster = get(&hub, &format!("{CLUSTERS}/{name}")).await?;
            let conditions = cluster["status"]["conditions"].as_array().context("no conditions")?;
            ensure!(
                conditions.iter().any(|one| one["type"] == "Ready" && one["status"] == "True"),
                "{conditions:?}"
            );
            Ok(())
        })
        .await
    }

    /// The objects, as the hub's own kubeconfig leads to them.
    async fn admin(&self) -> Result<Client> {
        client_without_retries(common::administrator(&self.data()).await?).await
    }

    /// The hub's own port, as somebody else.
    async fn at_port(&self, user: Value) -> Result<Client> {
        let text = std::fs::read_to_string(self.data().join("admin.kubeconfig"))?;
        let mut config: Value = serde_json::from_str(&text)?;
        config["current-context"] = json!("cellway:hub");
        let users = config["users"].as_array_mut().context("no users")?;
        for entry in users {
            entry["user"] = user.clone();
        }
        client_without_retries(Kubeconfig::from_yaml(&config.to_string())?).await
    }

    /// What the hub's port of probes and metrics says.
    async fn metrics(&self) -> Result<String> {
        let mut stream = tokio::net::TcpStream::connect(self.address("health")?).await?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: hub\r\nconnection: close\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    }

    /// Where one of the hub's ports is.
    fn address(&self, port: &str) -> Result<String> {
        let hub: Value = serde_json::from_slice(&std::fs::read(self.data().join("hub.json"))?)?;
        let address = hub["addresses"][port].as_str();
        Ok(address.with_context(|| format!("hub.json names no {port}"))?.to_owned())
    }

    /// TLS with one of the hub's ports, as nobody.
    async fn secured(
        &self,
        tcp: tokio::net::TcpStream,
    ) -> Result<tls::client::TlsStream<tokio::net::TcpStream>> {
        let ca = std::fs::read_to_string(self.data().join("pki").join("ca.crt"))?;
        let connector = ClientTls::from_pem(&ca, None)?.connector(&[b"http/1.1"]);
        Ok(connector.connect(ServerName::try_from("127.0.0.1")?, tcp).await?)
    }

    fn webhook_address(&self) -> Result<(String, u16)> {
        let address = self.address("webhook")?;
        let (host, port) = address.rsplit_once(':').context("no port")?;
        Ok((host.to_owned(), port.parse()?))
    }

    /// What the webhook serves with, valid now and by the hub's own authority.
    async fn webhook_certificate(&self) -> Result<Vec<u8>> {
        let stream = self.secured(tokio::net::TcpStream::connect(self.webhook_address()?).await?).await?;
        let chain = stream.get_ref().1.peer_certificates().context("no certificate")?;
        Ok(chain.first().context("an empty chain")?.to_vec())
    }

    async fn until<T>(&self, what: &str, look: impl AsyncFn() -> Result<T>) -> Result<T> {
        let found = wait_until(|| look(), LIMIT, what).await;
        found.with_context(|| self.hub.as_ref().map_or_else(String::new, |hub| hub.tail(40)))
    }

    async fn run(&self, args: &[&str]) -> Result<Output> {
        let data = self.data().display().to_string();
        common::run(self.dir.path(), &[args, &["--data-dir", &data]].concat()).await
    }

    async fn cellway(&self, args: &[&str]) -> Result<String> {
        common::printed(self.dir.path(), "hub", args).await
    }

    async fn items(&self, args: &[&str]) -> Result<Vec<Value>> {
        let args: Vec<&str> = args.iter().copied().chain(["-o", "json"]).collect();
        let printed: Value = serde_json::from_str(&self.cellway(&args).await?)?;
        printed["items"].as_array().cloned().with_context(|| format!("no items in {printed}"))
    }
}
