//! Our own API servers, in this process.

use federation_apiserver::simulation::SimulationConfig;
use federation_apiserver::{ApiServer, Config, Converter, Role};
use federation_core::api::Conversion;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::world::{MEMBERS, Member, Servers, client};

pub(crate) async fn start() -> Servers {
    let data = tempfile::tempdir().expect("directory");
    let stop = CancellationToken::new();
    let mut tasks = Vec::new();

    let mut config = Config::new(data.path().join("hub"), Role::Hub);
    config.in_memory = true;
    config.crds = federation_core::crds(&Conversion::InProcess)
        .into_iter()
        .map(|crd| serde_json::to_value(crd).expect("crd"))
        .collect();
    config.converter = Some(Converter::new(|object, version| {
        federation_core::conversion::convert(object, version).map_err(|error| error.to_string())
    }));
    config.bootstrap = ["shop", "kube-federation-system"]
        .map(|name| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}))
        .into();
    let kubeconfig = serve(config, &stop, &mut tasks).await;

    let mut members = Vec::new();
    for (name, zones) in MEMBERS {
        let folder = data.path().join(name);
        let mut config = Config::new(&folder, Role::Member);
        config.in_memory = true;
        config.simulation = SimulationConfig::zones(name, zones, 1);
        serve(config, &stop, &mut tasks).await;
        members.push(Member {
            name,
            admin: client(&folder.join("admin.kubeconfig")).await,
            gateway: client(&folder.join("agent.kubeconfig")).await,
        });
    }
    Servers {
        kubeconfig,
        members,
        conversion: Conversion::InProcess,
        ours: true,
        etcd: None,
        stop,
        tasks,
        kept: Box::new(data),
    }
}

async fn serve(
    config: Config,
    stop: &CancellationToken,
    tasks: &mut Vec<AbortOnDropHandle<()>>,
) -> std::path::PathBuf {
    let bound = ApiServer::bind(config).await.expect("bound");
    let kubeconfig = bound.admin_kubeconfig();
    let stop = stop.clone();
    tasks.push(AbortOnDropHandle::new(tokio::spawn(async move {
        bound.run(stop).await.expect("no part ends by itself")
    })));
    kubeconfig
}
