//! `SHARD/KEY` as people type it: what is before the first `/` names the shard, the rest is a key or the
//! beginning of one. `@` and digits stand for the shard with that id, never for a name.
//!
//! `SHARD/.snap/NAME` and, shorter, `SHARD@NAME` stand for a snapshot of a shard, wherever one can be read.
//!
//! A path that ends with `/` means a directory. Bytes are kept as they are: keys need not be UTF-8, so paths
//! come in as `OsString`.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::OsStrExt;

use bytes::Bytes;
use shardfs_proto::types::cluster::{Selector, ShardInfo};
use shardfs_proto::types::name::{SNAPSHOT_DIRECTORY, quoted};
use shardfs_proto::types::{Error, Key, ShardId, ShardName};

use crate::failure::{Failure, Result};

/// A shard or a snapshot, as it was typed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ShardRef {
    /// A shard. A name that no shard has, and that has an `@` in it, may stand for a snapshot: see [`ShardRef::as_snapshot`].
    Shard(Selector),
    /// The snapshot of that name.
    Snapshot(Selector, ShardName),
}

impl ShardRef {
    /// `SHARD@NAME` as the snapshot that it means if no shard has this very name.
    pub fn as_snapshot(&self) -> Option<(Selector, ShardName)> {
        match self {
            ShardRef::Shard(Selector::Name(name)) => {
                let (shard, snapshot) = name.as_str().rsplit_once('@')?;
                Some((shard_selector(shard).ok()?, ShardName::new(snapshot).ok()?))
            }
            ShardRef::Shard(Selector::Id(_)) => None,
            ShardRef::Snapshot(shard, snapshot) => Some((shard.clone(), snapshot.clone())),
        }
    }
}

impl fmt::Display for ShardRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ShardRef::Shard(shard) => f.write_str(&shard_text(shard)),
            ShardRef::Snapshot(shard, name) => write!(f, "{}/{SNAPSHOT_DIRECTORY}/{name}", shard_text(shard)),
        }
    }
}

/// A shard or snapshot as an argument.
pub fn shard_ref(text: &str) -> shardfs_proto::types::Result<ShardRef> {
    if !text.contains('/') {
        return shard_selector(text).map(ShardRef::Shard);
    }
    let path = RemotePath::parse(OsStr::new(text)).map_err(|e| Error::invalid(e.message().to_owned()))?;
    if !path.rest().is_empty() {
        return Err(Error::invalid(format!(
            "{} is a key: write SHARD, or SHARD/{SNAPSHOT_DIRECTORY}/NAME",
            quoted(text.as_bytes())
        )));
    }
    Ok(path.shard)
}

/// A shard as people tell it from others: its name; of a snapshot the shard's id too.
pub fn info_text(info: &ShardInfo) -> String {
    let name = crate::output::printable(info.name.as_str().as_bytes());
    match info.snapshot_of {
        Some(shard) => format!("@{shard}/{SNAPSHOT_DIRECTORY}/{name}"),
        None => name,
    }
}

/// A place in a cluster.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RemotePath {
    /// The shard or snapshot.
    pub shard: ShardRef,
    /// What follows its name, without a `/` at either end; may be empty: its root.
    rest: Bytes,
    /// Whether it was written with a `/` at the end: a directory.
    pub trailing_slash: bool,
}

impl RemotePath {
    /// Reads `SHARD`, `SHARD/`, `SHARD/KEY` or `SHARD/KEY/`, also in a snapshot; a leading `/` is allowed (the mount's root).
    pub fn parse(path: &OsStr) -> Result<RemotePath> {
        let bytes = path.as_bytes();
        let wrong = |why: String| Failure::usage(why).hint("write SHARD/KEY, e.g. photos/2026/cat.jpg");
        let inner = bytes.strip_prefix(b"/").unwrap_or(bytes);
        if inner.is_empty() {
            return Err(wrong(format!("{} names no shard", quoted(bytes))));
        }
        let (shard, rest) = match inner.iter().position(|b| *b == b'/') {
            Some(at) => (&inner[..at], &inner[at + 1..]),
            None => (inner, &[][..]),
        };
        let shard = match std::str::from_utf8(shard) {
            Ok(text) => shard_selector(text),
            // Says that it is no UTF-8.
            Err(_) => ShardName::from_bytes(shard).map(Selector::Name),
        };
        let shard = shard.map_err(|e| wrong(e.message().to_owned()))?;
        let trailing_slash = inner.ends_with(b"/");
        let rest = rest.strip_suffix(b"/").unwrap_or(rest);
        let (shard, rest) = match snapshot_in(rest) {
            None => (ShardRef::Shard(shard), rest),
            Some((name, rest)) => {
                let name = ShardName::from_bytes(name).map_err(|e| {
                    wrong(format!("{}: no snapshot: {}", quoted(bytes), e.message()))
                        .hint("write SHARD/.snap/NAME/KEY; `shardfs shard snapshots SHARD` lists them")
                })?;
                (ShardRef::Snapshot(shard, name), rest)
            }
        };
        if !rest.is_empty() {
            Key::new(Bytes::copy_from_slice(rest)).map_err(|e| wrong(e.message().to_owned()))?;
        }
        Ok(RemotePath { shard, rest: Bytes::copy_from_slice(rest), trailing_slash })
    }

