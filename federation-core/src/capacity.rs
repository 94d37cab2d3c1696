//! Room: how many more pods of a workload the nodes of a unit can take, as allocatable minus requested.
//!
//! It is an estimate, made as a scheduler would make it from what objects say: requests of cpu, memory and any other
//! resource, the number of pods, readiness and cordons, taints, node selectors and required node affinity. What it does not
//! know (volumes, spreading, affinity between pods, preemption) shows later: pods that stay unschedulable are counted
//! here too, and replicas are moved away for them.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

/// Most nodes of a member that are looked at: twice what Kubernetes supports in one cluster.
pub const MAX_NODES: usize = 10_000;
/// Most groups of unschedulable pods that are remembered of one member; more of them say nothing new.
const MAX_WAITING: usize = 2_000;
/// Most groups of pods that are told apart by their labels; pods of further ones count as nobody's.
const MAX_GROUPS: usize = 50_000;
/// The most pods that anything is said to have room for.
const MAX_PODS: i64 = 1_000_000;
/// A scheduler that has not found a place for a pod for so long will not find one soon; KubeFed's figure.
const STAYS_UNSCHEDULABLE: SignedDuration = SignedDuration::from_secs(60);
/// Thousandths, which quantities are counted in.
const MILLI: i128 = 1000;

/// What a member's nodes have left.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Room {
    nodes: BTreeMap<String, Node>,
    waiting: Vec<Waiting>,
    /// Pods that have a node, by namespace and labels.
    bound: BTreeMap<(String, BTreeMap<String, String>), i64>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Node {
    /// Whether new pods go there at all.
    open: bool,
    labels: BTreeMap<String, String>,
    taints: Vec<Taint>,
    /// By resource, in thousandths; below zero where more is requested than there is.
    free: BTreeMap<String, i128>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Taint {
    key: String,
    value: String,
    effect: String,
}

/// A pod that has no node.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Waiting {
    namespace: String,
    labels: BTreeMap<String, String>,
    /// Whether it has been so for long.
    stays: bool,
}

/// What is known of a member's room.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum RoomView {
    /// Nobody has looked, or the answer is not there yet.
    #[default]
    Unknown,
    /// It is known.
    Known(std::sync::Arc<Room>),
    /// It cannot be read, for this reason.
    Unreadable(String),
}

// === impl RoomView ===

impl RoomView {
    /// The room, when it is known.
    pub fn known(&self) -> Option<&Room> {
        match self {
            Self::Known(room) => Some(room),
            Self::Unknown | Self::Unreadable(_) => None,
        }
    }
}

// === impl Room ===

impl Room {
    /// Takes a Node in. Nodes come before pods; those beyond [`MAX_NODES`] are not looked at.
    pub fn add_node(&mut self, node: &Value) {
        let Some(name) = node["metadata"]["name"].as_str() else { return };
        if self.nodes.len() >= MAX_NODES {
            return;
        }
        let conditions = node["status"]["conditions"].as_array();
        let ready =
            conditions.into_iter().flatten().any(|one| one["type"] == "Ready" && one["status"] == "True");
        let taints = node["spec"]["taints"].as_array().into_iter().flatten();
        let known = Node {
            open: ready && node["spec"]["unschedulable"] != true,
            labels: strings(&node["metadata"]["labels"]),
            taints: taints
                .map(|taint| Taint {
                    key: text(&taint["key"]),
                    value: text(&taint["value"]),
                    effect: text(&taint["effect"]),
                })
                .collect(),
            free: quantities(&node["status"]["allocatable"]),
        };
        self.nodes.insert(name.to_owned(), known);
    }

