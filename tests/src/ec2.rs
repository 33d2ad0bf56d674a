//! An emulator of Amazon EC2, as far as volumes and their instances are concerned, and of the instance metadata service.
//!
//! It answers the AWS SDKs (the EC2 Query protocol), checks calls and lets states take time as EC2 does, fails as tests ask, and
//! gives every volume that is attached a loop device and a link like those in `/dev/disk/by-id`.
//!
//! - [`model`]: volumes, attachments, snapshots, instances;
//! - `query`, `xml`, `http`: the protocol;
//! - `state`: calls and time; `actions`, `describe`, `types`: what EC2 does and refuses;
//! - [`faults`]: what goes wrong;
//! - `blocks`: files and loop devices;
//! - `imds`: the metadata service.
//!
//! Drop it after the programs that use its devices: what is still open then is taken away by its guard, as if the test had ended.

mod actions;
mod blocks;
mod describe;
pub mod faults;
mod http;
mod imds;
pub mod model;
mod query;
mod state;
mod types;
mod xml;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

pub use faults::{Fault, Kind};
pub use model::{Attachment, AttachmentStatus, InstanceState, Power, Snapshot, Volume};
pub use state::{Call, Outcome};

use crate::guard::Guard;
use blocks::Blocks;
use model::Stage;
use state::State;

/// The role whose credentials instances have.
pub const ROLE: &str = "shardfs-node";
/// How often states are looked at.
const TICK: Duration = Duration::from_millis(5);

/// How an emulator is made.
#[derive(Clone, Debug)]
pub struct Options {
    /// Zones are this and a letter.
    pub region: String,
    /// What a GiB of a volume takes in its file.
    pub bytes_per_gib: u64,
    /// Size of the filesystem that holds the (sparse) files.
    pub disk_bytes: u64,
    /// Where the endpoints listen.
    pub listen: IpAddr,
    /// For faults that have a probability.
    pub seed: u64,
    /// How long states take.
    pub delays: Delays,
    /// How long after a modification the next is refused.
    pub modification_cooldown: Duration,
    /// The most that one page of a description holds, whether pages were asked for or not.
    pub page_limit: Option<usize>,
    /// How long the credentials of instances are good for.
    pub credentials_live: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            region: "us-east-1".to_owned(),
            bytes_per_gib: 1 << 30,
            disk_bytes: 16 << 30,
            listen: IpAddr::V4(Ipv4Addr::LOCALHOST),
            seed: 1,
            delays: Delays::all(Duration::from_millis(30)),
            modification_cooldown: Duration::ZERO,
            page_limit: None,
            credentials_live: Duration::from_secs(6 * 3600),
        }
    }
}

/// How long states take.
#[derive(Clone, Copy, Debug)]
pub struct Delays {
    /// `creating` to `available`.
    pub create: Duration,
    /// `attaching` to `attached`; then there is a loop device.
    pub attach: Duration,
    /// From `attached` until the link to the device is there.
    pub link: Duration,
    /// `detaching` until the attachment, the link and the loop device are gone.
    pub detach: Duration,
    /// `deleting` until the volume is gone.
    pub delete: Duration,
    /// `modifying` to `optimizing`; then the file has the new size.
    pub modify: Duration,
    /// From there until the devices have it.
    pub capacity: Duration,
    /// `optimizing` to `completed`.
    pub optimize: Duration,
    /// `pending` to `completed` of a snapshot.
    pub snapshot: Duration,
}

impl Delays {
    /// All the same.
    pub fn all(delay: Duration) -> Delays {
        Delays {
            create: delay,
            attach: delay,
            link: delay,
            detach: delay,
            delete: delay,
            modify: delay,
            capacity: delay,
            optimize: delay,
            snapshot: delay,
        }
    }
}

/// An emulator that runs in the test's process, in a thread of its own.
#[derive(Debug)]
pub struct Ec2 {
    shared: Arc<Shared>,
    root: PathBuf,
    address: SocketAddr,
    runtime: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    // Last: it removes what the others leave, also when the program ends without dropping anything.
    _guard: Guard,
}

/// An instance that was made.
#[derive(Clone, Debug)]
pub struct Instance {
    /// `i-` and 17 hexadecimal digits.
    pub id: String,
    /// Its `/dev/disk/by-id`.
    pub links: PathBuf,
    /// URL of its metadata service.
    pub imds: String,
    /// The access key that this gives it; faults can be set for it.
    pub access_key: String,
}

