//! `revisions`, `diff` and `rollback`: what an object was, what changed, and going back.

use federation_core::api::{FederatedObject, FederatedRevision, PropagationConfig, Snapshot};
use federation_core::metadata::PropagationRules;
use federation_core::names::POLICY_ANNOTATION;
use federation_core::policy::{is_companion, native_name};
use federation_core::revision::is_divided_otherwise;
use federation_core::types::FederatedType;
use kube::api::{ListParams, PostParams};
use kube::{Api, ResourceExt as _};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::object::{Found, ObjectArgs, pick};
use super::preview::{moves, print_moves};
use crate::error::{Error, Result};
use crate::hub::{Items, explain};
use crate::lists::for_people;
use crate::output::{self, Cell, OutputArgs, Paint, Table, age, text_out, visible_lines};

/// Lines of each side that are compared; of longer texts the rest is shown as replaced.
const MAX_COMPARED: usize = 4000;
/// Unchanged lines shown around a change.
const CONTEXT: usize = 3;

#[derive(Debug, clap::Args)]
pub(crate) struct RevisionsArgs {
    #[command(flatten)]
    pub(crate) object: ObjectArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct DiffArgs {
    #[command(flatten)]
    pub(crate) object: ObjectArgs,
    /// The earlier revision, by number or name [default: the one before --to].
    #[arg(long, value_name = "REVISION")]
    pub(crate) from: Option<String>,
    /// The later revision [default: the current one].
    #[arg(long, value_name = "REVISION")]
    pub(crate) to: Option<String>,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct RollbackArgs {
    #[command(flatten)]
    pub(crate) object: ObjectArgs,
    /// The revision to go back to, by number or name [default: the one before the current one].
    #[arg(long, value_name = "REVISION")]
    pub(crate) to: Option<String>,
    /// Show what would change in each unit, and change nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    number: i64,
    name: String,
    current: bool,
    units: Vec<String>,
    created_at: Option<String>,
}

pub(crate) async fn revisions(args: RevisionsArgs) -> Result<()> {
    let found = Found::open(&args.object).await?;
    let status = found.object.status.clone().unwrap_or_default();
    let rows = found.revisions().await?.into_iter().rev().map(|revision| {
        let name = revision.name_any();
        let units = status.units.iter().filter(|unit| unit.revision.as_ref() == Some(&name));
        Row {
            number: revision.spec.number,
            current: status.current_revision.as_ref() == Some(&name),
            units: units.map(|unit| unit.name.clone()).collect(),
            created_at: revision.metadata.creation_timestamp.as_ref().map(|time| time.0.to_string()),
            name,
        }
    });
    let items = Items { items: rows.collect::<Vec<_>>() };
    output::print(args.output.output, &items, |items| {
        let now = jiff::Timestamp::now();
        let mut table =
            Table::new("no revisions yet").columns(&["NUMBER", "NAME", "CURRENT", "UNITS", "AGE"]);
        for row in &items.items {
            table.row(vec![
                Cell::new(row.number),
                Cell::new(&row.name),
                if row.current { Cell::new("yes").paint(Paint::Good) } else { Cell::option::<u8>(None) },
                Cell::option((!row.units.is_empty()).then(|| row.units.join(","))),
                Cell::option(row.created_at.as_ref().map(|time| age(time, now))),
            ]);
        }
        table
    })
}

pub(crate) async fn diff(args: DiffArgs) -> Result<()> {
    let found = Found::open(&args.object).await?;
    let revisions = found.revisions().await?;
    let to = match &args.to {
        Some(wanted) => pick(&revisions, wanted)?,
        None => current(&found, &revisions)?,
    };
    let from = match &args.from {
        Some(wanted) => pick(&revisions, wanted)?,
        None => before(&revisions, to)?,
    };
    let (old, new) = (snapshot_value(&from.spec.snapshot)?, snapshot_value(&to.spec.snapshot)?);
    if !for_people(args.output.output) {
        let side = |revision: &FederatedRevision, snapshot: &Value| json!({"name": revision.name_any(), "number": revision.spec.number, "snapshot": snapshot});
        let both = json!({"from": side(from, &old), "to": side(to, &new)});
        return output::print(args.output.output, &both, |_| Table::default());
    }
    let (old, new) = (yaml(&old)?, yaml(&new)?);
    let head = format!(
        "--- {} ({})\n+++ {} ({})\n",
        from.name_any(),
        from.spec.number,
        to.name_any(),
        to.spec.number
    );
    text_out(&visible_lines(&format!("{head}{}", unified(&old, &new))))
}

pub(crate) async fn rollback(args: RollbackArgs) -> Result<()> {
    let tried = format!("go back with {}", args.object.object);
    let found = Found::open(&args.object).await?;
    refuse_companion(&found.of, &found.object, &args.object.object, &tried)?;
    let revisions = found.revisions().await?;
    let now = current(&found, &revisions)?;
    let to = match &args.to {
        Some(wanted) => pick(&revisions, wanted)?,
        None => before(&revisions, now)?,
    };
    if to.name_any() == now.name_any() {
        return Err(Error::failed(tried, format!("{} is the current revision", to.name_any())));
    }
    if is_divided_otherwise(&to.spec.snapshot, &now.spec.snapshot) {
        let happened = format!(
            "{} and the current revision differ only in how replicas are divided, and that is decided anew",
            to.name_any()
        );
        return Err(Error::failed(tried, happened).remedy("change its ReplicaSchedulingPreference"));
    }
    if args.dry_run {
        let divided = now.spec.snapshot.replicas.clone();
        let name = to.name_any();
        let mut revisions = revisions.clone();
        // How the replicas are divided does not go back.
        for revision in revisions.iter_mut().filter(|revision| revision.name_any() == name) {
            revision.spec.snapshot.replicas.clone_from(&divided);
        }
        let mask = found.object.spec.placement_mask.clone();
        let moves = moves(&found, &revisions, &name, mask.as_ref(), true).await?;
        return match args.output.output {
            format if for_people(format) => print_moves(&moves),
            format => output::print(format, &Items { items: moves }, |_| Table::default()),
        };
    }
    let mut object = found.raw.clone();
    let spec = &mut object.data["spec"];
    restore(spec, &to.spec.snapshot, &found.object, &rules(&found).await?)?;
    let replaced = found.api.replace(&found.name, &PostParams::default(), &object).await;
    let replaced = replaced.map_err(explain(&tried))?;
    if !for_people(args.output.output) {
        return output::print(args.output.output, &replaced, |_| Table::default());
    }
    let mask = match &found.object.spec.placement_mask {
        Some(_) => " where the mask lets it",
        None => "",
    };
    text_out(&visible_lines(&format!(
        "{} goes back to revision {} ({}){mask}\n",
        args.object.object,
        to.spec.number,
        to.name_any()
    )))
}

/// A companion is what its object and its policy say: whatever is written into it goes again.
fn refuse_companion(of: &FederatedType, object: &FederatedObject, called: &str, tried: &str) -> Result<()> {
    let meta = &object.metadata;
    if !is_companion(of, meta) {
        return Ok(());
    }
    let native = native_name(of, meta.namespace.as_deref().unwrap_or_default(), &object.name_any());
    let policy = object.annotations().get(POLICY_ANNOTATION).map_or("a policy", String::as_str);
    let happened =
        format!("it is made from {native} by the policy {policy}, and would be made from it again");
    let remedy = format!("change {native} itself; `cellway diff {called}` shows what it was");
    Err(Error::failed(tried, happened).remedy(remedy))
}

/// The revision that the mask lets through.
pub(super) fn current<'a>(
    found: &Found,
    revisions: &'a [FederatedRevision],
) -> Result<&'a FederatedRevision> {
    let name = found.object.status.as_ref().and_then(|status| status.current_revision.clone());
    let named = revisions.iter().find(|revision| Some(revision.name_any()) == name);
    named.or_else(|| revisions.last()).ok_or_else(|| {
        Error::not_found("find the current revision", "the object has none yet")
            .remedy("is its type federated? `cellway federate types` says so")
    })
}

