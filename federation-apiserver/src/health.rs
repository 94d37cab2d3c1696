//! Whether the database answers: what `/readyz` says beside the server's own state.
//!
//! One task asks at intervals, and probes are told what it found: however many come, the database is asked as often.

use std::sync::Arc;
use std::time::Duration;

use federation_store::Store;
use parking_lot::RwLock;

use crate::registry::Registry;

/// Pause between two questions: a load balancer learns of a database that is away within that and [`LIMIT`].
const EVERY: Duration = Duration::from_secs(2);
/// An answer that takes longer is none; one of a database that is only busy takes less.
const LIMIT: Duration = Duration::from_secs(5);
/// A key that no object has.
const KEY: &[u8] = b"health";

/// What was last heard of the database. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Database(Arc<RwLock<Option<String>>>);

// === impl Database ===

impl Database {
    /// Does it answer?
    ///
    /// # Errors
    /// What went wrong; not for everybody's eyes, as it may name hosts.
    pub fn verdict(&self) -> Result<(), String> {
        self.0.read().clone().map_or(Ok(()), Err)
    }

    /// Takes an answer, and says it once when it is another than before.
    fn take(&self, heard: Result<(), String>) {
        let heard = heard.err();
        let before = std::mem::replace(&mut *self.0.write(), heard.clone());
        match (before, heard) {
            (None, Some(why)) => tracing::warn!(why, "the database does not answer: not ready"),
            (Some(_), None) => tracing::info!("the database answers again"),
            _ => {}
        }
    }
}

async fn ask(store: &Store) -> Result<(), String> {
    match tokio::time::timeout(LIMIT, store.get(KEY, None)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(service::error_chain(&error)),
        Err(_) => Err(format!("no answer within {} s", LIMIT.as_secs())),
    }
}

/// Asks until the registry shuts down.
pub(crate) async fn run(registry: Arc<Registry>, database: Database) {
    loop {
        tokio::select! {
            () = registry.shutdown.cancelled() => return,
            heard = ask(&registry.store) => database.take(heard),
        }
        tokio::select! {
            () = registry.shutdown.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use federation_store::StoreConfig;

    use super::*;

    #[tokio::test]
    async fn a_database_that_is_away_is_told() {
        let store = Store::open(StoreConfig::in_memory()).await.expect("a store");
        let database = Database::default();
        database.take(ask(&store).await);
        assert_eq!(database.verdict(), Ok(()));
        store.close().await;
        database.take(ask(&store).await);
        assert!(database.verdict().is_err());
        database.take(Ok(()));
        assert_eq!(database.verdict(), Ok(()));
    }
}