    /// The key, or `None` for the shard's root.
    pub fn key(&self) -> Option<Key> {
        // `parse` has checked it; an empty one is the root.
        Key::new(self.rest.clone()).ok()
    }

    /// The key of something that must have one.
    pub fn require_key(&self) -> Result<Key> {
        self.key().ok_or_else(|| {
            let shard = &self.shard;
            Failure::usage(format!("{shard} is a shard, not a key in one")).hint(format!("write {shard}/KEY"))
        })
    }

    /// The bytes after the shard's name, without a `/` at either end.
    pub fn rest(&self) -> &Bytes {
        &self.rest
    }

    /// The last component; the shard's or snapshot's name for its root.
    pub fn base_name(&self) -> OsString {
        let last = self.rest.rsplit(|b| *b == b'/').next().unwrap_or_default();
        if !last.is_empty() {
            return OsStr::from_bytes(last).to_owned();
        }
        match &self.shard {
            ShardRef::Shard(shard) => shard_text(shard).into(),
            ShardRef::Snapshot(_, name) => name.as_str().into(),
        }
    }

    /// The key `name` below this directory.
    pub fn join(&self, name: &[u8]) -> Result<Key> {
        let mut joined = self.rest.to_vec();
        if !joined.is_empty() {
            joined.push(b'/');
        }
        joined.extend_from_slice(name);
        Key::new(joined).map_err(Failure::from)
    }
}

impl fmt::Display for RemotePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.shard)?;
        if !self.rest.is_empty() {
            write!(f, "/{}", crate::output::printable(&self.rest))?;
        }
        if self.trailing_slash { f.write_str("/") } else { Ok(()) }
    }
}

/// Name and rest of a path that leads into a snapshot.
fn snapshot_in(rest: &[u8]) -> Option<(&[u8], &[u8])> {
    let below = rest.strip_prefix(SNAPSHOT_DIRECTORY.as_bytes())?;
    let below = match below.split_first() {
        None => below,
        Some((b'/', below)) => below,
        // Another name, which begins so.
        Some(_) => return None,
    };
    let end = below.iter().position(|b| *b == b'/');
    Some(end.map_or((below, &[][..]), |at| (&below[..at], &below[at + 1..])))
}

/// A shard as an argument: `@` and digits is an id, everything else a name.
pub fn shard_selector(text: &str) -> shardfs_proto::types::Result<Selector> {
    let id = text.strip_prefix('@').filter(|id| !id.is_empty() && id.bytes().all(|b| b.is_ascii_digit()));
    let Some(id) = id else { return ShardName::new(text).map(Selector::Name) };
    let id = id.parse().map_err(|_| Error::invalid(format!("shard id {id} is too large")))?;
    ShardId::new(id).map(Selector::Id)
}

/// A shard as it is typed.
pub fn shard_text(shard: &Selector) -> String {
    match shard {
        Selector::Id(id) => format!("@{id}"),
        Selector::Name(name) => name.to_string(),
    }
}

