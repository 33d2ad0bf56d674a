//! Whether a volume is to be added, decided: what is known goes in, a decision comes out. No I/O, no clock.
//!
//! Invariants: what is not known is no reason to spend money; of what is known, every ceiling holds with the new volume counted. Nothing
//! is ever removed or made smaller.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use shardfs_proto::types::provisioning::{Money, Policy, Prices};
use shardfs_proto::types::{NodeId, VolumeId};

use crate::volume::GIB;
use crate::volume::cloud::{DISK_MACHINES_MAX, DiskSize};

/// How long a volume that was served before may be out of sight until it counts as having no room: longer than failovers and restarts.
pub(super) const OUT_OF_SIGHT_MAX: Duration = Duration::from_secs(300);
const MIB: u64 = 1 << 20;

/// How much shards may still grow on a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Room {
    /// So much, as the node that serves it says.
    Free(u64),
    /// It was never served: its room is still to come. Why it is not served, if that is known.
    ToCome(String),
    /// Nobody tells, since so long.
    OutOfSight(Duration),
}

/// A volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Seen {
    pub(super) id: VolumeId,
    /// Of kind `aws`: what is paid for.
    pub(super) disk: Option<DiskSize>,
    pub(super) room: Room,
    pub(super) shards: u32,
    pub(super) leaving: bool,
}

/// A node that may have the volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Candidate {
    pub(super) id: NodeId,
    /// Volumes that it serves, by the records.
    pub(super) serves: usize,
}

/// What is known.
#[derive(Clone, Default, Debug)]
pub(super) struct Situation {
    pub(super) volumes: Vec<Seen>,
    /// Disks that are being made for volumes that have no record yet.
    pub(super) makings: Vec<(VolumeId, DiskSize)>,
    pub(super) candidates: Vec<Candidate>,
    /// Names that are not free.
    pub(super) taken: BTreeSet<String>,
    /// The number of the next name.
    pub(super) next: u64,
    /// What is being made by policy, and by whom.
    pub(super) making: Option<(VolumeId, NodeId)>,
    /// What is left of the pause after an attempt that failed.
    pub(super) pause: Option<Duration>,
}

/// What is to be done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Decision {
    Nothing(Why),
    Add(Plan),
}

/// A volume that is to be added.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Plan {
    /// [`Plan::volume`] has it in its name.
    pub(super) number: u64,
    pub(super) volume: VolumeId,
    /// Its primary first.
    pub(super) nodes: Vec<NodeId>,
    /// What all volumes cost a month then.
    pub(super) monthly: Money,
}

/// Why nothing is done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Why {
    Making { volume: VolumeId, by: NodeId },
    Room { volume: VolumeId, bytes: u64 },
    ToCome { volume: VolumeId, trouble: String },
    OutOfSight { volume: VolumeId },
    Empty { volume: VolumeId },
    TooMany { have: usize, max: u32 },
    TooDear { would: Money, max: Money },
    NoNodes,
    NoName,
    Pause { left: Duration },
}

/// Decides.
pub(super) fn decide(policy: &Policy, now: &Situation) -> Decision {
    if let Some((volume, by)) = &now.making {
        return Decision::Nothing(Why::Making { volume: volume.clone(), by: by.clone() });
    }
    if let Some(why) = enough(policy, now) {
        return Decision::Nothing(why);
    }
    if let Some(why) = above_ceilings(policy, now, None) {
        return Decision::Nothing(why);
    }
    let nodes = choose(&now.candidates);
    if nodes.is_empty() {
        return Decision::Nothing(Why::NoNodes);
    }
    if let Some(left) = now.pause {
        return Decision::Nothing(Why::Pause { left });
    }
    let Some((number, volume)) = free_name(now) else { return Decision::Nothing(Why::NoName) };
    let monthly = cost(&policy.prices, now, None).plus(policy.prices.monthly(policy.gib, policy.iops));
    Decision::Add(Plan { number, volume, nodes, monthly })
}

