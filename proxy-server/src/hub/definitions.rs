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
use tokio::sync::watch;
use tokio::time::Instant;

/// A stock server publishes a definition within a second or two; it may be busy with all of them.
const ESTABLISHED_WITHIN: Duration = Duration::from_secs(60);

/// A definition that somebody else keeps changing is registered again at most so often: two hubs that fight over it are
/// told so in their logs, and the server is spared.
const REPAIR_PACE: Duration = Duration::from_secs(60);

/// How long one repair may take: others wait for it.
const REPAIR_TIMEOUT: Duration = Duration::from_secs(15);

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

/// The conversion that definitions are to name, and the one that all of them name.
#[derive(Debug)]
pub(super) struct Registration {
    pub(super) wanted: watch::Sender<Conversion>,
    pub(super) there: watch::Sender<Option<Conversion>>,
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

// === impl Registration ===

impl Registration {
    pub(super) fn new(wanted: Conversion) -> Self {
        Self { wanted: watch::Sender::new(wanted), there: watch::Sender::new(None) }
    }

    /// Whether every definition names what is wanted now.
    pub(super) fn is_done(&self) -> bool {
        self.there.borrow().as_ref() == Some(&*self.wanted.borrow())
    }
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

    /// Registers the webhook again wherever somebody takes it out, and everywhere when it is to be another; for ever. A
    /// definition for which that fails waits for its next turn, and no other one waits for it.
    pub(super) async fn keep(mut self, registration: &Registration) {
        let mut wanted = registration.wanted.subscribe();
        loop {
            let conversion = wanted.borrow_and_update().clone();
            if let Some(others) = Self::new(self.api.clone().into_client(), &conversion) {
                self = others;
            }
            tokio::select! {
                () = self.keep_as(conversion, registration) => return,
                changed = wanted.changed() => if changed.is_err() { return },
            }
        }
    }

    async fn keep_as(&self, conversion: Conversion, registration: &Registration) {
        let mut changes = pin!(watcher(self.api.clone(), watcher::Config::default()).default_backoff());
        let mut repaired: BTreeMap<String, Instant> = BTreeMap::new();
        // When each is to be looked at.
        let mut due: BTreeMap<String, Instant> = BTreeMap::new();
        let mut listed = false;
        loop {
            if listed && due.is_empty() && !registration.is_done() {
                registration.there.send_replace(Some(conversion.clone()));
            }
            let next = due.iter().min_by_key(|(_, at)| **at).map(|(name, at)| (name.clone(), *at));
            let (name, at) = next.unwrap_or_else(|| (String::new(), Instant::now()));
            tokio::select! {
                change = changes.next() => match change {
                    Some(Ok(watcher::Event::InitApply(found) | watcher::Event::Apply(found)))
                        if self.is_converted(&found) && !self.is_registered(&found) =>
                    {
                        let name = found.name_any();
                        let at = repaired.get(&name).map_or_else(Instant::now, |last| *last + REPAIR_PACE);
                        due.entry(name).or_insert(at);
                    }
                    Some(Ok(watcher::Event::InitDone)) => listed = true,
                    Some(Ok(_)) => {}
                    Some(Err(error)) => {
                        tracing::warn!(error = %service::error_chain(&error), "failed to watch the definitions");
                    }
                    None => return,
                },
                () = tokio::time::sleep_until(at), if !due.is_empty() => {
                    if self.repair(&name).await {
                        due.remove(&name);
                        repaired.retain(|_, at| at.elapsed() < REPAIR_PACE);
                        repaired.insert(name, Instant::now());
                    } else {
                        due.insert(name, Instant::now() + REPAIR_PACE);
                    }
                }
            }
        }
    }

