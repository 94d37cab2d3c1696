//! Credentials that the hub holds for a member, rotated while they are used.

use std::sync::atomic::Ordering;

use base64::Engine as _;
use serde_json::{Value, json};

use crate::world::{DEPLOYMENTS, World, condition, federated, is_true, options, template};

const CLUSTERS: &str = "core.kubefed.io/kubefedclusters";
const NAMESPACE: &str = "kube-federation-system";
const CA: &str = "-----BEGIN CERTIFICATE-----\nca\n-----END CERTIFICATE-----\n";

fn secret(token: &str) -> Value {
    let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "x-access", "namespace": NAMESPACE,
            "labels": {"cellway.io/credential-of": "x"}},
        "data": {"token": encode(token), "ca.crt": encode(CA)}})
}

/// Reason and message of the condition that speaks of credentials.
fn credentials(world: &World) -> Option<(String, String)> {
    let cluster = world.hub.get(CLUSTERS, NAMESPACE, "x")?;
    let conditions = cluster["status"]["conditions"].as_array()?.clone();
    let found = conditions.into_iter().find(|one| one["type"] == "CredentialsValid")?;
    let text = |field: &str| found[field].as_str().unwrap_or_default().to_owned();
    Some((text("reason"), text("message")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_rotated_in_use_and_a_wrong_one_breaks_nothing() {
    let mut world = World::stopped();
    let member = |world: &World| std::sync::Arc::clone(&world.members["x"]);
    *member(&world).tokens.lock() = vec!["sesame-one".into()];
    world
        .hub
        .edit(CLUSTERS, NAMESPACE, "x", |cluster| cluster["spec"]["secretRef"] = json!({"name": "x-access"}));
    world.run(options());
    world
        .until("the missing secret is told", || {
            credentials(&world)
                .filter(|(_, message)| message.contains("x-access") && message.contains("not exist"))
        })
        .await;
    world.hub.put("/secrets", NAMESPACE, "x-access", Some(secret("sesame-one")));
    let object = federated("FederatedDeployment", &["a", "c"], template("web:1", 2));
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(object));
    world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    let users = member(&world).users();
    assert!(users.iter().all(|user| user == "Bearer sesame-one"), "{users:?}");

    // One that the member does not take: what runs goes on.
    let failed = member(&world).refused.load(Ordering::Relaxed);
    world
        .hub
        .edit("/secrets", NAMESPACE, "x-access", |value| value["data"] = secret("wrong")["data"].clone());
    world
        .until("it is told", || credentials(&world).filter(|(reason, _)| reason == "NewCredentialRefused"))
        .await;
    world.edit(|object| object["spec"]["template"] = template("web:2", 2));
    world.settled(DEPLOYMENTS, "it is written all the same", |status| is_true(status, "Ready")).await;
    assert!(member(&world).refused.load(Ordering::Relaxed) > failed, "it was tried");

    // The next one is good, and only afterwards is the old one withdrawn: no request fails for it.
    *member(&world).tokens.lock() = vec!["sesame-one".into(), "sesame-two".into()];
    world.hub.edit("/secrets", NAMESPACE, "x-access", |value| {
        value["data"] = secret("sesame-two")["data"].clone()
    });
    let version =
        world.hub.get("/secrets", NAMESPACE, "x-access").expect("secret")["metadata"]["resourceVersion"]
            .as_str()
            .expect("version")
            .to_owned();
    let taken = format!("x-access, version {version}");
    world
        .until("it is taken", || {
            credentials(&world).filter(|(reason, message)| reason == "Accepted" && message.ends_with(&taken))
        })
        .await;
    let failed = member(&world).refused.load(Ordering::Relaxed);
    *member(&world).tokens.lock() = vec!["sesame-two".into()];
    world.edit(|object| object["spec"]["template"] = template("web:3", 2));
    world.settled(DEPLOYMENTS, "it is written with the new one", |status| is_true(status, "Ready")).await;
    assert_eq!(member(&world).refused.load(Ordering::Relaxed), failed);

    // Nothing at the hub shows it but the Secret.
    let shown: String = [(CLUSTERS, NAMESPACE, "x"), (DEPLOYMENTS, "shop", "web")]
        .iter()
        .filter_map(|(resource, namespace, name)| world.hub.get(resource, namespace, name))
        .map(|value| value.to_string())
        .collect();
    assert!(!shown.contains("sesame"), "{shown}");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn one_secret_that_cannot_be_read_is_one_members_trouble() {
    let mut world = World::stopped();
    for name in ["x", "y"] {
        *world.members[name].tokens.lock() = vec![format!("sesame-{name}")];
        let access = format!("{name}-access");
        world.hub.edit(CLUSTERS, NAMESPACE, name, |cluster| {
            cluster["spec"]["secretRef"] = json!({"name": access})
        });
        let mut value = secret(&format!("sesame-{name}"));
        value["metadata"]["name"] = access.clone().into();
        value["metadata"]["labels"]["cellway.io/credential-of"] = name.into();
        world.hub.put("/secrets", NAMESPACE, &access, Some(value));
    }
    world.hub.sealed.lock().push("y-access".into());
    world.run(options());
    let says = |name: &str, type_: &str| {
        let cluster = world.hub.get(CLUSTERS, NAMESPACE, name)?;
        let conditions = cluster["status"]["conditions"].as_array()?;
        let found = conditions.iter().find(|one| one["type"] == type_)?;
        Some((found["status"] == "True", found["message"].as_str().unwrap_or_default().to_owned()))
    };
    let ready = |name: &str| says(name, "Ready").filter(|(ready, _)| *ready);
    world.until("x is ready", || ready("x")).await;
    let told = || {
        says("y", "CredentialsValid").filter(|(valid, why)| {
            !valid && why.contains("y-access that spec.secretRef names cannot be read")
        })
    };
    world.until("of y it is told why it is not", told).await;
    // One that cannot be read from now on goes on being used where it was.
    world.hub.sealed.lock().push("x-access".into());
    world.hub.compact(|_| {});
    tokio::time::sleep(std::time::Duration::from_secs(60)).await;
    assert!(ready("x").is_some());
    world.hub.sealed.lock().clear();
    tokio::time::sleep(std::time::Duration::from_secs(120)).await;
    assert!(ready("x").is_some() && ready("y").is_some(), "it is found out that it can be read");
    world.stop().await;
}

/// A member with a token, and a controller that uses it.
async fn with_token() -> World {
    let mut world = World::stopped();
    *world.members["x"].tokens.lock() = vec!["sesame".into()];
    world
        .hub
        .edit(CLUSTERS, NAMESPACE, "x", |cluster| cluster["spec"]["secretRef"] = json!({"name": "x-access"}));
    world.hub.put("/secrets", NAMESPACE, "x-access", Some(secret("sesame")));
    world.run(options());
    let object = federated("FederatedDeployment", &["a", "c"], template("web:1", 2));
    world.hub.put(DEPLOYMENTS, "shop", "web", Some(object));
    world.settled(DEPLOYMENTS, "it is ready", |status| is_true(status, "Ready")).await;
    world
}

fn offline(world: &World) -> Option<bool> {
    let cluster = world.hub.get(CLUSTERS, NAMESPACE, "x")?;
    Some(condition(&cluster, "Offline")? == "True")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_secret_is_not_taken_because_the_tunnel_is_lost() {
    let mut world = with_token().await;
    world.tunnel("x", false);
    world.until("x is away", || offline(&world).filter(|offline| *offline)).await;
    world
        .hub
        .edit("/secrets", NAMESPACE, "x-access", |value| value["data"] = secret("wrong")["data"].clone());
    world.tunnel("x", true);
    world.until("x is back with what it took before", || offline(&world).filter(|offline| !offline)).await;
    world
        .until("the new one is refused", || {
            credentials(&world).filter(|(reason, _)| reason == "NewCredentialRefused")
        })
        .await;
    world.edit(|object| object["spec"]["template"] = template("web:2", 2));
    world.settled(DEPLOYMENTS, "it is written all the same", |status| is_true(status, "Ready")).await;
    // Once the old one is withdrawn, whatever the Secret says is the credential.
    *world.members["x"].tokens.lock() = vec!["wrong".into()];
    world
        .until("the new one is taken", || credentials(&world).filter(|(reason, _)| reason == "Accepted"))
        .await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secret_that_is_deleted_or_not_named_any_more_is_not_used() {
    let mut world = with_token().await;
    world.hub.put("/secrets", NAMESPACE, "x-access", None);
    world
        .until("it is told", || credentials(&world).filter(|(_, message)| message.contains("does not exist")))
        .await;
    let used = || world.member("x").users().iter().filter(|user| user.contains("sesame")).count();
    let before = used();
    world.edit(|object| object["spec"]["template"] = template("web:2", 2));
    let reached = |status: &federation_core::api::FederatedStatus| {
        status.units.iter().any(|unit| unit.name == "c" && unit.revision == status.current_revision)
    };
    world.settled(DEPLOYMENTS, "the other member has it", reached).await;
    assert_eq!(used(), before, "the member was not asked anything with it");
    world.hub.put("/secrets", NAMESPACE, "x-access", Some(secret("sesame")));
    world.settled(DEPLOYMENTS, "with the Secret back it is ready", |status| is_true(status, "Ready")).await;

    // Without a reference the gateway is the way, and it asks for no token.
    world.member("x").tokens.lock().clear();
    world.hub.edit(CLUSTERS, NAMESPACE, "x", |cluster| {
        cluster["spec"].as_object_mut().expect("spec").remove("secretRef");
    });
    world
        .until("the gateway is used", || {
            world.member("x").users().last().filter(|user| !user.contains("sesame")).map(drop)
        })
        .await;
    let before = used();
    world.edit(|object| object["spec"]["template"] = template("web:3", 2));
    world.settled(DEPLOYMENTS, "it is written through the gateway", |status| is_true(status, "Ready")).await;
    assert_eq!(used(), before);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secret_of_another_cluster_goes_nowhere() {
    let mut world = World::stopped();
    *world.members["x"].tokens.lock() = vec!["sesame".into()];
    let mut foreign = secret("sesame");
    foreign["metadata"]["labels"] = json!({"cellway.io/credential-of": "y"});
    world.hub.put("/secrets", NAMESPACE, "x-access", Some(foreign));
    world
        .hub
        .edit(CLUSTERS, NAMESPACE, "x", |cluster| cluster["spec"]["secretRef"] = json!({"name": "x-access"}));
    world.run(options());
    world
        .until("it is told", || {
            credentials(&world).filter(|(_, message)| message.contains("credential-of=x"))
        })
        .await;
    assert!(world.member("x").users().iter().all(|user| !user.contains("sesame")));
    world.stop().await;
}
