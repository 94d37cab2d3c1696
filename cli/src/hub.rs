//! The client of a hub: its Kubernetes API, which may be somebody else's, and its admin API under `/cellway/v1/`.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::TokioExecutor,
};
use kube::{
    Api, Client, Config,
    api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams},
    client::{Body, ConfigExt as _},
    config::{KubeConfigOptions, Kubeconfig},
};
pub(crate) use proxy_server::rows::Items;
use proxy_server::rows::{ClusterRow, ConnectionRow, Ping, Server, TunnelRow};
use serde::de::DeserializeOwned;
use serde_json::Value;
use service::socket;
use tokio::time::timeout;
use tower::{BoxError, ServiceBuilder, ServiceExt as _, service_fn};

use crate::{
    error::{Error, Result},
    kubeconfig::{Credentials, HubRef, hub_context},
};

/// Long enough for a slow link, short enough for a person in front of it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A ping through the hub to a member that does not answer takes this long at most.
const READ_TIMEOUT: Duration = Duration::from_secs(40);

/// What was tried when a client cannot be made.
const SETTING_UP: &str = "set up the client";

/// A hub that can be asked.
#[derive(Clone)]
pub(crate) struct Hub {
    client: Client,
    /// For the hub itself, where its objects are in somebody else's API.
    admin: Option<Client>,
    kubeconfig: PathBuf,
}

/// Turns a client's error into ours, with what was tried.
pub(crate) fn explain(tried: impl Into<String>) -> impl FnOnce(kube::Error) -> Error {
    |error| Error::of_kube(tried, &error)
}

impl Hub {
    /// Finds the hub's kubeconfig. Nothing is sent yet.
    pub(crate) async fn open(args: &HubRef) -> Result<Self> {
        Self::from_kubeconfig(args.find()?).await
    }

    pub(crate) async fn from_kubeconfig(kubeconfig: PathBuf) -> Result<Self> {
        let text = read(&kubeconfig)?;
        let parsed = parse(&kubeconfig, &text)?;
        let admin = match hub_context(&parsed) {
            Some(context) => Some(client_for(&kubeconfig, parsed.clone(), Some(context)).await?),
            None => None,
        };
        let client = client_for(&kubeconfig, parsed, None).await?;
        Ok(Self { admin, client, kubeconfig })
    }

    /// The Kubernetes API of a member, through the hub.
    pub(crate) async fn member(&self, cluster: &str) -> Result<Client> {
        client_for(&self.kubeconfig, self.through(cluster)?, None).await
    }

    /// The same for answers that go on for as long as there is something to tell, and may be quiet meanwhile: whoever needs one
    /// soon waits for it with a limit of its own.
    pub(crate) async fn member_to_follow(&self, cluster: &str) -> Result<Client> {
        client_to_follow(&config_for(&self.kubeconfig, self.through(cluster)?, None).await?)
    }

    fn through(&self, cluster: &str) -> Result<Kubeconfig> {
        let text = crate::kubeconfig::through_hub(&read(&self.kubeconfig)?, cluster)
            .map_err(|problem| Error::failed(tried_to_read(&self.kubeconfig), problem))?;
        parse(&self.kubeconfig, &text)
    }

    /// The hub's API.
    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    pub(crate) fn kubeconfig(&self) -> &std::path::Path {
        &self.kubeconfig
    }

    pub(crate) fn credentials(&self) -> Result<Credentials> {
        Credentials::read(&self.kubeconfig)
    }

    fn admin_client(&self) -> &Client {
        self.admin.as_ref().unwrap_or(&self.client)
    }

    /// The client for what only an API server of ours has: a store of its own.
    pub(crate) fn with_store(&self, tried: &str) -> Result<&Client> {
        match self.admin {
            None => Ok(&self.client),
            Some(_) => Err(Error::failed(
                tried,
                "this hub keeps its objects in a Kubernetes API of somebody else, and has no store",
            )
            .remedy("do it with that server's own means: its history, encryption and backup are those of its etcd")),
        }
    }

    /// Asks the admin API.
    pub(crate) async fn admin<T: DeserializeOwned>(&self, path: &str, tried: &str) -> Result<T> {
        let request = http::Request::get(format!("/cellway/v1/{path}"))
            .body(Vec::new())
            .map_err(|error| Error::usage(tried, error))?;
        self.admin_client().request(request).await.map_err(explain(tried))
    }

    /// Has the admin API do something.
    pub(crate) async fn admin_post<T: DeserializeOwned>(&self, path: &str, tried: &str) -> Result<T> {
        let request = http::Request::post(format!("/cellway/v1/{path}"))
            .body(Vec::new())
            .map_err(|error| Error::usage(tried, error))?;
        self.admin_client().request(request).await.map_err(explain(tried))
    }