/// The revision before another. One that only divides the replicas otherwise is the same.
fn before<'a>(revisions: &'a [FederatedRevision], to: &FederatedRevision) -> Result<&'a FederatedRevision> {
    let is_before = |revision: &&FederatedRevision| {
        revision.spec.number < to.spec.number
            && !is_divided_otherwise(&revision.spec.snapshot, &to.spec.snapshot)
    };
    revisions.iter().rev().find(is_before).ok_or_else(|| {
        Error::not_found("find the revision before", format!("{} is the oldest that is kept", to.name_any()))
    })
}

/// Whose annotations and labels are, at this hub.
async fn rules(found: &Found) -> Result<PropagationRules> {
    let api: Api<PropagationConfig> = Api::all(found.hub.client().clone());
    let all = api.list(&ListParams::default()).await.map_err(explain("list the propagation configs"))?;
    Ok(PropagationRules::new(&all.items))
}

/// Puts what a snapshot says into a spec. Metadata that the object itself propagates comes from there again; the rest comes
/// back through the template. Both give the same revision again.
fn restore(
    spec: &mut Value,
    snapshot: &Snapshot,
    object: &FederatedObject,
    rules: &PropagationRules,
) -> Result<()> {
    let tried = "restore the revision";
    let value = |of: serde_json::Result<Value>| of.map_err(|error| Error::failed(tried, error));
    let mut template = snapshot.template.clone();
    let mut metadata = Map::new();
    let own = &object.metadata;
    for (field, map, own, rules) in [
        ("labels", &snapshot.labels, &own.labels, &rules.labels),
        ("annotations", &snapshot.annotations, &own.annotations, &rules.annotations),
    ] {
        let comes_by_itself = |key: &String, value: &String| {
            rules.sets_from_object(key) && own.as_ref().and_then(|own| own.get(key)) == Some(value)
        };
        let mut map = map.clone();
        map.retain(|key, value| !comes_by_itself(key, value));
        if !map.is_empty() {
            metadata.insert(field.into(), value(serde_json::to_value(map))?);
        }
    }
    if !metadata.is_empty() {
        template["metadata"] = Value::Object(metadata);
    }
    spec["template"] = template;
    spec["overrides"] = value(serde_json::to_value(&snapshot.overrides))?;
    spec["naming"] = value(serde_json::to_value(snapshot.naming))?;
    spec["retainReplicas"] = json!(snapshot.retain_replicas);
    Ok(())
}

