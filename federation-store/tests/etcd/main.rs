//! The etcd v3 API from outside: through gRPC, `etcdctl` and a stock kube-apiserver, side by side with a real etcd where
//! there is one.
//!
//! `KUBEBUILDER_ASSETS` names a folder with `etcd` and `kube-apiserver`; `etcdctl` is taken from `ETCDCTL`, from the PATH,
//! or, as root, from Debian's package `etcd-client`. Each test says what it ran against; the facts of etcd that everything
//! else builds on are asserted in any case.

// The checks are in functions that the tests call.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::expect_used)]

mod differential;
mod etcdctl;
mod facts;
mod kube;
mod program;
mod support;
mod tls;
