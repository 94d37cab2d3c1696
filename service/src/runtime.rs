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
        builder.worker_threads(workers(thread::available_parallelism().map_or(1, NonZero::get)));
    }
    builder.enable_all().build()
}

fn workers(processors: usize) -> usize {
    (processors / 2).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relay_has_half_of_the_processors_and_does_io_and_waits_with_one_thread() {
        assert_eq!([1, 2, 3, 4, 64].map(workers), [1, 1, 1, 2, 32]);
        let runtime = for_relays().unwrap();
        if env::var_os(WORKER_THREADS).is_none() {
            let processors = thread::available_parallelism().unwrap().get();
            assert_eq!(runtime.metrics().num_workers(), workers(processors));
        } else {
            eprintln!("the number of threads is not looked at: {WORKER_THREADS} is set");
        }
        // A socket and a timer, on its own threads.
        let done = runtime.spawn(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
            let (near, far) =
                tokio::join!(tokio::net::TcpStream::connect(listener.local_addr()?), listener.accept());
            let _both = (near?, far?);
            tokio::time::timeout(std::time::Duration::ZERO, std::future::pending::<()>()).await.unwrap_err();
            Ok::<_, io::Error>(())
        });
        runtime.block_on(done).unwrap().unwrap();
    }
}
