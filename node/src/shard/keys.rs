//! The key layout of a shard's column families.
//!
//! Owns: every byte of every key. All integers are big-endian, so that keys sort as their numbers do
//! and everything about one inode, directory or content is one contiguous range.
//!
//! | family | key | value |
//! |---|---|---|
//! | `dirent` | parent inode u64, name | [`super::records::Dirent`] |
//! | `cookie` | parent inode u64, cookie u64 | [`super::records::CookieEntry`] |
//! | `inode` | inode u64 | [`super::records::InodeRecord`] |
//! | `parent` | inode u64, parent inode u64, name | empty |
//! | `chunk` | content id u64, chunk number u32 | the chunk's bytes; merge operands are patches (`chunk.rs`) |
//! | `index` | index name, 0, typed ordered value, inode u64 | empty |
//! | `sys` | `H` | header |
//! | `sys` | `C` | counters |
//! | `sys` | `S`, session u64 | session |
//! | `sys` | `R`, session u64, slot u16 | sequence u64, encoded result |
//! | `sys` | `O`, inode u64 | orphan: the sessions that hold it |
//! | `sys` | `T`, content id u64 | staged content |
//! | `sys` | `L`, inode u64 | the inode's locks; none while it has none |
//!
//! The typed ordered value of an index is a tag and bytes that sort as the values do: 1, the text with
//! 0 written as 0 255, then 0 0; 2, the integer with its sign bit flipped; 3, seconds with the sign bit
//! flipped, nanoseconds u32.
//!
//! Must not: read or write a store, or know the values' bytes.

use shardfs_proto::types::op::IndexValue;
use shardfs_proto::types::{Cookie, Error, InodeNo, Result, SessionId, Timestamp};

/// A column family.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Cf {
    /// Names.
    Dirent,
    /// Directories in cookie order.
    Cookie,
    /// Inode records.
    Inode,
    /// Names by inode.
    Parent,
    /// File content.
    Chunk,
    /// Secondary indexes.
    Index,
    /// The shard's own records.
    Sys,
}

impl Cf {
    /// All of them, in the order of [`Cf::position`].
    pub const ALL: [Cf; 7] = [Cf::Dirent, Cf::Cookie, Cf::Inode, Cf::Parent, Cf::Chunk, Cf::Index, Cf::Sys];

    /// The name on disk.
    pub fn name(self) -> &'static str {
        match self {
            Cf::Dirent => "dirent",
            Cf::Cookie => "cookie",
            Cf::Inode => "inode",
            Cf::Parent => "parent",
            Cf::Chunk => "chunk",
            Cf::Index => "index",
            Cf::Sys => "sys",
        }
    }

    /// Where it stands in [`Cf::ALL`].
    pub fn position(self) -> usize {
        self as usize
    }
}

/// The number of a file's content within its shard. Never used twice; an inode names its content.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ContentId(u64);

impl ContentId {
    /// Any number but 0, which in an inode record means "inline".
    pub fn new(id: u64) -> Option<ContentId> {
        (id != 0).then_some(ContentId(id))
    }

    /// The number.
    pub fn get(self) -> u64 {
        self.0
    }
}

/// The header's key.
pub const HEADER: &[u8] = b"H";
/// The counters' key.
pub const COUNTERS: &[u8] = b"C";
const SESSION: u8 = b'S';
const RESULT: u8 = b'R';
const ORPHAN: u8 = b'O';
const STAGED: u8 = b'T';
const LOCKS: u8 = b'L';

/// `inode`, `parent` prefix, `dirent` prefix and `cookie` prefix of one inode: its number.
pub fn inode(ino: InodeNo) -> [u8; 8] {
    ino.get().to_be_bytes()
}

/// The inode that an `inode` key stands for.
pub fn parse_inode(key: &[u8]) -> Result<InodeNo> {
    let bytes: [u8; 8] = key.try_into().map_err(|_| bad(Cf::Inode, key))?;
    InodeNo::new(u64::from_be_bytes(bytes)).map_err(|_| bad(Cf::Inode, key))
}

/// `dirent`.
pub fn dirent(parent: InodeNo, name: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(8 + name.len());
    key.extend_from_slice(&inode(parent));
    key.extend_from_slice(name);
    key
}

/// Directory and name of a `dirent` key.
pub fn parse_dirent(key: &[u8]) -> Result<(InodeNo, &[u8])> {
    if key.len() < 9 {
        return Err(bad(Cf::Dirent, key));
    }
    let (parent, name) = key.split_at(8);
    Ok((parse_inode(parent).map_err(|_| bad(Cf::Dirent, key))?, name))
}

/// `cookie`.
pub fn cookie(parent: InodeNo, cookie: Cookie) -> [u8; 16] {
    pair(parent.get(), cookie.get())
}

