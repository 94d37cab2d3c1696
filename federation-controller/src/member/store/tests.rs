//! What is kept of a member, what becomes of writes and fights, and what is bounded.

use federation_core::answers::{Unreadable, Why};
use federation_core::drift::Adopt;
use federation_core::names::SOURCE_ANNOTATION;
use federation_core::plan::{Replicas, Write};
use serde_json::{Value, json};

use super::kind::{STRAY_BYTES, STRAYS_AT_ONCE};
use super::*;

fn store() -> Store {
    Store::new(Arc::new(Texts::new()))
}

fn seen(name: &str, uid: &str, version: u64) -> Seen {
    Seen::new(live(name, uid, version), &Texts::new())
}

fn unread(name: &str) -> Seen {
    let of = Unreadable { namespace: "shop".into(), name: name.into(), version: "7".into(), why: Why::Form };
    Seen::unread(of).expect("it has a name")
}

fn live(name: &str, uid: &str, version: u64) -> DynamicObject {
    object(json!({"metadata": {"name": name, "namespace": "shop", "uid": uid,
            "resourceVersion": version.to_string(), "creationTimestamp": "2026-11-22T00:00:00Z",
            "annotations": {"cellway.io/source": "federateddeployments/web"}}}))
}

fn object(value: Value) -> DynamicObject {
    serde_json::from_value(value).expect("an object")
}

fn key() -> ObjectKey {
    ObjectKey::new(0, "shop", "web")
}

fn apply(hash: &str, cause: Cause) -> Action {
    Action::Apply {
        desired: Arc::new(json!({"metadata": {"name": "web-a"}})),
        hash: hash.into(),
        cause,
        adopt: Adopt::Unasked,
        exists: cause != Cause::Create,
        uid: None,
        takes_over: false,
        replicas: Replicas::Asked,
        remove_annotations: vec![],
        remove_labels: vec![],
    }
}

fn delete(uid: &str) -> Action {
    Action::Delete { uid: Some(uid.into()), options: Default::default() }
}

fn job(hash: &str) -> Job {
    let write = Write { cluster: "x".into(), object: "web-a".into(), action: apply(hash, Cause::Create) };
    Job { source: key(), generation: Some(1), home: "shop".into(), about: Arc::default(), write }
}

fn view(store: &mut Store) -> MemberView {
    store.view(&key(), "shop", "federateddeployments/web", ["a"].into_iter(), None, Instant::now())
}

#[test]
fn a_view_shows_what_concerns_the_object() {
    let mut store = store();
    assert_eq!(view(&mut store).state, MemberState::Syncing);
    let mut other = live("other", "2", 2);
    other.metadata.annotations = None;
    let other = Seen::new(other, &Texts::new());
    store.change(0, Change::Replace(vec![seen("web-a", "1", 1), other, seen("renamed", "3", 3)]));
    let seen = view(&mut store);
    assert_eq!(seen.state, MemberState::Synced);
    assert_eq!(Vec::from_iter(seen.objects.keys()), ["renamed", "web-a"]);
    let offline =
        store.view(&key(), "shop", "", std::iter::empty(), Some(("NoTunnel", "m".into())), Instant::now());
    assert!(matches!(offline.state, MemberState::Unreachable { .. }));
    store.distrust();
    assert_eq!(view(&mut store).state, MemberState::Syncing);
}

#[test]
fn of_many_objects_with_one_mark_a_few_are_shown() {
    const MANY: usize = 20_000;
    let mut store = store();
    let name = |number: usize| if number == 0 { "web-a".to_owned() } else { format!("evil-{number:05}") };
    let all = (0..MANY).map(|number| seen(&name(number), &number.to_string(), 1));
    store.change(0, Change::Replace(all.collect()));
    let shown = view(&mut store);
    assert!(shown.objects.contains_key("web-a"), "its own is shown, whatever else there is");
    assert_eq!(shown.objects.len(), 1 + STRAYS_AT_ONCE);
    // What stands behind its own names and was not looked at counts as left out.
    assert_eq!(shown.strays, MANY - 1 - STRAYS_AT_ONCE);
    // Those that were shown go, and others are shown.
    for number in 1..=STRAYS_AT_ONCE {
        store.change(0, Change::Delete(seen(&name(number), &number.to_string(), 2)));
    }
    let shown = view(&mut store);
    assert_eq!(shown.strays, MANY - 1 - 2 * STRAYS_AT_ONCE);
    assert!(!shown.objects.contains_key(&name(1)) && shown.objects.contains_key(&name(65)));
    for number in 0..MANY {
        store.change(0, Change::Delete(seen(&name(number), &number.to_string(), 3)));
    }
    assert!(!store.holds(&key(), "shop", "federateddeployments/web"));
    // Few large ones are as much as many small ones.
    let large = |number: usize| {
        let mut object = live(&name(number), &number.to_string(), 1);
        object.data = json!({"data": "x".repeat(STRAY_BYTES / 2)});
        Seen::new(object, &Texts::new())
    };
    store.change(0, Change::Replace((1..5).map(large).collect()));
    let shown = view(&mut store);
    assert_eq!((shown.objects.len(), shown.strays), (1, 3));
}

