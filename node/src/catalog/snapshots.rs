//! Snapshots and clones. A snapshot is a closed shard with an id of its own, whose record names the shard that it is of; its name is one
//! of that shard's, so it stands in no listing of shards. All that serves closed shards serves it: reads by id on every node
//! that has the volume, checks, deletion.
//!
//! Locks are taken in the order of ids: a shard's, its snapshot's, that of what is made of it.

use std::sync::Arc;

use shardfs_proto::types::cluster::{CloneShard, Selector, ShardInfo};
use shardfs_proto::types::limits::SNAPSHOTS_PER_SHARD_MAX;
use shardfs_proto::types::{ClientId, Error, Reason, Result, ShardId, ShardName};

use super::make::{Blank, Content, checked_request_id};
use super::{Catalog, SHOWN_WAIT_MAX};
use crate::cluster::records::StateWord;

impl Catalog {
    /// Makes a snapshot of a shard: of a moment between the call and its answer. With the request id of an earlier call: that call's.
    pub async fn snapshot_shard(
        self: &Arc<Self>,
        client: &ClientId,
        selector: &Selector,
        name: ShardName,
        request_id: String,
    ) -> Result<ShardInfo> {
        let local = self.local_shard(client, selector, None)?;
        self.check_versions(&local.served.id, "no snapshot is made")?;
        let id = local.id;
        let blank = Blank {
            owner: client.clone(),
            name,
            limit_bytes: None,
            request_id: checked_request_id(request_id)?,
            content: Content::SnapshotOf(id),
        };
        let this = self.clone();
        self.to_the_end(async move {
            let _lock = this.locks.lock(id).await;
            this.local_shard(&blank.owner, &Selector::Id(id), None)?;
            this.check_may_have_snapshot(&blank, id)?;
            this.make(&blank).await
        })
        .await
    }

    fn check_may_have_snapshot(&self, blank: &Blank, id: ShardId) -> Result<()> {
        let record = self.find(&blank.owner, &Selector::Id(id))?.record;
        if let Some(of) = record.snapshot_of {
            let words =
                format!("shard {id} is a snapshot of shard {of} and has none of its own: clone it instead");
            return Err(Error::new(Reason::NotPermitted, words).with_shard(id));
        }
        let there = self.parts.view.snapshots_of(id);
        // One of that name is made already, or it is another one: `make` tells.
        if there.len() < SNAPSHOTS_PER_SHARD_MAX || there.iter().any(|kept| kept.record.name == blank.name) {
            return Ok(());
        }
        let words =
            format!("shard {id} has {SNAPSHOTS_PER_SHARD_MAX} snapshots, the limit: delete one first");
        Err(Error::new(Reason::NotPermitted, words).with_shard(id))
    }

    /// The snapshots of a shard of the caller's in order of name; `name`: only the one of that name. As fresh as
    /// [`Catalog::list_shards`].
    pub async fn list_snapshots(
        &self,
        client: &ClientId,
        selector: &Selector,
        name: Option<&ShardName>,
    ) -> Result<Vec<ShardInfo>> {
        self.refresh().await?;
        let id = self.find(client, selector)?.record.id;
        let view = &self.parts.view;
        let found = match name {
            Some(name) => view.snapshot_by_name(id, name).into_iter().collect(),
            None => view.snapshots_of(id),
        };
        let whole = found.iter().filter(|kept| kept.record.state == StateWord::ReadOnly);
        Ok(whole.map(|kept| view.shard_info(&kept.record)).collect())
    }

    /// Makes a shard with the content of another one, or of a snapshot. With the request id of an earlier call: that call's.
    pub async fn clone_shard(self: &Arc<Self>, client: &ClientId, new: CloneShard) -> Result<ShardInfo> {
        let local = self.local_shard(client, &new.source, None)?;
        self.check_versions(&local.served.id, "no clone is made")?;
        let source = local.id;
        let blank = Blank {
            owner: client.clone(),
            name: new.name,
            limit_bytes: new.limit_bytes,
            request_id: checked_request_id(new.request_id)?,
            content: Content::CloneOf(source),
        };
        let this = self.clone();
        self.to_the_end(async move {
            let _lock = this.locks.lock(source).await;
            this.local_shard(&blank.owner, &Selector::Id(source), None)?;
            this.make(&blank).await
        })
        .await
    }

    /// Fails if a shard has snapshots. The caller holds its lock, so that none comes meanwhile.
    pub(super) async fn check_no_snapshots(&self, id: ShardId) -> Result<()> {
        let view = &self.parts.view;
        view.catch_up(&*self.parts.store, SHOWN_WAIT_MAX).await?;
        let count = view.snapshots_of(id).len();
        if count == 0 {
            return Ok(());
        }
        let words = format!("shard {id} has {count} snapshots and is not deleted: delete them first");
        Err(Error::new(Reason::ShardHasSnapshots, words).with_shard(id))
    }
}