/// Directory and cookie of a `cookie` key.
pub fn parse_cookie(key: &[u8]) -> Result<(InodeNo, Cookie)> {
    if key.len() != 16 {
        return Err(bad(Cf::Cookie, key));
    }
    let parent = parse_inode(&key[..8]).map_err(|_| bad(Cf::Cookie, key))?;
    Ok((parent, Cookie::new(be_u64(&key[8..]))))
}

/// `parent`.
pub fn parent(ino: InodeNo, parent: InodeNo, name: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(16 + name.len());
    key.extend_from_slice(&pair(ino.get(), parent.get()));
    key.extend_from_slice(name);
    key
}

/// Inode, parent and name of a `parent` key.
pub fn parse_parent(key: &[u8]) -> Result<(InodeNo, InodeNo, &[u8])> {
    if key.len() < 17 {
        return Err(bad(Cf::Parent, key));
    }
    let ino = parse_inode(&key[..8]).map_err(|_| bad(Cf::Parent, key))?;
    let parent = parse_inode(&key[8..16]).map_err(|_| bad(Cf::Parent, key))?;
    Ok((ino, parent, &key[16..]))
}

/// `chunk`.
pub fn chunk(content: ContentId, number: u32) -> [u8; 12] {
    let mut key = [0; 12];
    key[..8].copy_from_slice(&content.0.to_be_bytes());
    key[8..].copy_from_slice(&number.to_be_bytes());
    key
}

/// The prefix of all chunks of a content.
pub fn content(content: ContentId) -> [u8; 8] {
    content.0.to_be_bytes()
}

/// Content and number of a `chunk` key.
pub fn parse_chunk(key: &[u8]) -> Result<(ContentId, u32)> {
    if key.len() != 12 {
        return Err(bad(Cf::Chunk, key));
    }
    let content = ContentId::new(be_u64(&key[..8])).ok_or_else(|| bad(Cf::Chunk, key))?;
    let number = u32::from_be_bytes([key[8], key[9], key[10], key[11]]);
    Ok((content, number))
}

/// `index`: one entry.
pub fn index(name: &str, value: &IndexValue, ino: InodeNo) -> Vec<u8> {
    let mut key = index_value(name, value);
    key.extend_from_slice(&inode(ino));
    key
}

/// The prefix of all entries of an index with a value.
pub fn index_value(name: &str, value: &IndexValue) -> Vec<u8> {
    let mut key = index_name(name);
    match value {
        IndexValue::Text(text) => {
            key.push(1);
            for byte in text.bytes() {
                key.push(byte);
                if byte == 0 {
                    key.push(0xff);
                }
            }
            key.extend_from_slice(&[0, 0]);
        }
        IndexValue::Integer(number) => {
            key.push(2);
            key.extend_from_slice(&ordered(*number));
        }
        IndexValue::Time(time) => {
            key.push(3);
            key.extend_from_slice(&ordered(time.seconds()));
            key.extend_from_slice(&time.nanos().to_be_bytes());
        }
    }
    key
}

/// The prefix of all entries of an index.
pub fn index_name(name: &str) -> Vec<u8> {
    let mut key = Vec::with_capacity(name.len() + 32);
    key.extend_from_slice(name.as_bytes());
    key.push(0);
    key
}

/// Name, value and inode of an `index` key.
pub fn parse_index(key: &[u8]) -> Result<(&str, IndexValue, InodeNo)> {
    parse_index_parts(key).ok_or_else(|| bad(Cf::Index, key))
}

fn parse_index_parts(key: &[u8]) -> Option<(&str, IndexValue, InodeNo)> {
    let end = key.iter().position(|b| *b == 0)?;
    let name = std::str::from_utf8(&key[..end]).ok()?;
    let body = key.get(end + 1..key.len().checked_sub(8)?)?;
    let ino = parse_inode(&key[key.len() - 8..]).ok()?;
    let (tag, rest) = body.split_first()?;
    let value = match tag {
        1 => {
            let mut text = Vec::with_capacity(rest.len());
            let mut bytes = rest.iter();
            loop {
                match bytes.next()? {
                    0 => match bytes.next()? {
                        0 => break,
                        0xff => text.push(0),
                        _ => return None,
                    },
                    byte => text.push(*byte),
                }
            }
            if bytes.next().is_some() {
                return None;
            }
            IndexValue::Text(String::from_utf8(text).ok()?)
        }
        2 => IndexValue::Integer(unordered(rest.try_into().ok()?)),
        3 => {
            let seconds = unordered(rest.get(..8)?.try_into().ok()?);
            let nanos = u32::from_be_bytes(rest.get(8..)?.try_into().ok()?);
            IndexValue::Time(Timestamp::new(seconds, nanos).ok()?)
        }
        _ => return None,
    };
    Some((name, value, ino))
}

