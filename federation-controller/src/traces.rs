//! In which members a federated object may have left something, so that a look at it asks those and no others: the cost of a
//! look depends on where the object is, and not on how many members there are.
//!
//! A member is noted when a look asks it about the object, and when it shows an object that carries the mark. It is
//! forgotten when the object has nothing to do there any more and nothing of it is left.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::hub::ObjectKey;

/// Members by federated object, in the order of types: a listing of one goes through its own objects only.
#[derive(Debug, Default)]
pub(crate) struct Traces {
    by_object: Mutex<BTreeMap<ObjectKey, BTreeSet<Arc<str>>>>,
}

// === impl Traces ===

impl Traces {
    /// Notes a member for some objects.
    pub(crate) fn add(&self, objects: impl IntoIterator<Item = ObjectKey>, member: &Arc<str>) {
        let mut by_object = self.by_object.lock();
        for object in objects {
            by_object.entry(object).or_default().insert(Arc::clone(member));
        }
    }

    /// How many objects have any.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.by_object.lock().len()
    }

    /// Where an object may have something.
    pub(crate) fn of(&self, object: &ObjectKey) -> Vec<Arc<str>> {
        self.by_object.lock().get(object).into_iter().flatten().cloned().collect()
    }

    /// Objects of a type that may have something in one of these members.
    pub(crate) fn in_members(&self, kind: usize, is_one: impl Fn(&str) -> bool) -> Vec<ObjectKey> {
        let by_object = self.by_object.lock();
        let traced =
            by_object.range(of_kind(kind)).filter(|(_, names)| names.iter().any(|name| is_one(name)));
        traced.map(|(object, _)| object.clone()).collect()
    }

    /// Forgets what `stays` does not say to keep of one type in one member. It is asked as by [`Self::settle`].
    pub(crate) fn retain_in(&self, kind: usize, member: &str, stays: impl Fn(&ObjectKey) -> bool) {
        let mut by_object = self.by_object.lock();
        let mut nowhere = Vec::new();
        for (object, members) in by_object.range_mut(of_kind(kind)) {
            if members.contains(member) && !stays(object) {
                members.remove(member);
                if members.is_empty() {
                    nowhere.push(object.clone());
                }
            }
        }
        nowhere.iter().for_each(|object| drop(by_object.remove(object)));
    }

    /// Forgets what `stays` does not say to keep: the traces of what no look comes by any more. It is asked as by
    /// [`Self::settle`].
    pub(crate) fn retain(&self, stays: impl Fn(&ObjectKey, &str) -> bool) {
        self.by_object.lock().retain(|object, members| {
            members.retain(|member| stays(object, member));
            !members.is_empty()
        });
    }

    /// Forgets members that `stays` does not say to keep. It is asked while nothing can be noted: what a member shows comes
    /// to be known there first, and is noted here afterwards.
    pub(crate) fn settle(&self, object: &ObjectKey, stays: impl Fn(&str) -> bool) {
        let mut by_object = self.by_object.lock();
        if let Some(members) = by_object.get_mut(object) {
            members.retain(|member| stays(member));
            if members.is_empty() {
                by_object.remove(object);
            }
        }
    }
}

/// Everything of a type.
fn of_kind(kind: usize) -> Range<ObjectKey> {
    ObjectKey::new(kind, "", "")..ObjectKey::new(kind + 1, "", "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_kept_as_long_as_they_matter() {
        let traces = Traces::default();
        let (web, other) = (ObjectKey::new(0, "shop", "web"), ObjectKey::new(0, "shop", "other"));
        for member in ["x", "y"] {
            traces.add([web.clone(), other.clone()], &member.into());
        }
        traces.settle(&web, |member| member == "y");
        assert_eq!(traces.of(&web), ["y".into()]);
        assert_eq!(traces.of(&other).len(), 2);
        traces.settle(&web, |_| false);
        assert!(traces.of(&web).is_empty());
        assert_eq!(traces.len(), 1, "nothing is kept of what is nowhere");
        let third = ObjectKey::new(1, "shop", "web");
        traces.add([third.clone()], &"y".into());
        assert_eq!(traces.in_members(0, |member| member == "y"), std::slice::from_ref(&other));
        traces.retain_in(0, "x", |_| true);
        traces.retain_in(0, "y", |_| false);
        assert_eq!((traces.of(&other), traces.of(&third)), (vec!["x".into()], vec!["y".into()]));
        traces.retain_in(1, "y", |_| false);
        assert!(traces.of(&third).is_empty());
        traces.add([other.clone()], &"y".into());
        traces.retain(|object, member| *object == other && member == "x");
        assert_eq!(traces.of(&other), ["x".into()]);
        traces.retain(|_, _| false);
        assert!(traces.by_object.lock().is_empty());
    }
}