#[test]
fn members_share_the_text_of_what_is_the_same_in_them() {
    let texts = Arc::new(Texts::new());
    let both = [("1", 7), ("2", 9)].map(|(uid, version)| {
        let mut store = Store::new(Arc::clone(&texts));
        let mut listed = live("web-a", uid, version);
        listed.data = json!({"spec": {"replicas": 3}});
        let mut answered = listed.clone();
        // An answer names its type, an item of a list does not.
        answered.types = serde_json::from_value(json!({"apiVersion": "apps/v1", "kind": "Deployment"})).ok();
        if uid == "1" {
            store.change(0, Change::Replace(vec![Seen::new(listed, &texts)]));
        } else {
            store.kind(0);
            let target = TargetKey { kind: 0, namespace: "shop".into(), name: "web-a".into() };
            store.succeeded(&target, &apply("one", Cause::Create), Some(answered), Instant::now());
        }
        let value = Arc::clone(&view(&mut store).objects["web-a"].value);
        assert_eq!(value["metadata"]["uid"], uid);
        assert_eq!(value["metadata"]["resourceVersion"], version.to_string());
        assert_eq!(value["spec"]["replicas"], 3);
        store
    });
    let [one, other] = both.each_ref().map(|store| store.kinds[0].get("shop", "web-a").expect("known"));
    assert!(Arc::ptr_eq(&one.text, &other.text), "{} {}", one.text, other.text);
}

#[test]
fn changes_name_whom_they_concern() {
    let mut store = store();
    store.change(0, Change::Replace(vec![seen("web-a", "1", 5)]));
    assert_eq!(store.change(0, Change::Apply(seen("web-a", "1", 6))).len(), 1);
    assert!(store.change(0, Change::Apply(seen("web-a", "1", 4))).is_empty(), "older");
    assert!(store.change(0, Change::Delete(seen("web-a", "9", 9))).is_empty(), "another object's end");
    assert_eq!(store.change(0, Change::Delete(seen("web-a", "1", 9))).len(), 1);
    assert!(view(&mut store).objects.is_empty());
}

#[test]
fn the_latest_write_replaces_one_that_has_not_begun() {
    let mut store = store();
    let now = Instant::now();
    let target = store.submit(job("one"), now).expect("taken");
    store.submit(job("two"), now).expect("taken");
    let begun = store.begin(&target).expect("begun");
    assert_eq!(hash_of(&begun.write.action), "two");
    assert!(view(&mut store).in_flight.contains("web-a"));
    store.cancel(&key());
    assert!(view(&mut store).in_flight.contains("web-a"), "what has begun goes on");
    store.submit(job("three"), now).expect("taken");
    store.cancel(&key());
    assert!(store.begin(&target).is_none());
}

#[test]
fn a_burst_of_writes_leaves_no_room_behind() {
    const BURST: usize = 10_000;
    let mut store = store();
    let job = |number: usize| {
        let mut job = job("one");
        job.source = ObjectKey::new(0, "shop", &format!("web-{number}"));
        job.write.object = format!("web-{number}");
        job
    };
    let submit = |number| store.submit(job(number), Instant::now()).expect("taken");
    let targets: Vec<_> = (0..BURST).map(submit).collect();
    assert!(store.jobs.capacity() >= BURST);
    for target in &targets {
        store.begin(target).expect("begun");
        store.succeeded(target, &delete("1"), None, Instant::now());
    }
    assert!(store.jobs.capacity() < BURST / 4 && store.jobs_of.capacity() < BURST / 4);
    for number in 0..BURST {
        store.submit(job(number), Instant::now()).expect("taken");
    }
    for number in 0..BURST {
        store.cancel(&ObjectKey::new(0, "shop", &format!("web-{number}")));
    }
    assert!(store.jobs.is_empty() && store.jobs.capacity() < BURST / 4);
    assert!(store.jobs_of.is_empty() && store.jobs_of.capacity() < BURST / 4);
}

