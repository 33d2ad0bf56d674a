//! Pulls the entries of a family in key order, a page at a time, so that several can be merged.

use std::collections::VecDeque;
use std::ops::ControlFlow;

use bytes::Bytes;
use shardfs_proto::types::{Error, Result};

use crate::shard::keys::Cf;
use crate::shard::store::Reader;
use crate::shard::view::ReadView;

/// Entries of a page.
const PAGE_ENTRIES: usize = 512;
/// Bytes of values after which a page ends.
const PAGE_BYTES: usize = 1 << 20;

/// One entry.
pub(super) struct Entry {
    pub(super) key: Vec<u8>,
    /// Empty when only keys are read.
    pub(super) value: Bytes,
}

/// A place in a family.
pub(super) struct Cursor<'a> {
    view: &'a ReadView,
    cf: Cf,
    keys_only: bool,
    page: VecDeque<Entry>,
    next: Option<Vec<u8>>,
    to: Option<Vec<u8>>,
    /// Why it ended early.
    pub(super) failed: Option<Error>,
}

impl<'a> Cursor<'a> {
    /// Over a whole family.
    pub(super) fn new(view: &'a ReadView, cf: Cf) -> Cursor<'a> {
        Cursor::range(view, cf, false, Vec::new(), None)
    }

    /// From `from` (inclusive) to `to` (exclusive).
    pub(super) fn range(
        view: &'a ReadView,
        cf: Cf,
        keys_only: bool,
        from: Vec<u8>,
        to: Option<Vec<u8>>,
    ) -> Cursor<'a> {
        Cursor { view, cf, keys_only, page: VecDeque::new(), next: Some(from), to, failed: None }
    }

    /// The next entry, left in place.
    pub(super) fn peek(&mut self) -> Option<&Entry> {
        if self.page.is_empty()
            && self.failed.is_none()
            && let Err(error) = self.fill()
        {
            // What was read before the error is good.
            self.failed = Some(error.context(format!("family {}", self.cf.name())));
            self.next = None;
        }
        self.page.front()
    }

    /// Takes the next entry.
    pub(super) fn pop(&mut self) -> Option<Entry> {
        self.peek()?;
        self.page.pop_front()
    }

    fn fill(&mut self) -> Result<()> {
        let Some(from) = self.next.take() else { return Ok(()) };
        let mut bytes = 0;
        let page = &mut self.page;
        let mut more = false;
        let mut visit = |key: &[u8], value: &[u8]| {
            bytes += key.len() + value.len();
            page.push_back(Entry { key: key.to_vec(), value: Bytes::copy_from_slice(value) });
            if page.len() >= PAGE_ENTRIES || bytes >= PAGE_BYTES {
                more = true;
                return Ok(ControlFlow::Break(()));
            }
            Ok(ControlFlow::Continue(()))
        };
        match self.keys_only {
            true => self.view.scan_keys(self.cf, &from, self.to.as_deref(), &mut visit)?,
            false => self.view.scan(self.cf, &from, self.to.as_deref(), &mut visit)?,
        }
        if more {
            let mut next = self.page.back().map_or_else(Vec::new, |last| last.key.clone());
            next.push(0);
            self.next = Some(next);
        }
        Ok(())
    }
}
