//! Texts that many have in common, each kept once: what the hub places in ten members is the same in all of them.

use std::collections::HashSet;
use std::sync::Arc;

use parking_lot::Mutex;

/// With fewer texts than these it is not worth looking for those that nobody has any more.
const SWEEP_FROM: usize = 1024;

/// Texts in use.
#[derive(Debug)]
pub(crate) struct Texts {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    known: HashSet<Arc<str>>,
    /// At so many, those that nobody has any more are let go of: never more than about twice as many as were in use.
    sweep_at: usize,
}

// === impl Texts ===

impl Texts {
    pub(crate) fn new() -> Self {
        Self { inner: Mutex::new(Inner { known: HashSet::new(), sweep_at: SWEEP_FROM }) }
    }

    /// The one copy of a text.
    pub(crate) fn share(&self, text: &str) -> Arc<str> {
        let mut inner = self.inner.lock();
        if let Some(known) = inner.known.get(text) {
            return Arc::clone(known);
        }
        if inner.known.len() >= inner.sweep_at {
            inner.sweep();
        }
        let text: Arc<str> = text.into();
        inner.known.insert(Arc::clone(&text));
        text
    }

    /// Lets go of what nobody has any more.
    pub(crate) fn sweep(&self) {
        self.inner.lock().sweep();
    }
}

impl Inner {
    fn sweep(&mut self) {
        self.known.retain(|text| Arc::strong_count(text) > 1);
        self.known.shrink_to(2 * self.known.len());
        self.sweep_at = (2 * self.known.len()).max(SWEEP_FROM);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_are_one_and_unused_ones_go() {
        let texts = Texts::new();
        let kept = texts.share("kept");
        assert!(Arc::ptr_eq(&kept, &texts.share("kept")));
        let len = |texts: &Texts| texts.inner.lock().known.len();
        for number in 0..10 * SWEEP_FROM {
            texts.share(&number.to_string());
            assert!(len(&texts) <= SWEEP_FROM);
        }
        texts.sweep();
        assert_eq!(len(&texts), 1, "what is in use stays");
        assert!(Arc::ptr_eq(&kept, &texts.share("kept")));
    }
}
