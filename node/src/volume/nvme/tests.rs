//! The finder against made-up trees, and what RESCAP means.

use std::os::unix::fs::symlink;

use shardfs_proto::types::Reason;

use super::*;

const ID: &str = "vol-0a1b2c3d4e5f60718";
const SERIAL: &str = "vol0a1b2c3d4e5f60718";
const OTHER: &str = "vol0ffffffffffffffff";

struct Tree {
    root: tempfile::TempDir,
}

impl Tree {
    fn new() -> Tree {
        let tree = Tree { root: tempfile::tempdir().unwrap() };
        for folder in ["dev", "by-id", "sys/class/nvme", "sys/class/block"] {
            fs::create_dir_all(tree.at(folder)).unwrap();
        }
        tree
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    fn dev(&self, name: &str) -> PathBuf {
        fs::canonicalize(self.at("dev")).unwrap().join(name)
    }

    fn device(&self, name: &str) {
        fs::write(self.at("dev").join(name), "").unwrap();
    }

    /// A controller with what stands in its folder of sysfs; the kernel pads serials with blanks.
    fn controller(&self, name: &str, serial: &str, holds: &[&str]) {
        let at = self.at("sys/class/nvme").join(name);
        fs::create_dir_all(&at).unwrap();
        fs::write(at.join("serial"), format!("{serial}  \n")).unwrap();
        for inner in holds {
            fs::create_dir_all(at.join(inner)).unwrap();
        }
    }

    /// A block device with the serial of the controller or subsystem that it belongs to.
    fn block(&self, name: &str, serial: &str) {
        self.device(name);
        let of = self.at("sys/class/block").join(name).join("device");
        fs::create_dir_all(&of).unwrap();
        fs::write(of.join("serial"), format!("{serial}\n")).unwrap();
    }

    /// A controller with one namespace, without multipath.
    fn disk(&self, number: u32, serial: &str) {
        let name = format!("nvme{number}n1");
        self.controller(
            &format!("nvme{number}"),
            serial,
            &[&name, &format!("ng{number}n1"), "hwmon0", "power"],
        );
        self.block(&name, serial);
    }

    fn link(&self, serial: &str, to: &str) {
        let link = self.at("by-id").join(format!("nvme-Amazon_Elastic_Block_Store_{serial}"));
        symlink(Path::new("../dev").join(to), link).unwrap();
    }

    fn links(&self) -> Links {
        Links::with_roots(self.at("by-id"), self.at("sys"), self.dev(""))
    }

    fn found(&self) -> Option<PathBuf> {
        self.links().find(&id()).unwrap()
    }

    fn refused(&self) -> String {
        let error = self.links().wait_for(&id(), Duration::ZERO).unwrap_err();
        assert_eq!(error.reason(), Reason::NotFound);
        error.to_string()
    }
}

fn id() -> DiskId {
    DiskId::new(ID).unwrap()
}

#[test]
fn a_link_leads_to_the_device() {
    let tree = Tree::new();
    tree.disk(0, OTHER);
    tree.disk(1, SERIAL);
    tree.link(SERIAL, "nvme1n1");
    assert_eq!(tree.found(), Some(tree.dev("nvme1n1")));
    assert_eq!(tree.links().wait_for(&id(), Duration::ZERO).unwrap(), tree.dev("nvme1n1"));
}

#[test]
fn without_a_link_the_serial_is_looked_for() {
    let tree = Tree::new();
    for (number, serial) in [(0, "vol0000000000000001"), (1, OTHER), (2, SERIAL), (10, "AWS12345")] {
        tree.disk(number, serial);
    }
    assert_eq!(tree.found(), Some(tree.dev("nvme2n1")));
    // A longer or shorter serial is another one.
    let tree = Tree::new();
    tree.disk(0, &format!("{SERIAL}0"));
    tree.disk(1, &SERIAL[..SERIAL.len() - 1]);
    assert_eq!(tree.found(), None);
}

#[test]
fn a_stale_link_is_not_believed() {
    let tree = Tree::new();
    tree.disk(1, OTHER);
    tree.disk(2, SERIAL);
    tree.link(SERIAL, "nvme1n1");
    assert_eq!(tree.found(), Some(tree.dev("nvme2n1")));

    let tree = Tree::new();
    tree.disk(1, OTHER);
    tree.link(SERIAL, "nvme1n1");
    assert_eq!(tree.found(), None);
    let said = tree.refused();
    assert!(said.contains(OTHER) && said.contains("lsblk -o NAME,SERIAL"), "{said}");

    // Nothing says what it is.
    let tree = Tree::new();
    tree.device("nvme1n1");
    tree.link(SERIAL, "nvme1n1");
    assert_eq!(tree.found(), None);
}

#[test]
fn a_link_to_a_loop_device_is_believed() {
    let tree = Tree::new();
    tree.device("loop7");
    tree.link(SERIAL, "loop7");
    assert_eq!(tree.found(), Some(tree.dev("loop7")));
}

#[test]
fn partitions_and_other_devices_are_never_found() {
    for wrong in ["nvme1n1p1", "loop7p1", "loop", "sda", "nvme0c0n1", "nvme1"] {
        let tree = Tree::new();
        tree.block(wrong, SERIAL);
        tree.link(SERIAL, wrong);
        assert_eq!(tree.found(), None, "{wrong}");
        assert!(tree.refused().contains(wrong), "{wrong}");
    }
    // A link to a partition is not asked for, and a folder of one is no namespace.
    let tree = Tree::new();
    tree.block("nvme1n1p1", SERIAL);
    tree.link(&format!("{SERIAL}-part1"), "nvme1n1p1");
    tree.controller("nvme1", SERIAL, &["nvme1n1p1"]);
    assert_eq!(tree.found(), None);
}

#[test]
fn with_the_kernels_multipath_the_subsystems_device_is_it() {
    // The controller is the third, the subsystem the first; the path has no device of its own.
    let tree = Tree::new();
    tree.controller("nvme2", SERIAL, &["nvme0c2n1", "ng0n1"]);
    tree.block("nvme0n1", SERIAL);
    assert_eq!(tree.found(), Some(tree.dev("nvme0n1")));
    // Two paths, one device.
    tree.controller("nvme3", SERIAL, &["nvme0c3n1"]);
    assert_eq!(tree.found(), Some(tree.dev("nvme0n1")));
    // Its device is not there yet, and the name is another disk's.
    let tree = Tree::new();
    tree.controller("nvme2", SERIAL, &["nvme0c2n1"]);
    assert_eq!(tree.found(), None);
    tree.block("nvme0n1", OTHER);
    assert_eq!(tree.found(), None);
}

#[test]
fn two_disks_of_one_serial_are_an_error() {
    let tree = Tree::new();
    tree.disk(1, SERIAL);
    tree.disk(2, SERIAL);
    let error = tree.links().find(&id()).unwrap_err();
    assert!(error.message().contains("nvme1n1") && error.message().contains("nvme2n1"), "{error}");
}

#[test]
fn a_link_that_leads_nowhere_is_as_none() {
    let tree = Tree::new();
    tree.link(SERIAL, "nvme1n1");
    assert_eq!(tree.found(), None);
    tree.disk(3, SERIAL);
    assert_eq!(tree.found(), Some(tree.dev("nvme3n1")));
}

#[test]
fn where_there_is_nothing_it_says_so() {
    let tree = Tree::new();
    let said = tree.refused();
    for words in [ID, SERIAL, "attached", "Nitro", "lsblk", "by-id"] {
        assert!(said.contains(words), "{words}: {said}");
    }
    // A machine without any NVMe.
    let none = Links::with_roots("/no-such/by-id", "/no-such/sys", "/no-such/dev");
    assert_eq!(none.find(&id()).unwrap(), None);
    // A controller whose namespace is not there yet.
    tree.controller("nvme1", SERIAL, &[]);
    assert!(tree.refused().contains("no block device"));
}

#[test]
fn it_waits_until_the_device_comes() {
    let tree = Tree::new();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| tree.links().wait_for(&id(), Duration::from_secs(30)));
        std::thread::sleep(Duration::from_millis(50));
        // The controller comes last, as a whole.
        tree.block("nvme4n1", SERIAL);
        let at = tree.at("sys/class/nvme-4");
        fs::create_dir_all(at.join("nvme4n1")).unwrap();
        fs::write(at.join("serial"), SERIAL).unwrap();
        fs::rename(at, tree.at("sys/class/nvme/nvme4")).unwrap();
        assert_eq!(waiting.join().unwrap().unwrap(), tree.dev("nvme4n1"));
    });
}

