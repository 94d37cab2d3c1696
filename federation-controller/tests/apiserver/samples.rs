//! KubeFed's sample types, each from birth to death, with a change that a mask holds in one of two cells.

use federation_core::api::{FederatedRevision, FederatedStatus, Phase};
use federation_core::revision::DEFAULT_HISTORY_LIMIT;
use federation_core::types::{self, FederatedType};
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};

use crate::world::{LAST, World, until};

/// A federated object of one type, and a field of its template that changes.
struct Sample {
    of: FederatedType,
    name: &'static str,
    template: Value,
    /// The field, and its two values.
    field: &'static str,
    values: [Value; 2],
}

// === impl Sample ===

impl Sample {
    fn of(of: FederatedType) -> Self {
        const IMAGE: &str = "/spec/template/spec/containers/0/image";
        let pods = |image: &str| json!({"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "web", "image": image}]}});
        let set = |more: Value| {
            let mut spec = json!({"selector": {"matchLabels": {"app": "web"}}, "template": pods("web:1")});
            if let (Some(spec), Value::Object(more)) = (spec.as_object_mut(), more) {
                spec.extend(more);
            }
            (json!({"spec": spec}), IMAGE, [json!("web:1"), json!("web:2")])
        };
        let job = json!({"spec": {"suspend": true, "parallelism": 1, "template": {
            "spec": {"restartPolicy": "Never", "containers": [{"name": "run", "image": "run:1"}]}}}});
        let service = json!({"spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]}});
        let ingress = json!({"spec": {"rules": [{"host": "one.example.com"}],
            "defaultBackend": {"service": {"name": "web", "port": {"number": 80}}}}});
        let definition = json!({"spec": {"group": "example.com", "scope": "Namespaced",
            "names": {"plural": "gadgets", "singular": "gadget", "kind": "Gadget", "listKind": "GadgetList"},
            "versions": [{"name": "v1", "served": true, "storage": true,
                "schema": {"openAPIV3Schema": {"type": "object", "description": "one"}}}]}});
        let (template, field, values) = match of.target.kind.as_str() {
            "Deployment" | "ReplicaSet" => set(json!({"replicas": 1})),
            "StatefulSet" => set(json!({"replicas": 1, "serviceName": "web"})),
            "DaemonSet" => set(json!({})),
            "ConfigMap" => (json!({"data": {"k": "one"}}), "/data/k", [json!("one"), json!("two")]),
            "Secret" => (json!({"data": {"k": "b25l"}}), "/data/k", [json!("b25l"), json!("dHdv")]),
            "Namespace" => {
                let template = json!({"metadata": {"labels": {"team": "one"}}});
                (template, "/metadata/labels/team", [json!("one"), json!("two")])
            }
            "Service" => (service, "/spec/ports/0/port", [json!(80), json!(81)]),
            "ServiceAccount" => {
                let template = json!({"imagePullSecrets": [{"name": "one"}]});
                (template, "/imagePullSecrets/0/name", [json!("one"), json!("two")])
            }
            "Job" => (job, "/spec/parallelism", [json!(1), json!(2)]),
            "Ingress" => {
                (ingress, "/spec/rules/0/host", [json!("one.example.com"), json!("two.example.com")])
            }
            "ClusterRole" => {
                let template =
                    json!({"rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}]});
                (template, "/rules/0/verbs/0", [json!("get"), json!("list")])
            }
            "CustomResourceDefinition" => {
                let field = "/spec/versions/0/schema/openAPIV3Schema/description";
                (definition, field, [json!("one"), json!("two")])
            }
            other => panic!("no sample of {other}"),
        };
        let name = match of.target.kind.as_str() {
            "Namespace" => "shop",
            "CustomResourceDefinition" => "gadgets.example.com",
            _ => "web",
        };
        Self { of, name, template, field, values }
    }

    fn changed(&self) -> Value {
        let mut template = self.template.clone();
        *template.pointer_mut(self.field).expect("the field") = self.values[1].clone();
        template
    }

    fn at_hub(&self, hub: &Client) -> Api<DynamicObject> {
        match self.of.namespaced() {
            true => Api::namespaced_with(hub.clone(), "shop", &self.of.hub_resource()),
            false => Api::all_with(hub.clone(), &self.of.hub_resource()),
        }
    }

    fn in_member(&self, member: &Client) -> Api<DynamicObject> {
        let target = &self.of.target;
        let kind = GroupVersionKind::gvk(&target.group, &target.version, &target.kind);
        let resource = ApiResource::from_gvk_with_plural(&kind, &target.plural);
        match target.namespaced {
            true => Api::namespaced_with(member.clone(), "shop", &resource),
            false => Api::all_with(member.clone(), &resource),
        }
    }

    async fn patch(&self, world: &World, spec: Value) {
        let patch = Patch::Merge(json!({"spec": spec}));
        self.at_hub(&world.hub).patch(self.name, &PatchParams::default(), &patch).await.expect("patched");
    }

    /// Waits until the units `a` and `c` have these phases and the field these values, of the two, in the members.
    async fn is(&self, world: &World, phases: [Phase; 2], values: [usize; 2]) {
        let (kind, hub) = (&self.of.kind, self.at_hub(&world.hub));
        until(&format!("{kind} is {phases:?} with {values:?}"), async || {
            let object = hub.get(self.name).await.ok()?;
            *LAST.lock() = format!("{kind}: {}", object.data["status"]);
            let status: FederatedStatus = serde_json::from_value(object.data.get("status")?.clone()).ok()?;
            let found: Vec<_> = status.units.iter().map(|unit| unit.phase).collect();
            if status.observed_generation != object.metadata.generation || found != phases {
                return None;
            }
            for ((unit, member), value) in status.units.iter().zip([&world.x, &world.y]).zip(values) {
                let live = self.in_member(member).get(unit.object.as_deref()?).await.ok()?;
                let live = serde_json::to_value(live).expect("JSON");
                *LAST.lock() = live.to_string();
                if live.pointer(self.field)? != &self.values[value] {
                    return None;
                }
            }
            Some(())
        })
        .await;
    }
}

pub(crate) async fn every_type_is_placed_masked_changed_and_removed(world: World) {
    let mut samples: Vec<_> = types::builtin().into_iter().map(Sample::of).collect();
    // What lies in a namespace goes with it.
    samples.sort_by_key(|sample| sample.of.is_namespace());
    assert_eq!(samples.len(), 13, "KubeFed's samples");
    for sample in &samples {
        let mut object = json!({"apiVersion": "types.kubefed.io/v1beta2", "kind": sample.of.kind,
            "metadata": {"name": sample.name}, "spec": {"topologyType": "cell",
                "placement": {"units": [{"name": "a"}, {"name": "c"}]}, "template": sample.template}});
        if sample.of.namespaced() {
            object["metadata"]["namespace"] = "shop".into();
        }
        let object: DynamicObject = serde_json::from_value(object).expect("an object");
        sample.at_hub(&world.hub).create(&PostParams::default(), &object).await.expect("created");
    }
    for sample in &samples {
        sample.is(&world, [Phase::Synced; 2], [0, 0]).await;
        let step = json!({"template": sample.changed(), "placementMask": {"units": ["a"]}});
        sample.patch(&world, step).await;
    }
    for sample in &samples {
        sample.is(&world, [Phase::Synced, Phase::Masked], [1, 0]).await;
        sample.patch(&world, json!({"placementMask": null})).await;
    }
    for sample in &samples {
        sample.is(&world, [Phase::Synced; 2], [1, 1]).await;
    }

    // A history has an end.
    let map = samples.iter().find(|sample| sample.of.target.kind == "ConfigMap").expect("config maps");
    let uid = map.at_hub(&world.hub).get(map.name).await.expect("there").uid().expect("a uid");
    let revisions: Api<FederatedRevision> = Api::namespaced(world.hub.clone(), "shop");
    for number in 0..DEFAULT_HISTORY_LIMIT + 3 {
        map.patch(&world, json!({"template": {"data": {"more": number.to_string()}}})).await;
        map.is(&world, [Phase::Synced; 2], [1, 1]).await;
    }
    until("only the last revisions are left", async || {
        let all = revisions.list(&ListParams::default()).await.ok()?.items;
        let own = all.iter().filter(|of| of.owner_references().iter().any(|owner| owner.uid == uid)).count();
        *LAST.lock() = format!("{own} revisions");
        // Beyond that the one in use, and the one before it, which is let go when the object is next looked at.
        (1..=2).contains(&own.saturating_sub(DEFAULT_HISTORY_LIMIT)).then_some(())
    })
    .await;

    for sample in &samples {
        let hub = sample.at_hub(&world.hub);
        let object = hub.get(sample.name).await.expect("there");
        let status: FederatedStatus =
            serde_json::from_value(object.data["status"].clone()).expect("a status");
        hub.delete(sample.name, &DeleteParams::default()).await.expect("deleted");
        // Stock members have nobody who ends namespaces.
        if sample.of.is_namespace() && !world.ours {
            continue;
        }
        until(&format!("{} is gone", sample.of.kind), async || {
            hub.get_opt(sample.name).await.ok()?.is_none().then_some(())
        })
        .await;
        for (unit, member) in status.units.iter().zip([&world.x, &world.y]) {
            let name = unit.object.as_deref().expect("a name");
            let left = sample.in_member(member).get_opt(name).await.expect("an answer");
            assert!(left.is_none(), "{left:?}");
        }
    }
    world.end().await;
}
