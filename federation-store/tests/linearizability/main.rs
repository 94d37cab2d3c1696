//! Several replicas in processes of their own on one database, killed at random, with connections cut and the database
//! itself killed and restarted: nothing acknowledged is lost, nothing is done twice, every answer fits one order, and
//! every watch is whole. `history` has the checker, `replica` what the processes do.
//!
//! The long run: `CELLWAY_LINEARIZABILITY_OPERATIONS=100000 cargo test --release -p federation-store --test linearizability --
//! --nocapture --test-threads=1`. It wants the machine for itself, as it also checks how soon events reach the other
//! replicas; elsewhere that is printed.

// The checks are in functions that the tests call. This thread is no worker of a runtime: between two kills it lets time
// pass. What was checked is printed, for the long run.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::print_stdout)]

mod history;
mod replica;

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use federation_store::{Compaction, Event, KeyRange, Location, Revision, Store, StoreConfig};
use rand::Rng as _;
use test_support::databases::{Kind, Server};
use test_support::relay::{Impairment, Relay};

use self::history::{Disturbance, Process, Summary};

const OPERATIONS: &str = "CELLWAY_LINEARIZABILITY_OPERATIONS";

/// Enough to meet every kind of answer; the long run is for by hand.
const DEFAULT_OPERATIONS: usize = 3_000;

/// So many are waited for when the last of the faults that a run wants is over: what they left behind shows in these.
const AFTERWARDS: usize = 500;

const REPLICAS: usize = 3;

/// A machine that is busy with everything else; whoever waits longer has found a hang.
const LONG: Duration = Duration::from_secs(180);

/// The promise: so soon 99 of 100 events are at the other replicas.
const PROMPT: Duration = Duration::from_millis(100);

/// The same of events that a kill or the start fell into, after it: a follower that failed looks again after a quarter of a
/// second, and may have to connect anew.
const PROMPT_AGAIN: Duration = Duration::from_secs(2);

/// Half of the events come sooner than this on any machine, unless each waits for the slow timer that notifications have
/// beside them.
const NOT_BY_CHANCE: Duration = Duration::from_millis(500);

/// The child: not a test of its own.
#[test]
fn replica_process() {
    let Ok(url) = std::env::var(replica::URL) else { return };
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(replica::run(&url));
}

struct Replica {
    child: Child,
    input: ChildStdin,
    history: Arc<Mutex<Process>>,
    reader: std::thread::JoinHandle<()>,
}

/// What was done to a run, or has to be before it may end.
#[derive(Debug, Default, Clone, Copy)]
struct Faults {
    /// Replicas that were killed.
    kills: usize,
    /// Times that all connections to the database were cut.
    cuts: usize,
    /// Kills of the database.
    databases: usize,
}

// === impl Faults ===

impl Faults {
    fn cover(self, wanted: Self) -> bool {
        self.kills >= wanted.kills && self.cuts >= wanted.cuts && self.databases >= wanted.databases
    }
}

// === impl Replica ===

impl Replica {
    fn start(url: &str, id: usize, pace: u64) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "replica_process", "--nocapture", "--test-threads=1"])
            .env(replica::URL, url)
            .env(replica::ID, id.to_string())
            .env(replica::PACE, pace.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let input = child.stdin.take().unwrap();
        let history = Arc::new(Mutex::new(Process::default()));
        let kept = Arc::clone(&history);
        let reader = std::thread::spawn(move || {
            let mut line = String::new();
            // A kill may cut the last line in the middle of a number.
            while lines.read_line(&mut line).is_ok_and(|_| line.ends_with('\n')) {
                kept.lock().unwrap().line(line.trim_end());
                line.clear();
            }
        });
        Self { child, input, history, reader }
    }

    fn say(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
        self.input.flush().unwrap();
    }

    /// SIGKILL; what it said until then.
    fn kill(mut self) -> Process {
        // It may have failed by itself, which its history will not fit.
        let _ = self.child.kill();
        self.finish()
    }

    fn finish(mut self) -> Process {
        self.child.wait().unwrap();
        self.reader.join().expect("the history of a replica");
        std::mem::take(&mut *self.history.lock().unwrap())
    }

    fn see<T>(&self, look: impl FnOnce(&Process) -> T) -> T {
        look(&self.history.lock().unwrap())
    }
}

