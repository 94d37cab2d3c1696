//! Random users against collectors that are behind: what was put into the store stays unless there is a reason.
//!
//! Two collectors, as those of two replicas, see the store's events when they are told to and work while users write. What
//! users were told is remembered; from it follows which objects may have gone. And what is there has a namespace that is
//! there too, however long a webhook took between the first look at it and the write.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;

use proptest::prelude::*;
use serde_json::json;

use super::tests::{Collector, create, get, maps, namespaces, one, registry, uid};
use super::*;
use crate::registry::delete::Propagation;
use crate::registry::write::{New, Ownership, WriteOptions};

const NAMESPACES: [&str; 2] = ["a", "b"];
const NAMES: usize = 4;
const COLLECTORS: usize = 2;

/// What a user does.
#[derive(Clone, Debug)]
enum Deed {
    MakeNamespace(usize),
    DeleteNamespace(usize),
    /// With the objects of these names, if they are there, or with somebody who never was as its owners.
    Make {
        namespace: usize,
        name: usize,
        owners: BTreeSet<usize>,
        blocks: bool,
        stray: bool,
    },
    /// A webhook is asked about it, and has not answered yet.
    BeginMake {
        namespace: usize,
        name: usize,
    },
    /// It has answered about the one that waits longest.
    EndMake,
    Delete {
        namespace: usize,
        name: usize,
        propagation: Option<Propagation>,
    },
}

#[derive(Clone, Debug)]
enum Step {
    Users(Vec<Deed>),
    /// A collector sees so many revisions more.
    See(usize, u64),
    /// A collector works by what it has seen, while users go on.
    Work(usize, Vec<Deed>),
    /// A replica is started again.
    Restart(usize),
}

fn deed() -> impl Strategy<Value = Deed> {
    let namespace = || 0..NAMESPACES.len();
    let propagation = prop_oneof![
        Just(None),
        Just(Some(Propagation::Background)),
        Just(Some(Propagation::Foreground)),
        Just(Some(Propagation::Orphan)),
    ];
    let owners = proptest::collection::btree_set(0..NAMES, 0..3);
    prop_oneof![
        2 => namespace().prop_map(Deed::MakeNamespace),
        1 => namespace().prop_map(Deed::DeleteNamespace),
        6 => (namespace(), 0..NAMES, owners, any::<bool>(), proptest::bool::weighted(0.1)).prop_map(
            |(namespace, name, owners, blocks, stray)| Deed::Make { namespace, name, owners, blocks, stray }),
        2 => (namespace(), 0..NAMES).prop_map(|(namespace, name)| Deed::BeginMake { namespace, name }),
        2 => Just(Deed::EndMake),
        3 => (namespace(), 0..NAMES, propagation).prop_map(
            |(namespace, name, propagation)| Deed::Delete { namespace, name, propagation }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let deeds = || proptest::collection::vec(deed(), 0..5);
    prop_oneof![
        4 => proptest::collection::vec(deed(), 1..6).prop_map(Step::Users),
        3 => (0..COLLECTORS, 1..12_u64).prop_map(|(who, revisions)| Step::See(who, revisions)),
        1 => (0..COLLECTORS).prop_map(|who| Step::See(who, u64::MAX)),
        4 => (0..COLLECTORS, deeds()).prop_map(|(who, deeds)| Step::Work(who, deeds)),
        1 => (0..COLLECTORS).prop_map(Step::Restart),
    ]
}

/// What users were told of an object that was made.
struct Made {
    target: Target,
    /// Uids of its namespace and its owners.
    namespace: String,
    owners: Vec<String>,
    /// Which deed it was.
    at: usize,
}

impl fmt::Display for Made {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { target, namespace, owners, at } = self;
        write!(f, "{} of namespace {namespace} and owners {owners:?}, made by deed {at},", target.key())
    }
}

/// What users were told of deletions of an object.
#[derive(Debug, Default)]
struct Deletions {
    /// The last without `Orphan` that was answered: dependents may go.
    plain: Option<usize>,
    /// The first with `Orphan`: who was there before may not.
    orphan: Option<usize>,
}

/// How an owner lets go of a dependent.
enum End {
    /// With it, by what was done then.
    Taking(usize),
    /// Without it.
    Leaving(usize),
}

struct Users<'a> {
    registry: &'a Registry,
    deeds: usize,
    /// Which webhooks are being asked about, with the uid of the namespace, its name and its own.
    asked: VecDeque<(New, String, Target)>,
    made: BTreeMap<String, Made>,
    deleted: BTreeMap<String, Deletions>,
}

