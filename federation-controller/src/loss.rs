//! Gives cells and clusters up, and takes them back, by the votes of other members: what `spec.lossPolicy` asks for.
//!
//! Each voter's agent is asked for a connection to the address that the policy names; the hub adds its own view. What the
//! votes come to is [`federation_core::loss`]'s to say. What is decided is written into `spec.failover`, where an operator
//! would write it: everything after that is the same, and an operator can always have the last word.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use federation_core::api::{
    Cell, Failover, FederatedObject, KubeFedCluster, LossPolicy, LossProbe, LossStatus, TopologyType,
    Verdict, Vote,
};
use federation_core::capacity::{Room, RoomView};
use federation_core::evacuation;
use federation_core::loss::{Ballot, Decision, Endpoint, GivenUp, HUB, Scheme, Watch};
use federation_core::names::{FEDERATION_NAMESPACE, FIELD_MANAGER};
use federation_core::topology::Topology;
use futures::stream::{self, StreamExt as _};
use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};
use tower::ServiceExt as _;
use tracing::{debug, info, warn};

use crate::Shared;
use crate::connector::{BoxedIo, ConnectError, Destination, To, Trust};
use crate::failover::Place;
use crate::hub::{self, ObjectKey};
use crate::member::chain;

/// Looks at one time: a few for each of some policies.
const AT_ONCE: usize = 32;
/// The type number of what asks for rooms here; no type has it.
const NO_TYPE: usize = usize::MAX;
/// Members that are named in a reason.
const SHOWN: usize = 8;

/// What the hub holds of a cell or a cluster that has a policy, or had one.
#[derive(Debug, Clone)]
pub(crate) struct Watched {
    pub(crate) policy: Option<LossPolicy>,
    pub(crate) failover: Option<Failover>,
    pub(crate) status: Option<LossStatus>,
    /// The member that it is, or lies in.
    pub(crate) cluster: String,
    pub(crate) version: Option<String>,
    pub(crate) uid: Option<String>,
}

/// Watches for ever.
pub(crate) async fn run(shared: Arc<Shared>) {
    let begun = Instant::now();
    let mut watches: BTreeMap<Place, Watch> = BTreeMap::new();
    loop {
        sleep(shared.options.probe_interval).await;
        let places = shared.state.read().watched();
        watches.retain(|place, _| places.get(place).is_some_and(|of| of.policy.is_some()));
        let votes = collect(&shared, &places).await;
        for (place, of) in &places {
            let Some(policy) = &of.policy else {
                if of.status.is_some() {
                    write(&shared, place, "tell of the votes on", &json!({"status": {"loss": null}}), true)
                        .await;
                }
                continue;
            };
            let known = of.status.as_ref().map(|status| status.phase).unwrap_or_default();
            let watch = watches.entry(place.clone()).or_insert_with(|| Watch::resume(known));
            let said = votes.get(place).cloned().unwrap_or_default();
            judge(&shared, place, of, policy, watch, said, begun.elapsed()).await;
        }
    }
}

/// One voter's word, and why.
#[derive(Debug, Clone)]
struct Said {
    from: String,
    says: Verdict,
    message: Option<String>,
}

/// Asks every voter.
async fn collect(shared: &Arc<Shared>, places: &BTreeMap<Place, Watched>) -> BTreeMap<Place, Vec<Said>> {
    let mut looks: Vec<(Place, String, LossProbe)> = Vec::new();
    for (place, of) in places {
        for probe in of.policy.iter().flat_map(|policy| &policy.probes) {
            looks.push((place.clone(), of.cluster.clone(), probe.clone()));
        }
    }
    let asked =
        stream::iter(looks.into_iter().enumerate()).map(|(index, (place, cluster, probe))| async move {
            let own = matches!(place, Place::Cluster(_)) && probe.from == cluster;
            let (says, message) = if own {
                (Verdict::Unknown, Some("a cluster has no say about itself".to_owned()))
            } else {
                ask(shared, &probe).await
            };
            (index, place, Said { from: probe.from, says, message })
        });
    let mut votes = in_order(asked.buffer_unordered(AT_ONCE).collect().await);
    for (place, of) in places {
        let own = hub_view(shared, place, &of.cluster);
        votes.entry(place.clone()).or_default().push(own);
    }
    votes
}

/// The words by place, in the order in which they were asked for: they come as fast as each voter is.
fn in_order(mut said: Vec<(usize, Place, Said)>) -> BTreeMap<Place, Vec<Said>> {
    said.sort_by_key(|(index, ..)| *index);
    let mut votes: BTreeMap<Place, Vec<Said>> = BTreeMap::new();
    for (_, place, said) in said {
        votes.entry(place).or_default().push(said);
    }
    votes
}