/// A shard's name as an argument, where there is no shard yet.
pub fn shard_name(name: &str) -> shardfs_proto::types::Result<ShardName> {
    ShardName::new(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<RemotePath> {
        RemotePath::parse(OsStr::new(text))
    }

    #[test]
    fn paths_parse() {
        for (text, shard, rest, slash, base) in [
            ("photos", "photos", "", false, "photos"),
            ("photos/", "photos", "", true, "photos"),
            ("/photos/a", "photos", "a", false, "a"),
            ("photos/a/b", "photos", "a/b", false, "b"),
            ("photos/a/b/", "photos", "a/b", true, "b"),
            ("my photos/x y", "my photos", "x y", false, "x y"),
            ("photos/.snap/mon", "photos/.snap/mon", "", false, "mon"),
            ("photos/.snap/mon/", "photos/.snap/mon", "", true, "mon"),
            ("photos/.snap/mon/a/b", "photos/.snap/mon", "a/b", false, "b"),
            ("photos/.snapshot/a", "photos", ".snapshot/a", false, "a"),
            ("photos/a/.snap/b", "photos", "a/.snap/b", false, "b"),
        ] {
            let path = parse(text).unwrap();
            assert_eq!(path.shard.to_string(), shard, "{text:?}");
            assert_eq!(&path.rest()[..], rest.as_bytes(), "{text:?}");
            assert_eq!(path.trailing_slash, slash, "{text:?}");
            assert_eq!(path.base_name(), OsStr::new(base), "{text:?}");
            assert_eq!(path.to_string(), text.trim_start_matches('/'));
        }
    }

    #[test]
    fn bad_paths_are_usage_errors() {
        for bad in [
            "",
            "/",
            "//",
            "photos//a",
            "photos/../b",
            "photos/a//",
            ".shardfs/x",
            "..",
            "./a",
            "photos/.snap",
            "photos/.snap/",
            "photos/.snap//x",
        ] {
            let failure = parse(bad).unwrap_err();
            assert_eq!(failure.code(), crate::failure::EXIT_USAGE, "{bad:?}");
        }
        assert_eq!(
            parse("photos").unwrap().require_key().unwrap_err().render(),
            "error: photos is a shard, not a key in one\nhint: write photos/KEY\n"
        );
    }

    #[test]
    fn an_at_and_digits_is_an_id() {
        let id = |text: &str| match parse(text).unwrap().shard {
            ShardRef::Shard(Selector::Id(id)) => Some(id.get()),
            ShardRef::Shard(Selector::Name(_)) | ShardRef::Snapshot(..) => None,
        };
        assert_eq!(id("@12"), Some(12));
        assert_eq!(id("@40/a/b"), Some(40));
        for name in ["12", "@", "@x", "@1x", "x@1"] {
            assert_eq!(id(name), None, "{name}");
        }
        for bad in ["@0", "@99999999", "@99999999999999999999999/a"] {
            assert!(parse(bad).unwrap_err().message().contains("shard id"), "{bad}");
        }
        assert_eq!(parse("@7/a/").unwrap().to_string(), "@7/a/");
        assert_eq!(parse("@7/").unwrap().base_name(), OsStr::new("@7"));
    }

    #[test]
    fn a_snapshot_is_a_shard_and_a_name() {
        let pair = |text: &str| {
            let found = shard_ref(text).unwrap().as_snapshot();
            found.map(|(shard, name)| (shard_text(&shard), name.to_string()))
        };
        let some = |shard: &str, name: &str| Some((shard.to_owned(), name.to_owned()));
        assert_eq!(pair("photos/.snap/mon"), some("photos", "mon"));
        assert_eq!(pair("@7/.snap/mon"), some("@7", "mon"));
        assert_eq!(pair("photos@mon"), some("photos", "mon"));
        assert_eq!(pair("@7@mon"), some("@7", "mon"));
        assert_eq!(pair("a@b@c"), some("a@b", "c"));
        for none in ["photos", "@7", "@mon", "photos@"] {
            assert_eq!(pair(none), None, "{none}");
        }
        assert!(shard_ref("photos/a").unwrap_err().message().contains("is a key"));
        assert!(shard_ref("photos/.snap").is_err());
    }

    #[test]
    fn bytes_survive() {
        let path = RemotePath::parse(OsStr::from_bytes(b"s/\xff\xfe/x")).unwrap();
        assert_eq!(path.key().unwrap().as_bytes(), b"\xff\xfe/x");
        assert_eq!(path.to_string(), "s/\\xff\\xfe/x");
        assert_eq!(path.join(b"\x80").unwrap().as_bytes(), b"\xff\xfe/x/\x80");
    }
}