#[test]
fn names_are_told_apart() {
    assert_eq!(block_device("nvme0n1").as_deref(), Some("nvme0n1"));
    assert_eq!(block_device("nvme12c3n45").as_deref(), Some("nvme12n45"));
    for none in [
        "nvme",
        "nvme0",
        "nvme0n",
        "nvmen1",
        "nvme0n1p1",
        "ng0n1",
        "nvme0c1",
        "nvme0cn1",
        "xnvme0n1",
        "nvme0n1 ",
    ] {
        assert_eq!(block_device(none), None, "{none}");
    }
    assert!(is_namespace("nvme0n1") && !is_namespace("nvme0c0n1"));
}

#[test]
fn capabilities_are_read_and_named() {
    let mut identified = [0xFF; sys::IDENTIFY_BYTES];
    identified[31] = 0b1000_0011;
    let offered = Rescap(rescap_in(&identified));
    assert!(offered.persists() && offered.write_exclusive() && offered.ignores_existing_key());
    assert_eq!(
        offered.offered(),
        ["Persist Through Power Loss", "Write Exclusive", "Ignore Existing Key as of NVMe 1.3"]
    );
    let mut identified = [0; sys::IDENTIFY_BYTES];
    assert!(Rescap(rescap_in(&identified)).is_none());
    identified[31] = 0x7C;
    let without = Rescap(rescap_in(&identified));
    assert!(!without.is_none() && !without.persists() && !without.write_exclusive());
    assert_eq!(without.offered().len(), 5);
    assert_eq!(Rescap(0xFF).offered().len(), 8);
}

#[test]
fn what_is_no_nvme_has_no_capabilities() {
    assert_eq!(rescap(Path::new("/dev/null")).unwrap(), None);
    assert!(rescap(Path::new("/no-such-device")).is_err());
}