#[test]
fn a_failed_write_waits_and_another_does_not() {
    let mut store = store();
    let now = Instant::now();
    let target = store.submit(job("one"), now).expect("taken");
    store.begin(&target).expect("begun");
    let failure = || WriteFailure {
        hash: "one".into(),
        reason: "Invalid".into(),
        message: "m".into(),
        kind: FailureKind::Failed,
    };
    assert_eq!(store.failed(&target, failure(), 1.0, now), (Duration::from_secs(1), true));
    assert_eq!(store.submit(job("one"), now), Err(Duration::from_secs(1)));
    assert!(store.submit(job("two"), now).is_ok());
    let later = now + Duration::from_secs(2);
    assert!(store.submit(job("one"), later).is_ok());
    store.begin(&target).expect("begun");
    assert_eq!(store.failed(&target, failure(), 1.0, later), (Duration::from_secs(2), false));
    assert_eq!(view(&mut store).failures["web-a"], failure());
    store.succeeded(&target, &apply("one", Cause::Create), Some(live("web-a", "1", 1)), later);
    let seen = view(&mut store);
    assert!(seen.failures.is_empty() && seen.in_flight.is_empty());
    assert!(seen.objects["web-a"].baseline.is_some());
}

#[test]
fn a_write_that_was_outrun_is_tried_again_soon_and_is_no_news() {
    let mut store = store();
    let now = Instant::now();
    let target = store.submit(job("one"), now).expect("taken");
    let outrun = || WriteFailure {
        hash: "one".into(),
        reason: "Outrun".into(),
        message: "m".into(),
        kind: FailureKind::Outrun,
    };
    let waits = [1, 2, 50].map(|times| {
        let mut last = Duration::ZERO;
        for _ in 0..times {
            let (wait, news) = store.failed(&target, outrun(), 1.0, now);
            assert!(!news, "nobody is told of it");
            last = wait;
        }
        last.as_secs()
    });
    assert_eq!(waits, [1, 4, 10], "so long that the member is not kept busy, and never long");
    // Something that goes wrong then is news.
    let failed = WriteFailure { kind: FailureKind::Failed, ..outrun() };
    assert_eq!(store.failed(&target, failed, 1.0, now), (Duration::from_secs(1), true));
}

#[test]
fn a_faster_watch_wins_over_an_answer() {
    let mut store = store();
    let now = Instant::now();
    store.change(0, Change::Replace(vec![seen("web-a", "1", 5)]));
    let target = store.submit(job("one"), now).expect("taken");
    store.begin(&target).expect("begun");
    store.change(0, Change::Apply(seen("web-a", "1", 8)));
    store.succeeded(&target, &apply("one", Cause::Update), Some(live("web-a", "1", 7)), now);
    assert_eq!(view(&mut store).objects["web-a"].value["metadata"]["resourceVersion"], "8");
}

#[test]
fn what_is_gone_before_the_answer_is_not_remembered() {
    for (gone_at, remembered) in [(6, true), (7, false), (9, false)] {
        let mut store = store();
        let now = Instant::now();
        store.change(0, Change::Replace(vec![seen("web-a", "1", 5)]));
        let target = store.submit(job("one"), now).expect("taken");
        store.begin(&target).expect("begun");
        store.change(0, Change::Delete(seen("web-a", "1", gone_at)));
        store.succeeded(&target, &apply("one", Cause::Update), Some(live("web-a", "2", 7)), now);
        assert_eq!(view(&mut store).objects.len(), usize::from(remembered), "{gone_at}");
    }
}

