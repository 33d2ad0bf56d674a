//! The bytes under the records: big-endian integers, length-prefixed strings, checked reads.
//!
//! Must not: know any record.

use bytes::{Bytes, BytesMut};
use shardfs_proto::types::{Error, FileKind, InodeNo, Result, Timestamp};

/// Writes a record.
pub(super) struct Encoder(BytesMut);

impl Encoder {
    pub(super) fn new(format: u8, capacity: usize) -> Encoder {
        let mut buffer = BytesMut::with_capacity(capacity);
        buffer.extend_from_slice(&[format]);
        Encoder(buffer)
    }

    pub(super) fn u8(&mut self, n: u8) {
        self.0.extend_from_slice(&[n]);
    }

    pub(super) fn u16(&mut self, n: u16) {
        self.0.extend_from_slice(&n.to_be_bytes());
    }

    pub(super) fn u32(&mut self, n: u32) {
        self.0.extend_from_slice(&n.to_be_bytes());
    }

    pub(super) fn u64(&mut self, n: u64) {
        self.0.extend_from_slice(&n.to_be_bytes());
    }

    pub(super) fn i64(&mut self, n: i64) {
        self.0.extend_from_slice(&n.to_be_bytes());
    }

    pub(super) fn time(&mut self, time: Timestamp) {
        self.i64(time.seconds());
        self.u32(time.nanos());
    }

    pub(super) fn raw(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// With its length in one byte. Callers have bounded it.
    pub(super) fn short(&mut self, bytes: &[u8]) {
        self.u8(u8::try_from(bytes.len()).expect("a short string has at most 255 bytes"));
        self.raw(bytes);
    }

    /// With its length in four bytes. Callers have bounded it.
    pub(super) fn long(&mut self, bytes: &[u8]) {
        self.u32(u32::try_from(bytes.len()).expect("a string in a record has less than 4 GiB"));
        self.raw(bytes);
    }

    pub(super) fn finish(self) -> Bytes {
        self.0.freeze()
    }
}

/// Reads a record, checking every length.
pub(super) struct Decoder<'a> {
    what: &'static str,
    value: &'a [u8],
    at: usize,
}

impl<'a> Decoder<'a> {
    /// Begins; the first byte must be `format`.
    pub(super) fn new(what: &'static str, value: &'a [u8], format: u8) -> Result<Decoder<'a>> {
        let mut d = Decoder { what, value, at: 0 };
        match d.u8()? {
            found if found == format => Ok(d),
            0 => Err(d.bad("format 0")),
            found => Err(Error::corrupt(format!(
                "{what} record has format {found}; this version of ShardFS knows up to {format}"
            ))),
        }
    }

    pub(super) fn bad(&self, why: &str) -> Error {
        Error::corrupt(format!(
            "{} record of {} bytes: {why} at byte {}",
            self.what,
            self.value.len(),
            self.at
        ))
    }

    /// Where the next read begins.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    pub(super) fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(length).filter(|end| *end <= self.value.len());
        let Some(end) = end else { return Err(self.bad("cut short")) };
        let bytes = &self.value[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    pub(super) fn u8(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    pub(super) fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    pub(super) fn i64(&mut self) -> Result<i64> {
        Ok(i64::from_be_bytes(self.array()?))
    }

    pub(super) fn time(&mut self) -> Result<Timestamp> {
        let (seconds, nanos) = (self.i64()?, self.u32()?);
        Timestamp::new(seconds, nanos).map_err(|_| self.bad("a time's nanoseconds"))
    }

    pub(super) fn inode(&mut self) -> Result<InodeNo> {
        let number = self.u64()?;
        InodeNo::new(number).map_err(|_| self.bad("an inode number"))
    }

    pub(super) fn kind(&mut self) -> Result<FileKind> {
        let kind = self.u8()?;
        kind_from_u8(kind).ok_or_else(|| self.bad("a kind"))
    }

    pub(super) fn short(&mut self) -> Result<&'a [u8]> {
        let length = self.u8()?;
        self.take(usize::from(length))
    }

    pub(super) fn long(&mut self) -> Result<&'a [u8]> {
        let length = self.u32()?;
        self.take(length as usize)
    }

    pub(super) fn text(&mut self, bytes: &'a [u8]) -> Result<&'a str> {
        std::str::from_utf8(bytes).map_err(|_| self.bad("text that is not UTF-8"))
    }

    pub(super) fn rest(&mut self) -> &'a [u8] {
        let rest = &self.value[self.at..];
        self.at = self.value.len();
        rest
    }

    pub(super) fn finish(self) -> Result<()> {
        if self.at != self.value.len() {
            return Err(self.bad("bytes after the end"));
        }
        Ok(())
    }
}

pub(in crate::shard) fn kind_to_u8(kind: FileKind) -> u8 {
    match kind {
        FileKind::Regular => 1,
        FileKind::Directory => 2,
        FileKind::Symlink => 3,
        FileKind::Fifo => 4,
        FileKind::Socket => 5,
        FileKind::CharDevice => 6,
        FileKind::BlockDevice => 7,
    }
}

pub(super) fn kind_from_u8(kind: u8) -> Option<FileKind> {
    Some(match kind {
        1 => FileKind::Regular,
        2 => FileKind::Directory,
        3 => FileKind::Symlink,
        4 => FileKind::Fifo,
        5 => FileKind::Socket,
        6 => FileKind::CharDevice,
        7 => FileKind::BlockDevice,
        _ => return None,
    })
}
