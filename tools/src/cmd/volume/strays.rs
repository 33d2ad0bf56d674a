//! `shardfs volume strays`: what the cloud has of this cluster and no volume accounts for.

use serde_json::json;
use shardfs_proto::client::Client;
use shardfs_proto::types::cluster::Stray;

use super::say;
use crate::failure::{Failure, Result};
use crate::output::{Align, Out, Table};

/// Lists them.
pub(super) async fn list(client: &Client, as_json: bool) -> Result<()> {
    let strays = client.strays().await?;
    let mut out = Out::new();
    if as_json {
        let all: Vec<_> = strays
            .iter()
            .map(|stray| {
                json!({
                    "stray": handle(stray),
                    "volume": stray.volume,
                    "disk": stray.disk,
                    "machine": stray.machine,
                    "gib": stray.gib,
                    "why": stray.why,
                    "since": stray.since.map(|since| since.seconds()),
                })
            })
            .collect();
        out.json(&all)?;
    } else if strays.is_empty() {
        out.line("none: every disk of the cluster is of a volume, and attached to its nodes only")?;
    } else {
        let mut table = Table::new(&[
            ("STRAY", Align::Left),
            ("VOLUME", Align::Left),
            ("SIZE", Align::Right),
            ("WHY", Align::Left),
        ]);
        for stray in &strays {
            table.row(vec![
                handle(stray),
                stray.volume.clone(),
                format!("{} GiB", stray.gib),
                stray.why.clone(),
            ]);
        }
        out.bytes(table.render().as_bytes())?;
    }
    out.flush()
}

/// Removes one.
pub(super) async fn remove(client: &Client, which: &str, force: bool) -> Result<()> {
    let strays = client.strays().await?;
    let stray = strays.iter().find(|stray| handle(stray) == which).ok_or_else(|| {
        Failure::new(format!("there is no stray {which}"))
            .hint("`shardfs volume strays` lists which there are")
    })?;
    client.remove_stray(stray, force).await?;
    say(match (stray.disk.as_str(), stray.machine.as_str()) {
        ("", _) => format!("the making of {} is given up", stray.volume),
        (disk, "") => format!("{disk} is deleted"),
        (disk, machine) => format!("{disk} is detached from {machine}"),
    })
}

/// By what it is named on the command line.
fn handle(stray: &Stray) -> String {
    match (stray.disk.as_str(), stray.machine.as_str()) {
        ("", _) => stray.volume.clone(),
        (disk, "") => disk.to_owned(),
        (disk, machine) => format!("{disk}={machine}"),
    }
}