#[test]
fn what_is_found_after_a_lost_answer_counts_unless_the_watch_knows_better() {
    let target = TargetKey { kind: 0, namespace: "shop".into(), name: "web-a".into() };
    let was = |uid: &str, version: u64| Change::Delete(seen("web-a", uid, version));
    let is = |uid: &str, version: u64| Change::Apply(seen("web-a", uid, version));
    let cases = [
        ("nothing was told", vec![], Some(("a", 7)), Some(("a", "7"))),
        ("it is as it was known", vec![], Some(("a", 5)), Some(("a", "5"))),
        ("it is gone", vec![], None, None),
        ("another one took its place unheard", vec![], Some(("b", 7)), Some(("b", "7"))),
        ("it was changed after that", vec![is("a", 8)], Some(("a", 7)), Some(("a", "8"))),
        ("it came after it was looked for", vec![is("a", 8)], None, Some(("a", "8"))),
        ("it is gone since", vec![was("a", 8)], Some(("a", 7)), None),
        ("another one is there since", vec![was("a", 8), is("b", 9)], Some(("a", 7)), Some(("b", "9"))),
        ("another one is there unheard", vec![was("a", 8)], Some(("b", 9)), Some(("b", "9"))),
        ("and it has changed", vec![was("a", 8), is("b", 9)], Some(("b", 10)), Some(("b", "10"))),
        ("it is in the list no more", vec![Change::Replace(vec![])], Some(("a", 7)), None),
        ("another one is there from before, as after a restore", vec![], Some(("b", 3)), Some(("a", "5"))),
    ];
    for (what, told, found, expect) in cases {
        let mut store = store();
        let now = Instant::now();
        store.change(0, Change::Replace(vec![]));
        let first = store.submit(job("zero"), now).expect("taken");
        store.begin(&first).expect("begun");
        store.succeeded(&first, &apply("zero", Cause::Create), Some(live("web-a", "a", 5)), now);
        store.submit(job("one"), now).expect("taken");
        store.begin(&target).expect("begun");
        let known = store.state(&target);
        let unheard = told.is_empty();
        told.into_iter().for_each(|change| drop(store.change(0, change)));
        let agreed = store.settled(&target, &known, found.map(|(uid, version)| live("web-a", uid, version)));
        let both = found.zip(expect);
        let differ = both.is_some_and(|((found, _), (kept, _))| found != kept);
        assert_eq!(agreed, !(unheard && differ), "{what}");
        let shown = view(&mut store).objects.remove("web-a");
        let meta = shown.as_ref().map(|shown| &shown.value["metadata"]);
        let text = |field: &str| meta.and_then(|meta| meta[field].as_str());
        assert_eq!(text("uid").zip(text("resourceVersion")), expect, "{what}");
        // What the member answered about one object says nothing of another.
        let baseline = shown.as_ref().is_some_and(|shown| shown.baseline.is_some());
        assert_eq!(baseline, expect.is_some_and(|(uid, _)| uid == "a"), "{what}");
    }
}

#[test]
fn objects_are_counted_and_weighed() {
    let mut store = store();
    store.change(0, Change::Replace(vec![seen("a", "1", 1), seen("b", "2", 2)]));
    store.change(0, Change::Apply(seen("a", "1", 3)));
    let weight = |names: &[&str]| names.iter().map(|name| seen(name, "1", 1).weight()).sum::<usize>();
    let taken = |store: &Store| super::weight(store.kinds[0].bytes, store.kinds[0].count);
    assert_eq!((store.kinds[0].count, taken(&store)), (2, weight(&["a", "b"])));
    assert_eq!((store.bytes_beside(0), store.bytes_beside(1)), (0, weight(&["a", "b"])));
    store.change(0, Change::Delete(seen("b", "2", 4)));
    assert_eq!((store.kinds[0].count, taken(&store)), (1, weight(&["a"])));
    assert!(!store.is_full(0));
    let mut large = live("a", "1", 5);
    large.data = json!({"data": "x".repeat(MAX_BYTES)});
    store.change(0, Change::Apply(Seen::new(large, &Texts::new())));
    assert!(store.is_full(0));
}

#[test]
fn fights_are_noticed() {
    let mut store = store();
    let now = Instant::now();
    for round in 0..6u64 {
        store.change(0, Change::Apply(seen("web-a", "1", 10 + 2 * round)));
        let target = store.submit(job("one"), now).expect("taken");
        store.begin(&target).expect("begun");
        let answer = live("web-a", "1", 11 + 2 * round);
        store.succeeded(&target, &apply("one", Cause::Heal), Some(answer), now);
    }
    let target = TargetKey { kind: 0, namespace: "shop".into(), name: "web-a".into() };
    assert!(view(&mut store).contended.contains_key("web-a"));
    assert_eq!(store.rest(&target, now), Some(Duration::from_secs(60)));
}

