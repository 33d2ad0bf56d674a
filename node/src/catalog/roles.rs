//! Which volumes this node is primary of: it observes, lets `cluster::plan` decide, and does what was decided.
//!
//! Invariants: one action a volume at a time; each may be cut off anywhere and is planned anew from what is there
//! then. What fails is told, and waits longer each time.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shardfs_proto::types::clock;
use shardfs_proto::types::cluster::{NodeInfo, VolumeInfo};
use shardfs_proto::types::{Error, NodeId, Reason, Result, VolumeId};
use tokio::sync::Notify;

use super::serving::now_ns;
use super::{Catalog, Cause};
use crate::cluster::elect::{self, Outcome};
use crate::cluster::plan::{
    self, ATTEMPTS_MAX, Action, Calm, Doubts, Health, Local, Observed, Promotion, Volume,
};
use crate::cluster::records::{self, VolumeRecord};
use crate::cluster::store::{StoreError, Txn};
use crate::cluster::view::Kept;

mod left;

/// How often is looked when nothing changes: what time alone brings is seen so late.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// How often volumes are looked after.
const TEND_INTERVAL: Duration = Duration::from_secs(1);
/// How often what was left half-done is looked for.
const RESUME_INTERVAL: Duration = Duration::from_secs(30);
/// How often is looked for views that are due.
const PUBLISH_INTERVAL: Duration = Duration::from_millis(250);
/// How often is looked for backups that are due.
const BACKUP_INTERVAL: Duration = Duration::from_secs(5);
/// How long a change that this node made takes to show at most.
const SHOWN_WAIT_MAX: Duration = Duration::from_secs(2);
/// How long actions under way are waited for at a shutdown.
const IDLE_WAIT_MAX: Duration = Duration::from_secs(10);

/// What is under way.
#[derive(Default)]
pub(super) struct Roles {
    busy: Mutex<HashSet<VolumeId>>,
    memory: Mutex<Memory>,
    done: Notify,
}

/// What is remembered from one look to the next.
#[derive(Default)]
struct Memory {
    calm: Calm,
    doubts: Doubts,
}

/// An action on a volume is under way, for as long as this lives: one that panics is over as well, and is planned anew.
struct Busy<'a> {
    catalog: &'a Catalog,
    volume: &'a VolumeId,
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let error = Error::internal("what was being done with it failed: see the log");
            self.catalog.note_trouble(self.volume, &error);
        }
        self.catalog.roles.busy.lock().remove(self.volume);
        self.catalog.roles.done.notify_one();
    }
}

impl Roles {
    /// Waits until no action is under way.
    pub(super) async fn idle(&self) {
        let idle = async {
            while !self.busy.lock().is_empty() {
                // An action that ends between the look and the wait has left a permit.
                self.done.notified().await;
            }
        };
        if tokio::time::timeout(IDLE_WAIT_MAX, idle).await.is_err() {
            tracing::warn!("stopping while a volume is being taken or given up; the next start cleans up");
        }
    }
}

impl Catalog {
    /// Takes the volumes that are this node's to serve, looks after them, and gives up the rest; until
    /// [`Catalog::shutdown`]. The view has been read once.
    pub async fn run(self: Arc<Self>) {
        let mut views = tokio::spawn(self.clone().keep_views());
        let mut provisioning = tokio::spawn(self.clone().keep_provisioned());
        tokio::spawn(self.clone().take_away_left());
        let mut changes = self.parts.view.subscribe();
        let (mut tended, mut resumed, mut published, mut backed_up) = (None, None, None, None);
        let due = |last: &mut Option<Instant>, interval: Duration| {
            let due = last.is_none_or(|last| last.elapsed() >= interval);
            if due {
                *last = Some(clock::monotonic());
            }
            due
        };
        loop {
            self.rounds.fetch_add(1, Ordering::Relaxed);
            changes.borrow_and_update();
            let observed = self.observe();
            for action in plan::plan(&observed) {
                self.begin(action);
            }
            self.settle_if_done(&observed);
            self.drop_unrecorded();
            if due(&mut resumed, RESUME_INTERVAL) {
                for served in self.serving.all() {
                    let this = self.clone();
                    tokio::spawn(async move {
                        this.resume(&served.id).await;
                        this.publish_missing(&served.id).await;
                    });
                }
            }
            if due(&mut published, PUBLISH_INTERVAL) {
                self.publish_due();
            }
            if due(&mut backed_up, BACKUP_INTERVAL) {
                self.back_up_due();
            }
            if due(&mut tended, TEND_INTERVAL) {
                let this = self.clone();
                tokio::spawn(async move { this.tend().await });
            }
            tokio::select! {
                biased;
                _ = self.stop.cancelled() => return,
                // Its invariants are kept by the records, not by what it had in its hands.
                ended = &mut views => {
                    tracing::error!(?ended, "what keeps views up has ended: it is begun anew");
                    views = tokio::spawn(self.clone().keep_views());
                }
                ended = &mut provisioning => {
                    tracing::error!(?ended, "what adds volumes by itself has ended: it is begun anew");
                    provisioning = tokio::spawn(self.clone().keep_provisioned());
                }
                _ = tokio::time::sleep(LOOK_INTERVAL) => {}
                // A node hears every heartbeat; looking costs microseconds.
                _ = changes.changed() => {}
                _ = self.roles.done.notified() => {}
            }
        }
    }

