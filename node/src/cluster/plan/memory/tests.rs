//! Tables: what is seen one after the other, and what is remembered of it.

use super::*;

fn node(id: &str) -> NodeId {
    NodeId::new(id).unwrap()
}

fn id(id: &str) -> VolumeId {
    VolumeId::new(id).unwrap()
}

fn at(secs: u64) -> BootTime {
    BootTime::from_nanos(1_000_000_000 * (1_000 + secs))
}

fn volume(name: &str, primary: &str, epoch: u64) -> Volume {
    Volume {
        id: id(name),
        primary: Some(node(primary)),
        backups: Vec::new(),
        epoch: Epoch::new(epoch).unwrap(),
        given: true,
        target: None,
        formatted: true,
        handed_over: true,
        retired: false,
        local: Local::Backup,
        attempts: 0,
        doubts: BTreeMap::new(),
    }
}

/// The doubts after a look at `volumes`, which are in order of id.
fn look(doubts: &mut Doubts, secs: u64, mut volumes: Vec<Volume>) -> Vec<(String, Doubt)> {
    doubts.look(at(secs), |_| Some("process".into()), &[], &mut volumes);
    let of = volumes.first().map(|volume| volume.doubts.clone()).unwrap_or_default();
    of.into_iter().map(|(node, doubt)| (node.to_string(), doubt)).collect()
}

fn is(node: &str, doubt: Doubt) -> Vec<(String, Doubt)> {
    vec![(node.to_owned(), doubt)]
}

fn none() -> Vec<(String, Doubt)> {
    Vec::new()
}

#[test]
fn calm_ends_with_every_change_and_outlasts_what_stays_broken() {
    let alive = || BTreeMap::from([(node("a"), Health::Alive), (node("b"), Health::Alive)]);
    let with = |health| BTreeMap::from([(node("a"), Health::Alive), (node("b"), health)]);
    let broken = |local, attempts| Volume { local, attempts, ..volume("v", "a", 1) };
    let v = || vec![volume("v", "a", 1)];
    let second = Duration::from_secs(1);
    // What is seen a second after a long calm, and how calm it is another second later.
    let cases = [
        ("nothing", alive(), vec![], v(), true),
        ("a node joins or dies", with(Health::Dead(Duration::ZERO)), vec![], v(), false),
        ("a node is drained", alive(), vec![node("a")], v(), false),
        ("a hand-over", alive(), vec![], vec![volume("v", "b", 2)], false),
        ("an order", alive(), vec![], vec![Volume { target: Some(node("b")), ..volume("v", "a", 1) }], false),
        ("an action", alive(), vec![], vec![broken(Local::Busy, 0)], false),
        ("a failure", alive(), vec![], vec![broken(Local::Busy, ATTEMPTS_MAX - 1)], false),
        ("one that nobody can use", alive(), vec![], vec![broken(Local::Busy, ATTEMPTS_MAX)], true),
        ("the same", alive(), vec![], vec![broken(Local::Unusable, ATTEMPTS_MAX)], true),
    ];
    for (what, nodes, draining, volumes, calm) in cases {
        let mut memory = Calm::default();
        memory.look(at(0), &alive(), &[], &v());
        assert_eq!(memory.look(at(9), &alive(), &[], &v()), 9 * second);
        let now = memory.look(at(10), &nodes, &draining, &volumes);
        assert_eq!(now, if calm { 10 * second } else { Duration::ZERO }, "{what}");
    }
    // Who is away for long, or for good, is waited for once.
    let (short, long) = (GONE_AFTER - second, GONE_AFTER);
    for (health, calm) in [
        (Health::Dead(Duration::ZERO), true),
        (Health::Absent, true),
        (Health::Silent(long), true),
        (Health::Silent(short), false),
        (Health::Unknown, false),
    ] {
        let mut memory = Calm::default();
        memory.look(at(0), &with(health), &[], &v());
        let later = memory.look(at(5), &with(health), &[], &v());
        assert_eq!(later, if calm { 5 * second } else { Duration::ZERO }, "{health:?}");
    }
}

