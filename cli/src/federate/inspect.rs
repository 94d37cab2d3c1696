//! `describe` and `logs`: from a federated object down to the pods in its members.

use std::cmp::Reverse;
use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use federation_apiserver::pod_status;
use federation_core::api::{Phase, UnitStatus};
use federation_core::topology::parse_selector;
use federation_core::types::{FederatedType, Workload};
use futures::{AsyncBufReadExt as _, StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Event, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::api::{ApiResource, DynamicObject, ListParams, LogParams};
use kube::{Api, Client, ResourceExt as _};
use serde::{Deserialize as _, Serialize};
use serde_json::Value;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use super::object::{Found, ObjectArgs};
use crate::error::{Error, Result};
use crate::hub::explain;
use crate::lists::for_people;
use crate::output::{self, OutputArgs, Paint, Table, age, colours, text_out, visible, visible_lines};

/// Events shown of one object.
const MAX_EVENTS: usize = 5;
/// Pods shown of one unit.
const MAX_PODS: u32 = 100;
/// Jobs of a CronJob whose pods are looked for, the newest first: each is asked for by itself, and Kubernetes keeps four unless
/// told otherwise.
const MAX_JOBS: usize = 10;
/// Jobs of a namespace that are read at once while those of a CronJob are looked for.
const JOBS_AT_ONCE: u32 = 100;
/// Pods whose logs are read at once.
const MAX_STREAMS: usize = 50;
/// Units that members are asked about at once: enough that one member which hangs with all its cells leaves room for others, and
/// few enough connections for any hub.
const MAX_UNITS: usize = 32;
/// Pods of a unit whose events are read at once.
const MAX_LOOKS: usize = 8;
/// Longest time for all that is asked of a member about one unit: a person waits, and the other units are there already.
const PATIENCE: Duration = Duration::from_secs(10);
/// Lines that wait for the terminal.
const LINES: usize = 256;

#[derive(Debug, clap::Args)]
pub(crate) struct DescribeArgs {
    #[command(flatten)]
    pub(crate) object: ObjectArgs,
    /// Look at the hub only, not into members.
    #[arg(long)]
    pub(crate) hub_only: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct LogsArgs {
    #[command(flatten)]
    pub(crate) object: ObjectArgs,
    /// Only this unit's pods.
    #[arg(long, value_name = "UNIT")]
    pub(crate) unit: Option<String>,
    /// The container [default: the pod's only one].
    #[arg(short, long, value_name = "NAME")]
    pub(crate) container: Option<String>,
    /// Go on reading.
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Lines of each pod from the end.
    #[arg(long, value_name = "LINES")]
    pub(crate) tail: Option<i64>,
}

/// A tree of lines.
struct Tree {
    text: String,
    colours: bool,
}

impl Tree {
    fn line(&mut self, depth: usize, text: &str, paint: Paint) {
        self.text.push_str(&"   ".repeat(depth));
        if depth > 0 {
            self.text.push_str("└─ ");
        }
        self.text.push_str(&paint.on(text, self.colours));
        self.text.push('\n');
    }

    /// What happened and what to do about it, a line each.
    fn error(&mut self, depth: usize, error: &str) {
        error.lines().for_each(|line| self.line(depth, line.trim_start(), Paint::Bad));
    }

    fn events(&mut self, depth: usize, events: &[String]) {
        events.iter().for_each(|event| self.line(depth, event, Paint::Faint));
    }

    fn unit(&mut self, unit: &UnitStatus) {
        let paint = match unit.phase {
            Phase::Synced if unit.ready != Some(false) => Paint::Good,
            Phase::Synced | Phase::Masked | Phase::Pending | Phase::Removing => Paint::Warn,
            _ => Paint::Bad,
        };
        let revision = unit.revision.as_deref().unwrap_or("no revision");
        let ready = match unit.ready {
            Some(true) => ", ready",
            Some(false) => ", not ready",
            None => "",
        };
        self.line(
            1,
            &format!("{} in {}: {:?}{ready}, at {revision}", unit.name, unit.cluster, unit.phase),
            paint,
        );
        if let Some(message) = &unit.message {
            self.line(2, message, Paint::Bad);
        }
    }
}

pub(crate) async fn describe(args: DescribeArgs) -> Result<()> {
    let found = Found::open(&args.object).await?;
    let status = found.object.status.clone().unwrap_or_default();
    let mut asked = Vec::new();
    for unit in &status.units {
        let member = if args.hub_only || matches!(unit.phase, Phase::Unreachable | Phase::Missing) {
            None
        } else {
            Some(found.hub.member(&unit.cluster).await?)
        };
        asked.push((unit.clone(), member));
    }
    let namespace = found.of.target_namespace(&found.namespace);
    let described = Described {
        units: look_at(asked, &found.of, namespace).await,
        events: events(
            found.hub.client(),
            &found.namespace,
            found.raw.metadata.uid.as_deref(),
            Instant::now() + PATIENCE,
        )
        .await,
        object: found.raw.clone(),
    };
    match args.output.output {
        format if for_people(format) => text_out(&tree_of(&found, &described)),
        format => output::print(format, &described, |_| Table::default()),
    }
}

/// A federated object with what its members say.
#[derive(Serialize)]
struct Described {
    object: DynamicObject,
    events: Vec<String>,
    units: Vec<Unit>,
}

#[derive(Serialize)]
struct Unit {
    status: UnitStatus,
    /// Where the member was asked.
    #[serde(flatten)]
    inside: Option<Inside>,
}

/// A unit's object in its member, or why it could not be read.
#[derive(Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Inside {
    kind: String,
    object: Option<DynamicObject>,
    error: Option<String>,
    events: Vec<String>,
    pods: Vec<Seen>,
    pods_error: Option<String>,
}

#[derive(Serialize)]
struct Seen {
    name: String,
    node: Option<String>,
    ready: bool,
    state: String,
    /// Of one that is not ready.
    events: Vec<String>,
}

/// Looks at units in their members, side by side: one that hangs holds up only its own lines.
async fn look_at(units: Vec<(UnitStatus, Option<Client>)>, of: &FederatedType, namespace: &str) -> Vec<Unit> {
    let looks = units.into_iter().enumerate().map(|(index, (unit, member))| async move {
        let inside = match (member, &unit.object) {
            (Some(client), Some(object)) => Some(look(&client, of, namespace, object).await),
            _ => None,
        };
        (index, Unit { status: unit, inside })
    });
    let mut units: Vec<_> = stream::iter(looks).buffer_unordered(MAX_UNITS).collect().await;
    units.sort_by_key(|(index, _)| *index);
    units.into_iter().map(|(_, unit)| unit).collect()
}

async fn look(client: &Client, of: &FederatedType, namespace: &str, object: &str) -> Inside {
    let until = Instant::now() + PATIENCE;
    let mut inside = Inside { kind: of.target.kind.clone(), ..Inside::default() };
    let api = objects(client, of, namespace);
    let live = match in_time(until, format!("read {object}"), api.get(object)).await {
        Ok(live) => live,
        Err(error) => {
            inside.error = Some(error.to_string());
            return inside;
        }
    };
    inside.events = events(client, namespace, live.metadata.uid.as_deref(), until).await;
    match pods(client, of, namespace, &live, until).await {
        Ok(pods) => inside.pods = seen(client, namespace, pods.unwrap_or_default(), until).await,
        Err(error) => inside.pods_error = Some(error.to_string()),
    }
    inside.object = Some(live);
    inside
}

/// The objects of a type in a member.
fn objects(client: &Client, of: &FederatedType, namespace: &str) -> Api<DynamicObject> {
    if of.target.namespaced {
        Api::namespaced_with(client.clone(), namespace, &of.target.resource())
    } else {
        Api::all_with(client.clone(), &of.target.resource())
    }
}

/// What a member answers until then.
async fn in_time<T>(
    until: Instant,
    tried: String,
    answer: impl Future<Output = std::result::Result<T, kube::Error>>,
) -> Result<T> {
    match timeout_at(until, answer).await {
        Ok(answer) => answer.map_err(explain(tried)),
        Err(_) => Err(Error::unreachable(tried, format!("the member did not answer within {PATIENCE:?}"))),
    }
}

/// The pods of an object in a member; `None` of one that selects none. Those of a CronJob are its Jobs', the newest first.
async fn pods(
    client: &Client,
    of: &FederatedType,
    namespace: &str,
    live: &DynamicObject,
    until: Instant,
) -> Result<Option<Vec<Pod>>> {
    let name = live.name_any();
    let selectors: Vec<String> = if of.target.workload == Some(Workload::JobTemplate) {
        let jobs = jobs(client, namespace, live, until).await?;
        jobs.iter().filter_map(|job| selector(&job.data)).collect()
    } else {
        match selector(&live.data) {
            Some(selector) => vec![selector],
            None => return Ok(None),
        }
    };
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let mut pods = Vec::new();
    for selector in selectors {
        let params = ListParams::default().labels(&selector).limit(MAX_PODS);
        let listed = in_time(until, format!("list the pods of {name}"), api.list(&params)).await?;
        pods.extend(listed.items);
    }
    pods.truncate(MAX_PODS as usize);
    Ok(Some(pods))
}

/// The Jobs that a CronJob made, the newest first.
async fn jobs(
    client: &Client,
    namespace: &str,
    cron: &DynamicObject,
    until: Instant,
) -> Result<Vec<DynamicObject>> {
    let api: Api<DynamicObject> =
        Api::namespaced_with(client.clone(), namespace, &ApiResource::erase::<Job>(&()));
    let is_its = |job: &DynamicObject| {
        job.owner_references().iter().any(|owner| Some(&owner.uid) == cron.metadata.uid.as_ref())
    };
    // No label says whose they are: all of the namespace are looked through, and few are kept.
    let mut page = ListParams::default().limit(JOBS_AT_ONCE);
    let mut jobs: Vec<DynamicObject> = Vec::new();
    loop {
        let listing = in_time(until, format!("list the Jobs of {}", cron.name_any()), api.list(&page));
        let listed = listing.await?;
        jobs.extend(listed.items.into_iter().filter(is_its));
        jobs.sort_by_key(|job| Reverse(job.creation_timestamp()));
        jobs.truncate(MAX_JOBS);
        match listed.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = page.continue_token(&token),
            None => return Ok(jobs),
        }
    }
}

