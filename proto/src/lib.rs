//! The wire contracts of cellway: messages, no logic. `cargo xtask generate` writes `generated/` from `proto/*.proto`.

/// `cellway.tunnel.v1`: the control protocol of a tunnel.
pub mod tunnel {
    #[allow(clippy::all, clippy::pedantic, unreachable_pub, missing_docs)]
    pub mod v1 {
        include!("generated/cellway.tunnel.v1.rs");
    }
}

/// Kubernetes' KMS plug-in protocol.
pub mod kms {
    #[allow(clippy::all, clippy::pedantic, unreachable_pub, missing_docs)]
    pub mod v2 {
        include!("generated/v2.rs");
    }
}

/// `cellway.storage.v1`: stored forms.
pub mod storage {
    #[allow(clippy::all, clippy::pedantic, unreachable_pub, missing_docs)]
    pub mod v1 {
        include!("generated/cellway.storage.v1.rs");
    }
}

/// etcd's v3 API as far as federation-store serves it, with servers and clients.
#[cfg(feature = "etcd")]
pub mod etcd {
    /// `mvccpb`: keys and events.
    #[allow(clippy::all, clippy::pedantic, unreachable_pub, missing_docs)]
    pub mod mvccpb {
        include!("generated/mvccpb.rs");
    }

    /// `etcdserverpb`: requests, responses and services.
    #[allow(clippy::all, clippy::pedantic, unreachable_pub, missing_docs)]
    pub mod etcdserverpb {
        include!("generated/etcdserverpb.rs");
    }
}

/// `grpc.health.v1`: the gRPC health check.
#[cfg(feature = "etcd")]
pub mod health {
    #[allow(clippy::all, clippy::pedantic, unreachable_pub, missing_docs)]
    pub mod v1 {
        include!("generated/grpc.health.v1.rs");
    }
}
