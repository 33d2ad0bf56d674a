//! Shards that are made of others: copies that share their files, and a shard whose content is replaced with that of a copy.
//!
//! A copy is a checkpoint of RocksDB's, which is a prefix of the source's operation order by itself: no writer waits for it. It is made
//! under another name and renamed when it is whole, as a new shard is. What it is to be lies in a file beside it, and it is adopted (`adopt`)
//! when it is opened first: whoever waits for a snapshot does not wait for that. The file goes when that is durable; an adoption that was cut
//! off begins anew.
//!
//! A replacement is a copy under the shard's own id, made beside it (`shard-N.creating`), that is exchanged with the shard's folder in one
//! step: at any time the folder is whole, with the one content or the other. What lies beside it afterwards is the old content, and goes.
//! A file in the folder tells which replacement its content came by.

use std::path::Path;
use std::sync::Arc;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use shardfs_proto::types::op::ShardState;
use shardfs_proto::types::{ClientId, Error, Result, ShardId, Timestamp};

use super::{
    ORIGIN_FILE, ShardManager, check_origin, io, is_whole, parent, remove_tree, sync_dir, with_suffix,
    write_file,
};
use crate::shard::adopt::{adopt, succeed};
use crate::shard::handle::Shard;
use crate::shard::records::Header;
use crate::shard::rocks::RocksStore;
use crate::shard::{Room, chunk};

/// The file beside a copy's database that holds the header that it is to have, until it has it.
const ADOPT_FILE: &str = "adopt";
/// The file beside the database that tells by which replacement its content came.
const REPLACED_FILE: &str = "replaced-by";

/// What a copy is to be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CopyInit {
    /// Its id.
    pub id: ShardId,
    /// The client id that owns it.
    pub owner: ClientId,
    /// Active, or read-only from the beginning.
    pub state: ShardState,
    /// Limit on its logical bytes.
    pub limit_bytes: Option<u64>,
    /// When it was made.
    pub created: Timestamp,
}

impl ShardManager {
    /// Makes a shard in a folder of the source's volume with the content that the source has at some moment during the call. Durable
    /// when it returns, and so is that content in the source; `origin`: see [`ShardManager::create_by`].
    pub async fn copy(&self, source: &Arc<Shard>, dir: &Path, init: &CopyInit, origin: &str) -> Result<()> {
        let building = with_suffix(dir, "creating")?;
        let made_before = {
            let (building, dir, origin, id) = (building.clone(), dir.to_owned(), origin.to_owned(), init.id);
            blocking(id, move || {
                if is_whole(&dir) {
                    return check_origin(&dir, id, &origin).map(|()| true);
                }
                remove_building(&building).map(|()| false)
            })
            .await?
        };
        if made_before {
            return Ok(());
        }
        source.checkpoint(building.clone()).await?;
        fail::fail_point!("shard::copy::made_db");
        let (dir, origin) = (dir.to_owned(), origin.to_owned());
        let header = Header {
            id: init.id,
            owner: init.owner.clone(),
            state: init.state,
            limit_bytes: init.limit_bytes,
            chunk_bytes: chunk::CHUNK_BYTES,
            created: init.created,
        };
        let described = {
            let building = building.clone();
            blocking(init.id, move || {
                write_file(&building.join(ORIGIN_FILE), origin.as_bytes())?;
                write_file(&building.join(ADOPT_FILE), &header.encode())?;
                sync_dir(&building)
            })
        };
        // Nobody sees in the copy what a crash may still take from the source.
        let (synced, described) = tokio::join!(source.sync(), described);
        synced.and(described)?;
        fail::fail_point!("shard::copy::described");
        blocking(init.id, move || {
            io("rename", &building, std::fs::rename(&building, &dir))?;
            sync_dir(parent(&dir)?)
        })
        .await
    }

    /// Whether a folder holds a whole shard, of this creation; an error if it holds another one's. Blocks.
    pub fn is_made_by(&self, dir: &Path, id: ShardId, origin: &str) -> Result<bool> {
        if !is_whole(dir) {
            return Ok(false);
        }
        check_origin(dir, id, origin).map(|()| true)
    }

