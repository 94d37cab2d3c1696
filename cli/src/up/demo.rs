//! The demo's story: two members nobody can dial into, an application placed by cell, and a change that moves one cell
//! only. Every step is checked against what the members themselves say, through the tunnel.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path, time::Duration};

use kube::{
    Api, Client,
    api::{DynamicObject, Patch, PatchParams},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{
    POLL,
    children::{Children, Program},
    member_dir,
    progress::{Progress, Step},
};
use crate::{
    error::{Error, Result},
    hub::{Hub, Kind, ensure, explain},
    membership,
    output::{Cell, Paint, Table, own_command},
};

const NAMESPACE: &str = "shop";
const APP: &str = "web";
const CONFIG: &str = "web-config";
const FIRST_IMAGE: &str = "shop/web:1.0";
const SECOND_IMAGE: &str = "shop/web:2.0";
/// Simulated pods take a second or two; a loaded machine takes longer.
const LIMIT: Duration = Duration::from_secs(120);

/// A member and its cells, each cell one zone, with the replicas that its cell runs.
const MEMBERS: [(&str, &[(&str, u64)]); 2] =
    [("west", &[("west-a", 2), ("west-b", 2)]), ("east", &[("east-a", 3), ("east-b", 2)])];
/// The one cell that the change moves first.
const FIRST_CELL: &str = "west-a";

/// What a federated object's status says of one unit.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Unit {
    pub(super) name: String,
    pub(super) cluster: String,
    pub(super) phase: String,
    pub(super) revision: Option<String>,
    pub(super) observed: Observed,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Observed {
    pub(super) replicas: Option<u64>,
    pub(super) ready_replicas: Option<u64>,
}

/// A workload in a member, as far as the demo looks at it.
#[derive(Debug, Clone, PartialEq)]
struct Workload {
    uid: String,
    generation: i64,
    image: String,
    replicas: u64,
    ready: u64,
}

pub(super) async fn run(
    hub: &Hub,
    folder: &Path,
    children: &mut Children,
    progress: &mut Progress,
) -> Result<()> {
    let began = Instant::now();
    start_members(hub, folder, children, progress).await?;
    let mut members = BTreeMap::new();
    for (name, _) in MEMBERS {
        members.insert(name, hub.member(name).await?);
    }

    let mut step = progress.step("making the cells and the application");
    make_objects(hub).await?;
    step.note("placed; waiting for every cell");
    let first = settle(hub, &members, children, &mut step, &|_| FIRST_IMAGE).await?;
    check_config(&members).await?;
    step.finish(&format!(
        "{APP} runs in {} cells of {} members, {} pods ready",
        first.len(),
        MEMBERS.len(),
        first.values().map(|workload| workload.ready).sum::<u64>()
    ));

    let mut step = progress.step(&format!("changing the image to {SECOND_IMAGE}, masked to {FIRST_CELL}"));
    patch(
        hub,
        json!({"spec": {
            "placementMask": {"units": [FIRST_CELL]},
            "template": {"spec": {"template": {"spec": {"containers": [{"name": APP, "image": SECOND_IMAGE}]}}}},
        }}),
    )
    .await?;
    let image = |cell: &str| if cell == FIRST_CELL { SECOND_IMAGE } else { FIRST_IMAGE };
    let second = settle(hub, &members, children, &mut step, &image).await?;
    for (cell, before) in first.iter().filter(|(cell, _)| cell.as_str() != FIRST_CELL) {
        if second.get(cell) != Some(before) {
            return Err(Error::failed(
                format!("leave the cell {cell} alone"),
                format!("it was {before:?} and is {:?}", second.get(cell)),
            ));
        }
    }
    step.finish(&format!("only {FIRST_CELL} moved; the others were not even touched"));

    let mut step = progress.step("lifting the mask");
    patch(hub, json!({"spec": {"placementMask": null}})).await?;
    settle(hub, &members, children, &mut step, &|_| SECOND_IMAGE).await?;
    step.finish("every cell moved");

    progress.say("", Paint::Plain);
    progress.say(&format!("The whole story took {:.1} s.", began.elapsed().as_secs_f64()), Paint::Bold);
    Ok(())
}

/// Makes both members known, starts them, and waits until each answers through its tunnel.
async fn start_members(
    hub: &Hub,
    folder: &Path,
    children: &mut Children,
    progress: &mut Progress,
) -> Result<()> {
    let mut step = progress.step("enrolling two simulated members");
    for (name, cells) in MEMBERS {
        step.note(name);
        let enrolment = membership::enrol(hub, name, Duration::from_secs(600), 1, None).await?;
        let data = member_dir(folder, name);
        let tried = format!("make {}", data.display());
        fs::create_dir_all(&data).map_err(|error| Error::failed(&tried, error))?;
        // Not on the command line, where every user of the machine could read it.
        let token = data.join("enrolment-token");
        tls::write_private(&token, enrolment.token.as_bytes())
            .map_err(|error| Error::failed(format!("write {}", token.display()), error))?;
        let mut program = Program::new(name, ["dev", "member", name])
            .arg("--data-dir", &data)
            .arg("--hub", &enrolment.hub)
            .arg("--enrolment-token-file", &token)
            .arg("--ca-hash", &enrolment.ca_hash);
        for (zone, _) in cells {
            program = program.arg("--zone", zone);
        }
        children.start(program)?;
    }
    let start = Instant::now();
    let mut waiting: Vec<&str> = MEMBERS.iter().map(|(name, _)| *name).collect();
    let mut seen = String::new();
    while !waiting.is_empty() {
        children.check()?;
        let mut left = Vec::new();
        for name in waiting {
            match hub.ping(name).await {
                Ok(answer) if answer.api.ok => {}
                Ok(answer) => {
                    seen = format!("{name}'s API: {}", answer.api.error.unwrap_or_default());
                    left.push(name);
                }
                Err(error) => {
                    seen = error.to_string();
                    left.push(name);
                }
            }
        }
        waiting = left;
        step.note(&format!("waiting for {}", waiting.join(" and ")));
        give_up(start, "reach both members through their tunnels", &seen)?;
        if !waiting.is_empty() {
            tokio::time::sleep(POLL).await;
        }
    }
    let mut carriers: Vec<String> =
        hub.tunnels(None).await?.items.into_iter().map(|tunnel| tunnel.carrier).collect();
    carriers.sort();
    carriers.dedup();
    step.finish(&format!(
        "west and east dialled out and answer through their tunnels ({})",
        carriers.join(", ")
    ));
    Ok(())
}

fn give_up(start: Instant, tried: &str, seen: &str) -> Result<()> {
    if start.elapsed() < LIMIT {
        return Ok(());
    }
    Err(Error::failed(tried, format!("not within {LIMIT:?}; last seen: {seen}")))
}

async fn make_objects(hub: &Hub) -> Result<()> {
    ensure(&hub.objects(Kind::Namespace, None), Kind::Namespace, NAMESPACE, json!({"metadata": {}})).await?;
    let cells = hub.objects(Kind::Cell, None);
    for (member, own) in MEMBERS {
        for (cell, _) in own {
            let fields = json!({
                "metadata": {"labels": {"zone": cell, "region": member}},
                "spec": {"cluster": member, "nodeSelector": {"topology.kubernetes.io/zone": cell}},
            });
            ensure(&cells, Kind::Cell, cell, fields).await?;
        }
    }
    let units: Vec<Value> =
        MEMBERS.iter().flat_map(|(_, cells)| cells.iter()).map(|(cell, _)| json!({"name": cell})).collect();
    let config = json!({
        "metadata": {"namespace": NAMESPACE},
        "spec": {
            "topologyType": "cell",
            "template": {"data": {"greeting": "hello from the hub"}},
            "placement": {"units": units},
        },
    });
    let api = hub.objects(Kind::FederatedConfigMap, Some(NAMESPACE));
    ensure(&api, Kind::FederatedConfigMap, CONFIG, config).await?;
    let labels = json!({"app": APP});
    let overrides: Vec<Value> = MEMBERS
        .iter()
        .flat_map(|(_, cells)| cells.iter())
        .filter(|(_, replicas)| *replicas != 2)
        .map(|(cell, replicas)| {
            json!({"units": [cell], "patches": [{"op": "replace", "path": "/spec/replicas", "value": replicas}]})
        })
        .collect();
    let deployment = json!({
        "metadata": {"namespace": NAMESPACE},
        "spec": {
            "topologyType": "cell",
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "replicas": 2,
                    "selector": {"matchLabels": labels},
                    "template": {
                        "metadata": {"labels": labels},
                        "spec": {"containers": [{"name": APP, "image": FIRST_IMAGE}]},
                    },
                },
            },
            "placement": {"units": units},
            "overrides": overrides,
        },
    });
    let api = hub.objects(Kind::FederatedDeployment, Some(NAMESPACE));
    ensure(&api, Kind::FederatedDeployment, APP, deployment).await?;
    Ok(())
}