#[test]
fn what_is_written_again_counts_whatever_it_is_called() {
    let at = Instant::now();
    let target = TargetKey { kind: 0, namespace: "shop".into(), name: "web-a".into() };
    let write = |store: &mut Store, hash: &str, cause: Cause, version: u64| {
        let target = store.submit(job(hash), at).expect("taken");
        store.begin(&target).expect("begun");
        store.succeeded(&target, &apply(hash, cause), Some(live("web-a", "1", version)), at);
    };
    // A webhook takes the annotations off, and the write changes nothing: each one looks like the first.
    let mut store = store();
    view(&mut store);
    for _ in 0..=6 {
        assert_eq!(store.rest(&target, at), None);
        write(&mut store, "one", Cause::Update, 10);
    }
    assert_eq!(view(&mut store).contended["web-a"].hash, "one");
    // What is new goes out, and begins with nothing.
    write(&mut store, "two", Cause::Update, 11);
    assert_eq!(store.rest(&target, at), None);
    // Different ones by turns are what somebody asks for.
    for round in 0..20 {
        write(&mut store, ["one", "two"][round % 2], Cause::Update, 12);
    }
    assert_eq!(store.rest(&target, at), None);
}

#[test]
fn what_goes_whenever_it_is_made_is_a_fight() {
    let at = Instant::now();
    for (goes_first, mut store) in [(false, store()), (true, store())] {
        view(&mut store);
        let target = TargetKey { kind: 0, namespace: "shop".into(), name: "web-a".into() };
        for round in 0..=6u64 {
            assert_eq!(store.rest(&target, at), None);
            let (uid, version) = (format!("uid-{round}"), 10 + 2 * round);
            store.submit(job("one"), at).expect("taken");
            store.begin(&target).expect("begun");
            let gone = Change::Delete(seen("web-a", &uid, version + 1));
            let answer = Some(live("web-a", &uid, version));
            if goes_first {
                store.change(0, gone);
                store.succeeded(&target, &apply("one", Cause::Create), answer, at);
            } else {
                store.succeeded(&target, &apply("one", Cause::Create), answer, at);
                store.change(0, gone);
            }
        }
        assert!(store.rest(&target, at).is_some(), "{goes_first}");
    }
}

#[test]
fn what_is_remembered_is_gone_through_now_and_then() {
    let mut store = store();
    let now = Instant::now();
    let target = store.submit(job("one"), now).expect("taken");
    store.begin(&target).expect("begun");
    let failure = WriteFailure {
        hash: "one".into(),
        reason: "r".into(),
        message: "m".into(),
        kind: FailureKind::Failed,
    };
    store.failed(&target, failure, 1.0, now);
    let mut look = |after: Duration| {
        store.view(&key(), "shop", "federateddeployments/web", ["a"].into_iter(), None, now + after);
        store.failures.len()
    };
    assert_eq!(look(FAILURE_MEMORY), 1);
    assert_eq!(look(FAILURE_MEMORY + Duration::from_secs(30)), 1, "it was gone through a moment ago");
    assert_eq!(look(FAILURE_MEMORY + FORGET_EVERY), 0);
}

#[test]
fn what_cannot_be_read_is_there_all_the_same() {
    let unread = || unread("web-a");
    let is_there = |store: &mut Store| {
        let seen = view(store);
        (seen.objects.contains_key("web-a"), seen.unread.contains("web-a"))
    };
    let mut store = store();
    store.change(0, Change::Replace(vec![seen("web-a", "1", 1)]));
    assert_eq!(is_there(&mut store), (true, false));
    let concerned = store.change(0, Change::Apply(unread()));
    assert_eq!(concerned.len(), 1, "it carried a mark before");
    assert_eq!(is_there(&mut store), (false, true));
    store.change(0, Change::Apply(seen("web-a", "1", 8)));
    assert_eq!(is_there(&mut store), (true, false));
    store.change(0, Change::Replace(vec![unread()]));
    assert_eq!(is_there(&mut store), (false, true));
    assert_eq!(store.change(0, Change::Delete(seen("web-a", "1", 9))).len(), 1);
    assert_eq!(is_there(&mut store), (false, false));
    store.change(0, Change::Replace(vec![unread()]));
    store.change(0, Change::Delete(unread()));
    assert_eq!(is_there(&mut store), (false, false));
}

#[test]
fn what_cannot_be_read_is_found_by_the_name_of_a_unit_that_has_left() {
    let mut store = store();
    let left = |store: &Store, home: &str| store.unread(&key(), home, &["b", "c", "d"]);
    assert!(left(&store, "shop").is_empty(), "nothing is known of the kind");
    store.change(0, Change::Replace(vec![seen("web-b", "1", 1), unread("web-c")]));
    assert!(view(&mut store).unread.is_empty(), "it has neither a mark nor the name of a cell");
    assert_eq!(left(&store, "shop"), ["web-c"]);
    assert!(left(&store, "elsewhere").is_empty());
    store.change(0, Change::Apply(seen("web-c", "2", 8)));
    assert!(left(&store, "shop").is_empty());
    assert!(view(&mut store).objects.contains_key("web-c"), "by its mark");
}

