//! Shutdown as a pair one can hold: signal once, complete when the last watch is dropped.
//!
//! ```text
//! main ── DrainSignal::drain ──> every DrainWatch: signaled() returns; stop taking new work
//!      <── all DrainWatch dropped: everything has finished
//! ```

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// The side that decides to stop.
#[derive(Debug)]
pub struct DrainSignal {
    start: watch::Sender<bool>,
    token: CancellationToken,
    /// Never carries anything: it closes when the last watch is gone.
    alive: mpsc::Receiver<()>,
}

/// The side that is told. Every live clone is work that the drain waits for.
#[derive(Debug, Clone)]
pub struct DrainWatch {
    started: watch::Receiver<bool>,
    token: CancellationToken,
    _alive: mpsc::Sender<()>,
}

/// A new pair.
pub fn channel() -> (DrainSignal, DrainWatch) {
    let (start, started) = watch::channel(false);
    let (alive_tx, alive) = mpsc::channel(1);
    let token = CancellationToken::new();
    (DrainSignal { start, token: token.clone(), alive }, DrainWatch { started, token, _alive: alive_tx })
}

// === impl DrainSignal ===

impl DrainSignal {
    /// Tells every watch, without waiting. May be called again.
    pub fn start(&self) {
        self.start.send_replace(true);
        self.token.cancel();
    }

    /// Tells every watch and waits until the last one is dropped.
    pub async fn drain(mut self) {
        self.start();
        // `None` once every sender is gone; nobody ever sends.
        while self.alive.recv().await.is_some() {}
    }
}

// === impl DrainWatch ===

impl DrainWatch {
    /// Returns when the drain has started; at once if it already has. Cancel-safe.
    ///
    /// A dropped [`DrainSignal`] counts as a drain: its program is on the way out.
    pub async fn signaled(&self) {
        let mut started = self.started.clone();
        // An error means that the signal is gone, which ends the wait just as well.
        let _ = started.wait_for(|started| *started).await;
    }

    /// Whether the drain has started.
    pub fn is_draining(&self) -> bool {
        *self.started.borrow() || self.started.has_changed().is_err()
    }

    /// A token cancelled when the drain starts. It does not delay the drain's end.
    pub fn token(&self) -> CancellationToken {
        self.token.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn drain_waits_for_the_last_watch() {
        let (signal, watch) = channel();
        let other = watch.clone();
        let token = watch.token();
        assert!(!watch.is_draining());
        drop(other);
        let work = tokio::spawn(async move {
            watch.signaled().await;
            assert!(watch.is_draining());
            watch
        });
        signal.drain().await_after(work).await;
        assert!(token.is_cancelled());
    }

    trait AwaitAfter: Sized {
        async fn await_after<T: Send + 'static>(self, work: tokio::task::JoinHandle<T>);
    }

    impl<F: std::future::Future<Output = ()>> AwaitAfter for F {
        async fn await_after<T: Send + 'static>(self, work: tokio::task::JoinHandle<T>) {
            let mut drain = std::pin::pin!(self);
            let held = tokio::select! {
                biased;
                () = &mut drain => panic!("drained while a watch was alive"),
                held = work => held.unwrap(),
            };
            drop(held);
            drain.await;
        }
    }

    #[tokio::test]
    async fn a_lost_signal_counts_as_drain() {
        let (signal, watch) = channel();
        drop(signal);
        watch.signaled().await;
        assert!(watch.is_draining());
    }
}
