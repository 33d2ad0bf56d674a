//! What people and programs read: tables, JSON, names with odd bytes, times, questions.
//!
//! Everything written to stdout goes through [`Out`], which turns a reader that went away into a silent end
//! instead of a panic or a message.

use std::io::{self, BufWriter, IsTerminal, Write};

use serde::Serialize;
use shardfs_proto::types::{FileKind, Timestamp, clock};

use crate::failure::{Failure, Result};

/// Buffered stdout.
pub struct Out {
    inner: BufWriter<io::StdoutLock<'static>>,
    terminal: bool,
}

impl Default for Out {
    fn default() -> Out {
        Out::new()
    }
}

impl Out {
    /// Locks stdout.
    pub fn new() -> Out {
        let stdout = io::stdout();
        let terminal = stdout.is_terminal();
        Out { inner: BufWriter::with_capacity(64 << 10, stdout.lock()), terminal }
    }

    /// Whether a person reads it.
    pub fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// One line.
    pub fn line(&mut self, line: impl AsRef<str>) -> Result<()> {
        self.bytes(line.as_ref().as_bytes())?;
        self.bytes(b"\n")
    }

    /// Bytes as they are.
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.inner.write_all(bytes).map_err(Failure::from)
    }

    /// A name in a line of its own: escaped unless `null`, then raw and ended by NUL.
    pub fn name(&mut self, name: &[u8], null: bool) -> Result<()> {
        if null {
            self.bytes(name)?;
            self.bytes(b"\0")
        } else {
            self.line(printable(name))
        }
    }

    /// One JSON document in one line.
    pub fn json_line(&mut self, value: &impl Serialize) -> Result<()> {
        serde_json::to_writer(&mut self.inner, value).map_err(|e| Failure::from(io::Error::from(e)))?;
        self.bytes(b"\n")
    }

    /// One JSON document for people too.
    pub fn json(&mut self, value: &impl Serialize) -> Result<()> {
        serde_json::to_writer_pretty(&mut self.inner, value)
            .map_err(|e| Failure::from(io::Error::from(e)))?;
        self.bytes(b"\n")
    }

    /// Hands everything to the reader.
    pub fn flush(&mut self) -> Result<()> {
        self.inner.flush().map_err(Failure::from)
    }
}

/// Bytes as text that cannot harm a terminal: control characters and what is not UTF-8 as `\xNN`, a
/// backslash doubled, so that it can be told apart.
pub fn printable(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\\' => text.push_str("\\\\"),
                '\n' => text.push_str("\\n"),
                '\t' => text.push_str("\\t"),
                '\r' => text.push_str("\\r"),
                c if c.is_control() || is_bidi_control(c) => text.extend(c.escape_unicode()),
                c => text.push(c),
            }
        }
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

