//! Texts that many have in common, each kept once: what the hub places in ten members is the same in all of them.

use std::collections::HashSet;
use std::sync::Arc;

use parking_lot::Mutex;

/// With fewer texts, or bytes, than these it is not worth looking for those that nobody has any more.
const SWEEP_FROM: usize = 1024;
const SWEEP_BYTES_FROM: usize = 16 << 20;

/// Texts in use.
#[derive(Debug)]
pub(crate) struct Texts {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    known: HashSet<Arc<str>>,
    /// Bytes of them.
    bytes: usize,
    /// At so many texts, or bytes, those that nobody has any more are let go of: there is never more than about twice what
    /// was in use, whatever members rewrite.
    sweep_at: usize,
    sweep_at_bytes: usize,
}

// === impl Texts ===

impl Texts {
    pub(crate) fn new() -> Self {
        Self {
            inner: Mutex::new(Inner {
                known: HashSet::new(),
                bytes: 0,
                sweep_at: SWEEP_FROM,
                sweep_at_bytes: SWEEP_BYTES_FROM,
            }),
        }
    }

    /// The one copy of a text.
    pub(crate) fn share(&self, text: &str) -> Arc<str> {
        let mut inner = self.inner.lock();
        if let Some(known) = inner.known.get(text) {
            return Arc::clone(known);
        }
        if inner.known.len() >= inner.sweep_at || inner.bytes + text.len() > inner.sweep_at_bytes {
            inner.sweep();
        }
        inner.bytes += text.len();
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
        self.bytes = self.known.iter().map(|text| text.len()).sum();
        self.sweep_at_bytes = (2 * self.bytes).max(SWEEP_BYTES_FROM);
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
        // Few that are large: a member that rewrites an object again and again.
        for number in 0..100u8 {
            texts.share(&char::from(number).to_string().repeat(1 << 20));
            assert!(texts.inner.lock().bytes <= SWEEP_BYTES_FROM);
        }
        texts.sweep();
        assert_eq!(len(&texts), 1, "what is in use stays");
        assert_eq!(texts.inner.lock().bytes, "kept".len());
        assert!(Arc::ptr_eq(&kept, &texts.share("kept")));
    }
}
