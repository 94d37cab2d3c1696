//! Cells and clusters of a hub, as its namespaces see them.

use std::sync::Arc;

use federation_core::api::{Cell, KubeFedCluster, Tenant};
use federation_core::names::FEDERATION_NAMESPACE;
use federation_core::tenancy::Tenancy;
use federation_core::topology::Topology;
use kube::Api;
use kube::api::ListParams;

use crate::error::Result;
use crate::hub::{Hub, explain};

/// What a hub has.
pub(crate) struct Fleet {
    pub(crate) cells: Vec<Cell>,
    pub(crate) clusters: Vec<KubeFedCluster>,
    /// `None`: this user may not see tenants.
    tenants: Option<Vec<Tenant>>,
}

/// What each namespace sees of it.
pub(crate) struct Seen {
    tenancy: Tenancy,
    by_namespace: bool,
}

// === impl Fleet ===

impl Fleet {
    /// Asks the hub for it.
    pub(crate) async fn read(hub: &Hub) -> Result<Self> {
        let client = || hub.client().clone();
        let all = ListParams::default();
        let cells: Api<Cell> = Api::all(client());
        let clusters: Api<KubeFedCluster> = Api::namespaced(client(), FEDERATION_NAMESPACE);
        let tenants: Api<Tenant> = Api::all(client());
        let tenants = match tenants.list(&all).await {
            Ok(tenants) => Some(tenants.items),
            Err(kube::Error::Api(status)) if status.code == 403 => None,
            Err(error) => return Err(explain("list the tenants")(error)),
        };
        Ok(Self {
            cells: cells.list(&all).await.map_err(explain("list the cells"))?.items,
            clusters: clusters.list(&all).await.map_err(explain("list the clusters"))?.items,
            tenants,
        })
    }

    /// What each namespace sees of it.
    pub(crate) fn seen(&self) -> Seen {
        let topology = Topology::new(&self.cells, &self.clusters);
        Seen {
            tenancy: Tenancy::new(self.tenants.iter().flatten(), topology),
            by_namespace: self.tenants.is_some(),
        }
    }
}

// === impl Seen ===

impl Seen {
    /// What a namespace sees. To whom the hub does not show tenants it shows their own cells and clusters only.
    pub(crate) fn by(&self, namespace: &str) -> Arc<Topology> {
        if self.by_namespace { self.tenancy.view(namespace) } else { Arc::clone(self.tenancy.whole()) }
    }
}