async fn patch(hub: &Hub, change: Value) -> Result<()> {
    hub.objects(Kind::FederatedDeployment, Some(NAMESPACE))
        .patch(APP, &PatchParams::default(), &Patch::Merge(&change))
        .await
        .map(drop)
        .map_err(explain(format!("change the federated deployment {APP}")))
}

/// What the hub says of the application's units.
pub(super) async fn units(hub: &Hub) -> Result<Vec<Unit>> {
    let object = hub
        .objects(Kind::FederatedDeployment, Some(NAMESPACE))
        .get(APP)
        .await
        .map_err(explain(format!("read the federated deployment {APP}")))?;
    Ok(units_of(&object.data))
}

fn units_of(object: &Value) -> Vec<Unit> {
    serde_json::from_value(object["status"]["units"].clone()).unwrap_or_default()
}

pub(super) fn units_table(units: &[Unit]) -> Table {
    let mut table =
        Table::new("nothing placed yet").columns(&["CELL", "MEMBER", "PHASE", "REVISION", "READY"]);
    for unit in units {
        let paint = match unit.phase.as_str() {
            "Synced" => Paint::Good,
            "Masked" => Paint::Faint,
            _ => Paint::Warn,
        };
        let ready = format!(
            "{}/{}",
            unit.observed.ready_replicas.unwrap_or_default(),
            unit.observed.replicas.map_or("?".to_owned(), |replicas| replicas.to_string())
        );
        table.row(vec![
            Cell::new(&unit.name),
            Cell::new(&unit.cluster),
            Cell::new(&unit.phase).paint(paint),
            Cell::option(unit.revision.as_ref()),
            Cell::new(ready),
        ]);
    }
    table
}