    /// Whether it is as it should be now.
    async fn repair(&self, name: &str) -> bool {
        match tokio::time::timeout(REPAIR_TIMEOUT, self.register(name)).await {
            Ok(Ok(false)) => return true,
            Ok(Ok(true)) => {
                tracing::warn!(
                    definition = name,
                    url = self.url,
                    "the conversion webhook was registered otherwise, and is now what this hub serves: if that was not this \
                     hub with another authority, another one uses this API: end one of them"
                );
                return true;
            }
            Ok(Err(error)) => tracing::warn!(
                definition = name, error = %service::error_chain(&error),
                "failed to register the conversion webhook; trying again in {REPAIR_PACE:?}"
            ),
            Err(_) => tracing::warn!(
                definition = name,
                "the Kubernetes API did not register the conversion webhook within {REPAIR_TIMEOUT:?}; trying again in \
                 {REPAIR_PACE:?}"
            ),
        }
        false
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

    fn webhook(url: &str, ca: &str) -> Conversion {
        Conversion::Webhook { url: url.into(), ca_bundle: ca.into() }
    }

    /// One definition may not be changed; the one that comes after it is put right all the same, and at once.
    #[tokio::test(start_paused = true)]
    async fn what_is_refused_holds_up_nothing_else() {
        const REFUSED: &str = "federatedconfigmaps.types.kubefed.io";
        let others: Vec<Value> = federation_core::crds(&webhook("https://other/convert", "CA"))
            .into_iter()
            .filter(|crd| [REFUSED, "federatedsecrets.types.kubefed.io"].contains(&crd.name_any().as_str()))
            .map(|crd| serde_json::to_value(crd).unwrap())
            .collect();
        assert_eq!(others.len(), 2);
        let (patched, mut seen) = tokio::sync::mpsc::channel(100);
        let service = tower::service_fn(move |request: http::Request<kube::client::Body>| {
            let (others, patched) = (others.clone(), patched.clone());
            async move {
                let name = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
                let found = others.iter().find(|crd| crd["metadata"]["name"] == name.as_str());
                let (status, answer) = match (request.method(), found) {
                    (&http::Method::PATCH, Some(found)) => {
                        patched.send((name.clone(), Instant::now())).await.unwrap();
                        let refused = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                            "message": "no", "reason": "Forbidden", "code": 403});
                        if name == REFUSED { (403, refused) } else { (200, found.clone()) }
                    }
                    (_, Some(found)) => (200, found.clone()),
                    _ if request.uri().query().is_some_and(|query| query.contains("watch=true")) => {
                        std::future::pending().await
                    }
                    _ => (
                        200,
                        json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinitionList",
                        "metadata": {"resourceVersion": "1"}, "items": others}),
                    ),
                };
                let body = kube::client::Body::from(answer.to_string().into_bytes());
                Ok::<_, std::io::Error>(http::Response::builder().status(status).body(body).unwrap())
            }
        });
        let registration = Registration::new(webhook("https://hub/convert", "CA"));
        let ours = Definitions::new(Client::new(service, "default"), &registration.wanted.borrow());
        let begun = Instant::now();
        let _keeping = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(async move {
            ours.unwrap().keep(&registration).await
        }));
        let mut next = async || seen.recv().await.map(|(name, at)| (name, (at - begun).as_secs())).unwrap();
        assert_eq!(next().await, (REFUSED.to_owned(), 0));
        assert_eq!(next().await, ("federatedsecrets.types.kubefed.io".to_owned(), 0));
        let (name, at) = next().await;
        assert_eq!(name, REFUSED, "tried again");
        assert_eq!(at, REPAIR_PACE.as_secs());
    }

    /// Another authority comes to all definitions, types that were enabled later among them, and it is told when it is there.
    #[tokio::test(start_paused = true)]
    async fn another_authority_is_registered_everywhere() {
        const LATER: &str = "federatedwidgets.types.kubefed.io";
        let first = webhook("https://hub/convert", "CA");
        let crds: BTreeMap<String, Value> = federation_core::crds(&first)
            .into_iter()
            .find(|crd| crd.name_any() == "federatedconfigmaps.types.kubefed.io")
            .into_iter()
            .flat_map(|crd| {
                let mut later = serde_json::to_value(&crd).unwrap();
                later["metadata"]["name"] = LATER.into();
                [(crd.name_any(), serde_json::to_value(crd).unwrap()), (LATER.to_owned(), later)]
            })
            .collect();
        assert_eq!(crds.len(), 2);
        let crds = std::sync::Arc::new(parking_lot::Mutex::new(crds));
        let there = crds.clone();
        let service = tower::service_fn(move |request: http::Request<kube::client::Body>| {
            let crds = there.clone();
            async move {
                let name = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
                let watches = request.uri().query().is_some_and(|query| query.contains("watch=true"));
                let patched = request.method() == http::Method::PATCH;
                if watches {
                    std::future::pending::<()>().await;
                }
                let body = request.into_body().collect_bytes().await.unwrap();
                let mut crds = crds.lock();
                let answer = match crds.get_mut(&name) {
                    Some(crd) => {
                        if patched {
                            let patch: Value = serde_json::from_slice(&body).unwrap();
                            crd["spec"]["conversion"] = patch["spec"]["conversion"].clone();
                            federation_core::render::strip_nulls(crd);
                        }
                        crd.clone()
                    }
                    None => {
                        json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinitionList",
                        "metadata": {"resourceVersion": "1"}, "items": crds.values().collect::<Vec<_>>()})
                    }
                };
                let body = kube::client::Body::from(answer.to_string().into_bytes());
                Ok::<_, std::io::Error>(http::Response::new(body))
            }
        });
        let registration = std::sync::Arc::new(Registration::new(first.clone()));
        let ours = Definitions::new(Client::new(service, "default"), &first).unwrap();
        let kept = registration.clone();
        let _keeping =
            tokio_util::task::AbortOnDropHandle::new(tokio::spawn(async move { ours.keep(&kept).await }));
        let done = async |wanted: &Conversion| {
            let mut there = registration.there.subscribe();
            let _ = there.wait_for(|there| there.as_ref() == Some(wanted)).await.unwrap();
        };
        done(&first).await;
        assert!(registration.is_done());
        let second = webhook("https://hub/convert", "another CA");
        registration.wanted.send_replace(second.clone());
        assert!(!registration.is_done());
        done(&second).await;
        let crds: Vec<Value> = crds.lock().values().cloned().collect();
        let bundle = |crd: &Value| crd["spec"]["conversion"]["webhook"]["clientConfig"]["caBundle"].clone();
        assert!(
            crds.iter().all(|crd| bundle(crd) == bundle(&crds[0]) && bundle(crd).is_string()),
            "{crds:?}"
        );
        let found: Vec<CustomResourceDefinition> =
            crds.into_iter().map(|crd| serde_json::from_value(crd).unwrap()).collect();
        let wanted = Definitions::new(client_of_nobody(), &second).unwrap();
        assert!(found.iter().all(|crd| wanted.is_registered(crd)));
    }

    fn client_of_nobody() -> Client {
        Client::new(
            tower::service_fn(async |_: http::Request<kube::client::Body>| {
                Err::<http::Response<kube::client::Body>, _>(std::io::Error::other("nobody is asked"))
            }),
            "default",
        )
    }

    #[tokio::test]
    async fn what_is_registered_otherwise_is_noticed() {
        let client = client_of_nobody();
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
