//! Reads from backups: the views of other nodes' shards that this node has open.
//!
//! An answer is given from a view only if, after it was read, this node's lease was held and then its copy of the records showed
//! its pin of the view: so nobody can have deleted a file of it before (`cluster/pins.rs`). The age of an answer is counted by
//! this node's clock, from a heartbeat of its own that the store had before the revision that the primary had seen before it made
//! the view: no two clocks are compared.
//!
//! What is open is kept up by one task ([`keeper`]); a read finds it in memory, or says what it wants and waits a little.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use shardfs_proto::types::clock::{self, BootTime};
use shardfs_proto::types::cluster::Selector;
use shardfs_proto::types::op::ShardState;
use shardfs_proto::types::{ClientId, Error, Reason, Result, ShardId, ViewFigures, ViewLabel, VolumeId};
use tokio::sync::{Notify, watch};

use super::Catalog;
use crate::cluster::lease::Lease;
use crate::cluster::records::StateWord;
use crate::cluster::records::views::Pinned;
use crate::cluster::store::Revision;
use crate::cluster::view::View;
use crate::shard::{PublishedView, ReadView};
use keeper::{Keeper, Mounted};

mod keeper;

/// How long the first read of a shard waits for its view.
const FIRST_WAIT_MAX: Duration = Duration::from_millis(1500);
/// Pause between looks while it waits.
const FIRST_WAIT_PAUSE: Duration = Duration::from_millis(25);
/// A shard is read here for so long after its last read: its views are kept up.
const READ_TERM: Duration = Duration::from_secs(60);
/// Shards that are read here at a time; views of more are not opened.
const SHARDS_MAX: usize = 4096;

/// See the module.
pub(super) struct Views {
    shards: RwLock<HashMap<ShardId, Arc<Entry>>>,
    keeper: tokio::sync::Mutex<Keeper>,
    /// Wakes the keeper.
    wake: Notify,
    /// Raised when something was opened or refused.
    changed: watch::Sender<u64>,
    pub(super) figures: Figures,
}

impl Default for Views {
    fn default() -> Views {
        Views {
            shards: RwLock::default(),
            keeper: tokio::sync::Mutex::default(),
            wake: Notify::new(),
            changed: watch::Sender::new(0),
            figures: Figures::default(),
        }
    }
}

/// Counters; see [`ViewFigures`].
#[derive(Default)]
pub(super) struct Figures {
    pub(super) published: AtomicU64,
    pub(super) publish_failures: AtomicU64,
    opened: AtomicU64,
    answers: AtomicU64,
    refused_stale: AtomicU64,
    refused_lost: AtomicU64,
    refused_unreadable: AtomicU64,
    devices_retired: AtomicU64,
    sectors_written: AtomicU64,
}

/// One shard that is read here.
#[derive(Default)]
struct Entry {
    state: Mutex<EntryState>,
}

#[derive(Default)]
struct EntryState {
    open: Option<Arc<Opened>>,
    last_read: BootTime,
    /// The least age that was wanted lately, and when.
    wanted: Option<(Duration, BootTime)>,
    /// When the primary was last asked for views.
    asked: Option<BootTime>,
    /// Why reads are refused while there is no view, and until when.
    refused: Option<(Error, BootTime)>,
    /// Until when no view is opened, because that has failed.
    open_after: BootTime,
}

/// A view that is open.
struct Opened {
    pin: Pinned,
    volume: VolumeId,
    view: Arc<PublishedView>,
    last: bool,
    mount: Arc<Mounted>,
    /// The latest moment at which it is known to have been true: a revision of the store, and a moment before it.
    true_at: Mutex<(Revision, Option<BootTime>)>,
    /// It cannot be read, or its pin is gone.
    lost: AtomicBool,
    /// It was superseded long ago: who reads for long lets go.
    wanted_back: Arc<AtomicBool>,
    /// Since when it is superseded.
    superseded: Mutex<Option<BootTime>>,
}

impl Opened {
    /// How old what it shows is, at most. `None`: it is not known.
    fn age(&self, view: &View, lease: &Lease, now: BootTime) -> Option<Duration> {
        if self.last {
            return Some(Duration::ZERO);
        }
        let mut true_at = self.true_at.lock();
        // Announced again: it was true still.
        if let Some(kept) = view.view_of(self.pin.shard)
            && kept.record.name == self.pin.name
            && kept.record.true_at() > true_at.0
            && let Some(moment) = lease.before(kept.record.true_at())
        {
            *true_at = (kept.record.true_at(), Some(moment));
        }
        Some(now.since(true_at.1?))
    }
}

