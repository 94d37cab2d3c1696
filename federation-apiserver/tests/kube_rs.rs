//! kube-rs against the hub API: its watcher in each of its ways to begin, elections on a Lease, server-side apply.

mod common;

use std::collections::BTreeMap;
use std::pin::pin;
use std::time::Duration;

use common::{LIMIT, Server};
use federation_apiserver::Role;
use federation_store::Compaction;
use futures::{Stream, StreamExt as _};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::PartialObjectMeta;
use kube::runtime::watcher::{self, Event, InitialListStrategy};
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;
use tokio::task::JoinSet;

async fn client(server: &Server) -> Client {
    let kubeconfig = Kubeconfig::read_from(&server.kubeconfig).expect("a kubeconfig");
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
    Client::try_from(config.expect("a configuration")).expect("a client")
}

fn map(name: &str, value: &str) -> ConfigMap {
    serde_json::from_value(json!({"metadata": {"name": name}, "data": {"k": value}})).expect("a config map")
}

/// What a watcher has told: the objects that are there, and how often it began anew.
#[derive(Default)]
struct Told {
    there: BTreeMap<String, String>,
    begun: usize,
    failures: usize,
}

impl Told {
    /// Takes events until `done`.
    async fn until(
        &mut self,
        events: &mut (impl Stream<Item = watcher::Result<Event<ConfigMap>>> + Unpin),
        what: &str,
        done: impl Fn(&Self) -> bool,
    ) {
        while !done(self) {
            let event = tokio::time::timeout(LIMIT, events.next()).await;
            let Ok(event) = event else { panic!("{what} did not come: {:?}", self.there) };
            match event.expect("a watcher goes on for ever") {
                Ok(Event::Init) => {
                    self.begun += 1;
                    self.there.clear();
                }
                Ok(Event::InitDone) => {}
                Ok(Event::InitApply(object) | Event::Apply(object)) => {
                    let value = object.data.as_ref().and_then(|d| d.get("k")).cloned().unwrap_or_default();
                    self.there.insert(object.name_any(), value);
                }
                Ok(Event::Delete(object)) => {
                    let name = object.name_any();
                    assert!(self.there.remove(&name).is_some(), "{name} is deleted and was not there");
                }
                Err(_) => self.failures += 1,
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_follows_through_ends_of_its_watch() {
    let server = Server::hub().await;
    let api: Api<ConfigMap> = Api::default_namespaced(client(&server).await);
    for i in 0..7 {
        api.create(&PostParams::default(), &map(&format!("m{i}"), "0")).await.expect("created");
    }
    let pages = InitialListStrategy::ListWatch;
    for (round, strategy) in [pages, InitialListStrategy::StreamingList].into_iter().enumerate() {
        // Each watch ends after a second, and the next goes on where it did.
        let mut config = watcher::Config::default().timeout(1);
        // Pages cannot be had together with a stream.
        config.page_size = (round == 0).then_some(3);
        config.initial_list_strategy = strategy;
        let mut events = pin!(watcher::watcher(api.clone(), config));
        let mut told = Told::default();
        told.until(&mut events, "what is there", |told| told.there.len() == 7).await;
        let end = tokio::time::Instant::now() + Duration::from_millis(2500);
        let mut writes = 0;
        while tokio::time::Instant::now() < end {
            writes += 1;
            let value = format!("{round}-{writes}");
            let patch = json!({"data": {"k": value}});
            api.patch("m3", &PatchParams::default(), &Patch::Merge(patch)).await.expect("patched");
            if writes % 5 == 0 {
                api.create(&PostParams::default(), &map("brief", &value)).await.expect("created");
                api.delete("brief", &DeleteParams::default()).await.expect("deleted");
            }
            told.until(&mut events, "the change", |told| told.there["m3"] == value).await;
        }
        told.until(&mut events, "the deletion", |told| !told.there.contains_key("brief")).await;
        assert_eq!((told.begun, told.failures, told.there.len()), (1, 0, 7), "in {writes} writes");
    }

    // Only metadata is asked for.
    let metadata: Api<PartialObjectMeta<ConfigMap>> = Api::default_namespaced(api.into_client());
    let mut metadata = pin!(watcher::watcher(metadata, watcher::Config::default()));
    let mut names = Vec::new();
    while names.len() < 7 {
        let event = tokio::time::timeout(LIMIT, metadata.next()).await.expect("in time").expect("an event");
        if let Event::InitApply(object) = event.expect("no failure") {
            names.push(object.name_any());
        }
    }
    assert_eq!(names, ["m0", "m1", "m2", "m3", "m4", "m5", "m6"]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_that_is_too_late_lists_again() {
    let server = Server::start(Role::Hub, |config| config.compaction = Compaction::Retain(5), |_| {}).await;
    let client = client(&server).await;
    let api: Api<ConfigMap> = Api::default_namespaced(client.clone());
    let first = api.create(&PostParams::default(), &map("a", "0")).await.expect("created");
    let from = first.resource_version().expect("a revision");
    // More than is kept in the store's log and in memory.
    for i in 0..24 {
        let large = json!({"data": {"large": i.to_string().repeat(300_000)}});
        api.patch("a", &PatchParams::default(), &Patch::Merge(large)).await.expect("patched");
    }
    let deadline = tokio::time::Instant::now() + LIMIT;
    loop {
        let watched = api.watch(&kube::api::WatchParams::default(), &from).await.expect("a watch begins");
        let mut watched = pin!(watched);
        match tokio::time::timeout(LIMIT, watched.next()).await.expect("in time").expect("an event") {
            Ok(kube::api::WatchEvent::Error(status)) => {
                assert_eq!((status.code, status.reason.as_str()), (410, "Expired"), "{status:?}");
                break;
            }
            other => assert!(tokio::time::Instant::now() < deadline, "not compacted in time: {other:?}"),
        }
    }
    server.stop().await;
}

/// Candidates that take the lease from each other as fast as they can: whoever wrote saw the one before, so the number of
/// transitions is the number of writes, and the answers to those who came late are conflicts.
#[tokio::test(flavor = "multi_thread")]
async fn of_many_candidates_one_gets_the_lease() {
    const CANDIDATES: usize = 5;
    const TERMS: i32 = 20;
    let server = Server::hub().await;
    let client = client(&server).await;
    let mut candidates = JoinSet::new();
    for candidate in 0..CANDIDATES {
        let api: Api<Lease> = Api::default_namespaced(client.clone());
        candidates.spawn(async move {
            let identity = format!("candidate-{candidate}");
            let (mut won, mut lost) = (0, 0);
            while won < TERMS {
                let now = Some(MicroTime(Timestamp::now()));
                let written = match api.get_opt("leader").await.expect("an answer") {
                    None => {
                        let spec = LeaseSpec {
                            holder_identity: Some(identity.clone()),
                            lease_duration_seconds: Some(15),
                            acquire_time: now.clone(),
                            renew_time: now,
                            lease_transitions: Some(1),
                            ..LeaseSpec::default()
                        };
                        let metadata = ObjectMeta { name: Some("leader".into()), ..ObjectMeta::default() };
                        let lease = Lease { metadata, spec: Some(spec) };
                        api.create(&PostParams::default(), &lease).await
                    }
                    Some(mut lease) => {
                        let spec = lease.spec.as_mut().expect("a spec");
                        spec.lease_transitions = spec.lease_transitions.map(|number| number + 1);
                        spec.holder_identity = Some(identity.clone());
                        spec.renew_time = now;
                        api.replace("leader", &PostParams::default(), &lease).await
                    }
                };
                match written {
                    Ok(lease) => {
                        let spec = lease.spec.expect("a spec");
                        assert_eq!(spec.holder_identity.as_deref(), Some(identity.as_str()));
                        won += 1;
                    }
                    Err(kube::Error::Api(status)) => {
                        let reason = status.reason.as_str();
                        assert!(matches!(reason, "Conflict" | "AlreadyExists"), "{status:?}");
                        lost += 1;
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            lost
        });
    }
    let mut lost = 0;
    while let Some(ended) = candidates.join_next().await {
        lost += ended.expect("a candidate ends");
    }
    let api: Api<Lease> = Api::default_namespaced(client);
    let spec = api.get("leader").await.expect("there").spec.expect("a spec");
    let terms = TERMS * i32::try_from(CANDIDATES).expect("few");
    assert_eq!(spec.lease_transitions, Some(terms), "after {lost} conflicts");
    // Times have microseconds, as they were sent.
    assert!(spec.renew_time > spec.acquire_time, "{spec:?}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn apply_has_owners_conflicts_and_force() {
    let server = Server::hub().await;
    let client = client(&server).await;
    let api: Api<ConfigMap> = Api::default_namespaced(client.clone());
    let apply = |data: serde_json::Value| {
        Patch::Apply(
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "m"}, "data": data}),
        )
    };
    let (one, two) = (PatchParams::apply("one"), PatchParams::apply("two"));
    api.patch("m", &one, &apply(json!({"a": "1", "b": "1"}))).await.expect("applied");
    let Err(kube::Error::Api(status)) = api.patch("m", &two, &apply(json!({"a": "2"}))).await else {
        panic!("no conflict")
    };
    let causes = status.details.as_ref().map(|details| details.causes.clone()).unwrap_or_default();
    assert_eq!((status.code, status.reason.as_str()), (409, "Conflict"), "{status:?}");
    let causes: Vec<_> = causes.iter().map(|cause| (cause.reason.as_str(), cause.field.as_str())).collect();
    assert_eq!(causes, [("FieldManagerConflict", ".data.a")]);
    // The same value is no conflict, but shared.
    api.patch("m", &two, &apply(json!({"a": "1"}))).await.expect("shared");
    let forced = api.patch("m", &two.clone().force(), &apply(json!({"a": "2"}))).await.expect("forced");
    assert_eq!(forced.data.expect("data")["a"], "2");
    let kept = api.patch("m", &one, &apply(json!({}))).await.expect("applied");
    assert_eq!(kept.data.expect("data"), BTreeMap::from([("a".to_owned(), "2".to_owned())]));
    let dry = api.patch("m", &two.clone().dry_run(), &apply(json!({"a": "3"}))).await.expect("a dry run");
    assert_eq!(dry.data.expect("data")["a"], "3");
    let now = api.get("m").await.expect("there");
    assert_eq!(now.data.as_ref().expect("data")["a"], "2");
    let managers: Vec<_> = now.managed_fields().iter().filter_map(|entry| entry.manager.as_deref()).collect();
    assert!(managers.contains(&"two"), "{managers:?}");
    // Applied again as it is: nothing is written.
    let again = api.patch("m", &two, &apply(json!({"a": "2"}))).await.expect("applied");
    assert_eq!(again.resource_version(), now.resource_version());

    // A typed object; what the server makes of it comes back.
    let secrets: Api<Secret> = Api::default_namespaced(client);
    let mut secret = Secret {
        metadata: ObjectMeta { name: Some("s".into()), ..ObjectMeta::default() },
        string_data: Some(BTreeMap::from([("k".to_owned(), "v".to_owned())])),
        ..Secret::default()
    };
    let applied = secrets.patch("s", &one, &Patch::Apply(&secret)).await.expect("applied");
    assert_eq!(applied.data.expect("data")["k"].0, b"v");
    secret.string_data = None;
    secrets.patch("s", &one, &Patch::Apply(&secret)).await.expect("applied");
    server.stop().await;
}
