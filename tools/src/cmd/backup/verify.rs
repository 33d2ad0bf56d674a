//! `shardfs backup verify`: what a node finds in a copy of a backup, as it finds it.

use futures::StreamExt;
use serde_json::json;
use shardfs_proto::client::Client;
use shardfs_proto::types::Error;
use shardfs_proto::types::backups::{BackupInfo, VerifyItem};

use crate::failure::{EXIT_FAILURE, Failure, Result};
use crate::output::{self, Out, note, printable};
use crate::size;

pub(super) async fn run(client: &Client, backup: BackupInfo, quick: bool, json: bool) -> Result<()> {
    let id = backup.id.clone();
    let mut items = std::pin::pin!(client.verify_backup(backup, quick));
    let mut out = Out::new();
    while let Some(item) = items.next().await {
        let item = item?;
        if json {
            out.json_line(&to_json(&id, &item))?;
        }
        match item {
            VerifyItem::Step(step) if !json => {
                out.flush()?;
                note(step);
            }
            VerifyItem::Finding { kind, detail } if !json => out.line(format!("{id}: {kind}: {detail}"))?,
            VerifyItem::Shard { id, name, snapshot_of, findings, summary, .. } if !json => {
                let name = printable(name.as_str().as_bytes());
                let name = match snapshot_of {
                    Some(of) => format!("@{of}/.snap/{name}"),
                    None => name,
                };
                for (kind, detail) in &findings {
                    out.line(format!("{name}: {kind}: {detail}"))?;
                }
                let verdict = match summary.findings {
                    0 => "clean".to_owned(),
                    n => format!("{n} FINDINGS"),
                };
                out.line(format!(
                    "{name} (id {id}): {verdict}: {} inodes, {} names, {} chunks, {}",
                    summary.inodes,
                    summary.dirents,
                    summary.chunks,
                    size::human(summary.bytes)
                ))?;
            }
            VerifyItem::Summary { shards, bytes, findings } => {
                if !json {
                    let verdict = match findings {
                        0 => "clean".to_owned(),
                        n => format!("{n} findings"),
                    };
                    out.line(format!(
                        "{id}: {}, {}: {verdict}",
                        output::count(shards.into(), "shard"),
                        size::human(bytes)
                    ))?;
                }
                out.flush()?;
                return match findings {
                    0 => Ok(()),
                    _ if json => Err(Failure::silent(EXIT_FAILURE)),
                    n => Err(Failure::new(format!("{n} findings"))),
                };
            }
            VerifyItem::Step(_) | VerifyItem::Finding { .. } | VerifyItem::Shard { .. } => {}
        }
        out.flush()?;
    }
    Err(Error::unavailable("the check broke off before its summary").into())
}

fn to_json(backup: &str, item: &VerifyItem) -> serde_json::Value {
    match item {
        VerifyItem::Step(step) => json!({ "backup": backup, "step": step }),
        VerifyItem::Finding { kind, detail } => {
            json!({ "backup": backup, "finding": kind, "detail": detail })
        }
        VerifyItem::Shard { id, name, owner, snapshot_of, findings, summary } => json!({
            "backup": backup, "shard": name.as_str(), "shard_id": id, "owner": owner, "snapshot_of": snapshot_of,
            "details": findings.iter().map(|(kind, detail)| json!({ "finding": kind, "detail": detail })).collect::<Vec<_>>(),
            "inodes": summary.inodes, "dirents": summary.dirents, "chunks": summary.chunks, "bytes": summary.bytes,
            "findings": summary.findings,
        }),
        VerifyItem::Summary { shards, bytes, findings } => {
            json!({ "backup": backup, "shards": shards, "bytes": bytes, "findings": findings })
        }
    }
}
