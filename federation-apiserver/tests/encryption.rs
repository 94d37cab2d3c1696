//! Encryption at rest, by the real program: nothing of a Secret is on disk or in a log, keys rotate, a KMS plug-in is
//! asked as its protocol says.

mod common;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use base64::Engine as _;
use common::Server;
use serde_json::{Value, json};
use test_support::databases::{Kind, Server as Database};
use test_support::kms::KmsPlugin;
use tokio::process::{Child, Command};

const SECRETS: &str = "/api/v1/namespaces/default/secrets";
const MAPS: &str = "/api/v1/namespaces/default/configmaps";
const PLAIN: &str = "correct-horse-battery-staple";

/// The program, on a free port, logging everything into a file.
struct Program {
    child: Child,
    server: Server,
    log: PathBuf,
}

impl Program {
    async fn start(dir: &Path, config: &Path) -> Self {
        Self::start_on(None, dir, config).await
    }

    /// On a database server, or on a file in the folder.
    async fn start_on(store: Option<&str>, dir: &Path, config: &Path) -> Self {
        let log = dir.join("server.log");
        let file = std::fs::OpenOptions::new().create(true).append(true).open(&log).expect("a log");
        let data = dir.join("data");
        let kubeconfig = data.join("admin.kubeconfig");
        let _ = std::fs::remove_file(&kubeconfig);
        let child = Command::new(env!("CARGO_BIN_EXE_cellway-apiserver"))
            .args(["--secure-port=0", "--log=trace", "--data-dir"])
            .arg(&data)
            .arg("--encryption-provider-config")
            .arg(config)
            .args(store.map(|store| format!("--store={store}")))
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("a handle"))
            .stderr(file)
            .kill_on_drop(true)
            .spawn()
            .expect("the program starts");
        let wait = async {
            loop {
                let text = std::fs::read_to_string(&log).unwrap_or_default();
                let ready = text.lines().rfind(|l| l.contains("API server is listening")).is_some();
                if let (true, Ok(text)) = (ready, std::fs::read_to_string(&kubeconfig)) {
                    let config: Value = serde_json::from_str(&text).expect("JSON");
                    let url = config["clusters"][0]["cluster"]["server"].as_str().expect("a URL").to_owned();
                    break url.trim_start_matches("https://").parse::<SocketAddr>().expect("an address");
                }
                tokio::task::yield_now().await;
            }
        };
        let address = tokio::time::timeout(common::LIMIT, wait).await.expect("the program comes up");
        Self { child, server: Server::attach(address, &data), log }
    }

    async fn stop(mut self) -> PathBuf {
        self.child.kill().await.expect("ended");
        self.log
    }
}

/// Every file below a folder that holds one of the words.
fn found_in(dir: &Path, words: &[String]) -> BTreeSet<PathBuf> {
    test_support::files_with(&[dir], words).expect("files that can be read")
}

fn words() -> Vec<String> {
    words_of(PLAIN)
}

/// A value as it is and as it is in an object.
fn words_of(plain: &str) -> Vec<String> {
    vec![plain.to_owned(), base64::engine::general_purpose::STANDARD.encode(plain)]
}

fn write(path: &Path, providers: &str) {
    let text = format!(
        "apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources:\n- resources: [secrets, '*.types.kubefed.io']\n  providers: [{providers}]\n"
    );
    std::fs::write(path, text).expect("written");
}

fn key(name: &str, byte: char) -> String {
    format!("{{name: {name}, secret: {}=}}", byte.to_string().repeat(43))
}

async fn create(server: &Server, name: &str) {
    let secret = json!({"metadata": {"name": name}, "stringData": {"password": PLAIN}});
    let answer = server.call("POST", SECRETS, Some(&secret)).await;
    assert_eq!(answer.code, 201, "{}", answer.text);
}

async fn readable(server: &Server, name: &str) {
    let answer = server.get(&format!("{SECRETS}/{name}")).await;
    let encoded = base64::engine::general_purpose::STANDARD.encode(PLAIN);
    assert_eq!(answer.body["data"]["password"], json!(encoded), "{}", answer.text);
    let list = server.get(SECRETS).await;
    assert_eq!(list.code, 200, "{}", list.text);
}

