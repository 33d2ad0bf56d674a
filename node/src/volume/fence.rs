//! Fencing: what takes a volume away from whoever had it for writing, before the next primary mounts it.
//!
//! The metadata store decides who is primary; nothing in it can stop a process that was stopped and is resumed,
//! or a kernel that has dirty pages left. A [`Fence`] can, at the device or beneath it. After
//! [`Fence::acquire`] has answered `Ok`, no other node's process or kernel changes the volume any more.
//!
//! | kind | volumes | fence |
//! |---|---|---|
//! | [`FenceKind::Reservation`] | whole SCSI and NVMe devices | a persistent reservation: the device refuses the others' writes |
//! | [`FenceKind::Shutdown`] | loop devices | the old filesystem is shut down, its device drained and made read-only |
//! | [`FenceKind::Lock`] | folders | the old primary's flock must be gone: it is, once its process has ended |
//!
//! Invariants: an acquisition may be cut off anywhere and repeated; one of an older epoch fails, whenever it is
//! resumed; every wait has a bound. Nothing here mounts, ends a process, or knows the metadata store.

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use shardfs_proto::types::{Epoch, Error, NodeId, Reason, Result, VolumeId, clock};

use super::VolumeSpec;

mod bounded;
pub mod lock;
pub mod reservation;
pub mod shutdown;

/// Bits of a [`FenceKey`] that hold the epoch.
const EPOCH_BITS: u32 = 40;

/// Who takes a volume, as the device knows it: 64 bits that a reservation carries.
///
/// | bits | content |
/// |---|---|
/// | 63..=40 | the upper 24 bits of the CRC-32C of the node id |
/// | 39..=0 | the epoch |
///
/// The epoch stands in it openly, so that a key found on a device tells whether its holder came later; each
/// epoch of a volume has one winner, so keys of a volume differ even where the hashes of two nodes do not.
/// Never 0, which devices take for "no key".
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct FenceKey(u64);

impl FenceKey {
    /// The key of a node at an epoch. Refuses epochs beyond 2^40: at a promotion a second, 34,000 years.
    pub fn new(node: &NodeId, epoch: Epoch) -> Result<FenceKey> {
        if epoch.get() >> EPOCH_BITS != 0 {
            return Err(Error::invalid(format!("epoch {epoch} does not fit a fence key")));
        }
        let hash = u64::from(crc32c::crc32c(node.as_str().as_bytes()) >> 8);
        Ok(FenceKey(hash << EPOCH_BITS | epoch.get()))
    }

    /// A key as it was found. `None`: no key of ours, for the epoch is 0.
    pub fn from_raw(raw: u64) -> Option<FenceKey> {
        (raw & ((1 << EPOCH_BITS) - 1) != 0).then_some(FenceKey(raw))
    }

    /// The 64 bits.
    pub fn get(self) -> u64 {
        self.0
    }

    /// The epoch in it.
    pub fn epoch(self) -> u64 {
        self.0 & ((1 << EPOCH_BITS) - 1)
    }
}

impl fmt::Display for FenceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#018x}", self.0)
    }
}

impl fmt::Debug for FenceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FenceKey({self}, epoch {})", self.epoch())
    }
}

/// How a volume is fenced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FenceKind {
    /// The device refuses everybody else's writes.
    Reservation,
    /// The old filesystem is shut down under its processes.
    Shutdown,
    /// A lock that the old primary's process holds for as long as it lives.
    Lock,
    /// None, and the configuration allows it: nothing stops an old primary.
    None,
}

impl FenceKind {
    /// For logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            FenceKind::Reservation => "reservation",
            FenceKind::Shutdown => "shutdown",
            FenceKind::Lock => "lock",
            FenceKind::None => "none",
        }
    }
}

/// One attempt to take a volume.
#[derive(Clone, Debug)]
pub struct Takeover {
    /// The winner's key.
    pub key: FenceKey,
    /// Keys of primaries before, as far as known, latest first: where a device does not tell who holds it, they
    /// are tried. May be empty.
    pub predecessors: Vec<FenceKey>,
    /// The primary before, the first of `predecessors`, has unmounted and said so: nothing of it is under way. It need
    /// not have released: while it holds the device, what others have still to write is refused.
    pub handed_over: bool,
    /// How long it may take. When it is over the attempt fails; what was reached stays, and may be repeated.
    pub bound: Duration,
}

impl Takeover {
    /// One that knows no predecessors.
    pub fn new(key: FenceKey, bound: Duration) -> Takeover {
        Takeover { key, predecessors: Vec::new(), handed_over: false, bound }
    }
}

