//! Waiting until something is so, instead of sleeping and hoping.

use std::{
    fmt,
    future::Future,
    time::{Duration, Instant},
};

/// Often enough to be prompt, seldom enough to leave the machine to what is being waited for.
const POLL: Duration = Duration::from_millis(25);

/// What was waited for did not come about in time.
#[derive(Debug, thiserror::Error)]
#[error("waited {limit:?} for {what}, in vain{last}")]
pub struct TimedOut {
    what: String,
    limit: Duration,
    last: LastSeen,
}

/// What the last look saw, when it can say.
#[derive(Debug)]
struct LastSeen(Option<String>);

impl fmt::Display for LastSeen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(seen) => write!(f, "; last seen: {seen}"),
            None => Ok(()),
        }
    }
}

/// Waits until `predicate` holds, at most `limit`. The error says what was waited for.
pub async fn wait_for(
    mut predicate: impl FnMut() -> bool,
    limit: Duration,
    what: impl fmt::Display,
) -> Result<(), TimedOut> {
    let start = Instant::now();
    loop {
        if predicate() {
            return Ok(());
        }
        if start.elapsed() >= limit {
            return Err(TimedOut { what: what.to_string(), limit, last: LastSeen(None) });
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Waits until `look` gives a value, at most `limit`, and gives that value back. What `look` says in its error is what
/// the final error shows: "two tunnels of three", say.
pub async fn wait_until<T, E, F, Fut>(
    mut look: F,
    limit: Duration,
    what: impl fmt::Display,
) -> Result<T, TimedOut>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, E>>,
    E: fmt::Display,
{
    let start = Instant::now();
    let mut seen = None;
    loop {
        let left = limit.saturating_sub(start.elapsed());
        match tokio::time::timeout(left, look()).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => seen = Some(error.to_string()),
            Err(_) => {}
        }
        if start.elapsed() >= limit {
            return Err(TimedOut { what: what.to_string(), limit, last: LastSeen(seen) });
        }
        tokio::time::sleep(POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn gives_the_value_or_says_what_was_missing() {
        let mut looks = 0;
        let value = wait_until(
            || {
                looks += 1;
                let looks = looks;
                async move { if looks < 3 { Err("not yet") } else { Ok(looks) } }
            },
            Duration::from_secs(5),
            "three looks",
        )
        .await
        .unwrap();
        assert_eq!(value, 3);

        let error = wait_until(|| async { Err::<(), _>("only two") }, Duration::from_millis(30), "a third")
            .await
            .unwrap_err();
        assert_eq!(error.to_string(), "waited 30ms for a third, in vain; last seen: only two");
        let error = wait_for(|| false, Duration::from_millis(1), "the moon").await.unwrap_err();
        assert_eq!(error.to_string(), "waited 1ms for the moon, in vain");
    }
}
