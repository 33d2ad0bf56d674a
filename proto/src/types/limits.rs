//! Every bound of the system, with its reason. Nothing that a peer, a user or a disk can make grow is
//! without one.

use std::time::Duration;

/// Bytes of a key over gRPC; what fits beside a value in one message with room to spare, and the
/// kernel's PATH_MAX, so that every key can be typed as a path.
pub const KEY_BYTES_MAX: usize = 4096;
/// Bytes of one component of a path: NAME_MAX of Linux.
pub const NAME_BYTES_MAX: usize = 255;
/// Bytes of a symlink's target: PATH_MAX without its NUL.
pub const SYMLINK_BYTES_MAX: usize = 4095;
/// Bytes of a value, or of a piece of one, in one message.
pub const VALUE_BYTES_MAX: usize = 4 << 20;
/// Bytes of a batch in one message.
pub const BATCH_BYTES_MAX: usize = 16 << 20;
/// Items of one BatchPut or BatchGet.
pub const BATCH_ITEMS_MAX: usize = 16_384;
/// Bytes of a gRPC message, either way: a full batch with its keys and framing.
pub const MESSAGE_BYTES_MAX: usize = BATCH_BYTES_MAX + (4 << 20);
/// Bytes of an answer that a client takes: that of a batch repeats each item's metadata, indexes included.
pub const REPLY_BYTES_MAX: usize = 8 * MESSAGE_BYTES_MAX;
/// Bytes of a file: what 64 KiB chunks numbered by 28 bits hold.
pub const FILE_BYTES_MAX: u64 = 16 << 40;
/// Bytes that one CopyRange copies: the shard's only writer reads them and writes them again, and everybody waits for it.
pub const COPY_BYTES_MAX: u64 = 8 << 20;
/// Bytes of the pages by which data and holes are told apart: the block of most filesystems.
pub const PAGE_BYTES: u64 = 4096;
/// Names of one inode: the figure of ext4, which programs know.
pub const LINKS_MAX: u32 = 65_000;
/// Bytes of an extended attribute's name and value: XATTR_NAME_MAX and XATTR_SIZE_MAX of Linux.
pub const XATTR_NAME_BYTES_MAX: usize = 255;
/// See [`XATTR_NAME_BYTES_MAX`].
pub const XATTR_VALUE_BYTES_MAX: usize = 65_536;
/// Bytes of all extended attributes of an inode together, names included: they live in one record.
/// XATTR_LIST_MAX bounds the names alone to the same figure.
pub const XATTRS_BYTES_MAX: usize = 128 << 10;
/// Bytes of an access control list: a page, above which the kernel of a mount takes none.
pub const ACL_BYTES_MAX: usize = 4096;
/// Secondary index entries of one value.
pub const INDEXES_MAX: usize = 32;
/// Bytes of an index's name, and of a text value.
pub const INDEX_NAME_BYTES_MAX: usize = 64;
/// See [`INDEX_NAME_BYTES_MAX`].
pub const INDEX_TEXT_BYTES_MAX: usize = 1024;
/// Entries of one ReadDirectory answer.
pub const READDIR_ENTRIES_MAX: u32 = 8192;
/// Directories between a shard's root and anything in it. A key of 4096 bytes has 2048 components at
/// the most.
pub const DEPTH_MAX: usize = 2048;
/// The same of anything in a directory that was moved with what is below it: a rename that may lead deeper is refused. Twice
/// [`DEPTH_MAX`], so that what was never moved deeper may be moved anywhere a directory can be made.
pub const MOVED_DEPTH_MAX: usize = 2 * DEPTH_MAX;
/// Snapshots of one shard: an hour's for a week and a day's for a season; each keeps blocks that the shard no longer needs.
pub const SNAPSHOTS_PER_SHARD_MAX: usize = 256;
/// Mutations of one session that may be unanswered at a time; also the number of result slots that the
/// shard keeps for it.
pub const SESSION_WINDOW: u64 = 1024;
/// Sessions of one shard.
pub const SESSIONS_PER_SHARD_MAX: usize = 4096;
/// A session that is silent for longer is dropped: long enough for a failover and a slow restart.
pub const SESSION_TTL: Duration = Duration::from_secs(300);
/// Locks of one file, and of all files of a shard: a file's are one record, which every change of one writes anew.
pub const LOCKS_PER_FILE_MAX: usize = 4096;
/// See [`LOCKS_PER_FILE_MAX`].
pub const LOCKS_PER_SHARD_MAX: usize = 65_536;
/// A session that is silent for longer ends when somebody else asks for what it has locked: three times the pause between two signs of
/// life of one that lives.
pub const LOCK_SILENCE_MAX: Duration = Duration::from_secs(60);
/// How long one WaitLock waits: how late a session's silence is noticed by who waits for its lock.
pub const LOCK_WAIT_MAX: Duration = Duration::from_secs(10);
/// Calls of WaitLock under way in a shard.
pub const LOCK_WAITERS_MAX: usize = 4096;
/// Bytes of a session's label.
pub const SESSION_LABEL_BYTES_MAX: usize = 255;
/// Age that an operation answered as buffered may reach before it is synced.
pub const UNSYNCED_AGE_MAX: Duration = Duration::from_secs(5);
/// Age of a view that a read from a backup takes unless it says otherwise: twice the pause between two views.
pub const STALENESS_DEFAULT: Duration = Duration::from_secs(10);
/// Shards of one PublishViews.
pub const PUBLISH_SHARDS_MAX: usize = 256;
/// Bits of a shard id: with [`INODE_BITS`] they fill a positive 64-bit st_ino.
pub const SHARD_ID_BITS: u32 = 22;
/// Bits of an inode number within its shard.
pub const INODE_BITS: u32 = 41;
/// Characters of a client, node or volume id.
pub const ID_CHARS_MAX: usize = 64;
