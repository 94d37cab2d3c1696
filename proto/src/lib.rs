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
