//! Which servers to hold tunnels to, and when to dial them: a state machine without a clock or a socket.
//!
//! ```text
//!                      next()                       connected()
//!   known, due ─────────────────────▶ connecting ───────────────▶ held ──lost()──▶ known, later
//!       ▲                                  │                        │
//!       └────────────── failed(): later ◀──┘                        └─draining()─▶ held, does not count
//! ```
//!
//! Addresses come from the configuration, which never changes, and from the servers themselves, whose latest word
//! replaces the one before. An address is not a server: a load balancer's address leads to any of them, and so the
//! servers' own ids decide whether a new tunnel is another one of the same ([`Verdict::Duplicate`]).
//!
//! The time comes in with every call and the randomness at construction; the caller does what [`ServerSet::next`] says
//! and reports what became of it.

use std::time::{Duration, Instant};

use rand::Rng;
use tunnel::Target;

/// The most addresses taken from a server. A hub has a handful of servers; its word is bounded all the same.
const MAX_LEARNED: usize = 64;

/// A tunnel that lived this long was a success: the next dial begins with the shortest delay.
const STABLE_AFTER: Duration = Duration::from_secs(30);

/// After a server has said no (revoked, unknown, wrong certificate): somebody has to do something first, and the hub
/// should not have to say so every second.
const REFUSED_BASE: Duration = Duration::from_secs(15);
const REFUSED_CAP: Duration = Duration::from_secs(300);

/// After an address led to a server that already has a tunnel: behind a load balancer the next try may differ.
const DUPLICATE_BASE: Duration = Duration::from_secs(10);
const DUPLICATE_CAP: Duration = Duration::from_secs(300);

/// After a tunnel that was a success the delays begin so much shorter. They double once and then stay for
/// [`QUICK_TRIES`], a second or so: a server that restarts is found again soon after it is back. From then on they double as
/// all do, and one that stays away is left alone for long.
const QUICK: u32 = 8;
const QUICK_TRIES: u32 = 8;

/// No delay is shorter, however the dice fall: a hub that is starting is dialled by all of its agents.
const SHORTEST_DELAY: Duration = Duration::from_millis(50);

/// How many servers to hold tunnels to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// This many, or as many as there are.
    Count(usize),
    /// Every server that is known.
    All,
}

/// How delays between dials grow.
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    /// The bound of the first delay.
    pub base: Duration,
    /// The bound of every delay.
    pub cap: Duration,
}

/// Why a dial came to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// It may work in a moment.
    Transient,
    /// The server answered: not now. It is there, and may have too much to do already.
    Busy,
    /// The server said no: it will go on doing so until somebody changes something.
    Refused,
}

/// What to do with a tunnel that has just been established.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Keep it; the id names it from now on.
    Keep(u64),
    /// There is one to this server already: close the new one.
    Duplicate,
}

/// The servers that are known, and the tunnels that are held.
#[derive(Debug)]
pub struct ServerSet<R> {
    wanted: Wanted,
    backoff: Backoff,
    rng: R,
    addresses: Vec<Address>,
    held: Vec<Held>,
    next_id: u64,
}

#[derive(Debug)]
struct Address {
    text: String,
    configured: bool,
    learned: bool,
    connecting: bool,
    failures: u32,
    /// The failures follow on a tunnel that was a success.
    quick: bool,
    duplicates: u32,
    /// The server it led to when that was a duplicate.
    alias_of: Option<String>,
    not_before: Instant,
}

#[derive(Debug)]
struct Held {
    id: u64,
    address: String,
    server_id: String,
    draining: bool,
    since: Instant,
}

// === impl ServerSet ===

impl<R: Rng> ServerSet<R> {
    /// Begins with the configured addresses, all of them due now.
    pub fn new(configured: Vec<String>, wanted: Wanted, backoff: Backoff, rng: R, now: Instant) -> Self {
        let mut addresses: Vec<Address> = Vec::new();
        for text in configured {
            if addresses.iter().all(|address| address.text != text) {
                addresses.push(Address { configured: true, ..Address::new(text, now) });
            }
        }
        Self { wanted, backoff, rng, addresses, held: Vec::new(), next_id: 1 }
    }

