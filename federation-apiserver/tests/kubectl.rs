//! Real kubectl against a hub and a simulated member.

mod common;

use common::kubectl::Kubectl;
use common::{LIMIT, Server};
use test_support::{require, tools, wait_until};

const WEB: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, labels: {app: web}}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - {name: nginx, image: "nginx:1.25", ports: [{containerPort: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{port: 80}]
"#;

#[tokio::test]
async fn a_workload_in_a_member() {
    let program = require!(tools::kubectl());
    let server = Server::member().await;
    let k = Kubectl { program, server: &server };
    k.ok("api-resources", &["deployments", "pods", "endpointslices"]).await;
    k.ok("get nodes -o wide", &["Ready", "cellway-simulation"]).await;

    k.with("apply -f -", WEB, &["deployment.apps/web created", "service/web created"]).await;
    k.ok("rollout status deployment/web --timeout=50s", &["successfully rolled out"]).await;
    k.with("apply -f -", WEB, &["deployment.apps/web unchanged"]).await;
    k.ok(
        "get deployments,replicasets,pods,services,endpoints -o wide",
        &["3/3", "nginx:1.25", "app=web", "Running"],
    )
    .await;
    let changed = WEB.replace("1.25", "1.26");
    k.with("apply -f -", &changed, &["deployment.apps/web configured", "service/web unchanged"]).await;
    k.ok("rollout status deployment/web --timeout=50s", &["successfully rolled out"]).await;
    k.ok("rollout history deployment/web", &["REVISION"]).await;
    k.ok("rollout undo deployment/web", &["rolled back"]).await;
    k.ok("rollout status deployment/web --timeout=50s", &["successfully rolled out"]).await;
    k.ok("scale deployment/web --replicas=4", &["scaled"]).await;
    k.ok("wait --for=condition=Available deployment/web --timeout=50s", &["condition met"]).await;
    k.ok("wait --for=jsonpath={.status.readyReplicas}=4 deployment/web --timeout=50s", &["condition met"])
        .await;
    k.ok("set image deployment/web nginx=nginx:1.27", &["image updated"]).await;
    k.ok("describe deployment web", &["nginx:1.27", "StrategyType:", "ScalingReplicaSet"]).await;
    k.ok("rollout status deployment/web --timeout=50s", &["successfully rolled out"]).await;
    // What is being ended would be listed, and may be gone when it is described.
    let ended = async || {
        let (_, pods) = k.run("get pods -l app=web -o name", "").await;
        if pods.lines().count() == 4 { Ok(()) } else { Err(pods) }
    };
    wait_until(ended, LIMIT, "the pods of the version before to be gone").await.expect("four pods");
    k.ok("describe pods -l app=web", &["Ready", "Scheduled"]).await;
    k.ok("logs deployment/web --tail=1", &["[simulated]"]).await;
    k.ok("explain deployment.spec.strategy", &["DeploymentStrategy", "rollingUpdate"]).await;
    k.ok("get pods --field-selector=status.phase=Running", &["web-"]).await;
    k.fails("get pods --field-selector=spec.odd=1", "", &["field label not supported: spec.odd"]).await;

    // Typed commands speak protobuf.
    k.ok("create deployment plain --image=nginx --replicas=1 --port=80", &["created"]).await;
    k.ok("expose deployment plain --port=80", &["exposed"]).await;
    k.ok("run one --image=nginx:1 --restart=Never", &["pod/one created"]).await;
    k.ok("wait --for=condition=Ready pod/one --timeout=50s", &["condition met"]).await;
    k.ok("cordon simulated-node-1", &["cordoned"]).await;
    k.ok("get node simulated-node-1", &["SchedulingDisabled"]).await;
    k.ok("delete deployment,service --all --timeout=50s", &["\"web\" deleted", "\"plain\" deleted"]).await;
    k.ok("wait --for=delete pods -l app=web --timeout=50s", &[]).await;
    server.stop().await;
}

#[tokio::test]
async fn objects_of_the_hub() {
    let program = require!(tools::kubectl());
    let server = Server::hub().await;
    let k = Kubectl { program, server: &server };
    k.ok("version", &["Server Version: v1.37"]).await;
    k.ok("auth whoami", &["cellway:admin"]).await;
    k.ok("auth can-i delete secrets", &["yes"]).await;
    k.ok("create namespace shop", &["created"]).await;
    k.ok("-n shop create configmap a --from-literal=x=1", &["created"]).await;
    k.ok("-n shop create secret generic s --from-literal=p=q", &["created"]).await;
    k.ok("-n shop create serviceaccount robot", &["created"]).await;
    k.fails("-n shop create configmap a", "", &["already exists"]).await;
    k.fails("-n none create configmap a", "", &["namespaces \"none\" not found"]).await;
    k.ok("-n shop label configmap a tier=front", &["labeled"]).await;
    k.ok("-n shop annotate configmap a note=hello", &["annotated"]).await;
    k.ok("-n shop patch configmap a --type=merge -p {\"data\":{\"x\":\"2\"}}", &["patched"]).await;
    k.ok("-n shop patch configmap a -p {\"data\":{\"y\":\"3\"}}", &["patched"]).await;
    k.ok(
        "-n shop patch configmap a --type=json -p [{\"op\":\"add\",\"path\":\"/data/z\",\"value\":\"4\"}]",
        &["patched"],
    )
    .await;
    k.ok("-n shop get configmap a -o jsonpath={.data}", &["\"x\":\"2\"", "\"y\":\"3\"", "\"z\":\"4\""]).await;
    k.ok("-n shop get configmaps -l tier=front --show-labels", &["tier=front"]).await;
    k.ok("-n shop get secrets", &["Opaque"]).await;
    k.ok("-n shop describe configmap a", &["note: hello"]).await;
    k.ok("-n shop delete configmap a", &["deleted"]).await;

    // Server-side apply, with a conflict as kubectl tells it.
    let map = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: b, namespace: shop}\ndata: {k: one}\n";
    k.with("apply --server-side --field-manager=one -f -", map, &["serverside-applied"]).await;
    let other = map.replace("one", "two");
    k.fails("apply --server-side --field-manager=two -f -", &other, &["conflict with \"one\"", ".data.k"])
        .await;
    k.with("apply --server-side --field-manager=two --force-conflicts -f -", &other, &["serverside-applied"])
        .await;
    k.fails("apply --server-side -f -", &format!("{map}odd: 1\n"), &["field not declared in schema"]).await;
    k.fails("apply -f -", &format!("{map}odd: 1\n"), &["unknown field \"odd\""]).await;

    let crd = r#"
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: gadgets.example.com}
spec:
  group: example.com
  scope: Namespaced
  names: {plural: gadgets, singular: gadget, kind: Gadget, shortNames: [gd]}
  versions:
  - name: v1
    served: true
    storage: true
    additionalPrinterColumns: [{name: Size, type: integer, jsonPath: .spec.size}]
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec:
            type: object
            description: What the gadget should be.
            properties: {size: {type: integer, minimum: 1, description: How large.}}
"#;
    k.with("apply -f -", crd, &["created"]).await;
    k.ok("wait --for=condition=Established crd/gadgets.example.com --timeout=50s", &["condition met"]).await;
    let gadget = "apiVersion: example.com/v1\nkind: Gadget\nmetadata: {name: g}\nspec: {size: 2}\n";
    k.with("apply -f -", gadget, &["gadget.example.com/g created"]).await;
    k.with("apply -f -", gadget, &["unchanged"]).await;
    k.with("apply -f -", &gadget.replace(": 2", ": 3"), &["configured"]).await;
    k.fails("apply -f -", &gadget.replace(": 2", ": 0"), &["should be greater than or equal to 1"]).await;
    k.ok("get gd", &["SIZE", "3"]).await;
    k.ok("explain gadget.spec", &["How large."]).await;
    k.ok("delete crd gadgets.example.com --timeout=50s", &["deleted"]).await;
    // Which words depend on what kubectl still has in its discovery cache.
    k.fails("get gadgets", "", &["resource"]).await;
    k.ok("delete namespace shop --timeout=50s", &["deleted"]).await;
    k.fails("-n shop get secret s", "", &["not found"]).await;
    server.stop().await;
}
