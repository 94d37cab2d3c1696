//! Credentials that the hub holds, in whole programs: a KMS plug-in encrypts the hub's Secrets, and a member is reached with
//! tokens and a client certificate in turn. They are rotated under steady writes, also while the plug-in is away and when it is
//! back with another key: no request is refused, every change arrives, and nothing shows them but the Secret, to whom may read it.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::{StreamExt as _, TryStreamExt as _};
use http::Method;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{ApiResource, DynamicObject, ListParams, WatchEvent, WatchParams};
use kube::config::Kubeconfig;
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};
use test_support::api::{ask, client_without_retries, code, create, delete, get, merge, text};
use test_support::kms::{KmsPlugin, Serving};
use test_support::process::Process;
use test_support::{TestDir, files_with, wait_until};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use self::common::LIMIT;

/// Each is changed again and again, all of them at once.
const OBJECTS: usize = 4;
const NAMESPACE: &str = "shop";
const HOME: &str = "kube-federation-system";
/// Of the hub, with the credential of the member.
const SECRET: &str = "/api/v1/namespaces/kube-federation-system/secrets/west-access";
const CLUSTER: &str = "/apis/core.kubefed.io/v1beta1/namespaces/kube-federation-system/kubefedclusters/west";
const OBJECT: &str = "/apis/types.kubefed.io/v1beta2/namespaces/shop/federatedconfigmaps";
/// Of the member, whose accounts the hub's tokens are.
const ACCOUNTS: &str = "/api/v1/namespaces/default/serviceaccounts";
const BINDINGS: &str = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings";
const ROLES: &str = "/apis/rbac.authorization.k8s.io/v1/clusterroles";

/// What an API has told of the objects here: their names, and of each what the test looks at.
type Told = watch::Receiver<Vec<(String, String)>>;

