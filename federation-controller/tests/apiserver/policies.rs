//! Plain objects of the hub that policies federate, as a person with kubectl sees it.

use std::path::PathBuf;
use std::process::Stdio;

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret, Service};
use k8s_openapi::api::networking::v1::Ingress;
use kube::{Api, ResourceExt as _};
use serde_json::Value;
use test_support::{require, tools};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use crate::world::{LAST, World, image, replicas, until};

/// Longest that kubectl waits for a condition.
const TIMEOUT: &str = "--timeout=90s";

const OBJECTS: &str = "
apiVersion: v1
kind: ConfigMap
metadata: {name: settings, namespace: shop, labels: {app: web}}
data: {colour: blue}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: private, namespace: shop}
data: {colour: grey}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Secret
metadata: {name: key, namespace: shop, labels: {app: web}}
stringData: {key: open sesame}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop, labels: {app: web}}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: web, image: 'web:1'}]}
";

const POLICY: &str = "
apiVersion: policy.cellway.io/v1alpha1
kind: PropagationPolicy
metadata: {name: web, namespace: shop}
spec:
  resources:
  - {apiVersion: v1, kind: ConfigMap, labelSelector: {matchLabels: {app: web}}}
  - {apiVersion: v1, kind: Service, name: web}
  - {apiVersion: apps/v1, kind: Deployment, name: web}
  placement: {units: [{name: a}, {name: b}, {name: c}]}
  overrides:
  - kinds: [Deployment]
    units: [b]
    patches: [{op: replace, path: /spec/replicas, value: 3}]
";

const TEAM: &str = "
apiVersion: batch/v1
kind: Job
metadata: {name: migrate, namespace: shop, labels: {app: web}}
spec:
  suspend: true
  backoffLimit: 2
  template:
    metadata: {labels: {app: migrate}}
    spec: {restartPolicy: Never, containers: [{name: migrate, image: 'migrate:1'}]}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: web, namespace: shop, labels: {app: web}}
spec:
  rules:
  - host: web.example.com
    http: {paths: [{path: /, pathType: Prefix, backend: {service: {name: web, port: {number: 80}}}}]}
---
apiVersion: batch/v1
kind: CronJob
metadata: {name: nightly, namespace: shop}
spec:
  schedule: '0 3 * * *'
  suspend: true
  jobTemplate:
    spec:
      template:
        spec: {restartPolicy: Never, containers: [{name: report, image: 'report:1'}]}
---
apiVersion: apps/v1
kind: ReplicaSet
metadata: {name: workers, namespace: shop, labels: {app: web}}
spec:
  replicas: 2
  selector: {matchLabels: {app: workers}}
  template:
    metadata: {labels: {app: workers}}
    spec: {containers: [{name: work, image: 'work:1'}]}
";

const TEAM_POLICY: &str = "
apiVersion: policy.cellway.io/v1alpha1
kind: PropagationPolicy
metadata: {name: team, namespace: shop}
spec:
  resources:
  - {apiVersion: batch/v1, kind: Job, labelSelector: {matchLabels: {app: web}}}
  - {apiVersion: networking.k8s.io/v1, kind: Ingress, name: web}
  - {apiVersion: apps/v1, kind: ReplicaSet}
  # Nobody has enabled it.
  - {apiVersion: batch/v1, kind: CronJob}
  placement: {units: [{name: a}, {name: c}]}
";

struct Kubectl {
    program: PathBuf,
    kubeconfig: PathBuf,
}