/// Why there is room enough, or may be.
fn enough(policy: &Policy, now: &Situation) -> Option<Why> {
    let staying = || now.volumes.iter().filter(|volume| !volume.leaving);
    if let Some((volume, bytes)) = roomiest(now)
        && bytes >= policy.min_free_bytes
    {
        return Some(Why::Room { volume, bytes });
    }
    for seen in staying() {
        let volume = seen.id.clone();
        match &seen.room {
            Room::ToCome(trouble) => return Some(Why::ToCome { volume, trouble: trouble.clone() }),
            Room::OutOfSight(since) if *since < OUT_OF_SIGHT_MAX => {
                return Some(Why::OutOfSight { volume });
            }
            // Another one of this size would not have more.
            Room::Free(_) if seen.shards == 0 && seen.disk.is_some_and(|disk| disk.gib >= policy.gib) => {
                return Some(Why::Empty { volume });
            }
            Room::Free(_) | Room::OutOfSight(_) => {}
        }
    }
    None
}

/// The volume with the most room, of those that do not leave.
pub(super) fn roomiest(now: &Situation) -> Option<(VolumeId, u64)> {
    let free = now.volumes.iter().filter(|volume| !volume.leaving).filter_map(|volume| match volume.room {
        Room::Free(bytes) => Some((volume.id.clone(), bytes)),
        Room::ToCome(_) | Room::OutOfSight(_) => None,
    });
    free.max_by_key(|(_, bytes)| *bytes)
}

/// What is paid for, except for one volume.
fn paid<'a>(now: &'a Situation, except: Option<&'a VolumeId>) -> impl Iterator<Item = DiskSize> + 'a {
    let volumes = now.volumes.iter().filter_map(|seen| seen.disk.map(|disk| (&seen.id, disk)));
    let makings = now.makings.iter().map(|(id, size)| (id, *size));
    volumes.chain(makings).filter(move |(id, _)| Some(*id) != except).map(|(_, disk)| disk)
}

/// How many volumes are paid for.
pub(super) fn count(now: &Situation) -> usize {
    paid(now, None).count()
}

/// What all volumes, except for one, cost a month.
pub(super) fn cost(prices: &Prices, now: &Situation, except: Option<&VolumeId>) -> Money {
    paid(now, except).map(|disk| prices.monthly(disk.gib, disk.iops)).fold(Money::default(), Money::plus)
}

/// The ceiling above which one more volume would be. `besides`: that one, if it is counted already.
pub(super) fn above_ceilings(policy: &Policy, now: &Situation, besides: Option<&VolumeId>) -> Option<Why> {
    let have = paid(now, besides).count();
    if have >= policy.volumes_max as usize {
        return Some(Why::TooMany { have, max: policy.volumes_max });
    }
    let would = cost(&policy.prices, now, besides).plus(policy.prices.monthly(policy.gib, policy.iops));
    (would > policy.cost_max).then_some(Why::TooDear { would, max: policy.cost_max })
}

/// The nodes of a new volume: who serves the fewest first, as many as can attach it.
pub(super) fn choose(candidates: &[Candidate]) -> Vec<NodeId> {
    let mut line: Vec<&Candidate> = candidates.iter().collect();
    line.sort_by(|a, b| (a.serves, &a.id).cmp(&(b.serves, &b.id)));
    line.into_iter().take(DISK_MACHINES_MAX).map(|candidate| candidate.id.clone()).collect()
}

fn free_name(now: &Situation) -> Option<(u64, VolumeId)> {
    let names = (now.next.max(1)..).map(|number| (number, format!("auto-{number}")));
    // As many as are taken and one more: one of them is free.
    let mut some = names.take(now.taken.len() + 1);
    let (number, name) = some.find(|(_, name)| !now.taken.contains(name))?;
    VolumeId::new(name).ok().map(|volume| (number, volume))
}

