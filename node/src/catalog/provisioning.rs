//! Volumes that the cluster adds by itself, by a policy, when it runs out of room.
//!
//! Invariants: one volume at a time. Which one, and which process is at it, is written into the policy's record before the cloud is asked,
//! by a compare-and-set of the record that the decision was made from; so of two that act at once one begins. The rest is `add_volume`,
//! repeated until the volume has its record: its own record of intent makes that one disk, whoever repeats it. What is begun is given up
//! only when it is wanted no more, and only by the process that is at it, between its attempts: so what it deletes is used by nobody.
//! Volumes that are there are never touched.
//!
//! How much room there is stands in no record: who acts asks the nodes, as `shardfs status` does. That is as fresh as can be, and costs
//! nothing while there is no policy; the store would keep every figure that is written to it until somebody compacts it.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join_all;
use parking_lot::Mutex;
use shardfs_proto::client::{Client, ClientConfig};
use shardfs_proto::types::cluster::{NewVolume, VolumeStatus};
use shardfs_proto::types::provisioning::{Policy, Prices, Provisioning};
use shardfs_proto::types::{ClientId, Error, NodeId, Result, VolumeId, clock};

use super::Catalog;
use super::disks::size_of;
use super::serving::blocking;
use crate::cluster::plan::Health;
use crate::cluster::records::provisioning::{MakingByPolicy, PROVISIONING, ProvisioningRecord};
use crate::cluster::records::{self, VolumeRecord};
use crate::cluster::store::{Demand, Revision, StoreError, Txn, get};
use crate::cluster::view::View;
use crate::volume::cloud::DiskSize;
use crate::volume::{AWS, GIB};

mod decide;

use decide::{Candidate, Decision, Room, Seen, Situation, decide};

/// How often is looked whether there is room.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// Pause after an attempt that failed; each further one doubles it.
const PAUSE_MIN: Duration = Duration::from_secs(10);
/// See [`PAUSE_MIN`].
const PAUSE_MAX: Duration = Duration::from_secs(900);
/// How long this node's copy of the records may take to show what the policy's record is younger than.
const SHOWN_WAIT_MAX: Duration = Duration::from_secs(5);
/// A node that is silent for so long is at nothing any more: longer than a call of the cloud may take.
const AT_NOTHING_AFTER: Duration = Duration::from_secs(300);
/// How often a change of the record is tried while others change it.
const CHANGE_ATTEMPTS_MAX: usize = 8;
/// Part of a new volume that may be asked for as room, in percent: its filesystem and the reserve take some.
const ROOM_PERCENT_MAX: u64 = 75;

/// What one node remembers.
#[derive(Default)]
pub(super) struct Provisioner {
    client: Mutex<Option<Client>>,
    memory: Mutex<Memory>,
    /// Held by a step: attempts of one process come one after the other.
    step: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Memory {
    /// Since when the room of volumes is not known.
    out_of_sight: HashMap<VolumeId, Instant>,
    /// The last record with failures that was seen, and since when: machines' clocks are not compared.
    failed: Option<(Revision, Instant)>,
    /// What was said last: the same again is no news.
    said: String,
}

impl Memory {
    /// What is left of the pause after attempts that failed.
    fn pause(&mut self, failures: u32, modified: Revision, now: Instant) -> Option<Duration> {
        if failures == 0 {
            self.failed = None;
            return None;
        }
        if self.failed.is_none_or(|(seen, _)| seen != modified) {
            self.failed = Some((modified, now));
        }
        let since = self.failed.map_or(now, |(_, since)| since);
        let pause = PAUSE_MIN.saturating_mul(1 << (failures - 1).min(10)).min(PAUSE_MAX);
        pause.checked_sub(now.saturating_duration_since(since)).filter(|left| !left.is_zero())
    }

    /// How long the room of a volume has not been known.
    fn out_of_sight(&mut self, volume: &VolumeId, now: Instant) -> Duration {
        now.saturating_duration_since(*self.out_of_sight.entry(volume.clone()).or_insert(now))
    }
}

/// The policy's record as it was read.
struct Held {
    record: ProvisioningRecord,
    /// `None`: there is none.
    modified: Option<Revision>,
}

impl Catalog {
    /// Adds volumes by policy, until [`Catalog::shutdown`].
    pub(super) async fn keep_provisioned(self: Arc<Self>) {
        if self.cloud().is_err() {
            // Others may.
            return self.stop.cancelled().await;
        }
        loop {
            tokio::select! {
                biased;
                _ = self.stop.cancelled() => return,
                _ = tokio::time::sleep(LOOK_INTERVAL) => {}
            }
            // Whatever is cut off here is gone on with, by this node or another.
            tokio::select! {
                biased;
                _ = self.stop.cancelled() => return,
                looked = self.provision() => {
                    if let Err(error) = looked {
                        tracing::debug!(%error, "looking whether there is room: later");
                    }
                }
            }
        }
    }

