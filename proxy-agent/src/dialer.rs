//! Opens TCP connections inside the member, for destinations that the policy allows.
//!
//! The address that is dialled is the one that was judged: a name is resolved once, every address it resolved to is
//! held against the policy, and only those that passed are dialled. There is no second look-up that could give
//! something else.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    sync::Arc,
    time::Duration,
};

use rustix::{
    io::Errno,
    net::{self, AddressFamily, SocketFlags, SocketType},
};
use tokio::{net::TcpStream, sync::Semaphore, time::Instant};
use tunnel::{DialError, Target, policy::DestinationPolicy, race};

/// Look-ups under way at once: each blocks a thread of the runtime's 512, which others need too.
const MAX_LOOKUPS: usize = 128;

/// How long a dial waits for one of the slots. A burst passes in this time; against destinations that never answer
/// another agent does better, and the server tries one.
const SLOT_WAIT: Duration = Duration::from_secs(1);

/// Resolves names and connects.
#[derive(Debug, Clone)]
pub struct Dialer {
    policy: Arc<DestinationPolicy>,
    /// Dials under way: each holds a descriptor.
    slots: Arc<Semaphore>,
    lookups: Arc<Semaphore>,
}

// === impl Dialer ===

impl Dialer {
    /// A dialer that has at most `concurrent` dials under way.
    pub fn new(policy: DestinationPolicy, concurrent: usize) -> Self {
        Self {
            policy: Arc::new(policy),
            slots: Arc::new(Semaphore::new(concurrent)),
            lookups: Arc::new(Semaphore::new(MAX_LOOKUPS)),
        }
    }

    /// The policy.
    pub fn policy(&self) -> &DestinationPolicy {
        &self.policy
    }

    /// Connects within `timeout`, resolution included.
    ///
    /// # Errors
    /// Says whose fault it was: policy, name, destination, path, or this agent's own limits.
    pub async fn dial(&self, target: &Target, timeout: Duration) -> Result<TcpStream, DialError> {
        let deadline = Instant::now() + timeout;
        // What no rule allows costs no slot.
        self.check(target)?;
        let slot = tokio::time::timeout(SLOT_WAIT.min(timeout), self.slots.acquire());
        let Ok(Ok(_slot)) = slot.await else {
            return Err(DialError::TooManyConnections);
        };
        let connect = async {
            let addresses = self.resolve(target).await?;
            connect_any(addresses).await.map_err(|error| dial_error(&error))
        };
        tokio::time::timeout_at(deadline, connect).await.unwrap_or(Err(DialError::TimedOut))
    }

    /// Whether the policy can allow this destination at all, before anybody is asked what its name means.
    fn check(&self, Target { host, port }: &Target) -> Result<(), DialError> {
        let allowed = match host.parse::<IpAddr>() {
            Ok(address) => self.policy.allows_addr(address, *port),
            Err(_) => self.policy.may_allow(host, *port),
        };
        if allowed { Ok(()) } else { Err(DialError::NotAllowed) }
    }

    /// The addresses that may be dialled, in the order in which to try them.
    async fn resolve(&self, target: &Target) -> Result<Vec<SocketAddr>, DialError> {
        let Target { host, port } = target;
        // An address needs no resolver, and was judged before.
        if let Ok(address) = host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(address, *port)]);
        }
        // The semaphore is never closed.
        let _lookup = self.lookups.acquire().await;
        let resolved = tokio::net::lookup_host((host.as_str(), *port)).await.map_err(|error| {
            tracing::debug!(host, %error, "failed to resolve");
            DialError::UnknownHost
        })?;
        let mut addresses: Vec<SocketAddr> = Vec::new();
        let mut any = false;
        for address in resolved {
            any = true;
            if self.policy.allows_resolved(host, address.ip(), *port) && !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        if addresses.is_empty() {
            return Err(if any { DialError::NotAllowed } else { DialError::UnknownHost });
        }
        Ok(race::interleave(addresses))
    }
}

async fn connect_any(addresses: Vec<SocketAddr>) -> io::Result<TcpStream> {
    race::first(addresses, connect)
        .await
        .map_err(|error| error.unwrap_or_else(|| io::Error::other("no address to connect to")))
}

