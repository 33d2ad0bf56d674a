//! What the mount remembers about shards: which are closed, which number a name had last, and what this
//! mount itself changed a moment ago.
//!
//! - Closed is for good, so that a note of it never expires.
//! - A number that a name had is a guess: it lets two questions be asked at once, and is never an answer.
//! - Nodes learn of a new, renamed or deleted shard from the metadata store, each a little later than the
//!   other. What this mount did is laid over what a node says for [`OWN_CHANGE_AGE_MAX`], so that a mount
//!   always sees its own changes.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use shardfs_proto::types::cluster::ShardInfo;
use shardfs_proto::types::op::ShardState;
use shardfs_proto::types::{ShardId, ShardName, clock};

/// Names whose number is remembered; when there are more, all are forgotten.
const GUESSES_MAX: usize = 16_384;
/// Own changes that are remembered; when there are more, the nodes have to do without.
const OWN_CHANGES_MAX: usize = 4096;
/// How long a node may take to learn of a change from the metadata store.
const OWN_CHANGE_AGE_MAX: Duration = Duration::from_secs(5);

/// What this mount did to a name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OwnChange {
    /// It names this shard now.
    Made(ShardId),
    /// It names this shard no more.
    Removed(ShardId),
}

/// See the module's comment.
#[derive(Default)]
pub struct Shards {
    closed: RwLock<HashSet<ShardId>>,
    /// Of which shard a snapshot is: for good.
    snapshots: RwLock<HashMap<ShardId, ShardId>>,
    guesses: Mutex<HashMap<ShardName, ShardId>>,
    own: Mutex<HashMap<ShardName, (OwnChange, Instant)>>,
}

impl Shards {
    /// Notes what a node told.
    pub fn learn(&self, info: &ShardInfo) {
        if info.state == ShardState::ReadOnly {
            self.close(info.id);
        }
        if let Some(of) = info.snapshot_of {
            // Its name is none of the root's.
            self.snapshots.write().insert(info.id, of);
            return;
        }
        let mut guesses = self.guesses.lock();
        if guesses.len() >= GUESSES_MAX {
            guesses.clear();
        }
        guesses.insert(info.name.clone(), info.id);
    }

    /// Notes that a shard is closed.
    pub fn close(&self, shard: ShardId) {
        if !self.is_closed(shard) {
            self.closed.write().insert(shard);
        }
    }

    /// Whether the shard is known to be closed; one that another client closed just now may not be.
    pub fn is_closed(&self, shard: ShardId) -> bool {
        self.closed.read().contains(&shard)
    }

    /// The shard that this is a snapshot of. Whatever the kernel asks about in one, it has looked up in `.snap`, which told.
    pub fn snapshot_of(&self, shard: ShardId) -> Option<ShardId> {
        self.snapshots.read().get(&shard).copied()
    }

    /// Which shard the name may stand for.
    pub fn guess(&self, name: &ShardName) -> Option<ShardId> {
        self.guesses.lock().get(name).copied()
    }

    /// Notes what this mount did to a name.
    pub fn changed(&self, name: &ShardName, change: OwnChange) {
        let now = clock::monotonic();
        let mut own = self.own.lock();
        if own.len() >= OWN_CHANGES_MAX {
            own.retain(|_, (_, at)| now.duration_since(*at) < OWN_CHANGE_AGE_MAX);
        }
        if own.len() < OWN_CHANGES_MAX {
            own.insert(name.clone(), (change, now));
        }
        if let OwnChange::Removed(_) = change {
            self.guesses.lock().remove(name);
        }
    }

    /// What this mount did to the name lately.
    pub fn own_change(&self, name: &ShardName) -> Option<OwnChange> {
        let own = self.own.lock();
        let (change, at) = own.get(name)?;
        (clock::monotonic().duration_since(*at) < OWN_CHANGE_AGE_MAX).then_some(*change)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_own_change_counts() {
        let shards = Shards::default();
        let name = ShardName::new("a").unwrap();
        let (one, two) = (ShardId::new(1).unwrap(), ShardId::new(2).unwrap());
        assert_eq!(shards.own_change(&name), None);
        shards.changed(&name, OwnChange::Made(one));
        shards.changed(&name, OwnChange::Removed(one));
        assert_eq!(shards.own_change(&name), Some(OwnChange::Removed(one)));
        shards.changed(&name, OwnChange::Made(two));
        assert_eq!(shards.own_change(&name), Some(OwnChange::Made(two)));
    }

    #[test]
    fn own_changes_are_bounded() {
        let shards = Shards::default();
        for n in 0..OWN_CHANGES_MAX + 10 {
            shards.changed(
                &ShardName::new(format!("s{n}")).unwrap(),
                OwnChange::Made(ShardId::new(1).unwrap()),
            );
        }
        assert!(shards.own.lock().len() <= OWN_CHANGES_MAX);
    }

    #[test]
    fn closed_is_for_good() {
        let shards = Shards::default();
        let id = ShardId::new(7).unwrap();
        assert!(!shards.is_closed(id));
        shards.close(id);
        shards.close(id);
        assert!(shards.is_closed(id));
    }
}
