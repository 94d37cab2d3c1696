//! Credentials that the hub holds for members: follows the Secrets that clusters name, and hands them to the members.
//!
//! A member with a credential goes on with it until the new one has been tried and works, or the old one is refused, so
//! that a rotation fails no request and a wrong Secret breaks nothing that ran. A Secret that is deleted, or not named any
//! more, is not used from that moment on.
//!
//! An API server that cannot decrypt one Secret lists none. While that is so each one that a cluster names is asked for by itself:
//! only who names the one that cannot be read goes without.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use federation_core::answers;
use federation_core::api::KubeFedCluster;
use federation_core::credentials::{Access, CredentialError, read};
use federation_core::names::FEDERATION_NAMESPACE;
use k8s_openapi::api::core::v1::Secret;
use kube::api::ApiResource;
use kube::runtime::watcher;
use kube::{Api, ResourceExt as _};
use tokio::sync::Notify;
use tokio::time::timeout;
use tracing::debug;

use crate::Shared;
use crate::follow::{Change, FollowError, WatchTrouble, admit_all, follow};
use crate::member::chain;
use crate::reader::{Objects, ReadError, Reader};

/// How a member's API is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Way {
    /// Through the agent's gateway, which impersonates whom the hub names.
    Gateway,
    /// Straight through the tunnel, with a credential that the hub holds.
    Direct(Arc<Access>),
    /// Not at all, because the Secret is gone.
    Closed(String),
    /// Not, because the Secret holds nothing that can be used.
    Unusable(String),
}

impl Way {
    /// The Secret that it goes by, for people.
    pub(crate) fn secret(&self) -> Option<String> {
        match self {
            Self::Direct(access) => Some(access.secret.clone()),
            Self::Gateway | Self::Closed(_) | Self::Unusable(_) => None,
        }
    }
}

/// A Secret that nothing prints.
#[derive(Clone)]
pub(crate) struct Sealed(Arc<Secret>);

impl fmt::Debug for Sealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sealed({})", self.0.name_any())
    }
}

impl Sealed {
    pub(crate) fn new(secret: Secret) -> Self {
        Self(Arc::new(secret))
    }

    /// The way that it opens into a cluster.
    pub(crate) fn way(&self, cluster: &KubeFedCluster) -> Way {
        match read(cluster, &self.0) {
            Ok(access) => Way::Direct(Arc::new(access)),
            Err(error) => Way::Unusable(error.to_string()),
        }
    }
}

/// The way of a cluster whose Secret is not there.
pub(crate) fn missing(name: &str) -> Way {
    let error =
        CredentialError::Missing { name: name.to_owned(), namespace: FEDERATION_NAMESPACE.to_owned() };
    Way::Closed(error.to_string())
}

/// The way of a cluster whose Secret cannot be read.
pub(crate) fn unreadable(name: &str, why: &str) -> Way {
    Way::Unusable(format!(
        "the Secret {name} that spec.secretRef names cannot be read from {FEDERATION_NAMESPACE}: {why}"
    ))
}

/// Follows Secrets as soon as a cluster names one, for ever.
pub(crate) async fn run(shared: Arc<Shared>) {
    loop {
        if shared.state.read().wants_secrets() {
            break;
        }
        shared.secrets_due.notified().await;
    }
    let api: Api<Secret> = Api::namespaced(shared.hub.clone(), FEDERATION_NAMESPACE);
    let at = Arc::clone(&shared);
    let change = move |change: Change<Secret>| {
        let listed = matches!(change, Change::Replace(_));
        let concerned = at.state.write().change_secrets(change);
        if listed {
            // Members that waited for their credential begin now.
            at.clusters_changed.notify_one();
        }
        refresh(&at, &concerned);
        true
    };
    let unlisted = Notify::new();
    let mut tell = crate::hub_trouble("secrets");
    let trouble = |trouble: WatchTrouble| {
        if matches!(trouble.error, FollowError::List(_)) {
            unlisted.notify_one();
        }
        tell(trouble)
    };
    tokio::select! {
        () = follow(api, watcher::Config::default(), admit_all, change, trouble) => {}
        () = ask_one_by_one(&shared, &unlisted) => {}
    }
}

/// Secrets in a row to which there is no answer, after which the hub is taken to give none: one alone may be under a key that
/// nobody finds.
const MOST_UNANSWERED: usize = 2;

/// Whenever Secrets could not be listed, asks for those that clusters name, for ever.
async fn ask_one_by_one(shared: &Shared, unlisted: &Notify) {
    // Of an answer that is no Secret nothing is repeated, here or in a log.
    let reader = Reader::of_hub(shared.hub.clone());
    let secrets = reader.objects(&ApiResource::erase::<Secret>(&()), Some(FEDERATION_NAMESPACE));
    loop {
        unlisted.notified().await;
        let (names, heard) = shared.state.read().named_secrets();
        let (mut found, mut asked, mut unanswered) = (Vec::new(), BTreeMap::new(), 0);
        for name in names {
            let why = match timeout(shared.options.request_timeout, ask(&secrets, &name)).await {
                Ok(Ok(secret)) => {
                    found.extend(secret);
                    None
                }
                Ok(Err(error)) if is_of_the_object(&error) => Some(chain(&error)),
                // Of this one nothing is known; and of those behind it, should it be the hub that does not answer.
                Ok(Err(_)) | Err(_) if unanswered + 1 == MOST_UNANSWERED => break,
                Ok(Err(_)) | Err(_) => {
                    unanswered += 1;
                    continue;
                }
            };
            unanswered = 0;
            asked.insert(name, why);
        }
        if asked.is_empty() {
            continue;
        }
        if let Some((name, why)) = asked.iter().find_map(|(name, why)| Some((name, why.as_ref()?))) {
            debug!(secret = name, why, "a credential cannot be read");
        }
        let concerned = shared.state.write().take_secrets(found, asked, heard);
        // Members that waited for their credential begin now.
        shared.clusters_changed.notify_one();
        refresh(shared, &concerned);
    }
}

async fn ask(secrets: &Objects, name: &str) -> Result<Option<Secret>, ReadError> {
    let Some(found) = secrets.get_opt(name).await? else { return Ok(None) };
    // Made of maps with texts as keys, an object always becomes a value.
    let found = serde_json::to_value(found).unwrap_or_default();
    Ok(Some(answers::typed(found)?))
}

/// Whether it is the object that cannot be read, and not the hub that does not answer.
fn is_of_the_object(error: &ReadError) -> bool {
    match error.status() {
        Some(status) => !matches!(status.code, 429 | 502..=504),
        None => matches!(error, ReadError::Unreadable(_) | ReadError::TooLong(_)),
    }
}

/// Hands some members their way, as the hub's objects say it now.
pub(crate) fn refresh(shared: &Shared, members: &[String]) {
    for name in members {
        let Some(member) = shared.members.read().get(name).cloned() else { continue };
        let Some(way) = shared.state.read().way(name) else { continue };
        if member.take_way(way) {
            debug!(cluster = name, "another way to the member's API");
        }
    }
}