async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let (socket, connected) = begin(address)?;
    let stream = TcpStream::from_std(socket.into())?;
    if !connected {
        stream.writable().await?;
        if let Some(error) = stream.take_error()? {
            return Err(error);
        }
    }
    // The tunnel has gathered what belongs together: waiting for more only adds delay. Keep-alive follows once the
    // connection has lasted.
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Begins to connect; true when it is connected already. A destination on this machine is, before the first call returns:
/// asking once more costs no more than asking the socket for its error later, and saves waiting for the runtime to tell.
fn begin(address: SocketAddr) -> io::Result<(OwnedFd, bool)> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = net::socket_with(family, SocketType::STREAM, flags, None)?;
    for _ in 0..2 {
        match net::connect(&socket, &address) {
            Ok(()) | Err(Errno::ISCONN) => return Ok((socket, true)),
            Err(Errno::INPROGRESS | Errno::ALREADY) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok((socket, false))
}

fn dial_error(error: &io::Error) -> DialError {
    /// ENFILE and EMFILE: ours, not the destination's fault.
    const OUT_OF_DESCRIPTORS: [i32; 2] = [23, 24];
    match error.raw_os_error() {
        Some(code) if OUT_OF_DESCRIPTORS.contains(&code) => DialError::TooManyConnections,
        _ => DialError::from(error),
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(10);

    fn dialer(rules: &str) -> Dialer {
        Dialer::new(rules.parse().unwrap(), 16)
    }

    async fn listener() -> (TcpListener, u16) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        (listener, port)
    }

    fn target(host: &str, port: u16) -> Target {
        Target { host: host.to_owned(), port }
    }

    #[tokio::test]
    async fn allowed_destinations_are_reached_by_address_and_by_name() {
        let (_listener, port) = listener().await;
        for rules in ["127.0.0.0/8", "127.0.0.1:*"] {
            dialer(rules).dial(&target("127.0.0.1", port), TIMEOUT).await.unwrap();
        }
        // ::1 may come first and refuse; the other address is then tried.
        for rules in ["localhost", "127.0.0.1 [::1]", &format!("localhost:{port}")] {
            dialer(rules).dial(&target("localhost", port), TIMEOUT).await.unwrap();
        }
        let everything = Dialer::new(DestinationPolicy::allow_everything(), 16);
        everything.dial(&target("localhost", port), TIMEOUT).await.unwrap();
    }

    #[tokio::test]
    async fn what_no_rule_allows_is_not_dialled() {
        let (listener, port) = listener().await;
        for rules in ["", "*", "10.0.0.0/8", "*.internal", "localhost:1"] {
            for host in ["127.0.0.1", "localhost"] {
                let outcome = dialer(rules).dial(&target(host, port), TIMEOUT).await;
                assert_eq!(outcome.unwrap_err(), DialError::NotAllowed, "{rules} {host}");
            }
        }
        let nobody = tokio::time::timeout(Duration::from_millis(1), listener.accept()).await;
        assert!(nobody.is_err(), "nothing has reached the destination");
    }

    #[tokio::test]
    async fn failures_say_whose_they_are() {
        let (listener, port) = listener().await;
        drop(listener);
        let all = dialer("* 127.0.0.1");
        let refused = all.dial(&target("127.0.0.1", port), TIMEOUT).await.unwrap_err();
        assert_eq!(refused, DialError::Refused);
        let unknown = all.dial(&target("no-such-host.invalid", port), TIMEOUT).await.unwrap_err();
        assert_eq!(unknown, DialError::UnknownHost);
        let late = all.dial(&target("127.0.0.1", port), Duration::ZERO).await.unwrap_err();
        assert!(matches!(late, DialError::TimedOut | DialError::Refused | DialError::TooManyConnections));
        let none = Dialer::new("127.0.0.1".parse().unwrap(), 0);
        let full = none.dial(&target("127.0.0.1", port), TIMEOUT).await.unwrap_err();
        assert_eq!(full, DialError::TooManyConnections);
    }

    #[tokio::test]
    async fn the_first_address_that_answers_wins() {
        let (listener, _) = listener().await;
        let good = listener.local_addr().unwrap();
        let (dead, port) = self::listener().await;
        drop(dead);
        let dead = SocketAddr::from(([127, 0, 0, 1], port));
        let stream = connect_any(vec![dead, dead, good]).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), good);
        assert_eq!(connect_any(vec![dead]).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        connect_any(vec![]).await.unwrap_err();
    }

    #[tokio::test]
    async fn one_that_takes_its_time_is_waited_for() {
        // Nobody accepts, and the queue is full: the kernel drops what asks for more until there is room.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let listener = socket.listen(1).unwrap();
        let address = listener.local_addr().unwrap();
        let mut waiting = Vec::new();
        let pending = loop {
            let (socket, connected) = begin(address).unwrap();
            if !connected {
                break socket;
            }
            waiting.push(socket);
            assert!(waiting.len() < 100, "the queue never fills");
        };
        drop(pending);
        let dialling = tokio::spawn(connect(address));
        for _ in 0..waiting.len() {
            listener.accept().await.unwrap();
        }
        let stream = tokio::time::timeout(TIMEOUT, dialling).await.unwrap().unwrap().unwrap();
        assert_eq!(stream.peer_addr().unwrap(), address);
        assert!(stream.take_error().unwrap().is_none());
    }

    #[tokio::test]
    async fn small_messages_leave_at_once() {
        let (_listener, port) = listener().await;
        let stream = dialer("127.0.0.1").dial(&target("127.0.0.1", port), TIMEOUT).await.unwrap();
        assert!(stream.nodelay().unwrap());
        // One that is alive may stop reading for as long as it likes.
        assert_eq!(rustix::net::sockopt::tcp_user_timeout(&stream).unwrap(), 0);
    }
}