#[test]
fn who_gives_a_volume_back_has_failed_and_waits_longer_each_time() {
    let mut doubts = Doubts::default();
    assert_eq!(look(&mut doubts, 0, vec![volume("v", "a", 1)]), none());
    // Given to b: by a, which serves no more than b. That is a failure of a.
    assert_eq!(look(&mut doubts, 10, vec![volume("v", "b", 2)]), is("a", Doubt::Paused));
    assert_eq!(look(&mut doubts, 14, vec![volume("v", "b", 2)]), is("a", Doubt::Paused));
    assert_eq!(look(&mut doubts, 15, vec![volume("v", "b", 2)]), is("a", Doubt::Failed));
    // A volume that nobody can use: the pauses grow to their longest.
    let (mut now, mut epoch) = (15, 2);
    let mut pauses = Vec::new();
    for _ in 0..8 {
        for (from, to) in [("b", "a"), ("a", "b")] {
            epoch += 1;
            now += 2;
            look(&mut doubts, now, vec![volume("v", to, epoch)]);
            assert_eq!(doubts.doubt(&id("v"), &node(from), at(now)), Some(Doubt::Paused));
        }
        let paused = |after: &u64| doubts.doubt(&id("v"), &node("a"), at(now + after)) == Some(Doubt::Paused);
        pauses.push((1..=1000).find(|after| !paused(after)).unwrap());
        now += PAUSE_MAX.as_secs();
    }
    assert_eq!(pauses, [10, 20, 40, 80, 160, 300, 300, 300]);
    // Forgotten after a while, and with the process.
    let v = || vec![volume("v", "b", epoch)];
    let mut renewed = v();
    let process =
        |of: &NodeId| Some(if *of == node("a") { "later".to_owned() } else { "process".to_owned() });
    doubts.look(at(now), process, &[], &mut renewed);
    assert_eq!(renewed[0].doubts.keys().cloned().collect::<Vec<_>>(), [node("b")]);
    assert_eq!(look(&mut doubts, now + KEPT.as_secs(), v()), none());
}

#[test]
fn not_every_hand_over_is_a_failure() {
    let other = |name: &str| volume(name, "a", 1);
    let before = || vec![volume("v", "a", 1), other("w"), other("x")];
    let after = |v: Volume| vec![v, other("w"), other("x")];
    let given = || volume("v", "b", 2);
    let asked = Volume { target: Some(node("b")), ..given() };
    let elected = Volume { handed_over: false, ..given() };
    let cases = [
        ("balance", after(given())),
        ("an order", vec![asked]),
        ("an election", vec![elected]),
        ("changes that were missed", vec![volume("v", "b", 3)]),
        ("a restart", vec![volume("v", "a", 2)]),
    ];
    for (what, seen) in cases {
        let mut doubts = Doubts::default();
        look(&mut doubts, 0, before());
        assert_eq!(look(&mut doubts, 10, seen), none(), "{what}");
    }
    // One that is drained gives because it has to.
    let mut doubts = Doubts::default();
    look(&mut doubts, 0, vec![volume("v", "a", 1)]);
    let mut seen = vec![given()];
    let changed = doubts.look(at(10), |_| None, &[node("a")], &mut seen);
    assert!(seen[0].doubts.is_empty());
    assert_eq!(changed, [id("v")]);
    assert!(doubts.look(at(11), |_| None, &[node("a")], &mut seen).is_empty());
    // It gives for balance what it just got: so it cannot use it.
    let mut doubts = Doubts::default();
    look(&mut doubts, 0, after(volume("v", "c", 1)));
    look(&mut doubts, 10, after(Volume { target: Some(node("a")), ..volume("v", "a", 2) }));
    assert_eq!(look(&mut doubts, 12, after(volume("v", "b", 3))), is("a", Doubt::Paused));
    // Who has kept it for long is no longer doubted.
    look(&mut doubts, 13, after(Volume { target: Some(node("a")), ..volume("v", "a", 4) }));
    let much_later = 13 + PROVEN_AFTER.as_secs();
    assert_eq!(look(&mut doubts, much_later, after(volume("v", "b", 5))), none());
}
