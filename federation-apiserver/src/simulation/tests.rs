//! Whole simulations on the API server in memory, with the clock paused: delays pass at once, in order.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use serde_json::{Value, json};

use super::client::{DeleteOptions, ObjectClient, Resource};
use super::memory::MemoryClient;
use super::object;
use super::{Clock, FAULT, LineOptions, Simulation, SimulationConfig, start};

async fn cluster() -> (MemoryClient, Simulation) {
    let clock = Clock::starting_at("2026-01-01T00:00:00Z".parse().unwrap());
    let client = MemoryClient::new(clock);
    let config = SimulationConfig { clock, ..SimulationConfig::zones("m", ["hz-a", "hz-b"], 2) };
    let simulation = start(Arc::new(client.clone()), config);
    client
        .until("nodes are ready", |c| c.all(Resource::NODES).iter().filter(|n| is_ready(n)).count() == 4)
        .await;
    (client, simulation)
}

fn is_ready(object: &Value) -> bool {
    object::condition(&object["status"], "Ready").is_some_and(|ready| ready["status"] == "True")
}

fn deployment(name: &str, replicas: i64) -> Value {
    json!({
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {"containers": [
                    {"name": "web", "image": "web:1", "ports": [{"name": "http", "containerPort": 8080}]},
                ]},
            },
        },
    })
}

async fn create(client: &MemoryClient, resource: Resource, object: Value) {
    client.create(resource, "default", object).await.unwrap();
}

/// As `kubectl rollout status` judges.
fn rolled_out(client: &MemoryClient, name: &str) -> bool {
    let Some(deployment) = client.one(Resource::DEPLOYMENTS, "default", name) else { return false };
    let status = &deployment["status"];
    let wanted = object::replicas(&deployment);
    let is = |field: &str| object::int(&status[field]) == Some(wanted);
    object::int(&status["observedGeneration"]) == Some(object::generation(&deployment))
        && is("updatedReplicas")
        && is("replicas")
        && is("readyReplicas")
        && is("availableReplicas")
        && object::condition(status, "Progressing")
            .is_some_and(|progress| progress["reason"] == "NewReplicaSetAvailable")
}

fn pods(client: &MemoryClient) -> Vec<Value> {
    client.all(Resource::PODS)
}

