//! What fuser decodes and what the kernel is told, both ways.

use super::*;

/// As fuser 0.18 decodes what the kernel sends.
fn as_fuser_decodes(seconds: i64, nanos: u32) -> SystemTime {
    if seconds >= 0 {
        UNIX_EPOCH + Duration::new(seconds as u64, nanos)
    } else {
        UNIX_EPOCH - Duration::new(seconds.unsigned_abs(), nanos)
    }
}

#[test]
fn times_come_in_as_the_kernel_sent_them() {
    for (seconds, nanos) in
        [(0, 0), (0, 5), (1, 999_999_999), (-1, 0), (-1, 800_000_000), (-2, 1), (-86_400, 7)]
    {
        let at = timestamp_in(as_fuser_decodes(seconds, nanos));
        assert_eq!((at.seconds(), at.nanos()), (seconds, nanos));
    }
}

#[test]
fn times_go_out_exactly() {
    for (seconds, nanos) in [(0, 0), (12, 345), (-1, 0), (-1, 800_000_000), (-62_135_596_800, 1)] {
        let out = timestamp_out(Timestamp::new(seconds, nanos).unwrap());
        let back = match out.duration_since(UNIX_EPOCH) {
            Ok(after) => after.as_nanos() as i128,
            Err(before) => -(before.duration().as_nanos() as i128),
        };
        assert_eq!(back, i128::from(seconds) * 1_000_000_000 + i128::from(nanos));
    }
    // The ends of the range do not panic.
    for seconds in [i64::MIN, i64::MAX] {
        timestamp_out(Timestamp::new(seconds, 999_999_999).unwrap());
    }
}

#[test]
fn open_flags_are_read() {
    let mode = open_mode(libc::O_WRONLY | libc::O_TRUNC | libc::O_EXCL);
    assert_eq!(mode, OpenMode { write: true, truncate: true, exclusive: true, append: false });
    assert_eq!(open_mode(libc::O_RDONLY), OpenMode::default());
    assert!(open_mode(libc::O_WRONLY | libc::O_APPEND).append);
    assert!(open_mode(libc::O_RDWR).write);
}

#[test]
fn mknod_makes_what_is_no_directory_and_no_symlink() {
    assert_eq!(kind_in(libc::S_IFREG | 0o644), Some(FileKind::Regular));
    assert_eq!(kind_in(0o644), Some(FileKind::Regular));
    assert_eq!(kind_in(libc::S_IFIFO), Some(FileKind::Fifo));
    assert_eq!(kind_in(libc::S_IFSOCK), Some(FileKind::Socket));
    assert_eq!(kind_in(libc::S_IFDIR), None);
    assert_eq!(kind_in(libc::S_IFLNK), None);
}