/// What is shown of pods.
async fn seen(client: &Client, namespace: &str, pods: Vec<Pod>, until: Instant) -> Vec<Seen> {
    let seen = pods.into_iter().map(|pod| async move {
        let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_deref());
        let ready = conditions
            .into_iter()
            .flatten()
            .any(|condition| condition.type_ == "Ready" && condition.status == "True");
        let uid = pod.metadata.uid.as_deref().filter(|_| !ready);
        Seen {
            name: pod.name_any(),
            node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
            ready,
            state: serde_json::to_value(&pod).map(|pod| pod_status(&pod)).unwrap_or_default(),
            events: events(client, namespace, uid, until).await,
        }
    });
    stream::iter(seen).buffered(MAX_LOOKS).collect().await
}

fn tree_of(found: &Found, described: &Described) -> String {
    let status = found.object.status.clone().unwrap_or_default();
    let mut tree =
        Tree { text: String::new(), colours: colours(std::io::IsTerminal::is_terminal(&std::io::stdout())) };
    let place = if found.namespace.is_empty() { String::new() } else { format!("{}/", found.namespace) };
    let summary = status.summary.as_deref().unwrap_or("not looked at yet");
    tree.line(0, &format!("{} {place}{}: {summary}", found.of.kind, found.name), Paint::Bold);
    for condition in &status.conditions {
        let good = condition.status == "True" && !condition.type_.ends_with("Invalid");
        let paint = if good { Paint::Good } else { Paint::Warn };
        tree.line(
            1,
            &format!("{}={} {}: {}", condition.type_, condition.status, condition.reason, condition.message),
            paint,
        );
    }
    tree.events(1, &described.events);
    for Unit { status, inside } in &described.units {
        tree.unit(status);
        let Some(inside) = inside else { continue };
        if let Some(error) = &inside.error {
            tree.error(2, error);
            continue;
        }
        let object = status.object.as_deref().unwrap_or_default();
        tree.line(2, &format!("{} {object}", inside.kind), Paint::Plain);
        tree.events(3, &inside.events);
        if let Some(error) = &inside.pods_error {
            tree.error(3, error);
        }
        for pod in &inside.pods {
            let paint = if pod.ready { Paint::Good } else { Paint::Bad };
            let node = pod.node.as_deref().unwrap_or("no node");
            tree.line(3, &format!("Pod {} on {node}: {}", pod.name, pod.state), paint);
            tree.events(4, &pod.events);
        }
    }
    tree.text
}

