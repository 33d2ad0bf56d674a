//! What is written and how it is recognised: bytes that no compressor makes smaller and that say where they belong.
//!
//! Every 4 KiB block starts with a stamp of 8 bytes made from the run's seed, the file, the block's number and its
//! generation; the rest is a part of a pool of random bytes. So a block that is stale, misplaced, torn at its
//! start or zeroed is recognised by 8 bytes ([`Content::check_stamps`], cheap enough for a timed pass), and
//! [`Content::check`] compares every byte. Blocks of one pool position are equal but for their stamp: dedup
//! would show, compression would not.

use anyhow::{Result, bail};

/// Bytes of a block.
pub const BLOCK_BYTES: usize = 4096;
/// Bytes of a stamp.
const STAMP_BYTES: usize = 8;
/// Blocks of the pool: 16 MiB, more than the window of the compressors that storage systems use.
const POOL_BLOCKS: usize = 4096;

/// The content of all files of one run.
pub struct Content {
    seed: u64,
    pool: Vec<u8>,
}

impl Content {
    /// From a seed.
    pub fn new(seed: u64) -> Content {
        let mut pool = vec![0; POOL_BLOCKS * BLOCK_BYTES];
        fastrand::Rng::with_seed(seed).fill(&mut pool);
        Content { seed, pool }
    }

    /// Fills `buffer` with what stands at block `first` and behind of a file; the last block may be a part of one.
    pub fn fill(&self, buffer: &mut [u8], file: u64, first: u64, generation: u32) {
        for (number, block) in (first..).zip(buffer.chunks_mut(BLOCK_BYTES)) {
            let from = self.pool_offset(file, number);
            block.copy_from_slice(&self.pool[from..from + block.len()]);
            let stamp = self.stamp(file, number, generation);
            let length = block.len().min(STAMP_BYTES);
            block[..length].copy_from_slice(&stamp[..length]);
        }
    }

    /// Checks the stamps of what was read from block `first` on.
    pub fn check_stamps(&self, got: &[u8], file: u64, first: u64, generation: u32) -> Result<()> {
        for (number, block) in (first..).zip(got.chunks(BLOCK_BYTES)) {
            let length = block.len().min(STAMP_BYTES);
            if block[..length] != self.stamp(file, number, generation)[..length] {
                bail!(self.mismatch(block, file, number, generation));
            }
        }
        Ok(())
    }

    /// Checks every byte of what was read from block `first` on.
    pub fn check(&self, got: &[u8], file: u64, first: u64, generation: u32) -> Result<()> {
        self.check_stamps(got, file, first, generation)?;
        for (number, block) in (first..).zip(got.chunks(BLOCK_BYTES)) {
            let from = self.pool_offset(file, number);
            let stamp = block.len().min(STAMP_BYTES);
            if block[stamp..] != self.pool[from + stamp..from + block.len()] {
                bail!(self.mismatch(block, file, number, generation));
            }
        }
        Ok(())
    }

    fn pool_offset(&self, file: u64, number: u64) -> usize {
        (file.wrapping_mul(97).wrapping_add(number) % POOL_BLOCKS as u64) as usize * BLOCK_BYTES
    }

    fn stamp(&self, file: u64, number: u64, generation: u32) -> [u8; STAMP_BYTES] {
        let mixed = mix(self.seed ^ mix(file ^ mix(number ^ mix(u64::from(generation)))));
        mixed.to_le_bytes()
    }

    fn mismatch(&self, block: &[u8], file: u64, number: u64, generation: u32) -> String {
        let mut want = vec![0; block.len()];
        self.fill(&mut want, file, number, generation);
        let at = want.iter().zip(block).position(|(a, b)| a != b).unwrap_or(0);
        let what = if block.iter().all(|b| *b == 0) {
            "only zeros".to_owned()
        } else if (0..generation)
            .any(|old| self.stamp(file, number, old)[..] == block[..STAMP_BYTES.min(block.len())])
        {
            "an older generation".to_owned()
        } else {
            let zeros = block[at..].iter().take_while(|b| **b == 0).count();
            format!("other bytes ({zeros} zeros from there)")
        };
        let offset = number * BLOCK_BYTES as u64 + at as u64;
        format!(
            "WRONG CONTENT: file {file}, offset {offset}: read {what} where this run wrote its data \
             (block {number}, generation {generation}, seed {})",
            self.seed
        )
    }
}

/// splitmix64's finaliser: every bit of the input reaches every bit of the output.
pub fn mix(value: u64) -> u64 {
    let z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_recognised() {
        let content = Content::new(7);
        for size in [1, 7, 8, 9, 4096, 4097, 3 * 4096 + 100] {
            let mut data = vec![0; size];
            content.fill(&mut data, 3, 5, 1);
            content.check(&data, 3, 5, 1).unwrap();
        }
    }

    #[test]
    fn what_is_wrong_is_found_and_named() {
        let content = Content::new(7);
        let mut data = vec![0; 4 * BLOCK_BYTES];
        content.fill(&mut data, 3, 0, 1);
        for (file, first, generation) in [(4, 0, 1), (3, 1, 1), (3, 0, 0), (3, 0, 2)] {
            assert!(content.check_stamps(&data, file, first, generation).is_err());
        }
        assert!(Content::new(8).check_stamps(&data, 3, 0, 1).is_err());
        let old = content.check(&data, 3, 0, 2).unwrap_err().to_string();
        assert!(old.contains("an older generation"), "{old}");

        let mut flipped = data.clone();
        flipped[2 * BLOCK_BYTES + 1000] ^= 1;
        content.check_stamps(&flipped, 3, 0, 1).unwrap();
        let error = content.check(&flipped, 3, 0, 1).unwrap_err().to_string();
        assert!(error.contains(&format!("offset {}", 2 * BLOCK_BYTES + 1000)), "{error}");

        data[BLOCK_BYTES..2 * BLOCK_BYTES].fill(0);
        let error = content.check_stamps(&data, 3, 0, 1).unwrap_err().to_string();
        assert!(error.contains("only zeros") && error.contains("offset 4096"), "{error}");
    }

    #[test]
    fn blocks_differ() {
        let content = Content::new(1);
        let mut seen = std::collections::HashSet::new();
        for file in 0..4 {
            for number in 0..5_000 {
                let mut data = [0; 16];
                content.fill(&mut data, file, number, 0);
                assert!(seen.insert(data[..8].to_vec()), "file {file} block {number} has another's stamp");
            }
        }
    }
}