/// What the hub sees by itself.
fn hub_view(shared: &Shared, place: &Place, cluster: &str) -> Said {
    let (says, message) = match shared.members().get(cluster) {
        Some(member) => member.reach(),
        None => (Verdict::Unknown, Some("the member is not known".to_owned())),
    };
    let (says, message) = match (place, says) {
        (Place::Cell(_), Verdict::Reachable) => {
            (Verdict::Unknown, Some("its cluster answers; of the cell the hub sees nothing".to_owned()))
        }
        _ => (says, message),
    };
    Said { from: HUB.to_owned(), says, message }
}

/// Has a member look at an address.
async fn ask(shared: &Shared, probe: &LossProbe) -> (Verdict, Option<String>) {
    let endpoint = match Endpoint::of(probe) {
        Ok(endpoint) => endpoint,
        Err(error) => return (Verdict::Unknown, Some(error.to_string())),
    };
    // A member that does not answer the hub may be the one that is cut off.
    let online = shared.members().get(&probe.from).is_some_and(|member| member.is_online());
    if !online {
        return (Verdict::Unknown, Some("it cannot be asked now".to_owned()));
    }
    let host = endpoint.host.clone();
    let tls = match &endpoint.scheme {
        Scheme::Https(ca) => Some(Trust { ca: ca.clone(), server_name: host.clone() }),
        Scheme::Tcp | Scheme::Http => None,
    };
    let to = To::Endpoint { host, port: endpoint.port, tls };
    let to = Destination { cluster: probe.from.clone(), to };
    let looking = async {
        let io = shared.connector.clone().oneshot(to).await?;
        if endpoint.scheme == Scheme::Tcp {
            return Ok((Verdict::Reachable, None));
        }
        Ok::<_, ConnectError>(match status(io, &endpoint).await {
            Ok(code) if code < 500 => (Verdict::Reachable, None),
            Ok(code) => (Verdict::Unreachable, Some(format!("{} answers {code}", probe.url))),
            Err(error) => (Verdict::Unreachable, Some(chain(&error))),
        })
    };
    match timeout(shared.options.probe_timeout, looking).await {
        Ok(Ok(found)) => found,
        Ok(Err(ConnectError::NotAnswering { message, .. })) => (Verdict::Unreachable, Some(message)),
        Ok(Err(error)) => (Verdict::Unknown, Some(chain(&error))),
        Err(_) => {
            let limit = shared.options.probe_timeout.as_secs_f64();
            (Verdict::Unreachable, Some(format!("{} does not answer within {limit:.1} s", probe.url)))
        }
    }
}

/// The status of the answer to one request.
async fn status(io: BoxedIo, endpoint: &Endpoint) -> Result<u16, hyper::Error> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io)).await?;
    let host =
        if endpoint.host.contains(':') { format!("[{}]", endpoint.host) } else { endpoint.host.clone() };
    let request = http::Request::get(endpoint.path.as_str())
        .header(http::header::HOST, format!("{host}:{}", endpoint.port))
        .header(http::header::CONNECTION, "close")
        .body(Empty::<hyper::body::Bytes>::new());
    // A path and a host that were checked: they make a request. Else nobody is asked, and nobody answers.
    let Ok(request) = request else { return Ok(400) };
    let asking = async move { sender.send_request(request).await.map(|answer| answer.status().as_u16()) };
    let mut asking = std::pin::pin!(asking);
    tokio::select! {
        answer = &mut asking => answer,
        // The answer may have come with the end.
        _ended = connection => asking.await,
    }
}

