//! Readiness: what must have happened once, and what must hold now.

use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;

type Check = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// What the program still waits for. Clones share it.
#[derive(Clone, Default)]
pub struct Readiness(Arc<Mutex<State>>);

/// One thing that has yet to happen; dropping it says that it has.
#[must_use = "readiness is reached when this is dropped"]
pub struct ReadyGuard {
    readiness: Readiness,
    id: u64,
}

#[derive(Default)]
struct State {
    next_id: u64,
    pending: Vec<(u64, String)>,
    checks: Vec<(String, Check)>,
}

// === impl Readiness ===

impl Readiness {
    /// Not ready until the returned guard is dropped.
    pub fn register(&self, name: impl Into<String>) -> ReadyGuard {
        let mut state = self.0.lock();
        let id = state.next_id;
        state.next_id += 1;
        state.pending.push((id, name.into()));
        ReadyGuard { readiness: self.clone(), id }
    }

    /// Not ready while `check` says why not. It is called on every probe: keep it cheap.
    pub fn check(
        &self,
        name: impl Into<String>,
        check: impl Fn() -> Result<(), String> + Send + Sync + 'static,
    ) {
        self.0.lock().checks.push((name.into(), Arc::new(check)));
    }

    /// Every name with its verdict, pending ones first.
    pub fn all(&self) -> Vec<(String, Result<(), String>)> {
        let (mut verdicts, checks) = {
            let state = self.0.lock();
            let pending: Vec<_> = state
                .pending
                .iter()
                .map(|(_, name)| (name.clone(), Err("not done yet".to_owned())))
                .collect();
            (pending, state.checks.clone())
        };
        // The checks are the program's code and run without our lock.
        verdicts.extend(checks.into_iter().map(|(name, check)| (name, check())));
        verdicts
    }

    /// `Ok` when ready.
    ///
    /// # Errors
    /// What is missing: (name, reason).
    pub fn status(&self) -> Result<(), Vec<(String, String)>> {
        let missing: Vec<_> = self
            .all()
            .into_iter()
            .filter_map(|(name, verdict)| verdict.err().map(|why| (name, why)))
            .collect();
        if missing.is_empty() { Ok(()) } else { Err(missing) }
    }
}

impl fmt::Debug for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0.lock();
        f.debug_struct("Readiness")
            .field("pending", &state.pending)
            .field("checks", &state.checks.len())
            .finish()
    }
}

// === impl ReadyGuard ===

impl Drop for ReadyGuard {
    fn drop(&mut self) {
        self.readiness.0.lock().pending.retain(|(id, _)| *id != self.id);
    }
}

impl fmt::Debug for ReadyGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ReadyGuard").field(&self.id).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn guards_and_checks_both_count() {
        let ready = Readiness::default();
        assert!(ready.status().is_ok());
        let guard = ready.register("first agent");
        let ok = Arc::new(AtomicBool::new(false));
        let seen = ok.clone();
        ready.check("database", move || {
            if seen.load(Ordering::Relaxed) { Ok(()) } else { Err("no answer".to_owned()) }
        });
        let missing = ready.status().unwrap_err();
        assert_eq!(missing.len(), 2);
        assert_eq!(missing[0].0, "first agent");
        drop(guard);
        assert_eq!(ready.status().unwrap_err(), vec![("database".to_owned(), "no answer".to_owned())]);
        ok.store(true, Ordering::Relaxed);
        assert!(ready.status().is_ok());
    }
}