/// The same for all kinds.
fn write_for_all(path: &Path, keys: &str) {
    let text = format!(
        "apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources:\n- resources: ['*.*']\n  providers: [{{aesgcm: {{keys: [{keys}]}}}}]\n"
    );
    std::fs::write(path, text).expect("written");
}

#[tokio::test]
async fn it_comes_up_over_what_nobody_can_decrypt() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = dir.path().join("encryption.yaml");
    let crds = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    let roles = "/apis/rbac.authorization.k8s.io/v1/clusterroles";
    let crd = |plural: &str, kind: &str| {
        json!({"metadata": {"name": format!("{plural}.example.com")},
            "spec": {"group": "example.com", "scope": "Cluster", "names": {"plural": plural, "kind": kind},
                "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema":
                    {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}]}})
    };
    let objects = |plural: &str| format!("/apis/example.com/v1/{plural}");
    write_for_all(&config, &key("lost", 'A'));
    let program = Program::start(dir.path(), &config).await;
    assert_eq!(program.server.call("POST", crds, Some(&crd("widgets", "Widget"))).await.code, 201);
    let rules = json!([{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}]);
    for name in ["mine", "yours"] {
        let role = json!({"metadata": {"name": name}, "rules": rules});
        assert_eq!(program.server.call("POST", roles, Some(&role)).await.code, 201);
    }
    program.stop().await;
    // The key is lost: namespaces, the default roles, the definition.
    write_for_all(&config, &key("new", 'E'));
    let program = Program::start(dir.path(), &config).await;
    let server = &program.server;
    for path in [format!("{roles}/mine"), "/api/v1/namespaces/default".to_owned()] {
        assert_eq!(server.get(&path).await.code, 500, "{path}");
    }
    assert_eq!(server.get(&objects("widgets")).await.code, 404);
    assert_eq!(server.call("POST", crds, Some(&crd("gadgets", "Gadget"))).await.code, 201);
    server.until(&objects("gadgets"), "another definition is served", |a| a.code == 200).await;
    // What nobody will read again can go.
    let unsafely = "ignoreStoreReadErrorWithClusterBreakingPotential";
    let gone = server.call("DELETE", &format!("{roles}/mine?{unsafely}=true"), None).await;
    assert_eq!(gone.code, 200, "{}", gone.text);
    program.stop().await;
    // It was not lost after all.
    write_for_all(&config, &format!("{}, {}", key("new", 'E'), key("lost", 'A')));
    let program = Program::start(dir.path(), &config).await;
    for (path, code) in [
        (format!("{roles}/mine"), 404),
        (format!("{roles}/yours"), 200),
        (objects("widgets"), 200),
        (objects("gadgets"), 200),
    ] {
        assert_eq!(program.server.get(&path).await.code, code, "{path}");
    }
    program.stop().await;
}

/// Has everything written anew, and waits for the end.
async fn rewrite(server: &Server) -> Value {
    let begun = server.call("POST", "/upkeep/rewrite", None).await;
    assert_eq!(begun.code, 200, "{}", begun.text);
    let done = |answer: &common::Answer| answer.body["step"] == "finished";
    let done = server.until("/upkeep", "the rewrite", done).await.body;
    assert_eq!(done["id"], begun.body["id"], "{done}");
    assert_eq!((&done["failed"], &done["problem"]), (&json!(0), &Value::Null), "{done}");
    done
}

