//! `shardfs ls`: shards, or what is in one. Prints as it reads: a million keys need no more memory than ten.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use serde_json::{Value, json};
use shardfs_proto::client::{Client, ListItem, ListOptions};
use shardfs_proto::types::cluster::ShardInfo;
use shardfs_proto::types::{Attr, FileKind, NodeId, ShardId, ViewLabel};

use super::reads::{self, ReadArgs};
use super::remote::{find_shard, resolve};
use crate::context::Context;
use crate::failure::{Failure, OrFail, Result};
use crate::output::{self, JsonName, Out, kind_text, mode_text, printable, time_json, time_text};
use crate::paths::RemotePath;

/// Attributes of directories that are asked for ahead of printing.
const AHEAD: usize = 32;

/// `shardfs ls`.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Without PATH: the shards of your client id. Directories end with `/`. Names come in byte order, and are printed as they arrive.

Examples:
  shardfs ls                        shards
  shardfs ls photos                 the top of a shard
  shardfs ls -l photos/2026         with mode, owner, size and time (UTC)
  shardfs ls -R photos              every key
  shardfs ls --prefix photos/2026-  keys that begin so, wherever the `/` is
  shardfs ls -R0 photos | xargs -0 -n1 echo
  shardfs ls -v --read-from backup photos  from a backup, and how old that is

Control characters, backslashes and bytes that are no UTF-8 are shown as \\xNN and the like; -0 prints names as they are, each \
ended by NUL. --json prints one object a line; a name that is no UTF-8 is `key_hex` there, \
and what is not from the primary has `view`: `node`, `sequence` (the shard's last operation that is in it), `age_ms`."
)]
pub struct Args {
    /// SHARD or SHARD/KEY
    #[arg(value_name = "PATH")]
    path: Option<OsString>,
    /// Mode, owner, size and time of modification
    #[arg(long, short)]
    long: bool,
    /// Everything below, as whole keys
    #[arg(long, short = 'R', requires = "path")]
    recursive: bool,
    /// PATH is the beginning of keys, not a file or directory
    #[arg(long, requires = "path")]
    prefix: bool,
    /// Only names after this key (whole, without the shard); without PATH, after this shard
    #[arg(long, value_name = "KEY")]
    start_after: Option<OsString>,
    /// At most so many
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
    /// One JSON object a line
    #[arg(long, conflicts_with = "null")]
    json: bool,
    /// Names as they are, each ended by NUL
    #[arg(long, short = '0', conflicts_with = "long")]
    null: bool,
    /// Say how many there are, and whence the answer is
    #[arg(long, short, requires = "path")]
    verbose: bool,
    #[command(flatten)]
    reads: ReadArgs,
}

/// Runs.
pub async fn run(args: Args, context: &Context) -> Result<()> {
    let client = context.client()?.with_reads(args.reads.read_from()?);
    let Some(path) = &args.path else { return shards(&client, &args).await };
    let path = RemotePath::parse(path)?;
    let shard = find_shard(&client, &path.shard).await?.id;
    let mut printer = Printer { out: Out::new(), args: &args, cut: 0 };

    let mut prefix = path.rest().to_vec();
    // PATH is no directory: it is listed like the others, because a listing says of which view it is.
    let mut one = false;
    if args.prefix {
        if path.trailing_slash && !prefix.is_empty() {
            prefix.push(b'/');
        }
    } else if !prefix.is_empty() {
        let attr = resolve(&client, shard, &prefix).await.with_context(|| path.to_string())?;
        one = attr.kind != FileKind::Directory;
        if !one {
            prefix.push(b'/');
        }
    }
    if !args.recursive && !one {
        // Names as in the directory; whole keys with -R.
        printer.cut = prefix.iter().rposition(|b| *b == b'/').map_or(0, |at| at + 1);
    }
    let options = ListOptions {
        prefix: prefix.clone().into(),
        delimiter: if args.recursive || one { Bytes::new() } else { Bytes::from_static(b"/") },
        start_after: args
            .start_after
            .as_ref()
            .filter(|_| !one)
            .map_or_else(Bytes::new, |k| Bytes::copy_from_slice(k.as_bytes())),
        limit: match args.limit {
            // It comes before the names that go on after it.
            _ if one => 1,
            // One more for the directory itself, which may be among them and is not printed.
            Some(limit) => limit.saturating_add(1),
            None => 0,
        },
        keys_only: !(args.long || args.json),
        include_directories: true,
    };
    let limit = if one { 1 } else { args.limit.unwrap_or(u64::MAX) };
    if limit == 0 {
        return Ok(());
    }
    let items = client.list_labelled(shard, options);
    let wants_attr = args.long || args.json;
    let mut items = std::pin::pin!(with_attributes(&client, shard, items, wants_attr));
    let mut whence = Whence::default();
    let mut listed = 0;
    while listed < limit
        && let Some(entry) = items.next().await
    {
        let entry = entry.with_context(|| path.to_string())?;
        whence.note(&entry.view);
        // Of a directory everything but itself.
        if (entry.key == prefix) == one {
            printer.entry(&entry)?;
            listed += 1;
        }
    }
    if one && listed == 0 {
        return Err(Failure::new("it was removed or replaced meanwhile").context(&path));
    }
    printer.out.flush()?;
    if args.verbose {
        output::note(format!("{path}: {listed} listed{}", whence.described()));
    }
    Ok(())
}