    pub(crate) async fn server(&self) -> Result<Server> {
        self.admin("server", "ask the hub about itself").await
    }

    pub(crate) async fn tunnels(&self, cluster: Option<&str>) -> Result<Items<TunnelRow>> {
        self.admin(&with_cluster("tunnels", cluster), "list the tunnels").await
    }

    pub(crate) async fn connections(&self, cluster: Option<&str>) -> Result<Items<ConnectionRow>> {
        self.admin(&with_cluster("connections", cluster), "list the connections").await
    }

    pub(crate) async fn live_clusters(&self) -> Result<Items<ClusterRow>> {
        self.admin("clusters", "list the clusters").await
    }

    pub(crate) async fn ping(&self, cluster: &str) -> Result<Ping> {
        self.admin(&format!("clusters/{cluster}/ping"), &format!("ping {cluster}")).await
    }

    /// Objects of one of our own kinds.
    pub(crate) fn objects(&self, kind: Kind, namespace: Option<&str>) -> Api<DynamicObject> {
        let resource = kind.resource();
        match namespace {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &resource),
            None => Api::all_with(self.client.clone(), &resource),
        }
    }
}

fn tried_to_read(kubeconfig: &Path) -> String {
    format!("read {}", kubeconfig.display())
}

fn read(kubeconfig: &Path) -> Result<String> {
    std::fs::read_to_string(kubeconfig).map_err(|error| Error::failed(tried_to_read(kubeconfig), error))
}

fn parse(kubeconfig: &Path, text: &str) -> Result<Kubeconfig> {
    Kubeconfig::from_yaml(text).map_err(|error| Error::failed(tried_to_read(kubeconfig), error))
}

/// What a context says, or the current one.
async fn config_for(path: &Path, kubeconfig: Kubeconfig, context: Option<String>) -> Result<Config> {
    let options = KubeConfigOptions { context, ..KubeConfigOptions::default() };
    Config::from_custom_kubeconfig(kubeconfig, &options)
        .await
        .map_err(|error| Error::failed(tried_to_read(path), crate::error::chain(&error)))
}

/// A client for a context, or for the current one.
async fn client_for(path: &Path, kubeconfig: Kubeconfig, context: Option<String>) -> Result<Client> {
    let mut config = config_for(path, kubeconfig, context).await?;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.read_timeout = Some(READ_TIMEOUT);
    config.reset_reader_on_write = true;
    // A person waits: an error that says what is wrong beats a silent second try.
    config.default_retry = false;
    Client::try_from(config).map_err(explain(SETTING_UP))
}

/// A client whose answers may pause for as long as they like. A peer that has vanished is found out by TCP's keep-alive, which
/// the client's own connector cannot be asked for.
fn client_to_follow(config: &Config) -> Result<Client> {
    let https =
        config.rustls_https_connector_with_connector(watchful_connector()).map_err(explain(SETTING_UP))?;
    // TCP's part and TLS' part of it.
    let connector = service_fn(move |to: http::Uri| {
        let connecting = https.clone().oneshot(to);
        Box::pin(async move { timeout(CONNECT_TIMEOUT, connecting).await.map_err(BoxError::from)? })
    });
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer().map_err(explain(SETTING_UP))?)
        .layer(config.extra_headers_layer().map_err(explain(SETTING_UP))?)
        .map_err(BoxError::from)
        .service(legacy::Client::builder(TokioExecutor::new()).build::<_, Body>(connector));
    Ok(Client::new(service, config.default_namespace.clone()))
}

/// Makes connections that notice when their peer has vanished.
fn watchful_connector() -> HttpConnector {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_keepalive(Some(socket::KEEPALIVE_IDLE));
    connector.set_keepalive_interval(Some(socket::KEEPALIVE_INTERVAL));
    connector.set_keepalive_retries(Some(socket::KEEPALIVE_PROBES));
    connector
}

fn with_cluster(path: &str, cluster: Option<&str>) -> String {
    match cluster {
        Some(cluster) => format!("{path}?cluster={cluster}"),
        None => path.to_owned(),
    }
}

/// The kinds that the command line itself makes or reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    KubeFedCluster,
    Cell,
    FederatedDeployment,
    FederatedConfigMap,
    Deployment,
    ConfigMap,
    Namespace,
}

impl Kind {
    /// Group, version, kind and plural as the API serves them.
    fn names(self) -> (&'static str, &'static str, &'static str, &'static str) {
        match self {
            Self::KubeFedCluster => ("core.kubefed.io", "v1beta1", "KubeFedCluster", "kubefedclusters"),
            Self::Cell => ("topology.cellway.io", "v1alpha1", "Cell", "cells"),
            Self::FederatedDeployment => {
                ("types.kubefed.io", "v1beta2", "FederatedDeployment", "federateddeployments")
            }
            Self::FederatedConfigMap => {
                ("types.kubefed.io", "v1beta2", "FederatedConfigMap", "federatedconfigmaps")
            }
            Self::Deployment => ("apps", "v1", "Deployment", "deployments"),
            Self::ConfigMap => ("", "v1", "ConfigMap", "configmaps"),
            Self::Namespace => ("", "v1", "Namespace", "namespaces"),
        }
    }

