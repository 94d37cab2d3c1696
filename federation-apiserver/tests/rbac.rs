//! Roles, bindings, escalation checks, impersonation and access reviews on a running server.

mod common;

use common::{Answer, Server};
use serde_json::{Value, json};

const RBAC: &str = "/apis/rbac.authorization.k8s.io/v1";
const SAR: &str = "/apis/authorization.k8s.io/v1";
const TOKENS: &str = "t0ken,jo,7,\"dev\"\nsvc,robot,8,\"\"\n";

async fn server() -> (Server, tempfile::NamedTempFile) {
    let tokens = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(tokens.path(), TOKENS).expect("written");
    let path = tokens.path().to_owned();
    let server =
        Server::start(federation_apiserver::Role::Hub, |c| c.token_auth_file = Some(path), |_| {}).await;
    (server, tokens)
}

async fn jo(server: &Server, method: &str, path: &str, body: Value) -> Answer {
    let headers = [("authorization", "Bearer t0ken"), ("content-type", "application/json")];
    let body = if body.is_null() { String::new() } else { body.to_string() };
    server.send_as(None, method, path, &headers, body).await
}

async fn made(server: &Server, path: &str, body: Value) {
    let answer = server.call("POST", path, Some(&body)).await;
    assert_eq!(answer.code, 201, "{path}: {}", answer.text);
}

/// Asks whether jo may, until the answer is the expected one: the index follows the store.
async fn until_allowed(server: &Server, verb: &str, group: &str, resource: &str, namespace: &str) {
    let asked = json!({"verb": verb, "group": group, "resource": resource, "namespace": namespace});
    until_allowed_so(server, asked).await;
}

async fn until_allowed_so(server: &Server, asked: Value) {
    let review = json!({"spec": {"user": "jo", "groups": ["dev"], "resourceAttributes": asked}});
    let deadline = tokio::time::Instant::now() + common::LIMIT;
    loop {
        let answer = server.call("POST", &format!("{SAR}/subjectaccessreviews"), Some(&review)).await;
        if answer.body["status"]["allowed"] == true {
            return;
        }
        assert!(tokio::time::Instant::now() < deadline, "{}", answer.text);
        tokio::task::yield_now().await;
    }
}

fn role(name: &str, rules: Value) -> Value {
    json!({"metadata": {"name": name}, "rules": rules})
}

fn binding(name: &str, kind: &str, role: &str) -> Value {
    json!({"metadata": {"name": name}, "roleRef": {"kind": kind, "name": role},
        "subjects": [{"kind": "User", "name": "jo"}]})
}

