//! `kubectl auth` and `kubectl create token` with a real kubectl.

mod common;

use common::Server;
use common::kubectl::Kubectl;
use test_support::{require, tools};

const ROLES: &str = "
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: reader, namespace: default}
rules: [{apiGroups: [''], resources: [configmaps], verbs: [get, list]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: reader, namespace: default}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: reader}
subjects: [{kind: User, name: eva}]
";

#[tokio::test]
async fn questions_about_rights() {
    let program = require!(tools::kubectl());
    let server = Server::hub().await;
    let kubectl = Kubectl { program, server: &server };
    let run = async |line: &str, input: &str| kubectl.run(line, input).await;
    let ok = async |line: &str, input: &str, wanted: &str| kubectl.with(line, input, &[wanted]).await;
    ok("auth whoami", "", "cellway:admin").await;
    ok("auth can-i delete secrets", "", "yes").await;
    assert_eq!(run("auth can-i list configmaps --as eva", "").await, (false, "no\n".to_owned()));
    ok("auth reconcile -f -", ROLES, "role.rbac.authorization.k8s.io/reader reconciled").await;
    let deadline = tokio::time::Instant::now() + common::LIMIT;
    while !run("auth can-i list configmaps --as eva", "").await.0 {
        assert!(tokio::time::Instant::now() < deadline, "the binding does not come into force");
    }
    let text = ok("auth can-i --list --as eva -n default", "", "configmaps").await;
    assert!(text.contains("[get list]") && text.contains("selfsubjectaccessreviews"), "{text}");
    ok("get configmaps --as eva", "", "No resources found").await;
    let (success, text) = run("get configmaps --as eva -A", "").await;
    assert!(!success, "{text}");
    assert_eq!(
        text,
        "Error from server (Forbidden): configmaps is forbidden: User \"eva\" cannot list resource \"configmaps\" in API group \"\" at the cluster scope\n"
    );
    // A binding whose role changes is made anew.
    let changed = ROLES.replace("name: reader}\nsubjects", "name: other}\nsubjects");
    ok("auth reconcile -f -", &changed, "reconciled").await;
    ok("get rolebinding reader -o wide", "", "Role/other").await;
    ok(
        "create clusterrole look --verb=get --resource=configmaps,serviceaccounts/token",
        "",
        "clusterrole.rbac.authorization.k8s.io/look created",
    )
    .await;
    ok(
        "create clusterrolebinding look --clusterrole=look --user=eva --serviceaccount=default:x",
        "",
        "created",
    )
    .await;
    ok("describe clusterrolebinding look", "", "ServiceAccount  x     default").await;
    ok("create rolebinding look --clusterrole=view --group=dev", "", "created").await;
    let token = ok("create token default", "", "ey").await;
    let (success, text) = run(&format!("auth whoami --token {}", token.trim()), "").await;
    // The administrator's certificate of the kubeconfig goes before the token.
    assert!(success && text.contains("cellway:admin"), "{text}");
    let ca = server.dir.join("pki/ca.crt");
    let url = format!("https://127.0.0.1:{}", server.address.port());
    let line = format!(
        "--kubeconfig=/dev/null --server={url} --certificate-authority={} --token={} auth whoami",
        ca.display(),
        token.trim()
    );
    ok(&line, "", "system:serviceaccount:default:default").await;
    ok("create token default --duration=20m --audience=vault", "", "ey").await;
    server.stop().await;
}
