//! Agents that have gone without a word: a machine without power, a path that swallows all. Keep-alive finds them within half a
//! minute; a dial that has somewhere else to go does not wait as long.

use std::time::Duration;

use tokio::time::{sleep, timeout};

use crate::registry::Tunnel;

/// An agent that has not answered a dial for so long is asked for a sign of life, and has as long again for that. A member on the
/// other side of the world, with packets lost, answers within it.
const SILENCE: Duration = Duration::from_secs(1);

/// Ends when the agent gives no sign of life any more. One that does may take its time with a target that does not answer.
pub(crate) async fn falls_silent<T: Tunnel>(tunnel: &T) {
    loop {
        sleep(SILENCE).await;
        if timeout(SILENCE, tunnel.ping()).await != Ok(true) {
            return;
        }
    }
}