    /// Looks once, and does the next step if it is this node's.
    async fn provision(&self) -> Result<()> {
        let _step = self.provisioner.step.lock().await;
        let (read_at, held) = self.held().await?;
        let Held { record, modified: Some(modified) } = held else { return Ok(()) };
        if (record.policy.is_none() && record.making.is_none()) || !self.parts.lease.is_held() {
            return Ok(());
        }
        // The decision is made from records that are no older than this one: what was added before it was written is seen.
        self.parts.view.wait_for(read_at, SHOWN_WAIT_MAX).await?;
        match (&record.making, &record.policy) {
            (Some(making), _) if self.is_mine(making) || (self.acts() && self.is_over(making)) => {
                self.go_on_adding(&record, modified, making).await
            }
            (None, Some(policy)) if self.acts() => self.begin_adding(&record, modified, policy).await,
            (Some(_), _) | (None, _) => Ok(()),
        }
    }

    /// Decides, and begins what was decided.
    async fn begin_adding(
        &self,
        record: &ProvisioningRecord,
        modified: Revision,
        policy: &Policy,
    ) -> Result<()> {
        let mut now = self.situation(record, Some(modified)).await?;
        let decision = decide(policy, &now);
        self.say(&decision.to_string());
        if matches!(decision, Decision::Nothing(_)) {
            return Ok(());
        }
        // A disk that was kept when its volume was taken out bears its name still.
        let (cloud, cluster_id) = (self.cloud()?, self.parts.cluster_id.clone());
        let disks = blocking(move || cloud.disks(&cluster_id)).await?;
        now.taken.extend(disks.into_iter().map(|disk| disk.volume));
        let Decision::Add(plan) = decide(policy, &now) else { return Ok(()) };
        let making = MakingByPolicy {
            volume: plan.volume,
            size: DiskSize { gib: policy.gib, iops: policy.iops },
            kms_key: policy.kms_key.clone(),
            by: self.parts.node_id.clone(),
            incarnation: self.parts.record.incarnation.clone(),
        };
        let begun = ProvisioningRecord {
            making: Some(making.clone()),
            next: plan.number.saturating_add(1),
            ..record.clone()
        };
        // Somebody else has begun, or the policy was changed: it is decided anew.
        if self.swap_provisioning(&begun, modified).await?.is_none() {
            return Ok(());
        }
        tracing::info!(volume = %making.volume, gib = policy.gib, iops = policy.iops, nodes = ?plan.nodes, monthly = %plan.monthly,
            "no volume has enough room: adding one, by policy");
        self.try_adding(&making, plan.nodes).await
    }

    /// Goes on with what was begun, or gives it up.
    async fn go_on_adding(
        &self,
        record: &ProvisioningRecord,
        modified: Revision,
        making: &MakingByPolicy,
    ) -> Result<()> {
        let volume = &making.volume;
        if self.parts.view.volume(volume).is_some() {
            self.forget_making(volume).await?;
            return self.note_adding(making, ProvisioningRecord::settle).await;
        }
        if self.pause(record.failures, modified).is_some() {
            return Ok(());
        }
        let now = self.situation(record, Some(modified)).await?;
        let unwanted = match &record.policy {
            None => Some("the policy is off".to_owned()),
            Some(policy) if (policy.gib, policy.iops) != (making.size.gib, making.size.iops) => {
                Some("the policy asks for another size".to_owned())
            }
            Some(policy) if policy.kms_key != making.kms_key => {
                Some("the policy asks for another key".to_owned())
            }
            Some(policy) => decide::above_ceilings(policy, &now, Some(volume)).map(|why| why.to_string()),
        };
        let nodes = decide::choose(&now.candidates);
        if unwanted.is_none() && nodes.is_empty() {
            return Ok(());
        }
        if !self.is_mine(making) {
            // To go on with it is harmless whatever becomes of the other; to delete its disk is not.
            if unwanted.is_some() && !self.is_over_for_long(making) {
                return Ok(());
            }
            let mine = MakingByPolicy {
                by: self.parts.node_id.clone(),
                incarnation: self.parts.record.incarnation.clone(),
                ..making.clone()
            };
            let taken = ProvisioningRecord { making: Some(mine.clone()), ..record.clone() };
            if self.swap_provisioning(&taken, modified).await?.is_none() {
                return Ok(());
            }
            tracing::info!(%volume, from = %making.by, "going on with the volume that another process has begun");
            return match unwanted {
                Some(why) => self.give_up_adding(&mine, &why).await,
                None => self.try_adding(&mine, nodes).await,
            };
        }
        match unwanted {
            Some(why) => self.give_up_adding(making, &why).await,
            None => self.try_adding(making, nodes).await,
        }
    }