/// What a step of an acquisition was.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Action {
    /// The epoch was noted where later and earlier winners see it.
    Claimed,
    /// The old filesystem was shut down, without a flush of its log.
    ShutDown,
    /// System calls, writeback and journal that were inside the old filesystem have left it.
    Settled,
    /// The old device's dirty pages were written out.
    Drained,
    /// The old device was made read-only: it cannot be mounted for writing again, nor written directly.
    MadeReadOnly,
    /// The old device's counters stood still with nothing in flight.
    Still,
    /// The old mount of a dead process was taken away, and its device.
    Removed,
    /// The old mount stays, shut down: its process lives, or may live.
    LeftBehind,
    /// The key was registered with the device.
    Registered,
    /// The reservation was free, or ours already.
    Reserved,
    /// The reservation was taken from the target, whose commands were aborted.
    PreemptedAborting,
    /// The abort did not end within its bound; the plain preemption follows.
    AbortHung,
    /// The reservation was taken from the target, whose commands may still be under way.
    Preempted,
    /// Every registration was removed: the holder could not be found out.
    Cleared,
    /// Time was given to commands that were under way.
    Waited,
    /// The device says, or shows, that the reservation is ours.
    Verified,
    /// A registration of an older epoch was removed.
    Swept,
    /// The lock was taken.
    Locked,
}

impl Action {
    /// For logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Action::Claimed => "claimed",
            Action::ShutDown => "shut down",
            Action::Settled => "settled",
            Action::Drained => "drained",
            Action::MadeReadOnly => "made read-only",
            Action::Still => "still",
            Action::Removed => "removed",
            Action::LeftBehind => "left behind",
            Action::Registered => "registered",
            Action::Reserved => "reserved",
            Action::PreemptedAborting => "preempted, aborting",
            Action::AbortHung => "abort hung",
            Action::Preempted => "preempted",
            Action::Cleared => "cleared",
            Action::Waited => "waited",
            Action::Verified => "verified",
            Action::Swept => "swept",
            Action::Locked => "locked",
        }
    }
}

/// One step that was done.
#[derive(Clone, Debug)]
pub struct Step {
    /// What.
    pub action: Action,
    /// To which device, or whose key.
    pub target: String,
    /// How long it took.
    pub took: Duration,
}

/// The volume is ours: nobody else changes it any more.
#[derive(Debug)]
pub struct Fenced {
    kind: FenceKind,
    key: FenceKey,
    steps: Vec<Step>,
    took: Duration,
    device: Option<PathBuf>,
    hold: Option<OwnedFd>,
}

impl Fenced {
    /// How.
    pub fn kind(&self) -> FenceKind {
        self.kind
    }

    /// By whom.
    pub fn key(&self) -> FenceKey {
        self.key
    }

    /// What was done, in order.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// How long all of it took.
    pub fn took(&self) -> Duration {
        self.took
    }

    /// The device that may be mounted now, where that is fixed.
    pub fn device(&self) -> Option<&Path> {
        self.device.as_deref()
    }

    /// The lock, for the primary to keep.
    pub(super) fn into_hold(self) -> Option<OwnedFd> {
        self.hold
    }
}

impl fmt::Display for Fenced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} fence by {} in {} ms:", self.kind.as_str(), self.key, self.took.as_millis())?;
        for (at, step) in self.steps.iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            write!(f, "{comma} {} {} ({} us)", step.action.as_str(), step.target, step.took.as_micros())?;
        }
        Ok(())
    }
}

/// A way of fencing. Blocking; call from a blocking thread.
pub trait Fence: Send + Sync {
    /// Whether this volume has a working fence, and which; the error says what it lacks. Changes nothing.
    fn capability(&self, spec: &VolumeSpec) -> Result<FenceKind>;

    /// Takes the volume from whoever had it for writing. After `Ok` no other node's process or kernel changes
    /// it any more. Idempotent; may be cut off anywhere and repeated. [`Reason::StaleEpoch`]: somebody with a
    /// later epoch was here.
    fn acquire(&self, spec: &VolumeSpec, takeover: &Takeover) -> Result<Fenced>;

    /// Whether nobody has taken it since. Cheap.
    fn still_held(&self, spec: &VolumeSpec, key: FenceKey) -> Result<bool>;

    /// Gives it up, after the last unmount. Idempotent; changes nothing if it is not ours any more.
    fn release(&self, spec: &VolumeSpec, key: FenceKey) -> Result<()>;
}

/// The fence of a volume, or why it is refused: a volume that cannot be fenced is served only where its
/// configuration allows it.
pub fn required(fence: &dyn Fence, spec: &VolumeSpec) -> Result<FenceKind> {
    match fence.capability(spec) {
        Ok(kind) => Ok(kind),
        Err(error) if spec.allow_unfenced => {
            tracing::warn!(volume = %spec.id, %error,
                "the volume has no fence, and is allowed to have none: an old primary can destroy it");
            Ok(FenceKind::None)
        }
        Err(error) => Err(Error::new(
            Reason::Unsupported,
            format!(
                "volume {}: no working fence: {}; use a volume that can be fenced, or allow this one to go \
                 without (`allow_unfenced`), which lets an old primary destroy it",
                spec.id,
                error.message()
            ),
        )),
    }
}