impl Instance {
    /// Where the link to a volume's device appears.
    pub fn link(&self, volume: &str) -> PathBuf {
        self.links.join(blocks::link_name(volume))
    }
}

/// What the endpoints and the test share.
#[derive(Debug)]
struct Shared(Mutex<State>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic of the emulator fails the test by what it does not answer; cleaning up must go on.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ec2 {
    /// Starts one; it listens when this returns.
    pub fn start(options: Options) -> Ec2 {
        let root = tempfile::Builder::new().prefix("shardfs-test-ec2.").tempdir().unwrap().keep();
        let guard = Guard::start(&root, Path::new("/nonexistent"), Path::new(""));
        let (listener, address) = http::bind(options.listen);
        let blocks = Blocks::new(&root, options.disk_bytes, options.bytes_per_gib);
        let shared = Arc::new(Shared(Mutex::new(State::new(options, blocks))));

        // In a thread that also drops it: a runtime may not be dropped where another runs.
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let handle = runtime.handle().clone();
        runtime.spawn(http::serve(listener, http::ec2(Arc::clone(&shared))));
        let (stop, stopped) = oneshot::channel();
        let clock = Arc::clone(&shared);
        let run = move || {
            runtime.block_on(async {
                let ticks = async {
                    loop {
                        tokio::time::sleep(TICK).await;
                        clock.lock().advance(Instant::now());
                    }
                };
                tokio::select! { _ = stopped => {}, () = ticks => {} }
            });
            runtime.shutdown_timeout(Duration::from_secs(10));
        };
        let thread = std::thread::Builder::new().name("ec2".to_owned()).spawn(run).unwrap();
        let (stop, thread) = (Some(stop), Some(thread));
        Ec2 { shared, root, address, runtime: handle, stop, thread, _guard: guard }
    }

    /// For `endpoint_url` of an SDK.
    pub fn endpoint(&self) -> String {
        url(self.address)
    }

    /// The port, for those who reach the machine by another address.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Makes an instance that runs; there is no limit to them, and nothing runs on it.
    pub fn instance(&self, zone: &str, instance_type: &str) -> Instance {
        let id = actions::new_id("i-");
        let links = self.root.join("instances").join(&id).join("by-id");
        std::fs::create_dir_all(&links).unwrap();
        let access_key = format!("ASIA{:016X}", fastrand::u64(..));
        let mut state = self.shared.lock();
        assert!(zone.starts_with(&state.options.region), "{zone} is not in {}", state.options.region);
        assert!(model::hypervisor(instance_type).is_some(), "{instance_type} is no type of an instance");
        state.add_instance(InstanceState {
            id: id.clone(),
            zone: zone.to_owned(),
            instance_type: instance_type.to_owned(),
            power: Power::Running,
            launched: SystemTime::now(),
            tags: model::Tags::new(),
            links: links.clone(),
            imds_answers: true,
            access_key: access_key.clone(),
        });
        let (listener, address) = http::bind(state.options.listen);
        self.runtime.spawn(http::serve(listener, imds::routes(Arc::clone(&self.shared), &id)));
        Instance { id, links, imds: url(address), access_key }
    }

    /// Makes a fault possible from now on.
    pub fn fault(&self, fault: Fault) {
        self.shared.lock().faults.add(fault);
    }

    /// No fault happens any more; what was stuck goes on.
    pub fn clear_faults(&self) {
        let mut state = self.shared.lock();
        state.faults.clear();
        faults::release(&mut state.world, Instant::now());
    }

    /// Changes how long states take that begin from now on.
    pub fn delays(&self, change: impl FnOnce(&mut Delays)) {
        change(&mut self.shared.lock().options.delays);
    }

    /// Whether the metadata service of an instance answers; it does at first.
    pub fn set_imds(&self, instance: &Instance, answers: bool) {
        self.change(instance, |state| state.imds_answers = answers);
    }

    /// All volumes that are there, in the order of their ids.
    pub fn volumes(&self) -> Vec<Volume> {
        self.current().world.volumes.values().cloned().collect()
    }

    /// A volume, if it is there.
    pub fn volume(&self, id: &str) -> Option<Volume> {
        self.current().world.volumes.get(id).cloned()
    }

    /// How many volumes were ever made.
    pub fn volumes_ever(&self) -> u64 {
        self.shared.lock().volumes_ever
    }

    /// All snapshots that are there, in the order of their ids.
    pub fn snapshots(&self) -> Vec<Snapshot> {
        self.current().world.snapshots.values().cloned().collect()
    }

    /// An instance as it is.
    pub fn instance_state(&self, instance: &Instance) -> InstanceState {
        self.shared.lock().world.instances[&instance.id].clone()
    }

    /// All calls that were signed, in their order.
    pub fn calls(&self) -> Vec<Call> {
        self.shared.lock().calls.clone()
    }

    /// The file of a volume or of a snapshot.
    pub fn backing_file(&self, id: &str) -> PathBuf {
        self.shared.lock().blocks.file(id)
    }

    /// The loop device of a volume at an instance, if there is one.
    pub fn device(&self, volume: &str, instance: &Instance) -> Option<PathBuf> {
        self.current().blocks.device(volume, &instance.id)
    }

    /// Loses the content of a volume, whose status is `error` from then on.
    pub fn destroy_backing_file(&self, volume: &str) {
        let mut state = self.current();
        let lost = state.world.volumes.get_mut(volume).unwrap_or_else(|| panic!("there is no {volume}"));
        (lost.stage, lost.due) = (Stage::Error, None);
        state.blocks.destroy(volume);
        state.changed(Instant::now());
    }

    /// Takes a volume's tags, as if it was made by hand.
    pub fn untag(&self, volume: &str) {
        let mut state = self.current();
        let untagged = state.world.volumes.get_mut(volume).unwrap_or_else(|| panic!("there is no {volume}"));
        untagged.tags.clear();
        state.changed(Instant::now());
    }

    /// Its devices go, and come again as others.
    pub fn reboot(&self, instance: &Instance) {
        self.stop(instance);
        self.boot(instance);
    }

    /// Its devices go; volumes stay attached.
    pub fn stop(&self, instance: &Instance) {
        self.change(instance, |state| state.power = Power::Stopped);
        self.shared.lock().blocks.unplug_all(&instance.id);
    }

    /// Starts one that was stopped.
    pub fn boot(&self, instance: &Instance) {
        self.change(instance, |state| state.power = Power::Running);
        let mut state = self.shared.lock();
        let State { world, blocks, options, .. } = &mut *state;
        let due = Instant::now() + options.delays.link;
        for volume in world.volumes.values().filter(|v| v.stage != Stage::Error) {
            if volume.attachment(&instance.id).is_some_and(|a| a.status != AttachmentStatus::Attaching) {
                blocks.plug(&volume.id, &instance.id, &instance.links, due);
            }
        }
    }

    /// Ends an instance: its devices go, and its volumes are detached.
    pub fn terminate(&self, instance: &Instance) {
        self.change(instance, |state| state.power = Power::Terminated);
        let mut state = self.shared.lock();
        state.blocks.unplug_all(&instance.id);
        let (now, delay) = (Instant::now(), state.options.delays.detach);
        let attachments = state.world.volumes.values_mut().flat_map(|v| &mut v.attachments);
        for attachment in attachments.filter(|a| a.instance == instance.id) {
            attachment.status = AttachmentStatus::Detaching;
            (attachment.stuck, attachment.due) = (false, Some(now + delay));
        }
        state.changed(now);
    }

    fn change(&self, instance: &Instance, change: impl FnOnce(&mut InstanceState)) {
        let mut state = self.current();
        let found = state.world.instances.get_mut(&instance.id).expect("instances stay");
        assert!(found.power != Power::Terminated, "{} is terminated", instance.id);
        change(found);
        state.changed(Instant::now());
    }

    /// The state after everything that is due.
    fn current(&self) -> MutexGuard<'_, State> {
        let mut state = self.shared.lock();
        state.advance(Instant::now());
        state
    }
}

impl Drop for Ec2 {
    fn drop(&mut self) {
        // The thread may have ended by a panic, which was shown.
        let _ = self.stop.take().map(|stop| stop.send(()));
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn url(address: SocketAddr) -> String {
    match address.ip().is_unspecified() {
        true => format!("http://127.0.0.1:{}", address.port()),
        false => format!("http://{address}"),
    }
}
