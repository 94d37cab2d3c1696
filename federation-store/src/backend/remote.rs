//! What talking to a database over a network takes: limits on every wait, and no connection that may be out of step goes
//! back into a pool.

use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::{Connection as _, Database, Pool};

/// How long anything but a commit may take. A list of everything in a large store takes seconds; a database that takes
/// longer than this is gone.
pub(super) const OPERATION_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a connection may take to come up, and a caller may wait for a free one.
pub(super) const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the database keeps a transaction whose client has gone silent: so long everybody else waits for the counter.
pub(super) const IDLE_TRANSACTION_SECONDS: u32 = 10;

/// How long a statement waits for the counter before it fails and the batch is tried again.
pub(super) const LOCK_SECONDS: u32 = 8;

/// Connections that read.
pub(super) const READERS: u32 = 8;

/// Tries of a read: a restarted database leaves as many dead connections in the pool as it has, and one more try finds
/// it alive or gone.
pub(super) const READ_TRIES: u32 = READERS + 2;

/// A connection out of the pool. Failing to get one is not worth another try at once.
pub(super) async fn acquire<DB: Database>(pool: &Pool<DB>) -> Result<PoolConnection<DB>, sqlx::Error> {
    pool.acquire().await
}

/// Runs `work` with a limit.
pub(super) async fn limited<T>(work: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, sqlx::Error> {
    match tokio::time::timeout(OPERATION_TIMEOUT, work).await {
        Ok(outcome) => outcome,
        Err(_) => Err(sqlx::Error::Io(std::io::Error::new(
            std::io::ErrorKind::TimedOut,
            format!("no answer within {OPERATION_TIMEOUT:?}"),
        ))),
    }
}

/// Gives the connection back, or, after an error, closes it without a word: what state it is in is anyone's guess, and
/// the server rolls back what it had begun.
pub(super) async fn settle<DB: Database, T>(
    connection: PoolConnection<DB>,
    outcome: Result<T, sqlx::Error>,
) -> Result<T, sqlx::Error> {
    if outcome.is_err() {
        let closed = tokio::time::timeout(Duration::from_secs(1), connection.detach().close_hard()).await;
        if !matches!(closed, Ok(Ok(()))) {
            tracing::debug!("a broken connection did not close in order");
        }
    }
    outcome
}

/// Whether the connection broke, rather than that the database refused.
pub(super) fn broken(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(error) => error.kind() != std::io::ErrorKind::TimedOut,
        sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed => true,
        // The servers' farewells: PostgreSQL's shutdowns, MySQL's "server shutdown in progress" and "killed".
        sqlx::Error::Database(error) => {
            matches!(error.code().as_deref(), Some("57P01" | "57P02" | "57P03" | "08S01" | "70100"))
        }
        _ => false,
    }
}

/// Reads with a connection of the pool, again with the next one when it turns out to be dead.
macro_rules! read {
    ($pool:expr, |$connection:ident| $work:expr) => {{
        let mut tries = 1;
        loop {
            let mut $connection = match crate::backend::remote::acquire($pool).await {
                Ok(connection) => connection,
                Err(error) => break Err(error),
            };
            let outcome = crate::backend::remote::limited($work).await;
            match crate::backend::remote::settle($connection, outcome).await {
                Err(error)
                    if crate::backend::remote::broken(&error)
                        && tries < crate::backend::remote::READ_TRIES =>
                {
                    tries += 1;
                }
                outcome => break outcome,
            }
        }
    }};
}

pub(super) use read;
