//! Looks through a closed database's logs for damage, before RocksDB replays them; and takes off its manifest what a crash
//! left at the end.
//!
//! Replay stops at the first record that is not whole and takes the rest for what a crash cut off. That is right
//! for a torn end, and silently loses what was synced if the record was damaged later. The two can be told
//! apart: what a crash leaves ends in the file's end or, after a loss of power, in pages that were never
//! written, which read as zeros. A record that is damaged otherwise, with whole records after it, is damage.
//!
//! A manifest has the same format. RocksDB takes an end that reads as zeros for damage there, although it has never counted on an
//! entry that it did not sync: ext4 may write a file's new size before the bytes that an append put into a block that was
//! there. So that end is cut off.
//!
//! The format is RocksDB's, and LevelDB's before it: blocks of 32 KiB; records of a checksum (CRC-32C, masked, over
//! type and payload), a length and a type; what does not fit a block goes on in the next.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use shardfs_proto::types::{Error, Result};

const BLOCK_BYTES: usize = 32 << 10;
const HEADER_BYTES: usize = 7;
/// What an unwritten part of a file is made of.
const PAGE_BYTES: usize = 4 << 10;
/// Types with a log number after the header, for recycled logs.
const RECYCLABLE: [u8; 6] = [5, 6, 7, 8, 11, 131];
const PLAIN: [u8; 7] = [1, 2, 3, 4, 9, 10, 130];
/// Types of records that the next one goes on.
const FIRST: u8 = 2;
const MIDDLE: u8 = 3;
const RECYCLABLE_FIRST: u8 = 6;
const RECYCLABLE_MIDDLE: u8 = 7;
const CRC_MASK: u32 = 0xa282_ead8;

/// Fails with CORRUPT if a log of the database is damaged within.
pub fn check_logs(dir: &Path) -> Result<()> {
    let failed = |what: &Path, e: std::io::Error| Error::io(format!("reading {}: {e}", what.display()));
    let mut logs: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|e| failed(dir, e))? {
        let path = entry.map_err(|e| failed(dir, e))?.path();
        if path.extension().is_some_and(|extension| extension == "log") {
            logs.push(path);
        }
    }
    logs.sort();
    for path in logs {
        let mut content = Vec::new();
        File::open(&path).and_then(|mut file| file.read_to_end(&mut content)).map_err(|e| {
            match e.kind() {
                // It was there a moment ago, and nobody else deletes it: the volume is being taken away from this node.
                ErrorKind::NotFound => Error::unavailable(format!(
                    "{} has gone while it was read: its volume is on its way",
                    path.display()
                )),
                _ => failed(&path, e),
            }
        })?;
        if let Some(at) = damage(&content) {
            return Err(Error::corrupt(format!(
                "log {} is damaged at byte {at}, and whole records follow: it was not replayed, so that they are not \
                 lost. Restore the file from a copy; or, to give up all from there on: truncate -s {at} {}",
                path.display(),
                path.display()
            )));
        }
    }
    Ok(())
}

/// Cuts an entry that a crash left half-written off the end of the database's manifest. What is damaged otherwise stays, for
/// RocksDB to refuse.
pub fn cut_manifest(dir: &Path) -> Result<()> {
    let failed = |what: &Path, e: std::io::Error| Error::io(format!("reading {}: {e}", what.display()));
    let current = dir.join("CURRENT");
    let name = match std::fs::read_to_string(&current) {
        Ok(name) => name,
        // It is RocksDB's to say what that means.
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::InvalidData) => return Ok(()),
        Err(e) => return Err(failed(&current, e)),
    };
    let Some(name) =
        name.strip_suffix('\n').filter(|name| name.starts_with("MANIFEST-") && !name.contains('/'))
    else {
        return Ok(());
    };
    let path = dir.join(name);
    let content = match std::fs::read(&path) {
        Ok(content) => content,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed(&path, e)),
    };
    let Some(end) = torn_end(&content) else { return Ok(()) };
    tracing::warn!(manifest = %path.display(), from = end, bytes = content.len() - end,
        "cutting off what a crash left half-written");
    File::options()
        .write(true)
        .open(&path)
        .and_then(|file| {
            file.set_len(end as u64)?;
            file.sync_all()
        })
        .map_err(|e| Error::io(format!("cutting {}: {e}", path.display())))
}