    /// An address to dial now, which counts as being dialled until [`Self::connected`] or [`Self::failed`].
    pub fn next(&mut self, now: Instant) -> Option<String> {
        if self.missing() == 0 {
            return None;
        }
        let due: Vec<usize> = (0..self.addresses.len())
            .filter(|index| self.is_free(*index) && self.addresses[*index].not_before <= now)
            .collect();
        let fewest = due.iter().map(|index| self.addresses[*index].failures).min()?;
        let best: Vec<usize> =
            due.into_iter().filter(|index| self.addresses[*index].failures == fewest).collect();
        // Random, so that the agents of many members spread over the servers.
        let index = best[self.rng.random_range(0..best.len())];
        self.addresses[index].connecting = true;
        Some(self.addresses[index].text.clone())
    }

    /// When [`Self::next`] may have an answer if nothing else happens before; `None`: not until something happens.
    pub fn next_due(&self) -> Option<Instant> {
        if self.missing() == 0 {
            return None;
        }
        (0..self.addresses.len())
            .filter(|index| self.is_free(*index))
            .map(|index| self.addresses[index].not_before)
            .min()
    }

    /// A dial has become a tunnel to the server with this id.
    pub fn connected(&mut self, address: &str, server_id: &str, now: Instant) -> Verdict {
        let duplicate = self.held.iter().any(|held| held.server_id == server_id && !held.draining);
        let id = self.next_id;
        let mut delay = Duration::ZERO;
        if duplicate {
            let times = self.find(address).map_or(0, |address| address.duplicates);
            delay = self.delay(DUPLICATE_BASE, DUPLICATE_CAP, times);
        }
        if let Some(known) = self.find(address) {
            // Failures count until the tunnel has proved stable: one that is thrown out at once was no success.
            known.connecting = false;
            if duplicate {
                known.duplicates = known.duplicates.saturating_add(1);
                known.alias_of = Some(server_id.to_owned());
                known.not_before = now + delay;
            } else {
                known.duplicates = 0;
                known.alias_of = None;
            }
        }
        if duplicate {
            return Verdict::Duplicate;
        }
        self.next_id += 1;
        self.held.push(Held {
            id,
            address: address.to_owned(),
            server_id: server_id.to_owned(),
            draining: false,
            since: now,
        });
        Verdict::Keep(id)
    }

    /// A dial has come to nothing. Returns how long this address is left alone.
    pub fn failed(&mut self, address: &str, failure: Failure, now: Instant) -> Duration {
        let (failures, quick) = self.find(address).map_or((0, false), |known| (known.failures, known.quick));
        let quick = quick && failure != Failure::Busy;
        let delay = self.pause(failure, failures, quick);
        if let Some(known) = self.find(address) {
            known.connecting = false;
            known.quick = quick;
            known.failures = known.failures.saturating_add(1);
            known.not_before = now + delay;
        }
        self.forget();
        delay
    }

    fn pause(&mut self, failure: Failure, failures: u32, quick: bool) -> Duration {
        match failure {
            Failure::Transient | Failure::Busy => {
                if !quick {
                    return self.delay(self.backoff.base, self.backoff.cap, failures);
                }
                let doublings = failures.min(1) + failures.saturating_sub(QUICK_TRIES);
                self.delay(self.backoff.base / QUICK, self.backoff.cap, doublings)
            }
            // Half of it is certain: a small draw must not turn a refusal into a storm.
            Failure::Refused => {
                REFUSED_BASE / 2 + self.delay(REFUSED_BASE, REFUSED_CAP.max(self.backoff.cap), failures) / 2
            }
        }
    }

    /// A tunnel has ended, for whatever reason: `failure` says whether the server turned the agent away for good.
    pub fn lost(&mut self, id: u64, failure: Failure, now: Instant) {
        let Some(index) = self.held.iter().position(|held| held.id == id) else { return };
        let held = self.held.swap_remove(index);
        let stable = failure == Failure::Transient
            && (held.draining || now.saturating_duration_since(held.since) >= STABLE_AFTER);
        let failures = self.find(&held.address).map_or(0, |known| if stable { 0 } else { known.failures });
        let delay = self.pause(failure, failures, stable);
        if let Some(known) = self.find(&held.address) {
            known.quick = stable;
            known.failures = if stable { 0 } else { known.failures.saturating_add(1) };
            // While it was held, another tunnel may have been dialled at the same address (drain).
            known.not_before = known.not_before.max(now + delay);
        }
        // What was only another way to that server may be the way to its successor.
        for index in 0..self.addresses.len() {
            if self.addresses[index].alias_of.as_deref() == Some(held.server_id.as_str()) {
                let delay = self.delay(self.backoff.base, self.backoff.cap, 0);
                let address = &mut self.addresses[index];
                address.alias_of = None;
                address.not_before = address.not_before.min(now + delay);
            }
        }
        self.forget();
    }

