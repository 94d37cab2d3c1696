//! What goes with its owner, its namespace or its definition, and what stays.

mod common;

use common::Server;
use serde_json::{Value, json};

const CM: &str = "/api/v1/namespaces/default/configmaps";
const CRDS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
const WIDGETS: &str = "/apis/example.com/v1/namespaces/default/widgets";

fn cm(name: &str) -> Value {
    json!({"metadata": {"name": name}})
}

fn crd() -> Value {
    json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "widgets.example.com"},
        "spec": {"group": "example.com", "scope": "Namespaced", "names": {"plural": "widgets", "kind": "Widget"},
            "versions": [
                {"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema":
                    {"type": "object", "properties": {"spec": {"type": "object", "properties": {"size": {"type": "integer"}}}}}}},
                {"name": "v1beta1", "served": true, "storage": false, "schema": {"openAPIV3Schema":
                    {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}]}})
}

#[tokio::test]
async fn who_has_another_owner_stays() {
    let server = Server::hub().await;
    let owned = |name: &str, owners: &[(&Value, bool)]| {
        let mut map = cm(name);
        let of = |(owner, block): &(&Value, bool)| {
            json!({"apiVersion": "v1", "kind": "ConfigMap", "name": owner["metadata"]["name"],
                "uid": owner["metadata"]["uid"], "blockOwnerDeletion": block})
        };
        map["metadata"]["ownerReferences"] = owners.iter().map(of).collect();
        map
    };
    let foreground = json!({"propagationPolicy": "Foreground"});
    for block in [true, false] {
        let one = server.call("POST", CM, Some(&cm("one"))).await.body;
        let two = server.call("POST", CM, Some(&cm("two"))).await.body;
        let both = owned("both", &[(&one, block), (&two, true)]);
        assert_eq!(server.call("POST", CM, Some(&both)).await.code, 201);
        // Foreground: the one goes, the reference to it with it, the other one's dependent stays.
        server.call("DELETE", &format!("{CM}/one"), Some(&foreground)).await;
        server.until(&format!("{CM}/one"), "the owner is gone", |a| a.code == 404).await;
        let left = server
            .until(&format!("{CM}/both"), "one owner is left", |a| {
                a.code != 200
                    || a.body["metadata"]["ownerReferences"].as_array().is_some_and(|o| o.len() == 1)
            })
            .await;
        assert_eq!(left.body["metadata"]["ownerReferences"][0]["name"], "two", "{}", left.text);
        // With the last owner it goes.
        server.call("DELETE", &format!("{CM}/two"), Some(&foreground)).await;
        server.until(&format!("{CM}/both"), "it has no owner", |a| a.code == 404).await;
        server.until(&format!("{CM}/two"), "nothing is left to wait for", |a| a.code == 404).await;
    }
    // Both at once: neither keeps it.
    let one = server.call("POST", CM, Some(&cm("one"))).await.body;
    let two = server.call("POST", CM, Some(&cm("two"))).await.body;
    let held = |object: Value| {
        let mut object = object;
        object["metadata"]["finalizers"] = json!(["test.io/hold"]);
        object
    };
    let both = held(owned("both", &[(&one, true), (&two, true)]));
    assert_eq!(server.call("POST", CM, Some(&both)).await.code, 201);
    for name in ["one", "two"] {
        server.call("DELETE", &format!("{CM}/{name}"), Some(&foreground)).await;
    }
    // It may have lost one of the references before both were deleted.
    server
        .until(&format!("{CM}/both"), "it is deleted", |a| {
            a.body["metadata"]["deletionTimestamp"].is_string()
        })
        .await;
    let free = json!({"metadata": {"finalizers": null}});
    assert_eq!(server.call("PATCH", &format!("{CM}/both"), Some(&free)).await.code, 200);
    for name in ["both", "one", "two"] {
        server.until(&format!("{CM}/{name}"), "all are gone", |a| a.code == 404).await;
    }
    // Two that own each other do not wait for each other for ever.
    let first = server.call("POST", CM, Some(&cm("first"))).await.body;
    let second = server.call("POST", CM, Some(&owned("second", &[(&first, true)]))).await.body;
    let ring = json!({"metadata": {"ownerReferences": owned("x", &[(&second, true)])["metadata"]["ownerReferences"]}});
    assert_eq!(server.call("PATCH", &format!("{CM}/first"), Some(&ring)).await.code, 200);
    server.call("DELETE", &format!("{CM}/first"), Some(&foreground)).await;
    for name in ["first", "second"] {
        server.until(&format!("{CM}/{name}"), "the ring is gone", |a| a.code == 404).await;
    }
    // Where nobody can tell whether the owner is there, nothing goes.
    let mut orphan = cm("orphan");
    let mut strange = cm("strange");
    orphan["metadata"]["ownerReferences"] =
        json!([{"apiVersion": "v1", "kind": "ConfigMap", "name": "nobody", "uid": "7f9b"}]);
    strange["metadata"]["ownerReferences"] =
        json!([{"apiVersion": "nobody.example.com/v1", "kind": "Thing", "name": "t", "uid": "7f9c"}]);
    assert_eq!(server.call("POST", CM, Some(&strange)).await.code, 201);
    assert_eq!(server.call("POST", CM, Some(&orphan)).await.code, 201);
    server.until(&format!("{CM}/orphan"), "its owner never was", |a| a.code == 404).await;
    assert_eq!(server.get(&format!("{CM}/strange")).await.code, 200);
    server.stop().await;
}

