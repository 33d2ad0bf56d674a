//! Reads from backups.

use std::time::Duration;

use crate::types::limits::STALENESS_DEFAULT;
use crate::types::{Error, NodeId, ReadFrom, Result, ViewFigures, ViewLabel};
use crate::wire;

/// Who may answer a read: preference and age in milliseconds.
pub fn read_from_to_wire(from: ReadFrom) -> (i32, u32) {
    match from {
        ReadFrom::Primary => (wire::ReadPreference::Primary.into(), 0),
        // 0 would mean the default.
        ReadFrom::Backup { max_staleness } => {
            (wire::ReadPreference::Backup.into(), milliseconds(max_staleness).max(1))
        }
    }
}

/// Who may answer a read.
pub fn read_from_from_wire(preference: i32, max_staleness_ms: u32) -> Result<ReadFrom> {
    match wire::ReadPreference::try_from(preference) {
        Ok(wire::ReadPreference::Unspecified | wire::ReadPreference::Primary) => Ok(ReadFrom::Primary),
        Ok(wire::ReadPreference::Backup) if max_staleness_ms == 0 => {
            Ok(ReadFrom::Backup { max_staleness: STALENESS_DEFAULT })
        }
        Ok(wire::ReadPreference::Backup) => {
            Ok(ReadFrom::Backup { max_staleness: Duration::from_millis(max_staleness_ms.into()) })
        }
        Err(_) => Err(Error::invalid(format!("read preference {preference} is not known"))),
    }
}

/// Of which view an answer is.
pub fn view_label_to_wire(label: &ViewLabel) -> wire::ViewLabel {
    wire::ViewLabel {
        sequence: label.sequence,
        age_ms: milliseconds(label.age),
        node_id: label.node.as_str().to_owned(),
        last: label.last,
    }
}

/// Of which view an answer is.
pub fn view_label_from_wire(label: wire::ViewLabel) -> Result<ViewLabel> {
    Ok(ViewLabel {
        sequence: label.sequence,
        age: Duration::from_millis(label.age_ms.into()),
        node: NodeId::new(label.node_id)?,
        last: label.last,
    })
}

/// Rounded up: an age is a bound.
fn milliseconds(time: Duration) -> u32 {
    u32::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(u32::MAX)
}

/// Figures.
pub fn view_figures_to_wire(f: &ViewFigures) -> wire::ViewFigures {
    wire::ViewFigures {
        published: f.published,
        publish_failures: f.publish_failures,
        opened: f.opened,
        open: f.open,
        answers: f.answers,
        refused_stale: f.refused_stale,
        refused_lost: f.refused_lost,
        refused_unreadable: f.refused_unreadable,
        devices_retired: f.devices_retired,
        sectors_written: f.sectors_written,
    }
}

/// Figures.
pub fn view_figures_from_wire(f: wire::ViewFigures) -> ViewFigures {
    ViewFigures {
        published: f.published,
        publish_failures: f.publish_failures,
        opened: f.opened,
        open: f.open,
        answers: f.answers,
        refused_stale: f.refused_stale,
        refused_lost: f.refused_lost,
        refused_unreadable: f.refused_unreadable,
        devices_retired: f.devices_retired,
        sectors_written: f.sectors_written,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_answer_survives_the_wire() {
        for from in [
            ReadFrom::Primary,
            ReadFrom::Backup { max_staleness: Duration::from_millis(1) },
            ReadFrom::Backup { max_staleness: Duration::from_secs(60) },
        ] {
            let (preference, ms) = read_from_to_wire(from);
            assert_eq!(read_from_from_wire(preference, ms).unwrap(), from);
        }
        assert_eq!(read_from_from_wire(0, 0).unwrap(), ReadFrom::Primary);
        assert_eq!(read_from_from_wire(2, 0).unwrap(), ReadFrom::Backup { max_staleness: STALENESS_DEFAULT });
        assert!(read_from_from_wire(3, 0).is_err());
        // No time at all is no wish for the default.
        assert_eq!(read_from_to_wire(ReadFrom::Backup { max_staleness: Duration::ZERO }).1, 1);
    }

    #[test]
    fn ages_are_rounded_up() {
        let label = ViewLabel {
            sequence: 7,
            age: Duration::from_micros(1001),
            node: NodeId::new("n").unwrap(),
            last: false,
        };
        let back = view_label_from_wire(view_label_to_wire(&label)).unwrap();
        assert_eq!(back.age, Duration::from_millis(2));
        assert_eq!((back.sequence, back.node, back.last), (7, label.node, false));
    }
}
