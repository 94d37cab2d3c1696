//! What admission has to say besides yes and no: warnings for the client, annotations for the audit log.

use std::collections::BTreeMap;

use parking_lot::Mutex;

/// Warnings that are kept, and annotations: webhooks choose how many they send.
const MAX_WARNINGS: usize = 16;
const MAX_ANNOTATIONS: usize = 64;
/// Longest annotation; patches of whole objects are not worth more of the log.
const MAX_VALUE: usize = 64 * 1024;

/// As much of a webhook's text as a line of the log tells.
const MAX_LOGGED: usize = 1024;

/// A webhook's text, fit for the log.
pub(super) fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_LOGGED)]
}

/// Collected while a request is handled. Cheap when nothing is said.
#[derive(Debug, Default)]
pub(crate) struct Notes(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    warnings: Vec<String>,
    annotations: BTreeMap<String, Annotation>,
    /// Some annotation was left out.
    left_out: bool,
}

/// A value for the audit log, and whether it is part of the request's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Annotation {
    pub(crate) value: String,
    /// Told from level Request on only.
    pub(crate) content: bool,
}

// === impl Notes ===

impl Notes {
    /// A warning for the client; the same one is told once.
    pub(crate) fn warn(&self, text: &str) {
        let mut inner = self.0.lock();
        if inner.warnings.len() < MAX_WARNINGS && !inner.warnings.iter().any(|w| w == text) {
            inner.warnings.push(text.to_owned());
        }
    }

    /// An annotation for the audit log. The first value of a key stays, as in kube-apiserver.
    pub(crate) fn annotate(&self, key: String, value: String, content: bool) {
        let mut inner = self.0.lock();
        if inner.annotations.len() >= MAX_ANNOTATIONS || value.len() > MAX_VALUE || key.len() > MAX_VALUE {
            // Webhooks choose how many they send; the log is told once.
            if !std::mem::replace(&mut inner.left_out, true) {
                tracing::warn!(
                    key = cut(&key),
                    "audit annotations of a webhook are left out: too many, or too long"
                );
            }
            return;
        }
        inner.annotations.entry(key).or_insert(Annotation { value, content });
    }

    pub(crate) fn warnings(&self) -> Vec<String> {
        self.0.lock().warnings.clone()
    }

    pub(crate) fn annotations(&self) -> BTreeMap<String, Annotation> {
        self.0.lock().annotations.clone()
    }
}
