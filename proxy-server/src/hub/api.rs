//! The Kubernetes API that holds the hub's objects: the hub's own API server, or one that a kubeconfig names.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::middleware::Next;
use federation_apiserver::{ApiServer, Bound, Converter, Role, UserInfo};
use federation_core::api::Conversion;
use kube::client::ClientBuilder;
use kube::client::retry::RetryPolicy;
use serde_json::json;
use service::background::Ended;
use service::metrics::SharedRegistry;
use service::ready::Readiness;
use tokio_util::sync::CancellationToken;
use tower::BoxError;
use tower::retry::RetryLayer;

use super::delegated::OF_CREDENTIAL;
use super::external::External;
use super::{FEDERATION_NAMESPACE, HubArgs, HubError, SYSTEM_NAMESPACE};
use crate::api_proxy::right_to;
use crate::metrics::ServerMetrics;
use crate::user::User;

/// What names of service accounts begin with, at the hub and as a member is told of them.
const ACCOUNT: &str = "system:serviceaccount:";
const ACCOUNT_IN_MEMBERS: &str = "cellway:hub:serviceaccount:";
/// The same of their groups: of all of them, or with `:` and a namespace.
const ACCOUNTS: &str = "system:serviceaccounts";
const ACCOUNTS_IN_MEMBERS: &str = "cellway:hub:serviceaccounts";

/// Bound, not serving yet.
pub(super) enum HubApi {
    Own(Box<Bound>),
    External(Box<External>),
}

// === impl HubApi ===

impl HubApi {
    pub(super) async fn bind(
        args: &HubArgs,
        data_dir: &Path,
        advertised_host: &str,
    ) -> Result<Self, HubError> {
        Ok(match &args.external.kubeconfig {
            None => Self::Own(Box::new(bind_own(args, data_dir, advertised_host).await?)),
            Some(path) => {
                Self::External(Box::new(External::bind(args, path, data_dir, advertised_host).await?))
            }
        })
    }

    /// Where people reach the hub's own paths.
    pub(super) fn local_addr(&self) -> SocketAddr {
        match self {
            Self::Own(api) => api.local_addr(),
            Self::External(api) => api.local_addr(),
        }
    }

    /// Of the authority that the hub's clients are known by.
    pub(super) fn ca_pem(&self) -> &str {
        match self {
            Self::Own(api) => api.ca_pem(),
            Self::External(api) => api.certificates().ca_pem(),
        }
    }

    pub(super) fn admin_kubeconfig(&self) -> PathBuf {
        match self {
            Self::Own(api) => api.admin_kubeconfig(),
            Self::External(api) => api.certificates().admin_kubeconfig(),
        }
    }

    /// How it converts federated objects.
    pub(super) fn conversion(&self) -> Conversion {
        match self {
            Self::Own(_) => Conversion::InProcess,
            Self::External(api) => api.conversion(),
        }
    }

    /// Whether it honours `cellway.io/visible` on roles.
    pub(super) fn visibility(&self) -> bool {
        matches!(self, Self::Own(_))
    }

    /// What `hub.json` says of it beside its address.
    pub(super) fn describe(&self, description: &mut serde_json::Value) {
        description["adminKubeconfig"] = json!(self.admin_kubeconfig());
        if let Self::External(api) = self {
            description["kubernetesApi"] = json!(api.server());
            description["addresses"]["webhook"] = json!(api.webhook_addr().to_string());
        }
    }

    /// A client for the hub's own parts.
    pub(super) fn client(&self) -> kube::Client {
        match self {
            Self::Own(api) => own_client(api),
            Self::External(api) => api.client().clone(),
        }
    }

    pub(super) fn check(&self, readiness: &Readiness) {
        match self {
            Self::Own(api) => {
                let database = api.database();
                // Why, the log says: anybody may ask for health.
                let verdict = move || database.verdict().map_err(|_| "it does not answer".to_owned());
                readiness.check("database", verdict);
            }
            Self::External(api) => api.check(readiness),
        }
    }

    /// The routers of `/clusters/…` and `/cellway/v1/…`.
    pub(super) fn mount(&mut self, members: Router, pages: Router, metrics: ServerMetrics) {
        match self {
            Self::Own(api) => {
                api.mount_guarded("/clusters", with_user(members, in_members), right_to);
                api.mount("/cellway/v1", with_user(pages, |user| user));
            }
            Self::External(api) => api.mount(members, pages, metrics),
        }
    }

