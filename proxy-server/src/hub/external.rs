//! A hub on somebody else's Kubernetes API: what stands in for our own API server when a kubeconfig names another one.
//!
//! ```text
//!   stock kube-apiserver ◀── objects ── feed, tokens, controller            (definitions: installed, kept registered)
//!      │  └──────────────────────────▶ webhook (conversion)
//!      └◀── TokenReview, SubjectAccessReview ── delegated ◀── --api-port ─┬─ /clusters/<name>/ ─▶ api_proxy
//!                                                                         └─ /cellway/v1/ ─▶ admin_api
//! ```

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use federation_apiserver::{Certificates, Config, ObjectsAt, Role};
use federation_core::api::Conversion;
use http::{Request, Response, StatusCode};
use k8s_openapi::api::core::v1::Namespace;
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Api, Client};
use service::background::{Background, Ended};
use service::duration::GoDuration;
use service::http::Limits;
use service::metrics::SharedRegistry;
use service::ready::Readiness;
use tls::CertificateDer;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;
use tracing::Instrument as _;

use super::definitions::{Definitions, DefinitionsError};
use super::delegated::Delegated;
use super::webhook::{Webhook, WebhookConfig, WebhookError};
use super::{FEDERATION_NAMESPACE, HubArgs, SYSTEM_NAMESPACE};
use crate::metrics::ServerMetrics;
use crate::user::User;
use crate::{https, status};

/// How often the API is asked whether it answers, and how long it has for that.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// How long requests may go on once everything else has ended.
const GRACE: Duration = Duration::from_secs(5);

/// The field's default for webhooks.
const WEBHOOK_PORT: u16 = 9443;

/// The Kubernetes API of somebody else.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "A Kubernetes API of somebody else")]
pub struct ExternalArgs {
    /// The Kubernetes API that holds the hub's objects, instead of the hub's own: a kubeconfig with the rights of
    /// docs/stock-hub.yaml. The hub's API port then serves /clusters/… and /cellway/v1/… only.
    // What our own API server alone has a use for.
    #[arg(long, value_name = "FILE", conflicts_with_all = [
        "token_auth_file", "store", "store_compaction_interval", "event_ttl", "shutdown_delay_duration",
        "anonymous_auth", "encryption_provider_config", "encryption_provider_config_automatic_reload",
        "audit_policy_file", "audit_log_path", "audit_log_maxsize", "audit_log_maxbackup", "audit_log_maxage",
        "max_requests_inflight", "max_mutating_requests_inflight", "request_timeout", "min_request_timeout",
        "http2_max_streams_per_connection", "service_account_issuer", "service_account_signing_key_file",
        "service_account_key_file", "service_account_jwks_uri", "service_account_max_token_expiration",
        "api_audiences", "oidc_issuer_url", "oidc_client_id", "oidc_username_claim", "oidc_username_prefix",
        "oidc_groups_claim", "oidc_groups_prefix", "oidc_required_claim", "oidc_signing_algs", "oidc_ca_file",
    ])]
    pub kubeconfig: Option<PathBuf>,
    /// The port on which that API has objects converted; 0 for a free one. Nobody else needs to reach it.
    #[arg(long, default_value_t = WEBHOOK_PORT, value_name = "PORT", requires = "kubeconfig")]
    pub webhook_port: u16,
    /// What that API dials for conversions; https://NAME.NAMESPACE.svc:PORT/cellway/v1/convert is the Service of that name
    /// [default: https://ADVERTISED:PORT/cellway/v1/convert].
    #[arg(long, value_name = "URL", requires = "kubeconfig")]
    pub webhook_url: Option<String>,
    /// How long the conversion webhook's certificate lives; renewed every day, and at a third of its life if that is sooner.
    #[arg(long, default_value = "2160h", value_name = "DURATION", requires = "kubeconfig")]
    pub webhook_certificate_ttl: GoDuration,
}