    pub(crate) fn resource(self) -> ApiResource {
        let (group, version, kind, plural) = self.names();
        ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural)
    }

    /// An object of this kind from its name and its other fields.
    pub(crate) fn object(self, name: &str, fields: Value) -> Result<DynamicObject> {
        let (group, version, kind, _) = self.names();
        let mut object = fields;
        object["apiVersion"] =
            Value::from(if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") });
        object["kind"] = Value::from(kind);
        object["metadata"]["name"] = Value::from(name);
        serde_json::from_value(object)
            .map_err(|error| Error::failed(format!("make the {kind} {name}"), error))
    }
}

/// Creates the object, or merges it into the one that is there.
pub(crate) async fn ensure(
    api: &Api<DynamicObject>,
    kind: Kind,
    name: &str,
    fields: Value,
) -> Result<DynamicObject> {
    let object = kind.object(name, fields)?;
    let tried = format!("create the {} {name}", kind.names().2);
    match api.create(&PostParams::default(), &object).await {
        Ok(object) => Ok(object),
        Err(kube::Error::Api(status)) if status.code == 409 => api
            .patch(name, &PatchParams::default(), &Patch::Merge(&object))
            .await
            .map_err(explain(format!("change the {} {name}", kind.names().2))),
        Err(error) => Err(Error::of_kube(tried, &error)),
    }
}

#[cfg(test)]
mod tests {
    use futures::{AsyncBufReadExt as _, StreamExt as _};
    use k8s_openapi::api::core::v1::Pod;
    use kube::api::LogParams;
    use rustix::net::sockopt;
    use serde_json::json;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn what_is_followed_may_be_quiet_for_as_long_as_it_likes() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (go_on, quiet) = oneshot::channel();
        let serving = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = [0; 4096];
            assert!(stream.read(&mut head).await.unwrap() > 0);
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\none\n").await.unwrap();
            quiet.await.unwrap();
            stream.write_all(b"two\n").await.unwrap();
        };
        let server = format!("http://{}", listener.local_addr().unwrap());
        let mut config = Config::new(server.parse().unwrap());
        // Trusts nobody, and needs to trust nobody.
        config.root_cert = Some(Vec::new());
        // The first client of a process chooses its cryptography, as that of the hub does.
        Client::try_from(config.clone()).unwrap();
        let pods: Api<Pod> = Api::namespaced(client_to_follow(&config).unwrap(), "shop");
        let following = async {
            let params = LogParams { follow: true, ..LogParams::default() };
            let mut lines = std::pin::pin!(pods.log_stream("web", &params).await.unwrap().lines());
            assert_eq!(lines.next().await.unwrap().unwrap(), "one");
            // From here on nothing comes from outside until it is asked for.
            tokio::time::pause();
            tokio::time::advance(READ_TIMEOUT * 3).await;
            go_on.send(()).unwrap();
            assert_eq!(lines.next().await.unwrap().unwrap(), "two");
            assert!(lines.next().await.is_none());
        };
        tokio::join!(serving, following);
    }

    #[tokio::test]
    async fn a_peer_that_vanishes_while_it_is_followed_is_noticed() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to: http::Uri = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        let stream = watchful_connector().oneshot(to).await.unwrap().into_inner();
        assert!(sockopt::socket_keepalive(&stream).unwrap());
        assert_eq!(sockopt::tcp_keepidle(&stream).unwrap(), socket::KEEPALIVE_IDLE);
        assert_eq!(sockopt::tcp_keepintvl(&stream).unwrap(), socket::KEEPALIVE_INTERVAL);
        assert_eq!(sockopt::tcp_keepcnt(&stream).unwrap(), socket::KEEPALIVE_PROBES);
    }

    #[test]
    fn objects_carry_their_kind() {
        let object = Kind::Cell.object("a", json!({"spec": {"cluster": "west"}})).unwrap();
        let value = serde_json::to_value(&object).unwrap();
        assert_eq!(value["apiVersion"], "topology.cellway.io/v1alpha1");
        assert_eq!(value["kind"], "Cell");
        assert_eq!(value["metadata"]["name"], "a");
        assert_eq!(value["spec"]["cluster"], "west");
        let object = Kind::Namespace.object("shop", json!({})).unwrap();
        assert_eq!(serde_json::to_value(&object).unwrap()["apiVersion"], "v1");
    }
}