/// Where the last whole entry ends, if what follows is what a crash leaves, and there are entries.
fn torn_end(manifest: &[u8]) -> Option<usize> {
    let (mut at, mut whole) = (0, 0);
    while at < manifest.len() {
        let left = BLOCK_BYTES - at % BLOCK_BYTES;
        if left < HEADER_BYTES {
            at += left;
            continue;
        }
        let Some(length) = record_at(manifest, at) else { break };
        let ends =
            !matches!(manifest[at + HEADER_BYTES - 1], FIRST | MIDDLE | RECYCLABLE_FIRST | RECYCLABLE_MIDDLE);
        at += length;
        if ends {
            whole = at;
        }
    }
    let torn = at < manifest.len() && damage(manifest).is_none();
    // A bit that flipped in the last entry is damage: what has never been written are pages, or what is left of one.
    (torn && whole > 0 && has_unwritten_page(manifest, whole, manifest.len())).then_some(whole)
}

/// Where a log is damaged otherwise than a crash would.
fn damage(log: &[u8]) -> Option<usize> {
    let mut at = 0;
    while at < log.len() {
        let left = BLOCK_BYTES - at % BLOCK_BYTES;
        if left < HEADER_BYTES {
            at += left;
        } else if let Some(length) = record_at(log, at) {
            at += length;
        } else {
            let next = next_record(log, at)?;
            return (!has_unwritten_page(log, at, next)).then_some(at);
        }
    }
    None
}

/// The length, header included, of the whole record at a position.
fn record_at(log: &[u8], at: usize) -> Option<usize> {
    let block = &log[at..log.len().min(at - at % BLOCK_BYTES + BLOCK_BYTES)];
    let (header, rest) = block.split_at_checked(HEADER_BYTES)?;
    let [c0, c1, c2, c3, l0, l1, kind] = <[u8; HEADER_BYTES]>::try_from(header).ok()?;
    // The log number counts to the header, not to the length.
    let number_bytes = match kind {
        kind if PLAIN.contains(&kind) => 0,
        kind if RECYCLABLE.contains(&kind) => 4,
        _ => return None,
    };
    let length = usize::from(u16::from_le_bytes([l0, l1])) + number_bytes;
    let checked = rest.get(..length)?;
    let crc = crc32c::crc32c_append(crc32c::crc32c(&[kind]), checked);
    let masked = crc.rotate_right(15).wrapping_add(CRC_MASK);
    (masked == u32::from_le_bytes([c0, c1, c2, c3])).then_some(HEADER_BYTES + length)
}

/// The first whole record after the one at `at`, which is not whole: where its length says that the next begins,
/// or at the beginning of a later block.
fn next_record(log: &[u8], at: usize) -> Option<usize> {
    let block_end = at - at % BLOCK_BYTES + BLOCK_BYTES;
    let claimed = log.get(at + 4..at + 6).map(|l| usize::from(u16::from_le_bytes([l[0], l[1]])));
    let after = claimed
        .map(|length| at + HEADER_BYTES + length)
        .filter(|next| *next + HEADER_BYTES <= block_end.min(log.len()));
    after
        .into_iter()
        .chain((block_end..log.len()).step_by(BLOCK_BYTES))
        .find(|position| record_at(log, *position).is_some())
}

