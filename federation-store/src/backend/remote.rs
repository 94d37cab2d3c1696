//! What talking to a database over a network takes: limits on every wait, and no connection that may be out of step goes
//! back into a pool.

use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::{Connection as _, Database};

/// How long each step may take: a read, what begins a batch, its rows, its commit. A list of everything in a large store
/// takes seconds; a database that takes longer than this is gone.
pub(super) const OPERATION_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a connection may take to come up, and a caller may wait for a free one.
pub(super) const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the database keeps a transaction whose client has gone silent: so long everybody else waits for the counter.
pub(super) const IDLE_TRANSACTION_SECONDS: u32 = 10;

/// How long a statement waits for the counter before it fails and the batch is tried again.
pub(super) const LOCK_SECONDS: u32 = 8;

/// Connections that read.
pub(super) const READERS: u32 = 8;

/// Tries: a restarted database leaves as many dead connections in the pool as it has, and one more try finds
/// it alive or gone.
pub(super) const TRIES: u32 = READERS + 2;

/// Closes a connection without a word: what state it is in is anyone's guess, and the server rolls back what it had begun.
pub(super) async fn hang_up<DB: Database>(connection: PoolConnection<DB>) {
    let closed = tokio::time::timeout(Duration::from_secs(1), connection.detach().close_hard()).await;
    if !matches!(closed, Ok(Ok(()))) {
        tracing::debug!("a broken connection did not close in order");
    }
}
