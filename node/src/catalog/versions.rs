//! What is refused while a node that would misread it may come to serve the volume: one of a minor version before.
//!
//! A node says its version when it starts. One that is put back to an earlier version later finds records of a format that it does not
//! know, where that matters, and leaves them alone (`records`, "format").

use shardfs_proto::types::{Error, NodeId, Reason, Result, VolumeId};

use super::Catalog;

/// Major and minor version.
type Minor = (u64, u64);

/// Since then shards have snapshots and copies, and a volume that leaves keeps its nodes until it is known to be empty.
const COPIES: Minor = (0, 2);

impl Catalog {
    /// Fails unless all nodes of a volume know what shards' copies are, and that a volume which leaves may stay after all. `what` is not
    /// done otherwise.
    pub(super) fn check_versions(&self, volume: &VolumeId, what: &str) -> Result<()> {
        let Some(kept) = self.parts.view.volume(volume) else { return Ok(()) };
        self.check_versions_of(kept.record.primary.iter().chain(&kept.record.backups), what)
    }

    /// The same of nodes that are to have a volume.
    pub(super) fn check_versions_of<'a>(
        &self,
        nodes: impl IntoIterator<Item = &'a NodeId>,
        what: &str,
    ) -> Result<()> {
        for node in nodes {
            // One that was never there says its version before it serves anything.
            let Some(kept) = self.parts.view.node(node) else { continue };
            let version = &kept.record.version;
            if minor_of(version).is_some_and(|minor| minor < COPIES) {
                let (major, minor) = COPIES;
                return Err(Error::new(
                    Reason::Unsupported,
                    format!(
                        "{what}: node {node} has version {version}, and may serve the volume: update it to {major}.{minor} first, or detach it"
                    ),
                ));
            }
        }
        Ok(())
    }
}

/// `None`: it is not written as versions are, and may be anything.
fn minor_of(version: &str) -> Option<Minor> {
    let mut numbers = version.split('.');
    let mut number = || numbers.next()?.parse().ok();
    Some((number()?, number()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_number() {
        assert_eq!(minor_of("0.1.0"), Some((0, 1)));
        assert_eq!(minor_of("0.10.3-rc.1"), Some((0, 10)));
        assert!(minor_of("0.10.0") > minor_of("0.9.9") && minor_of("1.0.0") > Some(COPIES));
        assert_eq!(minor_of(env!("CARGO_PKG_VERSION")).map(|own| own >= COPIES), Some(true));
        for odd in ["", "1", "x.1", "0.x"] {
            assert_eq!(minor_of(odd), None, "{odd:?}");
        }
    }
}