    /// Replaces the content of a shard with that of a closed one on the same volume, which stays. Sessions go on: what was answered
    /// before is answered again, and not done again. `mark` tells this replacement from
    /// all others. After an error, [`ShardManager::settle_replacement`] tells what has become of it.
    pub async fn replace(
        &self,
        id: ShardId,
        dir: &Path,
        source: &Arc<Shard>,
        mark: &str,
        room: Arc<dyn Room>,
    ) -> Result<()> {
        let slot = self.slot(id);
        // Nobody opens it before the exchange is made.
        let mut guard = slot.shard.lock().await;
        self.close_locked(id, &slot, &mut guard).await?;
        let (shared, source) = (self.shared.clone(), Arc::clone(source));
        let (dir, mark) = (dir.to_owned(), mark.to_owned());
        blocking(id, move || {
            let building = with_suffix(&dir, "creating")?;
            remove_building(&building)?;
            source.executor().store().checkpoint(&building)?;
            copy_origin(&dir, &building)?;
            write_file(&building.join(REPLACED_FILE), mark.as_bytes())?;
            {
                let live = Arc::new(RocksStore::open(&shared, id, &dir)?);
                finish_adoption(&dir, id, &live, &room)?;
                // The copy has another id still, which is not looked at here.
                succeed(Arc::new(RocksStore::open(&shared, id, &building)?), &*live, room)?;
            }
            sync_dir(&building)?;
            fail::fail_point!("shard::replace::built", |_| Err(Error::unavailable("failpoint")));
            let exchanged = renameat_with(CWD, &building, CWD, &dir, RenameFlags::EXCHANGE);
            io("exchange with its copy", &dir, exchanged.map_err(Into::into))?;
            sync_dir(parent(&dir)?)?;
            fail::fail_point!("shard::replace::exchanged", |_| Err(Error::unavailable("failpoint")));
            if let Err(error) = remove_building(&building) {
                tracing::warn!(shard = %id, %error, "what a shard's content was before cannot be removed yet");
            }
            Ok(())
        })
        .await
    }

    /// Whether the shard's content is the one that a replacement brought; removes what it left beside it.
    pub async fn settle_replacement(&self, id: ShardId, dir: &Path, mark: &str) -> Result<bool> {
        let slot = self.slot(id);
        let _guard = slot.shard.lock().await;
        let (dir, mark) = (dir.to_owned(), mark.to_owned());
        blocking(id, move || {
            let path = dir.join(REPLACED_FILE);
            let replaced = match std::fs::read(&path) {
                Ok(found) => found == mark.as_bytes(),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => false,
                Err(e) => return io("read", &path, Err(e)),
            };
            remove_building(&with_suffix(&dir, "creating")?)?;
            Ok(replaced)
        })
        .await
    }
}

/// Makes a copy that was not opened before the shard that it is to be. Blocks.
pub(super) fn finish_adoption(
    dir: &Path,
    id: ShardId,
    store: &Arc<RocksStore>,
    room: &Arc<dyn Room>,
) -> Result<()> {
    let path = dir.join(ADOPT_FILE);
    let header = match std::fs::read(&path) {
        Ok(bytes) => Header::decode(&bytes)?,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return io("read", &path, Err(e)),
    };
    if header.id != id {
        return Err(Error::corrupt(format!("{}: it is of shard {}, not of {id}", path.display(), header.id))
            .with_shard(id));
    }
    adopt(store.clone(), header, room.clone())?;
    fail::fail_point!("shard::copy::adopted", |_| Err(Error::unavailable("failpoint")));
    io("remove", &path, std::fs::remove_file(&path))?;
    sync_dir(dir)
}

/// Removes what was left of a copy, also by RocksDB, which makes a checkpoint under a name of its own first.
pub(super) fn remove_building(building: &Path) -> Result<()> {
    remove_tree(building)?;
    remove_tree(&with_suffix(building, "tmp")?)
}

/// A replaced shard is of the creation that it was of: a retry of that finds it.
fn copy_origin(from: &Path, to: &Path) -> Result<()> {
    match std::fs::read(from.join(ORIGIN_FILE)) {
        Ok(origin) => write_file(&to.join(ORIGIN_FILE), &origin),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => io("read", &from.join(ORIGIN_FILE), Err(e)),
    }
}

async fn blocking<T: Send + 'static>(
    id: ShardId,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| Error::internal(format!("shard {id}: copying it was lost: {e}")))?
        .map_err(|e| e.with_shard(id))
}

/// Fails if a folder holds a shard of another creation than `origin` (see [`ShardManager::create_by`]). One that does not tell its creation is
/// of an older version, and is taken for the one. Blocks.
pub fn check_creation(dir: &Path, id: ShardId, origin: &str) -> Result<()> {
    match std::fs::symlink_metadata(dir.join(ORIGIN_FILE)) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        _there => check_origin(dir, id, origin),
    }
}

/// Makes the folder of a shard, which nobody has open or knows, that of a shard with another id; it is adopted when it is opened first.
/// Whether there is such a shard. Blocks; repeated, it goes on. The names are durable when the folder above was synced.
pub fn rehome(from: &Path, to: &Path, init: &CopyInit, origin: &str) -> Result<bool> {
    if is_whole(to) {
        return check_origin(to, init.id, origin).map(|()| true);
    }
    if !is_whole(from) {
        return Ok(false);
    }
    let header = Header {
        id: init.id,
        owner: init.owner.clone(),
        state: init.state,
        limit_bytes: init.limit_bytes,
        chunk_bytes: chunk::CHUNK_BYTES,
        created: init.created,
    };
    // An adoption that was still to come would have brought another header; nothing else.
    write_file(&from.join(ADOPT_FILE), &header.encode())?;
    write_file(&from.join(ORIGIN_FILE), origin.as_bytes())?;
    match std::fs::remove_file(from.join(REPLACED_FILE)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return io("clean", from, Err(e)),
        Ok(()) | Err(_) => {}
    }
    sync_dir(from)?;
    io("rename", from, std::fs::rename(from, to))?;
    Ok(true)
}