impl Users<'_> {
    async fn act(&mut self, deeds: &[Deed]) {
        for deed in deeds {
            self.deeds += 1;
            self.carry_out(deed).await;
        }
    }

    async fn carry_out(&mut self, deed: &Deed) {
        let registry = self.registry;
        let namespaces = namespaces(registry);
        match deed {
            Deed::MakeNamespace(which) => {
                let object = json!({"metadata": {"name": NAMESPACES[*which]}});
                // There already, or still.
                let _ = registry.create(&namespaces, object, &WriteOptions::by("test")).await;
            }
            Deed::DeleteNamespace(which) => {
                let target = one(&namespaces, NAMESPACES[*which]);
                if let Ok(deleted) = registry.delete(&target, &DeleteOptions::default()).await {
                    self.deleted.entry(uid(deleted.object()).to_owned()).or_default().plain =
                        Some(self.deeds);
                }
            }
            Deed::Make { namespace, name, owners, blocks, stray } => {
                let place = NAMESPACES[*namespace];
                let Some(home) = get(registry, &one(&namespaces, place)).await else { return };
                let all = maps(registry, place);
                let mut references = Vec::new();
                for owner in owners {
                    let Some(owner) = get(registry, &one(&all, &format!("m{owner}"))).await else { continue };
                    references
                        .push(json!({"apiVersion": "v1", "kind": "ConfigMap", "blockOwnerDeletion": blocks,
                        "name": owner["metadata"]["name"], "uid": uid(&owner)}));
                }
                if *stray {
                    references
                        .push(json!({"apiVersion": "v1", "kind": "ConfigMap", "name": "nobody", "uid": "0"}));
                }
                let owners = references.iter().map(|r| str_at(r, &["uid"]).to_owned()).collect();
                let name = format!("m{name}");
                let object = json!({"metadata": {"name": name, "ownerReferences": references}});
                // There already, or its namespace goes.
                if let Ok(made) = registry.create(&all, object, &WriteOptions::by("test")).await {
                    let told = Made {
                        target: one(&all, &name),
                        namespace: uid(&home).to_owned(),
                        owners,
                        at: self.deeds,
                    };
                    self.made.insert(uid(&made.object).to_owned(), told);
                }
            }
            Deed::BeginMake { namespace, name } => {
                let place = NAMESPACES[*namespace];
                let Some(home) = get(registry, &one(&namespaces, place)).await else { return };
                let (all, name) = (maps(registry, place), format!("m{name}"));
                let object = json!({"metadata": {"name": name}});
                // Its namespace goes.
                if let Ok(new) = registry.begin_create(&all, object, &WriteOptions::by("test")).await {
                    self.asked.push_back((new, uid(&home).to_owned(), one(&all, &name)));
                }
            }
            Deed::EndMake => {
                let Some((new, namespace, target)) = self.asked.pop_front() else { return };
                let options = WriteOptions::by("test");
                // There already, or its namespace has gone or is another one by now.
                if let Ok(made) = registry.write_new(new, &options, Ownership::Update).await {
                    let told = Made { target, namespace, owners: Vec::new(), at: self.deeds };
                    self.made.insert(uid(&made.object).to_owned(), told);
                }
            }
            Deed::Delete { namespace, name, propagation } => {
                let target = one(&maps(registry, NAMESPACES[*namespace]), &format!("m{name}"));
                let options = DeleteOptions { propagation: *propagation, ..DeleteOptions::default() };
                if let Ok(deleted) = registry.delete(&target, &options).await {
                    let deletions = self.deleted.entry(uid(deleted.object()).to_owned()).or_default();
                    match propagation {
                        Some(Propagation::Orphan) => {
                            deletions.orphan.get_or_insert(self.deeds);
                        }
                        _ => deletions.plain = Some(self.deeds),
                    }
                }
            }
        }
    }

    /// May the object have gone, by what users did?
    fn may_go(&self, object: &str) -> bool {
        let Some(made) = self.made.get(object) else { return true };
        self.deleted.contains_key(object) || self.goes_by_itself(made)
    }

    /// With its namespace, or with all of its owners. Not with those that were gone before the last one left it behind.
    fn goes_by_itself(&self, made: &Made) -> bool {
        if self.deleted.contains_key(&made.namespace) {
            return true;
        }
        let (mut taken, mut left) = (None, None);
        for owner in &made.owners {
            match self.end_of(owner, made) {
                None => return false,
                Some(End::Taking(at)) => taken = taken.max(Some(at)),
                Some(End::Leaving(at)) => left = left.max(Some(at)),
            }
        }
        taken > left
    }

    fn end_of(&self, owner: &str, dependent: &Made) -> Option<End> {
        // Nobody ever was.
        let Some(other) = self.made.get(owner) else { return Some(End::Taking(0)) };
        if self.goes_by_itself(other) {
            return Some(End::Taking(usize::MAX));
        }
        match self.deleted.get(owner)? {
            Deletions { plain: Some(at), .. } => Some(End::Taking(*at)),
            // It may have been too late to be left behind.
            Deletions { orphan: Some(at), .. } if *at < dependent.at => Some(End::Taking(usize::MAX)),
            Deletions { orphan, .. } => orphan.map(End::Leaving),
        }
    }

    /// What has gone, or is going, without a reason.
    async fn missing(&self) -> Option<String> {
        for (known, made) in self.made.iter().filter(|(known, _)| !self.may_go(known)) {
            let found = get(self.registry, &made.target).await;
            if !found.as_ref().is_some_and(|found| uid(found) == known && !meta::is_deleting(found)) {
                return Some(format!("{made} {known} is not there, but {found:?}"));
            }
        }
        None
    }

    /// What is there without the namespace that it was made in.
    async fn homeless(&self) -> Option<String> {
        for (known, made) in &self.made {
            let Some(found) = get(self.registry, &made.target).await.filter(|found| uid(found) == known)
            else {
                continue;
            };
            let home = one(&namespaces(self.registry), &made.target.namespace);
            let home = get(self.registry, &home).await;
            if home.as_ref().map(uid) != Some(&made.namespace) {
                return Some(format!("{found} of {made} is in {home:?}"));
            }
        }
        None
    }
}

