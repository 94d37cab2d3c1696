//! The runtime of the programs that relay: how many threads it takes.

use std::{env, io, num::NonZero, thread};

use tokio::runtime::{Builder, Runtime};

/// tokio's own variable for the number of its worker threads.
const WORKER_THREADS: &str = "TOKIO_WORKER_THREADS";

/// A runtime with one worker thread for every two processors that this process may use, at least one, unless the
/// environment's `TOKIO_WORKER_THREADS` says how many.
///
/// More than half of what a relayed connection costs is the kernel's, most of that for waking threads, and the
/// neighbours on the machine need their share: on two processors one thread relays as fast as two and opens
/// connections a sixth faster (docs/performance.md).
///
/// # Errors
/// The operating system gave no thread or no epoll instance.
pub fn for_relays() -> io::Result<Runtime> {
    let mut builder = Builder::new_multi_thread();
    if env::var_os(WORKER_THREADS).is_none() {
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        builder.worker_threads((processors / 2).max(1));
    }
    builder.enable_all().build()
}