#[tokio::test]
async fn nothing_of_the_former_form_is_kept_after_a_rewrite() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = dir.path().join("encryption.yaml");
    write(&config, "{identity: {}}");
    let program = Program::start(dir.path(), &config).await;
    let server = &program.server;
    // More than are written at once.
    let names: Vec<String> = (0..150).map(|n| format!("s{n}")).collect();
    futures::future::join_all(names.iter().map(|name| create(server, name))).await;
    create(server, "gone").await;
    assert_eq!(server.call("DELETE", &format!("{SECRETS}/gone"), None).await.code, 200);
    let before = server.get(SECRETS).await.body["metadata"]["resourceVersion"].clone();
    let patch = json!({"metadata": {"labels": {"x": "y"}}});
    assert_eq!(server.call("PATCH", &format!("{SECRETS}/s1"), Some(&patch)).await.code, 200);
    let data = dir.path().join("data");
    assert!(!found_in(&data, &words()).is_empty(), "the search finds what is there");
    write(&config, &format!("{{aesgcm: {{keys: [{}]}}}}, {{identity: {{}}}}", key("one", 'A')));
    let done = rewrite(server).await;
    assert_eq!((&done["rewritten"], &done["lookedAt"]), (&json!(150), &done["objects"]), "{done}");
    // Not in the database, its write-ahead log, its free pages.
    assert_eq!(found_in(&data, &words()), BTreeSet::new());
    readable(server, "s1").await;
    // Again, and the history alone: there is nothing to do, and it is done.
    // The path of before never says that it is done before it is.
    let former = server.call("POST", "/encryption/rewrite", None).await;
    assert!(former.code == 503 || former.body["step"] == "finished", "{}", former.text);
    assert_eq!(rewrite(server).await["rewritten"], 0);
    let compacted = server.call("POST", "/upkeep/compact", None).await;
    assert_eq!(compacted.code, 200, "{}", compacted.text);
    let done = |answer: &common::Answer| answer.body["step"] == "finished";
    let done = server.until("/upkeep", "the compaction", done).await.body;
    assert_eq!((&done["job"], &done["problem"]), (&json!("compact"), &Value::Null), "{done}");
    readable(server, "s149").await;
    // Only who may.
    assert_ne!(server.anonymous("POST", "/upkeep/compact", &[]).await.code, 200);
    assert_ne!(server.anonymous("GET", "/upkeep", &[]).await.code, 200);
    // Without the provider that read the former form: whoever comes back to what is gone lists again.
    program.stop().await;
    write(&config, &format!("{{aesgcm: {{keys: [{}]}}}}", key("one", 'A')));
    let program = Program::start(dir.path(), &config).await;
    let before = before.as_str().expect("a revision");
    let path = format!("{SECRETS}?watch=true&resourceVersion={before}&timeoutSeconds=1");
    let resumed = program.server.get(&path).await;
    assert!(resumed.code == 410 || resumed.text.contains("\"code\":410"), "{}", resumed.text);
    readable(&program.server, "s149").await;
    program.stop().await;
}

#[tokio::test]
async fn nothing_of_a_secret_is_on_disk_and_keys_rotate() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = dir.path().join("encryption.yaml");
    write(&config, &format!("{{aesgcm: {{keys: [{}]}}}}, {{identity: {{}}}}", key("one", 'A')));
    let program = Program::start(dir.path(), &config).await;
    let server = &program.server;
    create(server, "a").await;
    let patch = json!({"metadata": {"labels": {"x": "y"}}});
    assert_eq!(server.call("PATCH", &format!("{SECRETS}/a"), Some(&patch)).await.code, 200);
    readable(server, "a").await;
    let mut watch = server.watch(&format!("{SECRETS}?watch=true")).await;
    assert_eq!(watch.brief().await, ("ADDED".to_owned(), "a".to_owned()));
    // In the database, its journal, the log at its most talkative: nowhere. The proof can fail: the data is readable
    // where it is not encrypted.
    let open = json!({"metadata": {"name": "open"}, "data": {"x": format!("{PLAIN}-open")}});
    assert_eq!(server.call("POST", "/api/v1/namespaces/default/configmaps", Some(&open)).await.code, 201);
    assert!(!found_in(dir.path(), &[format!("{PLAIN}-open")]).is_empty(), "the search finds what is there");
    server.call("DELETE", "/api/v1/namespaces/default/configmaps/open", None).await;
    let only_secret: Vec<String> =
        vec![format!("{PLAIN}\""), base64::engine::general_purpose::STANDARD.encode(PLAIN)];
    assert_eq!(found_in(dir.path(), &only_secret), BTreeSet::new());
    // Rotation: the new key first, then what is under the old one written anew.
    write(
        &config,
        &format!(
            "{{secretbox: {{keys: [{}]}}}}, {{aesgcm: {{keys: [{}]}}}}, {{identity: {{}}}}",
            key("box", 'E'),
            key("one", 'A')
        ),
    );
    assert_eq!(rewrite(server).await["rewritten"], 1);
    assert_eq!(watch.brief().await, ("MODIFIED".to_owned(), "a".to_owned()));
    let status = server.get("/encryption").await.body;
    let entry = json!({"resource": "secrets", "key": "secretbox/box", "objects": 1, "stale": 0});
    assert!(status["objects"].as_array().is_some_and(|o| o.contains(&entry)), "{status}");
    assert_eq!(status["stale"], 0);
    // Only who may.
    assert_eq!(server.anonymous("GET", "/encryption", &[]).await.code, 403);
    // Without the old key, after a restart.
    write(&config, &format!("{{secretbox: {{keys: [{}]}}}}", key("box", 'E')));
    program.stop().await;
    let program = Program::start(dir.path(), &config).await;
    readable(&program.server, "a").await;
    // Without any key that reads it: an error, not garbage.
    let log = program.stop().await;
    write(&config, &format!("{{aescbc: {{keys: [{}]}}}}", key("other", 'I')));
    let program = Program::start(dir.path(), &config).await;
    let unreadable = program.server.get(&format!("{SECRETS}/a")).await;
    assert_eq!(unreadable.code, 500, "{}", unreadable.text);
    create(&program.server, "b").await;
    readable_alone(&program.server, "b").await;
    program.stop().await;
    assert_eq!(found_in(dir.path(), &only_secret), BTreeSet::new());
    assert!(
        std::fs::read_to_string(log).expect("a log").contains("TRACE"),
        "the log is as talkative as it gets"
    );
}