#[test]
fn of_what_could_not_be_read_a_change_is_known_by_its_name() {
    let mut store = store();
    let unmarked = || {
        let mut object = live("web-a", "1", 8);
        object.metadata.annotations = None;
        Seen::new(object, &Texts::new())
    };
    let name = |store: &Store, change: &Change<Seen>| {
        store.changes_unread(0, change).map(|(namespace, name)| format!("{namespace}/{name}"))
    };
    assert_eq!(name(&store, &Change::Apply(unmarked())), None);
    assert_eq!(name(&store, &Change::Apply(unread("web-a"))).as_deref(), Some("shop/web-a"));
    store.change(0, Change::Replace(vec![unread("web-a")]));
    for change in [Change::Apply(unmarked()), Change::Delete(unmarked()), Change::Delete(unread("web-a"))] {
        assert_eq!(name(&store, &change).as_deref(), Some("shop/web-a"), "{change:?}");
    }
    assert!(store.change(0, Change::Apply(unmarked())).is_empty(), "nobody's mark tells of it");
    assert_eq!(name(&store, &Change::Delete(unmarked())), None);
}

#[test]
fn whoever_has_something_here_is_known() {
    let mut store = store();
    view(&mut store);
    let now = Instant::now();
    let holds = |store: &Store| store.holds(&key(), "shop", "federateddeployments/web");
    assert!(!holds(&store));
    let target = store.submit(job("one"), now).expect("taken");
    assert!(holds(&store), "a write waits");
    store.begin(&target).expect("begun");
    assert!(holds(&store), "it is under way");
    store.succeeded(&target, &apply("one", Cause::Create), Some(live("web-a", "1", 1)), now);
    assert!(holds(&store), "it is there");
    assert_eq!(store.marks(0), [("federateddeployments/web".into(), "shop".into())]);
    store.change(0, Change::Delete(seen("web-a", "1", 2)));
    assert!(!holds(&store) && store.marks(0).is_empty());
}

#[test]
fn what_is_named_as_its_source_is_found_by_its_mark() {
    let mut store = store();
    let source = "federateddeployments/web";
    let marked = |name: &str, mark: &str, version: u64| {
        let mut object = live(name, name, version);
        object.metadata.annotations = Some([(SOURCE_ANNOTATION.to_owned(), mark.to_owned())].into());
        Seen::new(object, &Texts::new())
    };
    let other = "federatedservices/web";
    store.change(0, Change::Replace(vec![marked("web", source, 1), marked("web-a", other, 1)]));
    assert!(store.holds(&key(), "shop", source) && store.holds(&key(), "shop", other));
    assert!(!store.holds(&key(), "elsewhere", source) && !store.holds(&key(), "shop", "web"));
    assert_eq!(Vec::from_iter(view(&mut store).objects.keys()), ["web", "web-a"]);
    // It is marked once, however many carry the mark.
    store.change(0, Change::Apply(marked("web-b", source, 2)));
    let marks = || -> BTreeSet<Arc<str>> { [source.into(), other.into()].into() };
    let found = store.marks(0);
    assert_eq!((found.len(), found.into_iter().map(|(mark, _)| mark).collect()), (2, marks()));
    // It comes to be another's, and what is left carries the mark still.
    store.change(0, Change::Apply(marked("web", other, 3)));
    assert!(store.holds(&key(), "shop", source));
    assert_eq!(Vec::from_iter(view(&mut store).objects.keys()), ["web", "web-a", "web-b"]);
    store.change(0, Change::Delete(marked("web-b", source, 4)));
    assert!(!store.holds(&key(), "shop", source));
    store.change(0, Change::Delete(marked("web-a", other, 5)));
    assert!(store.holds(&key(), "shop", other), "the namesake");
    store.change(0, Change::Delete(marked("web", other, 6)));
    assert!(store.marks(0).is_empty());
}

#[test]
fn a_deletion_takes_only_the_object_that_was_meant() {
    let mut store = store();
    let target = TargetKey { kind: 0, namespace: "shop".into(), name: "web-a".into() };
    store.change(0, Change::Replace(vec![seen("web-a", "2", 5)]));
    store.succeeded(&target, &delete("1"), None, Instant::now());
    assert_eq!(view(&mut store).objects.len(), 1);
    store.succeeded(&target, &delete("2"), None, Instant::now());
    assert!(view(&mut store).objects.is_empty());
}
