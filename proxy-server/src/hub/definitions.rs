//! The federation's CustomResourceDefinitions at a kube-apiserver that is somebody else's: installed at the start, and
//! registered with the conversion webhook for as long as the hub runs.
//!
//! Definitions of types that were enabled later are the controller's, which brings them up to date when it starts; here
//! only their registration is looked after.

use std::collections::BTreeMap;
use std::pin::pin;
use std::time::Duration;

use federation_core::api::Conversion;
use federation_core::names::FIELD_MANAGER;
use federation_core::types::FEDERATED_GROUP;
use futures::StreamExt as _;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceConversion, CustomResourceDefinition, WebhookClientConfig,
};
use kube::api::{Patch, PatchParams};
use kube::runtime::wait::{await_condition, conditions};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};
use tokio::time::Instant;

/// A stock server publishes a definition within a second or two; it may be busy with all of them.
const ESTABLISHED_WITHIN: Duration = Duration::from_secs(60);

/// A definition that somebody else keeps changing is registered again at most so often: two hubs that fight over it are
/// told so in their logs, and the server is spared.
const REPAIR_PACE: Duration = Duration::from_secs(60);

/// Why the definitions are not there.
#[derive(Debug, thiserror::Error)]
pub enum DefinitionsError {
    /// Not allowed, and not there.
    #[error(
        "the definition {name} is not installed and this hub may not do it ({message}): apply docs/stock-hub.yaml, or \
         install what `cellway crds --webhook-url {url} --webhook-ca {ca}` prints"
    )]
    Forbidden {
        /// Of the definition.
        name: String,
        /// What the server says of the missing right.
        message: String,
        /// Of the webhook.
        url: String,
        /// The file with its authority.
        ca: String,
    },
    /// Something else.
    #[error("failed to install the definition {name}")]
    Failed {
        /// Of the definition.
        name: String,
        /// Why.
        #[source]
        source: Box<kube::Error>,
    },
    /// Accepted, and not served.
    #[error(
        "the definitions are not served {ESTABLISHED_WITHIN:?} after they were installed: look at the conditions in \
         `kubectl get crd -o yaml`"
    )]
    NotEstablished,
}

/// The definitions as they are to be, by name.
#[derive(Clone)]
pub(super) struct Definitions {
    api: Api<CustomResourceDefinition>,
    url: String,
    all: BTreeMap<String, Value>,
    /// What each federated one has at `spec.conversion`.
    conversion: CustomResourceConversion,
}

// === impl Definitions ===

impl Definitions {
    /// Those of a hub with this webhook; `None` for any other conversion.
    pub(super) fn new(client: Client, conversion: &Conversion) -> Option<Self> {
        let Conversion::Webhook { url, .. } = conversion else { return None };
        let mut all = BTreeMap::new();
        let mut registration = None;
        for crd in federation_core::crds(conversion) {
            let name = crd.name_any();
            registration = registration.or_else(|| crd.spec.conversion.clone());
            let mut wanted = serde_json::to_value(crd).ok()?;
            federation_core::render::strip_nulls(&mut wanted);
            wanted.as_object_mut()?.remove("status");
            all.insert(name, wanted);
        }
        Some(Self { api: Api::all(client), url: url.clone(), all, conversion: registration? })
    }

    /// Installs what is missing and updates what differs, and waits until all are served. `ca` is the file that holds the
    /// webhook's authority, for messages.
    pub(super) async fn install(&self, ca: &str) -> Result<(), DefinitionsError> {
        for (name, wanted) in &self.all {
            let failed = |source| DefinitionsError::Failed { name: name.clone(), source: Box::new(source) };
            let message = match self.apply(wanted, name).await {
                Ok(()) => continue,
                Err(kube::Error::Api(status)) if status.code == 403 => status.message.clone(),
                Err(error) => return Err(failed(error)),
            };
            let found = match self.api.get_opt(name).await {
                Ok(found) => found,
                Err(kube::Error::Api(status)) if status.code == 403 => None,
                Err(error) => return Err(failed(error)),
            };
            let unconverted = wanted["spec"]["conversion"].is_null();
            let usable = found.is_some_and(|found| unconverted || self.is_registered(&found));
            if !usable {
                let (url, ca) = (self.url.clone(), ca.to_owned());
                return Err(DefinitionsError::Forbidden { name: name.clone(), message, url, ca });
            }
            tracing::warn!(
                definition = name, %message,
                "this hub may not keep its definitions up to date: the one that is there is used as it is"
            );
        }
        let established = self
            .all
            .keys()
            .map(|name| await_condition(self.api.clone(), name, conditions::is_crd_established()));
        match tokio::time::timeout(ESTABLISHED_WITHIN, futures::future::try_join_all(established)).await {
            Ok(Ok(_)) => Ok(()),
            // Whoever may not watch them has been told above; members and objects are watched with patience anyway.
            Ok(Err(error)) => {
                tracing::warn!(error = %service::error_chain(&error), "cannot see whether the definitions are served");
                Ok(())
            }
            Err(_) => Err(DefinitionsError::NotEstablished),
        }
    }