#[tokio::test]
async fn keys_rotate_by_putting_back_what_was_read() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = dir.path().join("encryption.yaml");
    write(&config, &format!("{{aesgcm: {{keys: [{}]}}}}", key("one", 'A')));
    let program = Program::start(dir.path(), &config).await;
    create(&program.server, "a").await;
    program.stop().await;
    write(&config, &format!("{{aesgcm: {{keys: [{}, {}]}}}}", key("two", 'E'), key("one", 'A')));
    let program = Program::start(dir.path(), &config).await;
    let server = &program.server;
    let path = format!("{SECRETS}/a");
    let read = server.get(&path).await.body;
    let mut watch = server.watch(&format!("{SECRETS}?watch=true")).await;
    assert_eq!(watch.brief().await, ("ADDED".to_owned(), "a".to_owned()));
    // Nothing is written to see what would be.
    let tried = server.call("PUT", &format!("{path}?dryRun=All"), Some(&read)).await;
    assert_eq!(tried.body, read, "{}", tried.text);
    assert_eq!(server.get("/encryption").await.body["stale"], 1);
    // `kubectl get secrets -o json | kubectl replace -f -`
    let put = server.call("PUT", &path, Some(&read)).await;
    assert_eq!(put.code, 200, "{}", put.text);
    assert_ne!(put.body["metadata"]["resourceVersion"], read["metadata"]["resourceVersion"]);
    assert_eq!(watch.brief().await, ("MODIFIED".to_owned(), "a".to_owned()));
    assert_eq!(server.get("/encryption").await.body["stale"], 0);
    // Once is enough.
    let again = server.call("PUT", &path, Some(&put.body)).await;
    assert_eq!(again.body, put.body, "{}", again.text);
    // And the old key can go.
    program.stop().await;
    write(&config, &format!("{{aesgcm: {{keys: [{}]}}}}", key("two", 'E')));
    let program = Program::start(dir.path(), &config).await;
    readable(&program.server, "a").await;
    program.stop().await;
}

async fn readable_alone(server: &Server, name: &str) {
    let answer = server.get(&format!("{SECRETS}/{name}")).await;
    assert_eq!(answer.code, 200, "{}", answer.text);
}

