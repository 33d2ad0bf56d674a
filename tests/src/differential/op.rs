//! Operations, drawn from a seed.

use std::path::PathBuf;

/// As long as a name may be.
pub const LONG_NAME: &str = concat!(
    "llllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllll",
    "llllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllll",
    "llllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllll",
    "lllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllll"
);
/// A byte longer.
pub const TOO_LONG_NAME: &str = concat!(
    "tttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttt",
    "tttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttt",
    "tttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttt",
    "tttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttt"
);
/// Descriptors of an actor.
pub const SLOTS: usize = 3;
/// Names are few, so that operations meet.
const NAMES: [&str; 7] = ["a", "b", "c", "d", "name with spaces", "\u{e9}\n", LONG_NAME];
/// Nowhere in a file beyond this, most of the time.
const FILE_BYTES: u64 = 300_000;
const XATTRS: [&str; 5] = ["user.one", "user.two", "trusted.three", "security.four", "nonsense.five"];

/// One operation. Paths are relative to the root of a side; slots are descriptors of the actor.
#[derive(Clone, Debug)]
pub enum Op {
    Open {
        path: PathBuf,
        flags: i32,
        mode: u32,
        slot: usize,
    },
    Close {
        slot: usize,
    },
    Read {
        slot: usize,
        bytes: usize,
    },
    Write {
        slot: usize,
        bytes: usize,
        fill: u8,
    },
    ReadAt {
        slot: usize,
        offset: u64,
        bytes: usize,
    },
    WriteAt {
        slot: usize,
        offset: u64,
        bytes: usize,
        fill: u8,
    },
    Seek {
        slot: usize,
        whence: i32,
        offset: i64,
    },
    SetSize {
        slot: usize,
        bytes: u64,
    },
    Truncate {
        path: PathBuf,
        bytes: u64,
    },
    Allocate {
        slot: usize,
        mode: i32,
        offset: u64,
        bytes: u64,
    },
    Sync {
        slot: usize,
        data: bool,
    },
    CopyRange {
        from: usize,
        from_offset: u64,
        to: usize,
        to_offset: u64,
        bytes: usize,
    },
    /// Writes by a shared mapping of what the file has.
    WriteMapped {
        slot: usize,
        offset: u64,
        bytes: usize,
        fill: u8,
    },
    Lock {
        slot: usize,
        kind: i32,
        start: u64,
        bytes: u64,
    },
    GetLock {
        slot: usize,
        kind: i32,
        start: u64,
        bytes: u64,
    },
    StatSlot {
        slot: usize,
    },
    Stat {
        path: PathBuf,
        follow: bool,
    },
    MakeDir {
        path: PathBuf,
        mode: u32,
    },
    RemoveDir {
        path: PathBuf,
    },
    Unlink {
        path: PathBuf,
    },
    Rename {
        from: PathBuf,
        to: PathBuf,
        flags: u32,
    },
    Link {
        from: PathBuf,
        to: PathBuf,
    },
    Symlink {
        target: PathBuf,
        path: PathBuf,
    },
    ReadLink {
        path: PathBuf,
    },
    MakeNode {
        path: PathBuf,
        mode: u32,
    },
    SetMode {
        path: PathBuf,
        mode: u32,
    },
    SetModeOfSlot {
        slot: usize,
        mode: u32,
    },
    SetOwner {
        path: PathBuf,
        uid: Option<u32>,
        gid: Option<u32>,
        follow: bool,
    },
    SetTimes {
        path: PathBuf,
        access: Option<(i64, i64)>,
        modification: Option<(i64, i64)>,
    },
    Access {
        path: PathBuf,
        mode: i32,
    },
    SetXattr {
        path: PathBuf,
        name: &'static str,
        bytes: usize,
        fill: u8,
        flags: i32,
    },
    GetXattr {
        path: PathBuf,
        name: &'static str,
    },
    ListXattrs {
        path: PathBuf,
    },
    RemoveXattr {
        path: PathBuf,
        name: &'static str,
    },
    List {
        path: PathBuf,
    },
}

