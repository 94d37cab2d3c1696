//! The scenarios.

use std::{
    fmt::Write as _,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    ops::Range,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http::Method;
use serde_json::json;
use tokio::{task::JoinSet, time};

use super::eyes::{Eye, Look};
use super::fleet::{Fleet, HubWrites, Passes, Servers, Trouble, quiet};
use super::{Scenario, Sizes};
use crate::client::{Access, Client, Protocol};

const NAMESPACE: &str = "bench";
const OBJECTS: &str = "/apis/types.kubefed.io/v1beta2/namespaces/bench/federatedconfigmaps";
const LEASE: &str =
    "/apis/coordination.k8s.io/v1/namespaces/kube-federation-system/leases/cellway-federation-controller";
const CONFIG_MAPS: &str = "/api/v1/namespaces/bench/configmaps";
/// Bytes of a config map's one value: with its metadata half a KiB.
const VALUE: usize = 400;
/// Clients that create objects, each on a connection of its own.
const CLIENTS: usize = 16;
/// For one change to arrive everywhere.
const ARRIVAL: Duration = Duration::from_secs(60);
/// For new objects to arrive everywhere, beyond a tenth of a second for each in each member.
const FILL: Duration = Duration::from_secs(120);
/// A count that stands still for so long has come to rest: status writes come within tens of milliseconds.
const STILL: Duration = Duration::from_secs(2);
/// For counts to come to rest.
const REST: Duration = Duration::from_secs(300);
/// Changes begin so far apart at least: one by one is what is timed, not a queue of them.
const PACE: Duration = Duration::from_millis(40);
/// Between two tries to reach a hub that is starting.
const RETRY: Duration = Duration::from_millis(5);
/// Members of `isolation` that nothing is wrong with.
const WELL: usize = 7;
/// Objects where changes are timed in many members, and the number of objects is not what it is about.
const FEW: usize = 20;
/// Changes in one fleet before it is the other's turn.
const TURN: usize = 25;
/// So often the controller that this program plays renews its lease.
const RENEWAL: Duration = Duration::from_millis(500);
/// How long it leads.
const LEADING: Duration = Duration::from_secs(4);
/// For a hub to come back.
const COMEBACK: Duration = Duration::from_secs(120);

/// What a scenario has to say.
#[derive(Default)]
pub(super) struct Told {
    pub(super) figures: Vec<(&'static str, f64)>,
    pub(super) notes: Vec<String>,
}

/// A fleet with objects and those who watch it.
struct Stage {
    fleet: Fleet,
    members: Vec<Eye>,
    units: usize,
    objects: usize,
}

/// Runs one scenario on a fleet of its own.
pub(super) async fn tell(
    scenario: Scenario,
    servers: Servers,
    sizes: Sizes,
    cellway: &Path,
    directory: &Path,
) -> Result<Told> {
    if scenario == Scenario::Isolation {
        return isolation(sizes.isolation_changes, cellway, directory).await;
    }
    let (members, objects) = match scenario {
        Scenario::ConfigMaps | Scenario::Change | Scenario::Restart => (sizes.members, sizes.objects),
        Scenario::ChangeMany => (sizes.many_members, FEW),
        Scenario::Steady => (sizes.steady_members, sizes.steady_objects),
        Scenario::Isolation => (WELL, FEW),
    };
    let fleet = Fleet::start(servers, cellway, directory, members, &[]).await?;
    let mut stage = Stage::set(fleet, objects).await?;
    let mut told = Told::default();
    told.notes.push(format!("{scenario:?}: {objects} objects in {members} members"));
    let done = match scenario {
        Scenario::ConfigMaps => stage.config_maps(&mut told).await,
        Scenario::Change => stage.changes(sizes.changes, &mut told).await,
        // As many as the smaller fleets get would take long and say no more.
        Scenario::ChangeMany => stage.changes_in_many(sizes.changes.div_ceil(4), &mut told).await,
        Scenario::Restart => stage.restarts(&mut told).await,
        Scenario::Steady => stage.steady(Duration::from_secs(sizes.seconds), &mut told).await,
        // Two stages at once: told above.
        Scenario::Isolation => Ok(()),
    };
    stage.fleet.stop().await;
    done.map(|()| told)
}

/// Changes in members beside others that are in trouble, in turn with changes in as many without: what else the machine
/// does hits both alike.
async fn isolation(number: usize, cellway: &Path, directory: &Path) -> Result<Told> {
    const TROUBLES: [Trouble; 3] = [Trouble::Dead, Trouble::Hangs, Trouble::Far];
    let mut told = Told::default();
    // Only simulated members can be in trouble.
    let start = |name: &str, troubles: &'static [Trouble]| {
        let directory = directory.join(name);
        async move { Fleet::start(Servers::Ours, cellway, &directory, WELL, troubles).await }
    };
    let apart = Stage::set(start("apart", &[]).await?, FEW).await?;
    let beside = start("beside", &TROUBLES).await?;
    let mut beside = Stage::set(beside, FEW).await?;
    let (mut alone, mut together) = (Vec::new(), Vec::new());
    let done = async {
        apart.fill().await?;
        beside.fill().await?;
        beside.fleet.spoil().await?;
        beside.members.retain(|eye| !TROUBLES.iter().any(|of| of.member() == eye.name()));
        let mut from = 0;
        while from < number {
            let to = (from + TURN).min(number);
            alone.extend(apart.change_some(from..to).await?);
            together.extend(beside.change_some(from..to).await?);
            from = to;
        }
        anyhow::Ok(())
    };
    let done = done.await;
    apart.fleet.stop().await;
    beside.fleet.stop().await;
    done?;
    for (share, keys) in [
        (0.5, ["apart_p50", "beside_p50", "beside_more_p50"]),
        (0.99, ["apart_p99", "beside_p99", "beside_more_p99"]),
    ] {
        let (alone, together) = (quantile(&alone, share), quantile(&together, share));
        told.figure(keys[0], alone);
        told.figure(keys[1], together);
        told.figure(keys[2], (together / alone - 1.0) * 100.0);
    }
    told.notes.push(format!(
        "isolation: {number} changes of {FEW} objects in each of two fleets, {TURN} in turn, {} ms apart at least; the \
         trouble begins with the first",
        PACE.as_millis()
    ));
    Ok(told)
}

// === impl Stage ===

impl Stage {
    async fn set(fleet: Fleet, objects: usize) -> Result<Self> {
        let mut client = fleet.hub_client().await?;
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
        client.call(Method::POST, "/api/v1/namespaces", namespace.to_string().into()).await?;
        let mut members = Vec::new();
        for member in &fleet.members {
            members.push(Eye::open(&member.name, &member.access, CONFIG_MAPS, Look::Arrivals).await?);
        }
        let units = members.len();
        Ok(Self { fleet, members, units, objects })
    }

    fn fill_limit(&self) -> Duration {
        FILL + Duration::from_millis(100 * (self.objects * self.units) as u64)
    }

    /// Waits until every member has every object; the moment of the last.
    async fn arrived(&self) -> Result<Instant> {
        let mut last = Instant::now();
        for member in &self.members {
            last = last.max(member.count(self.objects, self.fill_limit()).await?);
        }
        Ok(last)
    }

    /// Creates the objects and waits until everything is in place and the hub writes nothing more.
    async fn fill(&self) -> Result<()> {
        create(&self.fleet.hub_access()?, self.objects).await?;
        self.arrived().await?;
        self.rest().await.map(drop)
    }

    /// Waits until the hub writes nothing more.
    async fn rest(&self) -> Result<u64> {
        quiet(
            || async {
                let mut client = self.fleet.hub_client().await?;
                Ok(self.fleet.hub_writes(&mut client).await?.total())
            },
            STILL,
            REST,
        )
        .await
    }

    async fn config_maps(&mut self, told: &mut Told) -> Result<()> {
        let access = self.fleet.hub_access()?;
        let hub = Eye::open("the hub", &access, OBJECTS, Look::Synced { units: self.units }).await?;
        let mut client = self.fleet.hub_client().await?;
        self.rest().await?;
        let before = self.fleet.hub_writes(&mut client).await?;
        let (hub_before, members_before) = (self.fleet.hub_usage()?, self.fleet.member_usage()?);
        let servers_before = self.fleet.server_usage()?.cpu_seconds;
        let begin = Instant::now();
        create(&access, self.objects).await?;
        told.figure("new_created", begin.elapsed().as_secs_f64());
        told.figure("new_arrived", (self.arrived().await? - begin).as_secs_f64());
        let synced = hub.count(self.objects, self.fill_limit()).await?;
        told.figure("new_synced", (synced - begin).as_secs_f64());
        self.rest().await?;
        let (hub_after, members_after) = (self.fleet.hub_usage()?, self.fleet.member_usage()?);
        let hub_cpu = hub_after.cpu_seconds - hub_before.cpu_seconds;
        let own = hub_cpu + members_after.cpu_seconds - members_before.cpu_seconds;
        told.figure("new_cpu", own + self.fleet.server_usage()?.cpu_seconds - servers_before);
        if self.fleet.is_beside() {
            told.figure("new_cpu_own", own);
        }
        told.figure("new_cpu_hub", hub_cpu);
        let writes = self.fleet.hub_writes(&mut client).await?.since(&before);
        let own = writes.total().saturating_sub(self.objects as u64);
        told.figure("new_writes", own as f64 / self.objects as f64);
        told.notes.push(format!("config-maps: hub writes: {}", writes.describe()));
        told.figure("new_memory", hub_after.resident_kib / 1024.0);
        Ok(())
    }

    async fn changes(&mut self, number: usize, told: &mut Told) -> Result<()> {
        self.fill().await?;
        let mut client = self.fleet.hub_client().await?;
        let before = self.fleet.hub_writes(&mut client).await?;
        let cpu = || -> Result<(f64, f64)> {
            let own = self.fleet.hub_usage()?.cpu_seconds + self.fleet.member_usage()?.cpu_seconds;
            Ok((own, self.fleet.server_usage()?.cpu_seconds))
        };
        let cpu_before = cpu()?;
        let times = self.change_each(number).await?;
        self.rest().await?;
        told.figure("change_p50", quantile(&times, 0.5));
        told.figure("change_p99", quantile(&times, 0.99));
        let cpu_after = cpu()?;
        let own = (cpu_after.0 - cpu_before.0) * 1000.0 / number as f64;
        let servers = (cpu_after.1 - cpu_before.1) * 1000.0 / number as f64;
        told.figure("change_cpu", own + servers);
        if self.fleet.is_beside() {
            told.figure("change_cpu_own", own);
        }
        let writes = self.fleet.hub_writes(&mut client).await?.since(&before);
        let own = writes.total().saturating_sub(number as u64);
        told.figure("change_writes", own as f64 / number as f64);
        told.notes.push(format!("change: {number} changes; hub writes: {}", writes.describe()));
        Ok(())
    }

    async fn changes_in_many(&mut self, number: usize, told: &mut Told) -> Result<()> {
        self.fill().await?;
        let times = self.change_each(number).await?;
        told.figure("many_p50", quantile(&times, 0.5));
        told.figure("many_p99", quantile(&times, 0.99));
        told.figure("many_memory", self.fleet.hub_usage()?.resident_kib / 1024.0);
        told.notes.push(format!("change-many: {number} changes"));
        Ok(())
    }

    /// Changes one object after the other; milliseconds from the request to the last member.
    async fn change_each(&self, number: usize) -> Result<Vec<f64>> {
        self.change_some(0..number).await
    }

    /// The same for changes of these numbers.
    async fn change_some(&self, numbers: Range<usize>) -> Result<Vec<f64>> {
        let mut client = self.fleet.hub_client().await?;
        let mut times = Vec::with_capacity(numbers.len());
        for index in numbers {
            let begin = Instant::now();
            // Objects in turn, spread: the next change does not meet the status of the one before.
            let name = name((index * 7) % self.objects);
            let stamp = format!("change-{index}");
            change(&mut client, &name, &stamp).await?;
            times.push((self.changed(&name, &stamp).await? - begin).as_secs_f64() * 1000.0);
            time::sleep(PACE.saturating_sub(begin.elapsed())).await;
        }
        Ok(times)
    }

    /// Waits until a change is in every member; the moment of the last.
    async fn changed(&self, name: &str, stamp: &str) -> Result<Instant> {
        let mut last = None;
        for member in &self.members {
            last = last.max(Some(member.stamp(name, stamp, ARRIVAL).await?));
        }
        last.context("there is no member")
    }

    async fn restarts(&mut self, told: &mut Told) -> Result<()> {
        self.fill().await?;
        let begin = Instant::now();
        self.fleet.stop_hub().await?;
        told.figure("clean_end", begin.elapsed().as_secs_f64());
        let back = self.come_back("clean").await?;
        told.figure("clean_restart", back.arrived.as_secs_f64());
        told.figure("clean_answers", back.answers.as_secs_f64());
        self.rest().await?;
        self.fleet.kill_hub().await;
        told.figure("killed_restart", self.come_back("killed").await?.arrived.as_secs_f64());
        self.rest().await?;
        told.figure("handed_over", self.take_over("handed", true).await?.as_secs_f64());
        told.figure("taken_over", self.take_over("taken", false).await?.as_secs_f64());
        told.notes.push(
            "restart: the hub is also the standby of a controller that leads and does nothing, played by this program"
                .into(),
        );
        Ok(())
    }

    /// Plays another controller that holds the lease, and then hands it back or is never heard of again; how long a
    /// change made at that moment takes.
    async fn take_over(&self, stamp: &str, hands_back: bool) -> Result<Duration> {
        let mut client = self.fleet.hub_client().await?;
        let begin = Instant::now();
        // Long enough for the hub's controller to have seen that it leads no more.
        while begin.elapsed() < LEADING {
            hold_lease(&mut client, Some("bench")).await?;
            time::sleep(RENEWAL).await;
        }
        hold_lease(&mut client, (!hands_back).then_some("bench")).await?;
        let begin = Instant::now();
        let name = name(0);
        change(&mut client, &name, stamp).await?;
        let took = self.changed(&name, stamp).await? - begin;
        ensure!(hands_back || took > RENEWAL, "the hub's controller acted while another held the lease");
        Ok(took)
    }

    /// Starts the hub and makes a change as soon as it answers.
    async fn come_back(&mut self, stamp: &str) -> Result<Back> {
        let begin = Instant::now();
        self.fleet.start_hub()?;
        let name = name(0);
        loop {
            self.fleet.check()?;
            let tried = async {
                let mut client = self.fleet.hub_client().await?;
                change(&mut client, &name, stamp).await
            };
            let Err(error) = tried.await else { break };
            ensure!(begin.elapsed() < COMEBACK, "the hub did not come back: {error:#}");
            time::sleep(RETRY).await;
        }
        let answers = begin.elapsed();
        let arrived = self.changed(&name, stamp).await? - begin;
        Ok(Back { answers, arrived })
    }

    async fn steady(&mut self, looking: Duration, told: &mut Told) -> Result<()> {
        let cpu = |fleet: &Fleet| -> Result<(f64, f64)> {
            Ok((fleet.hub_usage()?.cpu_seconds, fleet.member_usage()?.cpu_seconds))
        };
        let before = cpu(&self.fleet)?;
        let server_before = self.fleet.server_usage()?.cpu_seconds;
        let begin = Instant::now();
        create(&self.fleet.hub_access()?, self.objects).await?;
        told.figure("steady_fill", (self.arrived().await? - begin).as_secs_f64());
        self.rest().await?;
        let filled = cpu(&self.fleet)?;
        let server = self.fleet.server_usage()?.cpu_seconds - server_before;
        told.figure("steady_fill_cpu", filled.0 + filled.1 - before.0 - before.1 + server);

        let mut client = self.fleet.hub_client().await?;
        let writes = self.fleet.hub_writes(&mut client).await?;
        let passes = self.fleet.passes().await?;
        let (before, begin) = (cpu(&self.fleet)?, Instant::now());
        time::sleep(looking).await;
        let (after, seconds) = (cpu(&self.fleet)?, begin.elapsed().as_secs_f64());
        // The connection before has been idle for longer than the hub keeps one.
        let mut client = self.fleet.hub_client().await?;
        let writes = self.fleet.hub_writes(&mut client).await?.since(&writes);
        told.figure("steady_hub", (after.0 - before.0) * 100.0 / seconds);
        told.figure("steady_members", (after.1 - before.1) * 100.0 / seconds / self.units as f64);
        told.figure("steady_writes", writes.total() as f64);
        let passes = self.fleet.passes().await?.whole.saturating_sub(passes.whole);
        told.figure("steady_passes", passes as f64);
        told.notes.push(if passes >= self.objects as u64 {
            format!("steady: every object was looked at again in {seconds:.0} s, as every hour or so")
        } else {
            format!(
                "steady: the look at every object, which comes every hour or so, did not fall into these {seconds:.0} s; it \
                 takes no more CPU than the hub's after the cold restart"
            )
        });
        self.memory(["steady_memory", "steady_alone"], told)?;
        if self.fleet.is_beside() {
            told.figure("steady_beside", self.fleet.server_usage()?.resident_kib / 1024.0);
        }
        told.notes.push(format!(
            "steady: hub writes in {seconds:.0} s: {}; renewals of leases among them: {}",
            writes.describe(),
            writes.leases()
        ));

        self.fleet.stop_hub().await?;
        // A server beside the hub goes on counting.
        let writes = match self.fleet.is_beside() {
            true => self.fleet.hub_writes(&mut client).await?,
            false => HubWrites::default(),
        };
        let begin = Instant::now();
        let back = self.come_back("cold").await?;
        told.figure("cold_change", back.arrived.as_secs_f64());
        // Members' listings come one by one, and each has every object looked at: once all members are online, no more
        // passes come, and every object has had one with everything known, each has been compared with every member.
        let wanted = self.objects as u64;
        let mut last = (Passes::default(), begin);
        loop {
            let passes = self.fleet.passes().await?;
            if passes != last.0 {
                last = (passes, Instant::now());
            } else if passes.whole >= wanted && passes.online >= self.units && last.1.elapsed() >= STILL {
                break;
            }
            ensure!(begin.elapsed() < COMEBACK, "{passes:?} over {wanted} objects, and no rest");
            time::sleep(Duration::from_millis(50)).await;
        }
        told.figure("cold_synced", (last.1 - begin).as_secs_f64());
        told.figure("cold_cpu", self.fleet.hub_usage()?.cpu_seconds);
        let mut client = self.fleet.hub_client().await?;
        let writes = self.fleet.hub_writes(&mut client).await?.since(&writes);
        told.figure("cold_writes", writes.total().saturating_sub(1) as f64);
        self.memory(["cold_memory", "cold_alone"], told)?;
        told.notes.push(format!(
            "steady: after the cold restart {} whole passes, {} before everything was listed; hub writes: {}",
            last.0.whole,
            last.0.other,
            writes.describe()
        ));
        Ok(())
    }

    /// The hub's memory: under the first key with the hub API in it, under the second without.
    fn memory(&self, [all, alone]: [&'static str; 2], told: &mut Told) -> Result<()> {
        let key = if self.fleet.is_beside() { alone } else { all };
        told.figure(key, self.fleet.hub_usage()?.resident_kib / 1024.0);
        Ok(())
    }
}

/// How a hub came back.
struct Back {
    answers: Duration,
    arrived: Duration,
}

// === impl Told ===

impl Told {
    fn figure(&mut self, key: &'static str, value: f64) {
        self.figures.push((key, value));
    }
}

fn name(index: usize) -> String {
    format!("cm-{index:06}")
}

/// Creates so many federated config maps, from several clients at once.
async fn create(access: &Access, objects: usize) -> Result<()> {
    let next = Arc::new(AtomicUsize::new(0));
    let mut tasks = JoinSet::new();
    for _ in 0..CLIENTS {
        let mut client = Client::connect(access, Protocol::H2).await?;
        let next = Arc::clone(&next);
        tasks.spawn(async move {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= objects {
                    return Ok::<(), anyhow::Error>(());
                }
                client.call(Method::POST, OBJECTS, federated(&name(index))).await?;
            }
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.context("a client broke off")??;
    }
    Ok(())
}

fn federated(name: &str) -> Bytes {
    json!({
        "apiVersion": "types.kubefed.io/v1beta2",
        "kind": "FederatedConfigMap",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "topologyType": "cluster",
            "template": {"data": {"value": value(name), "stamp": "first"}},
            "placement": {"unitSelector": {}},
        },
    })
    .to_string()
    .into()
}

/// An object's own value, in which nothing comes twice: what the hub packs is not to gain by it.
fn value(name: &str) -> String {
    let mut value = String::with_capacity(VALUE + 16);
    let mut piece = 0_usize;
    while value.len() < VALUE {
        let mut hasher = DefaultHasher::new();
        (name, piece).hash(&mut hasher);
        // Writing to a string does not fail.
        let _ = write!(value, "{:016x}", hasher.finish());
        piece += 1;
    }
    value.truncate(VALUE);
    value
}

async fn change(client: &mut Client, name: &str, stamp: &str) -> Result<()> {
    let patch = json!({"spec": {"template": {"data": {"stamp": stamp}}}});
    client.call(Method::PATCH, &format!("{OBJECTS}/{name}"), patch.to_string().into()).await.map(drop)
}

/// Takes the controllers' lease and renews it, or hands it back.
async fn hold_lease(client: &mut Client, holder: Option<&str>) -> Result<()> {
    let lease = client.json(Method::GET, LEASE, Bytes::new()).await?;
    // A candidate counts from the last change that it saw, whatever changed.
    let transitions = lease["spec"]["leaseTransitions"].as_i64().unwrap_or_default() + 1;
    let spec = json!({"holderIdentity": holder.unwrap_or_default(), "leaseTransitions": transitions});
    client.call(Method::PATCH, LEASE, json!({ "spec": spec }).to_string().into()).await.map(drop)
}

/// The nearest rank.
fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = ((sorted.len() as f64 * share).ceil() as usize).clamp(1, sorted.len().max(1));
    sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_of_one_size_and_each_objects_own() {
        assert_eq!(value("a").len(), VALUE);
        assert_eq!(value("a"), value("a"));
        assert_ne!(value("a")[..16], value("b")[..16]);
        assert_ne!(value("a")[..16], value("a")[16..32]);
    }

    #[test]
    fn quantiles_are_values_that_occurred() {
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!([0.5, 0.99, 1.0].map(|share| quantile(&values, share)), [50.0, 99.0, 100.0]);
        assert_eq!(quantile(&[3.0], 0.99), 3.0);
        assert!(quantile(&[], 0.5).is_nan());
    }
}