/// `sys`: a session.
pub fn session(session: SessionId) -> [u8; 9] {
    tagged(SESSION, session.get())
}

/// The prefix of all sessions.
pub const SESSIONS: &[u8] = &[SESSION];

/// The session of a `sys` session key.
pub fn parse_session(key: &[u8]) -> Result<SessionId> {
    SessionId::new(parse_tagged(SESSION, key)?).ok_or_else(|| bad(Cf::Sys, key))
}

/// `sys`: a result slot.
pub fn result(session: SessionId, slot: u16) -> [u8; 11] {
    let mut key = [0; 11];
    key[..9].copy_from_slice(&results(session));
    key[9..].copy_from_slice(&slot.to_be_bytes());
    key
}

/// The prefix of all result slots of a session.
pub fn results(session: SessionId) -> [u8; 9] {
    tagged(RESULT, session.get())
}

/// The prefix of all result slots.
pub const RESULTS: &[u8] = &[RESULT];

/// Session and slot of a `sys` result key.
pub fn parse_result(key: &[u8]) -> Result<(SessionId, u16)> {
    if key.len() != 11 {
        return Err(bad(Cf::Sys, key));
    }
    let session = SessionId::new(parse_tagged(RESULT, &key[..9])?).ok_or_else(|| bad(Cf::Sys, key))?;
    Ok((session, u16::from_be_bytes([key[9], key[10]])))
}

/// `sys`: an orphan.
pub fn orphan(ino: InodeNo) -> [u8; 9] {
    tagged(ORPHAN, ino.get())
}

/// The prefix of all orphans.
pub const ORPHANS: &[u8] = &[ORPHAN];

/// The inode of a `sys` orphan key.
pub fn parse_orphan(key: &[u8]) -> Result<InodeNo> {
    InodeNo::new(parse_tagged(ORPHAN, key)?).map_err(|_| bad(Cf::Sys, key))
}

/// `sys`: a staged content.
pub fn staged(content: ContentId) -> [u8; 9] {
    tagged(STAGED, content.0)
}

/// The prefix of all staged contents.
pub const STAGED_ALL: &[u8] = &[STAGED];

/// The content of a `sys` staged key.
pub fn parse_staged(key: &[u8]) -> Result<ContentId> {
    ContentId::new(parse_tagged(STAGED, key)?).ok_or_else(|| bad(Cf::Sys, key))
}

/// `sys`: an inode's locks.
pub fn locks(ino: InodeNo) -> [u8; 9] {
    tagged(LOCKS, ino.get())
}

/// The prefix of all inodes' locks.
pub const LOCKS_ALL: &[u8] = &[LOCKS];

/// The inode of a `sys` locks key.
pub fn parse_locks(key: &[u8]) -> Result<InodeNo> {
    InodeNo::new(parse_tagged(LOCKS, key)?).map_err(|_| bad(Cf::Sys, key))
}

/// The least key above all keys with a prefix; `None`: there is none, scan to the end.
pub fn prefix_end(prefix: &[u8]) -> Option<Vec<u8>> {
    let last = prefix.iter().rposition(|b| *b != 0xff)?;
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    Some(end)
}

fn pair(a: u64, b: u64) -> [u8; 16] {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&a.to_be_bytes());
    key[8..].copy_from_slice(&b.to_be_bytes());
    key
}

fn tagged(tag: u8, number: u64) -> [u8; 9] {
    let mut key = [tag; 9];
    key[1..].copy_from_slice(&number.to_be_bytes());
    key
}

fn parse_tagged(tag: u8, key: &[u8]) -> Result<u64> {
    if key.len() != 9 || key[0] != tag {
        return Err(bad(Cf::Sys, key));
    }
    Ok(be_u64(&key[1..]))
}

/// The first eight bytes as a number; the caller has checked that there are so many.
fn be_u64(bytes: &[u8]) -> u64 {
    bytes[..8].iter().fold(0, |sum, b| sum << 8 | u64::from(*b))
}

fn ordered(number: i64) -> [u8; 8] {
    (number as u64 ^ 1 << 63).to_be_bytes()
}

fn unordered(bytes: [u8; 8]) -> i64 {
    (u64::from_be_bytes(bytes) ^ 1 << 63) as i64
}

