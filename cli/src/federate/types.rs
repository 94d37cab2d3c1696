//! `federate types|enable|disable`.

use std::time::Duration;

use federation_core::api::{FederatedTypeConfig, Mode};
use federation_core::names::FEDERATION_NAMESPACE;
use federation_core::types::{FederatedType, WORKLOAD_ANNOTATION, known};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::discovery::{Discovery, Scope};
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;

use super::{DisableArgs, EnableArgs};
use crate::args::ListArgs;
use crate::error::{Error, Result};
use crate::hub::{Hub, Items, Kind, explain};
use crate::output::{self, Cell, Format, Paint, Table, text_out};

/// Longest wait for the controller to take a type up.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often it is looked at meanwhile.
const LOOK: Duration = Duration::from_millis(200);

pub(crate) async fn list(args: ListArgs) -> Result<()> {
    let hub = Hub::open(&args.hub).await?;
    let found =
        configs(&hub).list(&ListParams::default()).await.map_err(explain("list the federated types"))?;
    let items = Items { items: found.items };
    output::print(args.output.output, &items, |items| {
        let mut table = Table::new("no types: `cellway federate enable TYPE` federates one")
            .columns(&["NAME", "TARGET", "FEDERATED", "STATE"])
            .wide_columns(&["WHY"]);
        for config in &items.items {
            let target = &config.spec.target_type;
            let api = if target.group.is_empty() {
                target.version.clone()
            } else {
                format!("{}/{}", target.group, target.version)
            };
            let condition = ready(config);
            let (word, paint) = match condition {
                Some(("True", ..)) => ("running", Paint::Good),
                Some((_, "Disabled", _)) => ("disabled", Paint::Faint),
                Some(_) => ("failed", Paint::Bad),
                None => ("unknown", Paint::Warn),
            };
            table.row(vec![
                Cell::new(config.name_any()),
                Cell::new(format!("{api} {}", target.kind)),
                Cell::new(&config.spec.federated_type.kind),
                Cell::new(word).paint(paint),
                Cell::new(condition.map(|condition| condition.2).unwrap_or_default()),
            ]);
        }
        table
    })
}

pub(crate) async fn enable(args: EnableArgs) -> Result<()> {
    let tried = format!("federate {}", args.name);
    let hub = Hub::open(&args.hub).await?;
    let mut of = match known(&args.name) {
        Some(of) => of,
        None => find(&hub, &args.name, args.from.as_deref()).await?,
    };
    of.collect_status = args.collect_status;
    let mut config = of.to_config();
    if args.workload {
        config.metadata.annotations = Some([(WORKLOAD_ANNOTATION.to_owned(), "true".to_owned())].into());
    }
    FederatedType::from_config(&config).map_err(|error| Error::failed(&tried, error))?;
    if args.dry_run {
        let format = if args.output.output == Format::Json { Format::Json } else { Format::Yaml };
        return output::print(format, &config, |_| Table::default());
    }
    let api = configs(&hub);
    let name = config.name_any();
    match api.create(&PostParams::default(), &config).await {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if status.code == 409 => {
            let patch =
                json!({"metadata": {"annotations": config.metadata.annotations}, "spec": config.spec});
            api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await.map_err(explain(&tried))?;
        }
        Err(error) => return Err(Error::of_kube(tried, &error)),
    }
    let waiting = async {
        loop {
            let found = api.get(&name).await.map_err(explain(&tried))?;
            let fresh =
                found.status.as_ref().map(|status| status.observed_generation) == found.metadata.generation;
            match ready(&found) {
                Some(("True", ..)) if fresh => return Ok(()),
                Some((_, _, message)) if fresh => return Err(Error::failed(&tried, message)),
                _ => tokio::time::sleep(LOOK).await,
            }
        }
    };
    match tokio::time::timeout(PATIENCE, waiting).await {
        Ok(done) => done?,
        Err(_) => {
            return Err(Error::failed(&tried, "the federation controller has not taken it up in time")
                .remedy("see `cellway federate types -o wide` and the hub's log"));
        }
    }
    text_out(&format!("{} is federated: {} {} can be made now\n", name, of.crd_name(), of.kind))
}

