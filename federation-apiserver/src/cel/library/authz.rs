//! `authorizer`: what a user may do, asked step by step. Conditions and policies of admission have it as a variable.
//!
//! Source: Kubernetes, "Common Expression Language in Kubernetes", authorizer library. Selectors
//! of a check change nothing, as with RBAC in a kube-apiserver.

use std::sync::Arc;

use super::super::functions;
use super::super::value::Value;
use super::{Answer, Fault, Implementation};
use crate::auth::UserInfo;
use crate::rbac::{Attributes, Decision, Index, ResourceAttributes};
use crate::registry::selectors::LabelSelector;

/// A question on its way, or its answer.
#[derive(Clone, Debug)]
pub(crate) enum Authz<'a> {
    Authorizer(Asker<'a>),
    Path(Asker<'a>, String),
    Group(Asker<'a>, String),
    Resource(Asker<'a>, ResourceAttributes),
    Decision(Decision),
}

/// Who is asked, and about whom.
#[derive(Clone, Debug)]
pub(crate) struct Asker<'a> {
    index: &'a Index,
    user: Arc<UserInfo>,
}

// === impl Asker ===

impl<'a> Asker<'a> {
    pub(crate) fn new(index: &'a Index, user: &UserInfo) -> Self {
        Self { index, user: Arc::new(user.clone()) }
    }

    fn decide(&self, verb: &str, resource: Option<ResourceAttributes>, path: &str) -> Value<'a> {
        let attributes = Attributes { verb: verb.to_owned(), resource, path: path.to_owned() };
        let decision = self.index.review(&self.user, &attributes, &LabelSelector::default());
        Authz::Decision(decision).into_value()
    }
}

// === impl Authz ===

impl<'a> Authz<'a> {
    pub(crate) fn into_value(self) -> Value<'a> {
        Value::Authz(Arc::new(self))
    }

    /// Name of the type.
    pub(crate) fn type_name(&self) -> &'static str {
        match self {
            Self::Authorizer(_) => functions::AUTHORIZER,
            Self::Path(..) => functions::PATH_CHECK,
            Self::Group(..) => functions::GROUP_CHECK,
            Self::Resource(..) => functions::RESOURCE_CHECK,
            Self::Decision(_) => functions::DECISION,
        }
    }
}

pub(super) fn implementation(name: &str) -> Option<Implementation> {
    Some(match name {
        "path" => |a| match parts(a)? {
            (Authz::Authorizer(asker), path) => Ok(Authz::Path(asker.clone(), path.to_owned()).into_value()),
            _ => Err(Fault::NoOverload),
        },
        "group" => |a| match parts(a)? {
            (Authz::Authorizer(asker), group) => {
                Ok(Authz::Group(asker.clone(), group.to_owned()).into_value())
            }
            _ => Err(Fault::NoOverload),
        },
        "serviceAccount" => |a| match a {
            [Value::Authz(authz), Value::Str(namespace), Value::Str(name)] => match &**authz {
                Authz::Authorizer(asker) => {
                    let user = crate::auth::service_accounts::user(namespace, name, "");
                    Ok(Authz::Authorizer(Asker { user: Arc::new(user), ..asker.clone() }).into_value())
                }
                _ => Err(Fault::NoOverload),
            },
            _ => Err(Fault::NoOverload),
        },
        "resource" => |a| match parts(a)? {
            (Authz::Group(asker, group), resource) => {
                let resource = ResourceAttributes {
                    group: group.clone(),
                    version: "*".to_owned(),
                    resource: resource.to_owned(),
                    ..ResourceAttributes::default()
                };
                Ok(Authz::Resource(asker.clone(), resource).into_value())
            }
            _ => Err(Fault::NoOverload),
        },
        "subresource" => |a| refined(a, |resource, text| resource.subresource = text),
        "namespace" => |a| refined(a, |resource, text| resource.namespace = text),
        "name" => |a| refined(a, |resource, text| resource.name = text),
        "fieldSelector" | "labelSelector" => |a| refined(a, |_, _| {}),
        "check" => |a| match parts(a)? {
            (Authz::Path(asker, path), verb) => Ok(asker.decide(verb, None, path)),
            (Authz::Resource(asker, resource), verb) => Ok(asker.decide(verb, Some(resource.clone()), "")),
            _ => Err(Fault::NoOverload),
        },
        "allowed" => |a| decided(a, |decision| Value::Bool(decision.allowed)),
        "reason" => |a| decided(a, |decision| Value::string(decision.reason.as_str())),
        // Roles are looked up in memory: that does not fail.
        "errored" => |a| decided(a, |_| Value::Bool(false)),
        "error" => |a| decided(a, |_| Value::string("")),
        _ => return None,
    })
}

/// A step with its argument.
fn parts<'b, 'a>(a: &'b [Value<'a>]) -> Result<(&'b Authz<'a>, &'b str), Fault> {
    match a {
        [Value::Authz(authz), Value::Str(text)] => Ok((authz, text)),
        _ => Err(Fault::NoOverload),
    }
}

fn refined<'a>(a: &[Value<'a>], refine: fn(&mut ResourceAttributes, String)) -> Answer<'a> {
    match parts(a)? {
        (Authz::Resource(asker, resource), text) => {
            let mut resource = resource.clone();
            refine(&mut resource, text.to_owned());
            Ok(Authz::Resource(asker.clone(), resource).into_value())
        }
        _ => Err(Fault::NoOverload),
    }
}

fn decided<'a>(a: &[Value<'a>], of: for<'b> fn(&'b Decision) -> Value<'a>) -> Answer<'a> {
    match a {
        [Value::Authz(authz)] => match &**authz {
            Authz::Decision(decision) => Ok(of(decision)),
            _ => Err(Fault::NoOverload),
        },
        _ => Err(Fault::NoOverload),
    }
}