/// Whether the range touches a page of zeros only.
fn has_unwritten_page(log: &[u8], from: usize, to: usize) -> bool {
    let first = from - from % PAGE_BYTES;
    (first..to).step_by(PAGE_BYTES).any(|page| {
        let start = page.max(from);
        log[start..log.len().min(page + PAGE_BYTES)].iter().all(|byte| *byte == 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A log of records as RocksDB writes them.
    fn log(records: &[Vec<u8>]) -> Vec<u8> {
        let mut log = Vec::new();
        for record in records {
            let (mut rest, mut first) = (record.as_slice(), true);
            loop {
                let mut left = BLOCK_BYTES - log.len() % BLOCK_BYTES;
                if left < HEADER_BYTES {
                    log.resize(log.len() + left, 0);
                    left = BLOCK_BYTES;
                }
                let taken = rest.len().min(left - HEADER_BYTES);
                let last = taken == rest.len();
                let kind = match (first, last) {
                    (true, true) => 1,
                    (true, false) => 2,
                    (false, false) => 3,
                    (false, true) => 4,
                };
                let crc = crc32c::crc32c_append(crc32c::crc32c(&[kind]), &rest[..taken]);
                log.extend(crc.rotate_right(15).wrapping_add(CRC_MASK).to_le_bytes());
                log.extend((taken as u16).to_le_bytes());
                log.push(kind);
                log.extend_from_slice(&rest[..taken]);
                rest = &rest[taken..];
                first = false;
                if last {
                    break;
                }
            }
        }
        log
    }

    fn records() -> Vec<Vec<u8>> {
        let mut rng = fastrand::Rng::with_seed(7);
        (0..200).map(|_| (0..rng.usize(1..9000)).map(|_| rng.u8(1..)).collect()).collect()
    }

    #[test]
    fn whole_and_torn_logs_are_what_a_crash_leaves() {
        let whole = log(&records());
        assert_eq!(damage(&whole), None);
        assert_eq!(damage(&[]), None);
        let mut rng = fastrand::Rng::with_seed(8);
        for _ in 0..500 {
            let length = rng.usize(..whole.len());
            assert_eq!(damage(&whole[..length]), None, "torn at {length}");
            // Pages that were never written, with later ones written.
            let mut holes = whole[..length].to_vec();
            let page = rng.usize(..=length / PAGE_BYTES) * PAGE_BYTES;
            let end = length.min(page + PAGE_BYTES * rng.usize(1..4));
            holes[page..end].fill(0);
            assert_eq!(damage(&holes), None, "pages of {page}..{end} of {length} were not written");
        }
    }

    #[test]
    fn the_torn_end_of_a_manifest_is_found_and_nothing_else() {
        let records = records();
        let whole = log(&records);
        assert_eq!(torn_end(&whole), None);
        assert_eq!(torn_end(&[]), None);
        let ends: Vec<usize> = (1..=records.len()).map(|n| log(&records[..n]).len()).collect();
        let mut rng = fastrand::Rng::with_seed(10);
        for _ in 0..300 {
            // The last entry's bytes are not there from a page on, but its size is.
            let last = rng.usize(1..records.len());
            let (begin, end) = (ends[last - 1], ends[last]);
            let mut torn = whole[..end].to_vec();
            let page = (begin / PAGE_BYTES + rng.usize(0..4)) * PAGE_BYTES;
            let from = page.clamp(begin, end);
            torn[from..].fill(0);
            if torn == whole[..end] {
                continue;
            }
            assert_eq!(torn_end(&torn), Some(begin), "zeros from {from} in {begin}..{end}");
            // One bit of the last entry.
            let mut flipped = whole[..end].to_vec();
            flipped[rng.usize(end - 1 - (end - begin) / 2..end)] ^= 1;
            assert_eq!(torn_end(&flipped), None);
            // One bit of an entry before, with whole ones after it.
            let mut damaged = whole.clone();
            damaged[rng.usize(..ends[records.len() - 20])] ^= 1;
            if damage(&damaged).is_some() {
                assert_eq!(torn_end(&damaged), None);
            }
        }
        // Nothing is left of a manifest whose first entry is torn: that is not for us to judge.
        assert_eq!(torn_end(&vec![0; 5000]), None);
    }

    #[test]
    fn a_flipped_bit_with_records_after_it_is_damage() {
        let whole = log(&records());
        let mut rng = fastrand::Rng::with_seed(9);
        for _ in 0..500 {
            let mut damaged = whole.clone();
            let at = rng.usize(..whole.len() - 2 * BLOCK_BYTES);
            damaged[at] ^= 1 << rng.u8(..8);
            // The bytes that fill a block are no record's.
            if damage(&damaged).is_none() {
                assert!(BLOCK_BYTES - at % BLOCK_BYTES < HEADER_BYTES, "byte {at}");
            }
        }
    }

    #[test]
    fn a_log_that_goes_while_it_is_looked_at_is_no_damage() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("000001.log"), log(&[vec![1; 100]])).unwrap();
        // Listed, and not there.
        std::os::unix::fs::symlink("gone", dir.path().join("000002.log")).unwrap();
        let error = check_logs(dir.path()).unwrap_err();
        assert_eq!(error.reason(), shardfs_proto::types::Reason::Unavailable, "{error}");
    }
}
