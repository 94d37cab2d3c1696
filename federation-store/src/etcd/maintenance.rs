//! What monitors and clients ask about the server: Cluster, Maintenance and the gRPC health check.

use std::pin::Pin;
use std::sync::Arc;

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
        // The server serves as long as it runs; when it stops the stream ends with everything else.
        let status = self.0.serving().await;
        let now = futures::stream::iter([Ok(HealthCheckResponse { status: status.into() })]);
        let for_ever = futures::stream::pending();
        Ok(Response::new(now.chain(for_ever).boxed()))
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