/// A view that a call reads from.
pub struct BackupRead {
    catalog: Arc<Catalog>,
    opened: Arc<Opened>,
    label: ViewLabel,
}

impl BackupRead {
    /// What to read through.
    pub fn view(&self) -> ReadView {
        self.opened.view.read_view().with_wanted_back(self.opened.wanted_back.clone())
    }

    /// Of which view the answers are.
    pub fn label(&self) -> &ViewLabel {
        &self.label
    }

    /// Passes on what was read, if it may be told. What is wrong with the view itself is the caller's sign to ask the primary.
    pub fn finish<T>(&self, outcome: Result<T>) -> Result<T> {
        let figures = &self.catalog.views.figures;
        let error = match outcome {
            Err(error) if BackupRead::is_trouble(error.reason()) => {
                // It may be the files of somebody else by now; then it is no news.
                self.confirm()?;
                self.opened.lost.store(true, Ordering::Release);
                self.catalog.views.wake.notify_one();
                figures.refused_unreadable.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(shard = %self.opened.pin.shard, view = %self.opened.pin.name, %error,
                    "a view cannot be read");
                error
            }
            outcome => {
                self.confirm()?;
                figures.answers.fetch_add(1, Ordering::Relaxed);
                return outcome;
            }
        };
        Err(self.refusal(&format!("its view cannot be read: {}", error.message())))
    }

    /// Whether an error tells of the view, and not of what is in it.
    pub fn is_trouble(reason: Reason) -> bool {
        matches!(reason, Reason::Corrupt | Reason::Io | Reason::Internal | Reason::Unavailable)
    }

    /// Fails unless nobody can have deleted a file of the view yet.
    fn confirm(&self) -> Result<()> {
        let parts = &self.catalog.parts;
        // The lease first: a lost one is won back only when the copy shows which pins were broken.
        let held = parts.lease.is_held();
        let pinned = self.catalog.is_pinned(&self.opened.volume, &self.opened.pin);
        if held && pinned && !self.opened.lost.load(Ordering::Acquire) {
            return Ok(());
        }
        if held && !pinned {
            // For good: another pin is of another opening.
            self.opened.lost.store(true, Ordering::Release);
        }
        self.catalog.views.figures.refused_lost.fetch_add(1, Ordering::Relaxed);
        self.catalog.views.wake.notify_one();
        Err(self.refusal("it may have lost its hold on the view"))
    }

    fn refusal(&self, why: &str) -> Error {
        refusal(&self.catalog, self.opened.pin.shard, &self.opened.volume, why)
    }
}

fn refusal(catalog: &Catalog, shard: ShardId, volume: &VolumeId, why: &str) -> Error {
    let me = &catalog.parts.node_id;
    Error::unavailable(format!("{me} is a backup of shard {shard}: {why}: ask the primary"))
        .with_shard(shard)
        .with_location(catalog.parts.view.location(volume))
}

