//! Credentials that the hub holds: TLS to a member's API server through a real agent, with tokens and with a client
//! certificate, rotated while they are used, and nowhere to be read at the hub.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use anyhow::{Context as _, Result, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use e2e_tests::{Fleet, LIMIT, Options, counter, errors, needs, run};
use serde_json::{Value, json};
use test_support::{TestDir, netns::MEMBER_INSIDE, require, wait_until};

const HOME: &str = "kube-federation-system";
const OBJECT: &str = r"
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: types.kubefed.io/v1beta2
kind: FederatedConfigMap
metadata: {name: counter, namespace: shop}
spec:
  topologyType: cluster
  template: {data: {n: '0'}}
  placement: {units: [{name: west}]}
";

/// kubectl in the member's own network, as its administrator.
async fn inside(fleet: &Fleet, kubeconfig: &PathBuf, args: &[&str]) -> Result<String> {
    let mut command = fleet.star.member(0).command(&fleet.needs.kubectl);
    command.env("HOME", fleet.dir.path()).arg("--kubeconfig").arg(kubeconfig).args(args);
    let output = run(command, None).await?;
    ensure!(output.status.success(), "`kubectl {}` in the member: {}", args.join(" "), errors(&output));
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Writes the Secret and returns its version.
async fn set_secret(fleet: &Fleet, data: &Value) -> Result<String> {
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "data": data,
        "metadata": {"name": "west-access", "namespace": HOME, "labels": {"cellway.io/credential-of": "west"}}});
    fleet.apply(&secret.to_string()).await?;
    let stored = fleet.get(None, &["-n", HOME, "secret", "west-access"]).await?;
    Ok(stored["metadata"]["resourceVersion"].as_str().context("no version")?.to_owned())
}

/// Waits until the condition `CredentialsValid` of `west` has this status, and this in its message.
async fn credentials(fleet: &Fleet, status: &str, message: &str) -> Result<()> {
    wait_until(
        || async {
            let cluster = fleet.get(None, &["-n", HOME, "kubefedcluster", "west"]).await?;
            let conditions = cluster["status"]["conditions"].as_array().context("no conditions")?;
            let found =
                conditions.iter().find(|one| one["type"] == "CredentialsValid").context("not there")?;
            let said = found["message"].as_str().unwrap_or_default();
            ensure!(found["status"] == status && said.contains(message), "{found}");
            anyhow::Ok(())
        },
        LIMIT,
        format_args!("CredentialsValid={status} with {message:?}"),
    )
    .await
    .with_context(|| fleet.hub_log())
}

/// The hub's Secrets are encrypted at rest with a key of this test's.
const ENCRYPTION: &str = r"
apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
- resources: [secrets]
  providers:
  - aesgcm: {keys: [{name: one, secret: 'MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY='}]}
";

/// Files of the hub, its log and the agent's among them, that hold one of these texts.
fn files_with(fleet: &Fleet, texts: &[String]) -> Result<BTreeSet<PathBuf>> {
    let paths = [fleet.hub_dir(), fleet.dir.join("hub.log"), fleet.dir.join("west.log")];
    Ok(test_support::files_with(&paths, texts)?)
}

