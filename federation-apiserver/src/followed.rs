//! A file of the server's configuration that is followed while it runs: what is new in it is in force without a restart.

use std::error::Error;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use tokio_util::sync::CancellationToken;

/// How often the file is looked at: what somebody took out of it is good for so much longer.
const INTERVAL: Duration = Duration::from_secs(5);

/// What such a file says.
pub(crate) trait FromFile: PartialEq + Send + Sync + Sized + 'static {
    /// Why a file cannot be used.
    type Error: Error + Send + 'static;
    /// What it is, for the log.
    const WHAT: &'static str;

    /// Reads a file.
    fn read(path: &Path) -> Result<Self, Self::Error>;

    /// Takes the place of `former`: what both say goes on, the rest of it ends.
    fn succeed(self, _former: &Self) -> Self {
        self
    }
}

/// What a file says now.
pub(crate) struct Followed<T> {
    /// `None`: there is no file, and nothing changes.
    path: Option<PathBuf>,
    current: RwLock<Arc<T>>,
}

// === impl Followed ===

impl<T: FromFile> Followed<T> {
    /// Reads the file.
    ///
    /// # Errors
    /// When it cannot be used.
    pub(crate) fn open(path: PathBuf) -> Result<Arc<Self>, T::Error> {
        let current = RwLock::new(Arc::new(T::read(&path)?));
        Ok(Arc::new(Self { path: Some(path), current }))
    }

    /// Something that is in no file.
    pub(crate) fn fixed(value: T) -> Arc<Self> {
        Arc::new(Self { path: None, current: RwLock::new(Arc::new(value)) })
    }

    /// What holds now.
    pub(crate) fn current(&self) -> Arc<T> {
        self.current.read().clone()
    }

    /// Reads the file again; `true` when there was something new, which is then in force. Only one caller at a time.
    ///
    /// # Errors
    /// When it cannot be used; what it said before stays in force.
    fn reload(&self) -> Result<bool, T::Error> {
        let Some(path) = &self.path else { return Ok(false) };
        let (new, former) = (T::read(path)?, self.current());
        let changed = new != *former;
        if changed {
            // Before the rest of the former ends, so that nobody is let in by it any more.
            let mut current = self.current.write();
            *current = Arc::new(new.succeed(&former));
        }
        Ok(changed)
    }

    /// Follows the file until `shutdown`. What cannot be used is warned of once.
    pub(crate) async fn follow(self: Arc<Self>, shutdown: CancellationToken) {
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut warned = None;
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let this = self.clone();
            // It may lie on a volume that hangs.
            let reloading = tokio::task::spawn_blocking(move || this.reload());
            let outcome = tokio::select! {
                () = shutdown.cancelled() => return,
                outcome = reloading => outcome,
            };
            let error = match outcome {
                Ok(Ok(changed)) => {
                    if changed {
                        tracing::info!("the {} has changed, and is in force", T::WHAT);
                    }
                    None
                }
                Ok(Err(error)) => Some(service::error_chain(&error)),
                Err(error) => Some(service::log::task_failure(error)),
            };
            if let Some(error) = error.as_ref().filter(|_| warned != error) {
                tracing::warn!(error, "the {} cannot be used: what it said before stays in force", T::WHAT);
            }
            warned = error;
        }
    }
}

impl<T: fmt::Debug> fmt::Debug for Followed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Followed").field("path", &self.path).field("current", &*self.current.read()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::tokens::TokenFile;

    #[test]
    fn what_cannot_be_used_leaves_the_former_in_force() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let write = |text: &str| std::fs::write(file.path(), text).expect("written");
        write("one,jo,1\ntwo,ann,2\n");
        let tokens = Followed::<TokenFile>::open(file.path().to_owned()).expect("valid");
        let (_, jo) = tokens.current().user("one").expect("known");
        let (_, ann) = tokens.current().user("two").expect("known");
        assert!(!tokens.reload().expect("the same"));
        write("one,jo\n");
        assert!(tokens.reload().is_err());
        assert!(tokens.current().user("one").is_some() && !jo.is_cancelled());
        write("two,ann,2\nthree,eve,3\n");
        assert!(tokens.reload().expect("valid"));
        assert!(tokens.current().user("one").is_none() && jo.is_cancelled(), "taken out");
        assert!(tokens.current().user("two").is_some() && !ann.is_cancelled(), "stays");
        // The same token is somebody else's, or may do something else.
        write("two,ann,2,\"system:masters\"\n");
        assert!(tokens.reload().expect("valid") && ann.is_cancelled());
        let (_, again) = tokens.current().user("two").expect("known");
        assert!(!again.is_cancelled());
    }
}