    /// Takes a Pod in: what it requests is not free any more, or it waits for a node.
    pub fn add_pod(&mut self, pod: &Value, now: Timestamp) {
        if matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed")) {
            return;
        }
        let Some(node) = pod["spec"]["nodeName"].as_str().filter(|node| !node.is_empty()) else {
            self.add_waiting(pod, now);
            return;
        };
        let groups = self.bound.len();
        // One that is going has its room still, for the one that follows it; unless its node takes nobody any more.
        let going = !pod["metadata"]["deletionTimestamp"].is_null();
        if !going || self.nodes.get(node).is_some_and(|node| node.open) {
            let group = (text(&pod["metadata"]["namespace"]), strings(&pod["metadata"]["labels"]));
            if groups < MAX_GROUPS || self.bound.contains_key(&group) {
                *self.bound.entry(group).or_default() += 1;
            }
        }
        let Some(node) = self.nodes.get_mut(node) else { return };
        for (resource, amount) in requests(&pod["spec"]) {
            let free = node.free.entry(resource).or_default();
            *free = free.saturating_sub(amount);
        }
    }

    fn add_waiting(&mut self, pod: &Value, now: Timestamp) {
        if self.waiting.len() >= MAX_WAITING || !pod["metadata"]["deletionTimestamp"].is_null() {
            return;
        }
        let conditions = pod["status"]["conditions"].as_array();
        let refused = conditions.into_iter().flatten().find(|one| {
            one["type"] == "PodScheduled" && one["status"] == "False" && one["reason"] == "Unschedulable"
        });
        let since = refused.and_then(|one| one["lastTransitionTime"].as_str()?.parse::<Timestamp>().ok());
        self.waiting.push(Waiting {
            namespace: text(&pod["metadata"]["namespace"]),
            labels: strings(&pod["metadata"]["labels"]),
            stays: since.is_some_and(|since| now.duration_since(since) >= STAYS_UNSCHEDULABLE),
        });
    }

    /// How many more pods of this specification fit.
    pub fn fits(&self, pod: &Value) -> i64 {
        let requests = requests(pod);
        let takes =
            |(name, node): &(&String, &Node)| node.open && node.takes(pod) && affine(pod, name, &node.labels);
        let sum: i128 = self.nodes.iter().filter(takes).map(|(_, node)| node.fits(&requests)).sum();
        i64::try_from(sum.min(i128::from(MAX_PODS))).unwrap_or(MAX_PODS)
    }

    /// Takes room for up to `count` pods of this specification; returns how many of them fit.
    pub fn take(&mut self, pod: &Value, count: i64) -> i64 {
        let requests = requests(pod);
        let mut left = count.clamp(0, MAX_PODS);
        let begin = left;
        for (name, node) in &mut self.nodes {
            if left == 0 {
                break;
            }
            if !node.open || !node.takes(pod) || !affine(pod, name, &node.labels) {
                continue;
            }
            let here = i64::try_from(node.fits(&requests)).unwrap_or(MAX_PODS).min(left);
            for (resource, amount) in &requests {
                let free = node.free.entry(resource.clone()).or_default();
                *free = free.saturating_sub(amount.saturating_mul(i128::from(here)));
            }
            left -= here;
        }
        begin - left
    }

    /// Pods in a namespace with these labels that have a node.
    pub fn bound(&self, namespace: &str, labels: &BTreeMap<String, String>) -> i64 {
        let inside = self.bound.range((namespace.to_owned(), BTreeMap::new())..);
        inside
            .take_while(|((home, _), _)| home == namespace)
            .filter(|((_, own), _)| labels.iter().all(|(key, value)| own.get(key) == Some(value)))
            .map(|(_, count)| count)
            .sum()
    }

    /// Pods in a namespace with these labels that have had no node for long.
    pub fn waiting(&self, namespace: &str, labels: &BTreeMap<String, String>) -> i64 {
        let matches = |pod: &&Waiting| {
            pod.namespace == namespace
                && pod.stays
                && labels.iter().all(|(key, value)| pod.labels.get(key) == Some(value))
        };
        i64::try_from(self.waiting.iter().filter(matches).count()).unwrap_or(MAX_PODS)
    }
}

// === impl Node ===

impl Node {
    /// How many times these requests fit into what is free.
    fn fits(&self, requests: &BTreeMap<String, i128>) -> i128 {
        let of = |(resource, amount): (&String, &i128)| match *amount {
            0 => i128::from(MAX_PODS),
            amount => self.free.get(resource).copied().unwrap_or(0).max(0) / amount,
        };
        requests.iter().map(of).min().unwrap_or(0).min(i128::from(MAX_PODS))
    }

    /// Whether its labels and taints let a pod in.
    fn takes(&self, pod: &Value) -> bool {
        let wanted = strings(&pod["nodeSelector"]);
        if wanted.iter().any(|(key, value)| self.labels.get(key) != Some(value)) {
            return false;
        }
        let tolerations = || pod["tolerations"].as_array().into_iter().flatten();
        self.taints
            .iter()
            .filter(|taint| matches!(taint.effect.as_str(), "NoSchedule" | "NoExecute"))
            .all(|taint| tolerations().any(|toleration| tolerates(toleration, taint)))
    }
}

fn tolerates(toleration: &Value, taint: &Taint) -> bool {
    let said = |field: &str| toleration[field].as_str().unwrap_or_default().to_owned();
    let (key, effect) = (said("key"), said("effect"));
    (effect.is_empty() || effect == taint.effect)
        && match said("operator").as_str() {
            "Exists" => key.is_empty() || key == taint.key,
            _ => key == taint.key && said("value") == taint.value,
        }
}

