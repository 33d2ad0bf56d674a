//! `shardfs doctor` on this machine: what it finds, what it prints, what it leaves alone.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;
use shardfs_tests::cluster::{bin_dir, eventually};
use shardfs_tests::etcd::Etcd;
use shardfs_tests::sh;

/// Members of an etcd have found each other within this.
const SETTLED_MAX: Duration = Duration::from_secs(60);

fn doctor(arguments: &[&str]) -> Output {
    Command::new(bin_dir().join("shardfs"))
        .arg("doctor")
        .args(arguments)
        .stdin(Stdio::null())
        .env("NO_COLOR", "1")
        .output()
        .unwrap()
}

/// The checks of an answer in JSON, after its exit code was compared with what it says.
fn checks(arguments: &[&str]) -> Vec<Value> {
    let output = doctor(&[arguments, &["--json"]].concat());
    let said: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)));
    let failed = said["checks"].as_array().unwrap().iter().any(|check| check["outcome"] == "fail");
    assert_eq!(said["fit"], !failed, "{said:#}");
    assert_eq!(output.status.code(), Some(i32::from(failed)), "{said:#}");
    said["checks"].as_array().unwrap().clone()
}

fn find<'a>(checks: &'a [Value], name: &str) -> &'a Value {
    checks.iter().find(|check| check["check"] == name).unwrap_or_else(|| panic!("{name} in {checks:#?}"))
}

/// A loop device over a file in a folder, detached when it is dropped.
struct Loop(PathBuf);

impl Loop {
    fn new(folder: &Path, bytes: u64) -> Loop {
        File::create(folder.join("disk")).unwrap().set_len(bytes).unwrap();
        Loop(sh(folder, "losetup --find --show disk").trim().into())
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = Command::new("losetup").arg("--detach").arg(&self.0).status();
        if !detached.is_ok_and(|status| status.success()) {
            eprintln!("cleaning up: {} stays", self.0.display());
        }
    }
}

#[test]
fn this_machine_is_looked_at() {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let place = folder.path().to_str().unwrap();
    let found = checks(&["--folder", place]);
    // Whoever runs these tests has all of this.
    for name in [
        "kernel",
        "/dev/fuse",
        "loop devices",
        "mkfs.ext4",
        "ext4 on loop",
        "ext4 shutdown",
        "boot clock",
        "disk sync",
    ] {
        assert_eq!(find(&found, name)["outcome"], "ok", "{name}: {found:#?}");
    }
    assert_eq!(find(&found, "metadata store")["outcome"], "skipped");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "it leaves nothing behind");
    assert!(!sh("/", "losetup --list --output BACK-FILE").contains(place));

    let output = doctor(&["--folder", place]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}");
    assert!(text.contains("CHECK") && text.contains("this machine is fit"), "{text}");

    let missing = checks(&["--folder", "/no/such/folder"]);
    assert_eq!(find(&missing, "disk sync")["outcome"], "fail");
    assert!(!find(&missing, "disk sync")["advice"].as_str().unwrap().is_empty());
}

#[test]
fn devices_are_looked_at_and_left_alone() {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let device = Loop::new(folder.path(), 80 << 20);
    let found = checks(&["--device", device.path()]);
    assert_eq!(find(&found, device.path())["detail"], "80 MiB, empty");
    let reservations = find(&found, &format!("{} reservations", device.path()));
    assert_eq!(reservations["outcome"], "fail", "a loop device has none: {reservations:#}");
    assert!(reservations["advice"].as_str().unwrap().contains("--allow-unfenced"));

    // A path is no second path to itself, and nothing is tried on what holds something or is in use.
    let same = checks(&["--device", device.path(), "--second-path", device.path()]);
    assert!(find(&same, "two paths")["detail"].as_str().unwrap().contains("one path"));
    sh(folder.path(), &format!("mkfs.ext4 -q -L mine {} && mkdir mnt", device.path()));
    let before = sh(folder.path(), "sha256sum disk");
    let other_folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let other = Loop::new(other_folder.path(), 80 << 20);
    let held = checks(&["--device", device.path(), "--second-path", other.path()]);
    let refused = find(&held, "two paths")["detail"].as_str().unwrap();
    assert!(refused.contains("mine") && refused.contains("not tried"), "{refused}");
    assert_eq!(sh(folder.path(), "sha256sum disk"), before);
    sh(folder.path(), &format!("mount {} mnt", device.path()));
    let mounted = checks(&["--device", device.path(), "--second-path", other.path(), "--force"]);
    sh(folder.path(), "umount mnt");
    let refused = find(&mounted, "two paths")["detail"].as_str().unwrap();
    assert!(refused.contains("is mounted at"), "{refused}");

    let file = folder.path().join("disk");
    let wrong = checks(&["--device", file.to_str().unwrap()]);
    assert!(find(&wrong, file.to_str().unwrap())["detail"].as_str().unwrap().contains("no block device"));
}