/// Bytes for people.
pub(super) fn human(bytes: u64) -> String {
    match bytes {
        b if b >= 10 * GIB || (b >= GIB && b % GIB == 0) => format!("{} GiB", b / GIB),
        b if b >= GIB => format!("{:.1} GiB", b as f64 / GIB as f64),
        b => format!("{} MiB", b / MIB),
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::Making { volume, by } => write!(f, "{volume} is being made by {by}"),
            Why::Room { volume, bytes } => write!(f, "{volume} has {} of room", human(*bytes)),
            Why::ToCome { volume, trouble } if trouble.is_empty() => {
                write!(f, "{volume} is not served yet: its room is still to come")
            }
            Why::ToCome { volume, trouble } => write!(f, "{volume} is not served yet ({trouble})"),
            Why::OutOfSight { volume } => write!(
                f,
                "how much room {volume} has is not known at the moment: its node does not tell; after {} minutes it counts as full",
                OUT_OF_SIGHT_MAX.as_secs() / 60
            ),
            Why::Empty { volume } => write!(
                f,
                "{volume} is as large as a new one would be, empty, and has not the room either: ask for less room, or for larger volumes"
            ),
            Why::TooMany { have, max } => {
                write!(f, "there is too little room, but {have} volumes of kind aws, and {max} are the most")
            }
            Why::TooDear { would, max } => write!(
                f,
                "there is too little room, but with another volume all would cost {would} a month, and {max} is the most"
            ),
            Why::NoNodes => f.write_str(
                "there is too little room, but no living node may have a volume: one that uses the cloud (--aws-cluster), is not drained, and is among those \
                 that the policy names",
            ),
            Why::NoName => f.write_str("there is too little room, but no name is left"),
            Why::Pause { left } => {
                write!(f, "the last attempt failed: the next one follows in {} s", left.as_secs())
            }
        }
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Decision::Nothing(why) => write!(f, "nothing: {why}"),
            Decision::Add(plan) => {
                let (first, others) = plan
                    .nodes
                    .split_first()
                    .map_or(("nobody", &[][..]), |(first, others)| (first.as_str(), others));
                let others: Vec<&str> = others.iter().map(NodeId::as_str).collect();
                let standing_by = match others.len() {
                    0 => "nobody stands by".to_owned(),
                    1 => format!("{} stands by", others[0]),
                    _ => format!("{} stand by", others.join(", ")),
                };
                write!(
                    f,
                    "add {} on {first} ({standing_by}): no volume has enough room; all cost {} a month then",
                    plan.volume, plan.monthly
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> VolumeId {
        VolumeId::new(text).unwrap()
    }

    fn node(text: &str) -> NodeId {
        NodeId::new(text).unwrap()
    }

    /// Room of 100 GiB, by volumes of 200 GiB and 6000 IOPS, which cost 415 a month.
    fn policy() -> Policy {
        Policy {
            min_free_bytes: 100 * GIB,
            gib: 200,
            iops: 6_000,
            kms_key: None,
            volumes_max: 3,
            cost_max: "10000".parse().unwrap(),
            prices: Prices::LIST,
            nodes: Vec::new(),
        }
    }

    const DISK: DiskSize = DiskSize { gib: 200, iops: 6_000 };

    fn volume(name: &str, room: Room) -> Seen {
        Seen { id: id(name), disk: Some(DISK), room, shards: 1, leaving: false }
    }

    fn gib(n: u64) -> Room {
        Room::Free(n * GIB)
    }

    /// Two volumes without enough room, on nodes of which `b` serves nothing.
    fn short() -> Situation {
        Situation {
            volumes: vec![volume("vol-1", gib(99)), volume("vol-2", gib(3))],
            candidates: [("a", 1), ("b", 0), ("c", 1)]
                .map(|(id, serves)| Candidate { id: node(id), serves })
                .into(),
            next: 1,
            ..Situation::default()
        }
    }

    fn nothing(policy: &Policy, now: &Situation) -> Why {
        match decide(policy, now) {
            Decision::Nothing(why) => why,
            Decision::Add(plan) => panic!("{plan:?}"),
        }
    }

    fn plan(policy: &Policy, now: &Situation) -> Plan {
        match decide(policy, now) {
            Decision::Nothing(why) => panic!("{why}"),
            Decision::Add(plan) => plan,
        }
    }

    #[test]
    fn one_is_added_when_no_volume_has_the_room() {
        let made = plan(&policy(), &short());
        let nodes = vec![node("b"), node("a"), node("c")];
        assert_eq!(made, Plan { number: 1, volume: id("auto-1"), nodes, monthly: "1245".parse().unwrap() });
        let said = Decision::Add(made).to_string();
        assert!(said.contains("auto-1 on b (a, c stand by)") && said.contains("1245.00"), "{said}");
        // One has it, to the byte.
        for (bytes, enough) in [(100 * GIB - 1, false), (100 * GIB, true), (500 * GIB, true)] {
            let mut now = short();
            now.volumes[1].room = Room::Free(bytes);
            let decision = decide(&policy(), &now);
            let room = Decision::Nothing(Why::Room { volume: id("vol-2"), bytes });
            assert_eq!(decision == room, enough, "{decision}");
        }
        // A cluster that has no volume yet.
        let none = Situation { volumes: Vec::new(), ..short() };
        assert_eq!(plan(&policy(), &none).volume, id("auto-1"));
        // Volumes of other kinds have room as well, and cost nothing.
        let mut other = short();
        other.volumes.push(Seen { disk: None, ..volume("dir-1", gib(500)) });
        assert_eq!(nothing(&policy(), &other), Why::Room { volume: id("dir-1"), bytes: 500 * GIB });
        other.volumes[2].room = gib(1);
        assert_eq!(plan(&policy(), &other).monthly, "1245".parse().unwrap());
    }

    #[test]
    fn nothing_more_while_one_is_on_its_way() {
        let mut now = short();
        now.making = Some((id("auto-1"), node("c")));
        assert_eq!(nothing(&policy(), &now), Why::Making { volume: id("auto-1"), by: node("c") });
        // It has its record, but was never served.
        let mut now = short();
        now.volumes.push(volume("auto-1", Room::ToCome("it is being made".into())));
        let why = nothing(&policy(), &now);
        assert!(matches!(&why, Why::ToCome { volume, .. } if *volume == id("auto-1")), "{why}");
        assert!(why.to_string().contains("it is being made"), "{why}");
        // It leaves: nothing is to come.
        now.volumes[2].leaving = true;
        now.volumes.remove(0);
        assert_eq!(plan(&policy(), &now).volume, id("auto-1"));
    }

    #[test]
    fn what_leaves_has_no_room_but_is_paid_for() {
        let mut now = short();
        now.volumes.push(Seen { leaving: true, ..volume("vol-3", gib(150)) });
        assert_eq!(nothing(&policy(), &now), Why::TooMany { have: 3, max: 3 });
        let more = Policy { volumes_max: 4, ..policy() };
        assert_eq!(plan(&more, &now).monthly, "1660".parse().unwrap());
    }

    #[test]
    fn ceilings_hold_with_the_new_volume() {
        let mut now = short();
        for (max, allowed) in [(2, false), (3, true)] {
            let policy = Policy { volumes_max: max, ..policy() };
            assert_eq!(matches!(decide(&policy, &now), Decision::Add(_)), allowed, "{max}");
        }
        for (max, allowed) in [("830", false), ("1244.999999", false), ("1245", true), ("1245.01", true)] {
            let policy = Policy { cost_max: max.parse().unwrap(), ..policy() };
            assert_eq!(matches!(decide(&policy, &now), Decision::Add(_)), allowed, "{max}");
        }
        let dear = Policy { cost_max: "1244".parse().unwrap(), ..policy() };
        let why = nothing(&dear, &now);
        assert_eq!(why, Why::TooDear { would: "1245".parse().unwrap(), max: dear.cost_max });
        assert!(why.to_string().contains("1245.00") && why.to_string().contains("1244.00"), "{why}");
        // What an operator is about to add counts.
        now.makings.push((id("vol-9"), DISK));
        assert_eq!(nothing(&policy(), &now), Why::TooMany { have: 3, max: 3 });
        // The one itself, which is counted already, does not count twice.
        assert_eq!(above_ceilings(&policy(), &now, Some(&id("vol-9"))), None);
        assert!(above_ceilings(&Policy { volumes_max: 2, ..policy() }, &now, Some(&id("vol-9"))).is_some());
        // By the volumes' own sizes and IOPS.
        now.volumes[0].disk = Some(DiskSize { gib: 1_024, iops: 10_000 });
        assert_eq!(cost(&Prices::LIST, &now, None), "1608".parse().unwrap());
    }

    #[test]
    fn what_is_not_known_is_waited_for_and_not_for_ever() {
        let mut now = short();
        now.volumes[0].room = Room::OutOfSight(OUT_OF_SIGHT_MAX - Duration::from_secs(1));
        assert_eq!(nothing(&policy(), &now), Why::OutOfSight { volume: id("vol-1") });
        // What is known may suffice.
        now.volumes[1].room = gib(100);
        assert!(matches!(nothing(&policy(), &now), Why::Room { .. }));
        now.volumes[1].room = gib(1);
        now.volumes[0].room = Room::OutOfSight(OUT_OF_SIGHT_MAX);
        assert_eq!(plan(&policy(), &now).volume, id("auto-1"));
    }

    #[test]
    fn an_empty_volume_that_has_not_the_room_is_not_followed_by_others() {
        let mut now = short();
        now.volumes[0].shards = 0;
        assert_eq!(nothing(&policy(), &now), Why::Empty { volume: id("vol-1") });
        // A larger one may have it.
        now.volumes[0].disk = Some(DiskSize { gib: 199, iops: 6_000 });
        assert_eq!(plan(&policy(), &now).volume, id("auto-1"));
    }

    #[test]
    fn a_pause_follows_an_attempt_that_failed() {
        let now = Situation { pause: Some(Duration::from_secs(7)), ..short() };
        let why = nothing(&policy(), &now);
        assert_eq!(why, Why::Pause { left: Duration::from_secs(7) });
        assert!(why.to_string().contains("7 s"), "{why}");
    }

    #[test]
    fn nodes_that_serve_little_come_first_and_sixteen_are_the_most() {
        let none = Situation { candidates: Vec::new(), ..short() };
        assert_eq!(nothing(&policy(), &none), Why::NoNodes);
        let one = Situation { candidates: vec![Candidate { id: node("z"), serves: 9 }], ..short() };
        let made = plan(&policy(), &one);
        assert_eq!(made.nodes, [node("z")]);
        assert!(Decision::Add(made).to_string().contains("nobody stands by"));
        let many: Vec<Candidate> =
            (0..20).map(|n| Candidate { id: node(&format!("n-{n:02}")), serves: 20 - n }).collect();
        let chosen = choose(&many);
        assert_eq!((chosen.len(), chosen[0].as_str(), chosen[15].as_str()), (16, "n-19", "n-04"));
    }

    #[test]
    fn names_are_free_and_given_once() {
        let named = |next, taken: &[&str]| {
            let taken = taken.iter().map(|name| (*name).to_owned()).collect();
            let made = plan(&policy(), &Situation { next, taken, ..short() });
            (made.number, made.volume.to_string())
        };
        assert_eq!(named(1, &[]), (1, "auto-1".to_owned()));
        assert_eq!(named(0, &[]), (1, "auto-1".to_owned()));
        assert_eq!(named(4, &["auto-1"]), (4, "auto-4".to_owned()));
        assert_eq!(named(4, &["auto-4", "vol-1", "auto-5"]), (6, "auto-6".to_owned()));
    }

    #[test]
    fn bytes_for_people() {
        for (bytes, said) in
            [(5 * MIB, "5 MiB"), (GIB, "1 GiB"), (GIB + GIB / 2, "1.5 GiB"), (200 * GIB + 5, "200 GiB")]
        {
            assert_eq!(human(bytes), said);
        }
    }
}