/// Whether required node affinity lets a pod onto a node.
fn affine(pod: &Value, name: &str, labels: &BTreeMap<String, String>) -> bool {
    let terms = &pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
    let Some(terms) = terms["nodeSelectorTerms"].as_array() else { return true };
    terms.iter().any(|term| {
        let all = |field: &str, value: &dyn Fn(&str) -> Option<String>| {
            let mut wanted = term[field].as_array().into_iter().flatten();
            wanted.all(|one| expression(one, value(one["key"].as_str().unwrap_or_default()).as_deref()))
        };
        // A term that says nothing lets nobody in.
        (term["matchExpressions"].is_array() || term["matchFields"].is_array())
            && all("matchExpressions", &|key| labels.get(key).cloned())
            && all("matchFields", &|key| (key == "metadata.name").then(|| name.to_owned()))
    })
}

fn expression(wanted: &Value, found: Option<&str>) -> bool {
    let values: Vec<&str> =
        wanted["values"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let compared = |good: fn(i64, i64) -> bool| {
        let number = found.and_then(|found| found.parse::<i64>().ok());
        let bound = values.first().and_then(|bound| bound.parse::<i64>().ok());
        matches!((number, bound), (Some(number), Some(bound)) if good(number, bound))
    };
    match wanted["operator"].as_str() {
        Some("In") => found.is_some_and(|found| values.contains(&found)),
        Some("NotIn") => found.is_none_or(|found| !values.contains(&found)),
        Some("Exists") => found.is_some(),
        Some("DoesNotExist") => found.is_none(),
        Some("Gt") => compared(|number, bound| number > bound),
        Some("Lt") => compared(|number, bound| number < bound),
        _ => false,
    }
}

/// What a pod requests, one place among a node's pods included: the sum of its containers, or its greediest init container,
/// and its overhead.
fn requests(pod: &Value) -> BTreeMap<String, i128> {
    let of = |container: &Value| {
        let resources = &container["resources"];
        let mut all = quantities(&resources["limits"]);
        all.extend(quantities(&resources["requests"]));
        all
    };
    let containers = |field: &str| pod[field].as_array().cloned().unwrap_or_default();
    let mut sum: BTreeMap<String, i128> = BTreeMap::new();
    let add = |sum: &mut BTreeMap<String, i128>, more: BTreeMap<String, i128>| {
        for (resource, amount) in more {
            let total = sum.entry(resource).or_default();
            *total = total.saturating_add(amount);
        }
    };
    let mut greediest: BTreeMap<String, i128> = BTreeMap::new();
    let mut sidecars: BTreeMap<String, i128> = BTreeMap::new();
    for container in containers("initContainers") {
        if container["restartPolicy"] == "Always" {
            add(&mut sidecars, of(&container));
        } else {
            let mut with = of(&container);
            add(&mut with, sidecars.clone());
            for (resource, amount) in with {
                let most = greediest.entry(resource).or_default();
                *most = amount.max(*most);
            }
        }
    }
    containers("containers").iter().for_each(|container| add(&mut sum, of(container)));
    add(&mut sum, sidecars);
    for (resource, amount) in greediest {
        let most = sum.entry(resource).or_default();
        *most = amount.max(*most);
    }
    add(&mut sum, quantities(&pod["overhead"]));
    sum.insert("pods".to_owned(), MILLI);
    sum
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn strings(map: &Value) -> BTreeMap<String, String> {
    let Value::Object(map) = map else { return BTreeMap::new() };
    map.iter().filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
}

fn quantities(map: &Value) -> BTreeMap<String, i128> {
    let Value::Object(map) = map else { return BTreeMap::new() };
    let read = |value: &Value| match value {
        Value::String(text) => quantity(text),
        Value::Number(number) => quantity(&number.to_string()),
        _ => None,
    };
    map.iter().filter_map(|(key, value)| Some((key.clone(), read(value)?))).collect()
}

/// A Kubernetes quantity in thousandths, rounded up; `None` when it is none or beyond all reason.
fn quantity(text: &str) -> Option<i128> {
    /// Digits of a number that fits whatever its suffix.
    const DIGITS: usize = 18;
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    let digits = format!("{whole}{part}");
    if digits.is_empty() || digits.len() > DIGITS {
        return None;
    }
    let value: i128 = digits.parse().ok()?;
    let part = u32::try_from(part.len()).ok()?;
    let (up, down): (i128, i128) = match suffix {
        "" => (1, 1),
        "m" => (1, 1000),
        "u" => (1, 1_000_000),
        "n" => (1, 1_000_000_000),
        "k" => (1000, 1),
        "M" => (1_000_000, 1),
        "G" => (1_000_000_000, 1),
        "T" => (1_000_000_000_000, 1),
        "P" => (1_000_000_000_000_000, 1),
        "E" => (1_000_000_000_000_000_000, 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        exponent => {
            let power: i32 = exponent.strip_prefix(['e', 'E'])?.parse().ok()?;
            let of = |power: i32| u32::try_from(power).ok().filter(|power| *power <= 18);
            if power < 0 { (1, 10i128.pow(of(-power)?)) } else { (10i128.pow(of(power)?), 1) }
        }
    };
    let down = down.checked_mul(10i128.checked_pow(part)?)?;
    let exact = value.checked_mul(up)?.checked_mul(MILLI)?;
    Some(exact.checked_add(down - 1)? / down)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const NOW: &str = "2026-11-22T00:10:00Z";

    fn now() -> Timestamp {
        NOW.parse().expect("a time")
    }

    fn node(name: &str, zone: &str, cpu: &str) -> Value {
        json!({"metadata": {"name": name, "labels": {"zone": zone}}, "spec": {},
            "status": {"allocatable": {"cpu": cpu, "memory": "8Gi", "pods": "10"},
                "conditions": [{"type": "Ready", "status": "True"}]}})
    }

    fn pod(node: &str, cpu: &str) -> Value {
        json!({"metadata": {"namespace": "shop", "labels": {"app": "web", "cell": "a"}},
            "spec": {"nodeName": node, "containers": [{"resources": {"requests": {"cpu": cpu}}}]}})
    }

    fn wants(zone: &str, cpu: &str) -> Value {
        json!({"nodeSelector": {"zone": zone}, "containers": [{"resources": {"requests": {"cpu": cpu}}}]})
    }

    #[test]
    fn quantities_are_read_as_kubernetes_reads_them() {
        for (text, milli) in [
            ("1", 1000),
            ("100m", 100),
            ("1.5", 1500),
            ("0.1m", 1),
            ("2k", 2_000_000),
            ("1Ki", 1_024_000),
            ("1.5Gi", 1_610_612_736_000),
            ("1e3", 1_000_000),
            ("12e-1", 1200),
            ("5n", 1),
        ] {
            assert_eq!(quantity(text), Some(milli), "{text}");
        }
        for bad in ["", "m", "-1", "1x", "1e99", "1.2.3", "9999999999999999999999", "1ee"] {
            assert_eq!(quantity(bad), None, "{bad}");
        }
    }

    #[test]
    fn numbers_beyond_all_reason_are_only_large() {
        /// What is left below the largest number that is counted with.
        const HUGE: &str = "170141183460469231E";
        assert!(quantity(HUGE).is_some_and(|huge| huge.checked_add(huge).is_none()));
        let mut room = Room::default();
        room.add_node(&node("n1", "a", HUGE));
        assert_eq!(room.fits(&wants("a", HUGE)), 1);
        assert_eq!(room.take(&wants("a", HUGE), i64::MAX), 1);
        for _ in 0..3 {
            room.add_pod(&pod("n1", HUGE), now());
        }
        assert_eq!(room.fits(&wants("a", "1n")), 0);
        let two = json!({"resources": {"requests": {"cpu": HUGE}}});
        assert_eq!(requests(&json!({"containers": [two, two], "overhead": {"cpu": HUGE}}))["cpu"], i128::MAX);
    }

    #[test]
    fn room_is_allocatable_minus_requested_on_the_nodes_that_take_the_pod() {
        let mut room = Room::default();
        for one in [node("n1", "a", "2"), node("n2", "a", "1"), node("n3", "b", "8")] {
            room.add_node(&one);
        }
        assert_eq!(room.fits(&wants("a", "500m")), 6);
        room.add_pod(&pod("n1", "1"), now());
        room.add_pod(&pod("n2", "900m"), now());
        let mut done = pod("n1", "1");
        done["status"] = json!({"phase": "Succeeded"});
        room.add_pod(&done, now());
        assert_eq!(room.fits(&wants("a", "500m")), 2, "two on n1, none on n2");
        assert_eq!(room.bound("shop", &[("app".to_owned(), "web".to_owned())].into()), 2);
        assert_eq!(room.bound("other", &BTreeMap::new()), 0);
        assert_eq!(room.fits(&wants("b", "1")), 8);
        // The number of pods counts even where nothing is requested.
        assert_eq!(room.fits(&json!({"containers": [{}]})), 9 + 9 + 10);
        // What a node does not have it cannot give.
        let gpu = json!({"containers": [{"resources": {"limits": {"example.com/gpu": 1}}}]});
        assert_eq!(room.fits(&gpu), 0);
    }

    #[test]
    fn a_pod_that_is_going_holds_its_room_where_another_may_follow() {
        let mut room = Room::default();
        let mut cordoned = node("n2", "a", "8");
        cordoned["spec"]["unschedulable"] = true.into();
        let mut lost = node("n3", "a", "8");
        lost["status"]["conditions"][0]["status"] = "Unknown".into();
        [node("n1", "a", "2"), cordoned, lost].iter().for_each(|node| room.add_node(node));
        for at in ["n1", "n1", "n2", "n3", "no-such-node"] {
            let mut going = pod(at, "1");
            going["metadata"]["deletionTimestamp"] = NOW.into();
            room.add_pod(&going, now());
        }
        // A rolling update of a full cell: nothing is free, and nothing is to leave for it.
        assert_eq!(room.fits(&wants("a", "1")), 0);
        assert_eq!(room.bound("shop", &[("app".to_owned(), "web".to_owned())].into()), 2);
    }

    #[test]
    fn what_is_taken_is_not_free() {
        let mut room = Room::default();
        [node("n1", "a", "2"), node("n2", "a", "1")].iter().for_each(|node| room.add_node(node));
        assert_eq!(room.take(&wants("a", "1"), 2), 2);
        assert_eq!(room.fits(&wants("a", "1")), 1);
        assert_eq!(room.take(&wants("a", "1"), 5), 1);
        assert_eq!(room.take(&wants("b", "1"), 5), 0);
    }

    #[test]
    fn cordons_taints_and_affinity_keep_pods_out() {
        let mut room = Room::default();
        let mut cordoned = node("n1", "a", "4");
        cordoned["spec"]["unschedulable"] = true.into();
        let mut lost = node("n2", "a", "4");
        lost["status"]["conditions"][0]["status"] = "Unknown".into();
        let mut tainted = node("n3", "a", "4");
        tainted["spec"]["taints"] = json!([{"key": "cell", "value": "a", "effect": "NoSchedule"},
            {"key": "soft", "effect": "PreferNoSchedule"}]);
        [cordoned, lost, tainted].iter().for_each(|node| room.add_node(node));
        let mut asked = wants("a", "1");
        assert_eq!(room.fits(&asked), 0);
        asked["tolerations"] = json!([{"key": "cell", "operator": "Equal", "value": "a"}]);
        assert_eq!(room.fits(&asked), 4);
        asked["tolerations"] = json!([{"operator": "Exists"}]);
        assert_eq!(room.fits(&asked), 4);
        for (operator, values, expect) in [
            ("In", json!(["a"]), 4),
            ("NotIn", json!(["a"]), 0),
            ("Exists", json!([]), 4),
            ("Gt", json!(["1"]), 0),
        ] {
            asked["affinity"] = json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution":
                {"nodeSelectorTerms": [{"matchExpressions": [{"key": "zone", "operator": operator, "values": values}]}]}}});
            assert_eq!(room.fits(&asked), expect, "{operator}");
        }
    }

    #[test]
    fn init_containers_sidecars_and_overhead_count() {
        let of = |cpu: &str| json!({"resources": {"requests": {"cpu": cpu}}});
        let mut sidecar = of("200m");
        sidecar["restartPolicy"] = "Always".into();
        let pod = json!({"initContainers": [sidecar, of("1")], "containers": [of("300m"), of("300m")],
            "overhead": {"cpu": "50m"}});
        assert_eq!(requests(&pod)["cpu"], 1250, "the init container beside the sidecar is the greediest");
    }

    #[test]
    fn pods_without_a_node_wait_and_after_a_minute_they_stay() {
        let mut room = Room::default();
        let waiting = |since: &str| {
            let mut pod = pod("", "1");
            pod["status"]["conditions"] = json!([{"type": "PodScheduled", "status": "False",
                "reason": "Unschedulable", "lastTransitionTime": since}]);
            pod
        };
        room.add_pod(&waiting("2026-11-22T00:08:00Z"), now());
        room.add_pod(&waiting("2026-11-22T00:09:30Z"), now());
        let labels = [("app".to_owned(), "web".to_owned())].into();
        assert_eq!(room.waiting("shop", &labels), 1);
        assert_eq!(room.waiting("other", &labels), 0);
        let other = [("app".to_owned(), "db".to_owned())].into();
        assert_eq!(room.waiting("shop", &other), 0);
    }
}
