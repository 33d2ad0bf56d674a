//! Mount options, as `-o` and fstab write them: words between commas.
//!
//! Some are the kernel's (`ro`, `nosuid`), some are mount(8)'s own business and mean nothing here
//! (`noauto`, `_netdev`), the rest are settings of the daemon. One that is none of them is refused by name.

use anyhow::{Result, bail};
use rustix::mount::MountFlags;

/// What the options come to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MountOptions {
    /// For mount(2). Without `suid` and `dev`, set-id bits and devices have no effect.
    pub flags: MountFlags,
    /// `allow_other`, if given.
    pub allow_other: bool,
    /// Another mount's flags are to change; the daemon's settings stay as they are.
    pub remount: bool,
    /// What mount(8) shows as the source.
    pub source: Option<String>,
    /// Settings of the daemon by name, in the order given.
    pub settings: Vec<(String, String)>,
}

/// The daemon's settings that can be given as options. Names are those of the flags, with `_` for `-`.
pub const SETTINGS: [&str; 18] = [
    "endpoints",
    "client_id",
    "config",
    "deadline",
    "connect_timeout",
    "attr_ttl",
    "entry_ttl",
    "read_from",
    "max_staleness",
    "readdirplus",
    "locks",
    "threads",
    "read_ahead_kib",
    "root_mode",
    "http",
    "log_file",
    "log_level",
    "log_format",
];

/// Reads options; `sloppy`: unknown ones are passed over, as mount(8) -s asks.
pub fn parse<'a>(options: impl IntoIterator<Item = &'a str>, sloppy: bool) -> Result<MountOptions> {
    let mut found = MountOptions {
        flags: MountFlags::NOSUID | MountFlags::NODEV,
        allow_other: false,
        remount: false,
        source: None,
        settings: Vec::new(),
    };
    for option in options.into_iter().flat_map(|words| words.split(',')).map(str::trim) {
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (option, None),
        };
        match (name, value) {
            ("", None) => {}
            ("ro", None) => found.flags.insert(MountFlags::RDONLY),
            ("rw", None) => found.flags.remove(MountFlags::RDONLY),
            ("nosuid", None) => found.flags.insert(MountFlags::NOSUID),
            ("suid", None) => found.flags.remove(MountFlags::NOSUID),
            ("nodev", None) => found.flags.insert(MountFlags::NODEV),
            ("dev", None) => found.flags.remove(MountFlags::NODEV),
            ("noexec", None) => found.flags.insert(MountFlags::NOEXEC),
            ("exec", None) => found.flags.remove(MountFlags::NOEXEC),
            ("sync", None) => found.flags.insert(MountFlags::SYNCHRONOUS),
            ("async", None) => found.flags.remove(MountFlags::SYNCHRONOUS),
            ("dirsync", None) => found.flags.insert(MountFlags::DIRSYNC),
            ("noatime", None) => found.flags.insert(MountFlags::NOATIME),
            ("nodiratime", None) => found.flags.insert(MountFlags::NODIRATIME),
            ("allow_other", None) => found.allow_other = true,
            ("remount", None) => found.remount = true,
            ("fsname", Some(source)) => found.source = Some(source.to_owned()),
            ("subtype", Some("shardfs")) => {}
            (name, Some(_)) if SHOWN_BY_THE_KERNEL.contains(&name) => {}
            (name, None) if WITHOUT_EFFECT.contains(&name) => {}
            (name, _) if ["x-", "X-", "comment"].iter().any(|prefix| name.starts_with(prefix)) => {}
            ("allow_root", None) => bail!("mount option allow_root is not supported; use allow_other"),
            ("auto_unmount", None) => bail!(
                "mount option auto_unmount is not supported: a daemon that dies is started again at the same place"
            ),
            // NFS's names.
            ("hard" | "soft", None) => found.settings.push(("deadline".into(), name.into())),
            ("soft", Some(value)) if value.parse::<f64>().is_ok() => {
                found.settings.push(("deadline".into(), value.into()));
            }
            // libfuse's names.
            ("attr_timeout", Some(value)) => found.settings.push(("attr_ttl".into(), value.into())),
            ("entry_timeout", Some(value)) => found.settings.push(("entry_ttl".into(), value.into())),
            (name, Some(value)) if SETTINGS.contains(&name) => {
                found.settings.push((name.to_owned(), value.to_owned()));
            }
            (name, None) if SETTINGS.contains(&name) => {
                bail!("mount option {name} needs a value: {name}=...")
            }
            _ if sloppy => {}
            _ => bail!(
                "mount option {option:?} is not known; the daemon's own are {}=..., beside ro, suid, dev, noexec, \
                 sync, dirsync, noatime, allow_other, hard, soft and soft=SECONDS",
                SETTINGS.join("=..., ")
            ),
        }
    }
    Ok(found)
}

