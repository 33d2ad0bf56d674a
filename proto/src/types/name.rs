//! Names and keys: checked once, where they enter.

use std::fmt;

use bytes::Bytes;

use super::error::{Error, Reason, Result};
use super::limits::{KEY_BYTES_MAX, NAME_BYTES_MAX};

/// One component of a path: 1..=255 bytes, no `/`, no NUL, not `.` or `..`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileName(Bytes);

impl FileName {
    /// Checks.
    pub fn new(name: impl Into<Bytes>) -> Result<FileName> {
        let name = name.into();
        check_component(&name)?;
        Ok(FileName(name))
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FileName({})", quoted(&self.0))
    }
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&quoted(&self.0))
    }
}

/// A path inside a shard: 1..=4096 bytes, components joined by single `/`, none at either end.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(Bytes);

impl Key {
    /// Checks.
    pub fn new(key: impl Into<Bytes>) -> Result<Key> {
        let key = key.into();
        if key.is_empty() {
            return Err(Error::invalid("the key is empty"));
        }
        if key.len() > KEY_BYTES_MAX {
            return Err(Error::new(
                Reason::NameTooLong,
                format!("the key has {} bytes; the limit is {KEY_BYTES_MAX}", key.len()),
            ));
        }
        for component in key.split(|b| *b == b'/') {
            if component.is_empty() {
                return Err(Error::invalid(format!(
                    "key {}: empty component (a `/` at an end, or two together)",
                    quoted(&key)
                )));
            }
            check_component(component).map_err(|e| e.context(format!("key {}", quoted(&key))))?;
        }
        Ok(Key(key))
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The components, first to last; at least one.
    pub fn components(&self) -> impl DoubleEndedIterator<Item = FileName> + '_ {
        self.0.split(|b| *b == b'/').map(|c| FileName(self.0.slice_ref(c)))
    }

    /// The directories' names above the last component, and the last component.
    pub fn split_last(&self) -> (Vec<FileName>, FileName) {
        let mut all: Vec<FileName> = self.components().collect();
        let last = all.pop().expect("a key has at least one component");
        (all, last)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", quoted(&self.0))
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&quoted(&self.0))
    }
}

/// A shard's name: a directory at the root of the mount. 1..=255 bytes of UTF-8; no `/` and no control
/// character; not `.`, `..` or `.shardfs`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShardName(String);

/// The directory of a shard's snapshots, at the shard's root.
pub const SNAPSHOT_DIRECTORY: &str = ".snap";
/// The virtual directory at the root of the mount.
pub const VIRTUAL_DIRECTORY: &str = ".shardfs";

impl ShardName {
    /// Checks.
    pub fn new(name: impl Into<String>) -> Result<ShardName> {
        let name = name.into();
        check_component(name.as_bytes()).map_err(|e| e.context("shard name"))?;
        if name.chars().any(char::is_control) {
            return Err(Error::invalid(format!("shard name {name:?}: control characters are not allowed")));
        }
        // `@7` is how people write the shard with the id 7.
        if name.strip_prefix('@').is_some_and(|id| !id.is_empty() && id.bytes().all(|b| b.is_ascii_digit())) {
            return Err(Error::invalid(format!(
                "{name:?} means the shard with that id: choose another shard name"
            )));
        }
        if name == VIRTUAL_DIRECTORY {
            return Err(Error::invalid(format!(
                "{VIRTUAL_DIRECTORY:?} is reserved: choose another shard name"
            )));
        }
        Ok(ShardName(name))
    }

    /// Checks bytes, as the kernel gives them.
    pub fn from_bytes(name: &[u8]) -> Result<ShardName> {
        let text = std::str::from_utf8(name)
            .map_err(|_| Error::invalid(format!("shard name {}: not UTF-8", quoted(name))))?;
        ShardName::new(text)
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ShardName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ShardName({:?})", self.0)
    }
}

impl fmt::Display for ShardName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn check_component(name: &[u8]) -> Result<()> {
    if name.is_empty() {
        return Err(Error::invalid("the name is empty"));
    }
    if name.len() > NAME_BYTES_MAX {
        return Err(Error::new(
            Reason::NameTooLong,
            format!("a component has {} bytes; the limit is {NAME_BYTES_MAX}", name.len()),
        ));
    }
    if name == b"." || name == b".." {
        return Err(Error::invalid(format!("`{}` is not a name", String::from_utf8_lossy(name))));
    }
    if name.iter().any(|b| matches!(b, 0 | b'/')) {
        return Err(Error::invalid(format!("name {}: `/` and NUL are not allowed", quoted(name))));
    }
    Ok(())
}

/// Bytes for people: quoted, what is not printable escaped, long ones cut.
pub fn quoted(bytes: &[u8]) -> String {
    const SHOWN_BYTES: usize = 200;
    let cut = &bytes[..bytes.len().min(SHOWN_BYTES)];
    let dots = if cut.len() < bytes.len() { "..." } else { "" };
    match std::str::from_utf8(cut) {
        Ok(text) => format!("{text:?}{dots}"),
        Err(_) => format!("\"{}\"{dots}", cut.escape_ascii()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_checked() {
        for good in ["a", "a/b", "a-b/..c/...", "\u{e4}/\u{1f600}", " "] {
            assert!(Key::new(good).is_ok(), "{good:?}");
        }
        for bad in ["", "/a", "a/", "a//b", "a/./b", "..", "a/..", "a\0b"] {
            assert_eq!(Key::new(bad).unwrap_err().reason(), Reason::InvalidArgument, "{bad:?}");
        }
        assert_eq!(Key::new("x".repeat(256)).unwrap_err().reason(), Reason::NameTooLong);
        assert_eq!(Key::new("x/".repeat(2048) + "y").unwrap_err().reason(), Reason::NameTooLong);
        assert!(Key::new("x/".repeat(2047) + "y").is_ok());
        assert!(Key::new(vec![0xff, b'/', 0xfe]).is_ok());
    }

    #[test]
    fn keys_split() {
        let (dirs, last) = Key::new("a/b/c").unwrap().split_last();
        assert_eq!(dirs, [FileName::new("a").unwrap(), FileName::new("b").unwrap()]);
        assert_eq!(last.as_bytes(), b"c");
    }

    #[test]
    fn shard_names_are_checked() {
        assert!(ShardName::new("photos 2026").is_ok());
        for bad in ["", ".", "..", "a/b", "a\nb", ".shardfs", "a\0"] {
            assert!(ShardName::new(bad).is_err(), "{bad:?}");
        }
        assert!(ShardName::from_bytes(&[0xff]).is_err());
    }
}
