//! What the service manager is told, by sd_notify(3): that the node serves, how it is, that it lives, that it stops.
//!
//! The node tells it, not its parent, which knows nothing of it: so the unit says `NotifyAccess=all`, and the parent takes
//! WATCHDOG_PID, which names the parent, out of the node's environment.
//!
//! Invariants: a sign of life comes from the node's own runtime, and only if each of its loops ([`LOOPS`]) has gone round since
//! the last one. Whether what they try succeeds is no matter: a restart mends no metadata store that is away. Without
//! NOTIFY_SOCKET nothing is sent, and none of this runs.

use std::time::Duration;

use sd_notify::NotifyState;
use shardfs_proto::types::cluster::NodeStatus;
use tokio_util::sync::CancellationToken;

use crate::http::StatusSource;

/// Loops that must go round: the heartbeat, and the one that looks after the volumes.
pub const LOOPS: usize = 2;
/// Pause between two looks at the node, if the manager watches less often.
const LOOK_PAUSE: Duration = Duration::from_secs(5);
/// Signs of life within the manager's patience.
const SIGNS_PER_PATIENCE: u32 = 2;
/// Troubles that fit into a line.
const TROUBLES_SHOWN: usize = 3;

/// How often the loops have gone round.
pub type Rounds = Box<dyn Fn() -> [u64; LOOPS] + Send + Sync>;

/// Whether somebody listens.
pub fn wanted() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

fn tell(states: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, ?states, "the service manager cannot be told");
    }
}

/// What the node waits for before it serves.
pub fn starting(waits_for: &str) {
    tell(&[NotifyState::Status(waits_for)]);
}

/// It serves.
pub fn ready() {
    tell(&[NotifyState::Ready]);
}

/// It reads its settings again; [`ready`] ends that.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => tracing::warn!(%error, "the monotonic clock"),
    }
}

/// It stops.
pub fn stopping() {
    tell(&[NotifyState::Stopping, NotifyState::Status("stopping: handing over its volumes")]);
}

/// Tells how the node is and, if the manager watches, that it lives. Once `stopping`, the loops end one after the other and are
/// not asked any more: how long that may take is the manager's own limit.
pub async fn keep_telling(
    status: StatusSource,
    rounds: Rounds,
    stopping: CancellationToken,
    stop: CancellationToken,
) {
    let patience = sd_notify::watchdog_enabled();
    let pause = patience.map_or(LOOK_PAUSE, |patience| (patience / SIGNS_PER_PATIENCE).min(LOOK_PAUSE));
    let mut pulse = Pulse::default();
    let mut told = String::new();
    loop {
        if patience.is_some() {
            if stopping.is_cancelled() || pulse.goes_on(rounds()) {
                tell(&[NotifyState::Watchdog]);
            } else {
                tracing::error!(
                    "a loop of this node stands still: the service manager is told of no sign of life"
                );
            }
        }
        let line = describe(&status());
        if line != told && !stopping.is_cancelled() {
            tell(&[NotifyState::Status(&line)]);
            told = line;
        }
        if tokio::time::timeout(pause, stop.cancelled()).await.is_ok() {
            return;
        }
    }
}

/// Whether loops go round.
#[derive(Default, Debug)]
struct Pulse(Option<[u64; LOOPS]>);

impl Pulse {
    /// Whether each has gone round since this was asked last; true the first time.
    fn goes_on(&mut self, now: [u64; LOOPS]) -> bool {
        let before = self.0.replace(now);
        before.is_none_or(|before| before.iter().zip(now).all(|(before, now)| now > *before))
    }
}

/// A node in one line, for `systemctl status`.
fn describe(status: &NodeStatus) -> String {
    let (serves, shards) = (status.volumes.len(), status.open_shards);
    let mut line = format!("serves {serves} volumes, {shards} shards open");
    let mut troubles = Vec::new();
    if !status.store_reachable {
        troubles.push("the metadata store does not answer".to_owned());
    }
    let volumes = status.volumes.iter().filter(|volume| !volume.trouble.is_empty());
    troubles.extend(volumes.map(|volume| format!("volume {}: {}", volume.id, volume.trouble)));
    troubles.extend(status.damaged_shards.iter().map(|shard| format!("shard {} is damaged", shard.id)));
    let more = troubles.len().saturating_sub(TROUBLES_SHOWN);
    troubles.truncate(TROUBLES_SHOWN);
    if !troubles.is_empty() {
        line += "; IN TROUBLE: ";
        // A newline would end the line, and begin another message.
        line += &troubles.join("; ").replace('\n', " ");
    }
    if more > 0 {
        line += &format!("; and {more} more");
    }
    line
}

#[cfg(test)]
mod tests {
    use shardfs_proto::types::ViewFigures;
    use shardfs_proto::types::cluster::DamagedShard;
    use shardfs_proto::types::{NodeId, ShardId};

    use super::*;

    #[test]
    fn one_loop_that_stands_still_is_no_sign_of_life() {
        let mut pulse = Pulse::default();
        assert!(pulse.goes_on([0, 0]), "nothing to compare with");
        assert!(pulse.goes_on([1, 7]));
        assert!(!pulse.goes_on([2, 7]));
        assert!(!pulse.goes_on([2, 8]));
        assert!(pulse.goes_on([3, 9]));
    }

    #[test]
    fn troubles_stand_in_one_line() {
        let mut status = NodeStatus {
            id: NodeId::new("n").unwrap(),
            version: "1".into(),
            uptime_ms: 0,
            volumes: Vec::new(),
            open_shards: 4,
            open_shards_max: 9,
            block_cache_used_bytes: 0,
            block_cache_capacity_bytes: 0,
            write_buffer_used_bytes: 0,
            store_reachable: true,
            cluster_id: "c".into(),
            damaged_shards: Vec::new(),
            views: ViewFigures::default(),
        };
        assert_eq!(describe(&status), "serves 0 volumes, 4 shards open");
        status.store_reachable = false;
        let damaged = |id| DamagedShard { id: ShardId::new(id).unwrap(), error: "a\nb".into() };
        status.damaged_shards = (1..=4).map(damaged).collect();
        let line = describe(&status);
        assert!(
            line.contains("IN TROUBLE: the metadata store does not answer; shard 1 is damaged"),
            "{line}"
        );
        assert!(line.ends_with("and 2 more") && !line.contains('\n'), "{line}");
    }
}