pub(crate) async fn disable(args: DisableArgs) -> Result<()> {
    let tried = format!("stop federating {}", args.name);
    let hub = Hub::open(&args.hub).await?;
    let api = configs(&hub);
    let wanted = args.name.to_lowercase();
    let all = api.list(&ListParams::default()).await.map_err(explain(&tried))?;
    let config = all
        .items
        .into_iter()
        .find(|config| {
            let target = &config.spec.target_type;
            [config.name_any(), target.plural_name.clone(), target.kind.to_lowercase()].contains(&wanted)
        })
        .ok_or_else(|| {
            Error::not_found(&tried, "no FederatedTypeConfig has this name")
                .remedy("`cellway federate types` lists them")
        })?;
    let name = config.name_any();
    let patch = json!({"spec": {"propagation": Mode::Disabled}});
    api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await.map_err(explain(&tried))?;
    if args.delete_crd {
        let of = FederatedType::from_config(&config).map_err(|error| Error::failed(&tried, error))?;
        release_all(&hub, &of, &tried).await?;
        let crds: Api<CustomResourceDefinition> = Api::all(hub.client().clone());
        match crds.delete(&of.crd_name(), &DeleteParams::default()).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return Err(Error::of_kube(tried, &error)),
        }
    }
    text_out(&format!("{name} is not federated any more; what lies in members stays\n"))
}

/// Takes the controller's finalizer off: nobody carries a deletion out any more.
async fn release_all(hub: &Hub, of: &FederatedType, tried: &str) -> Result<()> {
    let all: Api<kube::api::DynamicObject> = Api::all_with(hub.client().clone(), &of.hub_resource());
    for object in all.list(&ListParams::default()).await.map_err(explain(tried))? {
        let api: Api<kube::api::DynamicObject> = match object.namespace() {
            Some(namespace) => Api::namespaced_with(hub.client().clone(), &namespace, &of.hub_resource()),
            None => all.clone(),
        };
        let finalizers: Vec<_> = object
            .finalizers()
            .iter()
            .filter(|finalizer| *finalizer != federation_core::names::FINALIZER)
            .collect();
        let patch = json!({"metadata": {"finalizers": finalizers, "resourceVersion": object.metadata.resource_version}});
        api.patch(&object.name_any(), &PatchParams::default(), &Patch::Merge(patch))
            .await
            .map_err(explain(tried))?;
    }
    Ok(())
}

/// Asks members what the resource is.
async fn find(hub: &Hub, name: &str, from: Option<&str>) -> Result<FederatedType> {
    let tried = format!("find the resource {name}");
    let members: Vec<String> = match from {
        Some(member) => vec![member.to_owned()],
        None => {
            let api = hub.objects(Kind::KubeFedCluster, Some(FEDERATION_NAMESPACE));
            let all = api.list(&ListParams::default()).await.map_err(explain(&tried))?;
            all.items.iter().map(|cluster| cluster.name_any()).collect()
        }
    };
    let mut silent = Vec::new();
    for member in &members {
        match discover(hub.member(member).await?, name).await {
            Ok(Some(of)) => return Ok(of),
            Ok(None) => {}
            Err(error) => silent.push(format!("{member}: {error}")),
        }
    }
    let mut happened = "no member serves it".to_owned();
    if !silent.is_empty() {
        happened.push_str(&format!(" (not answering: {})", silent.join("; ")));
    }
    Err(Error::not_found(tried, happened)
        .remedy("name it as `kubectl api-resources` of a member does, and the member with --from"))
}

async fn discover(client: Client, name: &str) -> std::result::Result<Option<FederatedType>, kube::Error> {
    let wanted = name.to_lowercase();
    let discovery = Discovery::new(client).run().await?;
    for group in discovery.groups() {
        for (resource, capabilities) in group.recommended_resources() {
            let names = [
                resource.plural.clone(),
                resource.kind.to_lowercase(),
                format!("{}.{}", resource.plural, resource.group),
            ];
            if names.contains(&wanted) {
                let namespaced = capabilities.scope == Scope::Namespaced;
                return Ok(Some(FederatedType::of(
                    &resource.group,
                    &resource.version,
                    &resource.kind,
                    &resource.plural,
                    namespaced,
                )));
            }
        }
    }
    Ok(None)
}

/// Status, reason and message of the condition `Ready`.
fn ready(config: &FederatedTypeConfig) -> Option<(&str, &str, &str)> {
    let conditions = &config.status.as_ref()?.conditions;
    let condition = conditions.iter().find(|condition| condition.type_ == "Ready")?;
    Some((&condition.status, &condition.reason, &condition.message))
}

fn configs(hub: &Hub) -> Api<FederatedTypeConfig> {
    Api::namespaced(hub.client().clone(), FEDERATION_NAMESPACE)
}
