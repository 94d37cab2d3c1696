//! What monitors and clients ask about the server: Cluster, Maintenance and the gRPC health check.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use proto::etcd::etcdserverpb::{
    AlarmRequest, AlarmResponse, Member, MemberListRequest, MemberListResponse, StatusRequest,
    StatusResponse, alarm_request::AlarmAction, cluster_server, maintenance_server,
};
use proto::health::v1::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus, health_server,
};
use tonic::{Request, Response, Status};

use super::convert::{MEMBER_ID, TERM, count};
use super::{API_VERSION, Shared, errors};

/// How often the database is asked on behalf of who watches the health.
const HEALTH_INTERVAL: Duration = Duration::from_secs(1);

/// The Cluster service: this server is all of it.
pub(crate) struct Cluster(pub(crate) Arc<Shared>);

/// The Maintenance service.
pub(crate) struct Maintenance(pub(crate) Arc<Shared>);

/// The gRPC health check.
pub(crate) struct Health(pub(crate) Arc<Shared>);

#[tonic::async_trait]
impl cluster_server::Cluster for Cluster {
    async fn member_list(
        &self,
        _: Request<MemberListRequest>,
    ) -> Result<Response<MemberListResponse>, Status> {
        let identity = &self.0.identity;
        let member = Member {
            id: MEMBER_ID,
            name: identity.name.clone(),
            // There are no peers; who shows the list shows the same address twice.
            peer_ur_ls: identity.client_urls.clone(),
            client_ur_ls: identity.client_urls.clone(),
            is_learner: false,
        };
        let header = Some(identity.header(self.0.store.revision()));
        Ok(Response::new(MemberListResponse { header, members: vec![member] }))
    }
}

#[tonic::async_trait]
impl maintenance_server::Maintenance for Maintenance {
    async fn alarm(&self, request: Request<AlarmRequest>) -> Result<Response<AlarmResponse>, Status> {
        if request.into_inner().action == i32::from(AlarmAction::Activate) {
            return Err(Status::unimplemented(
                "this server raises no alarms: watch its metrics and its database's",
            ));
        }
        let header = Some(self.0.identity.header(self.0.store.revision()));
        Ok(Response::new(AlarmResponse { header, alarms: Vec::new() }))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let store = &self.0.store;
        let size = count(store.size().await.map_err(errors::from_store)?);
        let revision = store.revision();
        Ok(Response::new(StatusResponse {
            header: Some(self.0.identity.header(revision)),
            version: API_VERSION.to_owned(),
            db_size: size,
            leader: MEMBER_ID,
            raft_index: revision.0,
            raft_term: TERM,
            raft_applied_index: revision.0,
            errors: Vec::new(),
            db_size_in_use: size,
            is_learner: false,
        }))
    }
}

#[tonic::async_trait]
impl health_server::Health for Health {
    async fn check(&self, _: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        let status = self.0.serving().await;
        Ok(Response::new(HealthCheckResponse { status: status.into() }))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn watch(&self, _: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let shared = Arc::clone(&self.0);
        let changes = futures::stream::unfold((shared, None), |(shared, told)| async move {
            loop {
                let status = shared.serving().await;
                if told != Some(status) {
                    let response = HealthCheckResponse { status: status.into() };
                    return Some((Ok(response), (shared, Some(status))));
                }
                tokio::time::sleep(HEALTH_INTERVAL).await;
            }
        });
        Ok(Response::new(changes.boxed()))
    }
}

// === impl Shared ===

impl Shared {
    /// Whether the database answers.
    pub(crate) async fn serving(&self) -> ServingStatus {
        match self.store.get(b"health", None).await {
            Ok(_) => ServingStatus::Serving,
            Err(_) => ServingStatus::NotServing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{EtcdConfig, EtcdServer};
    use super::*;
    use crate::store::{Store, StoreConfig};

    #[tokio::test]
    async fn whoever_watches_the_health_hears_of_changes() {
        let store = Store::open(StoreConfig::in_memory()).await.unwrap();
        let server = EtcdServer::new(store.clone(), EtcdConfig::default());
        let request = Request::new(HealthCheckRequest::default());
        let mut told =
            health_server::Health::watch(&Health(server.shared.clone()), request).await.unwrap().into_inner();
        assert_eq!(told.next().await.unwrap().unwrap().status(), ServingStatus::Serving);
        store.close().await;
        assert_eq!(told.next().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    }
}