impl Catalog {
    /// A view of a shard for a read that takes this age. With `None`: of a closed shard only, and only if it is open already. Fails
    /// with `NotPrimary` if this node has not the shard's volume as a backup, with `Unavailable` if there is no such view.
    pub async fn view_for(
        self: &Arc<Self>,
        client: &ClientId,
        selector: &Selector,
        max_age: Option<Duration>,
    ) -> Result<BackupRead> {
        let record = self.find(client, selector)?.record;
        let (id, volume) = (record.id, &record.volume);
        match record.state {
            StateWord::Active | StateWord::ReadOnly => {}
            StateWord::Deleted => return Err(super::deleted(id)),
            StateWord::Creating => return Err(refusal(self, id, volume, "the shard is being made")),
        }
        let closed = ShardState::from(record.state) == ShardState::ReadOnly;
        if !self.backs_up(volume) || (max_age.is_none() && !closed) {
            let location = self.parts.view.location(volume);
            let message = format!("shard {id} is served elsewhere");
            return Err(Error::new(Reason::NotPrimary, message).with_shard(id).with_location(location));
        }
        let Some(entry) = self.views.entry(id) else {
            return Err(refusal(self, id, volume, "it reads from as many shards as it can"));
        };
        let begun = clock::boot();
        let wanted = max_age.unwrap_or(Duration::MAX);
        loop {
            let mut changed = self.views.changed.subscribe();
            let now = clock::boot();
            let (opened, refused) = entry.note(wanted, now);
            let nothing_open = opened.is_none();
            if let Some(opened) = opened
                && let Some(age) = opened.age(&self.parts.view, &self.parts.lease, now)
                && age <= wanted
                // Of a closed shard only the state that it has for good: callers may keep that.
                && (opened.last || !closed)
            {
                let label = ViewLabel {
                    sequence: opened.view.sequence(),
                    age,
                    node: self.parts.node_id.clone(),
                    last: opened.last,
                };
                return Ok(BackupRead { catalog: self.clone(), opened, label });
            }
            self.views.wake.notify_one();
            let may_wait = nothing_open && max_age.is_some() && now.since(begun) < FIRST_WAIT_MAX;
            if refused.is_some() || !may_wait {
                self.views.figures.refused_stale.fetch_add(1, Ordering::Relaxed);
                let why = refused.unwrap_or_else(|| "it has no view that is young enough".to_owned());
                return Err(refusal(self, id, volume, &why));
            }
            // Whatever woke us, it is looked at anew.
            let _ = tokio::time::timeout(FIRST_WAIT_PAUSE, changed.changed()).await;
        }
    }

    /// Whether the copy of the records shows that this process holds a view's files.
    fn is_pinned(&self, volume: &VolumeId, pin: &Pinned) -> bool {
        self.parts.view.pin(volume, &self.parts.node_id).is_some_and(|kept| {
            kept.record.incarnation == self.parts.record.incarnation
                && kept.record.views.binary_search(pin).is_ok()
        })
    }

    /// Whether this node stands by for a volume.
    fn backs_up(&self, volume: &VolumeId) -> bool {
        let kept = self.parts.view.volume(volume);
        kept.is_some_and(|kept| kept.record.backups.contains(&self.parts.node_id))
    }

    /// Figures of reads from backups.
    pub(super) fn view_figures(&self) -> ViewFigures {
        let (figures, load) = (&self.views.figures, |counter: &AtomicU64| counter.load(Ordering::Relaxed));
        ViewFigures {
            published: load(&figures.published),
            publish_failures: load(&figures.publish_failures),
            opened: load(&figures.opened),
            open: u32::try_from(self.views.open().len()).unwrap_or(u32::MAX),
            answers: load(&figures.answers),
            refused_stale: load(&figures.refused_stale),
            refused_lost: load(&figures.refused_lost),
            refused_unreadable: load(&figures.refused_unreadable),
            devices_retired: load(&figures.devices_retired),
            sectors_written: load(&figures.sectors_written),
        }
    }
}

impl Views {
    /// The place of a shard; `None`: there is none for another.
    fn entry(&self, shard: ShardId) -> Option<Arc<Entry>> {
        if let Some(entry) = self.shards.read().get(&shard) {
            return Some(entry.clone());
        }
        let mut shards = self.shards.write();
        if shards.len() >= SHARDS_MAX && !shards.contains_key(&shard) {
            return None;
        }
        Some(shards.entry(shard).or_default().clone())
    }

    fn entries(&self) -> Vec<(ShardId, Arc<Entry>)> {
        self.shards.read().iter().map(|(shard, entry)| (*shard, entry.clone())).collect()
    }

    /// The views that reads find.
    fn open(&self) -> Vec<Arc<Opened>> {
        let shards = self.shards.read();
        shards.values().filter_map(|entry| entry.state.lock().open.clone()).collect()
    }

    fn tell(&self) {
        self.changed.send_modify(|n| *n += 1);
    }
}

impl Entry {
    /// Notes a read; answers what is open, or why nothing will be.
    fn note(&self, wanted: Duration, now: BootTime) -> (Option<Arc<Opened>>, Option<String>) {
        let mut state = self.state.lock();
        state.last_read = now;
        let keep = state.wanted.is_some_and(|(least, when)| least <= wanted && now.since(when) < READ_TERM);
        if !keep {
            state.wanted = Some((wanted, now));
        }
        let open = state.open.clone().filter(|opened| !opened.lost.load(Ordering::Acquire));
        let refused = state.refused.as_ref().filter(|(_, until)| *until > now);
        let why = refused.map(|(error, _)| error.message().to_owned());
        (open, why)
    }
}
