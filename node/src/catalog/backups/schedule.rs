//! What a schedule of backups asks for now: pure, and tested as a table.
//!
//! Invariants: only backups that a schedule had taken are removed, of the schedule's own volume; never the newest one that is good, nor one
//! that is being taken.

use shardfs_proto::types::Timestamp;

use crate::cluster::records::backups::{BackupRecord, BackupWord, ScheduleRecord};

/// The shortest time between two backups.
pub(super) const EVERY_S_MIN: u64 = 10;
/// The most that are kept.
pub(super) const KEEP_MAX: u32 = 1000;
/// How far the clocks of nodes may differ.
const AHEAD_S_MAX: i64 = 5 * 60;
/// After an attempt that failed, the next one comes so late at most.
const AGAIN_S_MAX: u64 = 15 * 60;

/// A backup, and whether somebody is taking it at present.
pub(super) struct Seen<'a> {
    pub(super) record: &'a BackupRecord,
    pub(super) being_made: bool,
}

/// Something to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Due {
    /// Take one.
    Take,
    /// Delete this one.
    Remove(String),
}

/// What is to be done now, in this order. A clock that was set back brings a backup early, and keeps none away for long.
pub(super) fn due(now: Timestamp, schedule: &ScheduleRecord, backups: &[Seen<'_>]) -> Vec<Due> {
    let mut own: Vec<&Seen<'_>> = backups
        .iter()
        .filter(|seen| seen.record.scheduled && seen.record.volume == schedule.volume)
        .collect();
    // Latest first. One of a clock that was ahead would be the newest for ever, and push out all others: it counts as the oldest.
    let place = |seen: &Seen<'_>| {
        (seen.record.begun.seconds() <= now.seconds().saturating_add(AHEAD_S_MAX), seen.record.id.clone())
    };
    own.sort_by_key(|seen| std::cmp::Reverse(place(seen)));
    let is_good = |seen: &&Seen<'_>| seen.record.state == BackupWord::Done;
    let newest = own.iter().copied().find(is_good);
    let age = |then: Timestamp| now.seconds().abs_diff(then.seconds());
    let wanted = newest.is_none_or(|seen| age(seen.record.begun) >= schedule.every_s);
    let rested = schedule.last.is_none_or(|last| age(last) >= schedule.every_s.min(AGAIN_S_MAX));
    let mut actions = Vec::new();
    if wanted && rested && !own.iter().any(|seen| seen.being_made) {
        actions.push(Due::Take);
    }
    let keep = usize::try_from(schedule.keep).unwrap_or(usize::MAX).max(1);
    let surplus = own.iter().copied().filter(is_good).skip(keep);
    // What failed tells why until there is a later one that is good.
    let of_no_use = own.iter().copied().filter(|seen| match seen.record.state {
        BackupWord::Done => false,
        BackupWord::Making | BackupWord::Failed => {
            !seen.being_made && newest.is_some_and(|newest| place(seen) < place(newest))
        }
        BackupWord::Deleting => true,
    });
    actions.extend(surplus.chain(of_no_use).map(|seen| Due::Remove(seen.record.id.clone())));
    actions
}

#[cfg(test)]
mod tests {
    use shardfs_proto::types::{NodeId, VolumeId};

    use super::*;
    use crate::cluster::records::backups::new_id;

    const DAY: i64 = 86_400;
    const NOW: i64 = 100 * DAY;

