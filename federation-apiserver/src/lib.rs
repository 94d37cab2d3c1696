//! The hub API: a Kubernetes API server over federation-store.
