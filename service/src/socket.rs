//! TCP sockets that notice when their peer has vanished.
//!
//! A peer that loses its power or its place in a NAT's table says nothing. Without keep-alive the connection, its
//! descriptor and its buffers stay for ever.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::net::sockopt;

/// A connection that was silent for this long is asked whether it is still there: below the idle limits of common NATs
/// and load balancers (300 s and more), and no burden with thousands of idle connections…
pub const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);

/// …again this often…
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// …and given up after this many questions without an answer: two minutes in all.
pub const KEEPALIVE_PROBES: u32 = 6;

/// How long sent bytes may stay unacknowledged on a connection whose peer always reads: as long as keep-alive takes.
pub const UNACKNOWLEDGED: Duration = Duration::from_secs(120);

/// Turns keep-alive on, and small writes leave at once. For every TCP socket that is accepted or dialled.
///
/// Best effort: a socket that has ended already says so to whoever reads it.
pub fn keep_alive(socket: impl AsFd) {
    let socket = socket.as_fd();
    let set = || {
        sockopt::set_tcp_nodelay(socket, true)?;
        sockopt::set_tcp_keepidle(socket, KEEPALIVE_IDLE)?;
        sockopt::set_tcp_keepintvl(socket, KEEPALIVE_INTERVAL)?;
        sockopt::set_tcp_keepcnt(socket, KEEPALIVE_PROBES)?;
        sockopt::set_socket_keepalive(socket, true)
    };
    if let Err(error) = set() {
        tracing::debug!(%error, "failed to turn TCP keep-alive on");
    }
}

/// Ends a connection whose peer acknowledges nothing for `limit` ([`UNACKNOWLEDGED`]), as `TCP_USER_TIMEOUT`: keep-alive
/// does not ask while sent bytes are under way, and the kernel itself gives up after a quarter of an hour only.
///
/// Only for peers that always read, such as the other end of a tunnel. Linux ends by the same limit a connection whose
/// peer is alive and has stopped reading, and a reader may pause for as long as it likes (`kubectl logs -f | less`).
pub fn limit_unacknowledged(socket: impl AsFd, limit: Duration) {
    let millis = u32::try_from(limit.as_millis()).unwrap_or(u32::MAX);
    if let Err(error) = sockopt::set_tcp_user_timeout(socket, millis) {
        tracing::debug!(%error, "failed to limit unacknowledged bytes");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::{TcpListener, TcpStream};

    #[tokio::test]
    async fn the_options_are_set() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        keep_alive(&near);
        limit_unacknowledged(&near, UNACKNOWLEDGED);
        assert!(sockopt::socket_keepalive(&near).unwrap());
        assert_eq!(sockopt::tcp_keepidle(&near).unwrap(), KEEPALIVE_IDLE);
        assert_eq!(sockopt::tcp_keepintvl(&near).unwrap(), KEEPALIVE_INTERVAL);
        assert_eq!(sockopt::tcp_keepcnt(&near).unwrap(), KEEPALIVE_PROBES);
        assert_eq!(sockopt::tcp_user_timeout(&near).unwrap(), 120_000);
        assert!(sockopt::tcp_nodelay(&near).unwrap());
    }
}
