//! Stock kube-apiservers with one etcd, their nodes and pods simulated by us: the hub with our definitions, the conversion
//! webhook that ours serve, and the controller's rights as documented; members with the agent's.

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use federation_apiserver::simulation::{self, SimulationConfig};
use federation_core::api::Conversion;
use federation_core::review::{self, ReviewLimits};
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DynamicObject, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind, TypeMeta};
use kube::{Api, Client, ResourceExt as _};
use serde_json::Value;
use test_support::TestDir;
use test_support::stock::{Credentials, Etcd, KubeApiserver};
use tls::{CertificateAuthority, ClientAuth, ServerTls};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::simulated::Remote;
use crate::world::{MEMBERS, Member, Servers, client, until};

const DAY: Duration = Duration::from_secs(86_400);
/// What the documentation tells people to apply: at the hub, and under this heading in members, for this account.
const HUB: &str = include_str!("../../../docs/stock-hub.yaml");
const OPERATIONS: &str = include_str!("../../../docs/operations.md");
const MEMBER_HEADING: &str = "### Rights\n";
const AGENT: &str = "system:serviceaccount:cellway-system:cellway-agent";

/// What has to live as long as the servers, in the order in which it ends.
struct Kept {
    _conversion: AbortOnDropHandle<()>,
    _simulations: Vec<simulation::Simulation>,
    _servers: Vec<KubeApiserver>,
    _etcd: Arc<Etcd>,
    _dir: TestDir,
}

/// Starts them with these flags beside the usual ones.
pub(crate) async fn start(assets: &Path, flags: &[&str]) -> Servers {
    let dir = TestDir::new("stock").expect("a folder");
    let authority = CertificateAuthority::create("stock").expect("an authority");
    let etcd = Arc::new(Etcd::start(assets, &dir.join("etcd")).await.expect("etcd"));
    let mut servers = Vec::new();
    for name in ["hub", MEMBERS[0].0, MEMBERS[1].0] {
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let issued = authority.issue_server(&names, DAY).expect("a certificate");
        let credentials = Credentials {
            authority: authority.certificate_pem(),
            certificate: &issued.certificate_pem,
            key: &issued.key_pem,
        };
        let folder = dir.join(name);
        let server = KubeApiserver::start_with(assets, &folder, name, &etcd, &credentials, flags).await;
        servers.push(server.expect("kube-apiserver"));
    }
    let kubeconfig = |server: &KubeApiserver, user: &str, groups: &[&str]| {
        let groups: Vec<String> = groups.iter().map(|group| (*group).to_owned()).collect();
        let issued = authority.issue_client(user, &groups, DAY).expect("a certificate");
        server.kubeconfig(user, &issued.certificate_pem, &issued.key_pem).expect("a kubeconfig")
    };

    let (conversion, serving) = serve_conversion(&authority).await;
    let hub = kubeconfig(&servers[0], "admin", &["system:masters"]);
    let admin = client(&hub).await;
    ready(&admin).await;
    for crd in federation_core::crds(&conversion) {
        let mut crd = serde_json::to_value(crd).expect("crd");
        federation_core::render::strip_nulls(&mut crd);
        apply(&admin, &crd).await;
    }
    apply_all(&admin, HUB).await;
    let namespaces: Api<Namespace> = Api::all(admin.clone());
    let mut shop = Namespace::default();
    shop.metadata.name = Some("shop".into());
    namespaces.create(&PostParams::default(), &shop).await.expect("namespace");
    established(&admin).await;

    let rights = OPERATIONS.split_once(MEMBER_HEADING).expect("the heading").1;
    let rights =
        rights.split_once("```yaml\n").and_then(|(_, text)| text.split_once("\n```")).expect("a block").0;
    let mut members = Vec::new();
    let mut simulations = Vec::new();
    for ((name, zones), server) in MEMBERS.into_iter().zip(&servers[1..]) {
        let admin = client(&kubeconfig(server, "admin", &["system:masters"])).await;
        ready(&admin).await;
        apply_all(&admin, rights).await;
        simulations.push(simulation::start(
            Arc::new(Remote::new(admin.clone())),
            SimulationConfig::zones(name, zones, 1),
        ));
        let gateway =
            client(&kubeconfig(server, AGENT, &["system:serviceaccounts", "system:authenticated"])).await;
        members.push(Member { name, admin, gateway });
    }
    Servers {
        kubeconfig: hub,
        members,
        conversion,
        ours: false,
        etcd: Some(Arc::clone(&etcd)),
        stop: CancellationToken::new(),
        tasks: Vec::new(),
        kept: Box::new(Kept {
            _conversion: serving,
            _simulations: simulations,
            _servers: servers,
            _etcd: etcd,
            _dir: dir,
        }),
    }
}