    /// Shows when its certificates end. Our own API server has metrics of its own.
    pub(super) fn show_certificates(&self, registry: &SharedRegistry, metrics: &ServerMetrics) {
        if let Self::External(api) = self {
            api.show_certificates(registry, metrics.clone());
        }
    }

    /// Serves until it is to stop, and lets requests end.
    ///
    /// # Errors
    /// When a part that it cannot do without ends by itself.
    pub(super) async fn run(self, stop: CancellationToken) -> Result<(), Ended> {
        match self {
            Self::Own(api) => api.run(stop).await,
            Self::External(api) => api.run(stop).await,
        }
    }
}

async fn bind_own(args: &HubArgs, data_dir: &Path, advertised_host: &str) -> Result<Bound, HubError> {
    let mut config = federation_apiserver::Config::new(data_dir, Role::Hub);
    config.bind = SocketAddr::new(args.bind_address, args.api_port);
    config.advertise = Some(advertised_host.to_owned());
    config.token_auth_file.clone_from(&args.token_auth_file);
    args.api.clone().configure(&mut config);
    let crds = federation_core::crds(&Conversion::InProcess);
    config.crds = crds.iter().filter_map(|crd| serde_json::to_value(crd).ok()).collect();
    config.converter = Some(Converter::new(|object, api_version| {
        federation_core::conversion::convert(object, api_version).map_err(|error| error.to_string())
    }));
    let namespace =
        |name: &str| json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name } });
    config.bootstrap = vec![namespace(SYSTEM_NAMESPACE), namespace(FEDERATION_NAMESPACE)];
    Ok(ApiServer::bind(config).await?)
}

/// A client of the hub API in the same process. As all of kube's own clients do, it asks again where the server says that it is
/// busy.
fn own_client(api: &Bound) -> kube::Client {
    let loopback = api.loopback("system:cellway:hub", &["system:cellway:controllers"]);
    let service = tower::service_fn(move |request: Request<kube::client::Body>| {
        let loopback = loopback.clone();
        async move { loopback.send(request.map(Body::new)).await.map_err(BoxError::from) }
    });
    let retries = RetryLayer::new(RetryPolicy::server_retry());
    ClientBuilder::new(service, "default").with_layer(&retries).build()
}

/// Translates the hub API's user for our routers.
fn with_user(router: Router, known_as: fn(User) -> User) -> Router {
    router.layer(axum::middleware::from_fn(move |mut request: Request, next: Next| async move {
        if let Some(UserInfo { name, uid, groups, extra }) = request.extensions().get::<UserInfo>().cloned() {
            request.extensions_mut().insert(known_as(User { name, uid, groups, extra }));
        }
        next.run(request).await
    }))
}

/// Who a user of the hub is to a member. A service account of the hub is not the member's own of that name: whoever may make
/// accounts in a namespace of the hub would act as those of every member. Members bind roles to it under a name of its own.
pub(super) fn in_members(mut user: User) -> User {
    let Some(account) = user.name.strip_prefix(ACCOUNT) else { return user };
    user.name = format!("{ACCOUNT_IN_MEMBERS}{account}");
    user.uid.clear();
    for group in &mut user.groups {
        if let Some(namespace) = group.strip_prefix(ACCOUNTS) {
            *group = format!("{ACCOUNTS_IN_MEMBERS}{namespace}");
        }
    }
    // Of the hub's token, and of its pods.
    user.extra.retain(|key, _| !key.starts_with(OF_CREDENTIAL));
    user
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn service_accounts_of_the_hub_are_not_the_members_own() {
        let account = User {
            name: "system:serviceaccount:shop:ci".to_owned(),
            uid: "u-1".to_owned(),
            groups: ["system:serviceaccounts", "system:serviceaccounts:shop", "system:authenticated"]
                .map(str::to_owned)
                .to_vec(),
            extra: [("authentication.kubernetes.io/credential-id", "JTI=1"), ("example.com/team", "a")]
                .map(|(key, value)| (key.to_owned(), vec![value.to_owned()]))
                .into(),
        };
        let known = in_members(account);
        assert_eq!(known.name, "cellway:hub:serviceaccount:shop:ci");
        assert_eq!(known.uid, "");
        let groups =
            ["cellway:hub:serviceaccounts", "cellway:hub:serviceaccounts:shop", "system:authenticated"];
        assert_eq!(known.groups, groups);
        assert_eq!(known.extra.keys().collect::<Vec<_>>(), ["example.com/team"]);
        // People are the same everywhere.
        let alice = User { name: "alice".to_owned(), groups: vec!["dev".to_owned()], ..User::default() };
        assert_eq!(in_members(alice.clone()), alice);
    }
}
