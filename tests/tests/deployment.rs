//! DEPLOYMENT.md followed to the letter: the calls of `shardfs` in it, in their order, on a cluster on an emulated AWS.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::time::Duration;

use shardfs_tests::Cluster;
use shardfs_tests::aws::Aws;
use shardfs_tests::cluster::eventually;
use shardfs_tests::volumes::{is_served, may_enlarge};

/// Where the part begins that is followed, of those who run on AWS.
const FROM: &str = "## Step by step: AWS";
/// The disk in the document.
const DISK: &str = "vol-0a1b2c3d4e5f60718";
/// The backup in the document.
const BACKUP: &str = "20261129T195900Z-1f3a5c7e9b2d4f60";
/// How long a command may find no success: what the one before it began goes on.
const PATIENCE: Duration = Duration::from_secs(90);

/// What cannot be followed here, by how it begins, and why.
const LEFT_OUT: [(&str, &str); 6] = [
    ("shardfs doctor", "an emulated disk is a loop device, which has no reservations"),
    ("shardfs volume attach vol-1 node-4", "the document's node-4 has joined since; here there are three"),
    (
        "shardfs backup restore 20261129T195900Z-1f3a5c7e9b2d4f60 --in-place",
        "the volume is served here: another test restores one that is lost",
    ),
    ("shardfs volume delete vol-9", "its shards are not deleted before"),
    ("shardfs volume grow vol-1", "of kind device, which somebody else has enlarged before"),
    ("shardfs volume add vol-3 --kind device", "of those who run on machines of their own"),
];

/// The calls of `shardfs` in the blocks of shell commands behind a heading.
fn calls(text: &str) -> Vec<String> {
    let (mut inside, mut goes_on) = (false, false);
    let mut lines: Vec<String> = Vec::new();
    for line in text[text.find(FROM).unwrap()..].lines() {
        if line.starts_with("```") {
            inside = line == "```sh";
        } else if inside {
            let part = line.split(" #").next().unwrap().trim_end_matches('\\');
            match lines.last_mut().filter(|_| goes_on) {
                Some(last) => last.push_str(part),
                None => lines.push(part.trim().to_owned()),
            }
            goes_on = line.ends_with('\\');
        }
    }
    lines.into_iter().filter(|line| line.starts_with("shardfs ")).collect()
}

#[test]
fn the_deployment_guide_can_be_followed_on_aws() {
    let guide = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("DEPLOYMENT.md");
    let aws = Aws::start(3);
    let cluster = Cluster::start(&aws.options("dir"));
    // The cluster begins with folders, which make way; and with a disk that nobody uses, as the template makes them.
    for volume in ["vol-1", "vol-2", "vol-3"] {
        cluster.cli_run(&["volume", "delete", volume, "--keep"]);
    }
    cluster.cli_run(&["volume", "add", "vol-1", "--kind", "aws", "--size", "8GiB", "--nodes", "node-1"]);
    is_served(&cluster, "vol-1");
    cluster.cli_run(&["volume", "delete", "vol-1", "--keep"]);
    let made = aws.ec2.volumes();
    let [disk] = &made[..] else { panic!("{made:?}") };
    let mut followed = Vec::new();
    for call in calls(&fs::read_to_string(guide).unwrap()) {
        if LEFT_OUT.iter().any(|(begins, _)| call.starts_with(begins)) {
            continue;
        }
        // Without the right to do it, what cannot be done is refused: another test looks at that.
        if call.contains("volume grow") && !may_enlarge() {
            continue;
        }
        if call.contains(" test") && !followed.iter().any(|call: &String| call.contains(" test")) {
            cluster.shard("test");
        }
        let backup = match call.contains(BACKUP) {
            false => String::new(),
            true => cluster.cli_json(&["backup", "list"])[0]["id"].as_str().unwrap().to_owned(),
        };
        let own = |word: &str| word.replace(DISK, &disk.id).replace(BACKUP, &backup);
        let words: Vec<String> = call.split_whitespace().skip(1).map(own).collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        eventually(PATIENCE, || {
            let output = cluster.cli_output(&words);
            if output.status.success() {
                Ok(())
            } else {
                Err(format!("{call}: {}", String::from_utf8_lossy(&output.stderr)))
            }
        });
        if let Some(volume) = call.strip_prefix("shardfs volume add ") {
            is_served(&cluster, volume.split_whitespace().next().unwrap());
        }
        followed.push(call);
    }
    println!("{}", followed.join("\n"));
    assert!(followed.len() >= 12, "{followed:#?}");
    for word in [
        "--kind aws",
        "volume iops",
        "volume strays",
        "volume delete",
        "backup verify",
        "backup restore",
        "volume policy",
        "node drain",
        "volume promote",
        "fsck",
    ] {
        assert!(followed.iter().any(|call| call.contains(word)), "{word}: {followed:#?}");
    }
    // What was moved last is on its way for a moment.
    eventually(PATIENCE, || {
        let status = cluster.cli_json(&["status"]);
        if status["healthy"] == true { Ok(()) } else { Err(status["troubles"].to_string()) }
    });
}
