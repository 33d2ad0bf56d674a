//! Tables: what is observed, and what follows.

use super::*;

fn node(id: &str) -> NodeId {
    NodeId::new(id).unwrap()
}

fn epoch(number: u64) -> Epoch {
    Epoch::new(number).unwrap()
}

fn volume(id: &str, primary: &str, backups: &[&str], local: Local) -> Volume {
    Volume {
        id: VolumeId::new(id).unwrap(),
        primary: (!primary.is_empty()).then(|| node(primary)),
        backups: backups.iter().map(|id| node(id)).collect(),
        epoch: epoch(3),
        given: true,
        target: None,
        formatted: true,
        handed_over: false,
        retired: false,
        local,
        attempts: 0,
        doubts: BTreeMap::new(),
    }
}

fn doubted(volume: Volume, doubts: &[(&str, Doubt)]) -> Volume {
    Volume { doubts: doubts.iter().map(|(id, doubt)| (node(id), *doubt)).collect(), ..volume }
}

/// Seen from `me`, with all three nodes alive.
fn observed(me: &str, volumes: Vec<Volume>) -> Observed {
    Observed {
        me: node(me),
        store_reachable: true,
        lease_held: true,
        alone: true,
        looking_for: ABSENT_GRACE,
        nodes: ["a", "b", "c"].into_iter().map(|id| (node(id), Health::Alive)).collect(),
        stopping: false,
        draining: Vec::new(),
        calm_since: Duration::ZERO,
        volumes,
    }
}

fn with(mut observed: Observed, id: &str, health: Health) -> Observed {
    observed.nodes.insert(node(id), health);
    observed
}

fn silent(ms: u64) -> Health {
    Health::Silent(Duration::from_millis(ms))
}

fn id(id: &str) -> VolumeId {
    VolumeId::new(id).unwrap()
}

fn elect(volume: &str, from: &str) -> Action {
    Action::Elect { volume: id(volume), from: (!from.is_empty()).then(|| node(from)) }
}

#[test]
fn what_the_record_says_is_done() {
    let cases = [
        (volume("v", "a", &["b"], Local::Detached), vec![Action::Promote(id("v"), epoch(3))]),
        (volume("v", "a", &["b"], Local::Backup), vec![Action::Promote(id("v"), epoch(3))]),
        (volume("v", "a", &["b"], Local::Primary(epoch(3))), vec![]),
        // It was promoted anew under a later epoch, by an earlier process of this node.
        (volume("v", "a", &["b"], Local::Primary(epoch(2))), vec![Action::StepDown(id("v"))]),
        (volume("v", "b", &["a"], Local::Primary(epoch(2))), vec![Action::StepDown(id("v"))]),
        (volume("v", "a", &["b"], Local::Fenced), vec![Action::StepDown(id("v"))]),
        (volume("v", "b", &["a"], Local::Detached), vec![Action::Attach(id("v"))]),
        (volume("v", "b", &["a"], Local::Backup), vec![]),
        (volume("v", "b", &["c"], Local::Backup), vec![Action::Detach(id("v"))]),
        (volume("v", "b", &["c"], Local::Detached), vec![]),
        (volume("v", "a", &["b"], Local::Busy), vec![]),
        (volume("v", "a", &["b"], Local::Unusable), vec![Action::HandOver(id("v"), node("b"))]),
        (volume("v", "a", &[], Local::Unusable), vec![Action::Promote(id("v"), epoch(3))]),
        (volume("v", "b", &["a"], Local::Unusable), vec![Action::Attach(id("v"))]),
        // It failed under this epoch: whoever serves it next does so under another.
        (volume("v", "a", &["b"], Local::Lost), vec![Action::HandOver(id("v"), node("b"))]),
        (volume("v", "a", &[], Local::Lost), vec![elect("v", "a")]),
    ];
    for (volume, actions) in cases {
        let what = format!("{volume:?}");
        assert_eq!(plan(&observed("a", vec![volume])), actions, "{what}");
    }
}

#[test]
fn a_restarted_primary_begins_an_epoch_of_its_own() {
    let earlier = |local| Volume { given: false, ..volume("v", "a", &["b"], local) };
    for local in [Local::Detached, Local::Backup] {
        let seen = observed("a", vec![earlier(local)]);
        assert_eq!(plan(&seen), [elect("v", "a")]);
        // Its predecessor may still answer reads.
        assert_eq!(plan(&Observed { alone: false, ..seen.clone() }), []);
        assert_eq!(plan(&Observed { lease_held: false, ..seen.clone() }), []);
        assert_eq!(plan(&Observed { store_reachable: false, ..seen }), []);
    }
}

