//! `shardfs backup schedule` and `schedules`.

use serde_json::json;
use shardfs_proto::client::Client;
use shardfs_proto::types::VolumeId;

use super::say;
use crate::failure::Result;
use crate::output::{Align, Out, Table, note, time_json, time_text};

/// Seconds of the units that there are.
const UNITS: [(&str, u64); 5] = [("w", 604_800), ("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)];

/// A time such as `1d`, in seconds.
pub(super) fn parse_every(text: &str) -> std::result::Result<u64, String> {
    let wrong =
        || format!("{text:?} is no time: write a number and a unit (s, m, h, d, w), such as 6h or 1d");
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let (_, seconds) = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?;
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number.checked_mul(*seconds).filter(|seconds| *seconds > 0).ok_or_else(wrong)
}

/// The same for people.
fn every_text(seconds: u64) -> String {
    let fits = UNITS.iter().find(|(_, unit)| seconds.is_multiple_of(*unit));
    fits.map_or_else(|| format!("{seconds}s"), |(name, unit)| format!("{}{name}", seconds / unit))
}

/// Sets a schedule; 0 seconds: ends it.
pub(super) async fn set(client: &Client, volume: &VolumeId, every_s: u64, keep: u32) -> Result<()> {
    client.set_backup_schedule(volume, every_s, keep).await?;
    say(match every_s {
        0 => format!("no more backups of {volume} are taken by themselves; those that there are stay"),
        every_s => {
            format!("a backup of {volume} is taken every {}, and {keep} are kept", every_text(every_s))
        }
    })
}

/// Lists them.
pub(super) async fn list(client: &Client, as_json: bool) -> Result<()> {
    let schedules = client.backup_schedules().await?;
    let mut out = Out::new();
    if as_json {
        let all: Vec<_> = schedules
            .iter()
            .map(|schedule| {
                json!({
                    "volume": schedule.volume,
                    "every_seconds": schedule.every_s,
                    "keep": schedule.keep,
                    "last": schedule.last.map(time_json),
                })
            })
            .collect();
        out.json(&all)?;
        return out.flush();
    }
    if schedules.is_empty() && out.is_terminal() {
        note("there are no schedules: `shardfs backup schedule VOLUME --every 1d --keep 7` makes one");
        return out.flush();
    }
    let mut table = Table::new(&[
        ("VOLUME", Align::Left),
        ("EVERY", Align::Right),
        ("KEEP", Align::Right),
        ("LAST ATTEMPT", Align::Left),
    ]);
    for schedule in &schedules {
        table.row(vec![
            schedule.volume.to_string(),
            every_text(schedule.every_s),
            schedule.keep.to_string(),
            schedule.last.map_or_else(|| "-".to_owned(), time_text),
        ]);
    }
    out.bytes(table.render().as_bytes())?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_and_written() {
        for (text, seconds) in
            [("10s", 10), ("90m", 5_400), ("6h", 21_600), ("1d", 86_400), ("2w", 1_209_600)]
        {
            assert_eq!(parse_every(text), Ok(seconds));
            assert_eq!(every_text(seconds), text);
        }
        for wrong in ["", "1", "d", "0s", "-1d", "1.5h", "1day", "99999999999999999999d"] {
            assert!(parse_every(wrong).is_err(), "{wrong}");
        }
    }
}