fn wait(what: &str, mut until: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !until() {
        assert!(begun.elapsed() < LONG, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Everything in the log.
async fn read_log(url: &str) -> (Vec<Event>, Revision) {
    let config = StoreConfig { location: Location::parse(url).unwrap(), compaction: Compaction::Manual };
    let store = Store::open(config).await.unwrap();
    let newest = store.sync().await.unwrap();
    let mut watcher = store.watch(KeyRange::prefix(""), Revision(1)).unwrap();
    let mut log = Vec::new();
    while watcher.progress() < newest {
        log.extend(watcher.next_batch().await.unwrap().iter().map(|event| Event::clone(event)));
    }
    store.close().await;
    (log, newest)
}

/// Runs replicas until they have done so many operations and have been through the faults that are wanted. When it wants
/// any, a replica is killed and `disturb`, which tells what it did, is called again and again meanwhile.
fn run(
    runtime: &tokio::runtime::Runtime,
    url: &str,
    operations: usize,
    pace: u64,
    wanted: Faults,
    mut disturb: impl FnMut(usize) -> Faults,
) -> Summary {
    let mut processes: Vec<Process> = Vec::new();
    let mut started = 0;
    let mut start = || {
        started += 1;
        Replica::start(url, started, pace)
    };
    let mut replicas: Vec<Replica> = (0..REPLICAS).map(|_| start()).collect();
    let begun = Instant::now();
    // A replica that starts makes its connections while it writes and reads already.
    let start_up = replica::now();
    wait("the replicas to start", || replicas.iter().all(|replica| replica.see(Process::has_begun)));
    let mut disturbances = vec![Disturbance { begun: start_up, over: replica::now() }];
    let mut faults = Faults::default();
    // Known when all faults have been.
    let mut enough = None;
    let limit = LONG.max(Duration::from_millis(operations as u64 * 20));
    loop {
        let gone: usize = processes.iter().map(Process::operations).sum();
        let here: usize = replicas.iter().map(|replica| replica.see(Process::operations)).sum();
        let done = gone + here;
        if faults.cover(wanted) && done >= *enough.get_or_insert(operations.max(done + AFTERWARDS)) {
            break;
        }
        assert!(
            begun.elapsed() < limit,
            "only {done} of {operations} operations and {faults:?} of {wanted:?} in {limit:?}"
        );
        // A replica of a long run lives long enough to do something.
        let pause = if operations > 10_000 { 1_000..3_000 } else { 300..900 };
        std::thread::sleep(Duration::from_millis(rand::rng().random_range(pause)));
        if wanted.kills == 0 {
            continue;
        }
        let victim = rand::rng().random_range(0..REPLICAS);
        let kill = replica::now();
        let fresh = start();
        processes.push(std::mem::replace(&mut replicas[victim], fresh).kill());
        faults.kills += 1;
        let more = disturb(faults.kills);
        faults.cuts += more.cuts;
        faults.databases += more.databases;
        disturbances.push(Disturbance { begun: kill, over: replica::now() });
    }
    let elapsed = begun.elapsed();
    for replica in &mut replicas {
        // One that was just started is not there yet.
        replica.say("stop");
    }
    wait("the writers to stop", || replicas.iter().all(|replica| replica.see(|history| history.stopped)));
    let (log, newest) = runtime.block_on(read_log(url));
    for replica in &mut replicas {
        replica.say(&newest.to_string());
    }
    wait("the watchers to end", || replicas.iter().all(|replica| replica.see(|history| history.ended)));
    processes.extend(replicas.into_iter().map(Replica::finish));
    let summary = history::check(&processes, &log, &disturbances);
    println!(
        "{} operations in {elapsed:.0?} by {} processes, {} killed, connections cut {} times, the database killed {} \
         times: {} applied, {} conflicts, {} failed, {} unanswered of which {} applied, {} reads; {} events in the \
         log, {} seen; no violation",
        summary.operations,
        processes.len(),
        faults.kills,
        faults.cuts,
        faults.databases,
        summary.applied,
        summary.conflicts,
        summary.failed,
        summary.unanswered,
        summary.unanswered_applied,
        summary.reads,
        summary.log,
        summary.events,
    );
    println!(
        "  from an answer to its event in another replica, nothing killed or started meanwhile: {:?}",
        summary.delays
    );
    println!("  of those that a kill or the start fell into, from its end: {:?}", summary.late);
    summary
}

/// How many operations somebody asked for who has the machine for it.
fn asked() -> Option<usize> {
    std::env::var(OPERATIONS).ok()?.parse().ok()
}

fn operations() -> usize {
    asked().unwrap_or(DEFAULT_OPERATIONS)
}

/// Events came in time, where nothing else wants the machine. A run that is killed all the time has few that no kill fell
/// into: what is said of them is said of a hundred at least.
fn in_time(summary: &Summary) {
    for (delays, limit) in [(&summary.delays, PROMPT), (&summary.late, PROMPT_AGAIN)] {
        let holds = delays.number() < 100 || delays.percentile(99) < limit;
        assert!(asked().is_none() || holds, "the p99 is not below {limit:?}: {delays:?}");
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Of a run with faults: sixteen writers of a process that is killed always wait for something.
fn checked(summary: &Summary) {
    assert!(
        summary.applied > 0
            && summary.conflicts > 0
            && summary.unanswered > 0
            && summary.reads > 0
            && summary.events > 0,
        "{summary:?}"
    );
    in_time(summary);
}

fn on_server(kind: Kind) {
    let runtime = runtime();
    let mut server = test_support::require!(runtime.block_on(Server::start(kind)).unwrap());
    let relay =
        runtime.block_on(Relay::tcp(([127, 0, 0, 1], server.port()).into(), Impairment::default())).unwrap();
    let url = runtime.block_on(server.database()).unwrap();
    let url = server.through(&url, relay.address().port());
    let wanted = Faults { kills: 1, cuts: 1, databases: 1 };
    // A long run kills the database now and then.
    let summary = run(&runtime, &url, operations(), 0, wanted, |kills| match kills % 12 {
        2 | 7 | 10 => {
            relay.cut();
            Faults { cuts: 1, ..Faults::default() }
        }
        4 => {
            runtime.block_on(async {
                server.kill().await.unwrap();
                server.restart().await.unwrap();
            });
            Faults { databases: 1, ..Faults::default() }
        }
        _ => Faults::default(),
    });
    checked(&summary);
}

#[test]
fn sqlite_replicas_are_one_store() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}", folder.path().join("store.db").display());
    let wanted = Faults { kills: 1, ..Faults::default() };
    checked(&run(&runtime(), &url, operations(), 0, wanted, |_| Faults::default()));
}

#[test]
fn postgresql_replicas_are_one_store() {
    on_server(Kind::Postgres);
}

#[test]
fn mariadb_replicas_are_one_store() {
    on_server(Kind::MariaDb);
}

#[test]
fn mysql_replicas_are_one_store() {
    on_server(Kind::MySql);
}

#[test]
fn oceanbase_replicas_are_one_store() {
    on_server(Kind::OceanBase);
}

/// Writes at a modest pace, so that waiting for the machine is not what is measured, and nothing is killed. On a machine
/// that is busy with others a few may come late all the same: there the median has to do. What it was is printed, a line
/// for each kind of database.
fn prompt(runtime: &tokio::runtime::Runtime, name: &str, url: &str) {
    let operations = asked().map_or(2_000, |asked| (asked / 20).max(2_000));
    let summary = run(runtime, url, operations, 60, Faults::default(), |_| Faults::default());
    let [median, most, longest] =
        [50, 99, 100].map(|percent| summary.delays.percentile(percent).as_secs_f64() * 1e3);
    println!(
        "| events at other replicas, {name} | p50 {median:.1} ms | p99 {most:.1} ms | longest {longest:.1} ms | of {} |",
        summary.delays.number()
    );
    assert!(summary.delays.number() > 100, "{:?}", summary.delays);
    let median = summary.delays.percentile(50);
    assert!(median < NOT_BY_CHANCE, "the median of the delay is {median:?}");
    in_time(&summary);
}

fn prompt_on_server(kind: Kind) {
    let runtime = runtime();
    let server = test_support::require!(runtime.block_on(Server::start(kind)).unwrap());
    prompt(&runtime, &format!("{kind:?}"), &runtime.block_on(server.database()).unwrap());
}

#[test]
fn events_reach_other_replicas_promptly_on_sqlite() {
    let folder = tempfile::tempdir().unwrap();
    prompt(&runtime(), "SQLite", &format!("sqlite://{}", folder.path().join("store.db").display()));
}

#[test]
fn events_reach_other_replicas_promptly_on_postgresql() {
    prompt_on_server(Kind::Postgres);
}

#[test]
fn events_reach_other_replicas_promptly_on_mariadb() {
    prompt_on_server(Kind::MariaDb);
}

#[test]
fn events_reach_other_replicas_promptly_on_mysql() {
    prompt_on_server(Kind::MySql);
}

#[test]
fn events_reach_other_replicas_promptly_on_oceanbase() {
    prompt_on_server(Kind::OceanBase);
}