fn snapshot_value(snapshot: &Snapshot) -> Result<Value> {
    serde_json::to_value(snapshot).map_err(|error| Error::failed("print the revision", error))
}

pub(super) fn yaml(value: &Value) -> Result<String> {
    serde_yaml_ng::to_string(value).map_err(|error| Error::failed("print as YAML", error))
}

/// The differing lines of two texts with a little around them, as `diff -u` shows them without its line numbers.
pub(super) fn unified(old: &str, new: &str) -> String {
    let (old, new): (Vec<&str>, Vec<&str>) = (old.lines().collect(), new.lines().collect());
    let lines = compare(&old, &new);
    let near = |index: usize| {
        let around = &lines[index.saturating_sub(CONTEXT)..(index + CONTEXT + 1).min(lines.len())];
        around.iter().any(|(mark, _)| *mark != ' ')
    };
    let mut text = String::new();
    let mut gap = false;
    for (index, (mark, line)) in lines.iter().enumerate() {
        if near(index) {
            if gap && !text.is_empty() {
                text.push_str("  ...\n");
            }
            gap = false;
            text.push_str(&format!("{mark} {line}\n"));
        } else {
            gap = true;
        }
    }
    if text.is_empty() { "  no difference\n".into() } else { text }
}

/// Every line of both texts, marked: common, only old, only new.
fn compare<'a>(old: &[&'a str], new: &[&'a str]) -> Vec<(char, &'a str)> {
    let head = old.iter().zip(new).take_while(|(a, b)| a == b).count();
    let tail = old[head..].iter().rev().zip(new[head..].iter().rev()).take_while(|(a, b)| a == b).count();
    let (a, b) = (&old[head..old.len() - tail], &new[head..new.len() - tail]);
    let mut lines: Vec<(char, &str)> = old[..head].iter().map(|line| (' ', *line)).collect();
    if a.len() > MAX_COMPARED || b.len() > MAX_COMPARED {
        lines.extend(a.iter().map(|line| ('-', *line)));
        lines.extend(b.iter().map(|line| ('+', *line)));
    } else {
        // Lengths of the longest common subsequences of what follows.
        let width = b.len() + 1;
        let mut common = vec![0u16; (a.len() + 1) * width];
        for i in (0..a.len()).rev() {
            for j in (0..b.len()).rev() {
                common[i * width + j] = if a[i] == b[j] {
                    common[(i + 1) * width + j + 1] + 1
                } else {
                    common[(i + 1) * width + j].max(common[i * width + j + 1])
                };
            }
        }
        let (mut i, mut j) = (0, 0);
        while i < a.len() || j < b.len() {
            if i < a.len() && j < b.len() && a[i] == b[j] {
                lines.push((' ', a[i]));
                i += 1;
                j += 1;
            } else if j == b.len()
                || (i < a.len() && common[(i + 1) * width + j] >= common[i * width + j + 1])
            {
                lines.push(('-', a[i]));
                i += 1;
            } else {
                lines.push(('+', b[j]));
                j += 1;
            }
        }
    }
    lines.extend(old[old.len() - tail..].iter().map(|line| (' ', *line)));
    lines
}