/// Whoever makes a role, binds it and uses it waits for nothing between.
#[tokio::test]
async fn what_was_written_is_in_force() {
    let (server, _tokens) = server().await;
    let rules = json!([{"apiGroups": ["rbac.authorization.k8s.io"], "resources": ["roles", "rolebindings"], "verbs": ["*"]},
        {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["*"]}]);
    made(&server, &format!("{RBAC}/clusterroles"), role("giver", rules)).await;
    let to_jo = binding("giver", "ClusterRole", "giver");
    made(&server, &format!("{RBAC}/clusterrolebindings"), to_jo).await;
    let of_default = format!("{RBAC}/namespaces/default");
    for round in 0..30 {
        let name = format!("reader-{round}");
        let rules = json!([{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get"]}]);
        let answer = jo(&server, "POST", &format!("{of_default}/roles"), role(&name, rules)).await;
        assert_eq!(answer.code, 201, "round {round}: {}", answer.text);
        let mut given = binding(&name, "Role", &name);
        given["subjects"] = json!([{"kind": "User", "name": name}]);
        let answer = jo(&server, "POST", &format!("{of_default}/rolebindings"), given).await;
        assert_eq!(answer.code, 201, "round {round}: {}", answer.text);
        let as_them = [("impersonate-user", name.as_str())];
        let answer =
            server.send("GET", "/api/v1/namespaces/default/configmaps/none", &as_them, String::new()).await;
        assert_eq!(answer.code, 404, "round {round}: {}", answer.text);
    }
    server.stop().await;
}

#[tokio::test]
async fn defaults_are_there_and_are_aggregated() {
    let (server, _tokens) = server().await;
    let roles = server.get(&format!("{RBAC}/clusterroles")).await;
    let names: Vec<&str> = roles.body["items"]
        .as_array()
        .expect("items")
        .iter()
        .filter_map(|r| r["metadata"]["name"].as_str())
        .collect();
    for name in ["cluster-admin", "admin", "edit", "view", "system:discovery", "system:basic-user"] {
        assert!(names.contains(&name), "{name} is not in {names:?}");
    }
    let count = |name: &str| {
        let items = roles.body["items"].as_array().expect("items");
        items
            .iter()
            .find(|r| r["metadata"]["name"] == name)
            .map_or(0, |r| r["rules"].as_array().map_or(0, Vec::len))
    };
    assert!(count("view") > 5 && count("edit") > count("view") && count("admin") > count("edit"));
    // A role of one's own joins in.
    let mut more = role("more", json!([{"apiGroups": ["x.io"], "resources": ["things"], "verbs": ["get"]}]));
    more["metadata"]["labels"] = json!({"rbac.authorization.k8s.io/aggregate-to-view": "true"});
    made(&server, &format!("{RBAC}/clusterroles"), more).await;
    for role in ["view", "edit", "admin"] {
        server.until(&format!("{RBAC}/clusterroles/{role}"), "aggregated", |a| a.text.contains("x.io")).await;
    }
    server.stop().await;
}

#[tokio::test]
async fn whoever_only_looks_sees_no_secrets_in_federated_wrapping() {
    const FEDERATED: &str = "types.kubefed.io";
    let dir = tempfile::tempdir().expect("a folder");
    let config = federation_apiserver::Config::new(dir.path(), federation_apiserver::Role::Hub);
    let server = Server::run(config.clone(), |_| {}).await;
    // As a hub of before had it.
    let everything =
        json!([{"apiGroups": [FEDERATED], "resources": ["*"], "verbs": ["get", "list", "watch"]}]);
    let mut old = role("system:cellway:aggregate-to-view", everything);
    old["metadata"]["labels"] = json!({"rbac.authorization.k8s.io/aggregate-to-view": "true"});
    made(&server, &format!("{RBAC}/clusterroles"), old).await;
    made(&server, &format!("{RBAC}/clusterrolebindings"), binding("look", "ClusterRole", "view")).await;
    until_allowed(&server, "get", FEDERATED, "federatedsecrets", "default").await;
    server.stop().await;

    let server = Server::run(config, |_| {}).await;
    until_allowed(&server, "get", "topology.cellway.io", "cells", "").await;
    let gone = server.get(&format!("{RBAC}/clusterroles/system:cellway:aggregate-to-view")).await;
    assert_eq!(gone.code, 404, "{}", gone.text);
    for resource in ["federatedsecrets", "federatedrevisions", "federatedsecrets/status"] {
        let (resource, sub) = resource.split_once('/').unwrap_or((resource, ""));
        let review = json!({"spec": {"user": "jo", "resourceAttributes": {"verb": "get", "group": FEDERATED,
            "resource": resource, "subresource": sub, "namespace": "default"}}});
        let answer = server.call("POST", &format!("{SAR}/subjectaccessreviews"), Some(&review)).await;
        assert_eq!(answer.body["status"]["allowed"], false, "{resource}: {}", answer.text);
    }
    // Whoever may edit may read them, as Kubernetes' own role has it.
    made(&server, &format!("{RBAC}/clusterrolebindings"), binding("edit", "ClusterRole", "edit")).await;
    until_allowed(&server, "list", FEDERATED, "federatedsecrets", "default").await;
    server.stop().await;
}

#[tokio::test]
async fn whoever_edits_writes_nothing_that_is_the_controllers() {
    const FEDERATED: &str = "types.kubefed.io";
    let dir = tempfile::tempdir().expect("a folder");
    let config = federation_apiserver::Config::new(dir.path(), federation_apiserver::Role::Hub);
    let server = Server::run(config.clone(), |_| {}).await;
    let joins = |name: &str, resources: Value, verbs: Value| {
        let mut joining =
            role(name, json!([{"apiGroups": [FEDERATED], "resources": resources, "verbs": verbs}]));
        joining["metadata"]["labels"] = json!({"rbac.authorization.k8s.io/aggregate-to-edit": "true"});
        joining
    };
    // As a hub of before had it.
    let old = joins("system:cellway:aggregate-to-edit", json!(["*"]), json!(["*"]));
    made(&server, &format!("{RBAC}/clusterroles"), old).await;
    made(&server, &format!("{RBAC}/clusterrolebindings"), binding("own", "ClusterRole", "admin")).await;
    until_allowed(&server, "update", FEDERATED, "federatedrevisions", "default").await;
    server.stop().await;

    let server = Server::run(config, |_| {}).await;
    // As the federation controller makes it.
    let new = joins("cellway:edit", json!(["federateddeployments"]), json!(["create", "update"]));
    made(&server, &format!("{RBAC}/clusterroles"), new).await;
    until_allowed(&server, "create", FEDERATED, "federateddeployments", "default").await;
    until_allowed(&server, "get", FEDERATED, "federatedrevisions", "default").await;
    until_allowed(&server, "create", "policy.cellway.io", "propagationpolicies", "default").await;
    let gone = server.get(&format!("{RBAC}/clusterroles/system:cellway:aggregate-to-edit")).await;
    assert_eq!(gone.code, 404, "{}", gone.text);
    for resource in ["federatedrevisions", "federatednamespaces", "federateddeployments/status"] {
        let (resource, sub) = resource.split_once('/').unwrap_or((resource, ""));
        let review = json!({"spec": {"user": "jo", "resourceAttributes": {"verb": "update", "group": FEDERATED,
            "resource": resource, "subresource": sub, "namespace": "default"}}});
        let answer = server.call("POST", &format!("{SAR}/subjectaccessreviews"), Some(&review)).await;
        assert_eq!(answer.body["status"]["allowed"], false, "{resource}/{sub}: {}", answer.text);
    }
    server.stop().await;
}

#[tokio::test]
async fn rights_come_with_bindings_and_go_with_them() {
    let (server, _tokens) = server().await;
    let secrets = "/api/v1/namespaces/default/secrets";
    let refused = jo(&server, "GET", secrets, Value::Null).await;
    assert_eq!(
        (refused.code, refused.body["message"].as_str()),
        (
            403,
            Some(
                "secrets is forbidden: User \"jo\" cannot list resource \"secrets\" in API group \"\" in the namespace \"default\""
            )
        )
    );
    assert_eq!(refused.body["details"], json!({"kind": "secrets"}));
    // Even of what does not exist.
    assert_eq!(jo(&server, "GET", "/api/v1/nothings", Value::Null).await.code, 403);
    assert_eq!(
        jo(&server, "GET", "/metrics", Value::Null).await.body["message"],
        "forbidden: User \"jo\" cannot get path \"/metrics\""
    );
    assert_eq!(jo(&server, "GET", "/apis", Value::Null).await.code, 200);
    let rules = json!([{"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["one"], "verbs": ["get"]},
        {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["list", "patch"]}]);
    made(&server, &format!("{RBAC}/namespaces/default/roles"), role("some", rules)).await;
    made(&server, &format!("{RBAC}/namespaces/default/rolebindings"), binding("jo", "Role", "some")).await;
    until_allowed(&server, "list", "", "configmaps", "default").await;
    assert_eq!(jo(&server, "GET", &format!("{secrets}/one"), Value::Null).await.code, 404);
    assert_eq!(jo(&server, "GET", &format!("{secrets}/two"), Value::Null).await.code, 403);
    assert_eq!(jo(&server, "GET", "/api/v1/configmaps", Value::Null).await.code, 403);
    // Patching is not creating, not even by apply.
    let apply = "/api/v1/namespaces/default/configmaps/new?fieldManager=x";
    let headers = [("authorization", "Bearer t0ken"), ("content-type", "application/apply-patch+yaml")];
    let body = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "new"}}).to_string();
    let answer = server.send_as(None, "PATCH", apply, &headers, body).await;
    assert!(answer.text.contains("cannot create resource"), "{}", answer.text);
    // Gone with the binding.
    let gone = server.call("DELETE", &format!("{RBAC}/namespaces/default/rolebindings/jo"), None).await;
    assert_eq!(gone.code, 200);
    let deadline = tokio::time::Instant::now() + common::LIMIT;
    while jo(&server, "GET", &format!("{secrets}/one"), Value::Null).await.code != 403 {
        assert!(tokio::time::Instant::now() < deadline, "the right did not go with its binding");
    }
    server.stop().await;
}

#[tokio::test]
async fn nobody_gives_what_they_do_not_have() {
    let (server, _tokens) = server().await;
    let all = ["clusterroles", "clusterrolebindings", "roles", "rolebindings"];
    let manage = json!([{"apiGroups": ["rbac.authorization.k8s.io"], "resources": all, "verbs": ["create", "update", "get"]}]);
    made(&server, &format!("{RBAC}/clusterroles"), role("mgr", manage)).await;
    made(&server, &format!("{RBAC}/clusterrolebindings"), binding("mgr", "ClusterRole", "mgr")).await;
    until_allowed(&server, "create", "rbac.authorization.k8s.io", "clusterroles", "").await;
    let roles = format!("{RBAC}/clusterroles");
    let bindings = format!("{RBAC}/clusterrolebindings");
    let wants = json!([{"apiGroups": [""], "resources": ["pods"], "resourceNames": ["a"], "verbs": ["get", "list"]},
        {"nonResourceURLs": ["/x"], "verbs": ["get"]}]);
    let refused = jo(&server, "POST", &roles, role("esc", wants.clone())).await;
    assert_eq!(
        refused.body["message"],
        "clusterroles.rbac.authorization.k8s.io \"esc\" is forbidden: user \"jo\" (groups=[\"dev\" \"system:authenticated\"]) is attempting to grant RBAC permissions not currently held:\n{APIGroups:[\"\"], Resources:[\"pods\"], ResourceNames:[\"a\"], Verbs:[\"get\" \"list\"]}\n{NonResourceURLs:[\"/x\"], Verbs:[\"get\"]}"
    );
    let aggregated = json!({"metadata": {"name": "esc"}, "aggregationRule": {"clusterRoleSelectors": [{"matchLabels": {"a": "b"}}]}});
    let refused = jo(&server, "POST", &roles, aggregated).await;
    assert!(refused.text.contains("must have cluster-admin privileges to use the aggregationRule"));
    let refused = jo(&server, "POST", &bindings, binding("esc", "ClusterRole", "view")).await;
    assert_eq!((refused.code, refused.text.contains("not currently held")), (403, true));
    let refused = jo(&server, "POST", &bindings, binding("esc", "ClusterRole", "none")).await;
    assert_eq!(refused.code, 404);
    // What one has, one may give; with the words `escalate` and `bind`, also what one has not.
    let own = json!([{"apiGroups": ["rbac.authorization.k8s.io"], "resources": ["roles"], "verbs": ["get"]}]);
    assert_eq!(jo(&server, "POST", &roles, role("own", own)).await.code, 201);
    assert_eq!(jo(&server, "POST", &bindings, binding("own", "ClusterRole", "mgr")).await.code, 201);
    let words = json!([{"apiGroups": ["rbac.authorization.k8s.io"], "resources": ["clusterroles"], "verbs": ["escalate", "bind"]}]);
    made(&server, &roles, role("words", words)).await;
    made(&server, &bindings, binding("words", "ClusterRole", "words")).await;
    until_allowed(&server, "bind", "rbac.authorization.k8s.io", "clusterroles", "").await;
    assert_eq!(jo(&server, "POST", &roles, role("esc", wants)).await.code, 201);
    assert_eq!(jo(&server, "POST", &bindings, binding("esc", "ClusterRole", "view")).await.code, 201);
    // The reference of a binding stays.
    let mut changed = server.get(&format!("{bindings}/esc")).await.body;
    changed["roleRef"]["name"] = json!("edit");
    let answer = server.call("PUT", &format!("{bindings}/esc"), Some(&changed)).await;
    assert!(answer.text.contains("cannot change roleRef"), "{}", answer.text);
    server.stop().await;
}

#[tokio::test]
async fn reviews_and_impersonation() {
    let (server, _tokens) = server().await;
    let whoami = "/apis/authentication.k8s.io/v1/selfsubjectreviews";
    let me = jo(&server, "POST", whoami, json!({})).await;
    assert_eq!(
        me.body["status"]["userInfo"],
        json!({"username": "jo", "uid": "7", "groups": ["dev", "system:authenticated"]})
    );
    let rules = jo(
        &server,
        "POST",
        &format!("{SAR}/selfsubjectrulesreviews"),
        json!({"spec": {"namespace": "default"}}),
    )
    .await;
    assert!(rules.body["status"]["resourceRules"].as_array().is_some_and(|r| r.len() == 2), "{}", rules.text);
    // Only who may ask about others.
    let about = json!({"spec": {"user": "x", "nonResourceAttributes": {"path": "/version", "verb": "get"}}});
    assert_eq!(jo(&server, "POST", &format!("{SAR}/subjectaccessreviews"), about).await.code, 403);
    let local = json!({"spec": {"user": "x", "resourceAttributes": {"namespace": "default", "verb": "get", "resource": "pods"}}});
    let answer = server
        .call("POST", &format!("{SAR}/namespaces/default/localsubjectaccessreviews"), Some(&local))
        .await;
    assert_eq!(answer.body["status"], json!({"allowed": false}));
    let token = json!({"spec": {"token": "t0ken"}});
    let answer = server.call("POST", "/apis/authentication.k8s.io/v1/tokenreviews", Some(&token)).await;
    assert_eq!(answer.body["status"]["user"]["username"], "jo");
    // Impersonation takes its verb.
    let headers = [("authorization", "Bearer t0ken"), ("impersonate-user", "eva")];
    let refused = server.send_as(None, "GET", "/apis", &headers, String::new()).await;
    assert_eq!(
        refused.body["message"],
        "users \"eva\" is forbidden: User \"jo\" cannot impersonate resource \"users\" in API group \"\" at the cluster scope"
    );
    let rule = json!([{"apiGroups": [""], "resources": ["users"], "resourceNames": ["eva"], "verbs": ["impersonate"]}]);
    made(&server, &format!("{RBAC}/clusterroles"), role("eva", rule)).await;
    made(&server, &format!("{RBAC}/clusterrolebindings"), binding("eva", "ClusterRole", "eva")).await;
    let deadline = tokio::time::Instant::now() + common::LIMIT;
    loop {
        let headers = [headers[0], headers[1], ("content-type", "application/json")];
        let answer = server.send_as(None, "POST", whoami, &headers, "{}".into()).await;
        if answer.code == 201 {
            assert_eq!(answer.body["status"]["userInfo"]["username"], "eva");
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "{}", answer.text);
    }
    let more = [headers[0], headers[1], ("impersonate-group", "system:masters")];
    assert_eq!(server.send_as(None, "GET", "/apis", &more, String::new()).await.code, 403);
    server.stop().await;
}

/// A role that shows what carries a label, tried as somebody would who wants to see the rest.
#[tokio::test]
async fn a_labelled_role_shows_its_own_and_gives_nothing_else_away() {
    const MAPS: &str = "/api/v1/namespaces/default/configmaps";
    let (server, _tokens) = server().await;
    for (name, tenant) in [("ours", "red"), ("theirs", "blue")] {
        made(
            &server,
            MAPS,
            json!({"metadata": {"name": name, "labels": {"tenant": tenant}}, "data": {"k": name}}),
        )
        .await;
    }
    let mut red = role(
        "red",
        json!([{"apiGroups": ["", "rbac.authorization.k8s.io"], "resources": ["*"], "verbs": ["*"]}]),
    );
    red["metadata"]["annotations"] = json!({"cellway.io/visible": "tenant=red"});
    // Should it be aggregated into another role, that role must not show everything.
    red["metadata"]["labels"] = json!({"rbac.authorization.k8s.io/aggregate-to-view": "true"});
    made(&server, &format!("{RBAC}/clusterroles"), red).await;
    made(&server, &format!("{RBAC}/clusterrolebindings"), binding("red", "ClusterRole", "red")).await;
    let labels = json!({"requirements": [{"key": "tenant", "operator": "In", "values": ["red"]}]});
    let asked =
        json!({"verb": "list", "resource": "configmaps", "namespace": "default", "labelSelector": labels});
    until_allowed_so(&server, asked).await;

    let names = |answer: &Answer| -> Vec<String> {
        let items = answer.body["items"].as_array().cloned().unwrap_or_default();
        items.iter().map(|item| item["metadata"]["name"].as_str().unwrap_or_default().to_owned()).collect()
    };
    for query in
        ["", "?labelSelector=tenant", "?limit=1", "?resourceVersion=0", "?labelSelector=tenant%20notin%20(x)"]
    {
        let seen = jo(&server, "GET", &format!("{MAPS}{query}"), Value::Null).await;
        assert_eq!((seen.code, names(&seen)), (200, vec!["ours".to_owned()]), "{query}: {}", seen.text);
    }
    for query in
        ["?labelSelector=tenant%3Dblue", "?fieldSelector=metadata.name%3Dtheirs", "?labelSelector=!tenant"]
    {
        let seen = jo(&server, "GET", &format!("{MAPS}{query}"), Value::Null).await;
        assert!(names(&seen).is_empty() && !seen.text.contains("theirs"), "{query}: {}", seen.text);
    }
    assert_eq!(jo(&server, "GET", &format!("{MAPS}/ours"), Value::Null).await.code, 200);
    // There and not there look alike.
    for name in ["theirs", "nobodys"] {
        let answer = jo(&server, "GET", &format!("{MAPS}/{name}"), Value::Null).await;
        assert_eq!(answer.code, 404, "{}", answer.text);
        assert_eq!(answer.body["message"], format!("configmaps \"{name}\" not found"));
    }
    for accept in [
        "application/json;as=Table;v=v1;g=meta.k8s.io",
        "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io",
    ] {
        let headers = [("authorization", "Bearer t0ken"), ("accept", accept)];
        let seen = server.send_as(None, "GET", MAPS, &headers, String::new()).await;
        assert!(
            seen.code == 200 && seen.text.contains("ours") && !seen.text.contains("theirs"),
            "{}",
            seen.text
        );
    }
    let watched =
        jo(&server, "GET", &format!("{MAPS}?watch=true&resourceVersion=0&timeoutSeconds=1"), Value::Null)
            .await;
    assert!(watched.text.contains("ours") && !watched.text.contains("theirs"), "{}", watched.text);
    for (name, seen) in [("ours", true), ("theirs", false)] {
        let named = format!(
            "{MAPS}?watch=true&fieldSelector=metadata.name%3D{name}&resourceVersion=0&timeoutSeconds=1"
        );
        let watched = jo(&server, "GET", &named, Value::Null).await;
        assert_eq!((watched.code, watched.text.contains("\"k\"")), (200, seen), "{name}: {}", watched.text);
        // Whoever sees everything is shown either.
        let watched = server.get(&named).await;
        assert_eq!((watched.code, watched.text.contains("\"k\"")), (200, true), "{name}: {}", watched.text);
    }

    // Nothing but reading, and nothing that could be passed on.
    let patch = json!({"metadata": {"labels": {"tenant": "blue"}}});
    for (method, path, body) in [
        ("DELETE", MAPS.to_owned(), Value::Null),
        ("DELETE", format!("{MAPS}/ours"), Value::Null),
        ("POST", MAPS.to_owned(), json!({"metadata": {"name": "new", "labels": {"tenant": "red"}}})),
        ("PUT", format!("{MAPS}/ours"), patch),
        ("POST", format!("{RBAC}/clusterrolebindings"), binding("more", "ClusterRole", "cluster-admin")),
        (
            "POST",
            format!("{RBAC}/clusterroles"),
            role("all", json!([{"apiGroups": [""], "resources": ["*"], "verbs": ["get"]}])),
        ),
    ] {
        let answer = jo(&server, method, &path, body).await;
        assert_eq!(answer.code, 403, "{method} {path}: {}", answer.text);
    }
    let view = server.get(&format!("{RBAC}/clusterroles/view")).await;
    let rules = view.body["rules"].as_array().cloned().unwrap_or_default();
    let everything = |rule: &Value| rule["verbs"] == json!(["*"]) && rule["resources"] == json!(["*"]);
    assert!(!rules.iter().any(everything), "{}", view.text);
    server.stop().await;
}

#[tokio::test]
async fn a_put_makes_what_may_be_made_by_it() {
    let (server, _tokens) = server().await;
    let role = json!({"metadata": {"name": "renewer"}, "rules": [{"apiGroups": ["coordination.k8s.io"],
        "resources": ["leases"], "verbs": ["update", "get"]}]});
    let made = server.call("PUT", &format!("{RBAC}/clusterroles/renewer"), Some(&role)).await;
    assert_eq!((made.code, made.body["metadata"]["uid"].is_string()), (201, true), "{}", made.text);
    let again = server.call("PUT", &format!("{RBAC}/clusterroles/renewer"), Some(&role)).await;
    assert_eq!((again.code, &again.body["metadata"]["uid"]), (200, &made.body["metadata"]["uid"]));
    let binding = json!({"metadata": {"name": "renewer"}, "roleRef": {"kind": "ClusterRole", "name": "renewer"},
        "subjects": [{"kind": "User", "name": "jo"}]});
    assert_eq!(server.call("POST", &format!("{RBAC}/clusterrolebindings"), Some(&binding)).await.code, 201);
    // Making an object takes the right to create.
    let leases = "/apis/coordination.k8s.io/v1/namespaces/default/leases";
    let jo = [("authorization", "Bearer t0ken"), ("content-type", "application/json")];
    let lease = json!({"metadata": {"name": "l"}, "spec": {"holderIdentity": "a"}});
    let deadline = tokio::time::Instant::now() + common::LIMIT;
    let refused = loop {
        let answer = server.send_as(None, "PUT", &format!("{leases}/l"), &jo, lease.to_string()).await;
        // Until the binding is in force, even the update is refused.
        if answer.text.contains("cannot create resource") {
            break answer;
        }
        assert!(tokio::time::Instant::now() < deadline, "{}", answer.text);
    };
    assert_eq!(refused.code, 403);
    assert_eq!(server.call("PUT", &format!("{leases}/l"), Some(&lease)).await.code, 201);
    let blind = server.send_as(None, "PUT", &format!("{leases}/l"), &jo, lease.to_string()).await;
    assert_eq!(blind.code, 422, "{}", blind.text);
    let mut next = server.get(&format!("{leases}/l")).await.body;
    next["spec"]["holderIdentity"] = json!("b");
    assert_eq!(server.call("PUT", &format!("{leases}/l"), Some(&next)).await.code, 200);
    server.stop().await;
}

/// What is taken out of the token file is worth nothing any more, and what was begun with it ends; nobody else notices.
#[tokio::test]
async fn a_token_that_is_taken_out_ends_what_it_had() {
    use http_body_util::BodyExt as _;

    let tokens = tempfile::NamedTempFile::new().expect("a file");
    let stays = "stays,jo,2,\"system:masters\"\n";
    std::fs::write(tokens.path(), format!("goes,ann,1,\"system:masters\"\n{stays}")).expect("written");
    let path = tokens.path().to_owned();
    let server =
        Server::start(federation_apiserver::Role::Hub, |c| c.token_auth_file = Some(path), |_| {}).await;
    let ask = async |token: &str, path: &str| {
        let bearer = format!("Bearer {token}");
        server.open(None, "GET", path, &[("authorization", bearer.as_str())], String::new()).await
    };
    let watch = async |token: &str| {
        let answer = ask(token, "/api/v1/configmaps?watch=true").await;
        assert_eq!(answer.status(), 200);
        answer.into_body()
    };
    let (mut of_gone, mut of_stays) = (watch("goes").await, watch("stays").await);
    std::fs::write(tokens.path(), stays).expect("written");
    loop {
        match tokio::time::timeout(common::LIMIT, of_gone.frame()).await.expect("the watch is cut") {
            Some(Ok(_)) => {}
            Some(Err(_)) => break,
            None => panic!("the watch ended as if it were whole"),
        }
    }
    assert_eq!(ask("goes", "/api").await.status(), 401);
    assert_eq!(ask("stays", "/api").await.status(), 200);
    made(&server, "/api/v1/namespaces/default/configmaps", json!({"metadata": {"name": "news"}})).await;
    let mut text = String::new();
    while !text.contains("\"news\"") {
        let frame = tokio::time::timeout(common::LIMIT, of_stays.frame()).await.expect("news");
        let frame = frame.expect("goes on").expect("a frame");
        text += &String::from_utf8_lossy(frame.data_ref().expect("data"));
    }
    server.stop().await;
}