async fn ready(client: &Client) {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    // It is made after the first readiness.
    until("the stock server is ready", async || namespaces.get("default").await.ok()).await;
}

async fn established(client: &Client) {
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    until("the definitions are served", async || {
        let all = crds.list(&Default::default()).await.ok()?;
        let served = |crd: &CustomResourceDefinition| {
            let conditions = crd.status.iter().flat_map(|status| status.conditions.iter().flatten());
            conditions
                .into_iter()
                .any(|condition| condition.type_ == "Established" && condition.status == "True")
        };
        all.items.iter().all(served).then_some(())
    })
    .await;
}

async fn apply_all(client: &Client, documents: &str) {
    for document in documents.split("---\n").filter(|text| text.contains("kind:")) {
        let object: Value = serde_yaml_ng::from_str(document).expect("YAML");
        apply(client, &object).await;
    }
}

async fn apply(client: &Client, object: &Value) {
    let types: TypeMeta = serde_json::from_value(object.clone()).expect("a type");
    let resource = ApiResource::from_gvk(&GroupVersionKind::try_from(types).expect("a kind"));
    let parsed: DynamicObject = serde_json::from_value(object.clone()).expect("an object");
    let api: Api<DynamicObject> = match parsed.namespace() {
        Some(namespace) => Api::namespaced_with(client.clone(), &namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    };
    let params = PatchParams::apply("admin").force();
    // A namespace that was made a moment ago may not be known to admission yet.
    until(&format!("{} is applied", parsed.name_any()), async || {
        match api.patch(&parsed.name_any(), &params, &Patch::Apply(object)).await {
            Ok(_) => Some(()),
            Err(error) => {
                *crate::world::LAST.lock() = error.to_string();
                None
            }
        }
    })
    .await;
}

/// What the hub's own program serves at this path, over TLS.
async fn serve_conversion(authority: &CertificateAuthority) -> (Conversion, AbortOnDropHandle<()>) {
    let issued = authority.issue_server(&["127.0.0.1".to_owned()], DAY).expect("a certificate");
    let tls =
        ServerTls::from_pem(&issued.certificate_pem, &issued.key_pem, None, ClientAuth::None).expect("TLS");
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
    let url = format!("https://{}/cellway/v1/convert", listener.local_addr().expect("an address"));
    let serving = AbortOnDropHandle::new(tokio::spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((tcp, _)) = listener.accept().await {
            let acceptor = tls.acceptor(&[b"http/1.1"]);
            connections.spawn(async move {
                let Ok(stream) = acceptor.accept(tcp).await else { return };
                let service = hyper::service::service_fn(convert);
                // The client going away is how connections end here.
                let _ = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    }));
    (Conversion::Webhook { url, ca_bundle: authority.certificate_pem().to_owned() }, serving)
}

async fn convert(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let body = request.into_body().collect().await.expect("a whole review").to_bytes();
    let limits = ReviewLimits { object: 64 << 20, answer: 64 << 20 };
    Ok(Response::new(Full::new(review::answer(&body, limits).expect("a review").into())))
}