#[test]
fn a_volume_is_taken_only_from_a_node_whose_lease_is_over() {
    let seen = || observed("b", vec![volume("v", "a", &["b", "c"], Local::Backup)]);
    let cases = [
        (Health::Alive, vec![]),
        (Health::Unknown, vec![]),
        (silent(0), vec![elect("v", "a")]),
        (Health::Dead(Duration::ZERO), vec![elect("v", "a")]),
        (Health::Absent, vec![elect("v", "a")]),
    ];
    for (health, actions) in cases {
        assert_eq!(plan(&with(seen(), "a", health)), actions, "{health:?}");
    }
    // When a cluster starts, the others are on their way.
    let starting = Observed { looking_for: Duration::ZERO, ..with(seen(), "a", Health::Absent) };
    assert_eq!(plan(&starting), []);
    // Not without a lease of its own, and not without the store.
    let dead = with(seen(), "a", Health::Dead(Duration::ZERO));
    assert_eq!(plan(&Observed { lease_held: false, ..dead.clone() }), []);
    assert_eq!(plan(&Observed { store_reachable: false, ..dead.clone() }), []);
    assert_eq!(plan(&Observed { stopping: true, ..dead.clone() }), []);
    // Not before it is attached.
    let mut detached = dead;
    detached.volumes[0].local = Local::Detached;
    assert_eq!(plan(&detached), [Action::Attach(id("v"))]);
    // One that nobody has.
    let orphan = observed("b", vec![volume("v", "", &["b"], Local::Backup)]);
    assert_eq!(plan(&orphan), [elect("v", "")]);
}

#[test]
fn candidates_stand_in_line() {
    let seen = |ms| with(observed("c", vec![volume("v", "a", &["b", "c"], Local::Backup)]), "a", silent(ms));
    assert_eq!(plan(&seen(0)), []);
    assert_eq!(plan(&seen(149)), []);
    assert_eq!(plan(&seen(150)), [elect("v", "a")]);
    // Those that cannot come do not hold up the line, and neither do those that are to serve nothing.
    assert_eq!(plan(&with(seen(0), "b", silent(5))), [elect("v", "a")]);
    assert_eq!(plan(&with(seen(0), "b", Health::Unknown)), [elect("v", "a")]);
    assert_eq!(plan(&Observed { draining: vec![node("b")], ..seen(0) }), [elect("v", "a")]);
    // Who serves less comes first.
    let mut busy = seen(0);
    busy.volumes.push(volume("w", "b", &[], Local::Detached));
    assert_eq!(plan(&busy), [elect("v", "a")]);
}

#[test]
fn the_volumes_of_a_dead_node_are_spread() {
    let volumes = |local| {
        vec![
            volume("v", "a", &["b", "c"], local),
            volume("w", "a", &["b", "c"], local),
            volume("x", "a", &["b", "c"], local),
        ]
    };
    let dead = |me| with(observed(me, volumes(Local::Backup)), "a", Health::Dead(Duration::ZERO));
    assert_eq!(plan(&dead("b")), [elect("v", "a"), elect("x", "a")]);
    assert_eq!(plan(&dead("c")), [elect("w", "a")]);
    // If the other does not come, one takes all.
    let late = with(observed("b", volumes(Local::Backup)), "a", silent(10_000));
    assert_eq!(plan(&late).len(), 3);
}

#[test]
fn a_node_without_a_lease_serves_on_but_takes_nothing() {
    let mut seen = observed(
        "a",
        vec![volume("v", "a", &["b"], Local::Primary(epoch(3))), volume("w", "a", &["b"], Local::Backup)],
    );
    seen.lease_held = false;
    seen.store_reachable = false;
    seen.nodes.values_mut().for_each(|health| *health = Health::Unknown);
    assert_eq!(plan(&seen), []);
}