/// Characters that reorder the text around them: a name could pose as another.
fn is_bidi_control(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// A name in JSON: `name` when it is UTF-8, else `name_hex`.
#[derive(Serialize)]
#[serde(untagged)]
pub enum JsonName {
    /// Text.
    Text {
        /// The name.
        key: String,
    },
    /// Other bytes.
    Hex {
        /// Two digits a byte.
        key_hex: String,
    },
}

impl JsonName {
    /// Of bytes.
    pub fn new(bytes: &[u8]) -> JsonName {
        match std::str::from_utf8(bytes) {
            Ok(text) => JsonName::Text { key: text.to_owned() },
            Err(_) => JsonName::Hex { key_hex: bytes.iter().map(|b| format!("{b:02x}")).collect() },
        }
    }
}

/// How a column stands.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// A table for people: a header, aligned columns, nothing after the last one. Holds all rows: for lists
/// that are short by nature (nodes, volumes, shards).
pub struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// With these columns.
    pub fn new(columns: &[(&'static str, Align)]) -> Table {
        Table { columns: columns.to_vec(), rows: Vec::new() }
    }

    /// Adds a row; it has a cell for each column.
    pub fn row(&mut self, cells: Vec<String>) {
        assert_eq!(cells.len(), self.columns.len(), "a row has a cell for each column");
        self.rows.push(cells);
    }

    /// The lines, each with its newline.
    pub fn render(&self) -> String {
        let width = |text: &str| text.chars().count();
        let widths: Vec<usize> = self
            .columns
            .iter()
            .enumerate()
            .map(|(i, (title, _))| {
                self.rows.iter().map(|row| width(&row[i])).max().unwrap_or(0).max(width(title))
            })
            .collect();
        let mut text = String::new();
        let titles: Vec<String> = self.columns.iter().map(|(title, _)| (*title).to_owned()).collect();
        for row in std::iter::once(&titles).chain(&self.rows) {
            let mut line = String::new();
            for (i, cell) in row.iter().enumerate() {
                let pad = " ".repeat(widths[i] - width(cell));
                if i > 0 {
                    line.push_str("  ");
                }
                match self.columns[i].1 {
                    Align::Left => line.extend([cell.as_str(), &pad]),
                    Align::Right => line.extend([pad.as_str(), cell]),
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// `-rw-r--r--` of a kind and permission bits.
pub fn mode_text(kind: FileKind, mode: u32) -> String {
    let mut text = String::with_capacity(10);
    text.push(match kind {
        FileKind::Regular => '-',
        FileKind::Directory => 'd',
        FileKind::Symlink => 'l',
        FileKind::Fifo => 'p',
        FileKind::Socket => 's',
        FileKind::CharDevice => 'c',
        FileKind::BlockDevice => 'b',
    });
    for (shift, special, set, unset) in [(6, 0o4000, 's', 'S'), (3, 0o2000, 's', 'S'), (0, 0o1000, 't', 'T')]
    {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (bits & 1 != 0, mode & special != 0) {
            (true, true) => set,
            (false, true) => unset,
            (true, false) => 'x',
            (false, false) => '-',
        });
    }
    text
}

/// The word for a kind, as find(1) users know it.
pub fn kind_text(kind: FileKind) -> &'static str {
    match kind {
        FileKind::Regular => "file",
        FileKind::Directory => "directory",
        FileKind::Symlink => "symlink",
        FileKind::Fifo => "fifo",
        FileKind::Socket => "socket",
        FileKind::CharDevice => "char-device",
        FileKind::BlockDevice => "block-device",
    }
}

/// `2026-11-21 03:04:05` in UTC.
pub fn time_text(time: Timestamp) -> String {
    let (year, month, day, second) = clock::civil(time.seconds());
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60)
}

/// RFC 3339 in UTC with nanoseconds, for JSON.
pub fn time_json(time: Timestamp) -> String {
    let (year, month, day, second) = clock::civil(time.seconds());
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z",
        second / 3600,
        second / 60 % 60,
        second % 60,
        time.nanos()
    )
}

/// "1 node", "3 nodes".
pub fn count(number: u64, thing: &str) -> String {
    if number == 1 { format!("1 {thing}") } else { format!("{number} {thing}s") }
}

/// A duration for people: `350 ms`, `12 s`, `3 min 5 s`, `2 h 4 min`, `3 d 2 h`.
pub fn duration_text(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        0 => format!("{ms} ms"),
        1..60 => format!("{s} s"),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {} min", s / 3600, s / 60 % 60),
        _ => format!("{} d {} h", s / 86_400, s / 3600 % 24),
    }
}

/// Asks on the terminal; `None` when stdin or stderr is none.
pub fn confirm(question: &str) -> Result<Option<bool>> {
    let (stdin, mut stderr) = (io::stdin(), io::stderr());
    if !stdin.is_terminal() || !stderr.is_terminal() {
        return Ok(None);
    }
    write!(stderr, "{question} [y/N] ")?;
    stderr.flush()?;
    let mut answer = String::new();
    stdin.read_line(&mut answer)?;
    Ok(Some(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes")))
}

/// A note on stderr that is no error. Nothing is done about a stderr that is closed.
pub fn note(text: impl AsRef<str>) {
    let _ = writeln!(io::stderr(), "{}", text.as_ref());
}

/// Sends logs to stderr: warnings, or what SHARDFS_LOG asks for (as in RUST_LOG). The supervisor, whose stderr is its
/// log file, says more.
pub fn start_logging() {
    use tracing_subscriber::EnvFilter;
    let supervisor = std::env::args_os().nth(2).is_some_and(|a| a == "supervise");
    let default = if supervisor { "info" } else { "error" };
    let filter = EnvFilter::try_from_env("SHARDFS_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let ansi = io::stderr().is_terminal();
    // What a full disk keeps from being written is lost; by default it is told on standard error, where a failure panics.
    let started = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(ansi)
        .log_internal_errors(false)
        .try_init();
    // Somebody else (a test) has set up logging.
    drop(started);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_bytes_are_shown_safely() {
        assert_eq!(printable("a/ä \u{1f600}".as_bytes()), "a/ä \u{1f600}");
        assert_eq!(printable(b"a\xffb\x1b[31m\n\\"), "a\\xffb\\u{1b}[31m\\n\\\\");
        assert_eq!(printable("x\u{202e}y".as_bytes()), "x\\u{202e}y");
        let json = |b: &[u8]| serde_json::to_string(&JsonName::new(b)).unwrap();
        assert_eq!(json(b"a\n"), r#"{"key":"a\n"}"#);
        assert_eq!(json(b"\xff\x01"), r#"{"key_hex":"ff01"}"#);
    }

    #[test]
    fn tables_align() {
        let mut table = Table::new(&[("NAME", Align::Left), ("SIZE", Align::Right), ("STATE", Align::Left)]);
        table.row(vec!["photos".into(), "12 B".into(), "active".into()]);
        table.row(vec!["ä".into(), "1023 GiB".into(), "".into()]);
        let expected = "NAME        SIZE  STATE\nphotos      12 B  active\nä       1023 GiB\n";
        assert_eq!(table.render(), expected);
    }

    #[test]
    fn modes_and_times_print() {
        assert_eq!(mode_text(FileKind::Regular, 0o644), "-rw-r--r--");
        assert_eq!(mode_text(FileKind::Directory, 0o1777), "drwxrwxrwt");
        assert_eq!(mode_text(FileKind::Regular, 0o6745), "-rwsr-Sr-x");
        let time = |s| time_text(Timestamp::new(s, 0).unwrap());
        assert_eq!(time(0), "1970-01-01 00:00:00");
        assert_eq!(time(-1), "1969-12-31 23:59:59");
        assert_eq!(time(951_782_400), "2000-02-29 00:00:00");
        assert_eq!(time(1_795_231_445), "2026-11-21 03:24:05");
        assert_eq!(time_json(Timestamp::new(1, 5).unwrap()), "1970-01-01T00:00:01.000000005Z");
    }

    #[test]
    fn counts_print() {
        assert_eq!((count(0, "node"), count(1, "node")), ("0 nodes".to_owned(), "1 node".to_owned()));
    }

    #[test]
    fn durations_print() {
        for (ms, text) in
            [(0, "0 ms"), (999, "999 ms"), (12_345, "12 s"), (185_000, "3 min 5 s"), (7_440_000, "2 h 4 min")]
        {
            assert_eq!(duration_text(ms), text);
        }
    }
}
