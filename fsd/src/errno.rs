//! Failures as the numbers that programs see. Two matches, both exhaustive.

use fuser::Errno;
use shardfs_proto::types::Reason;

use crate::failure::{Failure, Posix};

/// The number for a failure.
pub fn errno(failure: &Failure) -> Errno {
    match failure {
        Failure::Domain(error) => of_reason(error.reason()),
        Failure::Posix(posix) => of_posix(*posix),
    }
}

/// The number for a domain error.
pub fn of_reason(reason: Reason) -> Errno {
    match reason {
        Reason::NotFound => Errno::ENOENT,
        // A shard that went away under the mount: the kernel walks the path again, and finds ENOENT.
        Reason::ShardNotFound | Reason::ShardDeleted => Errno::ESTALE,
        Reason::NoAttribute => Errno::ENODATA,
        Reason::AlreadyExists | Reason::ShardExists => Errno::EEXIST,
        Reason::InvalidArgument => Errno::EINVAL,
        Reason::NameTooLong => Errno::ENAMETOOLONG,
        Reason::TooLarge => Errno::EMSGSIZE,
        Reason::CrossShard => Errno::EXDEV,
        Reason::NotDirectory => Errno::ENOTDIR,
        Reason::IsDirectory => Errno::EISDIR,
        Reason::NotEmpty | Reason::ShardNotEmpty | Reason::ShardHasSnapshots => Errno::ENOTEMPTY,
        Reason::WrongKind => Errno::EINVAL,
        Reason::ShardReadOnly => Errno::EROFS,
        Reason::NotPermitted => Errno::EPERM,
        Reason::TooManyLinks => Errno::EMLINK,
        // As ext4 says when attributes outgrow their block.
        Reason::AttributeTooLarge => Errno::ENOSPC,
        Reason::WrongOwner | Reason::NoClientId => Errno::EACCES,
        Reason::ShardFull | Reason::VolumeFull => Errno::ENOSPC,
        Reason::IdsExhausted => Errno::ENOSPC,
        Reason::FileTooLarge => Errno::EFBIG,
        Reason::LocksExhausted => Errno::ENOLCK,
        Reason::LockConflict => Errno::EAGAIN,
        Reason::Deadlock => Errno::EDEADLK,
        Reason::Unsupported => Errno::EOPNOTSUPP,
        // The client has repeated the call until its deadline; what is left is an I/O error.
        Reason::Busy
        | Reason::NotPrimary
        | Reason::StaleEpoch
        | Reason::Unavailable
        | Reason::Deadline
        | Reason::SessionUnknown
        | Reason::SequenceStale
        | Reason::VersionMismatch
        | Reason::Corrupt
        | Reason::Io
        | Reason::Internal => Errno::EIO,
    }
}

fn of_posix(posix: Posix) -> Errno {
    match posix {
        Posix::NotPermitted => Errno::EPERM,
        Posix::NoEntry => Errno::ENOENT,
        Posix::Exists => Errno::EEXIST,
        Posix::CrossDevice => Errno::EXDEV,
        Posix::ReadOnly => Errno::EROFS,
        Posix::Invalid => Errno::EINVAL,
        Posix::Stale => Errno::ESTALE,
        Posix::Unsupported => Errno::EOPNOTSUPP,
        Posix::NotImplemented => Errno::ENOSYS,
        Posix::BufferTooSmall => Errno::ERANGE,
        Posix::BadHandle => Errno::EBADF,
        Posix::TooManyOpen => Errno::ENFILE,
        Posix::NotDirectory => Errno::ENOTDIR,
        Posix::IsDirectory => Errno::EISDIR,
        Posix::NotInFile => Errno::ENXIO,
        Posix::NoAttribute => Errno::ENODATA,
        Posix::NoLocks => Errno::ENOLCK,
        Posix::Interrupted => Errno::EINTR,
    }
}

/// Whether a failure says that something is wrong with the cluster, not with the request.
pub fn is_trouble(failure: &Failure) -> bool {
    match failure {
        Failure::Domain(error) => of_reason(error.reason()).code() == libc::EIO,
        Failure::Posix(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shardfs_proto::types::Error;

    #[test]
    fn programs_see_the_numbers_they_know() {
        let of = |reason| errno(&Error::new(reason, "x").into()).code();
        assert_eq!(of(Reason::NotFound), libc::ENOENT);
        assert_eq!(of(Reason::ShardReadOnly), libc::EROFS);
        assert_eq!(of(Reason::ShardHasSnapshots), libc::ENOTEMPTY);
        assert_eq!(of(Reason::ShardFull), libc::ENOSPC);
        assert_eq!(of(Reason::VolumeFull), libc::ENOSPC);
        assert_eq!(of(Reason::FileTooLarge), libc::EFBIG);
        assert_eq!(of(Reason::LockConflict), libc::EAGAIN);
        assert_eq!(of(Reason::Deadlock), libc::EDEADLK);
        assert_eq!(of(Reason::LocksExhausted), libc::ENOLCK);
        assert_eq!(of(Reason::TooManyLinks), libc::EMLINK);
        assert_eq!(of(Reason::NoAttribute), libc::ENODATA);
        assert_eq!(of(Reason::WrongOwner), libc::EACCES);
        assert_eq!(of(Reason::CrossShard), libc::EXDEV);
        assert_eq!(of(Reason::NameTooLong), libc::ENAMETOOLONG);
        assert_eq!(of(Reason::Deadline), libc::EIO);
        assert_eq!(of(Reason::ShardDeleted), libc::ESTALE);
        assert_eq!(errno(&Posix::BufferTooSmall.into()).code(), libc::ERANGE);
    }

    #[test]
    fn only_trouble_is_trouble() {
        assert!(is_trouble(&Error::unavailable("x").into()));
        assert!(is_trouble(&Error::corrupt("x").into()));
        assert!(!is_trouble(&Error::not_found("x").into()));
        assert!(!is_trouble(&Posix::Stale.into()));
    }

    #[test]
    fn a_missing_inode_is_stale_but_a_missing_shard_keeps_its_reason() {
        let gone = Failure::from(Error::not_found("x")).stale_if_gone();
        assert_eq!(errno(&gone).code(), libc::ESTALE);
        let full = Failure::from(Error::new(Reason::ShardFull, "x")).stale_if_gone();
        assert_eq!(errno(&full).code(), libc::ENOSPC);
    }
}
