//! The chunks of contents, as a group has changed them so far.

use std::collections::HashSet;
use std::collections::btree_map::Entry;
use std::ops::{Bound, ControlFlow};

use bytes::Bytes;
use shardfs_proto::types::Result;

use super::{Layer, Txn};
use crate::shard::chunk;
use crate::shard::keys::{self, Cf, ContentId};
use crate::shard::records::{Content, InodeRecord};
use crate::shard::store::Change;

/// Chunks that are deleted one by one; more become one range deletion, which costs every later scan.
pub const POINT_DELETES_MAX: u32 = 256;

/// What one layer knows of a chunk.
enum Known {
    There,
    Gone,
    /// Ask the layer below.
    Below,
}

impl Txn<'_> {
    fn known_chunk(layer: &Layer, key: &[u8]) -> Known {
        match layer.changes[Cf::Chunk.position()].get(key) {
            Some(Change::Put(_) | Change::Patch(_)) => Known::There,
            Some(Change::Delete) => Known::Gone,
            None if layer.covers(key) => Known::Gone,
            None => Known::Below,
        }
    }

    /// Whether a chunk is there.
    pub fn chunk_exists(&self, content: ContentId, number: u32) -> Result<bool> {
        let key = keys::chunk(content, number);
        for layer in self.layers.iter().rev() {
            match Self::known_chunk(layer, &key) {
                Known::There => return Ok(true),
                Known::Gone => return Ok(false),
                Known::Below => {}
            }
        }
        self.store.contains(Cf::Chunk, &key)
    }

    /// The bytes of a chunk as they are now.
    pub fn chunk(&self, content: ContentId, number: u32) -> Result<Option<Bytes>> {
        let key = keys::chunk(content, number);
        let mut patches: Vec<&[Bytes]> = Vec::new();
        // What the patches lie on: the outer `None` is "ask the store".
        let mut below: Option<Option<Bytes>> = None;
        for layer in self.layers.iter().rev() {
            match layer.changes[Cf::Chunk.position()].get(&key[..]) {
                Some(Change::Put(value)) => below = Some(Some(value.clone())),
                Some(Change::Delete) => below = Some(None),
                Some(Change::Patch(more)) => patches.push(more),
                None if layer.covers(&key) => below = Some(None),
                None => {}
            }
            if below.is_some() {
                break;
            }
        }
        let base = match below {
            Some(base) => base,
            None => self.store.get(Cf::Chunk, &key)?,
        };
        if patches.is_empty() {
            return Ok(base);
        }
        let patches = patches.into_iter().rev().flatten().map(|patch| &patch[..]);
        let folded = chunk::apply_patches(base.as_deref(), patches);
        Ok(Some(folded.expect("patches made here are well formed").into()))
    }

    /// Sets a whole chunk.
    pub fn put_chunk(&mut self, content: ContentId, number: u32, value: Bytes) {
        debug_assert!(value.len() <= self.chunk_bytes as usize);
        let key = Bytes::copy_from_slice(&keys::chunk(content, number));
        self.top().changes[Cf::Chunk.position()].insert(key, Change::Put(value));
    }

    /// Patches a chunk; one that is not there begins empty.
    pub fn patch_chunk(&mut self, content: ContentId, number: u32, patch: Bytes) {
        let key = Bytes::copy_from_slice(&keys::chunk(content, number));
        self.fold_patches(key, vec![patch]);
    }

    /// Puts patches on what the top layer knows of a chunk.
    pub(super) fn fold_patches(&mut self, key: Bytes, patches: Vec<Bytes>) {
        let layer = self.top();
        let covered = layer.covers(&key);
        let slot = layer.changes[Cf::Chunk.position()].entry(key);
        let apply = |base: &[u8], patches: &[Bytes]| {
            let folded = chunk::apply_patches(Some(base), patches.iter().map(|p| &p[..]));
            Change::Put(folded.expect("patches made here are well formed").into())
        };
        match slot {
            Entry::Vacant(slot) => {
                slot.insert(if covered { apply(&[], &patches) } else { Change::Patch(patches) });
            }
            Entry::Occupied(mut slot) => match slot.get_mut() {
                Change::Put(base) => {
                    let folded = apply(base, &patches);
                    slot.insert(folded);
                }
                Change::Delete => {
                    slot.insert(apply(&[], &patches));
                }
                Change::Patch(before) => before.extend(patches),
            },
        }
    }

    /// Removes the chunks from `from` up to `to` (exclusive), as many as are there.
    pub fn delete_chunks(&mut self, content: ContentId, from: u32, to: u32) {
        if to.saturating_sub(from) > POINT_DELETES_MAX {
            self.top().delete_range(keys::chunk(content, from), keys::chunk(content, to));
            return;
        }
        let layer = self.top();
        for number in from..to {
            let key = Bytes::copy_from_slice(&keys::chunk(content, number));
            layer.changes[Cf::Chunk.position()].insert(key, Change::Delete);
        }
    }

    /// How many of the chunks from `from` up to `to` (exclusive) are there.
    pub fn count_chunks(&self, content: ContentId, from: u32, to: u32) -> Result<u64> {
        let mut there = 0;
        self.visit_chunks(content, from, to, &mut |_| there += 1)?;
        Ok(there)
    }

    /// Which of the chunks from `from` up to `to` (exclusive) are there.
    pub fn chunks_there(&self, content: ContentId, from: u32, to: u32) -> Result<HashSet<u32>> {
        let mut there = HashSet::new();
        self.visit_chunks(content, from, to, &mut |number| {
            there.insert(number);
        })?;
        Ok(there)
    }

    /// Visits the numbers of the chunks from `from` up to `to` (exclusive) that are there, in no order.
    fn visit_chunks(&self, content: ContentId, from: u32, to: u32, visit: &mut dyn FnMut(u32)) -> Result<()> {
        let (first, last) = (keys::chunk(content, from), keys::chunk(content, to));
        let mut decided: HashSet<Bytes> = HashSet::new();
        for layer in self.layers.iter().rev() {
            let range = (Bound::Included(&first[..]), Bound::Excluded(&last[..]));
            for (key, change) in layer.changes[Cf::Chunk.position()].range::<[u8], _>(range) {
                if decided.insert(key.clone())
                    && !matches!(change, Change::Delete)
                    && !self.covered_above(layer, key)
                {
                    visit(keys::parse_chunk(key)?.1);
                }
            }
        }
        self.store.scan_keys(Cf::Chunk, &first, Some(&last), &mut |key, _| {
            if !decided.contains(key) && !self.layers.iter().any(|layer| layer.covers(key)) {
                visit(keys::parse_chunk(key)?.1);
            }
            Ok(ControlFlow::Continue(()))
        })
    }

    /// Whether a layer above `layer` deletes the range that a key lies in.
    fn covered_above(&self, layer: &Layer, key: &[u8]) -> bool {
        self.layers
            .iter()
            .rev()
            .take_while(|above| !std::ptr::eq(*above, layer))
            .any(|above| above.covers(key))
    }

    /// Removes the chunks of a content.
    pub fn delete_content(&mut self, content: &Content, size: u64) {
        if let Content::Chunks { id, count } = content
            && *count > 0
        {
            let chunks = InodeRecord::dense_chunks(size, self.chunk_bytes);
            self.delete_chunks(*id, 0, u32::try_from(chunks).unwrap_or(u32::MAX));
        }
    }
}
