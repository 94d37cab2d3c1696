//! `describe` and `logs`: from a federated object down to the pods in its members.

use std::io::Write as _;

use federation_core::api::{Phase, UnitStatus};
use federation_core::types::FederatedType;
use futures::{AsyncBufReadExt as _, StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::{Event, Pod};
use kube::api::{DynamicObject, ListParams, LogParams};
use kube::{Api, Client, ResourceExt as _};
use serde::Serialize;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::object::{Found, ObjectArgs};
use crate::error::{Error, Result};
use crate::hub::explain;
use crate::lists::for_people;
use crate::output::{self, OutputArgs, Paint, Table, age, colours, text_out, visible};

/// Events shown of one object.
const MAX_EVENTS: usize = 5;
/// Pods shown of one unit.
const MAX_PODS: u32 = 100;
/// Pods whose logs are read at once.
const MAX_STREAMS: usize = 50;
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
    let mut asking = JoinSet::new();
    for (index, unit) in status.units.iter().enumerate() {
        let member = if args.hub_only || matches!(unit.phase, Phase::Unreachable | Phase::Missing) {
            None
        } else {
            Some(found.hub.member(&unit.cluster).await?)
        };
        let (unit, of) = (unit.clone(), found.of.clone());
        let namespace = of.target_namespace(&found.namespace).to_owned();
        // Members are asked side by side: one that hangs holds up only its own lines.
        asking.spawn(async move {
            let inside = match (member, &unit.object) {
                (Some(client), Some(object)) => Some(look(&client, &of, &namespace, object).await),
                _ => None,
            };
            (index, Unit { status: unit, inside })
        });
    }
    let mut units = asking.join_all().await;
    units.sort_by_key(|(index, _)| *index);
    let described = Described {
        events: events(found.hub.client(), &found.namespace, found.raw.metadata.uid.as_deref()).await,
        object: found.raw.clone(),
        units: units.into_iter().map(|(_, unit)| unit).collect(),
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

async fn look(client: &Client, of: &FederatedType, namespace: &str, object: &str) -> Inside {
    let api: Api<DynamicObject> = if of.target.namespaced {
        Api::namespaced_with(client.clone(), namespace, &of.target.resource())
    } else {
        Api::all_with(client.clone(), &of.target.resource())
    };
    let mut inside = Inside { kind: of.target.kind.clone(), ..Inside::default() };
    let live = match api.get(object).await {
        Ok(live) => live,
        Err(error) => {
            inside.error = Some(Error::of_kube(format!("read {object}"), &error).to_string());
            return inside;
        }
    };
    inside.events = events(client, namespace, live.metadata.uid.as_deref()).await;
    if let Some(selector) = selector(&live.data) {
        match pods(client, namespace, &selector).await {
            Ok(pods) => inside.pods = pods,
            Err(error) => inside.pods_error = Some(error.to_string()),
        }
    }
    inside.object = Some(live);
    inside
}

async fn pods(client: &Client, namespace: &str, selector: &str) -> Result<Vec<Seen>> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let listed = pods.list(&ListParams::default().labels(selector).limit(MAX_PODS)).await;
    let mut seen = Vec::new();
    for pod in listed.map_err(explain("list its pods"))? {
        let status = pod.status.clone().unwrap_or_default();
        let ready = status
            .conditions
            .iter()
            .flatten()
            .any(|condition| condition.type_ == "Ready" && condition.status == "True");
        let waiting = status
            .container_statuses
            .iter()
            .flatten()
            .find_map(|container| container.state.as_ref()?.waiting.as_ref()?.reason.clone());
        let events =
            if ready { Vec::new() } else { events(client, namespace, pod.metadata.uid.as_deref()).await };
        seen.push(Seen {
            name: pod.name_any(),
            node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
            ready,
            state: waiting.or(status.phase).unwrap_or_default(),
            events,
        });
    }
    Ok(seen)
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

/// The last events about an object; none when they cannot be read.
async fn events(client: &Client, namespace: &str, uid: Option<&str>) -> Vec<String> {
    let Some(uid) = uid else { return Vec::new() };
    let home = if namespace.is_empty() { "default" } else { namespace };
    let api: Api<Event> = Api::namespaced(client.clone(), home);
    let about = ListParams::default().fields(&format!("involvedObject.uid={uid}"));
    let Ok(found) = api.list(&about).await else { return Vec::new() };
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
    let labels = live["spec"]["selector"]["matchLabels"].as_object()?;
    let pairs: Vec<_> =
        labels.iter().filter_map(|(key, value)| Some(format!("{key}={}", value.as_str()?))).collect();
    (!pairs.is_empty()).then(|| pairs.join(","))
}

pub(crate) async fn logs(args: LogsArgs) -> Result<()> {
    let tried = format!("read the logs of {}", args.object.object);
    let found = Found::open(&args.object).await?;
    let status = found.object.status.clone().unwrap_or_default();
    let namespace = found.of.target_namespace(&found.namespace).to_owned();
    let mut reading: JoinSet<std::result::Result<(), String>> = JoinSet::new();
    let (sender, mut lines) = mpsc::channel::<String>(LINES);
    let units: Vec<_> = status
        .units
        .iter()
        .filter(|unit| args.unit.as_ref().is_none_or(|wanted| *wanted == unit.name))
        .collect();
    if units.is_empty() {
        return Err(Error::not_found(tried, "there is no such unit, or none at all"));
    }
    let mut problems = Vec::new();
    for unit in units {
        let Some(object) = &unit.object else { continue };
        let client = found.hub.member(&unit.cluster).await?;
        let pods = match pods_of(&found, &client, &namespace, object).await {
            Ok(pods) => pods,
            Err(error) => {
                problems.push(format!("{}: {error}", unit.name));
                continue;
            }
        };
        for pod in pods {
            if reading.len() >= MAX_STREAMS {
                problems.push(format!("more than {MAX_STREAMS} pods: name a unit with --unit"));
                break;
            }
            let api: Api<Pod> = Api::namespaced(client.clone(), &namespace);
            let params = LogParams {
                container: args.container.clone(),
                follow: args.follow,
                tail_lines: args.tail,
                ..LogParams::default()
            };
            // What the container wrote goes on as it is, as kubectl passes it on; who it is, a member says.
            let (sender, prefix) = (sender.clone(), format!("[{} {}]", visible(&unit.name), visible(&pod)));
            reading.spawn(async move {
                let stream =
                    api.log_stream(&pod, &params).await.map_err(|error| format!("{prefix} {error}"))?;
                let mut stream = std::pin::pin!(stream.lines().map_err(|error| format!("{prefix} {error}")));
                while let Some(line) = stream.next().await {
                    if sender.send(format!("{prefix} {}\n", line?)).await.is_err() {
                        break;
                    }
                }
                Ok(())
            });
        }
    }
    drop(sender);
    while let Some(line) = lines.recv().await {
        text_out(&line)?;
    }
    while let Some(done) = reading.join_next().await {
        match done {
            Ok(Ok(())) => {}
            Ok(Err(problem)) => problems.push(problem),
            Err(error) => problems.push(error.to_string()),
        }
    }
    // A reader of standard error that has gone away changes nothing.
    let _ = std::io::stdout().flush();
    if problems.is_empty() { Ok(()) } else { Err(Error::failed(tried, problems.join("\n"))) }
}

async fn pods_of(found: &Found, client: &Client, namespace: &str, object: &str) -> Result<Vec<String>> {
    let api: Api<DynamicObject> =
        Api::namespaced_with(client.clone(), namespace, &found.of.target.resource());
    let live = api.get(object).await.map_err(explain(format!("read {object}")))?;
    let selector = selector(&live.data)
        .ok_or_else(|| Error::failed(format!("find the pods of {object}"), "it has no selector"))?;
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let pods = pods
        .list(&ListParams::default().labels(&selector).limit(MAX_PODS))
        .await
        .map_err(explain(format!("list the pods of {object}")))?;
    Ok(pods.items.iter().map(|pod| pod.name_any()).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

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
        assert_eq!(selector(&json!({"data": {}})), None);
    }
}