/// The controller's writes into `west` that were taken, and those that failed.
async fn writes(fleet: &Fleet) -> Result<(f64, f64)> {
    let metrics = fleet.metrics().await?;
    let of = |outcome: &str| {
        let labels = [r#"cluster="west""#, &format!("outcome={outcome:?}")];
        counter(&metrics, "cellway_federation_member_writes_total", &labels).abs()
    };
    Ok((of("Done"), of("Failed")))
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_and_certificates_are_rotated_in_use() -> Result<()> {
    let needs = require!(needs());
    let api = format!("{MEMBER_INSIDE}:6443");
    let keys = TestDir::new("e2e-keys")?;
    let encryption = keys.join("encryption.yaml");
    std::fs::write(&encryption, ENCRYPTION)?;
    let options = Options {
        hub: vec![format!("--encryption-provider-config={}", encryption.display())],
        member: vec!["--api-port=6443".into(), format!("--allow={api}")],
    };
    let fleet = Arc::new(Fleet::start(needs, &["west"], options).await?);
    let admin = fleet.dir.join("west").join("admin.kubeconfig");
    let view = inside(&fleet, &admin, &["config", "view", "--raw", "-o", "json"]).await?;
    let view: Value = serde_json::from_str(&view)?;
    let (cluster, user) = (&view["clusters"][0]["cluster"], &view["users"][0]["user"]);
    let ca = cluster["certificate-authority-data"].clone();
    ensure!(ca.is_string() && user["client-key-data"].is_string(), "the kubeconfig holds no certificates");
    for name in ["hub-one", "hub-two"] {
        inside(&fleet, &admin, &["create", "serviceaccount", name]).await?;
        let account = format!("--serviceaccount=default:{name}");
        let binding = ["create", "clusterrolebinding", name, "--clusterrole=cluster-admin", &account];
        inside(&fleet, &admin, &binding).await?;
    }
    let token = |name: &'static str| {
        let (fleet, admin, ca) = (Arc::clone(&fleet), admin.clone(), ca.clone());
        async move {
            let token = inside(&fleet, &admin, &["create", "token", name]).await?;
            anyhow::Ok(json!({"token": STANDARD.encode(token), "ca.crt": ca}))
        }
    };

    // Each credential as it is used and as it is stored.
    let mut secrets = Vec::new();
    let mut remember = |stored: &Value| -> Result<()> {
        let stored = stored.as_str().context("no text")?;
        let used = String::from_utf8(STANDARD.decode(stored)?)?;
        // Of a PEM file the lines of its key.
        let lines = used.lines().filter(|line| line.len() > 40 && !line.starts_with("-----"));
        secrets.extend(lines.map(str::to_owned).chain([stored.to_owned()]));
        Ok(())
    };
    let first = token("hub-one").await?;
    remember(&first["token"])?;
    remember(&user["client-key-data"])?;
    let version = set_secret(&fleet, &first).await?;
    let patch =
        json!({"spec": {"secretRef": {"name": "west-access"}, "apiEndpoint": format!("https://{api}")}});
    fleet
        .kubectl(&["-n", HOME, "patch", "kubefedcluster", "west", "--type=merge", "-p", &patch.to_string()])
        .await?;
    credentials(&fleet, "True", &format!("version {version}")).await?;
    fleet.apply(OBJECT).await?;

    // From now on the object changes all the time, and each change is to arrive.
    let (stop, arrived) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let writer = {
        let (fleet, stop, arrived) = (Arc::clone(&fleet), Arc::clone(&stop), Arc::clone(&arrived));
        let admin = admin.clone();
        tokio::spawn(async move {
            let mut n = 0;
            while !stop.load(Ordering::Relaxed) {
                n += 1;
                let patch = json!({"spec": {"template": {"data": {"n": n.to_string()}}}}).to_string();
                let object =
                    ["-n", "shop", "patch", "federatedconfigmap", "counter", "--type=merge", "-p", &patch];
                fleet.kubectl(&object).await?;
                let look = ["-n", "shop", "get", "configmap", "counter", "-o", "jsonpath={.data.n}"];
                let what = format!("change {n} to arrive");
                wait_until(
                    || async {
                        let found = inside(&fleet, &admin, &look).await?;
                        ensure!(found == n.to_string(), "it holds {found}");
                        anyhow::Ok(())
                    },
                    LIMIT,
                    &what,
                )
                .await?;
                arrived.store(n, Ordering::Relaxed);
            }
            anyhow::Ok(n)
        })
    };
    let goes_on = || async {
        let before = arrived.load(Ordering::Relaxed);
        test_support::wait_for(|| arrived.load(Ordering::Relaxed) >= before + 2, LIMIT, "two more changes")
            .await
    };
    goes_on().await?;

    // One token, then the client certificate, then another token; each is withdrawn when the next one is in use.
    let pair =
        json!({"tls.crt": user["client-certificate-data"], "tls.key": user["client-key-data"], "ca.crt": ca});
    let version = set_secret(&fleet, &pair).await?;
    credentials(&fleet, "True", &format!("version {version}")).await?;
    inside(&fleet, &admin, &["delete", "serviceaccount", "hub-one"]).await?;
    goes_on().await?;
    let third = token("hub-two").await?;
    remember(&third["token"])?;
    let version = set_secret(&fleet, &third).await?;
    credentials(&fleet, "True", &format!("version {version}")).await?;
    goes_on().await?;
    // A wrong one is told and not taken.
    let wrong = json!({"token": STANDARD.encode("no-such-token"), "ca.crt": ca});
    set_secret(&fleet, &wrong).await?;
    credentials(&fleet, "False", "the one before stays").await?;
    goes_on().await?;
    let (done, failed) = writes(&fleet).await?;
    ensure!(done > 0.0 && failed == 0.0, "{done} writes were taken, and {failed} failed");
    let version = set_secret(&fleet, &token("hub-two").await?).await?;
    credentials(&fleet, "True", &format!("version {version}")).await?;
    stop.store(true, Ordering::Relaxed);
    let changes = writer.await??;
    println!(
        "{changes} changes arrived over three credentials; {done} writes were taken and {failed} failed"
    );

    // They are in no file of the hub's in a form that can be read, the database and the logs among them; what is looked for
    // would be found.
    ensure!(secrets.iter().all(|text| text.len() > 40), "too short to look for");
    let found = files_with(&fleet, &secrets)?;
    ensure!(found.is_empty(), "credentials can be read in {found:?}");
    let public =
        ca.as_str().map(str::to_owned).into_iter().chain(["west-access".to_owned()]).collect::<Vec<_>>();
    let found = files_with(&fleet, &public)?;
    ensure!(found.iter().any(|path| path.to_string_lossy().contains("store.db")), "only {found:?}");

    // It is this credential, and nothing else, that opens the member.
    inside(&fleet, &admin, &["delete", "serviceaccount", "hub-two"]).await?;
    credentials(&fleet, "False", "the member refuses the hub").await?;
    // Without it the agent's own is used again.
    let patch = r#"{"spec":{"secretRef":null}}"#;
    fleet.kubectl(&["-n", HOME, "patch", "kubefedcluster", "west", "--type=merge", "-p", patch]).await?;
    credentials(&fleet, "True", "takes the hub's requests").await?;
    Ok(())
}