    /// What it is, the schedule's last attempt and how many it keeps, the backups, and what is due.
    type Case = (&'static str, Option<i64>, u32, Vec<BackupRecord>, &'static [&'static str]);

    fn time(seconds: i64) -> Timestamp {
        Timestamp::new(seconds, 0).unwrap()
    }

    fn volume(id: &str) -> VolumeId {
        VolumeId::new(id).unwrap()
    }

    fn backup(begun: i64, state: BackupWord) -> BackupRecord {
        BackupRecord {
            v: 1,
            id: new_id(time(begun), 0),
            volume: volume("vol-1"),
            provider: "loop".into(),
            image: "x".into(),
            source: String::new(),
            begun: time(begun),
            bytes: 0,
            shards: 0,
            state,
            why: String::new(),
            scheduled: true,
            node: NodeId::new("n").unwrap(),
            incarnation: String::new(),
        }
    }

    /// `last`: of the schedule; a backup that is `Making` is being made if it is of now.
    fn decide(last: Option<i64>, keep: u32, backups: &[BackupRecord]) -> Vec<String> {
        let schedule =
            ScheduleRecord { v: 1, volume: volume("vol-1"), every_s: DAY as u64, keep, last: last.map(time) };
        let seen: Vec<Seen<'_>> = backups
            .iter()
            .map(|record| Seen {
                record,
                being_made: record.state == BackupWord::Making && record.begun == time(NOW),
            })
            .collect();
        let shown = |action: Due| match action {
            Due::Take => "take".to_owned(),
            Due::Remove(id) => {
                let record = backups.iter().find(|record| record.id == id).expect("of those");
                format!("remove {}", (NOW - record.begun.seconds()) / DAY)
            }
        };
        due(time(NOW), &schedule, &seen).into_iter().map(shown).collect()
    }

    #[test]
    fn schedules_take_and_remove() {
        use BackupWord::{Deleting, Done, Failed, Making};
        let ago = |days: i64, state| backup(NOW - days * DAY, state);
        let by_hand = |days, state| BackupRecord { scheduled: false, ..ago(days, state) };
        let of_another = |days, state| BackupRecord { volume: volume("vol-2"), ..ago(days, state) };
        let table: Vec<Case> = vec![
            ("the first", None, 3, vec![], &["take"]),
            ("not yet", Some(NOW - DAY + 1), 3, vec![backup(NOW - DAY + 1, Done)], &[]),
            ("due", Some(NOW - DAY), 3, vec![ago(1, Done)], &["take"]),
            ("by hand does not count", None, 3, vec![by_hand(0, Done)], &["take"]),
            ("nor another volume's", None, 1, vec![of_another(0, Done), of_another(1, Done)], &["take"]),
            (
                "surplus goes, oldest last kept",
                Some(NOW),
                2,
                vec![ago(0, Done), ago(1, Done), ago(2, Done), ago(3, Done)],
                &["remove 2", "remove 3"],
            ),
            (
                "one by hand stays",
                Some(NOW),
                1,
                vec![ago(0, Done), by_hand(1, Done), ago(2, Done)],
                &["remove 2"],
            ),
            (
                "a failure is soon tried again",
                Some(NOW - 900),
                3,
                vec![backup(NOW - 900, Failed), ago(2, Done)],
                &["take"],
            ),
            ("but not at once", Some(NOW - 899), 3, vec![backup(NOW - 899, Failed), ago(2, Done)], &[]),
            (
                "what failed goes after a good one",
                Some(NOW),
                3,
                vec![ago(0, Done), ago(1, Failed), ago(2, Making)],
                &["remove 1", "remove 2"],
            ),
            ("and stays until then", Some(NOW), 1, vec![ago(0, Failed), ago(3, Done)], &[]),
            ("one is being taken", Some(NOW - DAY), 1, vec![ago(0, Making), ago(1, Done)], &[]),
            ("a deletion goes on", Some(NOW), 1, vec![ago(0, Done), ago(1, Deleting)], &["remove 1"]),
            (
                "the newest good one always stays",
                Some(NOW),
                0,
                vec![ago(0, Done), ago(1, Done)],
                &["remove 1"],
            ),
            ("a clock that was ahead", Some(NOW + 9 * DAY), 9, vec![ago(-9, Done)], &["take"]),
            (
                "what it took pushes out none",
                Some(NOW),
                1,
                vec![ago(-9, Done), ago(0, Done), ago(1, Done)],
                &["remove 1", "remove -9"],
            ),
            (
                "clocks differ a little",
                Some(NOW),
                1,
                vec![backup(NOW + 60, Done), ago(1, Done)],
                &["remove 1"],
            ),
        ];
        for (what, last, keep, backups, expected) in table {
            assert_eq!(decide(last, keep, &backups), expected, "{what}");
        }
    }
}