    fn observe(&self) -> Observed {
        let view = &self.parts.view;
        let lease_held = self.parts.lease.is_held();
        let (nodes, draining) = (view.healths(), view.draining());
        let busy = self.roles.busy.lock().clone();
        let records = view.volumes();
        let mut volumes: Vec<Volume> = records
            .iter()
            .map(|kept| {
                let record = &kept.record;
                let served = self.serving.get(&record.id);
                let trouble = self.serving.attempts(&record.id);
                let local = match (&served, trouble) {
                    _ if busy.contains(&record.id) => Local::Busy,
                    (Some(served), _) if served.lost().is_some() => Local::Fenced,
                    (Some(served), _) => Local::Primary(served.epoch),
                    (None, Some((_, true))) => Local::Busy,
                    (None, _) if self.serving.has_failed(&record.id, record.epoch) => Local::Lost,
                    (None, Some((attempts, false))) if attempts >= ATTEMPTS_MAX => Local::Unusable,
                    (None, _) if self.serving.stands_by(&record.id) => Local::Backup,
                    (None, _) => Local::Detached,
                };
                Volume {
                    id: record.id.clone(),
                    primary: record.primary.clone(),
                    backups: record.backups.clone(),
                    epoch: record.epoch,
                    given: record.holder == self.parts.record.incarnation,
                    target: record.target.clone(),
                    formatted: record.formatted,
                    handed_over: record.handed_over,
                    retired: record.retired,
                    local,
                    attempts: trouble.map_or(0, |(attempts, _)| attempts),
                    doubts: BTreeMap::new(),
                }
            })
            .collect();
        let now = clock::boot();
        let process = |node: &NodeId| view.node(node).map(|kept| kept.record.incarnation.clone());
        let mut memory = self.roles.memory.lock();
        let changed = memory.doubts.look(now, process, &draining, &mut volumes);
        let calm_since = memory.calm.look(now, &nodes, &draining, &volumes);
        drop(memory);
        for volume in volumes.iter().filter(|v| changed.contains(&v.id)) {
            if volume.primary.as_ref() == Some(&self.parts.node_id) {
                self.serving.hurry(&volume.id, !volume.formatted);
            }
        }
        Observed {
            me: self.parts.node_id.clone(),
            store_reachable: self.parts.lease.succeeded(),
            lease_held,
            alone: now >= self.parts.alone_from,
            looking_for: self.started.elapsed(),
            nodes,
            stopping: view.stopping(),
            draining,
            calm_since,
            volumes,
        }
    }

    /// A start waits for what is this node's by the records; for what cannot be used it does not.
    fn settle_if_done(&self, observed: &Observed) {
        let open = |volume: &Volume| {
            volume.primary.as_ref() == Some(&observed.me)
                && !matches!(volume.local, Local::Primary(_))
                && self.serving.trouble(&volume.id).is_none()
        };
        if !observed.volumes.iter().any(open) {
            self.serving.settle();
        }
    }

    /// Does an action in the background.
    fn begin(self: &Arc<Self>, action: Action) {
        let Some(kept) = self.parts.view.volume(action.volume()) else { return };
        if !self.roles.busy.lock().insert(action.volume().clone()) {
            return;
        }
        let this = self.clone();
        tokio::spawn(async move {
            let busy = Busy { catalog: &this, volume: action.volume() };
            tracing::debug!(?action, "begun");
            if let Err(error) = this.act(&action, &kept).await {
                this.note_trouble(action.volume(), &error);
            }
            drop(busy);
        });
    }