/// What is printed of one name.
struct Entry {
    key: Bytes,
    kind: FileKind,
    /// If it was asked for. Of a directory it may be of another view.
    attr: Option<Attr>,
    view: Option<ViewLabel>,
}

/// Whence the items of a listing are: of more than one view if a node failed in the middle.
#[derive(Default)]
struct Whence {
    last: Option<Option<ViewLabel>>,
    several: bool,
}

impl Whence {
    fn note(&mut self, view: &Option<ViewLabel>) {
        fn identity(view: &Option<ViewLabel>) -> Option<(&NodeId, u64)> {
            view.as_ref().map(|label| (&label.node, label.sequence))
        }
        match &self.last {
            Some(last) if identity(last) == identity(view) => {}
            last => {
                self.several |= last.is_some();
                self.last = Some(view.clone());
            }
        }
    }

    fn described(&self) -> String {
        match &self.last {
            None => ": an empty answer does not say whence it is".to_owned(),
            Some(view) => {
                let several = if self.several { ", what came first from elsewhere" } else { "" };
                format!(", {}{several}", reads::described(view.as_ref()))
            }
        }
    }
}

/// The items of a listing; directories that stand for what is in them get their attributes, if wanted.
fn with_attributes<'a>(
    client: &'a Client,
    shard: ShardId,
    items: impl Stream<Item = shardfs_proto::types::Result<(ListItem, Option<ViewLabel>)>> + 'a,
    wanted: bool,
) -> impl Stream<Item = Result<Entry>> + 'a {
    items
        .map(move |item| async move {
            let (item, view) = item?;
            match item {
                ListItem::Key { key, kind, meta } => {
                    Ok(Entry { key, kind, attr: meta.map(|m| m.attr), view })
                }
                ListItem::CommonPrefix(prefix) => {
                    let path = prefix.strip_suffix(b"/").unwrap_or(&prefix);
                    // One that was removed meanwhile is listed without.
                    let attr = if wanted { resolve(client, shard, path).await.ok() } else { None };
                    Ok(Entry { key: prefix, kind: FileKind::Directory, attr, view })
                }
            }
        })
        .buffered(AHEAD)
}

struct Printer<'a> {
    out: Out,
    args: &'a Args,
    /// Bytes at the beginning of keys that are not printed.
    cut: usize,
}

impl Printer<'_> {
    fn entry(&mut self, entry: &Entry) -> Result<()> {
        let name = entry.key.get(self.cut..).unwrap_or(&entry.key);
        if self.args.json {
            return self.out.json_line(&entry_json(entry));
        }
        if !self.args.long {
            return self.out.name(name, self.args.null);
        }
        self.out.line(match &entry.attr {
            Some(a) => format!(
                "{} {:>3} {:>5} {:>5} {:>12} {} {}",
                mode_text(entry.kind, a.mode),
                a.nlink,
                a.uid,
                a.gid,
                a.size,
                time_text(a.mtime),
                printable(name)
            ),
            None => format!(
                "{:10} {:>3} {:>5} {:>5} {:>12} {:19} {}",
                "?",
                "-",
                "-",
                "-",
                "-",
                "-",
                printable(name)
            ),
        })
    }
}