/// What is to be answered for a volume that is allowed to have no fence.
fn unfenced(key: FenceKey) -> Fenced {
    Fenced { kind: FenceKind::None, key, steps: Vec::new(), took: Duration::ZERO, device: None, hold: None }
}

/// A later epoch has the volume.
fn stale(volume: &VolumeId, own: FenceKey, other: FenceKey) -> Error {
    Error::new(
        Reason::StaleEpoch,
        format!("volume {volume}: {other} of epoch {} has taken it, {own} is older", other.epoch()),
    )
}

/// The end of an attempt.
#[derive(Clone, Copy, Debug)]
struct Deadline(Instant);

impl Deadline {
    fn after(bound: Duration) -> Deadline {
        let now = clock::monotonic();
        Deadline(now.checked_add(bound).unwrap_or(now))
    }

    fn left(self) -> Duration {
        self.0.saturating_duration_since(clock::monotonic())
    }

    fn is_over(self) -> bool {
        self.left().is_zero()
    }

    /// Sleeps, but not beyond the end.
    fn pause(self, pause: Duration) {
        std::thread::sleep(pause.min(self.left()));
    }
}

/// Collects the steps of one acquisition.
struct Journal {
    begun: Instant,
    last: Instant,
    steps: Vec<Step>,
}

impl Journal {
    fn new() -> Journal {
        let now = clock::monotonic();
        Journal { begun: now, last: now, steps: Vec::new() }
    }

    /// What ended now and began when the step before ended.
    fn note(&mut self, action: Action, target: impl fmt::Display) {
        let now = clock::monotonic();
        self.steps.push(Step { action, target: target.to_string(), took: now - self.last });
        self.last = now;
    }

    fn done(self, kind: FenceKind, key: FenceKey) -> Fenced {
        Fenced { kind, key, steps: self.steps, took: self.begun.elapsed(), device: None, hold: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(node: &str, epoch: u64) -> FenceKey {
        FenceKey::new(&NodeId::new(node).unwrap(), Epoch::new(epoch).unwrap()).unwrap()
    }

    #[test]
    fn keys_have_these_bits() {
        // Devices keep them across power cuts and versions of this program.
        assert_eq!(key("node-1", 1).get(), 0xF36D_4000_0000_0001);
        assert_eq!(key("node-2", 7).get(), 0xE03D_B300_0000_0007);
        assert_eq!(key("i-0abc", (1 << 40) - 1).get(), 0x3D19_14FF_FFFF_FFFF);
        assert_eq!(key("node-1", 1).epoch(), 1);
        assert_eq!(FenceKey::from_raw(key("node-2", 7).get()), Some(key("node-2", 7)));
        assert_eq!(FenceKey::from_raw(0), None);
        assert_eq!(FenceKey::from_raw(0xABCD << EPOCH_BITS), None);
    }

    #[test]
    fn an_epoch_that_does_not_fit_is_refused() {
        let node = NodeId::new("node-1").unwrap();
        assert!(FenceKey::new(&node, Epoch::new(1 << EPOCH_BITS).unwrap()).is_err());
        assert!(FenceKey::new(&node, Epoch::new(u64::MAX).unwrap()).is_err());
    }

    struct Without;

    impl Fence for Without {
        fn capability(&self, _spec: &VolumeSpec) -> Result<FenceKind> {
            Err(Error::new(Reason::Unsupported, "the device knows no reservations"))
        }

        fn acquire(&self, _spec: &VolumeSpec, takeover: &Takeover) -> Result<Fenced> {
            Ok(unfenced(takeover.key))
        }

        fn still_held(&self, _spec: &VolumeSpec, _key: FenceKey) -> Result<bool> {
            Ok(true)
        }

        fn release(&self, _spec: &VolumeSpec, _key: FenceKey) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_volume_without_a_fence_is_refused_unless_allowed() {
        let mut spec = VolumeSpec {
            id: VolumeId::new("vol-1").unwrap(),
            cluster_id: "c1".into(),
            source: "/dev/sdz".into(),
            size_bytes: 0,
            formatted: true,
            mount_point: "/nowhere/vol-1".into(),
            allow_unfenced: false,
        };
        let error = required(&Without, &spec).unwrap_err();
        assert_eq!(error.reason(), Reason::Unsupported);
        assert!(error.message().contains("allow_unfenced") && error.message().contains("no reservations"));
        spec.allow_unfenced = true;
        assert_eq!(required(&Without, &spec).unwrap(), FenceKind::None);
    }
}