    /// One attempt to add the volume, and what became of it.
    async fn try_adding(&self, making: &MakingByPolicy, nodes: Vec<NodeId>) -> Result<()> {
        let volume = &making.volume;
        let new = NewVolume {
            id: volume.clone(),
            provider: AWS.into(),
            source: String::new(),
            size_bytes: u64::from(making.size.gib) * GIB,
            nodes,
            allow_unfenced: false,
            iops: making.size.iops,
            kms_key: making.kms_key.clone(),
        };
        let error = match self.add_volume(new).await {
            Ok(_) => {
                tracing::info!(%volume, "added by policy");
                return self.note_adding(making, ProvisioningRecord::settle).await;
            }
            Err(error) => error,
        };
        tracing::warn!(%volume, %error, "adding a volume by policy: once more, after a pause");
        // What was refused before anything was asked for, or left nothing, is not begun: other values may be asked for.
        let begun = self.makings().await?.contains_key(volume) || self.is_recorded(volume).await?;
        self.note_adding(making, |record| {
            record.note_failure(error.message());
            if !begun {
                record.making = None;
            }
        })
        .await
    }

    /// Deletes what was made of a volume that is wanted no more. No attempt is under way.
    async fn give_up_adding(&self, making: &MakingByPolicy, why: &str) -> Result<()> {
        let volume = &making.volume;
        tracing::info!(%volume, why, "giving up a volume that was being added by policy");
        match self.remove_half_made(volume).await {
            Ok(_) => self.note_adding(making, ProvisioningRecord::settle).await,
            Err(error) => {
                tracing::warn!(%volume, %error, "giving up a volume: once more, after a pause");
                let error = error.context(format!("giving up {volume}"));
                self.note_adding(making, |record| record.note_failure(error.message())).await
            }
        }
    }

    /// Whether a volume has its record, by the store itself.
    async fn is_recorded(&self, volume: &VolumeId) -> Result<bool> {
        Ok(get(&*self.parts.store, records::volume_key(volume)).await?.1.is_some())
    }

    /// Notes what became of what was being made; not if another process is at it by now, which says itself what becomes of it.
    async fn note_adding(
        &self,
        making: &MakingByPolicy,
        change: impl Fn(&mut ProvisioningRecord),
    ) -> Result<()> {
        self.change_provisioning(|record| {
            if record.making.as_ref() == Some(making) {
                change(record);
            }
        })
        .await
    }