/// Draws what follows from the votes on one place, and tells it.
async fn judge(
    shared: &Shared,
    place: &Place,
    of: &Watched,
    policy: &LossPolicy,
    watch: &mut Watch,
    said: Vec<Said>,
    now: Duration,
) {
    let ballots: Vec<Ballot<'_>> =
        said.iter().map(|said| Ballot { from: &said.from, says: said.says }).collect();
    let given_up = match &of.failover {
        None => GivenUp::No,
        Some(failover) if failover.by_policy => GivenUp::ByPolicy,
        Some(_) => GivenUp::ByOperator,
    };
    let kind = match place {
        Place::Cell(_) => TopologyType::Cell,
        Place::Cluster(_) => TopologyType::Cluster,
    };
    let decision = watch.observe(policy, kind, &ballots, given_up, now);
    let mut message = None;
    match decision {
        Decision::Nothing => {}
        Decision::GiveUp => match room_for(shared, place, policy) {
            Ok(()) => {
                let by: BTreeSet<&str> = said
                    .iter()
                    .filter(|said| said.says == Verdict::Unreachable && said.from != HUB)
                    .map(|said| said.from.as_str())
                    .take(SHOWN)
                    .collect();
                let by = by.into_iter().collect::<Vec<_>>().join(", ");
                let reason = format!("lost by its policy: {by} do not reach it");
                let failover =
                    Failover { by_policy: true, reason: Some(reason.clone()), ..policy.failover.clone() };
                let patch = json!({
                    "metadata": {"resourceVersion": of.version},
                    "spec": {"failover": failover},
                });
                if write(shared, place, "give up", &patch, false).await {
                    warn!(?place, reason, "given up");
                    shared.events.warning(&about(place, of), "DeclaredLost", reason);
                    watch.done(decision);
                }
            }
            Err(why) => message = Some(format!("not given up: {why}")),
        },
        Decision::TakeBack => {
            let patch = json!({
                "metadata": {"resourceVersion": of.version},
                "spec": {"failover": null},
            });
            if write(shared, place, "take back", &patch, false).await {
                info!(?place, "taken back");
                let note = "everybody reaches it again: what moved returns".to_owned();
                shared.events.normal(&about(place, of), "TakenBack", note);
                watch.done(decision);
            }
        }
    }
    let before = of.status.clone().unwrap_or_default();
    let status = told(&before, watch, said, message, &crate::now());
    if of.status.as_ref() != Some(&status) {
        let mut value = serde_json::to_value(&status).unwrap_or_default();
        if let Value::Object(map) = &mut value {
            // A merge patch keeps what it does not name.
            map.entry("message").or_insert(Value::Null);
        }
        write(shared, place, "tell of the votes on", &json!({"status": {"loss": value}}), true).await;
    }
}

/// The status; what has not changed keeps its times.
fn told(
    before: &LossStatus,
    watch: &Watch,
    mut said: Vec<Said>,
    message: Option<String>,
    now: &str,
) -> LossStatus {
    said.sort_by(|a, b| a.from.cmp(&b.from));
    let votes = said.into_iter().enumerate().map(|(index, said)| {
        // One voter may look at several addresses; they stay in their order.
        let old = before.votes.get(index).filter(|old| old.from == said.from && old.says == said.says);
        // Words differ from look to look; the first of them stand as long as the verdict does.
        let (since, message) = match old {
            Some(old) => (old.since.clone(), old.message.clone()),
            None => (now.to_owned(), said.message),
        };
        Vote { from: said.from, says: said.says, since, message }
    });
    let same = before.phase == watch.phase() && !before.since.is_empty();
    LossStatus {
        phase: watch.phase(),
        since: if same { before.since.clone() } else { now.to_owned() },
        votes: votes.collect(),
        message,
    }
}

/// Whether what would leave fits elsewhere.
fn room_for(shared: &Shared, place: &Place, policy: &LossPolicy) -> Result<(), String> {
    let any = policy.failover.ignore_capacity;
    let (name, kind) = match place {
        Place::Cell(name) => (name, TopologyType::Cell),
        Place::Cluster(name) => (name, TopologyType::Cluster),
    };
    let workloads: BTreeSet<usize> = shared.types.numbers().into_iter().collect();
    let (objects, topologies) = {
        let state = shared.state.read();
        if !state.types_known() || !workloads.iter().all(|kind| state.is_complete(*kind)) {
            return Err("not everything has been listed yet".into());
        }
        let of = |kind| shared.types.get(kind).is_some_and(|of| of.has_replicas());
        let objects = state.objects(of);
        let namespaces: BTreeSet<String> = objects.iter().map(|(key, _)| key.namespace.to_string()).collect();
        let topologies: BTreeMap<String, Topology> = namespaces
            .into_iter()
            .map(|namespace| {
                let topology = state.topology(&namespace).with_given_up(kind, name, &policy.failover);
                (namespace, topology)
            })
            .collect();
        (objects, topologies)
    };
    let mut moves = Vec::new();
    for (key, object) in objects {
        let Some(of) = shared.types.get(key.kind) else { continue };
        let parsed = serde_json::to_value(&object).and_then(serde_json::from_value::<FederatedObject>);
        let (Ok(object), Some(topology)) = (parsed, topologies.get(&*key.namespace)) else { continue };
        moves.extend(evacuation::moves(topology, &of, &object, kind, name));
    }
    let asker = ObjectKey::new(NO_TYPE, "", name);
    let members = shared.members();
    let clusters: BTreeSet<String> = moves.iter().flat_map(|one| one.clusters()).map(str::to_owned).collect();
    let mut rooms: BTreeMap<String, Result<Room, String>> = BTreeMap::new();
    for cluster in clusters.into_iter().filter(|_| !any) {
        let Some(member) = members.get(&cluster) else { continue };
        let room = match member.room(&asker).0 {
            _ if !member.is_online() => Err("it cannot be reached".to_owned()),
            RoomView::Known(room) => Ok(Room::clone(&room)),
            RoomView::Unreadable(why) => Err(why),
            RoomView::Unknown => Err("its room is being counted".to_owned()),
        };
        rooms.insert(cluster, room);
    }
    for one in &mut moves {
        one.fit(&mut rooms, any);
    }
    let short: i64 = moves.iter().map(|one| one.short()).sum();
    let all: i64 = moves.iter().map(|one| one.replicas).sum();
    match moves.iter().find(|one| one.short() > 0) {
        Some(first) if !policy.partially => Err(format!(
            "{short} of {all} replicas have no place elsewhere, as of {}/{}: {}",
            first.namespace,
            first.name,
            first.note.as_deref().unwrap_or("no room"),
        )),
        _ => Ok(()),
    }
}