/// Draws operations.
#[derive(Debug)]
pub struct Draw(fastrand::Rng);

impl Draw {
    /// The same seed gives the same operations.
    pub fn new(seed: u64) -> Draw {
        Draw(fastrand::Rng::with_seed(seed))
    }

    /// A number below `end`.
    pub fn pick(&mut self, end: usize) -> usize {
        self.0.usize(..end)
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.0.usize(..choices.len())]
    }

    fn path(&mut self) -> PathBuf {
        let mut path = PathBuf::new();
        for _ in 0..=self.of(&[0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 3]) {
            let name = match self.0.u16(..200) {
                0 => TOO_LONG_NAME,
                1 => "..",
                2 => ".",
                _ => self.of(&NAMES),
            };
            path.push(name);
        }
        if self.0.u8(..60) == 0 {
            // With a slash at its end.
            path.push("");
        }
        path
    }

    fn slot(&mut self) -> usize {
        self.0.usize(..SLOTS)
    }

    fn mode(&mut self) -> u32 {
        self.of(&[
            0o644, 0o600, 0o755, 0o777, 0o666, 0o000, 0o444, 0o4755, 0o2755, 0o2644, 0o1777, 0o7777, 0o222,
        ])
    }

    fn offset(&mut self) -> u64 {
        match self.0.u8(..20) {
            0 => FILE_BYTES * 1000 + self.0.u64(..10_000),
            1..8 => self.0.u64(..FILE_BYTES / 4096) * 4096,
            8..11 => (self.0.u64(..FILE_BYTES / 65_536) * 65_536).saturating_sub(self.0.u64(..3)),
            _ => self.0.u64(..FILE_BYTES),
        }
    }

    fn bytes(&mut self) -> usize {
        match self.0.u8(..10) {
            0 => 0,
            1 => self.0.usize(..200_000),
            2..5 => self.0.usize(..16) * 4096,
            _ => self.0.usize(..9000),
        }
    }

    fn fill(&mut self) -> u8 {
        self.0.u8(..)
    }

    fn flags(&mut self) -> i32 {
        let mut flags = self.of(&[libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR, libc::O_RDWR, libc::O_RDWR]);
        if self.0.u8(..3) > 0 {
            flags |= libc::O_CREAT;
        }
        for (flag, rarity) in [
            (libc::O_EXCL, 8),
            (libc::O_TRUNC, 8),
            (libc::O_APPEND, 8),
            (libc::O_NOFOLLOW, 10),
            (libc::O_DIRECTORY, 20),
            (libc::O_SYNC, 20),
        ] {
            if self.0.u8(..rarity) == 0 {
                flags |= flag;
            }
        }
        // Nobody waits for the other end of a FIFO.
        flags | libc::O_NONBLOCK
    }

    fn time(&mut self) -> Option<(i64, i64)> {
        match self.0.u8(..5) {
            0 => None,
            1 => Some((0, libc::UTIME_NOW)),
            2 => Some((self.0.i64(2_147_483_648..4_000_000_000), self.0.i64(0..1_000_000_000))),
            _ => Some((self.0.i64(0..1_600_000_000), self.0.i64(0..1_000_000_000))),
        }
    }

    /// The next one.
    pub fn op(&mut self) -> Op {
        match self.0.u8(..100) {
            0..14 => {
                Op::Open { path: self.path(), flags: self.flags(), mode: self.mode(), slot: self.slot() }
            }
            16 => Op::Close { slot: self.slot() },
            17..19 => Op::Read { slot: self.slot(), bytes: self.bytes() },
            19..24 => Op::Write { slot: self.slot(), bytes: self.bytes(), fill: self.fill() },
            24..28 => Op::ReadAt { slot: self.slot(), offset: self.offset(), bytes: self.bytes() },
            28..33 => Op::WriteAt {
                slot: self.slot(),
                offset: self.offset(),
                bytes: self.bytes(),
                fill: self.fill(),
            },
            33..36 => {
                let whence = self.of(&[libc::SEEK_SET, libc::SEEK_CUR, libc::SEEK_END]);
                let offset = i64::try_from(self.offset()).unwrap() - self.of(&[0, 0, 100_000]);
                Op::Seek { slot: self.slot(), whence, offset }
            }
            36..39 => Op::SetSize { slot: self.slot(), bytes: self.offset() },
            39..41 => Op::Truncate { path: self.path(), bytes: self.offset() },
            41..44 => {
                let mode = self.of(&[
                    0,
                    libc::FALLOC_FL_KEEP_SIZE,
                    libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                    libc::FALLOC_FL_ZERO_RANGE,
                    libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
                    libc::FALLOC_FL_PUNCH_HOLE,
                ]);
                Op::Allocate { slot: self.slot(), mode, offset: self.offset(), bytes: self.bytes() as u64 }
            }
            44 => Op::Sync { slot: self.slot(), data: self.0.bool() },
            45..47 => Op::CopyRange {
                from: self.slot(),
                from_offset: self.offset(),
                to: self.slot(),
                to_offset: self.offset(),
                bytes: self.bytes(),
            },
            47..49 => Op::WriteMapped {
                slot: self.slot(),
                offset: self.offset(),
                bytes: self.bytes(),
                fill: self.fill(),
            },
            49..51 => {
                let kind = self.of(&[libc::F_RDLCK, libc::F_WRLCK, libc::F_UNLCK]);
                Op::Lock { slot: self.slot(), kind, start: self.offset(), bytes: self.bytes() as u64 }
            }
            51 => {
                let kind = self.of(&[libc::F_RDLCK, libc::F_WRLCK]);
                Op::GetLock { slot: self.slot(), kind, start: self.offset(), bytes: self.bytes() as u64 }
            }
            52..55 => Op::StatSlot { slot: self.slot() },
            55..58 => Op::Stat { path: self.path(), follow: self.0.bool() },
            58..63 => Op::MakeDir { path: self.path(), mode: self.mode() | self.of(&[0, 0o700]) },
            63..65 => Op::RemoveDir { path: self.path() },
            65..68 => Op::Unlink { path: self.path() },
            68..73 => {
                let flags = self.of(&[0, 0, 0, libc::RENAME_NOREPLACE, libc::RENAME_EXCHANGE]);
                Op::Rename { from: self.path(), to: self.path(), flags }
            }
            73..76 => Op::Link { from: self.path(), to: self.path() },
            76..78 => Op::Symlink { target: self.path(), path: self.path() },
            78 => Op::ReadLink { path: self.path() },
            79 => {
                let kind = self.of(&[libc::S_IFIFO, libc::S_IFSOCK, libc::S_IFREG, libc::S_IFCHR]);
                Op::MakeNode { path: self.path(), mode: kind | self.mode() }
            }
            80..83 => Op::SetMode { path: self.path(), mode: self.mode() },
            83 => Op::SetModeOfSlot { slot: self.slot(), mode: self.mode() },
            84..86 => Op::SetOwner {
                path: self.path(),
                uid: self.of(&[None, Some(0), Some(1), Some(65_534)]),
                gid: self.of(&[None, Some(0), Some(1), Some(65_534)]),
                follow: self.0.bool(),
            },
            86..88 => Op::SetTimes { path: self.path(), access: self.time(), modification: self.time() },
            88 => Op::Access {
                path: self.path(),
                mode: self.of(&[libc::F_OK, libc::R_OK, libc::W_OK, libc::X_OK]),
            },
            89..92 => Op::SetXattr {
                path: self.path(),
                name: self.of(&XATTRS),
                bytes: self.of(&[0, 1, 30, 300, 2000]),
                fill: self.fill(),
                flags: self.of(&[0, 0, libc::XATTR_CREATE, libc::XATTR_REPLACE]),
            },
            92 => Op::GetXattr { path: self.path(), name: self.of(&XATTRS) },
            93 => Op::ListXattrs { path: self.path() },
            94 => Op::RemoveXattr { path: self.path(), name: self.of(&XATTRS) },
            _ => Op::List { path: self.path() },
        }
    }
}