    async fn apply(&self, wanted: &Value, name: &str) -> kube::Result<()> {
        let params = PatchParams::apply(FIELD_MANAGER).force();
        self.api.patch(name, &params, &Patch::Apply(wanted)).await.map(drop)
    }

    /// Registers the webhook again wherever somebody takes it out; for ever.
    pub(super) async fn keep(self) {
        let watch = watcher(self.api.clone(), watcher::Config::default());
        let mut changes = pin!(watch.default_backoff().applied_objects());
        let mut repaired: BTreeMap<String, Instant> = BTreeMap::new();
        while let Some(change) = changes.next().await {
            let found = match change {
                Ok(found) => found,
                Err(error) => {
                    tracing::warn!(error = %service::error_chain(&error), "failed to watch the definitions");
                    continue;
                }
            };
            let name = found.name_any();
            if !self.is_converted(&found) || self.is_registered(&found) {
                continue;
            }
            if let Some(last) = repaired.get(&name) {
                tokio::time::sleep_until(*last + REPAIR_PACE).await;
            }
            loop {
                match self.register(&name).await {
                    Ok(false) => break,
                    Ok(true) => {
                        tracing::warn!(
                            definition = name,
                            url = self.url,
                            "the conversion webhook was registered otherwise, and is again what this hub serves: if \
                             another hub uses this API, end one of them"
                        );
                        break;
                    }
                    Err(error) => tracing::warn!(
                        definition = name, error = %service::error_chain(&error),
                        "failed to register the conversion webhook; trying again in {REPAIR_PACE:?}"
                    ),
                }
                tokio::time::sleep(REPAIR_PACE).await;
            }
            repaired.retain(|_, at| at.elapsed() < REPAIR_PACE);
            repaired.insert(name, Instant::now());
        }
    }

    /// Whether there was something to do.
    async fn register(&self, name: &str) -> kube::Result<bool> {
        let Some(found) = self.api.get_opt(name).await? else { return Ok(false) };
        if self.is_registered(&found) {
            return Ok(false);
        }
        match self.all.get(name) {
            Some(wanted) => self.apply(wanted, name).await?,
            None => {
                let mut patch = json!({ "spec": { "conversion": self.conversion } });
                // One of the two goes when the other comes.
                let client = &mut patch["spec"]["conversion"]["webhook"]["clientConfig"];
                for way in ["url", "service"] {
                    if client[way].is_null() {
                        client[way] = Value::Null;
                    }
                }
                let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..Default::default() };
                self.api.patch(name, &params, &Patch::Merge(&patch)).await?;
            }
        }
        Ok(true)
    }

    /// Whether it has two versions. Types that were enabled later are not among ours.
    fn is_converted(&self, crd: &CustomResourceDefinition) -> bool {
        let ours = self.all.get(&crd.name_any());
        crd.spec.group == FEDERATED_GROUP && ours.is_none_or(|ours| ours["spec"]["conversion"].is_object())
    }

    fn is_registered(&self, crd: &CustomResourceDefinition) -> bool {
        let (found, wanted) = (crd.spec.conversion.as_ref(), &self.conversion);
        found.is_some_and(|found| found.strategy == wanted.strategy && client_of(found) == client_of(wanted))
    }
}

fn client_of(conversion: &CustomResourceConversion) -> Option<&WebhookClientConfig> {
    conversion.webhook.as_ref()?.client_config.as_ref()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_registered_otherwise_is_noticed() {
        let client = Client::new(
            tower::service_fn(async |_: http::Request<kube::client::Body>| {
                Err::<http::Response<kube::client::Body>, _>(std::io::Error::other("nobody is asked"))
            }),
            "default",
        );
        let webhook = |url: &str, ca: &str| Conversion::Webhook { url: url.into(), ca_bundle: ca.into() };
        let ours = Definitions::new(client.clone(), &webhook("https://hub:1/convert", "CA")).unwrap();
        let federated = |conversion: &Conversion| {
            federation_core::crds(conversion)
                .into_iter()
                .find(|crd| crd.name_any() == "federatedconfigmaps.types.kubefed.io")
                .unwrap()
        };
        assert!(ours.is_registered(&federated(&webhook("https://hub:1/convert", "CA"))));
        assert!(!ours.is_registered(&federated(&webhook("https://hub:2/convert", "CA"))));
        assert!(!ours.is_registered(&federated(&webhook("https://hub:1/convert", "another CA"))));
        assert!(!ours.is_registered(&federated(&Conversion::Unserved)));
        let others: Vec<_> = federation_core::crds(&Conversion::Unserved)
            .into_iter()
            .filter(|crd| crd.spec.group == FEDERATED_GROUP && !ours.is_converted(crd))
            .map(|crd| crd.name_any())
            .collect();
        assert_eq!(others, ["federatedrevisions.types.kubefed.io"], "it has one version");
        assert!(Definitions::new(client, &Conversion::InProcess).is_none());
    }
}