#[tokio::test]
async fn a_kms_plugin_holds_the_key() {
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("kms.sock");
    let plugin = KmsPlugin::default();
    let running = plugin.serve(&socket).expect("a socket");
    let config = dir.path().join("encryption.yaml");
    write(
        &config,
        &format!(
            "{{kms: {{apiVersion: v2, name: vault, endpoint: 'unix://{}', timeout: 5s}}}}",
            socket.display()
        ),
    );
    let program = Program::start(dir.path(), &config).await;
    for i in 0..20 {
        create(&program.server, &format!("s{i}")).await;
    }
    readable(&program.server, "s3").await;
    assert_eq!(plugin.calls(), ["Encrypt"], "one seed serves many objects");
    assert_eq!(found_in(dir.path(), &words()), BTreeSet::new());
    // After a restart the seed is asked for once.
    program.stop().await;
    plugin.forget_calls();
    let program = Program::start(dir.path(), &config).await;
    readable(&program.server, "s3").await;
    readable(&program.server, "s19").await;
    let calls = plugin.calls();
    assert_eq!(calls.iter().filter(|c| **c == "Decrypt").count(), 1, "{calls:?}");
    // The plug-in rotates its key: what is written from then on, and rewritten, is under the new one.
    plugin.turn_key(2);
    let rewritten = rewrite(&program.server).await;
    assert!(rewritten["rewritten"].as_u64().is_some_and(|n| n >= 20), "{rewritten}");
    let status = program.server.get("/encryption").await.body;
    let under =
        |key: &str| status["objects"].as_array().into_iter().flatten().filter(|o| o["key"] == key).count();
    assert_eq!(
        (under("kms/vault/key-1"), under("kms/vault/key-2"), &status["stale"]),
        (0, 1, &json!(0)),
        "{status}"
    );
    let metrics = program.server.get("/metrics").await.text;
    for line in [
        "cellway_apiserver_encryption_kms_healthy{provider_name=\"vault\"} 1",
        "cellway_apiserver_encryption_stale_objects 0",
        "cellway_apiserver_encryption_key{resources=\"secrets,*.types.kubefed.io\",provider=\"kms/vault\",key=\"sha256:",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
    assert_eq!(program.server.get("/readyz/kms-providers").await.text, "ok");
    // Out of order: said, and what needs it fails, the rest goes on.
    plugin.set_healthy(false);
    let status = program.server.get("/encryption").await.body;
    assert!(status["problems"][0].as_str().is_some_and(|p| p.contains("out of order")), "{status}");
    readable(&program.server, "s3").await;
    // `GET /encryption` has asked the plug-in. Whoever watches hears of it, and may decide to be ready without it.
    for page in ["/readyz", "/healthz"] {
        let all = program.server.get(&format!("{page}?verbose")).await;
        assert!(all.code == 500 && all.text.contains("[-]kms-providers failed\n"), "{page}: {}", all.text);
        assert_eq!(program.server.get(&format!("{page}/kms-providers")).await.code, 500);
        let without = program.server.get(&format!("{page}?verbose&exclude=kms-providers")).await;
        assert!(
            without.code == 200 && without.text.contains("[+]kms-providers excluded: ok\n"),
            "{}",
            without.text
        );
    }
    assert_eq!(program.server.get("/livez").await.text, "ok", "a restart does not help it");
    let metrics = program.server.get("/metrics").await.text;
    assert!(metrics.contains("encryption_kms_healthy{provider_name=\"vault\"} 0"), "{metrics}");
    program.stop().await;
    drop(running);
    let program = Program::start(dir.path(), &config).await;
    assert_eq!(program.server.get(&format!("{SECRETS}/s3")).await.code, 500);
    // Which key it would use now, nobody knows: it is not said that nothing is under an old one.
    let status = program.server.get("/encryption").await.body;
    assert!(status["problems"][0].is_string() && status["stale"].is_null(), "{status}");
    let under = status["objects"].as_array().into_iter().flatten().find(|o| o["key"] == "kms/vault/key-2");
    assert!(under.is_some_and(|o| o["stale"].is_null() && o["objects"].as_u64() >= Some(20)), "{status}");
    let metrics = program.server.get("/metrics").await.text;
    assert!(metrics.contains("cellway_apiserver_encryption_stale_objects -1\n"), "{metrics}");
    assert!(metrics.contains("encryption_failures_total{operation=\"decrypt\"} "), "{metrics}");
    let open = json!({"metadata": {"name": "open"}});
    assert_eq!(
        program.server.call("POST", "/api/v1/namespaces/default/configmaps", Some(&open)).await.code,
        201
    );
    program.stop().await;
}

/// Waits until the collector, and what else follows the store, has come to what is made now.
async fn settled(server: &Server, mark: &str) {
    let map = json!({"metadata": {"name": mark, "ownerReferences": [
        {"apiVersion": "v1", "kind": "ConfigMap", "name": "nobody", "uid": "b5a7"}]}});
    assert_eq!(server.call("POST", MAPS, Some(&map)).await.code, 201);
    server.until(&format!("{MAPS}/{mark}"), "what has no owner is collected", |a| a.code == 404).await;
}

async fn dependent(server: &Server, name: &str, owner: &Value) {
    let map = json!({"metadata": {"name": name, "ownerReferences": [{"apiVersion": "v1", "kind": "Secret",
        "name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"]}]}});
    assert_eq!(server.call("POST", MAPS, Some(&map)).await.code, 201);
}