    /// Changes the record in one compare-and-set, made anew while others change it.
    async fn change_provisioning(&self, change: impl Fn(&mut ProvisioningRecord)) -> Result<()> {
        for _ in 0..CHANGE_ATTEMPTS_MAX {
            let Held { mut record, modified } = self.held().await?.1;
            let before = record.clone();
            change(&mut record);
            if record == before {
                return Ok(());
            }
            let demand = modified.map_or(Demand::Absent, Demand::Modified);
            let txn = Txn::new().when(PROVISIONING, demand).put(PROVISIONING, records::encode(&record));
            match self.parts.store.txn(txn).await {
                Ok(answer) if answer.succeeded => return Ok(()),
                // What was made after all is found in the next round.
                Ok(_) | Err(StoreError::OutcomeUnknown(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(Error::unavailable("the record of the policy keeps changing: try again"))
    }

    /// Writes the record if it is the one of this revision still; the revision that it has then.
    async fn swap_provisioning(
        &self,
        record: &ProvisioningRecord,
        modified: Revision,
    ) -> Result<Option<Revision>> {
        let txn = Txn::new()
            .when(PROVISIONING, Demand::Modified(modified))
            .put(PROVISIONING, records::encode(record));
        let answer = self.parts.store.txn(txn).await?;
        Ok(answer.succeeded.then_some(answer.revision))
    }

    /// The record, and the revision at which it was read.
    async fn held(&self) -> Result<(Revision, Held)> {
        let (read_at, kv) = get(&*self.parts.store, PROVISIONING).await?;
        let held = match kv {
            None => Held { record: ProvisioningRecord::default(), modified: None },
            Some(kv) => Held { record: records::decode(&kv.key, &kv.value)?, modified: Some(kv.modified) },
        };
        Ok((read_at, held))
    }

    /// The node that looks after room: the first living one that uses a cloud. `None`: there is none, or it is not clear yet.
    fn acting(&self) -> Option<NodeId> {
        let view = &self.parts.view;
        let uses_cloud = |node: &NodeId| view.node(node).is_some_and(|kept| kept.record.cloud);
        // The first that is not certainly away.
        let (node, health) = view
            .healths()
            .into_iter()
            .find(|(node, health)| uses_cloud(node) && matches!(health, Health::Alive | Health::Unknown))?;
        (health == Health::Alive).then_some(node)
    }

    fn acts(&self) -> bool {
        self.acting().as_ref() == Some(&self.parts.node_id)
    }

    /// Whether this process is at it.
    fn is_mine(&self, making: &MakingByPolicy) -> bool {
        making.incarnation == self.parts.record.incarnation
    }

    /// Whether the process that is at it has gone, as far as can be seen.
    fn is_over(&self, making: &MakingByPolicy) -> bool {
        self.is_over_since(making, Duration::ZERO)
    }

    /// The same, for so long that nothing of what it has asked for is under way.
    fn is_over_for_long(&self, making: &MakingByPolicy) -> bool {
        self.is_over_since(making, AT_NOTHING_AFTER)
    }

    fn is_over_since(&self, making: &MakingByPolicy, silent: Duration) -> bool {
        let view = &self.parts.view;
        // A node has one process: since a later one has registered, the heartbeats of the one before fail, and it stops.
        let later = view.node(&making.by).is_none_or(|kept| kept.record.incarnation != making.incarnation);
        later
            || match view.health(&making.by) {
                Health::Dead(_) | Health::Absent => true,
                Health::Silent(since) => since >= silent,
                Health::Alive | Health::Unknown => false,
            }
    }

    fn pause(&self, failures: u32, modified: Revision) -> Option<Duration> {
        self.provisioner.memory.lock().pause(failures, modified, clock::monotonic())
    }

    fn say(&self, what: &str) {
        let mut memory = self.provisioner.memory.lock();
        if memory.said != what {
            tracing::debug!(what, "provisioning");
            memory.said = what.to_owned();
        }
    }

    /// What is known about room, cost and nodes.
    async fn situation(&self, record: &ProvisioningRecord, modified: Option<Revision>) -> Result<Situation> {
        let makings = self.makings().await?;
        let told = self.ask_rooms().await;
        let view = &self.parts.view;
        let (volumes, healths, draining) = (view.volumes(), view.healths(), view.draining());
        let mut taken: BTreeSet<String> = makings.keys().map(|volume| volume.as_str().to_owned()).collect();
        taken.extend(volumes.iter().map(|kept| kept.record.id.as_str().to_owned()));
        let seen = {
            let (mut memory, now) = (self.provisioner.memory.lock(), clock::monotonic());
            let seen: Vec<Seen> =
                volumes.iter().map(|kept| look_at(&kept.record, &told, &mut memory, now, view)).collect();
            memory.out_of_sight.retain(|volume, _| {
                seen.iter().any(|s| s.id == *volume && matches!(s.room, Room::OutOfSight(_)))
            });
            seen
        };
        let allowed = record.policy.as_ref().map_or(&[][..], |policy| &policy.nodes);
        let candidates = healths
            .into_iter()
            .filter(|(node, health)| {
                let may = |record: &records::NodeRecord| record.cloud && !record.instance_id.is_empty();
                *health == Health::Alive
                    && view.node(node).is_some_and(|kept| may(&kept.record))
                    && !draining.contains(node)
                    && (allowed.is_empty() || allowed.contains(node))
            })
            .map(|(id, _)| {
                let serves = volumes.iter().filter(|kept| kept.record.primary.as_ref() == Some(&id)).count();
                Candidate { id, serves }
            })
            .collect();
        let pause = modified.and_then(|modified| self.pause(record.failures, modified));
        Ok(Situation {
            volumes: seen,
            makings: makings
                .into_values()
                .filter(|making| volumes.iter().all(|kept| kept.record.id != making.volume))
                .map(|making| (making.volume, making.size))
                .collect(),
            candidates,
            taken,
            next: record.next,
            making: record.making.as_ref().map(|making| (making.volume.clone(), making.by.clone())),
            pause,
        })
    }

    /// What the nodes say of the volumes that they serve; of a volume, who has it under the latest epoch.
    async fn ask_rooms(&self) -> HashMap<VolumeId, VolumeStatus> {
        let view = &self.parts.view;
        let others: Vec<Vec<String>> = view
            .healths()
            .into_iter()
            .filter(|(node, health)| *health == Health::Alive && *node != self.parts.node_id)
            .filter_map(|(node, _)| view.node(&node).map(|kept| kept.record.endpoints.clone()))
            .collect();
        let mut all = self.volume_statuses();
        if let Ok(client) = self.asker_of_rooms() {
            let asked = others.into_iter().map(|endpoints| {
                let client = client.clone();
                async move { client.node_status(&endpoints).await }
            });
            // Who does not answer tells nothing.
            all.extend(join_all(asked).await.into_iter().flatten().flat_map(|status| status.volumes));
        }
        let mut latest: HashMap<VolumeId, VolumeStatus> = HashMap::new();
        for status in all {
            let known = latest.get(&status.id);
            if known.is_none_or(|known| known.epoch < status.epoch) {
                latest.insert(status.id.clone(), status);
            }
        }
        latest
    }

    fn asker_of_rooms(&self) -> Result<Client> {
        let mut kept = self.provisioner.client.lock();
        if let Some(client) = &*kept {
            return Ok(client.clone());
        }
        let client = Client::new(ClientConfig {
            // Each call names whom it asks.
            endpoints: self.parts.record.endpoints.clone(),
            client_id: ClientId::new("shardfs-node")?,
            deadline: LOOK_INTERVAL,
            label: self.parts.node_id.to_string(),
        })?;
        Ok(kept.insert(client).clone())
    }

    /// Says when volumes are added; `None`: never. Repeating it is harmless; also after attempts that failed: the next follows at once.
    pub async fn set_provisioning(&self, policy: Option<Policy>) -> Result<Provisioning> {
        self.refresh().await?;
        let policy = policy.map(|policy| self.checked(policy)).transpose()?;
        self.change_provisioning(|record| {
            record.policy = policy.clone();
            (record.failures, record.last_error) = (0, String::new());
        })
        .await?;
        match &policy {
            Some(policy) => tracing::info!(?policy, "volumes are added by policy"),
            None => tracing::info!("no volumes are added by policy"),
        }
        self.provisioning(false).await
    }

    /// The policy with what it leaves open, if it makes sense.
    fn checked(&self, mut policy: Policy) -> Result<Policy> {
        let view = &self.parts.view;
        if !view.node_infos().iter().any(|n| view.node(&n.id).is_some_and(|kept| kept.record.cloud)) {
            return Err(Error::invalid(
                "no node of the cluster uses a cloud, so none can make a volume: start them with --aws-cluster",
            ));
        }
        for (at, node) in policy.nodes.iter().enumerate() {
            let Some(kept) = view.node(node) else {
                return Err(Error::not_found(format!("there is no node {node}: mend its name")));
            };
            if !kept.record.cloud {
                return Err(Error::invalid(format!(
                    "{node} uses no cloud, so it cannot have a volume of kind aws: start it with --aws-cluster, or leave it away"
                )));
            }
            if policy.nodes[..at].contains(node) {
                return Err(Error::invalid(format!("node {node} is named twice")));
            }
        }
        let size = size_of(&NewVolume {
            id: VolumeId::new("auto")?,
            provider: AWS.into(),
            source: String::new(),
            size_bytes: u64::from(policy.gib) * GIB,
            nodes: Vec::new(),
            allow_unfenced: false,
            iops: policy.iops,
            kms_key: None,
        })?;
        policy.iops = size.iops;
        let room_max = u64::from(size.gib) * GIB * ROOM_PERCENT_MAX / 100;
        if policy.min_free_bytes == 0 || policy.min_free_bytes > room_max {
            return Err(Error::invalid(format!(
                "--min-free is {}: a new volume of {} GiB must have it, and its first shards must not take it: 1 byte to {} \
                 ({ROOM_PERCENT_MAX} % of its size)",
                decide::human(policy.min_free_bytes),
                size.gib,
                decide::human(room_max)
            )));
        }
        if policy.volumes_max == 0 {
            return Err(Error::invalid(
                "--max-volumes is 0: nothing could ever be added; `shardfs volume policy off` says so",
            ));
        }
        let one = policy.prices.monthly(size.gib, size.iops);
        if one > policy.cost_max {
            return Err(Error::invalid(format!(
                "one volume of {} GiB with {} IOPS costs {one} a month, which is above --max-cost ({}): nothing could ever be added; raise it, \
                 or ask for less (mostly it is IOPS that cost)",
                size.gib, size.iops, policy.cost_max
            )));
        }
        Ok(policy)
    }

    /// What is added by policy, what would be done now, and why. `here`: as this node sees it; else as the one that acts does, if it
    /// answers.
    pub async fn provisioning(&self, here: bool) -> Result<Provisioning> {
        self.refresh().await?;
        let acting = self.acting();
        if !here
            && let Some(node) = acting.as_ref().filter(|node| **node != self.parts.node_id)
            && let Some(kept) = self.parts.view.node(node)
        {
            match self.asker_of_rooms()?.provisioning_at(&kept.record.endpoints).await {
                Ok(state) => return Ok(state),
                Err(error) => tracing::debug!(%node, %error, "asking who acts: answering from here"),
            }
        }
        let (read_at, Held { record, modified }) = self.held().await?;
        // Best effort: an answer that is a moment old is better than none.
        let _ = self.parts.view.wait_for(read_at, super::REFRESH_WAIT_MAX).await;
        let now = self.situation(&record, modified).await?;
        let decision = record.policy.as_ref().map(|policy| decide(policy, &now));
        let verdict = match (&decision, &record.making) {
            (_, Some(making)) if now.volumes.iter().any(|seen| seen.id == making.volume) => {
                format!("nothing: {} is there", making.volume)
            }
            (None, Some(making)) => format!("give up {}, which is being made", making.volume),
            (None, None) => "nothing: there is no policy".to_owned(),
            (Some(_), _) if acting.is_none() => {
                "nothing: no living node uses a cloud, or it is not clear yet which; start one with --aws-cluster".to_owned()
            }
            (Some(decision), _) => decision.to_string(),
        };
        let prices = record.policy.as_ref().map_or(Prices::LIST, |policy| policy.prices);
        Ok(Provisioning {
            acting,
            volumes: u32::try_from(decide::count(&now)).unwrap_or(u32::MAX),
            monthly: decide::cost(&prices, &now, None),
            roomiest: decide::roomiest(&now),
            making: record.making.map(|making| making.volume),
            adds: match decision {
                Some(Decision::Add(plan)) => Some(plan.volume),
                Some(Decision::Nothing(_)) | None => None,
            },
            verdict,
            failures: record.failures,
            last_error: record.last_error,
            policy: record.policy,
        })
    }
}

/// A volume, by its record and what its node says.
fn look_at(
    record: &VolumeRecord,
    told: &HashMap<VolumeId, VolumeStatus>,
    memory: &mut Memory,
    now: Instant,
    view: &View,
) -> Seen {
    let status = told.get(&record.id);
    let room = match status {
        // Of one that is not served, or cannot be asked, the total is 0.
        Some(status) if status.total_bytes > 0 => Room::Free(status.free_bytes),
        _ if !record.formatted => {
            Room::ToCome(status.map_or_else(String::new, |status| status.trouble.clone()))
        }
        _ => Room::OutOfSight(memory.out_of_sight(&record.id, now)),
    };
    let disk = (record.provider == AWS).then(|| DiskSize {
        gib: u32::try_from(record.size_bytes / GIB).unwrap_or(u32::MAX),
        iops: record.iops,
    });
    Seen {
        id: record.id.clone(),
        disk,
        room,
        shards: view.shard_count(&record.id),
        leaving: record.leaving || record.retired,
    }
}

#[cfg(test)]
mod tests;
