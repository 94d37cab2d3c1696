//! Admission: what is asked of webhooks between decoding a request and storing its outcome.
//!
//! ```text
//!  decode, defaults, managedFields ─▶ mutating webhooks, one after the other ─▶ defaults, pruning again
//!       ─▶ validation ─▶ validating webhooks, all at once ─▶ store
//! ```
//!
//! The order, the requests and the words of refusals are kube-apiserver's (`k8s.io/apiserver/pkg/admission/plugin/webhook`).
//! Writes of the server itself (controllers in this process, which act for no user) are not asked about, and neither are
//! the configurations of admission: a wrong one has to stay removable.

mod conditions;
mod dispatch;
mod hooks;
mod metrics;
mod notes;
pub(crate) mod review;
pub(crate) mod validation;

use serde_json::Value;

use crate::auth::UserInfo;
use crate::registry::resource::Resource;
pub(crate) use dispatch::Asked;
use hooks::Slot;
pub(crate) use metrics::Metrics;
pub(crate) use notes::{Annotation, Notes};

/// The API group of admission's own configuration.
pub(crate) const GROUP: &str = "admissionregistration.k8s.io";

/// What happens to the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Create,
    Update,
    Delete,
}

/// Which of the two kinds of webhooks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Phase {
    Mutating,
    Validating,
}

/// What a request is about, in the terms of admission.
#[derive(Clone, Debug)]
pub(crate) struct Request<'a> {
    pub(crate) resource: &'a Resource,
    /// Group, version and kind of the object that is sent: that of the resource, or of its subresource.
    pub(crate) kind: (String, String, String),
    pub(crate) subresource: &'a str,
    /// Of a namespace: its own name.
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) operation: Operation,
    pub(crate) dry_run: bool,
    /// `CreateOptions`, `UpdateOptions` or `DeleteOptions`.
    pub(crate) options: Value,
    pub(crate) user: &'a UserInfo,
    pub(crate) notes: &'a Notes,
}

/// Configurations as they are in force, compiled, and what is counted.
#[derive(Debug, Default)]
pub(crate) struct Admission {
    mutating: Slot,
    validating: Slot,
    pub(crate) metrics: Metrics,
}

// === impl Operation ===

impl Operation {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Create => "CREATE",
            Self::Update => "UPDATE",
            Self::Delete => "DELETE",
        }
    }
}

// === impl Phase ===

impl Phase {
    /// How metrics call it.
    fn label(self) -> &'static str {
        match self {
            Self::Mutating => "admit",
            Self::Validating => "validating",
        }
    }

    /// The resource of its configurations, and the prefix of their keys.
    fn resource(self) -> (&'static str, &'static str) {
        match self {
            Self::Mutating => (
                "mutatingwebhookconfigurations",
                "/registry/admissionregistration.k8s.io/mutatingwebhookconfigurations/",
            ),
            Self::Validating => (
                "validatingwebhookconfigurations",
                "/registry/admissionregistration.k8s.io/validatingwebhookconfigurations/",
            ),
        }
    }
}

// === impl Request ===

impl<'a> Request<'a> {
    /// A request for an object of a resource, or for one of its subresources that shows the whole object.
    pub(crate) fn new(
        resource: &'a Resource,
        (namespace, name): (&str, &str),
        subresource: &'a str,
        operation: Operation,
        user: &'a UserInfo,
        notes: &'a Notes,
    ) -> Self {
        let own = resource.group.is_empty() && resource.plural == "namespaces";
        Self {
            resource,
            kind: (resource.group.clone(), resource.version.clone(), resource.kind.clone()),
            subresource,
            namespace: if own { name } else { namespace }.to_owned(),
            name: name.to_owned(),
            operation,
            dry_run: false,
            options: Value::Null,
            user,
            notes,
        }
    }

    /// Is the object that is sent another than the resource's own?
    fn subresource_kind(&self) -> bool {
        self.kind.2 != self.resource.kind
    }

    /// Is the request in this version of its resource?
    fn is_in(&self, resource: &Resource) -> bool {
        (&self.resource.group, &self.resource.version) == (&resource.group, &resource.version)
    }

    fn is_namespace(&self) -> bool {
        self.resource.group.is_empty() && self.resource.plural == "namespaces"
    }

    /// Configurations of admission decide about everything but themselves.
    fn is_exempt(&self) -> bool {
        self.resource.group == GROUP
    }
}