#[tokio::test]
async fn nothing_is_lost_while_a_plugin_is_away() {
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("kms.sock");
    let plugin = KmsPlugin::default();
    let running = plugin.serve(&socket).expect("a socket");
    let config = dir.path().join("encryption.yaml");
    let kms = format!(
        "{{kms: {{apiVersion: v2, name: vault, endpoint: 'unix://{}', timeout: 5s}}}}",
        socket.display()
    );
    write(&config, &kms);
    let program = Program::start(dir.path(), &config).await;
    for name in ["owner", "spoilt", "kept"] {
        create(&program.server, name).await;
    }
    let owner = program.server.get(&format!("{SECRETS}/owner")).await.body;
    dependent(&program.server, "before", &owner).await;
    program.stop().await;
    // It starts without the plug-in: the owner cannot be read, and is not gone for that.
    drop(running);
    let program = Program::start(dir.path(), &config).await;
    let server = &program.server;
    assert_eq!(server.get(&format!("{SECRETS}/owner")).await.code, 500);
    settled(server, "first-mark").await;
    assert_eq!(server.get(&format!("{MAPS}/before")).await.code, 200);
    // A deletion that has to know all dependents waits until they can be read.
    let map = json!({"metadata": {"name": "parent"}});
    assert_eq!(server.call("POST", MAPS, Some(&map)).await.code, 201);
    let orphan = json!({"propagationPolicy": "Orphan"});
    server.call("DELETE", &format!("{MAPS}/parent"), Some(&orphan)).await;
    // Other things go on: a new namespace has its service account.
    let shop = json!({"metadata": {"name": "shop"}});
    assert_eq!(server.call("POST", "/api/v1/namespaces", Some(&shop)).await.code, 201);
    let account = "/api/v1/namespaces/shop/serviceaccounts/default";
    server.until(account, "the namespace's account", |a| a.code == 200).await;
    settled(server, "second-mark").await;
    assert_eq!(server.get(&format!("{MAPS}/parent")).await.code, 200);
    // What nobody will ever read again can be deleted, by who says so, and nothing else can be that way.
    let spoilt = format!("{SECRETS}/spoilt");
    assert_eq!(server.call("DELETE", &spoilt, None).await.code, 500);
    let unsafely = "ignoreStoreReadErrorWithClusterBreakingPotential";
    let both = json!({unsafely: true, "propagationPolicy": "Background"});
    let refused = server.call("DELETE", &spoilt, Some(&both)).await;
    assert_eq!(refused.code, 422, "{}", refused.text);
    assert!(refused.text.contains("cannot be set together with .propagationPolicy"), "{}", refused.text);
    let refused = server.call("DELETE", SECRETS, Some(&json!({unsafely: true}))).await;
    assert!(refused.text.contains("is not allowed with DELETECOLLECTION"), "{}", refused.text);
    let refused = server.call("DELETE", &format!("{MAPS}/before"), Some(&json!({unsafely: true}))).await;
    assert_eq!(refused.code, 422, "{}", refused.text);
    assert!(refused.text.contains("is exclusively used to delete corrupt object(s)"), "{}", refused.text);
    let gone = server.call("DELETE", &format!("{spoilt}?{unsafely}=true"), None).await;
    assert_eq!(gone.code, 200, "{}", gone.text);
    assert_eq!(server.get(&spoilt).await.code, 404);
    // With the plug-in everything is there again, also for objects that are made then.
    let _running = plugin.serve(&socket).expect("a socket");
    server.until(&format!("{SECRETS}/owner"), "the Secret can be read", |a| a.code == 200).await;
    dependent(server, "after", &owner).await;
    settled(server, "third-mark").await;
    for name in ["before", "after"] {
        assert_eq!(server.get(&format!("{MAPS}/{name}")).await.code, 200, "{name}");
    }
    server.until(&format!("{MAPS}/parent"), "the deletion that waited", |a| a.code == 404).await;
    // And collection works: with the owner they go.
    assert_eq!(server.call("DELETE", &format!("{SECRETS}/owner"), None).await.code, 200);
    for name in ["before", "after"] {
        server.until(&format!("{MAPS}/{name}"), "it goes with its owner", |a| a.code == 404).await;
    }
    readable(server, "kept").await;
    program.stop().await;
}