async fn play(steps: Vec<Step>) -> Result<(), TestCaseError> {
    let registry = registry().await;
    let mut users = Users {
        registry: &registry,
        deeds: 0,
        asked: VecDeque::new(),
        made: BTreeMap::new(),
        deleted: BTreeMap::new(),
    };
    for name in NAMESPACES {
        create(&registry, &namespaces(&registry), json!({"metadata": {"name": name}})).await;
    }
    let mut collectors = [Collector::new(&registry).await, Collector::new(&registry).await];
    for step in &steps {
        match step {
            Step::Users(deeds) => users.act(deeds).await,
            Step::See(who, revisions) => collectors[*who].see(*revisions).await,
            Step::Work(who, deeds) => {
                tokio::join!(collectors[*who].work(), users.act(deeds));
            }
            Step::Restart(who) => collectors[*who] = Collector::new(&registry).await,
        }
        if let Some(wrong) = users.missing().await.or(users.homeless().await) {
            return Err(TestCaseError::fail(format!("after {step:?}: {wrong}")));
        }
    }
    // When all has been seen, all has been done.
    for collector in &mut collectors {
        collector.settle().await;
    }
    prop_assert_eq!(users.missing().await, None);
    prop_assert_eq!(users.homeless().await, None);
    for name in NAMESPACES {
        let left = get(&registry, &one(&namespaces(&registry), name)).await;
        prop_assert!(!left.as_ref().is_some_and(meta::is_deleting), "{:?} does not go", left);
    }
    let mut there = BTreeSet::new();
    for (known, made) in &users.made {
        if get(&registry, &made.target).await.is_some_and(|found| uid(&found) == known) {
            there.insert(known.as_str());
        }
    }
    for (known, made) in users.made.iter().filter(|(_, made)| !made.owners.is_empty()) {
        let left_behind = |owner: &String| users.deleted.get(owner).is_some_and(|d| d.orphan.is_some());
        let owned = made.owners.iter().any(|owner| there.contains(owner.as_str()) || left_behind(owner));
        prop_assert!(owned || !there.contains(known.as_str()), "{} has lost its owners, and is there", made);
        let Some(left) = get(&registry, &made.target).await else { continue };
        let Some(references) = at(&left, &["metadata", "ownerReferences"]).and_then(Value::as_array) else {
            continue;
        };
        if references.is_empty() {
            continue;
        }
        let mut kept = false;
        for reference in references {
            let owner = one(&made.target, str_at(reference, &["name"]));
            kept |=
                get(&registry, &owner).await.is_some_and(|owner| uid(&owner) == str_at(reference, &["uid"]));
        }
        prop_assert!(kept, "{} has no owner and is there: {}", made.target.key(), left);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn nothing_goes_without_a_reason(steps in proptest::collection::vec(step(), 1..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(play(steps))?;
    }
}
