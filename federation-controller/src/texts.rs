//! What many have in common, each kept once: what the hub places in ten members is the same in all of them.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::Arc;

use federation_core::drift::Baseline;
use parking_lot::Mutex;

/// With fewer things, or bytes, than these it is not worth looking for those that nobody has any more.
const SWEEP_FROM: usize = 1024;
/// As [`SWEEP_FROM`], in bytes.
const SWEEP_BYTES_FROM: usize = 16 << 20;

/// So many bytes of different texts are kept of all members together, whosever they are. Of a hub with 10,000 objects of 10 KiB,
/// each different in each of ten members, it is all. Beyond it a member may still have an equal part of as much again: what few
/// members fill is refused to them, and not to the others. So there is never more than twice this.
pub(crate) const MAX_TEXTS: usize = 1 << 30;

/// Texts in use, and what members answered to writes.
#[derive(Debug)]
pub(crate) struct Texts {
    /// As [`MAX_TEXTS`].
    most: usize,
    texts: Mutex<Pool<str>>,
    baselines: Mutex<Pool<Baseline>>,
}

/// Things in use.
#[derive(Debug)]
struct Pool<T: ?Sized> {
    known: HashSet<Arc<T>>,
    /// Bytes of them.
    bytes: usize,
    /// At so many things, or bytes, those that nobody has any more are let go of: there is never more than about twice what
    /// was in use, whatever members rewrite.
    sweep_at: usize,
    sweep_at_bytes: usize,
}

// === impl Texts ===

impl Texts {
    pub(crate) fn new() -> Self {
        Self::of(MAX_TEXTS)
    }

    fn of(most: usize) -> Self {
        Self { most, texts: Mutex::new(Pool::new()), baselines: Mutex::new(Pool::new()) }
    }

    /// The one copy of a text.
    pub(crate) fn share(&self, text: &str) -> Arc<str> {
        self.texts.lock().share(text, || text.into())
    }

    /// The one copy of what members answered.
    pub(crate) fn share_baseline(&self, baseline: Baseline) -> Arc<Baseline> {
        let baseline = Arc::new(baseline);
        self.baselines.lock().share(&baseline, || Arc::clone(&baseline))
    }

    /// Whether there is room for more texts of a member that has so many bytes of them (`own`), of so many members.
    pub(crate) fn has_room(&self, own: usize, members: usize) -> bool {
        if own <= self.part(members) {
            return true;
        }
        let mut texts = self.texts.lock();
        if texts.bytes >= self.most {
            texts.sweep();
        }
        texts.bytes < self.most
    }

    /// Bytes that each of so many members may have, whatever the others have.
    pub(crate) fn part(&self, members: usize) -> usize {
        self.most / members.max(1)
    }

    /// Lets go of what nobody has any more.
    pub(crate) fn sweep(&self) {
        self.texts.lock().sweep();
        self.baselines.lock().sweep();
    }
}

// === impl Pool ===

impl<T: ?Sized + Eq + Hash> Pool<T> {
    fn new() -> Self {
        Self { known: HashSet::new(), bytes: 0, sweep_at: SWEEP_FROM, sweep_at_bytes: SWEEP_BYTES_FROM }
    }

    /// The one that equals `one`; `make`: it, should nobody have had it.
    fn share(&mut self, one: &T, make: impl FnOnce() -> Arc<T>) -> Arc<T> {
        if let Some(known) = self.known.get(one) {
            return Arc::clone(known);
        }
        let weight = size_of_val(one);
        if self.known.len() >= self.sweep_at || self.bytes + weight > self.sweep_at_bytes {
            self.sweep();
        }
        self.bytes += weight;
        let made = make();
        self.known.insert(Arc::clone(&made));
        made
    }

    fn sweep(&mut self) {
        self.known.retain(|one| Arc::strong_count(one) > 1);
        self.known.shrink_to(2 * self.known.len());
        self.sweep_at = (2 * self.known.len()).max(SWEEP_FROM);
        self.bytes = self.known.iter().map(|one| size_of_val(&**one)).sum();
        self.sweep_at_bytes = (2 * self.bytes).max(SWEEP_BYTES_FROM);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn equal_texts_are_one_and_unused_ones_go() {
        let texts = Texts::new();
        let kept = texts.share("kept");
        assert!(Arc::ptr_eq(&kept, &texts.share("kept")));
        let len = |texts: &Texts| texts.texts.lock().known.len();
        for number in 0..10 * SWEEP_FROM {
            texts.share(&number.to_string());
            assert!(len(&texts) <= SWEEP_FROM);
        }
        // Few that are large: a member that rewrites an object again and again.
        for number in 0..100u8 {
            texts.share(&char::from(number).to_string().repeat(1 << 20));
            assert!(texts.texts.lock().bytes <= SWEEP_BYTES_FROM);
        }
        texts.sweep();
        assert_eq!(len(&texts), 1, "what is in use stays");
        assert_eq!(texts.texts.lock().bytes, "kept".len());
        assert!(Arc::ptr_eq(&kept, &texts.share("kept")));
    }

    #[test]
    fn what_few_members_fill_is_refused_to_them_only() {
        const MOST: usize = 1 << 20;
        const MEMBERS: usize = 10;
        let texts = Texts::of(MOST);
        let (small, large) = (texts.part(MEMBERS), texts.part(MEMBERS) + 1);
        let fill = || -> Vec<_> {
            let each = (0..MEMBERS).map(|number| texts.share(&number.to_string().repeat(MOST / MEMBERS + 1)));
            each.collect()
        };
        assert!(texts.has_room(large, MEMBERS), "nobody needs it");
        drop(fill());
        assert!(texts.has_room(large, MEMBERS), "nobody has it any more");
        let _full = fill();
        assert!(!texts.has_room(large, MEMBERS));
        assert!(texts.has_room(small, MEMBERS) && texts.has_room(0, MEMBERS));
    }

    #[test]
    fn members_that_answer_the_same_share_the_answer() {
        let texts = Texts::new();
        let answer = |replicas: u64| {
            let object = json!({"spec": {"replicas": replicas}});
            texts.share_baseline(federation_core::drift::baseline(&object, &object, "hash"))
        };
        let one = answer(1);
        assert!(Arc::ptr_eq(&one, &answer(1)));
        assert!(!Arc::ptr_eq(&one, &answer(2)));
        texts.sweep();
        assert_eq!(texts.baselines.lock().known.len(), 1, "nobody has the second any more");
    }
}