/// Waits until the collector has done what was to be done before.
async fn settled(server: &Server) {
    // The second is not of the same round as what was before the first.
    for mark in ["first-mark", "second-mark"] {
        let mut map = cm(mark);
        map["metadata"]["ownerReferences"] =
            json!([{"apiVersion": "v1", "kind": "ConfigMap", "name": "nobody", "uid": "7f9b"}]);
        assert_eq!(server.call("POST", CM, Some(&map)).await.code, 201);
        server.until(&format!("{CM}/{mark}"), "what has no owner is collected", |a| a.code == 404).await;
    }
}

#[tokio::test]
async fn who_comes_at_once_into_a_namespace_or_a_definition_made_anew_stays() {
    // So many that their events take the collector longer than a client needs.
    const MANY: usize = 200;
    let server = Server::hub().await;
    let maps = CM.replace("/default/", "/shop/");
    let shop = json!({"metadata": {"name": "shop"}});
    let namespace = "/api/v1/namespaces/shop";
    assert_eq!(server.call("POST", "/api/v1/namespaces", Some(&shop)).await.code, 201);
    for i in 0..MANY {
        assert_eq!(server.call("POST", &maps, Some(&cm(&format!("m{i}")))).await.code, 201);
    }
    server.call("DELETE", namespace, None).await;
    server.until(namespace, "the namespace is gone", |a| a.code == 404).await;
    assert_eq!(server.call("POST", "/api/v1/namespaces", Some(&shop)).await.code, 201);
    assert_eq!(server.call("POST", &maps, Some(&cm("kept"))).await.code, 201);
    settled(&server).await;
    assert_eq!(server.get(&format!("{maps}/kept")).await.code, 200);

    let name = format!("{CRDS}/widgets.example.com");
    let widget =
        |name: &str| json!({"apiVersion": "example.com/v1", "kind": "Widget", "metadata": {"name": name}});
    assert_eq!(server.call("POST", CRDS, Some(&crd())).await.code, 201);
    server.until(WIDGETS, "served", |a| a.code == 200).await;
    for i in 0..MANY {
        assert_eq!(server.call("POST", WIDGETS, Some(&widget(&format!("w{i}")))).await.code, 201);
    }
    server.call("DELETE", &name, None).await;
    server.until(&name, "the definition is gone", |a| a.code == 404).await;
    assert_eq!(server.call("POST", CRDS, Some(&crd())).await.code, 201);
    let mut made = server.call("POST", WIDGETS, Some(&widget("kept"))).await;
    while made.code != 201 {
        // Not served, or still with the former one's mark.
        assert!([404, 405].contains(&made.code), "{}", made.text);
        made = server.call("POST", WIDGETS, Some(&widget("kept"))).await;
    }
    settled(&server).await;
    assert_eq!(server.get(&format!("{WIDGETS}/kept")).await.code, 200);
    server.stop().await;
}

