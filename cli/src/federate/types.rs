//! `federate types|enable|disable`.

use std::time::Duration;

use federation_core::api::{ControllerState, FederatedTypeConfig, Mode};
use federation_core::names::{FEDERATION_NAMESPACE, FINALIZER};
use federation_core::types::{FederatedType, WORKLOAD_ANNOTATION, known};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::discovery::{Discovery, Scope};
use kube::{Api, Client, ResourceExt as _};
use serde::Serialize;
use serde_json::json;

use super::{DisableArgs, EnableArgs};
use crate::args::HubQueryArgs;
use crate::error::{Error, Result};
use crate::hub::{Hub, Items, Kind, explain};
use crate::lists::for_people;
use crate::output::{self, Cell, Format, Paint, Table, text_out, visible_lines};

/// Longest wait for the controller to take a type up or to let go of it: it may be busy with other types' definitions, or be taken
/// over by another hub.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often it is looked at meanwhile.
const LOOK: Duration = Duration::from_millis(200);
/// Times that the objects are gone through while some of them change meanwhile.
const ROUNDS: usize = 10;

pub(crate) async fn list(args: HubQueryArgs) -> Result<()> {
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
                Some(("True", ..)) if fresh => return Ok(found),
                Some((_, _, message)) if fresh => return Err(Error::failed(&tried, message)),
                _ => tokio::time::sleep(LOOK).await,
            }
        }
    };
    let enabled = match tokio::time::timeout(PATIENCE, waiting).await {
        Ok(enabled) => enabled?,
        Err(_) => {
            return Err(Error::failed(&tried, "the federation controller has not taken it up in time")
                .remedy("see `cellway federate types -o wide` and the hub's log"));
        }
    };
    if !for_people(args.output.output) {
        return output::print(args.output.output, &enabled, |_| Table::default());
    }
    let text = format!("{} is federated: {} {} can be made now\n", name, of.crd_name(), of.kind);
    text_out(&visible_lines(&text))
}

/// What became of a type that is not federated any more.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Disabled {
    name: String,
    /// `kept`, `deleted`, or `deleting`: it goes when what else holds its objects lets go of them.
    definition: &'static str,
}

pub(crate) async fn disable(args: DisableArgs) -> Result<()> {
    let tried = format!("stop federating {}", args.name);
    let hub = Hub::open(&args.hub).await?;
    let api = configs(&hub);
    let wanted = args.name.to_lowercase();
    let all = api.list(&ListParams::default()).await.map_err(explain(&tried))?;
    let config = all
        .iter()
        .find(|config| {
            let target = &config.spec.target_type;
            [config.name_any(), target.plural_name.clone(), target.kind.to_lowercase()].contains(&wanted)
        })
        .ok_or_else(|| {
            Error::not_found(&tried, "no FederatedTypeConfig has this name")
                .remedy("`cellway federate types` lists them")
        })?;
    let name = config.name_any();
    let of = if args.delete_crd {
        let of = FederatedType::from_config(config).map_err(|error| Error::failed(&tried, error))?;
        refuse_shared(&all.items, config, &of, &tried)?;
        Some(of)
    } else {
        None
    };
    let patch = json!({"spec": {"propagation": Mode::Disabled}});
    let disabled =
        api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await.map_err(explain(&tried))?;
    let definition = match of {
        None => "kept",
        Some(of) => {
            let gone = delete_crd(hub.client(), &disabled, &of, &tried).await?;
            if gone { "deleted" } else { "deleting" }
        }
    };
    if !for_people(args.output.output) {
        return output::print(args.output.output, &Disabled { name, definition }, |_| Table::default());
    }
    let end = match definition {
        "deleting" => {
            "; the definition of the federated kind goes when what else holds its objects (finalizers) lets go of them"
        }
        _ => "",
    };
    text_out(&visible_lines(&format!("{name} is not federated any more; what lies in members stays{end}\n")))
}

/// A definition that another configuration federates by is not this one's to delete.
fn refuse_shared(
    all: &[FederatedTypeConfig],
    config: &FederatedTypeConfig,
    of: &FederatedType,
    tried: &str,
) -> Result<()> {
    let sharing = all.iter().filter(|other| other.name_any() != config.name_any()).find(|other| {
        other.spec.propagation == Mode::Enabled
            && FederatedType::from_config(other).is_ok_and(|other| other.crd_name() == of.crd_name())
    });
    let Some(other) = sharing else { return Ok(()) };
    let happened = format!("{} federates by {} as well", other.name_any(), of.crd_name());
    Err(Error::failed(tried, happened).remedy("disable that one first, or leave --delete-crd out"))
}