#[test]
fn an_etcd_is_asked() {
    let etcd = Etcd::start();
    let found = checks(&["--meta", &etcd.address()]);
    for name in ["metadata store", "etcd version", "etcd room"] {
        assert_eq!(find(&found, name)["outcome"], "ok", "{found:#?}");
    }
    assert!(find(&found, "etcd room")["detail"].as_str().unwrap().contains("of its quota of 2.0 GiB"));
    let found = checks(&["--meta", "etcd://127.0.0.1:1"]);
    let store = find(&found, "metadata store");
    assert_eq!(store["outcome"], "fail");
    assert!(store["advice"].as_str().unwrap().contains("endpoint health"));
}

#[test]
fn each_member_of_an_etcd_is_looked_at() {
    let mut etcd = Etcd::start_members(3, &[]);
    let address = etcd.address();
    let names: Vec<String> = address
        .trim_start_matches("etcd://")
        .split(',')
        .map(|member| format!("etcd member {member}"))
        .collect();
    let found = eventually(SETTLED_MAX, || {
        let found = checks(&["--meta", &address]);
        let well = names.iter().all(|name| find(&found, name)["outcome"] == "ok");
        if well { Ok(found) } else { Err(format!("{found:#?}")) }
    });
    for name in &names {
        let member = find(&found, name);
        assert!(member["detail"].as_str().unwrap().contains("version 3."), "{member:#}");
    }
    // With one dead it works: that it is not as it should be is said, and why.
    etcd.kill_member(1);
    // Its followers learn of a new leader one after the other.
    let found = eventually(SETTLED_MAX, || {
        let found = checks(&["--meta", &address]);
        let is_told = names.iter().enumerate().all(|(number, name)| {
            let expected = if number == 1 { "warn" } else { "ok" };
            find(&found, name)["outcome"] == expected
        });
        if is_told { Ok(found) } else { Err(format!("{found:#?}")) }
    });
    let dead = find(&found, &names[1]);
    assert!(dead["detail"].as_str().unwrap().contains("Connection refused"), "{dead:#}");
    assert!(dead["advice"].as_str().unwrap().contains("start it"), "{dead:#}");
    assert_eq!(find(&found, "metadata store")["outcome"], "ok", "{found:#?}");
    let output = doctor(&["--meta", &address]);
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("checks warn"), "{output:?}");
    // Members of two etcds in one address are no cluster.
    let stranger = Etcd::start();
    let both = format!("{address},{}", stranger.address().trim_start_matches("etcd://"));
    let found = checks(&["--meta", &both]);
    let name = format!("etcd member {}", stranger.address().trim_start_matches("etcd://"));
    let foreign = find(&found, &name);
    assert_eq!(foreign["outcome"], "fail", "{found:#?}");
    assert!(foreign["detail"].as_str().unwrap().contains("another etcd"), "{foreign:#}");
}

#[test]
fn what_keeps_an_etcd_from_being_used_is_said() {
    let etcd = Etcd::start();
    let folder = tempfile::tempdir().unwrap();
    sh(
        folder.path(),
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=ca \
         -keyout ca.key -out ca.pem",
    );
    let ca = folder.path().join("ca.pem");
    let address = etcd.address().replace("etcd://", "etcds://");
    let found = checks(&["--meta", &address, "--meta-ca-file", ca.to_str().unwrap()]);
    let name = format!("etcd member {}", address.trim_start_matches("etcds://"));
    for name in ["metadata store", name.as_str()] {
        let check = find(&found, name);
        assert!(check["detail"].as_str().unwrap().contains("write etcd:// instead"), "{check:#}");
    }
    assert_eq!(find(&found, "metadata store")["outcome"], "fail");
}
