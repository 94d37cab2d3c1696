//! A file of the server's configuration that is followed while it runs: what is new in it is in force without a restart.

use std::error::Error;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use tokio_util::sync::CancellationToken;

/// How often the file is looked at: what somebody took out of it is good for so much longer.
const INTERVAL: Duration = Duration::from_secs(5);
/// What is new is taken when it is still the same after so long. Somebody may be writing the file just now, and the first
/// half of a list of tokens, of rules or of certificates is a list as well. Who writes a file in one go is done by then.
const SETTLING: Duration = Duration::from_secs(1);

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
    /// What the last look has found for the first time.
    noticed: Mutex<Option<T>>,
}

/// What a look at the file has found.
#[derive(Debug, PartialEq, Eq)]
enum Look {
    Same,
    /// Something new: the next look tells whether it stays.
    New,
    /// Something new that has stayed, and is in force.
    Taken,
}

// === impl Followed ===

impl<T: FromFile> Followed<T> {
    /// Reads the file.
    ///
    /// # Errors
    /// When it cannot be used.
    pub(crate) fn open(path: PathBuf) -> Result<Arc<Self>, T::Error> {
        let current = RwLock::new(Arc::new(T::read(&path)?));
        Ok(Arc::new(Self { path: Some(path), current, noticed: Mutex::default() }))
    }

    /// Something that is in no file.
    pub(crate) fn fixed(value: T) -> Arc<Self> {
        Arc::new(Self { path: None, current: RwLock::new(Arc::new(value)), noticed: Mutex::default() })
    }

    /// What holds now.
    pub(crate) fn current(&self) -> Arc<T> {
        self.current.read().clone()
    }

    /// Reads the file again, all of it: its time and size may be those of before. Only one caller at a time.
    ///
    /// # Errors
    /// When it cannot be used; what it said before stays in force.
    fn look(&self) -> Result<Look, T::Error> {
        let Some(path) = &self.path else { return Ok(Look::Same) };
        let read = T::read(path);
        let noticed = self.noticed.lock().take();
        let (new, former) = (read?, self.current());
        if new == *former {
            return Ok(Look::Same);
        }
        if noticed.as_ref() != Some(&new) {
            *self.noticed.lock() = Some(new);
            return Ok(Look::New);
        }
        // Before the rest of the former ends, so that nobody is let in by it any more.
        let mut current = self.current.write();
        *current = Arc::new(new.succeed(&former));
        Ok(Look::Taken)
    }

    /// Follows the file until `shutdown`. What cannot be used is warned of once.
    pub(crate) async fn follow(self: Arc<Self>, shutdown: CancellationToken) {
        let mut pause = Duration::ZERO;
        let mut warned = None;
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
            let this = self.clone();
            // It may lie on a volume that hangs.
            let looking = tokio::task::spawn_blocking(move || this.look());
            let outcome = tokio::select! {
                () = shutdown.cancelled() => return,
                outcome = looking => outcome,
            };
            pause = if matches!(outcome, Ok(Ok(Look::New))) { SETTLING } else { INTERVAL };
            let error = match outcome {
                Ok(Ok(look)) => {
                    if look == Look::Taken {
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
        let look = || tokens.look().expect("valid");
        assert_eq!(look(), Look::Same);
        for unusable in ["one,jo\n", "one,jo,1,\"readers,wri"] {
            write(unusable);
            assert!(tokens.look().is_err());
            assert!(tokens.current().user("one").is_some() && !jo.is_cancelled());
        }
        write("two,ann,2\nthree,eve,3\n");
        assert_eq!((look(), look()), (Look::New, Look::Taken));
        assert!(tokens.current().user("one").is_none() && jo.is_cancelled(), "taken out");
        assert!(tokens.current().user("two").is_some() && !ann.is_cancelled(), "stays");
        // The same token is somebody else's, or may do something else.
        write("two,ann,2,\"system:masters\"\n");
        assert_eq!((look(), look()), (Look::New, Look::Taken));
        assert!(ann.is_cancelled());
        let (_, again) = tokens.current().user("two").expect("known");
        assert!(!again.is_cancelled());
    }

    #[tokio::test(start_paused = true)]
    async fn what_somebody_is_still_writing_is_not_taken() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let (two, three) = ("one,jo,1\ntwo,ann,2\n", "one,jo,1\ntwo,ann,2\nthree,eve,3\n");
        let write = |text: &str| std::fs::write(file.path(), text).expect("written");
        write(two);
        let tokens = Followed::<TokenFile>::open(file.path().to_owned()).expect("valid");
        let (_, ann) = tokens.current().user("two").expect("known");
        // Looks may fall anywhere.
        for cut in 0..three.len() {
            write(&three[..cut]);
            let _ = tokens.look();
            assert!(tokens.current().user("two").is_some() && !ann.is_cancelled(), "{cut}");
            write(two);
            assert_eq!(tokens.look().expect("valid"), Look::Same);
        }
        write(three);
        let modified = file.as_file().metadata().and_then(|m| m.modified()).expect("a time");
        assert_eq!((tokens.look().expect("valid"), tokens.look().expect("valid")), (Look::New, Look::Taken));
        assert!(tokens.current().user("three").is_some());
        // Neither its time nor its size tells that it has changed; whoever follows it needs neither.
        write(&three.replace("eve,3", "eva,3"));
        file.as_file().set_modified(modified).expect("set");
        let known = || tokens.current().user("three").is_some_and(|(user, _)| user.name == "eva");
        let waiting = async {
            while !known() {
                tokio::time::sleep(SETTLING).await;
            }
        };
        tokio::select! {
            () = tokens.clone().follow(CancellationToken::new()) => unreachable!("it follows until it is told to stop"),
            waited = tokio::time::timeout(INTERVAL + 2 * SETTLING, waiting) => waited.expect("in force"),
        }
    }
}
