//! Has kinds federated that policies speak of and that nobody has enabled or disabled, so that a policy is all that is to be
//! written. Which policy may have which kind enabled says [`may_enable`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use federation_core::api::{FederatedTypeConfig, Mode, PropagationPolicy, ResourceSelector};
use federation_core::names::{FEDERATION_NAMESPACE, POLICY_ANNOTATION};
use federation_core::policy::{group, may_enable};
use federation_core::types::FederatedType;
use kube::api::PostParams;
use kube::discovery::{self, Scope, verbs};
use kube::error::DiscoveryError;
use kube::{Api, ResourceExt as _};
use tokio::time::{sleep, timeout};
use tracing::info;

use crate::Shared;
use crate::member::chain;
use crate::pace::doubling;

/// First wait before a kind that the hub does not serve yet is looked for again: its definition may be applied with the policy.
const FIRST_LOOK: Duration = Duration::from_secs(1);
/// Longest such wait; each look is one request for each kind.
const LONGEST_LOOK: Duration = Duration::from_secs(30);

/// A kind: its group and its name. The version is the one that the hub prefers, whichever a policy names.
pub(super) type Kind = (String, String);

/// Kinds that are to be enabled, and for which policy (`namespace/name`).
pub(super) type Due = BTreeMap<Kind, String>;

/// Why a kind is not federated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Unfederated {
    /// It is being enabled, or tried to.
    Soon,
    /// The hub does not serve it.
    NotServed,
    /// As a person reads it.
    Because(String),
}

fn kind_of(selector: &ResourceSelector) -> Kind {
    (group(selector).to_owned(), selector.kind.clone())
}

/// The kinds that policies may have enabled and that no configuration speaks of: one that disables a kind lasts.
pub(super) fn due(
    policies: &BTreeMap<String, Arc<PropagationPolicy>>,
    configs: &[FederatedTypeConfig],
) -> Due {
    let mut due = Due::new();
    for (name, policy) in policies {
        let meant = policy.spec.resources.iter().filter(|selector| may_enable(policy, selector));
        for selector in meant.filter(|selector| config_of(configs, selector).is_none()) {
            due.entry(kind_of(selector)).or_insert_with(|| name.clone());
        }
    }
    due
}

/// Why a kind is not federated that no live type is of. `tried`: what became of those that were to be enabled.
pub(super) fn why(
    policy: &PropagationPolicy,
    selector: &ResourceSelector,
    configs: &[FederatedTypeConfig],
    tried: &BTreeMap<Kind, Unfederated>,
) -> Unfederated {
    let Some(config) = config_of(configs, selector) else {
        if may_enable(policy, selector) {
            return tried.get(&kind_of(selector)).cloned().unwrap_or(Unfederated::Soon);
        }
        return Unfederated::Because("cellway federate enable it".into());
    };
    if config.spec.propagation == Mode::Disabled {
        return Unfederated::Because("its FederatedTypeConfig is disabled".into());
    }
    let conditions = config.status.iter().flat_map(|status| &status.conditions);
    match conditions.into_iter().find(|one| one.type_ == "Ready" && one.status == "False") {
        Some(wrong) => Unfederated::Because(wrong.message.clone()),
        None => Unfederated::Soon,
    }
}

fn config_of<'a>(
    configs: &'a [FederatedTypeConfig],
    selector: &ResourceSelector,
) -> Option<&'a FederatedTypeConfig> {
    let targets = configs.iter().map(|config| (config, &config.spec.target_type));
    let mut found =
        targets.filter(|(_, target)| target.group == group(selector) && target.kind == selector.kind);
    found.next().map(|(config, _)| config)
}

/// Enables kinds, those that the hub does not serve yet once it does.
pub(super) async fn enable(shared: Arc<Shared>, due: Due) {
    let mut looks = 0;
    loop {
        let mut left = BTreeMap::new();
        for (kind, policy) in &due {
            let limit = shared.options.request_timeout;
            let done = timeout(limit, enable_one(&shared, kind, policy)).await;
            let done = done.unwrap_or_else(|_| Err(Unfederated::Because("the hub did not answer".into())));
            if let Err(why) = done {
                left.insert(kind.clone(), why);
            }
        }
        let all = left.is_empty();
        shared.policies.unfederated(left);
        if all {
            return;
        }
        looks += 1;
        sleep(doubling(FIRST_LOOK, LONGEST_LOOK, looks, rand::random())).await;
    }
}

async fn enable_one(shared: &Shared, kind: &Kind, policy: &str) -> Result<(), Unfederated> {
    let (group, kind) = kind;
    let because = |error: &dyn std::fmt::Display| Unfederated::Because(error.to_string());
    let found = match discovery::group(&shared.hub, group).await {
        Ok(found) => found.recommended_kind(kind),
        Err(kube::Error::Api(status)) if status.code == 404 => None,
        Err(kube::Error::Discovery(DiscoveryError::MissingApiGroup(_))) => None,
        Err(error) => return Err(because(&chain(&error))),
    };
    let Some((resource, capabilities)) = found else { return Err(Unfederated::NotServed) };
    if ![verbs::LIST, verbs::WATCH].iter().all(|verb| capabilities.supports_operation(verb)) {
        return Err(because(&"the hub API cannot list and watch it"));
    }
    let namespaced = capabilities.scope == Scope::Namespaced;
    let of = FederatedType::of(group, &resource.version, kind, &resource.plural, namespaced);
    FederatedType::from_config(&of.to_config()).map_err(|error| because(&error))?;
    let other = shared.types.live().into_iter().find(|(_, other)| other.crd_name() == of.crd_name());
    if let Some((_, other)) = other {
        let (name, group) = (of.crd_name(), &other.target.group);
        let why =
            format!("{name} is {kind} of {group:?}; make a FederatedTypeConfig with another name for it");
        return Err(Unfederated::Because(why));
    }
    let mut config = of.to_config();
    config.metadata.annotations = Some([(POLICY_ANNOTATION.to_owned(), policy.to_owned())].into());
    let api: Api<FederatedTypeConfig> = Api::namespaced(shared.hub.clone(), FEDERATION_NAMESPACE);
    match api.create(&PostParams::default(), &config).await {
        Ok(_) => {
            info!(kind = of.target.kind, policy, "the type is enabled: a policy speaks of it");
            Ok(())
        }
        Err(kube::Error::Api(status)) if status.code == 409 => {
            Err(because(&format_args!("a FederatedTypeConfig {} speaks of another kind", config.name_any())))
        }
        Err(error) => Err(because(&chain(&error))),
    }
}