/// What docs/security.md says of database servers: encrypted from the first start nothing of a Secret is in any of their
/// files; what was there before is not in the tables' files after a rewrite, though in the server's own logs.
async fn a_servers_files(kind: Kind) {
    const BEFORE: &str = "written-before-anybody-thought-of-encryption";
    let mut database = test_support::require!(Database::start(kind).await.expect("a server"));
    let url = database.database().await.expect("a database");
    let dir = tempfile::tempdir().expect("a directory");
    let config = dir.path().join("encryption.yaml");
    let encrypted = format!("{{secretbox: {{keys: [{}]}}}}, {{identity: {{}}}}", key("box", 'A'));
    write(&config, &encrypted);
    let program = Program::start_on(Some(&url), dir.path(), &config).await;
    for n in 0..20 {
        create(&program.server, &format!("s{n}")).await;
    }
    let open = json!({"metadata": {"name": "open"}, "data": {"k": "nothing-to-hide"}});
    assert_eq!(program.server.call("POST", MAPS, Some(&open)).await.code, 201);
    program.stop().await;
    database.stop().await.expect("stopped");
    assert!(
        !found_in(database.data(), &["nothing-to-hide".to_owned()]).is_empty(),
        "the search finds what is there"
    );
    assert_eq!(found_in(database.data(), &words()), BTreeSet::new());

    database.restart().await.expect("started");
    write(&config, &format!("{{identity: {{}}}}, {{secretbox: {{keys: [{}]}}}}", key("box", 'A')));
    let program = Program::start_on(Some(&url), dir.path(), &config).await;
    for n in 0..20 {
        let secret = json!({"metadata": {"name": format!("before-{n}")}, "stringData": {"password": BEFORE}});
        assert_eq!(program.server.call("POST", SECRETS, Some(&secret)).await.code, 201);
    }
    if kind == Kind::Postgres {
        // As the server does by itself now and then, with samples of what is in the columns.
        database.run("ANALYZE test_0.store_log").await.expect("analysed");
    }
    write(&config, &encrypted);
    let done = rewrite(&program.server).await;
    assert_eq!(done["rewritten"], 20, "{done}");
    program.stop().await;
    database.stop().await.expect("stopped");
    let tables = database.data().join(match kind {
        Kind::Postgres => "base",
        Kind::MariaDb | Kind::MySql => "test_0",
        // Its files are of all tables.
        Kind::OceanBase => "store",
    });
    assert!(tables.is_dir());
    assert_eq!(found_in(&tables, &words_of(BEFORE)), BTreeSet::new());
    assert_eq!(found_in(database.data(), &words()), BTreeSet::new());
}

#[tokio::test]
async fn a_secret_is_in_no_file_of_mariadb() {
    a_servers_files(Kind::MariaDb).await;
}

#[tokio::test]
async fn a_secret_is_in_no_file_of_postgresql() {
    a_servers_files(Kind::Postgres).await;
}