/// The last events about an object; none when they cannot be read until then.
async fn events(client: &Client, namespace: &str, uid: Option<&str>, until: Instant) -> Vec<String> {
    let Some(uid) = uid else { return Vec::new() };
    let home = if namespace.is_empty() { "default" } else { namespace };
    let api: Api<Event> = Api::namespaced(client.clone(), home);
    let about = ListParams::default().fields(&format!("involvedObject.uid={uid}"));
    let Ok(Ok(found)) = timeout_at(until, api.list(&about)).await else { return Vec::new() };
    let time = |event: &Event| -> Option<jiff::Timestamp> {
        let last = event.last_timestamp.as_ref().map(|time| time.0);
        last.or_else(|| event.event_time.as_ref().map(|time| time.0))
    };
    let mut events = found.items;
    events.sort_by_key(time);
    let now = jiff::Timestamp::now();
    events
        .iter()
        .rev()
        .take(MAX_EVENTS)
        .map(|event| {
            let since = time(event).map(|time| age(&time.to_string(), now)).unwrap_or_default();
            let text = |text: &Option<String>| text.clone().unwrap_or_default();
            format!("{since} ago {} {}: {}", text(&event.type_), text(&event.reason), text(&event.message))
        })
        .collect()
}

/// The label selector of a workload's pods.
fn selector(live: &Value) -> Option<String> {
    let selector = LabelSelector::deserialize(&live["spec"]["selector"]).ok()?;
    let selector = parse_selector(&selector).ok()?;
    // An empty one would be every pod of the namespace.
    (!selector.selects_all()).then(|| selector.to_string())
}