#[tokio::test]
async fn a_definition_takes_its_objects_along_when_they_are_not_served() {
    let server = Server::hub().await;
    let name = format!("{CRDS}/widgets.example.com");
    let widget = |name: &str| json!({"apiVersion": "example.com/v1", "kind": "Widget", "metadata": {"name": name}, "spec": {"size": 1}});
    assert_eq!(server.call("POST", CRDS, Some(&crd())).await.code, 201);
    server.until(WIDGETS, "served", |a| a.code == 200).await;
    assert_eq!(server.call("POST", WIDGETS, Some(&widget("old"))).await.code, 201);
    server.call("POST", "/api/v1/namespaces", Some(&json!({"metadata": {"name": "shop"}}))).await;
    let elsewhere = WIDGETS.replace("/default/", "/shop/");
    assert_eq!(server.call("POST", &elsewhere, Some(&widget("shops"))).await.code, 201);
    let serve = async |served: bool| {
        let mut definition = crd();
        for version in definition["spec"]["versions"].as_array_mut().expect("versions") {
            version["served"] = json!(served);
        }
        let versions = json!({"spec": {"versions": definition["spec"]["versions"]}});
        let answer = server.call("PATCH", &name, Some(&versions)).await;
        assert_eq!(answer.code, 200, "{}", answer.text);
        let code = if served { 200 } else { 404 };
        server.until(WIDGETS, "it is served or not", |a| a.code == code).await;
    };
    // A namespace goes with what is in it, served or not.
    serve(false).await;
    server.call("DELETE", "/api/v1/namespaces/shop", None).await;
    server.until("/api/v1/namespaces/shop", "the namespace is gone", |a| a.code == 404).await;
    serve(true).await;
    assert_eq!(server.get(&format!("{elsewhere}/shops")).await.code, 404);
    assert_eq!(server.get(&format!("{WIDGETS}/old")).await.code, 200);
    serve(false).await;
    server.call("DELETE", &name, None).await;
    server.until(&name, "the definition is gone", |a| a.code == 404).await;
    assert_eq!(server.call("POST", CRDS, Some(&crd())).await.code, 201);
    let list = server.until(WIDGETS, "served", |a| a.code == 200).await;
    assert_eq!(list.body["items"], json!([]), "{}", list.text);
    server.stop().await;
}

#[tokio::test]
async fn a_job_lets_its_dependents_stay_unless_told_otherwise() {
    const JOBS: &str = "/apis/batch/v1/namespaces/default/jobs";
    let server = Server::hub().await;
    let make = async |name: &str| {
        let job = json!({"metadata": {"name": name}, "spec": {"template": {"spec": {"restartPolicy": "Never",
            "containers": [{"name": "work", "image": "work:1"}]}}}});
        let job = server.call("POST", JOBS, Some(&job)).await;
        assert_eq!(job.code, 201, "{}", job.text);
        let mut map = cm(name);
        map["metadata"]["ownerReferences"] = json!([{"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": job.body["metadata"]["uid"]}]);
        assert_eq!(server.call("POST", CM, Some(&map)).await.code, 201);
    };
    let gone = async |path: String| server.until(&path, "it is gone", |a| a.code == 404).await;
    // As batch/v1 always did; kubectl asks for more by itself.
    make("plain").await;
    server.call("DELETE", &format!("{JOBS}/plain"), None).await;
    gone(format!("{JOBS}/plain")).await;
    let left = server.get(&format!("{CM}/plain")).await;
    assert_eq!((left.code, left.body["metadata"].get("ownerReferences")), (200, None), "{}", left.text);
    make("background").await;
    let background = json!({"propagationPolicy": "Background"});
    server.call("DELETE", &format!("{JOBS}/background"), Some(&background)).await;
    gone(format!("{CM}/background")).await;
    // What goes with its owner takes its own along.
    make("owned").await;
    let owner = server.call("POST", CM, Some(&cm("owner"))).await.body;
    let owners = json!({"metadata": {"ownerReferences": [{"apiVersion": "v1", "kind": "ConfigMap", "name": "owner",
        "uid": owner["metadata"]["uid"]}]}});
    assert_eq!(server.call("PATCH", &format!("{JOBS}/owned"), Some(&owners)).await.code, 200);
    server.call("DELETE", &format!("{CM}/owner"), None).await;
    gone(format!("{JOBS}/owned")).await;
    gone(format!("{CM}/owned")).await;
    server.stop().await;
}