fn about(place: &Place, of: &Watched) -> ObjectReference {
    let (api_version, kind, namespace, name) = match place {
        Place::Cell(name) => ("topology.cellway.io/v1alpha1", "Cell", None, name),
        Place::Cluster(name) => {
            ("core.kubefed.io/v1beta1", "KubeFedCluster", Some(FEDERATION_NAMESPACE.to_owned()), name)
        }
    };
    ObjectReference {
        api_version: Some(api_version.into()),
        kind: Some(kind.into()),
        namespace,
        name: Some(name.clone()),
        uid: of.uid.clone(),
        ..ObjectReference::default()
    }
}

/// Writes a part of a cell or a cluster; whether that succeeded. What fails is tried again at the next look.
async fn write(shared: &Shared, place: &Place, what: &str, patch: &Value, status: bool) -> bool {
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
    let patch = Patch::Merge(patch);
    let writing = async {
        match place {
            Place::Cell(name) => {
                let api: Api<Cell> = Api::all(shared.hub.clone());
                match status {
                    true => api.patch_status(name, &params, &patch).await.map(drop),
                    false => api.patch(name, &params, &patch).await.map(drop),
                }
            }
            Place::Cluster(name) => {
                let api: Api<KubeFedCluster> = hub::clusters(shared.hub.clone());
                match status {
                    true => api.patch_status(name, &params, &patch).await.map(drop),
                    false => api.patch(name, &params, &patch).await.map(drop),
                }
            }
        }
    };
    match timeout(shared.options.request_timeout, writing).await {
        Ok(Ok(())) => true,
        Ok(Err(error)) => {
            debug!(?place, error = chain(&error), "cannot {what} it");
            false
        }
        Err(_) => {
            debug!(?place, "the hub took too long to {what} it");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// What is made of an answer that comes all at once and ends the connection.
    async fn answered(answer: &'static str) -> Result<u16, hyper::Error> {
        let (ours, mut theirs) = tokio::io::duplex(4096);
        let endpoint = Endpoint::of(&LossProbe {
            from: "west".into(),
            url: "http://[fd00::1]:8080/healthz".into(),
            ca_bundle: None,
        })
        .expect("address");
        let serving = async move {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(theirs.read_u8().await.expect("a request"));
            }
            theirs.write_all(answer.as_bytes()).await.expect("written");
            String::from_utf8(head).expect("text")
        };
        let (found, asked) = tokio::join!(status(Box::new(ours), &endpoint), serving);
        assert!(
            asked.starts_with("GET /healthz HTTP/1.1\r\n") && asked.contains("[fd00::1]:8080"),
            "{asked}"
        );
        found
    }

    #[test]
    fn words_of_one_voter_keep_their_order_whichever_comes_first() {
        let said = |says| Said { from: "west".into(), says, message: None };
        let place = || Place::Cell("a".into());
        let first = (0, place(), said(Verdict::Reachable));
        let second = (1, place(), said(Verdict::Unreachable));
        for came in [vec![first.clone(), second.clone()], vec![second, first]] {
            let votes = in_order(came);
            let says: Vec<Verdict> = votes[&place()].iter().map(|said| said.says).collect();
            assert_eq!(says, [Verdict::Reachable, Verdict::Unreachable]);
        }
    }

    #[tokio::test]
    async fn an_answer_counts_by_its_status() {
        // Often, as answer and end may be seen in either order.
        for _ in 0..50 {
            let ok = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok";
            assert_eq!(answered(ok).await.ok(), Some(200));
        }
        assert_eq!(answered("HTTP/1.1 503 Unavailable\r\nContent-Length: 0\r\n\r\n").await.ok(), Some(503));
        assert_eq!(answered("HTTP/1.1 401 Unauthorized\r\n\r\n").await.ok(), Some(401));
        for bad in ["", "SSH-2.0-OpenSSH\r\n", "HTTP/1.1 20"] {
            assert!(answered(bad).await.is_err(), "{bad}");
        }
    }
}
