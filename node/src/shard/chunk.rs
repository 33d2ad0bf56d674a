//! The bytes of a chunk: values and patches, and how patches fold (the merge operator).
//!
//! A chunk is a value of at most the shard's chunk size; what it lacks to that reads as zeros. A small
//! write into it is a patch, a merge operand, so that writing 4 KiB never rewrites 64 KiB; stores fold
//! patches when they read and when they compact.
//!
//! A patch is one or more of these, applied first to last; so two patches joined are a patch:
//!
//! | bytes | field |
//! |---|---|
//! | 1 | 1 = write, 2 = cut, 3 = zero |
//! | 4 | write, zero: offset in the chunk; cut: the length to cut to |
//! | 4 | write, zero: length |
//! | n | write: the bytes |
//!
//! Invariants: folding is associative; a malformed patch is an error of the read, never a panic; no
//! patch makes a chunk longer than [`CHUNK_BYTES_LIMIT`].
//!
//! Must not: know inodes, content ids or stores.

use bytes::{Bytes, BytesMut};

/// Bytes of a chunk in a new shard. Measured figures: BENCHMARKS.md. Small enough that a random write
/// costs little to fold, large enough that 16 TiB need 2^28 keys.
pub const CHUNK_BYTES: u32 = 64 << 10;
/// Bytes that no chunk of any shard exceeds; a patch that says so is malformed.
pub const CHUNK_BYTES_LIMIT: u32 = 16 << 20;
/// Bytes of joined patches above which a store keeps them apart: a patch is never much larger than the
/// chunk that it would be folded into.
pub const JOINED_PATCH_BYTES_MAX: usize = 4 * CHUNK_BYTES as usize;

const WRITE: u8 = 1;
const CUT: u8 = 2;
const ZERO: u8 = 3;

/// Writes `data` at `offset`; the caller has checked that it lies within the chunk.
pub fn write_patch(offset: u32, data: &[u8]) -> Bytes {
    let length = u32::try_from(data.len()).expect("a patch is no longer than a chunk");
    let mut patch = BytesMut::with_capacity(9 + data.len());
    patch.extend_from_slice(&head(WRITE, offset, length));
    patch.extend_from_slice(data);
    patch.freeze()
}

/// Removes what lies at and after `length`.
pub fn cut_patch(length: u32) -> Bytes {
    let mut patch = BytesMut::with_capacity(5);
    patch.extend_from_slice(&[CUT]);
    patch.extend_from_slice(&length.to_be_bytes());
    patch.freeze()
}

/// Makes `length` bytes from `offset` zeros.
pub fn zero_patch(offset: u32, length: u32) -> Bytes {
    Bytes::copy_from_slice(&head(ZERO, offset, length))
}

fn head(tag: u8, offset: u32, length: u32) -> [u8; 9] {
    let mut bytes = [tag; 9];
    bytes[1..5].copy_from_slice(&offset.to_be_bytes());
    bytes[5..].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// A chunk with patches applied; `None`: one of them is malformed.
pub fn apply_patches<'a>(
    base: Option<&[u8]>,
    patches: impl IntoIterator<Item = &'a [u8]>,
) -> Option<Vec<u8>> {
    let mut chunk = base.map(<[u8]>::to_vec).unwrap_or_default();
    for mut patch in patches {
        while !patch.is_empty() {
            patch = apply_one(&mut chunk, patch)?;
        }
    }
    Some(chunk)
}

/// Applies the first part of a patch and returns what follows it.
fn apply_one<'a>(chunk: &mut Vec<u8>, patch: &'a [u8]) -> Option<&'a [u8]> {
    let (tag, rest) = patch.split_first()?;
    let (first, rest) = take_u32(rest)?;
    if *tag == CUT {
        chunk.truncate(first as usize);
        return Some(rest);
    }
    let (length, rest) = take_u32(rest)?;
    let end = first.checked_add(length).filter(|end| *end <= CHUNK_BYTES_LIMIT)? as usize;
    let (first, length) = (first as usize, length as usize);
    match *tag {
        WRITE => {
            let (data, rest) = rest.split_at_checked(length)?;
            if chunk.len() < end {
                chunk.resize(end, 0);
            }
            chunk[first..end].copy_from_slice(data);
            Some(rest)
        }
        ZERO => {
            // What lies past the end is zeros already.
            let end = end.min(chunk.len());
            if first < end {
                chunk[first..end].fill(0);
            }
            Some(rest)
        }
        _ => None,
    }
}