/// Why a hub could not be put on somebody else's API.
#[derive(Debug, thiserror::Error)]
pub enum ExternalError {
    /// The file.
    #[error("failed to use the kubeconfig {path}")]
    Kubeconfig {
        path: PathBuf,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The API.
    #[error("failed to reach the Kubernetes API at {server} that the kubeconfig {path} names")]
    Unreachable {
        /// Its URL.
        server: String,
        /// Of the kubeconfig.
        path: PathBuf,
        #[source]
        source: Box<kube::Error>,
    },
    /// Somebody has to make them.
    #[error(
        "the Kubernetes API at {server} has no namespace {name}, or does not show it: apply docs/stock-hub.yaml"
    )]
    NoNamespace {
        /// The API's URL.
        server: String,
        /// Of the namespace.
        name: &'static str,
        /// What the API says.
        #[source]
        source: Box<kube::Error>,
    },
    /// The API's definitions.
    #[error(transparent)]
    Definitions(#[from] DefinitionsError),
    /// The port.
    #[error("failed to listen on {addr}: choose another --api-port")]
    Listen {
        addr: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    /// Certificates and kubeconfigs.
    #[error(transparent)]
    Certificates(#[from] federation_apiserver::BindError),
    /// The webhook.
    #[error(transparent)]
    Webhook(#[from] WebhookError),
}

/// An API of somebody else, with what this hub serves beside it: bound, not serving yet.
pub(super) struct External {
    client: Client,
    /// Its URL.
    server: String,
    listener: TcpListener,
    address: SocketAddr,
    certificates: Certificates,
    webhook: Webhook,
    definitions: Option<Definitions>,
    served: Served,
    metrics: ServerMetrics,
    answers: Arc<AtomicBool>,
}

/// What the port serves.
#[derive(Clone)]
struct Served {
    members: Router,
    pages: Router,
    delegated: Delegated,
    /// What is said about every other path.
    elsewhere: Arc<str>,
}

/// Who the certificate of a connection says its client is.
#[derive(Clone)]
struct Certified(Option<User>);

/// Puts a request beyond the admin API's own question of who may: the API has been asked.
#[derive(Clone, Copy)]
pub(super) struct Authorised;

// === impl External ===

impl External {
    /// Reads the kubeconfig, installs the definitions, binds the listeners.
    pub(super) async fn bind(
        args: &HubArgs,
        kubeconfig: &Path,
        data_dir: &Path,
        advertised_host: &str,
    ) -> Result<Self, ExternalError> {
        let (client, server, objects) = open(kubeconfig).await?;
        match client.apiserver_version().await {
            Ok(version) => {
                let version = version.git_version;
                tracing::info!(server, version, "the hub's objects are in this Kubernetes API");
            }
            // It answers; what is needed is asked for below.
            Err(kube::Error::Api(status)) if status.code == 403 => {}
            Err(source) => {
                let (server, path) = (server.clone(), kubeconfig.to_owned());
                return Err(ExternalError::Unreachable { server, path, source: Box::new(source) });
            }
        }
        let namespaces: Api<Namespace> = Api::all(client.clone());
        for name in [SYSTEM_NAMESPACE, FEDERATION_NAMESPACE] {
            namespaces.get(name).await.map_err(|source| ExternalError::NoNamespace {
                server: server.clone(),
                name,
                source: Box::new(source),
            })?;
        }

        let addr = SocketAddr::new(args.bind_address, args.api_port);
        let listen = |source| ExternalError::Listen { addr, source };
        let listener = TcpListener::bind(addr).await.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let mut config = Config::new(data_dir, Role::Hub);
        config.bind = addr;
        config.advertise = Some(advertised_host.to_owned());
        args.api.clone().configure(&mut config);
        let certificates = Certificates::new(&config, address, Some(objects))?;
        let webhook = Webhook::bind(WebhookConfig {
            bind: SocketAddr::new(args.bind_address, args.external.webhook_port),
            url: args.external.webhook_url.as_deref(),
            host: advertised_host,
            folder: &data_dir.join("webhook-tls"),
            authority: certificates.authority().clone(),
            pki: &config.pki(),
            certificate_ttl: args.external.webhook_certificate_ttl,
        })
        .await?;
        let definitions = Definitions::new(client.clone(), &webhook.conversion());
        if let Some(definitions) = &definitions {
            definitions.install(&config.pki().join("ca.crt").display().to_string()).await?;
        }
        let elsewhere = format!(
            "this port serves /clusters/<cluster>/… and /cellway/v1/… only: the hub's objects are in the Kubernetes API \
             at {server}"
        );
        let served = Served {
            members: Router::new(),
            pages: Router::new(),
            delegated: Delegated::new(client.clone()),
            elsewhere: elsewhere.into(),
        };
        Ok(Self {
            client,
            server,
            listener,
            address,
            certificates,
            webhook,
            definitions,
            served,
            metrics: ServerMetrics::default(),
            answers: Arc::new(AtomicBool::new(true)),
        })
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    pub(super) fn server(&self) -> &str {
        &self.server
    }

    pub(super) fn local_addr(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn webhook_addr(&self) -> SocketAddr {
        self.webhook.local_addr()
    }

    pub(super) fn certificates(&self) -> &Certificates {
        &self.certificates
    }

    pub(super) fn conversion(&self) -> Conversion {
        self.webhook.conversion()
    }

    /// Says in the probes whether the API answers.
    pub(super) fn check(&self, readiness: &Readiness) {
        let answers = self.answers.clone();
        readiness.check("kubernetes-api", move || match answers.load(Ordering::Relaxed) {
            true => Ok(()),
            false => Err("it does not answer".to_owned()),
        });
    }

    /// The routers of `/clusters/…` and `/cellway/v1/…`, and what is counted.
    pub(super) fn mount(&mut self, members: Router, pages: Router, metrics: ServerMetrics) {
        self.served.members = members;
        self.served.pages = pages;
        self.metrics = metrics;
    }

    /// Shows at each scrape when the certificates of its two ports end.
    pub(super) fn show_certificates(&self, registry: &SharedRegistry, metrics: ServerMetrics) {
        let (port, webhook) = (self.certificates.tls().clone(), self.webhook.tls().clone());
        registry.before_scrape(move || {
            let ends = port.ends();
            // As our own API server calls them; the hub's authority comes first.
            let authorities = ["ca", "client-ca"].into_iter().zip(ends.client_cas.into_iter().map(Some));
            for (certificate, end) in
                [("serving", ends.served), ("own", ends.named)].into_iter().chain(authorities)
            {
                metrics.show_certificate(certificate, end);
            }
            metrics.show_certificate("webhook", webhook.ends().served);
        });
    }

    /// Serves until it is to stop, and lets requests end.
    ///
    /// # Errors
    /// When a part that it cannot do without ends by itself.
    pub(super) async fn run(self, stop: CancellationToken) -> Result<(), Ended> {
        let Self { client, listener, certificates, webhook, definitions, served, metrics, answers, .. } =
            self;
        let (signal, drain) = service::drain::channel();
        let router = Router::new().fallback(answer).with_state(served);
        let router_for = move |certificate: Option<&CertificateDer<'static>>| {
            let user = certificate.and_then(|certificate| User::of_certificate(certificate).ok());
            router.clone().layer(axum::Extension(Certified(user)))
        };
        let mut serving = JoinSet::new();
        let tls = certificates.tls().clone();
        let limits = Limits::default();
        serving.spawn(
            https::serve(listener, tls, "api", router_for, limits, metrics.clone(), drain.clone())
                .in_current_span(),
        );
        let registration = webhook.registration().clone();
        serving.spawn(webhook.run(metrics, drain).instrument(tracing::info_span!("webhook")));
        let mut background = Background::default();
        let work = async move { match certificates.keep().await {} };
        background.spawn("certificates", work.instrument(tracing::info_span!("certificates")));
        if let Some(definitions) = definitions {
            let keeping = async move { definitions.keep(&registration).await };
            background.spawn("definitions", keeping.instrument(tracing::info_span!("definitions")));
        }
        background.spawn("look at the Kubernetes API", look(client, answers).in_current_span());

        let outcome = tokio::select! {
            biased;
            () = stop.cancelled() => Ok(()),
            ended = background.failed() => Err(ended),
            Some(ended) = serving.join_next() => Err(Ended::of("API port or webhook", ended)),
        };
        signal.start();
        let ended = async { while serving.join_next().await.is_some() {} };
        if tokio::time::timeout(GRACE, ended).await.is_err() {
            tracing::debug!("requests at the API port were cut");
        }
        serving.shutdown().await;
        background.abort().await;
        outcome
    }
}

/// A client for the current context, the API's URL, and the entries that lead others there.
async fn open(path: &Path) -> Result<(Client, String, ObjectsAt), ExternalError> {
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| ExternalError::Kubeconfig {
        path: path.to_owned(),
        source,
    };
    // Files that it names relative to itself are absolute from here on; they are joined to the path as it is given.
    let path = std::path::absolute(path).map_err(|error| failed(error.into()))?;
    let kubeconfig = Kubeconfig::read_from(&path).map_err(|error| failed(error.into()))?;
    let objects = objects_at(&kubeconfig).map_err(|error| failed(error.into()))?;
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .map_err(|error| failed(error.into()))?;
    let server = config.cluster_url.to_string().trim_end_matches('/').to_owned();
    let client = Client::try_from(config).map_err(|error| failed(error.into()))?;
    Ok((client, server, objects))
}

/// What the current context is made of.
fn objects_at(kubeconfig: &Kubeconfig) -> Result<ObjectsAt, KubeconfigError> {
    let current = kubeconfig.current_context.as_ref().ok_or(KubeconfigError::CurrentContextNotSet)?;
    let context = kubeconfig.contexts.iter().find(|entry| entry.name == *current);
    let context = context
        .and_then(|entry| entry.context.as_ref())
        .ok_or_else(|| KubeconfigError::LoadContext(current.clone()))?;
    let cluster = kubeconfig.clusters.iter().find(|entry| entry.name == context.cluster);
    let cluster = cluster
        .and_then(|entry| entry.cluster.as_ref())
        .ok_or_else(|| KubeconfigError::LoadClusterOfContext(context.cluster.clone()))?;
    let user = kubeconfig.auth_infos.iter().find(|entry| Some(&entry.name) == context.user.as_ref());
    let user = user.and_then(|entry| entry.auth_info.clone()).unwrap_or_default();
    // Both were read from what they are written as.
    Ok(ObjectsAt {
        cluster: serde_json::to_value(cluster).unwrap_or_default(),
        user: serde_json::to_value(user).unwrap_or_default(),
    })
}

/// Looks whether the API answers, for ever.
async fn look(client: Client, answers: Arc<AtomicBool>) {
    let mut tick = tokio::time::interval(LOOK_INTERVAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let asked = tokio::time::timeout(LOOK_INTERVAL, client.apiserver_version()).await;
        // A refusal is an answer; a load balancer's word that nobody is behind it is none.
        let now = match asked {
            Ok(Ok(_)) => true,
            Ok(Err(kube::Error::Api(status))) => status.code < 500,
            Ok(Err(_)) | Err(_) => false,
        };
        if answers.swap(now, Ordering::Relaxed) != now {
            match now {
                true => tracing::info!("the Kubernetes API answers again"),
                false => tracing::warn!("the Kubernetes API that holds the hub's objects does not answer"),
            }
        }
    }
}

// === what the port serves ===

async fn answer(State(served): State<Served>, mut request: Request<Body>) -> Response<Body> {
    let certified = request.extensions_mut().remove::<Certified>().and_then(|Certified(user)| user);
    let path = request.uri().path().to_owned();
    let admitted = served.delegated.admit(certified, request.method(), &path, request.headers());
    let under =
        |prefix: &str| path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    let router = match () {
        () if under("/clusters") => Some(&served.members),
        () if under("/cellway/v1") => Some(&served.pages),
        () => None,
    };
    let user = match admitted.await {
        Ok(user) => user,
        Err(refusal) => {
            let (code, reason) = refusal.status();
            return status::response(code, reason, &refusal.to_string());
        }
    };
    let Some(router) = router.cloned() else {
        return status::response(StatusCode::NOT_FOUND, "NotFound", &served.elsewhere);
    };
    request.headers_mut().remove(http::header::AUTHORIZATION);
    let user = if under("/clusters") { super::api::in_members(user) } else { user };
    request.extensions_mut().insert(user);
    request.extensions_mut().insert(Authorised);
    match router.oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}
