//! Finding a federated object by what people call it, with its type and revisions.

use std::sync::Arc;

use federation_core::api::{
    FederatedObject, FederatedRevision, FederatedTypeConfig, ReplicaSchedulingPreference,
};
use federation_core::names::{FEDERATION_NAMESPACE, source};
use federation_core::plan::NamespacePlacement;
use federation_core::revision::held;
use federation_core::topology::Topology;
use federation_core::types::{FederatedType, known};
use kube::api::{DynamicObject, ListParams};
use kube::{Api, ResourceExt as _};

use crate::error::{Error, Result};
use crate::fleet::Fleet;
use crate::hub::{Hub, explain};
use crate::kubeconfig::HubRef;

/// A federated object on the command line.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ObjectArgs {
    /// The federated object, as TYPE/NAME: `deployment/web`, `federatedconfigmap/settings`, `widgets.example.com/one`.
    #[arg(value_name = "TYPE/NAME")]
    pub(crate) object: String,
    /// Its namespace.
    #[arg(short, long, default_value = "default", value_name = "NAMESPACE")]
    pub(crate) namespace: String,
    #[command(flatten)]
    pub(crate) hub: HubRef,
}

/// A federated object with what belongs to it.
pub(crate) struct Found {
    pub(crate) hub: Hub,
    pub(crate) of: FederatedType,
    pub(crate) api: Api<DynamicObject>,
    pub(crate) raw: DynamicObject,
    pub(crate) object: FederatedObject,
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl Found {
    /// Asks the hub for it.
    pub(crate) async fn open(args: &ObjectArgs) -> Result<Self> {
        let tried = format!("find {}", args.object);
        let Some((type_, name)) = args.object.split_once('/') else {
            return Err(
                Error::usage(tried, "it is not of the form TYPE/NAME").remedy("for example deployment/web")
            );
        };
        let hub = Hub::open(&args.hub).await?;
        let of = type_of(&hub, type_).await?;
        let (namespace, api) = if of.namespaced() {
            let api = Api::namespaced_with(hub.client().clone(), &args.namespace, &of.hub_resource());
            (args.namespace.clone(), api)
        } else {
            (String::new(), Api::all_with(hub.client().clone(), &of.hub_resource()))
        };
        let raw: DynamicObject = api.get(name).await.map_err(explain(&tried))?;
        let value = serde_json::to_value(&raw).map_err(|error| Error::failed(&tried, error))?;
        let object = serde_json::from_value(value).map_err(|error| Error::failed(&tried, error))?;
        Ok(Self { hub, of, api, raw, object, namespace, name: name.to_owned() })
    }

    /// Its revisions, the oldest first.
    pub(crate) async fn revisions(&self) -> Result<Vec<FederatedRevision>> {
        let home = self.of.revision_namespace(&self.namespace);
        let api: Api<FederatedRevision> = Api::namespaced(self.hub.client().clone(), home);
        let all = api.list(&ListParams::default()).await.map_err(explain("list the revisions"))?;
        let mark = source(&self.of.plural, &self.name);
        let mut own: Vec<_> = all.items.into_iter().filter(|revision| revision.spec.object == mark).collect();
        let status = self.object.status.as_ref();
        let first = status.and_then(|status| held(&mark, status, &own.iter().collect::<Vec<_>>()));
        own.extend(first);
        own.sort_by_key(|revision| revision.spec.number);
        Ok(own)
    }

    /// The cells and clusters that it can be placed in.
    pub(crate) async fn topology(&self) -> Result<Arc<Topology>> {
        Ok(Fleet::read(&self.hub).await?.seen().by(&self.namespace))
    }

    /// Where its namespace goes. `seen`: the topology that it sees.
    pub(crate) async fn namespace_placement(&self, seen: &Topology) -> Result<NamespacePlacement> {
        if !self.of.target.namespaced {
            return Ok(NamespacePlacement::Unrestricted);
        }
        let configs = type_configs(&self.hub, "find out where the namespace goes").await?;
        let of_namespaces = |config: &&FederatedTypeConfig| {
            config.spec.target_type.group.is_empty() && config.spec.target_type.kind == "Namespace"
        };
        let config = configs.iter().find(of_namespaces);
        // Disabled or not a type, it is read all the same.
        let of =
            config.and_then(|config| FederatedType::from_config(config).ok().or_else(|| known("namespaces")));
        let Some(of) = of else { return Ok(NamespacePlacement::Unrestricted) };
        let api: Api<DynamicObject> =
            Api::namespaced_with(self.hub.client().clone(), &self.namespace, &of.hub_resource());
        match api.get_opt(&self.namespace).await {
            Ok(found) => Ok(NamespacePlacement::of(found.as_ref().map(|object| &object.data), seen)),
            Err(kube::Error::Api(status)) if status.code == 403 => Ok(NamespacePlacement::Unrestricted),
            Err(error) => Err(explain("read the FederatedNamespace")(error)),
        }
    }

    /// What somebody asks for about its replicas.
    pub(crate) async fn preference(&self) -> Result<Option<ReplicaSchedulingPreference>> {
        if !self.of.has_replicas() {
            return Ok(None);
        }
        let api: Api<ReplicaSchedulingPreference> =
            Api::namespaced(self.hub.client().clone(), &self.namespace);
        let found =
            api.get_opt(&self.name).await.map_err(explain("read the replica scheduling preference"))?;
        Ok(found.filter(|of| of.spec.target_kind == self.of.kind))
    }
}

/// The revision that people mean: a number, a name, or the end of a name.
pub(crate) fn pick<'a>(revisions: &'a [FederatedRevision], wanted: &str) -> Result<&'a FederatedRevision> {
    let tried = format!("find the revision {wanted}");
    let number = wanted.parse::<i64>().ok();
    let found: Vec<_> = revisions
        .iter()
        .filter(|revision| {
            let name = revision.name_any();
            name == wanted || Some(revision.spec.number) == number || name.ends_with(&format!("-{wanted}"))
        })
        .collect();
    match found.as_slice() {
        [one] => Ok(one),
        [] => Err(Error::not_found(tried, "the object has no such revision")
            .remedy("`cellway revisions` lists them")),
        _ => Err(Error::usage(tried, "more than one revision is called this").remedy("name it in full")),
    }
}

async fn type_configs(hub: &Hub, tried: &str) -> Result<Vec<FederatedTypeConfig>> {
    let api: Api<FederatedTypeConfig> = Api::namespaced(hub.client().clone(), FEDERATION_NAMESPACE);
    Ok(api.list(&ListParams::default()).await.map_err(explain(tried))?.items)
}

/// The federated type that people mean.
async fn type_of(hub: &Hub, wanted: &str) -> Result<FederatedType> {
    let tried = format!("find the type {wanted}");
    let configs = type_configs(hub, &tried).await?;
    let wanted = wanted.to_lowercase();
    configs
        .iter()
        .filter_map(|config| FederatedType::from_config(config).ok())
        .find(|of| {
            let target = of.target.kind.to_lowercase();
            let short = of.short_names.iter().flat_map(|short| [short.clone(), short[1..].to_owned()]);
            let names = [
                of.target.plural.clone(),
                of.config_name(),
                of.plural.clone(),
                of.crd_name(),
                of.kind.to_lowercase(),
                target,
            ];
            names.into_iter().chain(short).any(|name| name == wanted)
        })
        .ok_or_else(|| {
            Error::not_found(tried, "it is not federated").remedy("`cellway federate types` lists what is")
        })
}
