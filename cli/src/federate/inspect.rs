//! `describe` and `logs`: from a federated object down to the pods in its members.

use std::io::Write as _;

use federation_core::api::{Phase, UnitStatus};
use futures::{AsyncBufReadExt as _, StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::{Event, Pod};
use kube::api::{DynamicObject, ListParams, LogParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::object::{Found, ObjectArgs};
use crate::error::{Error, Result};
use crate::hub::explain;
use crate::output::{Paint, age, colours, text_out, visible};

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
    fn error(&mut self, depth: usize, error: &Error) {
        error.to_string().lines().for_each(|line| self.line(depth, line.trim_start(), Paint::Bad));
    }
}

pub(crate) async fn describe(args: DescribeArgs) -> Result<()> {
    let found = Found::open(&args.object).await?;
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
    for event in events(found.hub.client(), &found.namespace, found.raw.metadata.uid.as_deref()).await {
        tree.line(1, &event, Paint::Faint);
    }
    // Members are asked side by side: one that hangs holds up only its own lines.
    let mut asking = JoinSet::new();
    for (index, unit) in status.units.iter().enumerate() {
        let member = if args.hub_only || matches!(unit.phase, Phase::Unreachable | Phase::Missing) {
            None
        } else {
            Some(found.hub.member(&unit.cluster).await?)
        };
        let (unit, of) = (unit.clone(), found.of.clone());
        let namespace = of.target_namespace(&found.namespace).to_owned();
        let colours = tree.colours;
        asking.spawn(async move {
            let mut tree = Tree { text: String::new(), colours };
            describe_unit(&mut tree, &unit);
            if let (Some(client), Some(object)) = (member, &unit.object) {
                let api: Api<DynamicObject> = if of.target.namespaced {
                    Api::namespaced_with(client.clone(), &namespace, &of.target.resource())
                } else {
                    Api::all_with(client.clone(), &of.target.resource())
                };
                match api.get(object).await {
                    Ok(live) => {
                        tree.line(2, &format!("{} {object}", of.target.kind), Paint::Plain);
                        for event in events(&client, &namespace, live.metadata.uid.as_deref()).await {
                            tree.line(3, &event, Paint::Faint);
                        }
                        describe_pods(&mut tree, &client, &namespace, &live).await;
                    }
                    Err(error) => {
                        tree.error(2, &Error::of_kube(format!("read {object}"), &error));
                    }
                }
            }
            (index, tree.text)
        });
    }
    let mut parts = asking.join_all().await;
    parts.sort_by_key(|(index, _)| *index);
    parts.into_iter().for_each(|(_, text)| tree.text.push_str(&text));
    text_out(&tree.text)
}

fn describe_unit(tree: &mut Tree, unit: &UnitStatus) {
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
    tree.line(
        1,
        &format!("{} in {}: {:?}{ready}, at {revision}", unit.name, unit.cluster, unit.phase),
        paint,
    );
    if let Some(message) = &unit.message {
        tree.line(2, message, Paint::Bad);
    }
}

async fn describe_pods(tree: &mut Tree, client: &Client, namespace: &str, live: &DynamicObject) {
    let Some(selector) = selector(&live.data) else { return };
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let pods = match pods.list(&ListParams::default().labels(&selector).limit(MAX_PODS)).await {
        Ok(pods) => pods,
        Err(error) => {
            return tree.error(3, &Error::of_kube("list its pods", &error));
        }
    };
    for pod in pods {
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
        let node =
            pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_else(|| "no node".into());
        let word = waiting.or(status.phase).unwrap_or_default();
        let paint = if ready { Paint::Good } else { Paint::Bad };
        tree.line(3, &format!("Pod {} on {node}: {word}", pod.name_any()), paint);
        if !ready {
            for event in events(client, namespace, pod.metadata.uid.as_deref()).await {
                tree.line(4, &event, Paint::Faint);
            }
        }
    }
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
