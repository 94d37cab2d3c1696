//! What goes wrong, in the codes and the words of etcd: clients decide by both.

use tonic::Status;

use crate::error::Error;

pub(crate) fn empty_key() -> Status {
    Status::invalid_argument("etcdserver: key is not provided")
}

pub(crate) fn key_not_found() -> Status {
    Status::invalid_argument("etcdserver: key not found")
}

pub(crate) fn value_provided() -> Status {
    Status::invalid_argument("etcdserver: value is provided")
}

pub(crate) fn lease_provided() -> Status {
    Status::invalid_argument("etcdserver: lease is provided")
}

pub(crate) fn too_many_ops() -> Status {
    Status::invalid_argument("etcdserver: too many operations in txn request")
}

pub(crate) fn duplicate_key() -> Status {
    Status::invalid_argument("etcdserver: duplicate key given in txn request")
}

pub(crate) fn invalid_sort_option() -> Status {
    Status::invalid_argument("etcdserver: invalid sort option")
}

pub(crate) fn request_too_large() -> Status {
    Status::invalid_argument("etcdserver: request is too large")
}

pub(crate) fn compacted() -> Status {
    Status::out_of_range("etcdserver: mvcc: required revision has been compacted")
}

pub(crate) fn future_revision() -> Status {
    Status::out_of_range("etcdserver: mvcc: required revision is a future revision")
}

pub(crate) fn lease_not_found() -> Status {
    Status::not_found("etcdserver: requested lease not found")
}

pub(crate) fn lease_exists() -> Status {
    Status::failed_precondition("etcdserver: lease already exists")
}

pub(crate) fn lease_ttl_too_large() -> Status {
    Status::out_of_range("etcdserver: too large lease TTL")
}

pub(crate) fn no_space() -> Status {
    Status::resource_exhausted("etcdserver: mvcc: database space exceeded")
}

pub(crate) fn stopped() -> Status {
    Status::unavailable("etcdserver: server stopped")
}

pub(crate) fn timed_out() -> Status {
    Status::unavailable("etcdserver: request timed out")
}

/// What etcd says when it does not know whether a write came through.
pub(crate) fn unknown_outcome() -> Status {
    Status::unavailable("etcdserver: request timed out, possibly due to connection lost")
}

/// A response that this server would have to hold in memory, and will not.
pub(crate) fn response_too_large(limit: usize) -> Status {
    Status::resource_exhausted(format!(
        "the keys and values asked for are more than {} MiB together: ask for them in pages with a limit",
        limit >> 20
    ))
}

/// The answer to a client for an error of the store. What the database said stays in the log.
pub(crate) fn from_store(error: Error) -> Status {
    match &error {
        Error::Compacted { .. } => compacted(),
        Error::FutureRevision { .. } => future_revision(),
        Error::InvalidKey { length: 0 } => empty_key(),
        Error::ValueTooLarge { .. } => request_too_large(),
        Error::InvalidKey { .. } | Error::InvalidTransaction { .. } => {
            Status::invalid_argument(error.to_string())
        }
        Error::Closed => stopped(),
        Error::Database { .. } if error.is_full() => {
            tracing::error!(error = %service::error_chain(&error), "the database has no room left");
            no_space()
        }
        Error::WentBack { .. } | Error::Database { .. } => {
            tracing::warn!(error = %service::error_chain(&error), "a request failed");
            timed_out()
        }
        Error::Unresolved { .. } => {
            tracing::warn!(error = %service::error_chain(&error), "a write may or may not have come through");
            unknown_outcome()
        }
    }
}