pub(crate) async fn logs(args: LogsArgs) -> Result<()> {
    let tried = format!("read the logs of {}", args.object.object);
    let found = Found::open(&args.object).await?;
    let status = found.object.status.clone().unwrap_or_default();
    let units: Vec<_> = status
        .units
        .into_iter()
        .filter(|unit| args.unit.as_ref().is_none_or(|wanted| *wanted == unit.name))
        .collect();
    if units.is_empty() {
        return Err(Error::not_found(tried, "there is no such unit, or none at all"));
    }
    let params = LogParams {
        container: args.container.clone(),
        follow: args.follow,
        tail_lines: args.tail,
        ..LogParams::default()
    };
    let log = Log::new(found.of.clone(), found.of.target_namespace(&found.namespace).to_owned(), params);
    let mut reading = JoinSet::new();
    let (sender, mut said) = mpsc::channel(LINES);
    for unit in units {
        let Some(object) = unit.object else { continue };
        let client = if args.follow {
            found.hub.member_to_follow(&unit.cluster).await?
        } else {
            found.hub.member(&unit.cluster).await?
        };
        reading.spawn(Arc::clone(&log).read(unit.name, object, client, sender.clone()));
    }
    drop(sender);
    let mut problems = 0;
    while let Some(said) = said.recv().await {
        match said {
            Said::Line(line) => text_out(&line)?,
            // At once: what is followed may go on for days.
            Said::Problem(problem) => {
                problems += 1;
                eprintln!("{}", visible_lines(&problem));
            }
        }
    }
    while let Some(done) = reading.join_next().await {
        done.map_err(|error| Error::failed(&tried, error))?;
    }
    // A reader of standard output that has gone away changes nothing.
    let _ = std::io::stdout().flush();
    match problems {
        0 => Ok(()),
        _ => Err(Error::failed(tried, "not everything could be read: what could not stands above")),
    }
}