impl Kubectl {
    /// Runs kubectl in the namespace `shop`, which must succeed.
    async fn run(&self, line: &str, input: &str) -> String {
        let mut child = Command::new(&self.program)
            .args(["-n", "shop"])
            .args(line.split_whitespace())
            .env("KUBECONFIG", &self.kubeconfig)
            .env("HOME", self.kubeconfig.parent().expect("a folder"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("kubectl starts");
        child.stdin.take().expect("piped").write_all(input.as_bytes()).await.expect("input is taken");
        let output = child.wait_with_output().await.expect("kubectl's output");
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        assert!(output.status.success(), "kubectl {line}: {text}");
        text
    }
}

pub(crate) async fn plain_objects_go_where_a_policy_says(world: World) {
    let program = require!(tools::kubectl());
    let k = Kubectl { program, kubeconfig: world.kubeconfig.clone() };
    let [x, y] = [&world.x, &world.y].map(|client| Api::<Deployment>::namespaced(client.clone(), "shop"));
    let maps: Api<ConfigMap> = Api::namespaced(world.y.clone(), "shop");
    let services: Api<Service> = Api::namespaced(world.x.clone(), "shop");
    let secrets: Api<Secret> = Api::namespaced(world.x.clone(), "shop");

    // A policy that comes to objects that are there.
    k.run("apply -f -", OBJECTS).await;
    k.run("apply -f -", POLICY).await;
    k.run(&format!("wait --for=condition=Ready propagationpolicy/web {TIMEOUT}"), "").await;
    let line = k.run("get pp web --no-headers", "").await;
    assert_eq!(line.split_whitespace().take(3).collect::<Vec<_>>(), ["web", "3", "True"], "{line}");
    for companion in ["federateddeployment/web", "federatedservice/web", "federatedconfigmap/settings"] {
        k.run(&format!("wait --for=condition=Ready {companion} {TIMEOUT}"), "").await;
    }
    let listed = k.run("get federated -l cellway.io/policy=web -o name", "").await;
    assert_eq!(listed.lines().count(), 3, "{listed}");
    for (api, name, count) in [(&x, "web-a", 2), (&x, "web-b", 3), (&y, "web-c", 2)] {
        assert_eq!(replicas(&api.get(name).await.expect("there")), Some(count), "{name}");
    }
    let service = services.get("web").await.expect("there").spec.expect("spec");
    assert_eq!(service.selector.expect("selector")["app"], "web");
    assert_eq!(maps.get("settings").await.expect("there").data.expect("data")["colour"], "blue");
    assert!(maps.get_opt("private").await.expect("answer").is_none());

    // A change goes on, and one object says itself that it is meant.
    k.run("set image deployment/web web=web:2", "").await;
    k.run("scale deployment/web --replicas=1", "").await;
    until("c follows", async || {
        let c = y.get("web-c").await.ok()?;
        (image(&c) == "web:2" && replicas(&c) == Some(1)).then_some(())
    })
    .await;
    k.run("annotate configmap private cellway.io/policy=web", "").await;
    until("it is there", async || maps.get_opt("private").await.ok()?).await;

    // What the hub may not read is told, and comes once it may.
    let secret = r#"[{"op":"add","path":"/spec/resources/-","value":{"apiVersion":"v1","kind":"Secret","name":"key"}}]"#;
    // No blank in it: the line is split there.
    k.run(&format!("patch pp web --type=json -p {secret}"), "").await;
    until("the policy says so", async || {
        let policy: Value = serde_json::from_str(&k.run("get pp web -o json", "").await).ok()?;
        *LAST.lock() = policy["status"].to_string();
        (policy["status"]["conditions"][0]["reason"] == "KindNotReadable").then_some(())
    })
    .await;
    assert!(secrets.get_opt("key").await.expect("answer").is_none());
    k.run("create clusterrole hub-reads-secrets --verb=get,list,watch --resource=secrets", "").await;
    let group = "--group=system:cellway:controllers";
    k.run(
        &format!("create clusterrolebinding hub-reads-secrets --clusterrole=hub-reads-secrets {group}"),
        "",
    )
    .await;
    until("the secret is there", async || secrets.get_opt("key").await.ok()?).await;
    k.run(&format!("wait --for=condition=Ready propagationpolicy/web {TIMEOUT}"), "").await;

    // One is left behind, the others go with the policy; at the hub they stay.
    k.run("annotate deployment web kubefed.io/orphan=true", "").await;
    k.run("delete deployment web", "").await;
    until("it is nobody's", async || {
        let left = x.get("web-a").await.expect("it stays");
        (!left.labels().contains_key("kubefed.io/managed")).then_some(())
    })
    .await;
    k.run("delete pp web", "").await;
    until("they are gone", async || {
        let gone = services.get_opt("web").await.ok()?.is_none()
            && maps.get_opt("settings").await.ok()?.is_none()
            && maps.get_opt("private").await.ok()?.is_none();
        gone.then_some(())
    })
    .await;
    k.run("get configmap/settings service/web secret/key", "").await;
    world.end().await;
}

pub(crate) async fn jobs_ingresses_and_replica_sets_go_too(world: World) {
    let program = require!(tools::kubectl());
    let k = Kubectl { program, kubeconfig: world.kubeconfig.clone() };
    let [x, y] = [&world.x, &world.y].map(|client| Api::<Job>::namespaced(client.clone(), "shop"));
    let sets: Api<ReplicaSet> = Api::namespaced(world.x.clone(), "shop");
    let ingresses: Api<Ingress> = Api::namespaced(world.y.clone(), "shop");
    let is = |job: &Job, condition: &str| {
        let all = job.status.iter().flat_map(|status| status.conditions.iter().flatten());
        all.into_iter().any(|found| found.type_ == condition && found.status == "True")
    };

    k.run("apply -f -", TEAM).await;
    k.run("apply -f -", TEAM_POLICY).await;
    k.run(&format!("wait --for=condition=Ready propagationpolicy/team {TIMEOUT}"), "").await;
    for companion in ["federatedingress/web", "federatedreplicaset/workers"] {
        k.run(&format!("wait --for=condition=Ready {companion} {TIMEOUT}"), "").await;
    }
    let rules = ingresses.get("web").await.expect("there").spec.expect("a spec").rules.expect("rules");
    assert_eq!(rules[0].host.as_deref(), Some("web.example.com"));
    let crons: Api<CronJob> = Api::namespaced(world.x.clone(), "shop");
    until("its kind is enabled for the policy", async || {
        let cron = crons.get_opt("nightly-a").await.ok()??;
        (cron.spec.schedule == "0 3 * * *").then_some(())
    })
    .await;
    let set = sets.get("workers-a").await.expect("there");
    assert_eq!(set.status.expect("a status").ready_replicas, Some(2));

    // Each member's API server makes the selector and the labels of its own Job; the hub's stay at the hub.
    let job =
        until("it is suspended", async || x.get("migrate-a").await.ok().filter(|job| is(job, "Suspended")))
            .await;
    let uid = job.uid().expect("a uid");
    let spec = job.spec.expect("a spec");
    let selector = spec.selector.expect("a selector").match_labels.expect("labels");
    assert_eq!(selector["batch.kubernetes.io/controller-uid"], uid);
    let labels = spec.template.metadata.expect("metadata").labels.expect("labels");
    for (label, value) in [
        ("batch.kubernetes.io/controller-uid", uid.as_str()),
        ("job-name", "migrate-a"),
        ("app", "migrate"),
        ("cellway.io/cell", "a"),
    ] {
        assert_eq!(labels.get(label).map(String::as_str), Some(value), "{labels:?}");
    }

    // It runs to its end in every unit, and what the members put into it is nothing to put right.
    k.run(r#"patch job migrate --type=merge -p {"spec":{"suspend":false}}"#, "").await;
    k.run(&format!("wait --for=condition=Ready federatedjob/migrate {TIMEOUT}"), "").await;
    for (api, name) in [(&x, "migrate-a"), (&y, "migrate-c")] {
        let job = api.get(name).await.expect("there");
        assert!(is(&job, "Complete"), "{job:?}");
        assert_eq!(job.status.as_ref().and_then(|status| status.succeeded), Some(1));
        assert_eq!(job.metadata.generation, Some(2), "made, and resumed");
    }
    let federated: Value =
        serde_json::from_str(&k.run("get federatedjob migrate -o json", "").await).expect("JSON");
    assert_eq!(federated["status"]["units"][0]["observed"]["succeeded"], 1, "{federated}");
    let line = k.run("get job migrate --no-headers", "").await;
    assert_eq!(line.split_whitespace().nth(2), Some("0/1"), "nothing runs at the hub: {line}");

    k.run("scale replicaset/workers --replicas=1", "").await;
    until("a member follows", async || {
        let set = sets.get("workers-a").await.ok()?;
        (set.spec.replicas? == 1 && set.status?.ready_replicas? == 1).then_some(())
    })
    .await;
    assert_eq!(
        x.get("migrate-a").await.expect("there").metadata.generation,
        Some(2),
        "nothing was put right"
    );

    // What goes takes its pods with it.
    k.run("delete pp team", "").await;
    until("they are gone", async || {
        let gone = x.get_opt("migrate-a").await.ok()?.is_none()
            && sets.get_opt("workers-a").await.ok()?.is_none()
            && ingresses.get_opt("web").await.ok()?.is_none();
        gone.then_some(())
    })
    .await;
    if world.ours {
        // A kube-apiserver alone collects no garbage.
        let pods: Api<Pod> = Api::namespaced(world.x.clone(), "shop");
        until("their pods are gone", async || {
            pods.list(&Default::default()).await.ok()?.items.is_empty().then_some(())
        })
        .await;
    }
    k.run("get job/migrate ingress/web replicaset/workers", "").await;
    world.end().await;
}
