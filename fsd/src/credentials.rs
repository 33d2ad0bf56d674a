//! What a caller has besides its user and group, which are all that a request names: told by /proc.

use std::fs;
use std::path::PathBuf;

/// Keep set-group-id bits of files of other groups.
pub const CAP_FSETID: u32 = 4;
/// See attributes of the namespace `trusted.`.
pub const CAP_SYS_ADMIN: u32 = 21;

/// A thread's supplementary groups and effective capabilities.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Credentials {
    groups: Vec<u32>,
    capabilities: u64,
}

impl Credentials {
    /// Of a thread that waits for an answer; `None` if it is in a PID namespace that is not seen from here.
    pub fn of(thread: u32) -> Option<Credentials> {
        let status = fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
        let mut credentials = Credentials::parse(&status)?;
        // Capabilities within a user namespace of its own are none over this mount.
        let namespace = |of: &str| -> Option<PathBuf> { fs::read_link(format!("/proc/{of}/ns/user")).ok() };
        let own = namespace("self");
        if own.is_none() || namespace(&thread.to_string()) != own {
            credentials.capabilities = 0;
        }
        Some(credentials)
    }

    fn parse(status: &str) -> Option<Credentials> {
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        let groups = field("Groups:")?.split_whitespace().map(|group| group.parse().ok());
        Some(Credentials {
            groups: groups.collect::<Option<_>>()?,
            capabilities: u64::from_str_radix(field("CapEff:")?.trim(), 16).ok()?,
        })
    }

    /// Whether a group is among the supplementary ones.
    pub fn is_in_group(&self, gid: u32) -> bool {
        self.groups.contains(&gid)
    }

    /// Whether it has a capability.
    pub fn has(&self, capability: u32) -> bool {
        self.capabilities & (1 << capability) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_and_capabilities_are_read() {
        let status = "Name:\tx\nGroups:\t4 27 1000 \nCapPrm:\t000001ffffffffff\nCapEff:\t0000000000200000\n";
        let some = Credentials::parse(status).unwrap();
        assert!(some.is_in_group(27) && some.is_in_group(1000) && !some.is_in_group(2));
        assert!(some.has(CAP_SYS_ADMIN) && !some.has(CAP_FSETID));
        let none = Credentials::parse("Groups:\t \nCapEff:\t0000000000000000\n").unwrap();
        assert!(!none.is_in_group(0) && !none.has(CAP_SYS_ADMIN));
        assert_eq!(Credentials::parse("Groups:\tx\nCapEff:\t0\n"), None);
        assert_eq!(Credentials::parse("Groups:\t1\n"), None);
    }

    #[test]
    fn a_living_thread_has_credentials() {
        let own = Credentials::of(std::process::id()).unwrap();
        let status = fs::read_to_string("/proc/self/status").unwrap();
        assert_eq!(Some(own), Credentials::parse(&status));
        assert_eq!(Credentials::of(u32::MAX), None);
    }
}
