//! Role-based access control: who may do what, decided from roles and bindings as kube-apiserver's RBAC authorizer does.
//!
//! ```text
//!  store ──watch──▶ index (roles, bindings by subject) ──▶ authorise(attributes) ◀── http, reviews, escalation checks
//!                     ▲
//!  bootstrap: default roles and bindings, reconciled at start        aggregation: fills aggregated ClusterRoles
//! ```
//!
//! Rules only ever allow. The members of [`crate::auth::MASTERS`] are asked nothing, so that nobody can lock everybody
//! out. The index follows the store, so a change counts within milliseconds, in every replica.

pub mod aggregation;
pub mod bootstrap;
pub mod escalation;
pub mod index;
pub mod rules;
pub mod validation;

use crate::auth::{MASTERS, UserInfo};
use crate::registry::selectors::LabelSelector;
use crate::status::ApiError;

pub use index::Index;

/// The API group.
pub const GROUP: &str = "rbac.authorization.k8s.io";

/// What a request wants to do, in the terms of rules. Source: Kubernetes, "Authorization", request attributes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    pub verb: String,
    /// `None`: the path is no resource.
    pub resource: Option<ResourceAttributes>,
    /// The path, of non-resource requests only.
    pub path: String,
}

/// The resource part of [`Attributes`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResourceAttributes {
    pub group: String,
    pub version: String,
    pub resource: String,
    pub subresource: String,
    /// "" at the cluster scope and over all namespaces.
    pub namespace: String,
    /// "" for collections.
    pub name: String,
}

/// An answer of the authorizer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    pub allowed: bool,
    /// Which binding allows it, or what was wrong with bindings that might have.
    pub reason: String,
    /// Labels of the only objects that may be read; without any, all may.
    pub visible: Vec<(String, String)>,
}

// === impl Attributes ===

impl Attributes {
    /// A request for something that is no resource.
    pub fn of_path(verb: &str, path: &str) -> Self {
        Self { verb: verb.to_owned(), resource: None, path: path.to_owned() }
    }

    /// A request for a resource or object.
    pub fn of_resource(verb: &str, group: &str, resource: &str, namespace: &str, name: &str) -> Self {
        let resource = ResourceAttributes {
            group: group.to_owned(),
            resource: resource.to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            ..ResourceAttributes::default()
        };
        Self { verb: verb.to_owned(), resource: Some(resource), path: String::new() }
    }

    /// The refusal of this request, in kube-apiserver's words.
    pub fn forbidden(&self, user: &UserInfo, reason: &str) -> ApiError {
        let mut why = match &self.resource {
            None => format!("User {:?} cannot {} path {:?}", user.name, self.verb, self.path),
            Some(r) => {
                let what = r.combined();
                let place = match r.namespace.as_str() {
                    "" => "at the cluster scope".to_owned(),
                    namespace => format!("in the namespace {namespace:?}"),
                };
                format!(
                    "User {:?} cannot {} resource {what:?} in API group {:?} {place}",
                    user.name, self.verb, r.group
                )
            }
        };
        if !reason.is_empty() {
            why = format!("{why}: {reason}");
        }
        match &self.resource {
            None => ApiError::forbidden_path(format!("forbidden: {why}")),
            Some(r) => ApiError::forbidden(&r.group, &r.resource, &r.name, why),
        }
    }
}

// === impl ResourceAttributes ===

impl ResourceAttributes {
    /// `pods/log`, as rules name it.
    pub fn combined(&self) -> String {
        match self.subresource.as_str() {
            "" => self.resource.clone(),
            sub => format!("{}/{sub}", self.resource),
        }
    }
}

// === impl Decision ===

impl Decision {
    /// [`Self::visible`] as a label selector; "" for everything. Of several keys the first counts: never more is shown than
    /// each role by itself would show.
    pub fn selector(&self) -> String {
        let Some((key, _)) = self.visible.first() else { return String::new() };
        let values = self.visible.iter().filter(|(other, _)| other == key).map(|(_, value)| value.as_str());
        format!("{key} in ({})", values.collect::<Vec<_>>().join(","))
    }
}

// === impl Index ===

impl Index {
    /// May the user do it?
    pub fn authorise(&self, user: &UserInfo, attributes: &Attributes) -> Decision {
        if user.is_in(MASTERS) {
            return Decision { allowed: true, ..Decision::default() };
        }
        self.decide(user, attributes)
    }

    /// What is told about a user's rights to somebody who goes by it on their own: a right to see part of something is none to
    /// see it, unless they ask for no more than that part, by `labels`.
    pub(crate) fn review(
        &self,
        user: &UserInfo,
        attributes: &Attributes,
        labels: &LabelSelector,
    ) -> Decision {
        let decision = self.authorise(user, attributes);
        let selector = decision.selector();
        if selector.is_empty() || LabelSelector::parse(&selector).is_ok_and(|part| labels.is_within(&part)) {
            return decision;
        }
        let reason = format!("RBAC: allowed for what carries the labels {selector} only");
        Decision { allowed: false, reason, ..decision }
    }

    /// Refuses what the user may not do.
    pub fn check(&self, user: &UserInfo, attributes: &Attributes) -> Result<(), ApiError> {
        let decision = self.authorise(user, attributes);
        if decision.allowed { Ok(()) } else { Err(attributes.forbidden(user, &decision.reason)) }
    }
}
