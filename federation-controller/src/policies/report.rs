//! The statuses of policies: how many objects each federates, and what is wrong.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use federation_core::api::{Condition, PropagationPolicy, PropagationPolicyStatus};
use federation_core::policy::{complaints, full_name, speaks_of};
use federation_core::types::FederatedType;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;
use tokio::time::timeout;
use tracing::warn;

use super::kinds::{self, Unfederated};
use super::{MANAGER, Natives, Trouble};
use crate::Shared;
use crate::member::chain;

/// Statuses of policies are gathered for so long.
const GATHER: Duration = Duration::from_millis(500);
/// A policy whose objects are not all listed and gone through is told of after so many looks all the same.
const LOOKS: u32 = 20;
/// While they are being listed only after so many (five minutes, as long as a list may take), if its status speaks of the policy as
/// it is: after a restart nothing has changed by that, however long the hub takes to list.
const LISTING_LOOKS: u32 = 600;
/// Objects that a policy's condition names.
const NAMED: usize = 3;

/// How often in a row a policy was looked at and not told of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Waits {
    /// While not everything was listed.
    listing: u32,
    /// While everything was, and was gone through.
    busy: u32,
}

/// How far what a policy is told of is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    Partly,
    /// Everything is listed, and not everything has been gone through.
    Listed,
    Whole,
}

/// Writes the policies' statuses as they change.
pub(super) async fn report(shared: Arc<Shared>) {
    let mut waits = HashMap::new();
    loop {
        shared.policies.counted.notified().await;
        tokio::time::sleep(GATHER).await;
        let due = statuses(&shared, &mut waits);
        if !waits.is_empty() {
            shared.policies.counted.notify_one();
        }
        for (policy, status) in due {
            let api: Api<PropagationPolicy> =
                Api::namespaced(shared.hub.clone(), &policy.namespace().unwrap_or_default());
            let params = PatchParams { field_manager: Some(MANAGER.into()), ..PatchParams::default() };
            let patch = Patch::Merge(json!({ "status": status }));
            let limit = shared.options.request_timeout;
            match timeout(limit, api.patch_status(&policy.name_any(), &params, &patch)).await {
                Ok(Ok(_)) => {}
                Ok(Err(kube::Error::Api(status))) if status.code == 404 => {}
                Ok(Err(failed)) => {
                    warn!(
                        policy = full_name(&policy),
                        error = chain(&failed),
                        "cannot write a policy's status"
                    );
                    shared.policies.counted.notify_one();
                }
                Err(_) => shared.policies.counted.notify_one(),
            }
        }
    }
}

/// The statuses that are to be written: a policy is told of once its objects have been gone through. Those that are to be looked at
/// again soon are in `waits`.
fn statuses(
    shared: &Shared,
    waits: &mut HashMap<String, Waits>,
) -> Vec<(Arc<PropagationPolicy>, PropagationPolicyStatus)> {
    let types = shared.types.live();
    let (types_known, configs) = {
        let state = shared.state.read();
        (state.types_known(), state.type_configs().unwrap_or_default())
    };
    let state = shared.policies.state.lock();
    // Objects come to the queue before anybody can see that they are known.
    let idle = shared.policies.queue.is_idle();
    let mut counts: HashMap<&str, Tally> = HashMap::new();
    for outcome in state.outcomes.values() {
        let count = counts.entry(&outcome.policy).or_default();
        match &outcome.trouble {
            None => count.objects += 1,
            Some(trouble) => count.troubles.push(trouble.clone()),
        }
        for overruled in &outcome.overruled {
            let line = format!("{} goes by {}", outcome.object, outcome.policy);
            counts.entry(overruled).or_default().overruled.push(line);
        }
    }
    let before = std::mem::take(waits);
    let mut due = Vec::new();
    for (name, policy) in state.policies.iter().flatten() {
        let mut tally = counts.remove(name.as_str()).unwrap_or_default();
        for (kind, of) in &types {
            let spoken_of = policy.spec.resources.iter().any(|selector| speaks_of(selector, of));
            if !spoken_of {
                continue;
            }
            match state.natives.get(kind) {
                Some(natives) => tally.see(natives, of),
                // That the type is federated is known here, and not there yet.
                None => tally.see(&Natives::default(), of),
            }
            if !state.listed.contains(kind) {
                tally.unlisted.push(format!("{} is being listed", of.kind));
            }
        }
        for selector in &policy.spec.resources {
            if !types.iter().any(|(_, of)| speaks_of(selector, of)) {
                let what = format!("{} {}", selector.api_version, selector.kind);
                match kinds::why(policy, selector, &configs, &state.unfederated) {
                    Unfederated::Soon => tally.unlisted.push(format!("{what} is being enabled")),
                    Unfederated::NotServed => {
                        tally
                            .unserved
                            .push(format!("the hub API does not serve {what}: apply its definition"));
                    }
                    Unfederated::Because(why) => {
                        tally.complaints.push(format!("{what} is not federated: {why}"));
                    }
                }
            }
        }
        // After a restart the status says already what comes out in the end: what is known halfway there is no news.
        let known = match (types_known && tally.unlisted.is_empty(), idle) {
            (false, _) => Known::Partly,
            (true, false) => Known::Listed,
            (true, true) => Known::Whole,
        };
        let told = policy.status.as_ref().is_some_and(|status| {
            status.observed_generation.is_some() && status.observed_generation == policy.metadata.generation
        });
        let waited = before.get(name).copied().unwrap_or_default();
        if let Some(waited) = waited.on(known, told) {
            waits.insert(name.clone(), waited);
            continue;
        }
        let of: Vec<&FederatedType> = types.iter().map(|(_, of)| of.as_ref()).collect();
        tally.complaints.extend(complaints(policy, &of));
        let status = tally.status(policy);
        if policy.status.as_ref() != Some(&status) {
            due.push((Arc::clone(policy), status));
        }
    }
    due
}