/// A hub with a KMS plug-in, and a member. Everything ends on drop.
struct World {
    hub: Client,
    member: Client,
    process: Process,
    _member: Process,
    plugin: KmsPlugin,
    /// `None` while the plug-in is away.
    serving: Option<Serving>,
    folder: TestDir,
    /// What must be read nowhere: of each credential the part that is secret, and the whole as the Secret holds it.
    hidden: Vec<String>,
    /// Requests of the test's own that the member refused.
    refused: u64,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn they_are_rotated_in_use_and_read_nowhere() -> Result<()> {
    let mut world = World::start().await?;
    let pid = world.process.pid().context("the hub does not run")?;

    // The member is reached with a token that the hub holds.
    let one = world.token("hub-one").await?;
    let version = world.set_secret(&json!({"token": STANDARD.encode(&one), "ca.crt": world.ca()?})).await?;
    let spec = json!({"spec": {"secretRef": {"name": "west-access"}, "apiEndpoint": world.endpoint()?}});
    merge(&world.hub, CLUSTER, &spec).await?;
    world.until_taken(&version).await?;

    // From now on every object changes all the time, each when the change before has arrived.
    let (contents, _watch_of_member) = listen(&world.member, ApiResource::erase::<ConfigMap>(&()), content);
    let (phases, _watch_of_hub) = listen(&world.hub, federated(), phases_of);
    let shop = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
    create(&world.hub, "/api/v1/namespaces", &shop).await?;
    let (stop, stopped) = watch::channel(false);
    let mut changing = JoinSet::new();
    for number in 0..OBJECTS {
        let name = format!("map-{number}");
        create(&world.hub, OBJECT, &object(&name)).await?;
        let (hub, contents, stopped) = (world.hub.clone(), contents.clone(), stopped.clone());
        changing.spawn(async move { (name.clone(), change(hub, contents, name, stopped).await) });
    }
    world.until_moved(&contents).await?;
    let refused = world.refusals().await?;

    // Another token, a certificate, a token again; each is withdrawn when the hub says that the next one is in use.
    let two = world.token("hub-two").await?;
    world.rotate(&json!({"token": STANDARD.encode(&two)})).await?;
    world.withdraw("hub-one", &one).await?;
    world.until_moved(&contents).await?;
    let pair = world.client_certificate()?;
    world.rotate(&pair).await?;
    world.withdraw("hub-two", &two).await?;
    world.until_moved(&contents).await?;

    // The plug-in goes. What is in use stays in use, and can be changed.
    world.serving = None;
    world.until_plugin(false).await?;
    world.until_moved(&contents).await?;
    let three = world.token("hub-three").await?;
    world.rotate(&json!({"token": STANDARD.encode(&three)})).await?;
    world.until_moved(&contents).await?;
    // It comes back with another key.
    world.plugin.turn_key(2);
    world.serving = Some(world.plugin.serve(&world.folder.join("kms.sock"))?);
    world.until_plugin(true).await?;
    let four = world.token("hub-four").await?;
    world.rotate(&json!({"token": STANDARD.encode(&four)})).await?;
    world.withdraw("hub-three", &three).await?;
    world.until_moved(&contents).await?;
    let status = get(&world.hub, "/encryption").await?;
    let under = |key: &str| {
        let mut objects = status["objects"].as_array().into_iter().flatten();
        objects.any(|one| one["resource"] == "secrets" && one["key"] == key)
    };
    ensure!(under("kms/vault/key-2"), "{status}");

    stop.send_replace(true);
    let mut last = BTreeMap::new();
    while let Some(ended) = changing.join_next().await {
        let (name, count) = ended?;
        last.insert(name, count.with_context(|| world.story())?);
    }
    // Every change has arrived, in its turn.
    for (name, last) in &last {
        let mut seen = of_object(&contents, name);
        seen.dedup();
        let all: Vec<String> = (1..=*last).map(|n| n.to_string()).collect();
        ensure!(seen == all, "{name} was to go from 1 to {last}: {seen:?}");
        let seen = of_object(&phases, name);
        let well = |phases: &String| matches!(phases.as_str(), "" | "Pending" | "Synced");
        ensure!(!seen.is_empty() && seen.iter().all(well), "{name} was {seen:?}");
    }
    ensure!(phases.has_changed().is_ok(), "the watch of the hub has ended");
    // The member has refused nobody but this test, and counts what it refuses.
    let refused = world.refusals().await? - refused;
    ensure!(
        refused == world.refused,
        "{refused} requests were refused, {} of them the test's",
        world.refused
    );
    let changes: usize = last.values().sum();
    // A write is counted when its answer has come back, a moment after the member's watches have told of it.
    let counted = async || {
        let metrics = world.page("health", "/metrics").await?;
        let writes = |outcome: &str| {
            let labels = [r#"cluster="west""#, &format!("outcome={outcome:?}")];
            total(&metrics, "cellway_federation_member_writes_total", &labels)
        };
        ensure!(writes("Done") >= changes as u64 && writes("Failed") == 0, "{metrics}");
        Ok(())
    };
    wait_until(counted, LIMIT, "every write to be counted").await?;
    let api = text(&world.hub, "/metrics").await?;
    ensure!(api.contains("cellway_apiserver_encryption_kms_healthy"), "{api}");
    ensure!(total(&api, "cellway_apiserver_encryption_failures_total", &[]) == 0, "{api}");
    // It is the process that was started.
    ensure!(world.process.ended()?.is_none() && world.process.pid() == Some(pid), "{}", world.story());
    eprintln!("{changes} changes arrived over five credentials");

    world.nothing_on_disk()?;
    world.nothing_on_pages().await?;
    world.nothing_for_who_may_not().await
}

/// Gives an object content after content, each when the last one has arrived. Returns the last content.
async fn change(hub: Client, told: Told, name: String, stop: watch::Receiver<bool>) -> Result<usize> {
    let mut content: usize = 1;
    loop {
        let wanted = (name.clone(), content.to_string());
        let mut told = told.clone();
        let arrived = told.wait_for(|seen| seen.iter().rev().any(|one| *one == wanted));
        match tokio::time::timeout(LIMIT, arrived).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) => bail!("the watch of the member has ended"),
            Err(_) => bail!("{name} does not become {content} in the member"),
        }
        if *stop.borrow() {
            return Ok(content);
        }
        content += 1;
        let template = json!({"spec": {"template": {"data": {"n": content.to_string()}}}});
        merge(&hub, &format!("{OBJECT}/{name}"), &template).await?;
    }
}

/// Notes what an API tells of the objects here, until dropped; a failure ends it, and fails whoever waits for more.
fn listen(
    client: &Client,
    resource: ApiResource,
    of: fn(&DynamicObject) -> String,
) -> (Told, AbortOnDropHandle<()>) {
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), NAMESPACE, &resource);
    let (told, receiver) = watch::channel(Vec::new());
    let listening = tokio::spawn(async move {
        if let Err(error) = follow(api, of, told).await {
            eprintln!("the watch of {} failed: {error:#}", resource.plural);
        }
    });
    (receiver, AbortOnDropHandle::new(listening))
}