#[test]
fn volumes_are_handed_over_on_request() {
    let placed =
        |target: &str, local| Volume { target: Some(node(target)), ..volume("v", "a", &["b", "c"], local) };
    let primary = Local::Primary(epoch(3));
    let seen = |volume| observed("a", vec![volume]);
    assert_eq!(plan(&seen(placed("c", primary))), [Action::HandOver(id("v"), node("c"))]);
    assert_eq!(plan(&seen(placed("a", primary))), []);
    // To one that is not ready it is not given.
    assert_eq!(plan(&with(seen(placed("c", primary)), "c", silent(0))), []);
    assert_eq!(plan(&seen(placed("d", primary))), []);
    assert_eq!(plan(&Observed { store_reachable: false, ..seen(placed("c", primary)) }), []);
    // Nor to one that is to serve nothing.
    assert_eq!(plan(&Observed { draining: vec![node("c")], ..seen(placed("c", primary)) }), []);
    // A node that is drained gives to the one that serves least.
    let mut drained =
        observed("a", vec![volume("v", "a", &["b", "c"], primary), volume("w", "b", &["a"], Local::Backup)]);
    drained.draining = vec![node("a")];
    assert_eq!(plan(&drained), [Action::HandOver(id("v"), node("c"))]);
    drained.draining = vec![node("a"), node("c")];
    assert_eq!(plan(&drained), [Action::HandOver(id("v"), node("b"))]);
    drained.nodes.insert(node("b"), Health::Unknown);
    assert_eq!(plan(&drained), [], "nobody to give it to: it is served on");
}

#[test]
fn a_node_that_joins_gets_its_share() {
    let primary = Local::Primary(epoch(3));
    let volumes = || {
        vec![
            volume("v", "a", &["b", "c"], primary),
            volume("w", "a", &["b", "c"], primary),
            volume("x", "b", &["a", "c"], Local::Backup),
        ]
    };
    let calm = Observed { calm_since: BALANCE_AFTER, ..observed("a", volumes()) };
    assert_eq!(plan(&calm), [Action::HandOver(id("v"), node("c"))]);
    assert_eq!(plan(&observed("a", volumes())), [], "not while things are moving");
    assert_eq!(plan(&with(calm.clone(), "c", silent(0))), [], "b has one less only");
    let mut placed = calm.clone();
    placed.volumes[0].target = Some(node("a"));
    assert_eq!(plan(&placed), [Action::HandOver(id("w"), node("c"))]);
    // Only who has most gives.
    let mut other = Observed { calm_since: BALANCE_AFTER, ..observed("b", volumes()) };
    other.volumes[0].local = Local::Backup;
    other.volumes[1].local = Local::Backup;
    other.volumes[2].local = primary;
    assert_eq!(plan(&other), []);
}

