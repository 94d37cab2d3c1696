//! The KV service.

use std::sync::Arc;

use proto::etcd::etcdserverpb::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse,
    RangeRequest, RangeResponse, ResponseHeader, TxnRequest, TxnResponse, kv_server,
};
use tonic::{Request, Response, Status};

use super::convert::requested;
use super::{Shared, check, errors, view};

/// See the module.
pub(crate) struct Kv(pub(crate) Arc<Shared>);

// === impl Kv ===

impl Kv {
    /// The inner calls know the revision, this knows who answers.
    fn header(&self, header: &mut Option<ResponseHeader>) {
        let identity = self.0.identity.header(Default::default());
        if let Some(header) = header {
            *header = ResponseHeader { revision: header.revision, ..identity };
        }
    }

    fn fits(&self, request: &impl prost::Message) -> Result<(), Status> {
        if request.encoded_len() > self.0.config.max_request_bytes {
            return Err(errors::request_too_large());
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl kv_server::Kv for Kv {
    async fn range(&self, request: Request<RangeRequest>) -> Result<Response<RangeResponse>, Status> {
        let request = request.into_inner();
        check::range(&request)?;
        let mut response = view::range(&self.0.store, &request).await?;
        self.header(&mut response.header);
        Ok(Response::new(response))
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        let request = request.into_inner();
        check::put(&request)?;
        self.fits(&request)?;
        let mut response = self.0.transactions.put(&self.0.store, request).await?;
        self.header(&mut response.header);
        Ok(Response::new(response))
    }

    async fn delete_range(
        &self,
        request: Request<DeleteRangeRequest>,
    ) -> Result<Response<DeleteRangeResponse>, Status> {
        let request = request.into_inner();
        check::delete_range(&request)?;
        let mut response = self.0.transactions.delete_range(&self.0.store, request).await?;
        self.header(&mut response.header);
        Ok(Response::new(response))
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        let request = request.into_inner();
        check::txn(&request, self.0.config.max_txn_ops)?;
        self.fits(&request)?;
        let mut response = self.0.transactions.txn(&self.0.store, &request).await?;
        self.header(&mut response.header);
        Ok(Response::new(response))
    }

    async fn compact(
        &self,
        request: Request<CompactionRequest>,
    ) -> Result<Response<CompactionResponse>, Status> {
        let request = request.into_inner();
        let store = &self.0.store;
        let revision = requested(request.revision).ok_or_else(errors::compacted)?;
        store.compact(revision).await.map_err(errors::from_store)?;
        if request.physical {
            store.swept(revision).await.map_err(errors::from_store)?;
        }
        let header = Some(self.0.identity.header(store.revision()));
        Ok(Response::new(CompactionResponse { header }))
    }
}