async fn follow(
    api: Api<DynamicObject>,
    of: fn(&DynamicObject) -> String,
    told: watch::Sender<Vec<(String, String)>>,
) -> Result<()> {
    let params = WatchParams::default().timeout(290);
    let mut since = api.list(&ListParams::default()).await?.metadata.resource_version.unwrap_or_default();
    loop {
        let mut changes = api.watch(&params, &since).await?.boxed();
        while let Some(change) = changes.try_next().await? {
            match change {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                    since = object.resource_version().unwrap_or_default();
                    // A namespace has config maps of its own.
                    if object.name_any().starts_with("map-") {
                        told.send_modify(|seen| seen.push((object.name_any(), of(&object))));
                    }
                }
                WatchEvent::Deleted(object) => bail!("{} was deleted", object.name_any()),
                WatchEvent::Bookmark(bookmark) => since = bookmark.metadata.resource_version,
                WatchEvent::Error(status) => bail!("{status:?}"),
            }
        }
    }
}

/// Of a config map, what changes.
fn content(map: &DynamicObject) -> String {
    map.data["data"]["n"].as_str().unwrap_or_default().to_owned()
}

/// Of a federated object, where its units stand.
fn phases_of(object: &DynamicObject) -> String {
    let units = object.data["status"]["units"].as_array();
    let phases = units.into_iter().flatten().map(|unit| unit["phase"].as_str().unwrap_or("none"));
    phases.collect::<Vec<_>>().join(" ")
}

/// What was told of one object, oldest first.
fn of_object(told: &Told, name: &str) -> Vec<String> {
    told.borrow().iter().filter(|(of, _)| of == name).map(|(_, what)| what.clone()).collect()
}

fn federated() -> ApiResource {
    ApiResource {
        group: "types.kubefed.io".into(),
        version: "v1beta2".into(),
        api_version: "types.kubefed.io/v1beta2".into(),
        kind: "FederatedConfigMap".into(),
        plural: "federatedconfigmaps".into(),
    }
}

fn object(name: &str) -> Value {
    json!({"apiVersion": "types.kubefed.io/v1beta2", "kind": "FederatedConfigMap",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"topologyType": "cluster", "template": {"data": {"n": "1"}},
            "placement": {"units": [{"name": "west"}]}}})
}

// === impl World ===

impl World {
    async fn start() -> Result<Self> {
        let folder = TestDir::new("credentials")?;
        let plugin = KmsPlugin::default();
        let socket = folder.join("kms.sock");
        let serving = Some(plugin.serve(&socket)?);
        let encryption = folder.join("encryption.yaml");
        let kms =
            json!({"apiVersion": "v2", "name": "vault", "endpoint": format!("unix://{}", socket.display())});
        let configuration = json!({"apiVersion": "apiserver.config.k8s.io/v1", "kind": "EncryptionConfiguration",
            "resources": [{"resources": ["secrets"], "providers": [{"kms": kms}]}]});
        std::fs::write(&encryption, configuration.to_string())?;

        let mut command = common::hub(folder.path(), "hub", &["api", "agent", "connect", "health", "admin"]);
        command.arg("--log=debug").arg("--encryption-provider-config").arg(&encryption);
        let process = common::start_hub(folder.path(), "hub", command).await?;
        let mut command = common::member(folder.path(), "hub", "west", &[]).await?;
        // Its API is where the hub's credential leads.
        command.args(["--v=5", "--allow=127.0.0.1"]);
        let member_process = common::spawn(folder.path(), "west", command)?;
        let administrator =
            async |name: &str| client_without_retries(common::administrator(&folder.join(name)).await?).await;
        let (hub, member) = (administrator("hub").await?, administrator("west").await?);
        let world = Self {
            hub,
            member,
            process,
            _member: member_process,
            plugin,
            serving,
            folder,
            hidden: Vec::new(),
            refused: 0,
        };
        let ready = async || world.condition("Ready", "").await;
        world.until("the member to be ready", ready).await?;
        Ok(world)
    }

    async fn until<T>(&self, what: &str, look: impl AsyncFn() -> Result<T>) -> Result<T> {
        wait_until(|| look(), LIMIT, what).await.with_context(|| self.story())
    }