fn entry_json(entry: &Entry) -> Value {
    let (key, kind) = (&entry.key[..], entry.kind);
    let bare = if kind == FileKind::Directory { key.strip_suffix(b"/").unwrap_or(key) } else { key };
    let mut value = json!(JsonName::new(bare));
    value["kind"] = json!(kind_text(kind));
    if let Some(a) = &entry.attr {
        value["mode"] = json!(format!("{:04o}", a.mode));
        value["uid"] = json!(a.uid);
        value["gid"] = json!(a.gid);
        value["nlink"] = json!(a.nlink);
        value["size"] = json!(a.size);
        value["mtime"] = json!(time_json(a.mtime));
        value["version"] = json!(a.version);
        value["inode"] = json!(a.inode);
    }
    if let Some(view) = &entry.view {
        value["view"] = reads::to_json(view);
    }
    value
}

async fn shards(client: &Client, args: &Args) -> Result<()> {
    let shards: Vec<ShardInfo> = client.list_shards().await?;
    let mut out = Out::new();
    if args.start_after.is_none() && shards.is_empty() && out.is_terminal() {
        output::note("no shards yet: `shardfs shard create NAME`, or mkdir at the top of the mount");
    }
    for info in chosen(shards, args) {
        if args.json {
            out.json_line(&super::shard::to_json(&info))?;
        } else if args.long {
            out.line(format!(
                "{:9} {:>7} {:8} {} {}/",
                info.state.as_str(),
                format!("@{}", info.id),
                info.location.node.as_ref().map_or("-", |n| n.as_str()),
                time_text(info.created),
                printable(info.name.as_str().as_bytes())
            ))?;
        } else {
            out.name(format!("{}/", info.name).as_bytes(), args.null)?;
        }
    }
    out.flush()
}

/// The shards that are asked for, in byte order.
fn chosen(mut shards: Vec<ShardInfo>, args: &Args) -> impl Iterator<Item = ShardInfo> + use<> {
    shards.sort_unstable_by(|a, b| a.name.as_str().cmp(b.name.as_str()));
    let after = args.start_after.clone().unwrap_or_default().into_vec();
    // As it is printed, or as it is called.
    let after = after.strip_suffix(b"/").map(<[u8]>::to_vec).unwrap_or(after);
    let limit = args.limit.map_or(usize::MAX, |l| usize::try_from(l).unwrap_or(usize::MAX));
    shards.into_iter().filter(move |s| s.name.as_str().as_bytes() > &after[..]).take(limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_as_json() {
        let entry = |key: &'static [u8], kind, view| Entry { key: key.into(), kind, attr: None, view };
        let text = |key, kind| entry_json(&entry(key, kind, None)).to_string();
        assert_eq!(text(b"a/b", FileKind::Regular), r#"{"key":"a/b","kind":"file"}"#);
        assert_eq!(text(b"a/b/", FileKind::Directory), r#"{"key":"a/b","kind":"directory"}"#);
        assert_eq!(text(b"\xff", FileKind::Symlink), r#"{"key_hex":"ff","kind":"symlink"}"#);
        let view = Some(view("node-2", 7));
        let value = entry_json(&entry(b"a", FileKind::Regular, view));
        let expected = json!({ "node": "node-2", "sequence": 7, "age_ms": 1200, "last": false });
        assert_eq!(value["view"], expected);
    }

    fn view(node: &str, sequence: u64) -> ViewLabel {
        let age = std::time::Duration::from_millis(1200);
        ViewLabel { sequence, age, node: NodeId::new(node).unwrap(), last: false }
    }

    #[test]
    fn whence_a_listing_is() {
        let said = |views: &[Option<ViewLabel>]| {
            let mut whence = Whence::default();
            views.iter().for_each(|view| whence.note(view));
            whence.described()
        };
        let (old, new) = (view("node-2", 7), view("node-2", 9));
        assert!(said(&[]).starts_with(": an empty answer"));
        assert_eq!(said(&[None, None]), ", from the primary");
        let of_one = ", from node-2, a view at most 1.2 s old (operation 7)";
        assert_eq!(said(&[Some(old.clone()), Some(old.clone())]), of_one);
        assert!(
            said(&[Some(old.clone()), Some(new)]).ends_with("(operation 9), what came first from elsewhere")
        );
        assert_eq!(said(&[Some(old), None]), ", from the primary, what came first from elsewhere");
    }
}