/// Waits until every cell runs the image it should with all its replicas ready, says the member itself, and the hub's
/// status agrees. Gives back the members' workloads by cell.
async fn settle(
    hub: &Hub,
    members: &BTreeMap<&str, Client>,
    children: &mut Children,
    step: &mut Step<'_>,
    image: &(dyn Fn(&str) -> &'static str + Sync),
) -> Result<BTreeMap<String, Workload>> {
    let start = Instant::now();
    loop {
        children.check()?;
        let seen = match look(hub, members, image).await {
            Ok(workloads) => return Ok(workloads),
            Err(seen) => seen,
        };
        step.note(&seen);
        give_up(start, "see every cell as it should be", &seen)?;
        tokio::time::sleep(POLL).await;
    }
}

async fn look(
    hub: &Hub,
    members: &BTreeMap<&str, Client>,
    image: &(dyn Fn(&str) -> &'static str + Sync),
) -> Result<BTreeMap<String, Workload>, String> {
    let mut found = BTreeMap::new();
    for (member, cells) in MEMBERS {
        let Some(client) = members.get(member) else { continue };
        let api: Api<DynamicObject> =
            Api::namespaced_with(client.clone(), NAMESPACE, &Kind::Deployment.resource());
        for (cell, replicas) in cells {
            let name = format!("{APP}-{cell}");
            let object = api
                .get_opt(&name)
                .await
                .map_err(|error| format!("{member}: {error}"))?
                .ok_or_else(|| format!("{cell}: no workload yet"))?;
            let workload = workload(&object).ok_or_else(|| format!("{cell}: an odd workload"))?;
            if workload.image != image(cell) || workload.replicas != *replicas || workload.ready != *replicas
            {
                return Err(format!(
                    "{cell}: {} of {replicas} ready, image {}",
                    workload.ready, workload.image
                ));
            }
            if !settled(&object) {
                return Err(format!("{cell}: rolling"));
            }
            found.insert((*cell).to_owned(), workload);
        }
    }
    let units = units(hub).await.map_err(|error| error.to_string())?;
    agree(&units, image)?;
    Ok(found)
}

/// Whether the hub's status says the same: masked cells on another revision than the moved ones.
fn agree(units: &[Unit], image: &(dyn Fn(&str) -> &'static str + Sync)) -> Result<(), String> {
    let all: Vec<(&str, u64)> = MEMBERS.iter().flat_map(|(_, cells)| cells.iter().copied()).collect();
    let mut revisions: BTreeMap<&str, &str> = BTreeMap::new();
    for (cell, replicas) in all {
        let unit = units
            .iter()
            .find(|unit| unit.name == cell)
            .ok_or_else(|| format!("{cell}: not in the status"))?;
        let masked = image(cell) != image(FIRST_CELL);
        let phase = if masked { "Masked" } else { "Synced" };
        if unit.phase != phase {
            return Err(format!("{cell}: {} and not {phase}", unit.phase));
        }
        if unit.observed.ready_replicas != Some(replicas) {
            return Err(format!("{cell}: the status lags behind the member"));
        }
        let revision = unit.revision.as_deref().ok_or_else(|| format!("{cell}: no revision"))?;
        match revisions.insert(image(cell), revision) {
            Some(other) if other != revision => {
                return Err(format!("{cell}: revision {revision} where others have {other}"));
            }
            _ => {}
        }
    }
    let mut distinct: Vec<_> = revisions.values().collect();
    distinct.dedup();
    if distinct.len() == revisions.len() {
        Ok(())
    } else {
        Err("old and new image share a revision".to_owned())
    }
}

fn workload(object: &DynamicObject) -> Option<Workload> {
    let spec = &object.data["spec"];
    Some(Workload {
        uid: object.metadata.uid.clone()?,
        generation: object.metadata.generation?,
        image: spec["template"]["spec"]["containers"][0]["image"].as_str()?.to_owned(),
        replicas: spec["replicas"].as_u64()?,
        ready: object.data["status"]["readyReplicas"].as_u64().unwrap_or_default(),
    })
}

/// Whether a roll-out has ended: the status is of this generation, and what is ready is new.
fn settled(object: &DynamicObject) -> bool {
    let (status, wanted) = (&object.data["status"], object.data["spec"]["replicas"].as_u64());
    status["observedGeneration"].as_i64() == object.metadata.generation
        && status["updatedReplicas"].as_u64() == wanted
        && status["replicas"].as_u64() == wanted
}

/// The config map must be in both members with the hub's data.
async fn check_config(members: &BTreeMap<&str, Client>) -> Result<()> {
    for (member, client) in members {
        let api: Api<DynamicObject> =
            Api::namespaced_with(client.clone(), NAMESPACE, &Kind::ConfigMap.resource());
        let start = Instant::now();
        loop {
            let found = api.get_opt(CONFIG).await.map_err(explain(format!("read {CONFIG} in {member}")))?;
            if found.is_some_and(|object| object.data["data"]["greeting"] == "hello from the hub") {
                break;
            }
            give_up(start, &format!("find the config map {CONFIG} in {member}"), "it is not there")?;
            tokio::time::sleep(POLL).await;
        }
    }
    Ok(())
}

/// What somebody may try while the demo runs.
pub(super) fn commands(hub: &Hub, folder: &Path) -> String {
    let cellway = own_command();
    let kubeconfig = hub.kubeconfig().display();
    let data = folder.display();
    let mut text = String::new();
    let mut line = |what: &str, command: String| {
        // Writing to a string cannot fail.
        let _ = write!(text, "  # {what}\n  {command}\n");
    };
    line(
        "the hub's own API",
        format!(
            "kubectl --kubeconfig {kubeconfig} -n {NAMESPACE} get federateddeployments,federatedconfigmaps"
        ),
    );
    line(
        "where each cell stands",
        format!("kubectl --kubeconfig {kubeconfig} -n {NAMESPACE} get federateddeployment {APP} -o yaml"),
    );
    line(
        "a member, through its tunnel",
        format!(
            "{cellway} kubeconfig west --data-dir {data} > west.kubeconfig; kubectl --kubeconfig west.kubeconfig -n {NAMESPACE} get pods -o wide"
        ),
    );
    line("round trips", format!("{cellway} ping west --data-dir {data}"));
    line("tunnels", format!("{cellway} tunnels --data-dir {data}"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(name: &str, phase: &str, revision: &str, ready: u64) -> Unit {
        Unit {
            name: name.into(),
            cluster: String::new(),
            phase: phase.into(),
            revision: Some(revision.into()),
            observed: Observed { replicas: Some(ready), ready_replicas: Some(ready) },
        }
    }

    #[test]
    fn the_status_must_agree_with_the_mask() {
        let masked = |cell: &str| if cell == FIRST_CELL { SECOND_IMAGE } else { FIRST_IMAGE };
        let mut units = vec![
            unit("west-a", "Synced", "web-2", 2),
            unit("west-b", "Masked", "web-1", 2),
            unit("east-a", "Masked", "web-1", 3),
            unit("east-b", "Masked", "web-1", 2),
        ];
        agree(&units, &masked).unwrap();
        assert!(agree(&units, &|_| SECOND_IMAGE).is_err());
        units[1].revision = Some("web-2".into());
        assert!(agree(&units, &masked).is_err());
        units.pop();
        assert!(agree(&units, &masked).unwrap_err().contains("west-b") || agree(&units, &masked).is_err());
    }

    #[test]
    fn reads_units_from_a_status() {
        let status = json!({"status": {"units": [
            {"name": "a", "cluster": "w", "phase": "Synced", "revision": "web-1", "observed": {"replicas": 2, "readyReplicas": 1}},
            {"name": "b", "cluster": "w", "phase": "Pending"}]}});
        let units = units_of(&status);
        assert_eq!(units[0].observed.ready_replicas, Some(1));
        assert_eq!(units[1].revision, None);
        let text = units_table(&units).render(false, false);
        assert!(text.contains("1/2") && text.contains("0/?"), "{text}");
        assert!(units_of(&json!({})).is_empty());
    }
}
