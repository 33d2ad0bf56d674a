//! Programs of others that ShardFS runs, or that its operators will want.

use std::path::PathBuf;

use super::Check;

/// Folders that are not in every user's PATH.
const ALSO: [&str; 2] = ["/usr/sbin", "/sbin"];

/// Looks.
pub fn checks() -> Vec<Check> {
    [
        ("mkfs.ext4", true, "makes the filesystem of loop and device volumes", "e2fsprogs"),
        ("e2fsck", false, "mends a volume's filesystem after damage", "e2fsprogs"),
        (
            "mkfs.xfs",
            false,
            "makes a file system for backing files that can be copied in an instant",
            "xfsprogs",
        ),
    ]
    .into_iter()
    .map(|(name, needed, what_for, package)| match find(name) {
        Some(path) => Check::ok(name, path.display().to_string()),
        None => {
            let (detail, advice) = (format!("is missing: {what_for}"), format!("install {package}"));
            if needed { Check::fail(name, detail, advice) } else { Check::warn(name, detail, advice) }
        }
    })
    .collect()
}

/// A program in PATH or where the system's programs are.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(ALSO.iter().map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|candidate| rustix::fs::access(candidate, rustix::fs::Access::EXEC_OK).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found() {
        assert!(find("sh").is_some());
        assert_eq!(find("no-such-program-here"), None);
    }
}
