//! The kernel's version, and what ShardFS does without on older ones.

use super::Check;

/// Loop devices with a block size and direct I/O in one call (LOOP_CONFIGURE), EXT4_IOC_CHECKPOINT.
const OLDEST: Version = Version(5, 15);
/// From here on a filesystem that was shut down writes nothing when it is unmounted.
const QUIET_UNMOUNT: Version = Version(6, 15);
/// From here on the kernel reads the keys of reservations.
const READS_KEYS: Version = Version(6, 19);

/// A kernel's version.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Version(u32, u32);

fn parse(release: &str) -> Option<Version> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some(Version(numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Looks.
pub fn check() -> Check {
    judge(&rustix::system::uname().release().to_string_lossy())
}

fn judge(release: &str) -> Check {
    const NAME: &str = "kernel";
    let Some(version) = parse(release) else {
        return Check::warn(
            NAME,
            format!("Linux {release}: a version that cannot be read"),
            "see that it is 5.15 or later",
        );
    };
    if version < OLDEST {
        return Check::fail(NAME, format!("Linux {release}"), "use Linux 5.15 or later");
    }
    let mut without = Vec::new();
    if version < QUIET_UNMOUNT {
        without.push("a fenced mount of a loop volume stays until the machine restarts (6.15)");
    }
    if version < READS_KEYS {
        without.push("who holds a reservation is found by trying known predecessors (6.19)");
    }
    if without.is_empty() {
        return Check::ok(NAME, format!("Linux {release}"));
    }
    // Nothing that has to be mended: the fences hold.
    Check::ok(NAME, format!("Linux {release}; {}", without.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Outcome;

    #[test]
    fn versions_are_judged() {
        for (release, outcome, said) in [
            ("5.10.0-28-amd64", Outcome::Fail, "5.10"),
            ("5.15.0", Outcome::Ok, "6.15"),
            ("6.1.0-56-cloud-amd64", Outcome::Ok, "6.19"),
            ("6.18.3", Outcome::Ok, "predecessors"),
            ("6.19.0-rc1", Outcome::Ok, "6.19"),
            ("7.0", Outcome::Ok, "7.0"),
            ("strange", Outcome::Warn, "strange"),
        ] {
            let check = judge(release);
            assert_eq!(check.outcome, outcome, "{check:?}");
            assert!(check.detail.contains(said), "{check:?}");
        }
        assert!(!judge("6.19.0").detail.contains("predecessors"));
        assert!(!judge("6.18.0").detail.contains("restarts"));
    }
}
