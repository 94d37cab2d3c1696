//! Objects that are larger than most.

use k8s_openapi::api::apps::v1::Deployment;
use kube::Api;
use kube::api::{ListParams, PostParams};
use serde_json::{Value, json};

use federation_core::api::{FederatedRevision, Phase};

use crate::world::{World, federated, is_true, template, until};

/// More than a mebibyte, which is more than etcd is usually given and less than it refuses.
const LARGE: usize = 1200 << 10;
/// More than a request may be.
const TOO_LARGE: usize = 4 << 20;

fn with_value(length: usize, last: char) -> Value {
    let mut value = "x".repeat(length);
    value.push(last);
    let mut template = template("web:1", 0);
    template["spec"]["template"]["spec"]["containers"][0]["env"] = json!([{"name": "A", "value": value}]);
    template
}

/// The object and two revisions of it, in the hub and in a member. What a member does not take is one unit's failure and its
/// own words; what the hub does not take is the client's error, and nobody else notices.
pub(crate) async fn an_object_of_more_than_a_mebibyte(world: World) {
    world.create(0, federated("FederatedDeployment", &["a", "c"], with_value(LARGE, '1'))).await;
    let last = async |client: &kube::Client, name: &str| -> Option<(usize, char)> {
        let api: Api<Deployment> = Api::namespaced(client.clone(), "shop");
        let pod = api.get(name).await.ok()?.spec.template.spec?;
        let value = pod.containers[0].env.as_ref()?[0].value.clone()?;
        Some((value.len(), value.chars().last()?))
    };
    let everywhere = async |wanted: char| {
        for (client, name) in [(&world.x, "web-a"), (&world.y, "web-c")] {
            let arrived = async || last(client, name).await.filter(|found| *found == (LARGE + 1, wanted));
            until("it has arrived", arrived).await;
        }
    };
    everywhere('1').await;
    world.patch(0, json!({"spec": {"template": with_value(LARGE, '2')}})).await;
    everywhere('2').await;
    world.settled(0, "it is propagated", |status| is_true(status, "Propagated")).await;
    let revisions: Api<FederatedRevision> = Api::namespaced(world.hub.clone(), "shop");
    let stored = async || {
        let found = revisions.list(&ListParams::default()).await.ok()?.items.len();
        (found == 2).then_some(())
    };
    until("both revisions are kept", stored).await;

    // A config map may not be so large; its federated object may.
    let data = json!({"data": {"k": "x".repeat(LARGE)}});
    world.create(1, federated("FederatedConfigMap", &["a"], data)).await;
    let status = world
        .settled(1, "the member refuses it", |status| {
            status.units.iter().any(|unit| unit.phase == Phase::Failed)
        })
        .await;
    let message = status.units[0].message.clone().unwrap_or_default();
    assert!(message.contains("1048576") && message.len() < 2000, "{message}");

    let mut object = federated("FederatedConfigMap", &["a"], json!({"data": {"k": "x".repeat(TOO_LARGE)}}));
    object["metadata"]["name"] = "larger".into();
    let object = serde_json::from_value(object).expect("object");
    match world.objects(1).create(&PostParams::default(), &object).await {
        Err(kube::Error::Api(status)) => assert_eq!(status.code, 413, "{status:?}"),
        // A client that is still sending may meet the end of the connection before it reads the answer (RFC 9112,
        // section 9.6).
        Err(kube::Error::Service(_) | kube::Error::HyperError(_)) => {}
        other => panic!("it was taken: {other:?}"),
    }
    let found = world.objects(1).get_opt("larger").await;
    assert!(matches!(found, Ok(None)), "it was taken: {found:?}");
    world.patch(1, json!({"spec": {"template": {"data": {"k": "v"}}}})).await;
    world.settled(1, "the smaller one is taken", |status| is_true(status, "Ready")).await;
    world.end().await;
}