#[cfg(test)]
mod tests {
    use federation_core::api::FederatedRevisionSpec;

    use super::*;

    #[test]
    fn differences_with_a_little_around_them() {
        let old = "a\nb\nc\nd\ne\nf\ng\nh\n";
        let new = "a\nb\nc\nd\ne\nX\ng\nh\n";
        assert_eq!(unified(old, new), "  c\n  d\n  e\n- f\n+ X\n  g\n  h\n");
        assert_eq!(unified(old, old), "  no difference\n");
        assert_eq!(unified("", "a\n"), "+ a\n");
        let far = format!("1\n{old}2\n");
        let both = format!("one\n{old}two\n");
        assert!(unified(&far, &both).contains("  ...\n"));
    }

    #[test]
    fn a_companion_does_not_go_back_by_itself() {
        let of = federation_core::types::known("configmaps").unwrap();
        let mut object = FederatedObject::new("settings", federation_core::api::FederatedSpec::default());
        object.metadata.namespace = Some("shop".into());
        let check = |object: &FederatedObject| refuse_companion(&of, object, "configmap/settings", "go back");
        assert!(check(&object).is_ok());
        let map = |key: &str, value: &str| Some([(key.to_owned(), value.to_owned())].into());
        object.metadata.labels = map("cellway.io/policy", "web");
        object.metadata.annotations = map("cellway.io/made-from", "ConfigMap shop/settings");
        let refused = check(&object).unwrap_err().to_string();
        assert!(refused.contains("change ConfigMap shop/settings itself"), "{refused}");
    }

    #[test]
    fn how_replicas_are_divided_is_no_revision_of_its_own() {
        let revisions: Vec<_> = [("web:1", 6), ("web:2", 6), ("web:2", 8), ("web:2", 10)]
            .into_iter()
            .zip(1..)
            .map(|((image, replicas), number)| {
                let snapshot = Snapshot {
                    template: json!({"spec": {"image": image}}),
                    replicas: [("a".to_owned(), replicas)].into(),
                    ..Snapshot::default()
                };
                let spec = FederatedRevisionSpec { object: "x/web".into(), number, snapshot };
                FederatedRevision::new(&format!("web-{number}"), spec)
            })
            .collect();
        for to in &revisions[1..] {
            assert_eq!(before(&revisions, to).unwrap().spec.number, 1);
        }
        assert!(before(&revisions, &revisions[0]).is_err());
    }

    #[test]
    fn a_snapshot_goes_back_into_the_spec() {
        let snapshot = Snapshot {
            template: json!({"spec": {"replicas": 2}}),
            labels: [("app".to_owned(), "web".to_owned())].into(),
            ..Snapshot::default()
        };
        let mut spec = json!({"template": {"spec": {"replicas": 9}, "extra": 1}, "placement": {"units": []},
            "overrides": [{"units": ["a"], "patches": []}], "placementMask": {"units": ["a"]}});
        let mut object = FederatedObject::new("web", federation_core::api::FederatedSpec::default());
        restore(&mut spec, &snapshot, &object, &PropagationRules::default()).unwrap();
        assert_eq!(
            spec["template"],
            json!({"metadata": {"labels": {"app": "web"}}, "spec": {"replicas": 2}})
        );
        assert_eq!(spec["overrides"], json!([]));
        assert_eq!(spec["placementMask"], json!({"units": ["a"]}), "the mask is not a revision's");

        // What the object propagates by itself stays the object's; what it has otherwise now comes back in the template.
        let config: PropagationConfig =
            serde_json::from_value(json!({"apiVersion": "policy.cellway.io/v1alpha1",
            "kind": "PropagationConfig", "metadata": {"name": "default"},
            "spec": {"labels": [{"key": "app", "class": "Spec"}]}}))
            .unwrap();
        let rules = PropagationRules::new([&config]);
        object.metadata.labels = Some([("app".to_owned(), "web".to_owned())].into());
        restore(&mut spec, &snapshot, &object, &rules).unwrap();
        assert_eq!(spec["template"], json!({"spec": {"replicas": 2}}));
        object.metadata.labels = Some([("app".to_owned(), "other".to_owned())].into());
        restore(&mut spec, &snapshot, &object, &rules).unwrap();
        assert_eq!(spec["template"]["metadata"]["labels"], json!({"app": "web"}));
    }
}