/// What is to be told of one policy.
#[derive(Debug, Default)]
struct Tally {
    objects: i64,
    complaints: Vec<String>,
    unserved: Vec<String>,
    forbidden: Vec<String>,
    unlisted: Vec<String>,
    troubles: Vec<String>,
    overruled: Vec<String>,
}

// === impl Waits ===

impl Waits {
    /// One look more; `None`: it is waited no longer. `told`: the status speaks of the policy as it is.
    fn on(self, known: Known, told: bool) -> Option<Self> {
        let waits = match known {
            Known::Partly => Self { listing: self.listing + 1, busy: 0 },
            // Only from here on is it gone through.
            Known::Listed => Self { listing: 0, busy: self.busy + 1 },
            Known::Whole => return None,
        };
        let listing = if told { LISTING_LOOKS } else { LOOKS };
        (waits.listing < listing && waits.busy < LOOKS).then_some(waits)
    }
}

// === impl Tally ===

impl Tally {
    /// Takes in how far the objects of a kind are known.
    fn see(&mut self, natives: &Natives, of: &FederatedType) {
        let what = format!("{} {}", of.target.api_version(), of.target.kind);
        match (natives.trouble, &natives.objects) {
            (Some(Trouble::NotServed), _) => {
                self.unserved.push(format!("the hub API does not serve {what}: federate it by {}", of.kind));
            }
            (Some(Trouble::Forbidden), _) => self.forbidden.push(format!(
                "the hub may not read {what}: give its group system:cellway:controllers get, list and watch of {}",
                of.target.plural
            )),
            (None, None) => self.unlisted.push(format!("{what} is being listed")),
            (None, Some(_)) => {}
        }
    }

    fn status(self, policy: &PropagationPolicy) -> PropagationPolicyStatus {
        let well = || ("True", "Federated", "every selected object has its companion".to_owned());
        let wrong = [
            ("False", "InvalidResources", self.complaints),
            ("False", "KindNotServed", self.unserved),
            ("False", "KindNotReadable", self.forbidden),
            ("False", "ObjectsNotFederated", self.troubles),
            ("Unknown", "Listing", self.unlisted),
        ];
        let ready = wrong.into_iter().find(|(_, _, lines)| !lines.is_empty());
        let ready = ready.map_or_else(well, |(status, reason, lines)| (status, reason, named(lines)));
        let overruled = if self.overruled.is_empty() {
            ("False", "None", "no other policy goes before it".to_owned())
        } else {
            ("True", "OtherPolicies", named(self.overruled))
        };
        let generation = policy.metadata.generation;
        let condition = |type_: &str, (status, reason, message): (&str, &str, String)| {
            let before = policy.status.iter().flat_map(|status| &status.conditions);
            let since = before
                .filter(|old| old.type_ == type_ && old.status == status)
                .find_map(|old| old.last_transition_time.clone());
            Condition {
                type_: type_.into(),
                status: status.into(),
                observed_generation: generation,
                last_transition_time: Some(since.unwrap_or_else(crate::now)),
                reason: reason.into(),
                message,
            }
        };
        PropagationPolicyStatus {
            observed_generation: generation,
            objects: self.objects,
            conditions: vec![condition("Ready", ready), condition("Overruled", overruled)],
        }
    }
}

/// The first few lines in one, and how many more there are.
fn named(mut lines: Vec<String>) -> String {
    lines.sort();
    let more = lines.len().saturating_sub(NAMED);
    lines.truncate(NAMED);
    let mut text = lines.join("; ");
    if more > 0 {
        text.push_str(&format!("; and {more} more"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goes through looks until a policy is told of, and says at which one it is; `told`: it was before.
    fn look(told: bool, known: impl Fn(u32) -> Known) -> Option<u32> {
        let mut waits = Waits::default();
        (1..10 * LISTING_LOOKS).find(|look| match waits.on(known(*look), told) {
            Some(more) => {
                waits = more;
                false
            }
            None => true,
        })
    }

    #[test]
    fn what_is_being_listed_is_no_news_for_long() {
        for told in [false, true] {
            assert_eq!(look(told, |_| Known::Whole), Some(1));
            assert_eq!(look(told, |_| Known::Listed), Some(LOOKS));
        }
        assert_eq!(look(false, |_| Known::Partly), Some(LOOKS), "it has no status yet");
        assert_eq!(look(true, |_| Known::Partly), Some(LISTING_LOOKS));
        // However long it was listed, it is gone through before it is told of.
        let at = LISTING_LOOKS / 2;
        let busy = |number| if number < at { Known::Partly } else { Known::Listed };
        assert_eq!(look(true, busy), Some(at + LOOKS - 1));
        let whole = |number| if number > at { Known::Whole } else { busy(number) };
        assert_eq!(look(true, whole), Some(at + 1));
    }
}