fn reasons(client: &MemoryClient) -> Vec<String> {
    let events = client.all(Resource::EVENTS);
    events.iter().map(|event| event["reason"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test(start_paused = true)]
async fn nodes_are_marked_and_beat() {
    let (client, simulation) = cluster().await;
    for node in client.all(Resource::NODES) {
        assert_eq!(object::labels(&node)["cellway.io/simulated"], "true");
        let version = node["status"]["nodeInfo"]["kubeletVersion"].as_str().unwrap();
        assert!(version.ends_with("-cellway-simulation"), "{version}");
    }
    let zone = |name: &str| {
        client.one(Resource::NODES, "", name).unwrap()["metadata"]["labels"]["topology.kubernetes.io/zone"]
            .clone()
    };
    assert_eq!((zone("m-node-1"), zone("m-node-4")), (json!("hz-a"), json!("hz-b")));
    let renewed = |c: &MemoryClient| {
        c.one(Resource::LEASES, "kube-node-lease", "m-node-1").map(|lease| lease["spec"]["renewTime"].clone())
    };
    client.until("a lease", |c| renewed(c).is_some()).await;
    let first = renewed(&client);
    client.until("a heartbeat", |c| renewed(c) != first).await;
    // A node that somebody deletes comes back.
    client.delete(Resource::NODES, "", "m-node-2", DeleteOptions::default()).await.unwrap();
    client
        .until("the node again", |c| c.one(Resource::NODES, "", "m-node-2").is_some_and(|n| is_ready(&n)))
        .await;
    simulation.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_deployment_becomes_ready_and_scales() {
    let (client, simulation) = cluster().await;
    create(&client, Resource::DEPLOYMENTS, deployment("web", 3)).await;
    client.until("3 ready", |c| rolled_out(c, "web")).await;
    let sets = client.all(Resource::REPLICA_SETS);
    assert_eq!(sets.len(), 1);
    assert_eq!(object::annotation(&sets[0], "deployment.kubernetes.io/revision"), Some("1"));
    assert_eq!(pods(&client).len(), 3);
    let mut addresses = std::collections::BTreeSet::new();
    let mut nodes = std::collections::BTreeSet::new();
    for pod in pods(&client) {
        assert!(object::is_controlled_by(&pod, &sets[0]));
        assert!(object::name(&pod).starts_with(object::name(&sets[0])));
        assert_eq!(object::labels(&pod)["pod-template-hash"], object::labels(&sets[0])["pod-template-hash"]);
        assert_eq!(pod["status"]["phase"], "Running");
        assert_eq!(pod["status"]["containerStatuses"][0]["ready"], true);
        addresses.insert(pod["status"]["podIP"].to_string());
        nodes.insert(pod["spec"]["nodeName"].to_string());
    }
    assert_eq!((addresses.len(), nodes.len()), (3, 3), "addresses are unique and pods are spread");
    for reason in ["ScalingReplicaSet", "SuccessfulCreate", "Scheduled", "Pulled", "Started"] {
        client.until(reason, |c| reasons(c).iter().any(|told| told == reason)).await;
    }

    client.edit(Resource::DEPLOYMENTS, "web", |d| d["spec"]["replicas"] = json!(1)).await;
    client.until("scaled down", |c| rolled_out(c, "web") && pods(c).len() == 1).await;
    client.edit(Resource::DEPLOYMENTS, "web", |d| d["spec"]["replicas"] = json!(5)).await;
    client.until("scaled up", |c| rolled_out(c, "web") && pods(c).len() == 5).await;
    assert_eq!(client.all(Resource::REPLICA_SETS).len(), 1);

    // A pod that is deleted is replaced.
    let victim = object::name(&pods(&client)[0]).to_owned();
    client.delete(Resource::PODS, "default", &victim, DeleteOptions::default()).await.unwrap();
    client
        .until("healed", |c| rolled_out(c, "web") && pods(c).iter().all(|p| object::name(p) != victim))
        .await;
    client.delete(Resource::DEPLOYMENTS, "default", "web", DeleteOptions::default()).await.unwrap();
    client.until("all gone", |c| pods(c).is_empty() && c.all(Resource::REPLICA_SETS).is_empty()).await;
    simulation.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_new_image_rolls_within_its_bounds() {
    let (client, simulation) = cluster().await;
    create(&client, Resource::DEPLOYMENTS, deployment("web", 4)).await;
    client.until("version 1", |c| rolled_out(c, "web")).await;
    let watcher = client.clone();
    let bounds = tokio::spawn(async move {
        // 25 % of 4 either way, at every moment.
        let version = watcher.list(Resource::PODS, &Default::default()).await.unwrap().1;
        let mut events = watcher.watch(Resource::PODS, &version).await.unwrap();
        let (mut most, mut least) = (0, usize::MAX);
        while events.next().await.is_some() {
            let pods = pods(&watcher);
            let living: Vec<&Value> = pods.iter().filter(|pod| !object::is_deleting(pod)).collect();
            most = most.max(living.len());
            least = least.min(living.iter().filter(|pod| is_ready(pod)).count());
            if living.iter().all(|pod| pod["spec"]["containers"][0]["image"] == "web:2" && is_ready(pod)) {
                break;
            }
        }
        (most, least)
    });
    let image = |image: &'static str| {
        move |d: &mut Value| d["spec"]["template"]["spec"]["containers"][0]["image"] = json!(image)
    };
    client.edit(Resource::DEPLOYMENTS, "web", image("web:2")).await;
    client.until("version 2", |c| rolled_out(c, "web") && pods(c).len() == 4).await;
    assert!(pods(&client).iter().all(|pod| pod["spec"]["containers"][0]["image"] == "web:2"));
    let (most, least) = bounds.await.unwrap();
    assert!(most <= 5 && least >= 3, "between {least} and {most} pods");
    let sets = client.all(Resource::REPLICA_SETS);
    assert_eq!(sets.len(), 2);
    let deployment = client.one(Resource::DEPLOYMENTS, "default", "web").unwrap();
    assert_eq!(object::annotation(&deployment, "deployment.kubernetes.io/revision"), Some("2"));
    let available = object::condition(&deployment["status"], "Available").unwrap();
    assert_eq!(available["reason"], "MinimumReplicasAvailable");

    // Back: the old set is used again, with a new revision.
    client.edit(Resource::DEPLOYMENTS, "web", image("web:1")).await;
    client.until("version 1 again", |c| rolled_out(c, "web") && pods(c).len() == 4).await;
    assert_eq!(client.all(Resource::REPLICA_SETS).len(), 2);
    let deployment = client.one(Resource::DEPLOYMENTS, "default", "web").unwrap();
    assert_eq!(object::annotation(&deployment, "deployment.kubernetes.io/revision"), Some("3"));
    simulation.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn recreate_never_mixes_versions() {
    let (client, simulation) = cluster().await;
    let mut web = deployment("web", 3);
    web["spec"]["strategy"] = json!({"type": "Recreate"});
    create(&client, Resource::DEPLOYMENTS, web).await;
    client.until("version 1", |c| rolled_out(c, "web")).await;
    let watcher = client.clone();
    let mixed = tokio::spawn(async move {
        let version = watcher.list(Resource::PODS, &Default::default()).await.unwrap().1;
        let mut events = watcher.watch(Resource::PODS, &version).await.unwrap();
        let mut mixed = false;
        while events.next().await.is_some() {
            let images: std::collections::BTreeSet<String> =
                pods(&watcher).iter().map(|pod| pod["spec"]["containers"][0]["image"].to_string()).collect();
            mixed |= images.len() > 1;
            if rolled_out(&watcher, "web") {
                break;
            }
            if images.iter().all(|image| image.contains(":2"))
                && pods(&watcher).iter().filter(|p| is_ready(p)).count() == 3
            {
                break;
            }
        }
        mixed
    });
    client
        .edit(Resource::DEPLOYMENTS, "web", |d| {
            d["spec"]["template"]["spec"]["containers"][0]["image"] = json!("web:2");
        })
        .await;
    client
        .until("version 2", |c| {
            rolled_out(c, "web") && pods(c).iter().all(|p| p["spec"]["containers"][0]["image"] == "web:2")
        })
        .await;
    assert!(!mixed.await.unwrap());
    simulation.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_paused_rollout_waits_and_a_stuck_one_says_so() {
    let (client, simulation) = cluster().await;
    let mut web = deployment("web", 4);
    web["spec"]["progressDeadlineSeconds"] = json!(60);
    create(&client, Resource::DEPLOYMENTS, web).await;
    client.until("version 1", |c| rolled_out(c, "web")).await;
    client
        .edit(Resource::DEPLOYMENTS, "web", |d| {
            d["spec"]["paused"] = json!(true);
            d["spec"]["replicas"] = json!(6);
            d["spec"]["template"]["metadata"]["annotations"][FAULT] = json!("Unready");
        })
        .await;
    client.until("scaled while paused", |c| pods(c).iter().filter(|pod| is_ready(pod)).count() == 6).await;
    let reason = |c: &MemoryClient| {
        let deployment = c.one(Resource::DEPLOYMENTS, "default", "web").unwrap();
        object::condition(&deployment["status"], "Progressing").unwrap()["reason"].clone()
    };
    client.until("said to be paused", |c| reason(c) == "DeploymentPaused").await;
    assert_eq!(client.all(Resource::REPLICA_SETS).len(), 1);
    client.edit(Resource::DEPLOYMENTS, "web", |d| d["spec"]["paused"] = json!(false)).await;
    client.until("the deadline", |c| reason(c) == "ProgressDeadlineExceeded").await;
    let ready = pods(&client).iter().filter(|pod| is_ready(pod)).count();
    assert!(ready >= 5, "a rollout that does not become ready took too many: {ready}");
    // Scaling in the middle of it keeps to both sets.
    client.edit(Resource::DEPLOYMENTS, "web", |d| d["spec"]["replicas"] = json!(12)).await;
    client
        .until("scaled in proportion", |c| {
            let sets = c.all(Resource::REPLICA_SETS);
            sets.iter().map(object::replicas).sum::<i64>() == 15
                && sets.iter().all(|set| object::replicas(set) > 1)
        })
        .await;
    simulation.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn pods_without_a_matching_node_wait_for_one() {
    let (client, simulation) = cluster().await;
    let mut web = deployment("web", 2);
    web["spec"]["template"]["spec"]["nodeSelector"] = json!({"topology.kubernetes.io/zone": "hz-c"});
    create(&client, Resource::DEPLOYMENTS, web).await;
    let told = |pod: &Value| {
        object::condition(&pod["status"], "PodScheduled")
            .is_some_and(|told| told["status"] == "False" && told["reason"] == "Unschedulable")
    };
    client.until("unschedulable", |c| pods(c).len() == 2 && pods(c).iter().all(told)).await;
    assert!(pods(&client).iter().all(|pod| pod["status"]["phase"] == "Pending"));
    client.until("an event", |c| reasons(c).iter().any(|reason| reason == "FailedScheduling")).await;
    let mut node = client.one(Resource::NODES, "", "m-node-3").unwrap();
    node["metadata"]["labels"]["topology.kubernetes.io/zone"] = json!("hz-c");
    client.update(Resource::NODES, node).await.unwrap();
    client.until("placed", |c| rolled_out(c, "web")).await;
    assert!(pods(&client).iter().all(|pod| pod["spec"]["nodeName"] == "m-node-3"));
    simulation.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn endpoints_follow_readiness() {
    let (client, simulation) = cluster().await;
    let service = json!({
        "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
    });
    create(&client, Resource::SERVICES, service).await;
    let mut web = deployment("web", 2);
    web["spec"]["template"]["spec"]["readinessGates"] = json!([{"conditionType": "cellway.io/traffic"}]);
    create(&client, Resource::DEPLOYMENTS, web).await;
    let counts = |c: &MemoryClient| {
        let endpoints = c.one(Resource::ENDPOINTS, "default", "web").unwrap_or_default();
        let subset = &endpoints["subsets"][0];
        (object::items(&subset["addresses"]).len(), object::items(&subset["notReadyAddresses"]).len())
    };
    client.until("both are known and not ready", |c| counts(c) == (0, 2)).await;
    client
        .until("containers are ready", |c| {
            pods(c).iter().all(|pod| pod["status"]["containerStatuses"][0]["ready"] == true)
        })
        .await;
    // The gate opens for one.
    let mut pod = pods(&client).remove(0);
    let gate = json!({"type": "cellway.io/traffic", "status": "True"});
    pod["status"]["conditions"].as_array_mut().unwrap().push(gate);
    client.update_status(Resource::PODS, pod).await.unwrap();
    client.until("one is ready", |c| counts(c) == (1, 1)).await;
    let endpoints = client.one(Resource::ENDPOINTS, "default", "web").unwrap();
    assert_eq!(endpoints["subsets"][0]["ports"], json!([{"name": "http", "port": 8080, "protocol": "TCP"}]));
    let ready = |c: &MemoryClient| {
        let slices = c.all(Resource::ENDPOINT_SLICES);
        assert!(slices.len() <= 1);
        let all: Vec<Value> =
            slices.iter().flat_map(|slice| object::items(&slice["endpoints"]).cloned()).collect();
        all.iter().filter(|endpoint| endpoint["conditions"]["ready"] == true).count()
    };
    client.until("the slice agrees", |c| ready(c) == 1).await;
    client.edit(Resource::DEPLOYMENTS, "web", |d| d["spec"]["replicas"] = json!(0)).await;
    client.until("empty", |c| counts(c) == (0, 0) && ready(c) == 0 && pods(c).is_empty()).await;
    client.delete(Resource::SERVICES, "default", "web", DeleteOptions::default()).await.unwrap();
    client
        .until("gone with the service", |c| {
            c.all(Resource::ENDPOINTS).is_empty() && c.all(Resource::ENDPOINT_SLICES).is_empty()
        })
        .await;
    simulation.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn refused_pods_are_tried_again() {
    let (client, simulation) = cluster().await;
    client.refuse_pods(3);
    create(&client, Resource::DEPLOYMENTS, deployment("web", 2)).await;
    client.until("ready after all", |c| rolled_out(c, "web")).await;
    client.until("an event", |c| reasons(c).iter().any(|reason| reason == "FailedCreate")).await;
    let set = client.all(Resource::REPLICA_SETS).remove(0);
    assert!(object::condition(&set["status"], "ReplicaFailure").is_none());
    simulation.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn an_image_changed_in_place_restarts_the_container() {
    let (client, simulation) = cluster().await;
    let pod = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "image": "i:1"}]}});
    create(&client, Resource::PODS, pod).await;
    let find = |c: &MemoryClient| c.one(Resource::PODS, "default", "p").unwrap();
    client.until("ready", |c| is_ready(&find(c))).await;
    client.edit(Resource::PODS, "p", |pod| pod["spec"]["containers"][0]["image"] = json!("i:2")).await;
    client.until("not ready", |c| !is_ready(&find(c))).await;
    client.until("ready again", |c| is_ready(&find(c))).await;
    let container = find(&client)["status"]["containerStatuses"][0].clone();
    assert_eq!((&container["image"], &container["restartCount"]), (&json!("i:2"), &json!(1)));
    simulation.shutdown().await;

    // Another simulation of the same cluster takes the pod as it is.
    let clock = Clock::starting_at("2026-01-02T00:00:00Z".parse().unwrap());
    let config = SimulationConfig { clock, ..SimulationConfig::zones("m", ["hz-a", "hz-b"], 2) };
    let before = find(&client);
    let simulation = start(Arc::new(client.clone()), config);
    create(&client, Resource::DEPLOYMENTS, deployment("web", 1)).await;
    client.until("it works", |c| rolled_out(c, "web")).await;
    assert_eq!(find(&client)["status"], before["status"]);
    simulation.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn logs_are_the_same_for_everybody() {
    let (client, simulation) = cluster().await;
    let pod = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
    create(&client, Resource::PODS, pod).await;
    client.until("placed", |c| pods(c)[0]["spec"]["nodeName"].is_string()).await;
    let logs = simulation.logs();
    let waiting = logs.lines(&pods(&client)[0], LineOptions::default()).err().unwrap();
    assert!(waiting.message.contains("is waiting to start: ContainerCreating"), "{waiting}");
    client.until("ready", |c| is_ready(&pods(c)[0])).await;
    tokio::time::advance(Duration::from_secs(20)).await;
    let pod = pods(&client).remove(0);
    let read = |options: LineOptions| {
        let lines = logs.lines(&pod, options).unwrap();
        async move {
            let chunks: Vec<bytes::Bytes> = lines.collect().await;
            String::from_utf8(chunks.concat()).unwrap()
        }
    };
    let all = read(LineOptions::default()).await;
    assert!(all.lines().count() >= 20);
    assert!(all.lines().all(|line| line.starts_with("[simulated] p/c line ")));
    let tail = read(LineOptions { tail_lines: Some(3), ..LineOptions::default() }).await;
    assert!(tail.lines().count() == 3 && all.ends_with(&tail));
    let recent = read(LineOptions { since_seconds: Some(5), ..LineOptions::default() }).await;
    assert!(recent.lines().count() == 5 && all.ends_with(&recent));
    let cut = read(LineOptions { limit_bytes: Some(30), ..LineOptions::default() }).await;
    assert_eq!(cut, all[..30]);
    let stamped = read(LineOptions { timestamps: true, tail_lines: Some(1), ..LineOptions::default() }).await;
    assert!(stamped.starts_with("2026-01-01T00:00:") && stamped.contains("Z [simulated]"), "{stamped}");

    // Following goes on, and ends with the pod.
    let mut following = logs
        .lines(&pod, LineOptions { follow: true, tail_lines: Some(0), ..LineOptions::default() })
        .unwrap();
    let first = following.next().await.unwrap();
    let number = all.lines().count();
    assert!(std::str::from_utf8(&first).unwrap().contains(&format!("line {number}:")));
    following.next().await.unwrap();
    client.delete(Resource::PODS, "default", "p", DeleteOptions::default()).await.unwrap();
    client.until("gone", |c| pods(c).is_empty()).await;
    while following.next().await.is_some() {}
    for (options, message) in [
        (LineOptions { container: Some("x".into()), ..LineOptions::default() }, "container x is not valid"),
        (LineOptions { previous: true, ..LineOptions::default() }, "previous terminated container"),
    ] {
        let error = logs.lines(&pod, options).err().unwrap();
        assert!(error.message.contains(message), "{error}");
    }
    simulation.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn stateful_and_daemon_sets() {
    let (client, simulation) = cluster().await;
    let template = json!({
        "metadata": {"labels": {"app": "x"}},
        "spec": {"containers": [{"name": "c", "image": "i:1"}]},
    });
    let selector = json!({"matchLabels": {"app": "x"}});
    let set = json!({
        "metadata": {"name": "db"},
        "spec": {"replicas": 3, "serviceName": "db", "selector": selector, "template": template},
    });
    create(&client, Resource::STATEFUL_SETS, set).await;
    let names = |c: &MemoryClient| -> Vec<String> {
        pods(c).iter().filter(|pod| is_ready(pod)).map(|pod| object::name(pod).to_owned()).collect()
    };
    client.until("three in order", |c| names(c) == ["db-0", "db-1", "db-2"]).await;
    let done = |c: &MemoryClient, image: &str| {
        let set = c.one(Resource::STATEFUL_SETS, "default", "db").unwrap();
        object::int(&set["status"]["updatedReplicas"]) == Some(object::replicas(&set))
            && set["status"]["currentRevision"] == set["status"]["updateRevision"]
            && set["status"]["readyReplicas"] == set["spec"]["replicas"]
            && pods(c).iter().all(|pod| pod["spec"]["containers"][0]["image"] == image)
    };
    client.until("its status", |c| done(c, "i:1")).await;
    client
        .edit(Resource::STATEFUL_SETS, "db", |set| {
            set["spec"]["template"]["spec"]["containers"][0]["image"] = json!("i:2");
        })
        .await;
    client.until("rolled", |c| done(c, "i:2")).await;
    client.edit(Resource::STATEFUL_SETS, "db", |set| set["spec"]["replicas"] = json!(1)).await;
    client.until("scaled down", |c| done(c, "i:2") && names(c) == ["db-0"]).await;
    client.delete(Resource::STATEFUL_SETS, "default", "db", DeleteOptions::default()).await.unwrap();
    client.until("gone", |c| pods(c).is_empty()).await;

    let set = json!({"metadata": {"name": "agent"}, "spec": {"selector": selector, "template": template}});
    create(&client, Resource::DAEMON_SETS, set).await;
    let done = |c: &MemoryClient, image: &str| {
        let set = c.one(Resource::DAEMON_SETS, "default", "agent").unwrap();
        set["status"]["desiredNumberScheduled"] == 4
            && set["status"]["numberAvailable"] == 4
            && set["status"]["updatedNumberScheduled"] == 4
            && pods(c).iter().all(|pod| pod["spec"]["containers"][0]["image"] == image)
    };
    client.until("one on each node", |c| done(c, "i:1")).await;
    client
        .edit(Resource::DAEMON_SETS, "agent", |set| {
            set["spec"]["template"]["spec"]["containers"][0]["image"] = json!("i:2");
        })
        .await;
    client.until("rolled", |c| done(c, "i:2")).await;
    simulation.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_settled_cluster_is_quiet() {
    let (client, simulation) = cluster().await;
    for name in ["a", "b"] {
        create(&client, Resource::DEPLOYMENTS, deployment(name, 20)).await;
        let service = json!({
            "metadata": {"name": name},
            "spec": {"selector": {"app": name}, "ports": [{"port": 80}]},
        });
        create(&client, Resource::SERVICES, service).await;
    }
    client.until("ready", |c| rolled_out(c, "a") && rolled_out(c, "b")).await;
    let ready = |c: &MemoryClient, name: &str| {
        let endpoints = c.one(Resource::ENDPOINTS, "default", name).unwrap();
        object::items(&endpoints["subsets"][0]["addresses"]).len() == 20
    };
    client.until("endpoints", |c| ready(c, "a") && ready(c, "b")).await;
    let beat = |c: &MemoryClient| {
        c.one(Resource::LEASES, "kube-node-lease", "m-node-1").unwrap()["spec"]["renewTime"].clone()
    };
    // The first heartbeats may still find something to settle, the next must not.
    for writes in [None, Some(()), Some(())] {
        let (before, at) = (client.writes(), beat(&client));
        client.until("a heartbeat", |c| beat(c) != at).await;
        assert!(writes.is_none() || client.writes() == before, "something is written over and over");
    }
    // 40 pods with a handful of steps each: far fewer writes than a fight between controllers would make.
    assert!(client.writes() < 40 * 25, "{} writes", client.writes());
    simulation.shutdown().await;
}

fn job(name: &str, spec: Value) -> Value {
    let mut job = json!({
        "metadata": {"name": name},
        "spec": {
            "parallelism": 1, "completions": 1, "backoffLimit": 6,
            "template": {
                "metadata": {"labels": {"job-name": name}},
                "spec": {"restartPolicy": "Never", "containers": [{"name": "work", "image": "work:1"}]},
            },
        },
    });
    for (key, value) in spec.as_object().unwrap() {
        job["spec"][key] = value.clone();
    }
    job
}

fn job_is(client: &MemoryClient, name: &str, condition: &str) -> bool {
    let job = client.one(Resource::JOBS, "default", name).unwrap();
    object::condition(&job["status"], condition).is_some_and(|found| found["status"] == "True")
}

#[tokio::test(start_paused = true)]
async fn a_job_makes_pods_until_enough_have_succeeded() {
    let (client, simulation) = cluster().await;
    create(&client, Resource::JOBS, job("work", json!({"parallelism": 2, "completions": 3}))).await;
    client
        .until("two at once", |c| pods(c).iter().filter(|pod| object::is_pod_active(pod)).count() == 2)
        .await;
    client.until("complete", |c| job_is(c, "work", "Complete")).await;
    let done = client.one(Resource::JOBS, "default", "work").unwrap();
    assert_eq!(
        (&done["status"]["succeeded"], &done["status"]["active"], &done["status"]["ready"]),
        (&json!(3), &Value::Null, &json!(0))
    );
    assert!(job_is(&client, "work", "SuccessCriteriaMet"));
    assert!(done["status"]["completionTime"].is_string() && done["status"]["startTime"].is_string());
    assert_eq!(pods(&client).len(), 3);
    for pod in pods(&client) {
        assert!(object::is_controlled_by(&pod, &done));
        assert_eq!(pod["status"]["phase"], "Succeeded");
        assert_eq!(pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"], 0);
        assert!(!is_ready(&pod));
    }
    // A Job that is done is done, whatever becomes of its pods.
    let one = object::name(&pods(&client)[0]).to_owned();
    client.delete(Resource::PODS, "default", &one, DeleteOptions::default()).await.unwrap();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(pods(&client).len(), 2);
    for reason in ["SuccessfulCreate", "Completed"] {
        client.until(reason, |c| reasons(c).iter().any(|told| told == reason)).await;
    }
    client.delete(Resource::JOBS, "default", "work", DeleteOptions::default()).await.unwrap();
    client.until("its pods are gone", |c| pods(c).is_empty()).await;
    simulation.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_suspended_job_has_no_pods() {
    let (client, simulation) = cluster().await;
    create(&client, Resource::JOBS, job("work", json!({"suspend": true}))).await;
    client.until("suspended", |c| job_is(c, "work", "Suspended")).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(pods(&client).is_empty());
    client.edit(Resource::JOBS, "work", |job| job["spec"]["suspend"] = json!(false)).await;
    client.until("a pod", |c| pods(c).iter().any(is_ready)).await;
    client.edit(Resource::JOBS, "work", |job| job["spec"]["suspend"] = json!(true)).await;
    client.until("it is gone", |c| pods(c).is_empty() && job_is(c, "work", "Suspended")).await;
    assert!(client.one(Resource::JOBS, "default", "work").unwrap()["status"]["startTime"].is_null());
    client.edit(Resource::JOBS, "work", |job| job["spec"]["suspend"] = json!(false)).await;
    client.until("complete", |c| job_is(c, "work", "Complete")).await;
    simulation.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_job_fails_when_its_pods_do_or_time_is_up() {
    let (client, simulation) = cluster().await;
    let faulty = |name: &str, fault: &str, spec: Value| {
        let mut job = job(name, spec);
        job["spec"]["template"]["metadata"]["annotations"] = json!({FAULT: fault});
        job
    };
    let crashing = faulty("crashing", "CrashLoopBackOff", json!({"backoffLimit": 2}));
    create(&client, Resource::JOBS, crashing).await;
    client.until("failed", |c| job_is(c, "crashing", "Failed")).await;
    let failed = client.one(Resource::JOBS, "default", "crashing").unwrap();
    assert_eq!((&failed["status"]["failed"], &failed["status"]["succeeded"]), (&json!(3), &Value::Null));
    let why = |job: &Value| object::condition(&job["status"], "Failed").unwrap()["reason"].clone();
    assert_eq!(why(&failed), "BackoffLimitExceeded");
    assert!(pods(&client).iter().all(|pod| pod["status"]["phase"] == "Failed"));
    let slow = faulty("slow", "Unready", json!({"activeDeadlineSeconds": 30}));
    create(&client, Resource::JOBS, slow).await;
    client.until("failed", |c| job_is(c, "slow", "Failed")).await;
    assert_eq!(why(&client.one(Resource::JOBS, "default", "slow").unwrap()), "DeadlineExceeded");
    simulation.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn an_indexed_job_has_a_pod_for_each_index() {
    let (client, simulation) = cluster().await;
    let spec = json!({"completionMode": "Indexed", "parallelism": 2, "completions": 3});
    create(&client, Resource::JOBS, job("work", spec)).await;
    client.until("complete", |c| job_is(c, "work", "Complete")).await;
    let done = client.one(Resource::JOBS, "default", "work").unwrap();
    assert_eq!(
        (&done["status"]["succeeded"], &done["status"]["completedIndexes"]),
        (&json!(3), &json!("0-2"))
    );
    let index = |pod: &Value| object::labels(pod)["batch.kubernetes.io/job-completion-index"].to_string();
    let indexes: std::collections::BTreeSet<String> = pods(&client).iter().map(index).collect();
    assert_eq!((indexes.len(), pods(&client).len()), (3, 3));
    simulation.shutdown().await;
}
