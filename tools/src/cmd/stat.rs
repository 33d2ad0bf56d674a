//! `shardfs stat`: everything about what a path names.

use std::ffi::OsString;

use serde_json::json;
use shardfs_proto::types::op::{IndexValue, Indexes};
use shardfs_proto::types::{FileKind, GlobalInode};

use super::remote::{find_shard, resolve};
use crate::context::Context;
use crate::failure::{EXIT_FAILURE, Failure, OrFail, Result};
use crate::output::{JsonName, Out, kind_text, mode_text, note, printable, time_json, time_text};
use crate::paths::RemotePath;
use crate::size;

/// `shardfs stat`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  shardfs stat photos/cat.jpg
  shardfs stat photos/cat.jpg --json | jq .version

Symbolic links are shown, not followed. For a shard as such: `shardfs shard show`.")]
pub struct Args {
    /// SHARD/KEY, or SHARD for its root directory
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<OsString>,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

/// Runs.
pub async fn run(args: Args, context: &Context) -> Result<()> {
    let paths = args.paths.iter().map(|p| RemotePath::parse(p)).collect::<Result<Vec<_>>>()?;
    let mut out = Out::new();
    let mut failed = 0;
    for path in &paths {
        if let Err(failure) = one(path, args.json, context, &mut out).await {
            let failure = failure.context(format!("stat {path}"));
            if paths.len() == 1 {
                return Err(failure);
            }
            note(failure.render().trim_end());
            failed += 1;
        }
    }
    out.flush()?;
    if failed > 0 { Err(Failure::silent(EXIT_FAILURE)) } else { Ok(()) }
}

async fn one(path: &RemotePath, json: bool, context: &Context, out: &mut Out) -> Result<()> {
    let client = context.client()?;
    let shard = find_shard(&client, &path.shard).await?;
    let attr = resolve(&client, shard.id, path.rest()).await?;
    let target = match attr.kind {
        FileKind::Symlink => Some(client.read_link(shard.id, attr.inode).await?),
        _ => None,
    };
    let indexes = match (attr.kind, path.key()) {
        (FileKind::Regular, Some(key)) => client.head(shard.id, &key).await.context("metadata")?.indexes,
        _ => Indexes::new(),
    };
    let st_ino = GlobalInode::new(shard.id, attr.inode);
    if json {
        let mut value = json!(JsonName::new(path.rest()));
        let more = json!({
            "shard": shard.name.as_str(),
            "shard_id": shard.id,
            "kind": kind_text(attr.kind),
            "size": attr.size,
            "blocks": attr.blocks,
            "mode": format!("{:04o}", attr.mode),
            "uid": attr.uid,
            "gid": attr.gid,
            "nlink": attr.nlink,
            "rdev": attr.rdev,
            "inode": attr.inode,
            "st_ino": st_ino,
            "version": attr.version,
            "atime": time_json(attr.atime),
            "mtime": time_json(attr.mtime),
            "ctime": time_json(attr.ctime),
            "btime": time_json(attr.btime),
            "target": target.as_ref().map(|t| printable(t)),
            "indexes": indexes.iter().map(|(name, value)| (name.clone(), index_json(value))).collect::<serde_json::Map<_, _>>(),
            "node": shard.location.node,
        });
        if let (Some(value), serde_json::Value::Object(more)) = (value.as_object_mut(), more) {
            value.extend(more);
        }
        return out.json_line(&value);
    }
    out.line(format!("path      {path}"))?;
    let arrow = target.map(|t| format!(" -> {}", printable(&t))).unwrap_or_default();
    out.line(format!("kind      {}{arrow}", kind_text(attr.kind)))?;
    out.line(format!("size      {} ({} bytes, {} blocks)", size::human(attr.size), attr.size, attr.blocks))?;
    out.line(format!("mode      {:04o} {}", attr.mode, mode_text(attr.kind, attr.mode)))?;
    out.line(format!("owner     uid {}, gid {}", attr.uid, attr.gid))?;
    out.line(format!("names     {}", attr.nlink))?;
    out.line(format!("modified  {} UTC", time_text(attr.mtime)))?;
    out.line(format!("changed   {} UTC", time_text(attr.ctime)))?;
    out.line(format!("accessed  {} UTC", time_text(attr.atime)))?;
    out.line(format!("made      {} UTC", time_text(attr.btime)))?;
    out.line(format!("version   {}", attr.version))?;
    out.line(format!("inode     {} (st_ino {st_ino} on a mount)", attr.inode))?;
    for (name, value) in &indexes {
        out.line(format!("index     {name} = {}", index_json(value)))?;
    }
    let node = shard.location.node.as_ref().map_or_else(|| "no node".to_owned(), ToString::to_string);
    out.line(format!("shard     {} (id {}) on {} ({node})", shard.name, shard.id, shard.location.volume))
}

fn index_json(value: &IndexValue) -> serde_json::Value {
    match value {
        IndexValue::Text(text) => json!(text),
        IndexValue::Integer(number) => json!(number),
        IndexValue::Time(time) => json!(time_json(*time)),
    }
}