    /// Lets go of volumes that are no longer in the records: somebody took them out while this node was away.
    fn drop_unrecorded(self: &Arc<Self>) {
        let served = self.serving.all().into_iter().map(|served| served.id.clone());
        for id in served.chain(self.serving.standing_by()) {
            if self.parts.view.volume(&id).is_some() || !self.roles.busy.lock().insert(id.clone()) {
                continue;
            }
            tracing::info!(volume = %id, "it is no volume of the cluster any more: letting go of it");
            let this = self.clone();
            tokio::spawn(async move {
                let busy = Busy { catalog: &this, volume: &id };
                if let Some(served) = this.serving.get(&id)
                    && let Err(error) = this.let_go(&served, true).await
                {
                    tracing::error!(volume = %id, %error, "letting go of a volume");
                }
                let stood = this.serving.stood_by(&id);
                let released = async {
                    this.stand_down(&id).await?;
                    match stood {
                        Some((provider, spec)) => this.release_as(&id, provider, spec).await,
                        None => Ok(()),
                    }
                };
                if let Err(error) = released.await {
                    tracing::error!(volume = %id, %error, "detaching a volume");
                }
                drop(busy);
            });
        }
    }

    async fn act(self: &Arc<Self>, action: &Action, kept: &Kept<VolumeRecord>) -> Result<()> {
        let (store, view) = (&*self.parts.store, &*self.parts.view);
        match action {
            Action::Attach(id) => {
                self.stand_by(&kept.record).await?;
                self.serving.remove_trouble(id);
                Ok(())
            }
            Action::Detach(id) => {
                self.stand_down(id).await?;
                self.release(&kept.record).await
            }
            Action::Retire(_) => self.take_out(kept).await,
            Action::Elect { volume, from } => {
                let cause = Cause::of_election(&self.parts.node_id, from.as_ref(), |node| view.health(node));
                self.failovers.note_election(volume, cause);
                let (begun, begun_ns) = (clock::monotonic(), now_ns());
                let outcome = elect::elect(store, view, &self.parts.record, kept).await?;
                if let Outcome::Won(revision, epoch) = outcome {
                    let from = from.as_ref().map_or("nobody", NodeId::as_str);
                    tracing::info!(%volume, %epoch, from, ms = begun.elapsed().as_millis() as u64, "elected");
                    self.serving.note_won(volume, begun_ns);
                    // What failed before was another thing: to attach it, or an earlier election.
                    self.serving.remove_trouble(volume);
                    view.wait_for(revision, SHOWN_WAIT_MAX).await?;
                }
                Ok(())
            }
            Action::Promote(id, epoch) => {
                if kept.record.epoch != *epoch {
                    return Ok(());
                }
                if let Err(error) = self.take(kept).await {
                    // The device has seen a later epoch. If nobody else has begun that one, the records are older than the
                    // device, as after a restore: a later epoch is reached step by step.
                    if error.reason() == Reason::StaleEpoch {
                        self.serving.note_failed(id, *epoch);
                    }
                    return Err(error);
                }
                self.failovers.note_takeover(id, kept.record.handed_over);
                let (this, id) = (self.clone(), id.clone());
                tokio::spawn(async move { this.resume(&id).await });
                Ok(())
            }
            Action::HandOver(id, to) => {
                let begun = clock::monotonic();
                let mut unmounted = false;
                if let Some(served) = self.serving.get(id) {
                    // While calls are still answered: neither is part of the pause.
                    served.publisher.stop().await;
                    self.flush_volume(&served).await;
                    let paused = clock::monotonic();
                    unmounted = self.let_go(&served, served.lost().is_some()).await?;
                    tracing::info!(volume = %id, to = %to, ms = paused.elapsed().as_millis() as u64, "stopped serving");
                }
                let me = &self.parts.node_id;
                let outcome = elect::hand_over(store, view, me, kept, to, unmounted).await?;
                match outcome {
                    Outcome::Won(revision, epoch) => {
                        tracing::info!(volume = %id, to = %to, %epoch, ms = begun.elapsed().as_millis() as u64, "handed over");
                        self.failovers.note_hand_over();
                        self.serving.remove_trouble(id);
                        view.wait_for(revision, SHOWN_WAIT_MAX).await
                    }
                    // The record decides what comes next.
                    Outcome::Overtaken => Ok(()),
                    // It may come true at any time, and says that this node has unmounted: so the volume is not served under
                    // this epoch again. Giving it away once more, or taking it under another one, settles which it is.
                    Outcome::Unknown => {
                        self.serving.note_failed(id, kept.record.epoch);
                        Ok(())
                    }
                }
            }
            Action::StepDown(id) => {
                let Some(served) = self.serving.get(id) else { return Ok(()) };
                let why = served.lost().map_or_else(|| "another node has it".to_owned(), |e| e.to_string());
                tracing::warn!(volume = %id, epoch = %served.epoch, why, "stepping down");
                self.failovers.note_step_down();
                self.let_go(&served, true).await.map(drop)
            }
        }
    }

