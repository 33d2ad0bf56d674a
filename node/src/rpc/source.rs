//! What a read reads from: the present of a shard that this node serves, or a view of one that it backs up.

use shardfs_proto::types::cluster::Selector;
use shardfs_proto::types::{ClientId, ReadFrom, Reason, Result, SessionId, ShardId};
use shardfs_proto::{convert, wire};

use super::{Services, about};
use crate::catalog::BackupRead;
use crate::shard::ReadView;

/// See the module.
pub(super) struct Source {
    /// To read through. What it brings is told only after [`Source::finish`].
    pub(super) view: ReadView,
    backup: Option<BackupRead>,
}

impl Source {
    pub(super) fn shard_id(&self) -> ShardId {
        self.view.shard_id()
    }

    /// Of which view the answers are; `None`: of the present.
    pub(super) fn label(&self) -> Option<wire::ViewLabel> {
        self.backup.as_ref().map(|read| convert::view_label_to_wire(read.label()))
    }

    /// Passes on an answer, if it may be told, and says of an error about which shard it is.
    pub(super) fn finish<T>(&self, outcome: Result<T>) -> Result<T> {
        let outcome = match &self.backup {
            Some(read) => read.finish(outcome),
            None => outcome,
        };
        about(self.shard_id(), outcome)
    }

    /// The same for some messages of a stream, which go if they may not be told.
    pub(super) fn finish_some<T, M>(&self, outcome: Result<T>, messages: &mut Vec<M>) -> Result<T> {
        let outcome = self.finish(outcome);
        if outcome.is_err() && self.backup.is_some() {
            messages.clear();
        }
        outcome
    }

    /// Whether an error of one item of a batch is no answer about it: another node may have it.
    pub(super) fn may_be_elsewhere(&self, reason: Reason) -> bool {
        self.backup.is_some() && BackupRead::is_trouble(reason)
    }

    /// A point read.
    pub(super) fn read<T>(&self, read: impl FnOnce(&ReadView) -> Result<T>) -> Result<T> {
        self.finish(read(&self.view))
    }
}

impl Services {
    /// What a read reads from. `wish`: the request's read preference and greatest staleness.
    pub(super) async fn source(
        &self,
        client: &ClientId,
        selector: &Selector,
        epoch: u64,
        session: Option<SessionId>,
        wish: (i32, u32),
    ) -> Result<Source> {
        let present = async || -> Result<Source> {
            let shard = self.shard(client, selector, epoch).await?;
            let view = about(shard.id(), shard.read_view(session).await)?;
            Ok(Source { view, backup: None })
        };
        let of_view = |read: BackupRead| Source { view: read.view(), backup: Some(read) };
        match convert::read_from_from_wire(wish.0, wish.1)? {
            ReadFrom::Primary => match present().await {
                Err(error) if error.reason() == Reason::NotPrimary => {
                    let closed = self.catalog.view_for(client, selector, None).await;
                    closed.map(of_view).map_err(|_| error)
                }
                outcome => outcome,
            },
            ReadFrom::Backup { max_staleness } => {
                match self.catalog.view_for(client, selector, Some(max_staleness)).await {
                    // This node is the primary, or says who is.
                    Err(error) if error.reason() == Reason::NotPrimary => present().await,
                    outcome => outcome.map(of_view),
                }
            }
        }
    }
}