/// Options of mount(8), and those that ask for what is so anyway. Access times are never written for reads.
const WITHOUT_EFFECT: [&str; 23] = [
    "defaults",
    "auto",
    "noauto",
    "user",
    "nouser",
    "users",
    "owner",
    "group",
    "_netdev",
    "nofail",
    "default_permissions",
    "nonempty",
    "atime",
    "diratime",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
    "lazytime",
    "nolazytime",
    "silent",
    "loud",
    "intr",
];

/// What the kernel says of a FUSE mount: mount(8) repeats it for a remount.
const SHOWN_BY_THE_KERNEL: [&str; 4] = ["user_id", "group_id", "max_read", "blksize"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_all_three_kinds_are_read() {
        let options = ["rw,noatime,_netdev,x-systemd.automount,comment=hi", "client_id=a,dev,,sync"];
        let found = parse(options, false).unwrap();
        let flags = MountFlags::NOSUID | MountFlags::NOATIME | MountFlags::SYNCHRONOUS;
        assert_eq!(found.flags, flags);
        assert_eq!(found.settings, [("client_id".to_owned(), "a".to_owned())]);
        assert!(!found.allow_other);
    }

    #[test]
    fn the_last_word_counts() {
        assert!(parse(["ro,rw"], false).unwrap().flags == MountFlags::NOSUID | MountFlags::NODEV);
        assert!(parse(["rw,ro"], false).unwrap().flags.contains(MountFlags::RDONLY));
    }

    #[test]
    fn set_id_bits_and_devices_are_off_unless_asked_for() {
        assert_eq!(parse([], false).unwrap().flags, MountFlags::NOSUID | MountFlags::NODEV);
        assert_eq!(parse(["suid,dev"], false).unwrap().flags, MountFlags::empty());
    }

    #[test]
    fn what_is_not_known_is_named() {
        for (bad, words) in [
            ("colour=red", "colour=red"),
            ("ro=1", "ro=1"),
            ("client_id", "needs a value"),
            ("allow_root", "allow_other"),
            ("subtype=x", "subtype=x"),
            ("soft=hard", "soft=hard"),
            ("hard=2", "hard=2"),
        ] {
            let error = parse([bad], false).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        assert!(parse(["colour=red"], true).is_ok());
    }

    #[test]
    fn the_names_of_nfs_are_understood() {
        let deadline = |option| parse([option], false).unwrap().settings;
        assert_eq!(deadline("hard"), [("deadline".to_owned(), "hard".to_owned())]);
        assert_eq!(deadline("soft"), [("deadline".to_owned(), "soft".to_owned())]);
        assert_eq!(deadline("soft=2.5"), [("deadline".to_owned(), "2.5".to_owned())]);
    }

    #[test]
    fn a_remount_has_what_the_kernel_shows() {
        let shown = "ro,nosuid,nodev,relatime,remount,user_id=0,group_id=0,default_permissions,allow_other";
        let found = parse([shown], false).unwrap();
        assert!(found.remount && found.flags == MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV);
        assert!(!parse(["ro"], false).unwrap().remount);
    }

    #[test]
    fn the_names_of_libfuse_are_understood() {
        let found = parse(["attr_timeout=1.5,fsname=x,subtype=shardfs,allow_other"], false).unwrap();
        assert_eq!(found.settings, [("attr_ttl".to_owned(), "1.5".to_owned())]);
        assert_eq!(found.source.as_deref(), Some("x"));
        assert!(found.allow_other);
    }
}