    /// What the hub said last.
    fn story(&self) -> String {
        self.process.tail(60)
    }

    /// Whether a condition of the cluster is true, with a message that ends so.
    async fn condition(&self, type_: &str, end: &str) -> Result<()> {
        let cluster = get(&self.hub, CLUSTER).await?;
        let conditions = cluster["status"]["conditions"].as_array().context("no conditions")?;
        let found = conditions.iter().find(|one| one["type"] == type_).context("not there")?;
        let message = found["message"].as_str().unwrap_or_default();
        ensure!(found["status"] == "True" && message.ends_with(end), "{found}");
        Ok(())
    }

    /// Waits until the hub says that this version of the Secret is in use.
    async fn until_taken(&self, version: &str) -> Result<()> {
        let end = format!("west-access, version {version}");
        self.until("the credential to be taken", async || self.condition("CredentialsValid", &end).await)
            .await
    }

    /// Waits until each object has changed three times more in the member.
    async fn until_moved(&self, told: &Told) -> Result<()> {
        let from = told.borrow().len();
        let moved = |seen: &Vec<(String, String)>| {
            let mut counts = BTreeMap::new();
            for (name, _) in seen.iter().skip(from) {
                *counts.entry(name.as_str()).or_insert(0) += 1;
            }
            counts.len() == OBJECTS && counts.values().all(|count| *count >= 3)
        };
        let mut told = told.clone();
        match tokio::time::timeout(LIMIT, told.wait_for(moved)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => bail!("the watch of the member has ended"),
            Err(_) => bail!("not all objects move\n{}", self.story()),
        }
    }

    /// Waits until the hub finds the plug-in well, or not. It is asked for this.
    async fn until_plugin(&self, well: bool) -> Result<()> {
        let look = async || {
            let status = get(&self.hub, "/encryption").await?;
            let problems = status["problems"].as_array().context("no problems")?;
            ensure!(problems.is_empty() == well, "{problems:?}");
            Ok(())
        };
        self.until("the hub to see what became of the plug-in", look).await
    }

    /// A new account of the member, which may everything, and a token of it.
    async fn token(&mut self, account: &str) -> Result<String> {
        let token = token(&self.member, account, "cluster-admin").await?;
        // A right takes a moment to be known, and the test is about none that is missing.
        let holder = client_as(&self.folder.join("west"), &token).await?;
        self.until("the account's rights", async || text(&holder, "/api/v1/configmaps").await).await?;
        // Without its signature it opens nothing.
        let signature = token.rsplit('.').next().unwrap_or_default().to_owned();
        self.hidden.extend([signature, STANDARD.encode(&token)]);
        Ok(token)
    }

    /// Takes an account of the member away, and waits until its token opens nothing any more.
    async fn withdraw(&mut self, account: &str, token: &str) -> Result<()> {
        delete(&self.member, &format!("{ACCOUNTS}/{account}")).await?;
        let holder = client_as(&self.folder.join("west"), token).await?;
        let look = async || {
            let found = code(get(&holder, "/api/v1/namespaces/default").await);
            ensure!(found == 401, "it is answered {found}");
            Ok(())
        };
        self.until("the old token to be refused", look).await?;
        self.refused += 1;
        Ok(())
    }

    /// The certificate and the key with which the member knows its administrator, as a Secret holds them.
    fn client_certificate(&mut self) -> Result<Value> {
        let config = kubeconfig(&self.folder.join("west"))?;
        let user = &config["users"][0]["user"];
        let (certificate, key) = (&user["client-certificate-data"], &user["client-key-data"]);
        let stored = key.as_str().context("no key")?;
        let pem = String::from_utf8(STANDARD.decode(stored)?)?;
        let lines = pem.lines().filter(|line| line.len() > 40 && !line.starts_with("-----"));
        self.hidden.extend(lines.map(str::to_owned));
        self.hidden.push(stored.to_owned());
        Ok(json!({"tls.crt": certificate, "tls.key": key}))
    }

    /// The CA of the member's API, as a Secret holds it.
    fn ca(&self) -> Result<Value> {
        let config = kubeconfig(&self.folder.join("west"))?;
        Ok(config["clusters"][0]["cluster"]["certificate-authority-data"].clone())
    }

    fn endpoint(&self) -> Result<Value> {
        let config = kubeconfig(&self.folder.join("west"))?;
        Ok(config["clusters"][0]["cluster"]["server"].clone())
    }