    /// The server of this tunnel is draining: it takes no new work, so another one is wanted in its place.
    pub fn draining(&mut self, id: u64) {
        let Some(held) = self.held.iter_mut().find(|held| held.id == id) else { return };
        held.draining = true;
        let address = held.address.clone();
        // It is dialled from now on, although its server may just be ending.
        if let Some(known) = self.find(&address) {
            known.quick = true;
            known.failures = 0;
        }
    }

    /// A server's word on which servers there are now. What is no address is left out.
    pub fn learned(&mut self, servers: &[String], now: Instant) {
        if servers.is_empty() {
            // A server that does not know its own address says nothing: what was said before still stands.
            return;
        }
        for address in &mut self.addresses {
            address.learned = false;
        }
        let valid = servers.iter().filter(|server| server.parse::<Target>().is_ok()).take(MAX_LEARNED);
        for server in valid {
            match self.addresses.iter_mut().find(|address| address.text == *server) {
                Some(address) => address.learned = true,
                None => {
                    self.addresses.push(Address { learned: true, ..Address::new(server.clone(), now) });
                }
            }
        }
        self.forget();
    }

    /// Tunnels held to servers that are not draining.
    pub fn serving(&self) -> usize {
        self.held.iter().filter(|held| !held.draining).count()
    }

    /// The addresses known now.
    pub fn known(&self) -> impl Iterator<Item = &str> {
        self.addresses.iter().map(|address| address.text.as_str())
    }

    fn missing(&self) -> usize {
        let learned = self.addresses.iter().filter(|address| address.learned).count();
        let configured = self.addresses.iter().filter(|address| address.configured).count();
        let there_are = learned.max(configured);
        let wanted = match self.wanted {
            Wanted::Count(count) => count.min(there_are),
            Wanted::All => there_are,
        };
        let connecting = self.addresses.iter().filter(|address| address.connecting).count();
        wanted.max(1).saturating_sub(self.serving() + connecting)
    }

    /// Whether a dial may begin at this address as far as the tunnels are concerned.
    fn is_free(&self, index: usize) -> bool {
        let address = &self.addresses[index];
        !address.connecting && !self.held.iter().any(|held| held.address == address.text && !held.draining)
    }

    fn find(&mut self, text: &str) -> Option<&mut Address> {
        self.addresses.iter_mut().find(|address| address.text == text)
    }

    /// Drops addresses that nobody speaks of and nothing uses.
    fn forget(&mut self) {
        let held = &self.held;
        self.addresses.retain(|address| {
            address.configured
                || address.learned
                || address.connecting
                || held.iter().any(|held| held.address == address.text)
        });
    }

    /// Full jitter: anything up to a bound that doubles with every failure.
    fn delay(&mut self, base: Duration, cap: Duration, failures: u32) -> Duration {
        let bound = base.saturating_mul(2u32.saturating_pow(failures.min(30))).min(cap);
        bound.mul_f64(self.rng.random::<f64>()).max(SHORTEST_DELAY.min(cap))
    }
}

// === impl Address ===

