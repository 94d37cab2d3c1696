//! Credentials that the hub holds for members: follows the Secrets that clusters name, and hands them to the members.
//!
//! A member with a credential goes on with it until the new one has been tried and works, or the old one is refused, so
//! that a rotation fails no request and a wrong Secret breaks nothing that ran. A Secret that is deleted, or not named any
//! more, is not used from that moment on.

use std::fmt;
use std::sync::Arc;

use federation_core::api::KubeFedCluster;
use federation_core::credentials::{Access, CredentialError, read};
use federation_core::names::FEDERATION_NAMESPACE;
use k8s_openapi::api::core::v1::Secret;
use kube::runtime::watcher;
use kube::{Api, ResourceExt as _};
use tracing::debug;

use crate::Shared;
use crate::follow::{Change, admit_all, follow};

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
    let trouble = crate::hub_trouble("secrets");
    follow(api, watcher::Config::default(), admit_all, change, trouble).await;
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