    /// Puts another credential into the Secret, in the place of the one that is there. Returns its version.
    async fn set_secret(&self, data: &Value) -> Result<String> {
        let mut secret = json!({"apiVersion": "v1", "kind": "Secret", "data": data,
            "metadata": {"name": "west-access", "namespace": HOME, "labels": {"cellway.io/credential-of": "west"}}});
        let found = get(&self.hub, SECRET).await;
        let stored = match found {
            Ok(found) => {
                secret["metadata"]["resourceVersion"] = found["metadata"]["resourceVersion"].clone();
                ask(&self.hub, Method::PUT, SECRET, "application/json", &secret).await?
            }
            Err(_) => create(&self.hub, SECRET.trim_end_matches("/west-access"), &secret).await?,
        };
        Ok(stored["metadata"]["resourceVersion"].as_str().context("no version")?.to_owned())
    }

    /// As the guide says: writes the new credential, and waits until the hub says that it is in use.
    async fn rotate(&self, login: &Value) -> Result<()> {
        let mut data = login.clone();
        data["ca.crt"] = self.ca()?;
        let version = self.set_secret(&data).await?;
        self.until_taken(&version).await
    }

    /// Requests that the member has refused for who asks, ever.
    async fn refusals(&self) -> Result<u64> {
        let metrics = text(&self.member, "/metrics").await?;
        ensure!(total(&metrics, "apiserver_request_total", &[r#"code="200""#]) > 0, "{metrics}");
        Ok(total(&metrics, "apiserver_request_total", &[r#"code="401""#]))
    }

    /// A page of one of the hub's ports that ask for no password.
    async fn page(&self, port: &str, path: &str) -> Result<String> {
        let hub: Value = serde_json::from_slice(&std::fs::read(self.folder.join("hub").join("hub.json"))?)?;
        let address = hub["addresses"][port].as_str().with_context(|| format!("no port {port}"))?;
        let mut stream = tokio::net::TcpStream::connect(address).await?;
        let request = format!("GET {path} HTTP/1.1\r\nhost: hub\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        ensure!(answer.starts_with("HTTP/1.1 200 "), "{path}: {answer}");
        Ok(answer)
    }

    /// Whether something hidden stands in a text.
    fn shown(&self, text: &str) -> bool {
        self.hidden.iter().any(|hidden| text.contains(hidden))
    }

    /// The database, its journal, the logs at the level debug: none of them holds a credential.
    fn nothing_on_disk(&self) -> Result<()> {
        ensure!(self.hidden.iter().all(|hidden| hidden.len() > 40), "too short to look for");
        let written = ["hub", "hub.log", "west.log"].map(|name| self.folder.join(name));
        let found = files_with(&written, &self.hidden)?;
        ensure!(found.is_empty(), "credentials can be read in {found:?}");
        // What is there is found: the Secret's name, what the plug-in's values begin with, lines of the level debug.
        for (text, file) in
            [("west-access", "store.db"), ("k8s:enc:kms:v2:vault:", "store.db"), ("DEBUG", "hub.log")]
        {
            let found = files_with(&written, &[text.to_owned()])?;
            ensure!(found.iter().any(|path| path.to_string_lossy().contains(file)), "{text}: only {found:?}");
        }
        Ok(())
    }

    /// Nor do the pages for operators and for whoever collects metrics.
    async fn nothing_on_pages(&self) -> Result<()> {
        for (port, path, holds) in [
            ("admin", "/config", "encryption-provider-config"),
            ("admin", "/metrics", "cellway_federation_leading"),
            ("admin", "/debug/", ""),
            ("health", "/metrics", "cellway_federation_leading"),
            ("health", "/readyz?verbose", "ok"),
        ] {
            let page = self.page(port, path).await?;
            ensure!(page.contains(holds), "{path} of {port} does not say {holds}: {page}");
            ensure!(!self.shown(&page), "{path} of {port} shows a credential");
        }
        Ok(())
    }

    /// Nor the hub API, to who may read all that there is but Secrets.
    async fn nothing_for_who_may_not(&self) -> Result<()> {
        let listed = text(&self.hub, SECRET).await?;
        ensure!(self.shown(&listed), "whoever may read the Secret is shown it");
        // What can be listed, by group and version.
        let groups = get(&self.hub, "/apis").await?;
        let groups = groups["groups"].as_array().context("no groups")?;
        let mut versions = vec!["/api/v1".to_owned()];
        for version in groups.iter().flat_map(|group| group["versions"].as_array().into_iter().flatten()) {
            versions.push(format!("/apis/{}", version["groupVersion"].as_str().context("no version")?));
        }
        let (mut paths, mut core) = (Vec::new(), Vec::new());
        for version in &versions {
            let resources = get(&self.hub, version).await?;
            for resource in resources["resources"].as_array().context("no resources")? {
                let name = resource["name"].as_str().context("no name")?;
                let lists = resource["verbs"].as_array().is_some_and(|verbs| verbs.contains(&json!("list")));
                if !lists || name == "secrets" {
                    continue;
                }
                paths.push(format!("{version}/{name}"));
                if version == "/api/v1" {
                    core.push(name.to_owned());
                }
            }
        }
        ensure!(paths.len() > 20, "only {paths:?}");
        paths.extend(["/metrics", "/encryption", "/upkeep", "/readyz?verbose"].map(str::to_owned));

        let named: Vec<&Value> = groups.iter().map(|group| &group["name"]).collect();
        let role = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
            "metadata": {"name": "curious"}, "rules": [
                {"apiGroups": [""], "resources": core, "verbs": ["get", "list", "watch"]},
                {"apiGroups": named, "resources": ["*"], "verbs": ["get", "list", "watch"]},
                {"nonResourceURLs": ["*"], "verbs": ["get"]}]});
        create(&self.hub, ROLES, &role).await?;
        let token = token(&self.hub, "curious", "curious").await?;
        let curious = client_as(&self.folder.join("hub"), &token).await?;
        self.until("the rights to be known", async || text(&curious, CLUSTER).await).await?;
        // These are the administrator's, who reads Secrets elsewhere.
        for of in ["server", "tunnels", "connections", "clusters"] {
            let path = format!("/cellway/v1/{of}");
            ensure!(!self.shown(&text(&self.hub, &path).await?), "{path} shows a credential");
        }
        for path in &paths {
            let answer = text(&curious, path).await?;
            ensure!(!self.shown(&answer), "{path} shows a credential");
        }
        let cluster = text(&curious, CLUSTER).await?;
        ensure!(cluster.contains("west-access"), "it names the Secret: {cluster}");
        let in_home = format!("/api/v1/namespaces/{HOME}/secrets");
        let watching = format!("{in_home}?watch=true&timeoutSeconds=1");
        for path in [SECRET, &in_home, "/api/v1/secrets", &watching] {
            let Err(error) = text(&curious, path).await else { bail!("{path} is answered") };
            let said = format!("{error:#}");
            ensure!(code::<()>(Err(error)) == 403 && !self.shown(&said), "{path}: {said}");
        }
        Ok(())
    }
}

/// Makes an account in the namespace `default` that has a role, and a token of it.
async fn token(client: &Client, account: &str, role: &str) -> Result<String> {
    let made = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": account}});
    create(client, ACCOUNTS, &made).await?;
    let binding = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
        "metadata": {"name": account},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": "default"}]});
    create(client, BINDINGS, &binding).await?;
    let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}});
    let answer = create(client, &format!("{ACCOUNTS}/{account}/token"), &request).await?;
    Ok(answer["status"]["token"].as_str().context("no token")?.to_owned())
}

/// The sum of a metric's series that have all of these labels.
fn total(metrics: &str, name: &str, labels: &[&str]) -> u64 {
    let of_it = |line: &&str| {
        let series = line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
        series && labels.iter().all(|label| line.contains(*label))
    };
    let values = metrics.lines().filter(of_it).filter_map(|line| line.rsplit(' ').next());
    values.filter_map(|value| value.parse::<u64>().ok()).sum()
}

/// The kubeconfig of whoever administers what keeps its data in `folder`.
fn kubeconfig(folder: &Path) -> Result<Value> {
    Ok(serde_json::from_str(&std::fs::read_to_string(folder.join("admin.kubeconfig"))?)?)
}

/// Whoever has this token, at the same API.
async fn client_as(folder: &Path, token: &str) -> Result<Client> {
    let mut config = kubeconfig(folder)?;
    for entry in config["users"].as_array_mut().context("no users")? {
        entry["user"] = json!({ "token": token });
    }
    client_without_retries(Kubeconfig::from_yaml(&config.to_string())?).await
}