impl Address {
    fn new(text: String, now: Instant) -> Self {
        Self {
            text,
            configured: false,
            learned: false,
            connecting: false,
            failures: 0,
            quick: false,
            duplicates: 0,
            alias_of: None,
            not_before: now,
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    const BACKOFF: Backoff = Backoff { base: Duration::from_secs(1), cap: Duration::from_secs(10) };

    fn set(addresses: &[&str], wanted: Wanted, now: Instant) -> ServerSet<StdRng> {
        let addresses = addresses.iter().map(|address| (*address).to_owned()).collect();
        ServerSet::new(addresses, wanted, BACKOFF, StdRng::seed_from_u64(7), now)
    }

    fn servers(list: &[&str]) -> Vec<String> {
        list.iter().map(|server| (*server).to_owned()).collect()
    }

    fn kept(verdict: Verdict) -> u64 {
        match verdict {
            Verdict::Keep(id) => id,
            Verdict::Duplicate => panic!("a duplicate"),
        }
    }

    #[test]
    fn one_address_gives_one_tunnel_until_others_are_learned() {
        let now = Instant::now();
        let mut set = set(&["lb:8091"], Wanted::Count(2), now);
        assert_eq!(set.next(now).as_deref(), Some("lb:8091"));
        assert_eq!(set.next(now), None, "it is being dialled");
        kept(set.connected("lb:8091", "s1", now));
        assert_eq!(set.next(now), None);
        assert_eq!(set.next_due(), None);

        // The balancer led to a:1, which the agent cannot know before it dials it.
        set.learned(&servers(&["a:1", "b:1", "c:1"]), now);
        let mut dialled = vec![];
        while set.serving() < 2 {
            let address = set.next(now).unwrap();
            let server = format!("s{}", address.as_bytes()[0] - b'a' + 1);
            assert_eq!(set.next(now), None, "one is missing, one is dialled");
            if set.connected(&address, &server, now) == Verdict::Duplicate {
                assert_eq!(address, "a:1");
            }
            dialled.push(address);
        }
        assert!(dialled.len() <= 2);
        assert_eq!(set.next(now + Duration::from_secs(3600)), None, "two is what was wanted");
    }

    #[test]
    fn all_means_every_server() {
        let now = Instant::now();
        let mut set = set(&["a:1", "b:1"], Wanted::All, now);
        set.learned(&servers(&["a:1", "b:1", "c:1"]), now);
        let mut dialled: Vec<String> = std::iter::from_fn(|| set.next(now)).collect();
        dialled.sort();
        assert_eq!(dialled, ["a:1", "b:1", "c:1"]);
    }

    #[test]
    fn delays_grow_are_jittered_and_bounded() {
        let start = Instant::now();
        let mut set = set(&["a:1"], Wanted::Count(2), start);
        let mut now = start;
        let mut delays = vec![];
        for _ in 0..200 {
            assert_eq!(set.next(now).as_deref(), Some("a:1"));
            let delay = set.failed("a:1", Failure::Transient, now);
            assert_eq!(set.next_due(), Some(now + delay));
            assert_eq!(set.next(now + delay - Duration::from_millis(1)), None);
            now += delay;
            delays.push(delay);
        }
        assert!(delays[0] <= BACKOFF.base);
        assert!(delays.iter().all(|delay| (SHORTEST_DELAY..=BACKOFF.cap).contains(delay)));
        let late = &delays[10..];
        let mean = late.iter().sum::<Duration>() / late.len() as u32;
        assert!((Duration::from_secs(4)..Duration::from_secs(6)).contains(&mean), "{mean:?}");
        assert!(late.iter().any(|delay| *delay < Duration::from_secs(2)), "full jitter reaches down");
    }

    #[test]
    fn a_refusal_is_not_repeated_soon() {
        let now = Instant::now();
        let mut set = set(&["a:1"], Wanted::Count(1), now);
        for _ in 0..50 {
            let delay = set.failed("a:1", Failure::Refused, now);
            assert!(delay >= REFUSED_BASE / 2, "{delay:?}");
            assert!(delay <= REFUSED_CAP);
        }
    }

    #[test]
    fn a_failing_address_gives_way_to_the_others() {
        let now = Instant::now();
        let mut set = set(&["a:1", "b:1"], Wanted::Count(1), now);
        for _ in 0..5 {
            set.failed("a:1", Failure::Transient, now);
        }
        let later = now + Duration::from_secs(60);
        assert_eq!(set.next(later).as_deref(), Some("b:1"), "fewer failures first");
    }

    #[test]
    fn a_stable_tunnel_is_redialled_quickly_and_a_flapping_one_is_not() {
        let start = Instant::now();
        let mut set = set(&["a:1"], Wanted::Count(1), start);
        let mut now = start;
        for _ in 0..20 {
            let address = set.next(now).unwrap();
            let id = kept(set.connected(&address, "s1", now));
            now += STABLE_AFTER;
            set.lost(id, Failure::Transient, now);
            let due = set.next_due().unwrap();
            assert!(due <= now + BACKOFF.base);
            now = due;
        }
        let mut longest = Duration::ZERO;
        for _ in 0..20 {
            let address = set.next(now).unwrap();
            // Attached, and thrown out at once: that is no success.
            let id = kept(set.connected(&address, "s1", now));
            set.lost(id, Failure::Transient, now);
            longest = longest.max(set.next_due().unwrap() - now);
            now = set.next_due().unwrap();
        }
        assert!(longest > BACKOFF.base, "{longest:?}");
    }

    #[test]
    fn one_that_says_not_now_is_not_dialled_like_one_that_restarts() {
        let delays = (0..200).map(|seed| {
            let start = Instant::now();
            let rng = StdRng::seed_from_u64(seed);
            let mut set = ServerSet::new(vec!["a:1".to_owned()], Wanted::Count(1), BACKOFF, rng, start);
            set.next(start).unwrap();
            let id = kept(set.connected("a:1", "s1", start));
            set.lost(id, Failure::Transient, start + STABLE_AFTER);
            let now = set.next_due().unwrap();
            set.next(now).unwrap();
            set.failed("a:1", Failure::Busy, now)
        });
        let longest = delays.max().unwrap();
        assert!(longest > BACKOFF.base / 2, "{longest:?}");
    }

    #[test]
    fn a_server_that_restarts_is_found_soon_after_it_is_back() {
        const TIMES: u32 = 200;
        let mut seeds = 0..;
        let mut found_after = |length: Duration| {
            let start = Instant::now();
            let addresses = vec!["a:1".to_owned()];
            let rng = StdRng::seed_from_u64(seeds.next().unwrap());
            let mut set = ServerSet::new(addresses, Wanted::Count(1), BACKOFF, rng, start);
            set.next(start).unwrap();
            let id = kept(set.connected("a:1", "s1", start));
            set.draining(id);
            let begin = start + STABLE_AFTER;
            set.lost(id, Failure::Transient, begin);
            let mut now = set.next_due().unwrap();
            while now < begin + length {
                set.next(now).unwrap();
                set.failed("a:1", Failure::Transient, now);
                now = set.next_due().unwrap();
            }
            now - begin - length
        };
        for (away, found) in [(300, 200), (800, 200), (1500, 1500), (4000, 4000)] {
            let (away, found) = (Duration::from_millis(away), Duration::from_millis(found));
            let mean = (0..TIMES).map(|_| found_after(away)).sum::<Duration>() / TIMES;
            assert!(mean < found, "{mean:?} after {away:?}");
        }
    }

    #[test]
    fn a_draining_server_is_replaced_at_once() {
        let now = Instant::now();
        let mut set = set(&["lb:1"], Wanted::Count(2), now);
        let address = set.next(now).unwrap();
        let first = kept(set.connected(&address, "s1", now));
        set.draining(first);
        // Through the same address: it is the only one, and the balancer knows better by now.
        assert_eq!(set.next(now).as_deref(), Some("lb:1"));
        let second = kept(set.connected("lb:1", "s2", now));
        assert_eq!(set.serving(), 1);
        set.lost(first, Failure::Transient, now + Duration::from_secs(5));
        assert_eq!(set.next(now + Duration::from_secs(60)), None);
        set.lost(second, Failure::Transient, now + Duration::from_secs(60));
        assert!(set.next_due().is_some());
    }

    #[test]
    fn a_duplicate_waits_until_its_server_is_lost() {
        let now = Instant::now();
        let mut set = set(&["a:1", "b:1"], Wanted::Count(2), now);
        let first = set.next(now).unwrap();
        let second = set.next(now).unwrap();
        let id = kept(set.connected(&first, "s1", now));
        assert_eq!(set.connected(&second, "s1", now), Verdict::Duplicate);
        assert_eq!(set.next(now), None);
        let due = set.next_due().unwrap();
        assert!(due > now && due <= now + DUPLICATE_CAP);
        set.lost(id, Failure::Transient, now);
        assert!(set.next_due().unwrap() <= now + BACKOFF.base);
    }

    #[test]
    fn a_server_that_is_gone_is_forgotten_but_the_configuration_is_not() {
        let now = Instant::now();
        let mut set = set(&["a:1"], Wanted::Count(2), now);
        set.learned(&servers(&["b:1", "c:1", "not an address", ""]), now);
        assert_eq!(set.known().collect::<Vec<_>>(), ["a:1", "b:1", "c:1"]);
        let id = loop {
            let address = set.next(now).unwrap();
            if address == "b:1" {
                break kept(set.connected("b:1", "sb", now));
            }
            set.failed(&address, Failure::Transient, now);
        };
        set.learned(&servers(&["c:1"]), now);
        assert_eq!(set.known().collect::<Vec<_>>(), ["a:1", "b:1", "c:1"], "a tunnel is held to it");
        set.learned(&[], now);
        assert!(set.known().any(|known| known == "c:1"), "silence changes nothing");
        set.lost(id, Failure::Transient, now);
        assert_eq!(set.known().collect::<Vec<_>>(), ["a:1", "c:1"]);
        let many: Vec<String> = (0..10_000).map(|port| format!("s:{}", port + 1)).collect();
        set.learned(&many, now);
        assert!(set.known().count() <= MAX_LEARNED + 2);
    }
}