/// Waits until the controller says that it follows the type no more, as the configuration says it now. Until then it would put
/// back what is taken off an object, and carry the object's deletion out in all members.
async fn until_let_go(client: &Client, disabled: &FederatedTypeConfig, tried: &str) -> Result<()> {
    let api: Api<FederatedTypeConfig> = Api::namespaced(client.clone(), FEDERATION_NAMESPACE);
    let name = disabled.name_any();
    let waiting = async {
        loop {
            let found = api.get(&name).await.map_err(explain(tried))?;
            if found.spec.propagation != Mode::Disabled {
                return Err(Error::failed(tried, "somebody enabled it again meanwhile")
                    .remedy("nothing was deleted; agree who decides (GitOps may), then run this again"));
            }
            let let_go = found.status.as_ref().is_some_and(|status| {
                status.observed_generation >= disabled.metadata.generation.unwrap_or_default()
                    && status.propagation_controller == ControllerState::NotRunning
            });
            if let_go {
                return Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap_or_else(|_| {
        Err(Error::failed(tried, "the federation controller has not let go of the type in time").remedy(
            "it is disabled, and nothing was deleted; see that a hub leads (its log, cellway_federation_leading), \
             and run this again when `cellway federate types` says `disabled`",
        ))
    })
}

/// Deletes a federated kind's definition with all its objects once nobody follows them any more, so that whatever they made
/// stays. `disabled`: the configuration, as it was disabled. Returns whether the definition is gone.
async fn delete_crd(
    client: &Client,
    disabled: &FederatedTypeConfig,
    of: &FederatedType,
    tried: &str,
) -> Result<bool> {
    until_let_go(client, disabled, tried).await?;
    let mut rounds = 0;
    while release_all(client, of, tried).await? {
        rounds += 1;
        if rounds == ROUNDS {
            return Err(Error::failed(tried, "its objects keep changing").remedy(
                "the type is disabled, and nothing was deleted; run this again when nobody writes to them",
            ));
        }
    }
    // Whoever has enabled it meanwhile follows it again, and would carry the deletion of its objects out in all members.
    until_let_go(client, disabled, tried).await?;
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    let name = of.crd_name();
    match crds.delete(&name, &DeleteParams::default()).await {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if status.code == 404 => return Ok(true),
        Err(error) => return Err(Error::of_kube(tried, &error)),
    }
    let going = async {
        // A look that had begun before may have put its finalizer on an object that was new then.
        while crds.get_opt(&name).await.map_err(explain(tried))?.is_some() {
            release_all(client, of, tried).await?;
            tokio::time::sleep(LOOK).await;
        }
        Ok(true)
    };
    tokio::time::timeout(PATIENCE, going).await.unwrap_or(Ok(false))
}

/// Takes the controller's finalizer off: nobody carries a deletion out any more. Returns whether one may have it still.
async fn release_all(client: &Client, of: &FederatedType, tried: &str) -> Result<bool> {
    let all: Api<DynamicObject> = Api::all_with(client.clone(), &of.hub_resource());
    let objects = match all.list(&ListParams::default()).await {
        Ok(objects) => objects,
        // It is served no more.
        Err(kube::Error::Api(status)) if status.code == 404 => return Ok(false),
        Err(error) => return Err(Error::of_kube(tried, &error)),
    };
    let mut again = false;
    for object in objects {
        let (held, others): (Vec<_>, Vec<_>) =
            object.finalizers().iter().partition(|finalizer| *finalizer == FINALIZER);
        if held.is_empty() {
            continue;
        }
        let api: Api<DynamicObject> = match object.namespace() {
            Some(namespace) => Api::namespaced_with(client.clone(), &namespace, &of.hub_resource()),
            None => all.clone(),
        };
        let patch =
            json!({"metadata": {"finalizers": others, "resourceVersion": object.metadata.resource_version}});
        match api.patch(&object.name_any(), &PatchParams::default(), &Patch::Merge(patch)).await {
            Ok(_) => {}
            // It changed or went meanwhile.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => again = true,
            Err(error) => return Err(Error::of_kube(tried, &error)),
        }
    }
    Ok(again)
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

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use http::{Method, Request, Response, StatusCode};
    use kube::client::Body;
    use serde_json::Value;

    use super::*;

    const CONFIG: &str = "/apis/core.kubefed.io/v1beta1/namespaces/kube-federation-system/federatedtypeconfigs/widgets.example.com";

    /// What a hub holds, and what it was asked for.
    struct World {
        config: Value,
        /// How often the configuration is asked for before its controller says that it has let go.
        lets_go_after: Option<usize>,
        object: Option<Value>,
        defined: bool,
        /// Somebody enables the type once a finalizer is off.
        comes_back: bool,
        asked: Vec<String>,
    }

    impl World {
        fn answer(&mut self, method: &Method, path: &str) -> (StatusCode, Value) {
            self.asked.push(format!("{method} {path}"));
            let of = FederatedType::of("example.com", "v1", "Widget", "widgets", true);
            let crd = format!("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{}", of.crd_name());
            let missing = (
                StatusCode::NOT_FOUND,
                json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": 404,
                    "reason": "NotFound", "message": "not found"}),
            );
            if path == CONFIG {
                match &mut self.lets_go_after {
                    Some(0) => {
                        self.config["status"] =
                            json!({"observedGeneration": 2, "propagationController": "NotRunning"});
                    }
                    Some(left) => *left -= 1,
                    None => {}
                }
                return (StatusCode::OK, self.config.clone());
            }
            if path == crd {
                if *method == Method::DELETE {
                    self.defined = false;
                    self.object = None;
                    return (
                        StatusCode::OK,
                        json!({"kind": "Status", "apiVersion": "v1", "status": "Success"}),
                    );
                }
                return if self.defined { (StatusCode::OK, json!({})) } else { missing };
            }
            let items: Vec<_> = self.object.iter().cloned().collect();
            if *method == Method::PATCH {
                let Some(object) = &mut self.object else { return missing };
                object["metadata"]["finalizers"] = json!([]);
                if self.comes_back {
                    self.config["spec"]["propagation"] = "Enabled".into();
                }
                return (StatusCode::OK, object.clone());
            }
            let api = of.hub_resource().api_version;
            (
                StatusCode::OK,
                json!({"apiVersion": api, "kind": "FederatedWidgetList", "metadata": {}, "items": items}),
            )
        }
    }

    fn world(lets_go_after: Option<usize>) -> (Arc<Mutex<World>>, Client) {
        let of = FederatedType::of("example.com", "v1", "Widget", "widgets", true);
        let mut config = serde_json::to_value(of.to_config()).unwrap();
        config["metadata"]["generation"] = 2.into();
        config["spec"]["propagation"] = "Disabled".into();
        // What was said of the generation before.
        config["status"] = json!({"observedGeneration": 1, "propagationController": "Running"});
        let object = json!({"apiVersion": of.hub_resource().api_version, "kind": of.kind,
            "metadata": {"name": "one", "namespace": "shop", "resourceVersion": "7", "finalizers": [FINALIZER]}});
        let world = World {
            config,
            lets_go_after,
            object: Some(object),
            defined: true,
            comes_back: false,
            asked: Vec::new(),
        };
        let world = Arc::new(Mutex::new(world));
        let hub = Arc::clone(&world);
        let service = tower::service_fn(move |request: Request<Body>| {
            let (status, body) = hub.lock().unwrap().answer(request.method(), request.uri().path());
            std::future::ready(
                Response::builder()
                    .status(status)
                    .body(Body::from(body.to_string().into_bytes()))
                    .map_err(std::io::Error::other),
            )
        });
        (world, Client::new(service, "default"))
    }

    async fn disable_in(client: &Client) -> Result<bool> {
        let of = FederatedType::of("example.com", "v1", "Widget", "widgets", true);
        let mut disabled = of.to_config();
        disabled.metadata.generation = Some(2);
        delete_crd(client, &disabled, &of, "stop federating widgets").await
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_taken_off_or_deleted_before_the_controller_has_let_go() {
        let (world, client) = world(Some(3));
        assert!(disable_in(&client).await.unwrap());
        let world = world.lock().unwrap();
        let asked: Vec<_> = world.asked.iter().map(|asked| asked.split(' ').next().unwrap_or("")).collect();
        assert!(world.asked[..4].iter().all(|asked| asked.ends_with(CONFIG)), "{:?}", world.asked);
        assert_eq!(asked[4..], ["GET", "PATCH", "GET", "DELETE", "GET"], "{:?}", world.asked);
        assert!(!world.defined);
    }

    #[tokio::test(start_paused = true)]
    async fn a_controller_that_does_not_let_go_keeps_everything() {
        let (world, client) = world(None);
        let said = disable_in(&client).await.unwrap_err().to_string();
        assert!(said.contains("has not let go") && said.contains("nothing was deleted"), "{said}");
        let (seen, defined) = {
            let world = world.lock().unwrap();
            (world.asked.clone(), world.defined)
        };
        assert!(defined && seen.iter().all(|asked| asked == &format!("GET {CONFIG}")), "{seen:?}");
        // Nor when somebody wants it back.
        world.lock().unwrap().config["spec"]["propagation"] = "Enabled".into();
        let said = disable_in(&client).await.unwrap_err().to_string();
        assert!(said.contains("enabled it again"), "{said}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_type_that_is_enabled_at_the_last_moment_keeps_its_definition() {
        let (world, client) = world(Some(0));
        world.lock().unwrap().comes_back = true;
        let said = disable_in(&client).await.unwrap_err().to_string();
        assert!(said.contains("enabled it again"), "{said}");
        let world = world.lock().unwrap();
        assert!(world.defined && world.object.is_some(), "{:?}", world.asked);
    }

    #[test]
    fn a_definition_that_another_type_is_federated_by_stays() {
        let of = FederatedType::of("example.com", "v1", "Widget", "widgets", true);
        let one = of.to_config();
        let mut two = one.clone();
        two.metadata.name = Some("another".into());
        let all = [one.clone(), two.clone()];
        assert!(refuse_shared(&all, &one, &of, "try").unwrap_err().to_string().contains("another federates"));
        two.spec.propagation = Mode::Disabled;
        assert!(refuse_shared(&[one.clone(), two], &one, &of, "try").is_ok());
    }
}
