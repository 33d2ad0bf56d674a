//! Clusters whose nodes are instances of an emulated AWS: each node is told of an instance of its own.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::cluster::{Cluster, Options, bin_dir, eventually};
use crate::ec2::{self, Ec2, Instance, Volume};
use crate::volumes::{SERVED_MAX, find};

/// The name of the clusters in their tags.
pub const CLUSTER: &str = "test";
/// What a GiB of a volume takes.
pub const BYTES_PER_GIB: u64 = 64 << 20;
/// The zone of all instances.
pub const ZONE: &str = "us-east-1a";

/// An emulated AWS with instances for `node-1`...
pub struct Aws {
    /// The emulator.
    pub ec2: Ec2,
    /// The instances, that of `node-1` first.
    pub instances: Vec<Instance>,
    folder: tempfile::TempDir,
}

impl Aws {
    /// With so many instances.
    pub fn start(nodes: usize) -> Aws {
        let ec2 = Ec2::start(ec2::Options { bytes_per_gib: BYTES_PER_GIB, ..ec2::Options::default() });
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let program = folder.path().join("shardfs-node");
        let script = format!(
            "#!/bin/bash\n# Tells a node which instance it is.\nset -eu\nid=\nfor ((i = 1; i < $#; i++)); do\n    if [ \"${{!i}}\" = --id ]; then \
             j=$((i + 1)) && id=${{!j}}; fi\ndone\nset -a\n. {}/\"$id\"\nexec {}/shardfs-node \"$@\"\n",
            folder.path().display(),
            bin_dir().display(),
        );
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let mut aws = Aws { ec2, instances: Vec::new(), folder };
        for _ in 0..nodes {
            let instance = aws.ec2.instance(ZONE, "r6i.large");
            aws.instances.push(instance.clone());
            aws.tell(aws.instances.len(), &instance);
        }
        aws
    }

    fn tell(&self, node: usize, instance: &Instance) {
        let facts = format!(
            "SHARDFS_AWS_CLUSTER={CLUSTER}\nAWS_ENDPOINT_URL_EC2={}\nAWS_EC2_METADATA_SERVICE_ENDPOINT={}\nSHARDFS_DEVICE_LINKS={}\n",
            self.ec2.endpoint(),
            instance.imds,
            instance.links.display(),
        );
        fs::write(self.folder.path().join(format!("node-{node}")), facts).unwrap();
    }

    /// Another instance for a node, from its next start on; answers the one that it had.
    pub fn replace(&mut self, node: usize) -> Instance {
        let fresh = self.ec2.instance(ZONE, "r6i.large");
        self.tell(node, &fresh);
        std::mem::replace(&mut self.instances[node - 1], fresh)
    }

    /// For `dev up`.
    pub fn options(&self, volumes: &'static str) -> Options {
        Options {
            nodes: u32::try_from(self.instances.len()).unwrap(),
            volumes,
            volume_bytes: (volumes == "aws").then_some(16 << 30),
            environment: vec![(
                "SHARDFS_NODE_BIN",
                self.folder.path().join("shardfs-node").display().to_string(),
            )],
        }
    }

    /// The disk of a volume.
    pub fn disk(&self, cluster: &Cluster, volume: &str) -> Volume {
        let id = find(cluster, volume).unwrap()["source"].as_str().unwrap().to_owned();
        self.ec2.volume(&id).unwrap_or_else(|| panic!("{volume} is {id}, which is not there"))
    }

    /// Waits until exactly the instances of these nodes have the disk of a volume.
    pub fn wait_for_attachments(&self, cluster: &Cluster, volume: &str, nodes: &[usize]) {
        let mut wanted: Vec<&str> = nodes.iter().map(|node| self.instances[node - 1].id.as_str()).collect();
        wanted.sort_unstable();
        eventually(SERVED_MAX, || {
            let disk = self.disk(cluster, volume);
            let mut has: Vec<&str> = disk.attachments.iter().map(|a| a.instance.as_str()).collect();
            has.sort_unstable();
            if has == wanted { Ok(()) } else { Err(format!("{volume}: {:?}", disk.attachments)) }
        });
    }

    /// The backing file of a volume's disk.
    pub fn backing_file(&self, cluster: &Cluster, volume: &str) -> PathBuf {
        self.ec2.backing_file(&self.disk(cluster, volume).id)
    }

    /// Where nodes are told which instance they are.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}