    /// Gives every volume to a node that is ready, as far as there is one, before a shutdown.
    pub(super) async fn give_away(self: &Arc<Self>) {
        // Without the store nothing can be handed over, and a cluster that ends as a whole begins again as it was.
        if !self.parts.lease.succeeded() || self.parts.view.stopping() {
            return;
        }
        let giving = self.serving.all().into_iter().map(|served| async move {
            let Some(kept) = self.parts.view.volume(&served.id) else { return };
            let view = &self.parts.view;
            let draining = view.draining();
            let ready = |node: &&NodeId| view.health(node) == Health::Alive && !draining.contains(node);
            // One that failed is better than none: it has to go.
            let now = clock::boot();
            let doubt = |node: &&NodeId| self.roles.memory.lock().doubts.doubt(&served.id, node, now);
            let Some(to) = kept.record.backups.iter().filter(ready).min_by_key(doubt).cloned() else {
                return;
            };
            if !self.roles.busy.lock().insert(served.id.clone()) {
                return;
            }
            let busy = Busy { catalog: self, volume: &served.id };
            if let Err(error) = self.act(&Action::HandOver(served.id.clone(), to), &kept).await {
                tracing::warn!(volume = %served.id, %error, "handing over before the end: a backup takes it");
            }
            drop(busy);
        });
        futures::future::join_all(giving).await;
    }

    /// Asks for a volume to be served by a node, and waits until the records say so. Fails as soon as that cannot come:
    /// somebody asked for another node, or this one is away or to serve nothing.
    pub async fn promote(&self, volume: &VolumeId, to: &NodeId, at_most: Duration) -> Result<VolumeInfo> {
        // By an old copy, a node that was just started or drained would be judged wrongly.
        self.refresh().await?;
        let view = &self.parts.view;
        let revision = elect::set_target(&*self.parts.store, view, volume, Some(to)).await?;
        let mut changes = view.subscribe();
        let moved = async {
            loop {
                changes.borrow_and_update();
                if view.revision() >= revision {
                    let kept = view.volume(volume).ok_or_else(|| Error::not_found("the volume has gone"))?;
                    match elect::promotion(view, &kept.record, to) {
                        Promotion::Moved => return Ok(()),
                        // What cannot be judged now can be in a moment.
                        Promotion::Waiting | Promotion::Unclear => {}
                        other => elect::refuse(&other, &kept.record, to)?,
                    }
                }
                if changes.changed().await.is_err() {
                    return Err(Error::unavailable("this node is stopping"));
                }
            }
        };
        let moved = tokio::time::timeout(at_most, moved).await;
        moved.unwrap_or_else(|_| {
            Err(Error::unavailable(format!(
                "volume {volume} has not moved to {to} within {:.1} s; it will when its primary can hand it over",
                at_most.as_secs_f64()
            )))
        })?;
        let infos = view.volume_infos();
        infos
            .into_iter()
            .find(|info| info.id == *volume)
            .ok_or_else(|| Error::not_found("the volume has gone"))
    }

    /// Says that a node is to serve nothing, or may serve again.
    pub async fn drain(&self, node: &NodeId, drain: bool) -> Result<NodeInfo> {
        let view = &self.parts.view;
        if view.node(node).is_none() {
            return Err(Error::not_found(format!("there is no node {node}")));
        }
        let key = records::drain_key(node);
        let txn = if drain { Txn::new().put(key, "") } else { Txn::new().delete(key) };
        // To say it twice is harmless.
        let answer = match self.parts.store.txn(txn.clone()).await {
            Err(StoreError::OutcomeUnknown(_)) => self.parts.store.txn(txn).await,
            outcome => outcome,
        }?;
        view.wait_for(answer.revision, SHOWN_WAIT_MAX).await?;
        let infos = view.node_infos();
        infos.into_iter().find(|info| info.id == *node).ok_or_else(|| Error::not_found("the node has gone"))
    }
}
