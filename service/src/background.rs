//! A program's own work beside requests: tasks that it cannot do without.
//!
//! Each starts over by itself after an error. One that ends all the same has panicked; without it the program would go on
//! with what it knew (rights that were taken away, objects that nobody collects), and say that it is well. So the
//! program ends with it, and says which it was.

use std::collections::HashMap;

use tokio::task::{Id, JoinError, JoinSet};

/// The tasks. Dropped, they are aborted.
#[derive(Debug, Default)]
pub struct Background {
    tasks: JoinSet<()>,
    names: HashMap<Id, &'static str>,
}

/// A task that ended by itself.
#[derive(Debug, thiserror::Error)]
#[error(
    "the task {name:?} ended by itself ({why}), and the program does not go on without it: report it, start the program again"
)]
pub struct Ended {
    name: &'static str,
    /// What it panicked with is in the log before.
    why: String,
}

// === impl Ended ===

impl Ended {
    /// What it means that the task `name` is over, from how it was joined.
    pub fn of(name: &'static str, joined: Result<(), JoinError>) -> Self {
        let why = joined.map_or_else(crate::log::task_failure, |()| "it returned".to_owned());
        Self { name, why }
    }
}

// === impl Background ===

impl Background {
    /// Adds a task that ends when the program does, not before.
    pub fn spawn(&mut self, name: &'static str, work: impl Future<Output = ()> + Send + 'static) {
        let id = self.tasks.spawn(work).id();
        self.names.insert(id, name);
    }

    /// Waits for a task that ends by itself. Cancel-safe. Never returns while there is none.
    pub async fn failed(&mut self) -> Ended {
        let (id, joined) = match self.tasks.join_next_with_id().await {
            None => std::future::pending().await,
            Some(Ok((id, ()))) => (id, Ok(())),
            Some(Err(error)) => (error.id(), Err(error)),
        };
        Ended::of(self.names.get(&id).copied().unwrap_or_default(), joined)
    }

    /// Waits for all of them, told by other means to end.
    pub async fn end(mut self) {
        while self.tasks.join_next().await.is_some() {}
    }

    /// Ends all of them and waits until they have.
    pub async fn abort(mut self) {
        self.tasks.shutdown().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_ends_is_named() {
        let mut background = Background::default();
        background.spawn("steady", std::future::pending());
        background.spawn("brief", std::future::ready(()));
        let ended = background.failed().await;
        assert_eq!((ended.name, ended.why.as_str()), ("brief", "it returned"));
        background.spawn("spoilt", async { panic!("by the test") });
        let ended = background.failed().await;
        assert_eq!(ended.name, "spoilt");
        assert!(ended.why.contains("by the test"), "{ended}");
        let held = "what an object held".to_owned();
        background.spawn("open", async move { panic!("not ready for {held}") });
        let ended = background.failed().await;
        assert!(ended.why.contains("withheld") && !ended.why.contains("an object held"), "{ended}");
    }
}