#[test]
fn who_failed_is_not_given_a_volume_again() {
    use Doubt::{Failed, Paused};
    let unusable = |doubts: &[(&str, Doubt)]| {
        observed("a", vec![doubted(volume("v", "a", &["b", "c"], Local::Unusable), doubts)])
    };
    let give = |to: &str| vec![Action::HandOver(id("v"), node(to))];
    let keep = || vec![Action::Promote(id("v"), epoch(3))];
    type Case<'a> = (&'a [(&'a str, Doubt)], Vec<Action>);
    let cases: [Case<'_>; 6] = [
        (&[], give("b")),
        (&[("b", Failed)], give("c")),
        (&[("b", Paused)], give("c")),
        (&[("b", Paused), ("c", Failed)], give("c")),
        (&[("b", Failed), ("c", Failed)], give("b")),
        // Nobody is able: it stays, under its epoch.
        (&[("b", Paused), ("c", Paused)], keep()),
    ];
    for (doubts, actions) in cases {
        assert_eq!(plan(&unusable(doubts)), actions, "{doubts:?}");
    }
    // A healthy node is not passed over because it serves more.
    let mut busy = unusable(&[("b", Failed)]);
    busy.volumes.push(volume("w", "c", &[], Local::Detached));
    busy.volumes.push(volume("x", "c", &[], Local::Detached));
    assert_eq!(plan(&busy), give("c"));
    // An operator has asked.
    let mut asked = unusable(&[("b", Paused), ("c", Paused)]);
    asked.volumes[0].target = Some(node("c"));
    assert_eq!(plan(&asked), give("c"));
    assert_eq!(plan(&Observed { stopping: true, ..unusable(&[]) }), keep());
    // One that is drained serves on rather than give to one that cannot.
    let primary = Local::Primary(epoch(3));
    let mut drained = observed("a", vec![doubted(volume("v", "a", &["b"], primary), &[("b", Paused)])]);
    drained.draining = vec![node("a")];
    assert_eq!(plan(&drained), []);
    // In line it comes last, and comes still.
    let line = |me, ms| {
        let v = doubted(volume("v", "a", &["b", "c"], Local::Backup), &[("b", Paused)]);
        plan(&with(observed(me, vec![v]), "a", silent(ms)))
    };
    assert_eq!(line("c", 0), [elect("v", "a")]);
    assert_eq!(line("b", 149), []);
    assert_eq!(line("b", 150), [elect("v", "a")]);
}

#[test]
fn balancing_tries_nobody_who_failed_and_waits_for_nobody_who_is_gone() {
    let primary = Local::Primary(epoch(3));
    let both = |doubts: &[(&str, Doubt)]| {
        let v = |id| doubted(volume(id, "a", &["b", "c"], primary), doubts);
        Observed { calm_since: BALANCE_AFTER, ..observed("a", vec![v("v"), v("w")]) }
    };
    assert_eq!(plan(&both(&[("b", Doubt::Failed)])), [Action::HandOver(id("v"), node("c"))]);
    assert_eq!(plan(&both(&[("b", Doubt::Failed), ("c", Doubt::Paused)])), []);
    // The dead have most, and nobody can take it from them.
    let mut lost = with(both(&[]), "b", Health::Dead(GONE_AFTER));
    for name in ["x", "y", "z"] {
        lost.volumes.push(volume(name, "b", &[], Local::Detached));
    }
    assert_eq!(plan(&lost), [Action::HandOver(id("v"), node("c"))]);
}

#[test]
fn what_nobody_has_made_is_made_by_a_backup() {
    let fresh = |local| Volume { formatted: false, ..volume("v", "a", &["b", "c"], local) };
    let dead = Health::Dead(Duration::ZERO);
    for local in [Local::Detached, Local::Unusable, Local::Backup] {
        assert_eq!(plan(&with(observed("b", vec![fresh(local)]), "a", dead)), [elect("v", "a")], "{local:?}");
    }
    let seen = |health| with(observed("b", vec![fresh(Local::Detached)]), "a", health);
    assert_eq!(plan(&seen(Health::Alive)), [Action::Attach(id("v"))]);
    assert_eq!(plan(&seen(Health::Unknown)), [Action::Attach(id("v"))]);
    assert_eq!(plan(&Observed { lease_held: false, ..seen(dead) }), [Action::Attach(id("v"))]);
    // It stands in line as any other.
    let second = |ms| with(observed("c", vec![fresh(Local::Detached)]), "a", silent(ms));
    assert_eq!(plan(&second(0)), [Action::Attach(id("v"))]);
    assert_eq!(plan(&second(150)), [elect("v", "a")]);
    // What was made is not made anew.
    let made = observed("b", vec![volume("v", "a", &["b", "c"], Local::Detached)]);
    assert_eq!(plan(&with(made, "a", dead)), [Action::Attach(id("v"))]);
}

#[test]
fn a_promotion_ends_when_it_cannot_come_any_more() {
    let (alive, dead) = (Health::Alive, Health::Dead(Duration::ZERO));
    let cases = [
        ("a", "b", alive, false, Promotion::Waiting),
        ("b", "b", alive, false, Promotion::Moved),
        ("b", "", alive, false, Promotion::Moved),
        ("b", "b", dead, true, Promotion::Moved),
        ("a", "c", alive, false, Promotion::Overtaken(node("c"))),
        ("b", "c", alive, false, Promotion::Overtaken(node("c"))),
        ("a", "", alive, false, Promotion::Failed),
        ("", "", alive, false, Promotion::Failed),
        ("a", "b", dead, false, Promotion::Away),
        ("a", "b", Health::Absent, false, Promotion::Away),
        ("a", "b", Health::Silent(HICCUP_MAX), false, Promotion::Away),
        ("a", "b", silent(0), false, Promotion::Unclear),
        ("a", "b", Health::Unknown, false, Promotion::Unclear),
        ("a", "b", alive, true, Promotion::Drained),
    ];
    for (primary, target, health, drained, outcome) in cases {
        let some = |id: &str| (!id.is_empty()).then(|| node(id));
        let (primary, target) = (some(primary), some(target));
        let is = promotion(primary.as_ref(), target.as_ref(), &node("b"), health, drained);
        assert_eq!(is, outcome, "{primary:?} {target:?} {health:?} {drained}");
    }
}

/// Whatever is observed: at most one action a volume, none on what is not known, and two nodes that observe
/// the same never elect themselves for one volume at the same moment.
#[test]
fn plans_agree_and_keep_their_hands_off() {
    let mut rng = fastrand::Rng::with_seed(11);
    let ids = ["a", "b", "c", "d"];
    for round in 0..20_000 {
        let health = |rng: &mut fastrand::Rng| match rng.u8(..6) {
            0 => Health::Unknown,
            1 => Health::Absent,
            2 => Health::Dead(Duration::ZERO),
            3 => silent(0),
            _ => Health::Alive,
        };
        let nodes: BTreeMap<NodeId, Health> = ids.iter().map(|id| (node(id), health(&mut rng))).collect();
        let draining: Vec<NodeId> = ids.iter().filter(|_| rng.u8(..8) == 0).map(|id| node(id)).collect();
        let records: Vec<Volume> = (0..rng.usize(..5))
            .map(|n| {
                let mut others = ids.to_vec();
                rng.shuffle(&mut others);
                let primary = if rng.u8(..8) == 0 { "" } else { others[0] };
                volume(&format!("v{n}"), primary, &others[1..rng.usize(1..=4)], Local::Backup)
            })
            .collect();
        let mut elected: BTreeMap<VolumeId, NodeId> = BTreeMap::new();
        for me in nodes.iter().filter(|(_, health)| **health == Health::Alive).map(|(id, _)| id) {
            let volumes = records
                .iter()
                .map(|record| Volume {
                    local: match rng.u8(..5) {
                        0 => Local::Busy,
                        1 if record.primary.as_ref() == Some(me) => Local::Primary(epoch(3)),
                        _ => Local::Backup,
                    },
                    ..record.clone()
                })
                .collect();
            let seen = Observed {
                me: me.clone(),
                nodes: nodes.clone(),
                draining: draining.clone(),
                calm_since: BALANCE_AFTER,
                ..observed("a", volumes)
            };
            let actions = plan(&seen);
            for action in &actions {
                let volume = seen.volumes.iter().find(|v| v.id == *action.volume()).unwrap();
                assert_ne!(volume.local, Local::Busy, "round {round}: {action:?}");
                assert_eq!(actions.iter().filter(|a| a.volume() == &volume.id).count(), 1, "round {round}");
                if let Action::Elect { from, .. } = action {
                    assert_eq!(*from, volume.primary);
                    let over = from.as_ref().is_none_or(|from| seen.over_since(from).is_some());
                    assert!(over, "round {round}: {action:?} although its lease may be held");
                    // A dead node's line is not staggered here: everybody sees its death at once.
                    let other = elected.insert(volume.id.clone(), me.clone());
                    let absent = from.as_ref().is_none_or(|from| nodes[from] == Health::Absent);
                    assert!(other.is_none() || absent, "round {round}: {other:?} and {me} for {}", volume.id);
                }
            }
        }
    }
}

#[test]
fn a_volume_that_leaves_is_retired_by_its_primary_and_let_go_of_by_the_others() {
    let leaving = |volume: Volume| Volume { retired: true, ..volume };
    let retire = || vec![Action::Retire(id("v"))];
    for local in [Local::Primary(epoch(3)), Local::Detached, Local::Backup, Local::Unusable, Local::Lost] {
        assert_eq!(plan(&observed("a", vec![leaving(volume("v", "a", &[], local))])), retire(), "{local:?}");
    }
    let cases = [
        (volume("v", "a", &[], Local::Busy), vec![]),
        (volume("v", "a", &[], Local::Fenced), vec![Action::StepDown(id("v"))]),
        (volume("v", "a", &[], Local::Primary(epoch(2))), vec![Action::StepDown(id("v"))]),
        (volume("v", "b", &[], Local::Backup), vec![Action::Detach(id("v"))]),
        (volume("v", "b", &[], Local::Detached), vec![]),
    ];
    for (volume, actions) in cases {
        let what = format!("{volume:?}");
        assert_eq!(plan(&observed("a", vec![leaving(volume)])), actions, "{what}");
    }
    let mut cut_off = observed("a", vec![leaving(volume("v", "a", &[], Local::Primary(epoch(3))))]);
    cut_off.store_reachable = false;
    assert_eq!(plan(&cut_off), []);
}