/// What is read of members.
struct Log {
    of: FederatedType,
    namespace: String,
    params: LogParams,
    /// Places for members that are asked which pods there are.
    asking: Semaphore,
    /// Places for pods that are read.
    streams: Semaphore,
}

/// What comes of it.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    Line(String),
    Problem(String),
}

// === impl Log ===

impl Log {
    fn new(of: FederatedType, namespace: String, params: LogParams) -> Arc<Self> {
        let (asking, streams) = (Semaphore::new(MAX_UNITS), Semaphore::new(MAX_STREAMS));
        Arc::new(Self { of, namespace, params, asking, streams })
    }

    /// Reads the pods of a unit's object to their ends. No unit waits for the pods of another one.
    async fn read(self: Arc<Self>, unit: String, object: String, client: Client, sender: mpsc::Sender<Said>) {
        let pods = {
            let Ok(_place) = self.asking.acquire().await else { return };
            self.pods_of(&client, &object).await
        };
        let pods = match pods {
            Ok(pods) => pods,
            Err(error) => {
                // Nobody listens any more: then nothing is said.
                let _ = sender.send(Said::Problem(format!("{unit}: {error}"))).await;
                return;
            }
        };
        let (mut places, mut left_out) = (Vec::new(), 0);
        for pod in pods {
            match self.streams.try_acquire() {
                Ok(place) => places.push((pod, place)),
                Err(_) => left_out += 1,
            }
        }
        if left_out > 0 {
            let problem = format!(
                "{unit}: {left_out} pods are left out, of more than {MAX_STREAMS}: name a unit with --unit"
            );
            let _ = sender.send(Said::Problem(problem)).await;
        }
        let reading = places.into_iter().map(|(pod, place)| {
            let (client, sender, unit, log) = (&client, &sender, &unit, &self);
            async move {
                let _place = place;
                if let Err(problem) = log.read_pod(unit, &pod, client, sender).await {
                    let _ = sender.send(Said::Problem(problem)).await;
                }
            }
        });
        futures::future::join_all(reading).await;
    }

    async fn read_pod(
        &self,
        unit: &str,
        pod: &str,
        client: &Client,
        sender: &mpsc::Sender<Said>,
    ) -> std::result::Result<(), String> {
        // What the container wrote goes on as it is, as kubectl passes it on; who it is, a member says.
        let prefix = format!("[{} {}]", visible(unit), visible(pod));
        let api: Api<Pod> = Api::namespaced(client.clone(), &self.namespace);
        let stream = api.log_stream(pod, &self.params).await.map_err(|error| format!("{prefix} {error}"))?;
        let mut stream = std::pin::pin!(stream.lines().map_err(|error| format!("{prefix} {error}")));
        while let Some(line) = stream.next().await {
            if sender.send(Said::Line(format!("{prefix} {}\n", line?))).await.is_err() {
                break;
            }
        }
        Ok(())
    }

    /// The pods of an object.
    async fn pods_of(&self, client: &Client, object: &str) -> Result<Vec<String>> {
        let until = Instant::now() + PATIENCE;
        let api = objects(client, &self.of, &self.namespace);
        let live = in_time(until, format!("read {object}"), api.get(object)).await?;
        let pods = pods(client, &self.of, &self.namespace, &live, until).await?;
        let pods =
            pods.ok_or_else(|| Error::failed(format!("find the pods of {object}"), "it has no selector"))?;
        Ok(pods.iter().map(|pod| pod.name_any()).collect())
    }
}

#[cfg(test)]
mod tests {
    use federation_core::types::builtin;
    use http::{Request, Response};
    use kube::client::Body;
    use serde_json::json;

    use super::*;

