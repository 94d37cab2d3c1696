//! Limits per client: a token bucket for the rate of dials, a count for what is open at one time.
//!
//! Pure: the time is an argument. Both tables are bounded; a flood of distinct clients cannot grow them.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Clients remembered at one time. An entry takes about 100 bytes; at the bound idle ones are forgotten first.
const MAX_CLIENTS: usize = 16 * 1024;

/// The least time between two sweeps of a full table.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// A token bucket per client.
#[derive(Debug)]
pub struct RateLimiter<K> {
    rate: f64,
    burst: f64,
    buckets: Mutex<Buckets<K>>,
}

#[derive(Debug)]
struct Buckets<K> {
    of: HashMap<K, Bucket>,
    /// A sweep looks at every bucket, so a flood of new clients gets one only now and then.
    swept: Option<Instant>,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    tokens: f64,
    at: Instant,
}

/// A count per client.
#[derive(Debug)]
pub struct ConcurrencyLimiter<K: Eq + Hash> {
    limit: usize,
    counts: Mutex<HashMap<K, usize>>,
}

/// One of a client's places, given back on drop.
#[derive(Debug)]
pub struct ClientPlace<K: Eq + Hash> {
    limiter: Arc<ConcurrencyLimiter<K>>,
    key: Option<K>,
}

// === impl RateLimiter ===

impl<K: Eq + Hash> RateLimiter<K> {
    /// `rate` a second with bursts of `burst`; a rate of 0 lets everything pass.
    pub fn new(rate: u32, burst: u32) -> Self {
        let buckets = Buckets { of: HashMap::new(), swept: None };
        Self { rate: f64::from(rate), burst: f64::from(burst.max(1)), buckets: Mutex::new(buckets) }
    }

    /// Takes a token of `key` at `now`; false when there is none.
    pub fn allow(&self, key: K, now: Instant) -> bool {
        if self.rate <= 0.0 {
            return true;
        }
        let mut buckets = self.buckets.lock();
        let Buckets { of, swept } = &mut *buckets;
        if of.len() >= MAX_CLIENTS && !of.contains_key(&key) {
            let due = swept.is_none_or(|last| now.saturating_duration_since(last) >= SWEEP_INTERVAL);
            if due {
                *swept = Some(now);
                // A full bucket says nothing that a missing one does not.
                let (rate, burst) = (self.rate, self.burst);
                of.retain(|_, bucket| bucket.filled(rate, burst, now) < burst);
            }
            if of.len() >= MAX_CLIENTS {
                return false;
            }
        }
        let bucket = of.entry(key).or_insert(Bucket { tokens: self.burst, at: now });
        bucket.tokens = bucket.filled(self.rate, self.burst, now);
        bucket.at = now;
        let allowed = bucket.tokens >= 1.0;
        if allowed {
            bucket.tokens -= 1.0;
        }
        allowed
    }
}

impl Bucket {
    fn filled(&self, rate: f64, burst: f64, now: Instant) -> f64 {
        (self.tokens + now.saturating_duration_since(self.at).as_secs_f64() * rate).min(burst)
    }
}

// === impl ConcurrencyLimiter ===

impl<K: Eq + Hash + Clone> ConcurrencyLimiter<K> {
    /// At most `limit` places for each client; 0 is no limit.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, counts: Mutex::new(HashMap::new()) })
    }

    /// A place for `key`, or `None` when it has all of its own.
    pub fn enter(self: &Arc<Self>, key: &K) -> Option<ClientPlace<K>> {
        if self.limit == 0 {
            return Some(ClientPlace { limiter: self.clone(), key: None });
        }
        let mut counts = self.counts.lock();
        if let Some(count) = counts.get_mut(key) {
            if *count >= self.limit {
                return None;
            }
            *count += 1;
        } else {
            if counts.len() >= MAX_CLIENTS {
                return None;
            }
            counts.insert(key.clone(), 1);
        }
        Some(ClientPlace { limiter: self.clone(), key: Some(key.clone()) })
    }
}

impl<K: Eq + Hash> Drop for ClientPlace<K> {
    fn drop(&mut self) {
        let Some(key) = self.key.take() else { return };
        let mut counts = self.limiter.counts.lock();
        if let Some(count) = counts.get_mut(&key) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_fills_with_time() {
        let limiter = RateLimiter::new(10, 3);
        let start = Instant::now();
        assert_eq!((0..5).filter(|_| limiter.allow("a", start)).count(), 3);
        assert!(limiter.allow("b", start), "another client is not harmed");
        assert!(!limiter.allow("a", start + Duration::from_millis(50)));
        assert!(limiter.allow("a", start + Duration::from_millis(160)));
        let later = start + Duration::from_secs(100);
        assert_eq!((0..9).filter(|_| limiter.allow("a", later)).count(), 3, "the burst is the most");
    }

    #[test]
    fn rate_zero_is_no_limit() {
        let limiter = RateLimiter::new(0, 1);
        let now = Instant::now();
        assert!((0..1000).all(|_| limiter.allow("a", now)));
    }

    #[test]
    fn the_table_is_bounded() {
        let limiter = RateLimiter::new(1, 2);
        let now = Instant::now();
        assert_eq!((0..2 * MAX_CLIENTS).filter(|n| limiter.allow(*n, now)).count(), MAX_CLIENTS);
        // A second later their buckets are full again and may be forgotten.
        assert!(limiter.allow(usize::MAX, now + Duration::from_secs(2)));
        assert!(limiter.buckets.lock().of.len() < MAX_CLIENTS);
    }

    #[test]
    fn places_are_given_back() {
        let limiter = ConcurrencyLimiter::new(2);
        let one = limiter.enter(&"a").unwrap();
        let _two = limiter.enter(&"a").unwrap();
        assert!(limiter.enter(&"a").is_none());
        assert!(limiter.enter(&"b").is_some());
        drop(one);
        assert!(limiter.enter(&"a").is_some());
        assert_eq!(limiter.counts.lock().len(), 1, "clients without connections are forgotten");
    }
}
