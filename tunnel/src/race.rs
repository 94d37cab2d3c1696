//! Connecting to one of several addresses of a name ("Happy Eyeballs", RFC 8305 §5).

use std::{net::SocketAddr, time::Duration};

use futures::{StreamExt, stream::FuturesUnordered};

/// How long one address has for itself before the next is tried beside it (RFC 8305 recommends 250 ms).
const STAGGER: Duration = Duration::from_millis(250);

/// The most addresses of one name that are tried: no dial has the time for more.
pub const MAX_ADDRESSES: usize = 8;

/// Alternates the address families, beginning with the resolver's first choice, so that one broken family costs one
/// stagger and not many. At most [`MAX_ADDRESSES`].
pub fn interleave(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let first_is_v6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (first, second): (Vec<_>, Vec<_>) =
        addresses.into_iter().partition(|address| address.is_ipv6() == first_is_v6);
    let mut second = second.into_iter();
    let mut ordered = Vec::new();
    for address in first {
        ordered.push(address);
        ordered.extend(second.next());
    }
    ordered.extend(second);
    ordered.truncate(MAX_ADDRESSES);
    ordered
}

/// The first connection that succeeds; a new attempt begins when one failed or the last has had its time.
///
/// # Errors
/// The last attempt's; `None` when there was no address.
pub async fn first<T, E, F: Future<Output = Result<T, E>>>(
    addresses: Vec<SocketAddr>,
    connect: impl Fn(SocketAddr) -> F,
) -> Result<T, Option<E>> {
    // By far the most common case, and every dial of a busy agent passes here.
    if let [address] = addresses[..] {
        return connect(address).await.map_err(Some);
    }
    let mut waiting = addresses.into_iter();
    let mut attempts = FuturesUnordered::new();
    let mut last_error = None;
    loop {
        match waiting.next() {
            Some(address) => attempts.push(connect(address)),
            None if attempts.is_empty() => return Err(last_error),
            None => {}
        }
        let stagger = async {
            if waiting.len() == 0 { std::future::pending().await } else { tokio::time::sleep(STAGGER).await }
        };
        tokio::select! {
            Some(outcome) = attempts.next() => match outcome {
                Ok(connection) => return Ok(connection),
                Err(error) => last_error = Some(error),
            },
            () = stagger => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(list: &[&str]) -> Vec<SocketAddr> {
        list.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn families_alternate() {
        let mixed = addresses(&["[2001:db8::1]:1", "[2001:db8::2]:1", "[2001:db8::3]:1", "192.0.2.1:1"]);
        let ordered = addresses(&["[2001:db8::1]:1", "192.0.2.1:1", "[2001:db8::2]:1", "[2001:db8::3]:1"]);
        assert_eq!(interleave(mixed), ordered);
        let many = vec!["192.0.2.1:1".parse().unwrap(); 100];
        assert_eq!(interleave(many).len(), MAX_ADDRESSES);
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_never_answers_costs_a_stagger() {
        let begin = tokio::time::Instant::now();
        let connect = |address: SocketAddr| async move {
            match address.port() {
                1 => std::future::pending().await,
                2 => Err("refused"),
                _ => Ok(address),
            }
        };
        let good: SocketAddr = "192.0.2.3:3".parse().unwrap();
        let found = first(addresses(&["192.0.2.1:1", "192.0.2.2:2", "192.0.2.3:3"]), connect).await;
        assert_eq!(found, Ok(good));
        assert_eq!(begin.elapsed(), STAGGER, "one that fails costs no time");
        assert_eq!(first(addresses(&["192.0.2.2:2", "192.0.2.2:2"]), connect).await, Err(Some("refused")));
        assert_eq!(first(vec![], connect).await, Err(None));
    }
}