    /// A member with one Deployment of one pod.
    fn member() -> Client {
        let answer = |path: &str| -> Vec<u8> {
            let found = match path {
                path if path.ends_with("/log") => return b"one\ntwo\n".to_vec(),
                path if path.ends_with("/pods") => {
                    json!({"apiVersion": "v1", "kind": "PodList", "metadata": {},
                    "items": [{"metadata": {"name": "web-1", "uid": "2"}, "spec": {"containers": []}}]})
                }
                path if path.ends_with("/events") => {
                    json!({"apiVersion": "v1", "kind": "EventList", "metadata": {}, "items": []})
                }
                _ => {
                    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "uid": "1"},
                    "spec": {"selector": {"matchLabels": {"app": "web"}}}})
                }
            };
            found.to_string().into_bytes()
        };
        let server = tower::service_fn(move |request: Request<Body>| {
            let answer = answer(request.uri().path());
            async move { Ok::<_, std::convert::Infallible>(Response::new(Body::from(answer))) }
        });
        Client::new(server, "default")
    }

    /// One that takes requests and answers none.
    fn hanging() -> Client {
        type Answer = std::result::Result<Response<Body>, std::convert::Infallible>;
        Client::new(tower::service_fn(|_: Request<Body>| std::future::pending::<Answer>()), "default")
    }

    fn deployments() -> FederatedType {
        builtin().into_iter().find(|of| of.target.kind == "Deployment").unwrap()
    }

    fn cron_jobs() -> FederatedType {
        FederatedType::of("batch", "v1", "CronJob", "cronjobs", true)
    }

    /// A member with a CronJob that has run twice, and a Job of somebody else. Pods are found by their Jobs' selectors only.
    fn scheduled() -> Client {
        let job = |name: &str, owner: &str, minute: u32| {
            json!({"metadata": {"name": name, "uid": name, "creationTimestamp": format!("2026-01-01T00:0{minute}:00Z"),
                    "ownerReferences": [{"apiVersion": "batch/v1", "kind": "CronJob", "name": "report", "uid": owner}]},
                "spec": {"selector": {"matchLabels": {"controller-uid": name}}}})
        };
        let list = |version: &str, kind: &str, items: Value| json!({"apiVersion": version, "kind": kind, "metadata": {}, "items": items});
        let answer = move |uri: &http::Uri| match uri.path() {
            "/apis/batch/v1/namespaces/shop/cronjobs/report" => {
                json!({"apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": "report", "uid": "cron"},
                    "spec": {"schedule": "* * * * *"}})
            }
            "/apis/batch/v1/namespaces/shop/jobs" => {
                let all = json!([job("first", "cron", 1), job("other", "else", 2), job("second", "cron", 3)]);
                list("batch/v1", "JobList", all)
            }
            "/api/v1/namespaces/shop/pods" => {
                let query = uri.query().unwrap_or_default();
                let asked = |job: &&str| query.contains(&format!("labelSelector=controller-uid%3D{job}"));
                let found = ["first", "other", "second"].into_iter().find(asked);
                let pods = found.map(|job| json!({"metadata": {"name": format!("{job}-pod")}}));
                list("v1", "PodList", pods.into_iter().collect())
            }
            _ => list("v1", "EventList", json!([])),
        };
        let server = tower::service_fn(move |request: Request<Body>| {
            let answer = answer(request.uri()).to_string().into_bytes();
            async move { Ok::<_, std::convert::Infallible>(Response::new(Body::from(answer))) }
        });
        Client::new(server, "default")
    }

    #[tokio::test]
    async fn the_pods_of_a_cron_job_are_those_of_its_jobs_the_newest_first() {
        let inside = look(&scheduled(), &cron_jobs(), "shop", "report").await;
        assert_eq!((&inside.error, &inside.pods_error), (&None, &None));
        let shown: Vec<_> = inside.pods.iter().map(|pod| pod.name.as_str()).collect();
        assert_eq!(shown, ["second-pod", "first-pod"]);
        let log = Log::new(cron_jobs(), "shop".into(), LogParams::default());
        assert_eq!(log.pods_of(&scheduled(), "report").await.unwrap(), ["second-pod", "first-pod"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_member_that_hangs_has_a_line_among_the_others() {
        let unit = |name: String| UnitStatus { name, object: Some("web".into()), ..UnitStatus::default() };
        let begun = Instant::now();
        // More of it than are asked at once, and the others behind them.
        let hang = (0..MAX_UNITS).map(|number| (unit(format!("a-{number}")), Some(hanging())));
        let well = (0..2).map(|number| (unit(format!("b-{number}")), Some(member())));
        let units = look_at(hang.chain(well).collect(), &deployments(), "shop").await;
        assert_eq!(begun.elapsed().as_secs(), PATIENCE.as_secs());
        let inside: Vec<_> = units.iter().map(|unit| unit.inside.as_ref().unwrap()).collect();
        let error = inside[0].error.as_deref().unwrap();
        assert!(error.contains("did not answer within 10s"), "{error}");
        for (unit, inside) in units.iter().zip(&inside).skip(MAX_UNITS) {
            assert!(unit.status.name.starts_with("b-"), "they keep their order");
            assert!(inside.error.is_none() && inside.object.is_some());
            assert_eq!(inside.pods[0].name, "web-1");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn logs_of_the_others_come_while_a_member_hangs() {
        let log = Log::new(deployments(), "shop".into(), LogParams::default());
        let (sender, mut said) = mpsc::channel(LINES);
        let begun = Instant::now();
        let mut reading = JoinSet::new();
        for (unit, client) in [("a", hanging()), ("b", member())] {
            reading.spawn(Arc::clone(&log).read(unit.into(), "web".into(), client, sender.clone()));
        }
        drop(sender);
        for line in ["one", "two"] {
            assert_eq!(said.recv().await, Some(Said::Line(format!("[b web-1] {line}\n"))));
        }
        assert!(begun.elapsed() < PATIENCE);
        let Some(Said::Problem(problem)) = said.recv().await else { panic!("the member is named") };
        assert!(problem.starts_with("a: cannot read web: the member did not answer"), "{problem}");
        assert_eq!(said.recv().await, None);
    }

    #[test]
    fn a_tree_shows_what_members_say_and_does_nothing_of_it() {
        let mut tree = Tree { text: String::new(), colours: false };
        tree.line(2, "3s ago Warning Bad: \x1b[2K\r\n└─ Ready=True", Paint::Faint);
        assert_eq!(tree.text, "      └─ 3s ago Warning Bad: ^[[2K\\r\\n└─ Ready=True\n");
    }

    #[test]
    fn selectors_of_workloads() {
        let live = json!({"spec": {"selector": {"matchLabels": {"app": "web", "cellway.io/cell": "a"}}}});
        assert_eq!(selector(&live).as_deref(), Some("app=web,cellway.io/cell=a"));
        let expressions = json!([
            {"key": "tier", "operator": "In", "values": ["back", "front"]},
            {"key": "app", "operator": "NotIn", "values": ["old"]},
            {"key": "owner", "operator": "Exists"},
            {"key": "canary", "operator": "DoesNotExist"},
        ]);
        let said = "tier in (back,front),app notin (old),owner,!canary";
        let live = json!({"spec": {"selector": {"matchExpressions": expressions}}});
        assert_eq!(selector(&live).as_deref(), Some(said));
        let live =
            json!({"spec": {"selector": {"matchLabels": {"app": "web"}, "matchExpressions": expressions}}});
        assert_eq!(selector(&live), Some(format!("app=web,{said}")));
        // What selects nothing, what selects everything, and what is no selector of ours to read: of none the whole namespace.
        for spec in [
            json!({}),
            json!({"selector": {}}),
            json!({"selector": {"app": "web"}}),
            json!({"selector": "app=web"}),
            json!({"selector": {"matchExpressions": [{"key": "tier", "operator": "Near", "values": ["a"]}]}}),
        ] {
            assert_eq!(selector(&json!({"spec": spec})), None, "{spec}");
        }
    }
}