fn bad(cf: Cf, key: &[u8]) -> Error {
    const SHOWN_BYTES: usize = 64;
    let shown = &key[..key.len().min(SHOWN_BYTES)];
    Error::corrupt(format!("family {}: key \"{}\" is malformed", cf.name(), shown.escape_ascii()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ino(n: u64) -> InodeNo {
        InodeNo::new(n).unwrap()
    }

    #[test]
    fn keys_are_the_golden_bytes() {
        let session = SessionId::new(5).unwrap();
        let content = ContentId::new(0x0102).unwrap();
        assert_eq!(dirent(ino(1), b"ab"), b"\0\0\0\0\0\0\0\x01ab");
        assert_eq!(cookie(ino(2), Cookie::new(258)), *b"\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\x01\x02");
        assert_eq!(parent(ino(3), ino(1), b"x"), b"\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\x01x");
        assert_eq!(chunk(content, 7), *b"\0\0\0\0\0\0\x01\x02\0\0\0\x07");
        assert_eq!(super::session(session), *b"S\0\0\0\0\0\0\0\x05");
        assert_eq!(result(session, 1023), *b"R\0\0\0\0\0\0\0\x05\x03\xff");
        assert_eq!(orphan(ino(9)), *b"O\0\0\0\0\0\0\0\x09");
        assert_eq!(staged(content), *b"T\0\0\0\0\0\0\x01\x02");
        assert_eq!(locks(ino(9)), *b"L\0\0\0\0\0\0\0\x09");
        assert_eq!(
            index("n", &IndexValue::Text("a\0b".into()), ino(1)),
            b"n\0\x01a\0\xffb\0\0\0\0\0\0\0\0\0\x01"
        );
        assert_eq!(
            index("n", &IndexValue::Integer(-1), ino(1)),
            b"n\0\x02\x7f\xff\xff\xff\xff\xff\xff\xff\0\0\0\0\0\0\0\x01"
        );
        assert_eq!(
            index("n", &IndexValue::Time(Timestamp::new(1, 2).unwrap()), ino(1)),
            b"n\0\x03\x80\0\0\0\0\0\0\x01\0\0\0\x02\0\0\0\0\0\0\0\x01"
        );
    }

    #[test]
    fn keys_parse_back() {
        let session = SessionId::new(5).unwrap();
        let content = ContentId::new(77).unwrap();
        assert_eq!(parse_dirent(&dirent(ino(1), b"ab")).unwrap(), (ino(1), &b"ab"[..]));
        assert_eq!(parse_cookie(&cookie(ino(2), Cookie::new(3))).unwrap(), (ino(2), Cookie::new(3)));
        assert_eq!(parse_parent(&parent(ino(3), ino(1), b"x")).unwrap(), (ino(3), ino(1), &b"x"[..]));
        assert_eq!(parse_chunk(&chunk(content, 7)).unwrap(), (content, 7));
        assert_eq!(parse_session(&super::session(session)).unwrap(), session);
        assert_eq!(parse_result(&result(session, 9)).unwrap(), (session, 9));
        assert_eq!(parse_orphan(&orphan(ino(9))).unwrap(), ino(9));
        assert_eq!(parse_locks(&locks(ino(9))).unwrap(), ino(9));
        assert_eq!(parse_staged(&staged(content)).unwrap(), content);
        for value in [
            IndexValue::Text(String::new()),
            IndexValue::Text("a\0\0z".into()),
            IndexValue::Integer(i64::MIN),
            IndexValue::Time(Timestamp::new(-5, 999_999_999).unwrap()),
        ] {
            let key = index("name", &value, ino(4));
            assert_eq!(parse_index(&key).unwrap(), ("name", value, ino(4)));
        }
        for short in [&b""[..], b"x", b"\0\0\0\0\0\0\0\0", b"n\0\x01a", b"n\0\x04aaaaaaaaaaaa"] {
            assert!(parse_dirent(short).is_err());
            assert!(parse_cookie(short).is_err());
            assert!(parse_parent(short).is_err());
            assert!(parse_chunk(short).is_err());
            assert!(parse_index(short).is_err());
            assert!(parse_session(short).is_err());
        }
    }

    #[test]
    fn index_keys_sort_as_values() {
        let texts = ["", "\0", "\0a", "a", "a\0", "a\0b", "ab", "b"].map(|t| IndexValue::Text(t.into()));
        let numbers = [i64::MIN, -2, -1, 0, 1, i64::MAX].map(IndexValue::Integer);
        for values in [&texts[..], &numbers[..]] {
            for two in values.windows(2) {
                assert!(index("n", &two[0], ino(9)) < index("n", &two[1], ino(1)), "{two:?}");
            }
        }
    }

    #[test]
    fn prefixes_end() {
        assert_eq!(prefix_end(b"a").unwrap(), b"b");
        assert_eq!(prefix_end(b"a\xff").unwrap(), b"b");
        assert_eq!(prefix_end(b"\xff\xff"), None);
        assert_eq!(prefix_end(b""), None);
    }
}
