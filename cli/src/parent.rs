//! Being a child that does not outlive whoever started it, and the race between running and stopping.

use std::{future::Future, process::ExitCode};

use service::signals::Ending;
use tokio::io::AsyncReadExt as _;

/// Returns when standard input is closed, if that is how the one who started this says farewell; never otherwise.
pub(crate) async fn gone(watch: bool) {
    if !watch {
        return std::future::pending().await;
    }
    let mut input = tokio::io::stdin();
    let mut buffer = [0; 64];
    // An error is an end as well.
    while input.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
}

/// Runs until the work ends by itself or the stop is through. The work goes on while the stop drains it.
pub(crate) async fn run<E>(
    work: impl Future<Output = Result<(), E>>,
    stop: impl Future<Output = Ending>,
) -> Result<ExitCode, E> {
    tokio::pin!(work, stop);
    tokio::select! {
        ended = &mut work => ended.map(|()| ExitCode::SUCCESS),
        ending = &mut stop => Ok(ending.into()),
    }
}
