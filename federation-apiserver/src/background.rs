//! The server's own work beside requests: tasks that it cannot do without.
//!
//! Each starts over by itself after an error. One that ends all the same has panicked; without it the server would go on
//! with what it knew (rights that were taken away, objects that nobody collects), and say that it is well. So the
//! server ends with it.

use std::collections::HashMap;

use tokio::task::{Id, JoinSet};

/// The tasks. Dropped, they are aborted.
#[derive(Debug, Default)]
pub(crate) struct Background {
    tasks: JoinSet<()>,
    names: HashMap<Id, &'static str>,
}

/// A task that ended by itself.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the server's own task {name:?} ended by itself ({why}), and the server does not go on without it: report it, start the server again"
)]
pub(crate) struct Ended {
    name: &'static str,
    /// What it panicked with is in the log before.
    why: String,
}

// === impl Background ===

impl Background {
    /// Adds a task that ends when the server does, not before.
    pub(crate) fn spawn(&mut self, name: &'static str, work: impl Future<Output = ()> + Send + 'static) {
        let id = self.tasks.spawn(work).id();
        self.names.insert(id, name);
    }

    /// Waits for a task that ends by itself. Cancel-safe. Never returns while there is none.
    pub(crate) async fn failed(&mut self) -> Ended {
        let (id, why) = match self.tasks.join_next_with_id().await {
            None => std::future::pending().await,
            Some(Ok((id, ()))) => (id, "it returned".to_owned()),
            Some(Err(error)) => (error.id(), error.to_string()),
        };
        Ended { name: self.names.get(&id).copied().unwrap_or_default(), why }
    }

    /// Waits for all of them.
    pub(crate) async fn end(mut self) {
        while self.tasks.join_next().await.is_some() {}
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
        assert_eq!(ended, Ended { name: "brief", why: "it returned".into() });
        background.spawn("spoilt", async { panic!("by the test") });
        let ended = background.failed().await;
        assert_eq!(ended.name, "spoilt");
        assert!(ended.why.contains("by the test"), "{ended}");
    }
}