fn take_u32(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (number, rest) = bytes.split_first_chunk::<4>()?;
    Some((u32::from_be_bytes(*number), rest))
}

/// Several patches as one; `None`: too long to be worth it.
pub fn join_patches<'a>(patches: impl Iterator<Item = &'a [u8]>) -> Option<Vec<u8>> {
    let mut joined = Vec::new();
    for patch in patches {
        if joined.len() + patch.len() > JOINED_PATCH_BYTES_MAX {
            return None;
        }
        joined.extend_from_slice(patch);
    }
    Some(joined)
}

/// The part of a byte range that lies in one chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// The chunk's number.
    pub number: u32,
    /// Where in the chunk the part begins.
    pub start: u32,
    /// Its length.
    pub length: u32,
    /// Where in the range it begins.
    pub at: u64,
}

/// Cuts the byte range at `offset` of `length` bytes into parts by chunk. The range must lie below
/// FILE_BYTES_MAX (`limits`), so that chunk numbers fit.
pub fn pieces(offset: u64, length: u64, chunk_bytes: u32) -> impl Iterator<Item = Piece> {
    let size = u64::from(chunk_bytes);
    let end = offset + length;
    let mut at = offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let number = u32::try_from(at / size).expect("a file has fewer than 2^32 chunks");
        let stop = end.min((at / size + 1) * size);
        let piece = Piece { number, start: (at % size) as u32, length: (stop - at) as u32, at: at - offset };
        at = stop;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_are_the_golden_bytes() {
        assert_eq!(&write_patch(258, b"xy")[..], b"\x01\0\0\x01\x02\0\0\0\x02xy");
        assert_eq!(&cut_patch(7)[..], b"\x02\0\0\0\x07");
        assert_eq!(&zero_patch(1, 2)[..], b"\x03\0\0\0\x01\0\0\0\x02");
    }

    #[test]
    fn malformed_patches_are_refused() {
        let too_far = write_patch(CHUNK_BYTES_LIMIT, b"x");
        for patch in [&b"\0"[..], b"\x04\0\0\0\0\0\0\0\0", b"\x01\0\0\0\0\0\0\0\x02x", b"\x02\0", &too_far] {
            assert_eq!(apply_patches(None, [patch]), None, "{patch:?}");
        }
    }

    #[test]
    fn folding_matches_a_plain_array_and_is_associative() {
        let seed = fastrand::u64(..);
        let mut rng = fastrand::Rng::with_seed(seed);
        for round in 0..500 {
            let mut model = vec![0u8; 256];
            let mut patches: Vec<Bytes> = Vec::new();
            for _ in 0..rng.usize(1..12) {
                let start = rng.usize(..256);
                let length = rng.usize(..=256 - start);
                match rng.u8(..3) {
                    0 => {
                        let data: Vec<u8> = (0..length).map(|_| rng.u8(1..)).collect();
                        model[start..start + length].copy_from_slice(&data);
                        patches.push(write_patch(start as u32, &data));
                    }
                    1 => {
                        model[start..start + length].fill(0);
                        patches.push(zero_patch(start as u32, length as u32));
                    }
                    _ => {
                        model[start..].fill(0);
                        patches.push(cut_patch(start as u32));
                    }
                }
            }
            let whole = apply_patches(None, patches.iter().map(|p| &p[..])).unwrap();
            let mut padded = whole.clone();
            padded.resize(256, 0);
            assert_eq!(padded, model, "seed {seed} round {round}");
            let split = rng.usize(..=patches.len());
            let joined = join_patches(patches[split..].iter().map(|p| &p[..])).unwrap();
            let base = apply_patches(None, patches[..split].iter().map(|p| &p[..])).unwrap();
            assert_eq!(
                apply_patches(Some(&base), [&joined[..]]).unwrap(),
                whole,
                "seed {seed} round {round}"
            );
        }
    }

    #[test]
    fn ranges_are_cut_at_chunks() {
        let all: Vec<Piece> = pieces(10, 20, 16).collect();
        assert_eq!(
            all,
            [
                Piece { number: 0, start: 10, length: 6, at: 0 },
                Piece { number: 1, start: 0, length: 14, at: 6 },
            ]
        );
        assert_eq!(pieces(16, 0, 16).count(), 0);
    }
}
