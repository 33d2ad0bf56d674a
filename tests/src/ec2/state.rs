//! Calls, and what time does to the states that they begin.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::blocks::Blocks;
use super::faults::{self, Faults, Kind, Moment};
use super::model::{AttachmentStatus, ModificationState, Power, Stage, World};
use super::query::{Parameters, Refusal, refuse};
use super::xml::{self, ACCOUNT};
use super::{Options, ROLE};

/// How far back reads can be stale.
const HISTORY: Duration = Duration::from_secs(120);

/// A call that was made.
#[derive(Clone, Debug)]
pub struct Call {
    /// When it came.
    pub time: SystemTime,
    /// The access key of its signature.
    pub key: String,
    /// Its action.
    pub action: String,
    /// Its other parameters, as they came.
    pub parameters: BTreeMap<String, String>,
    /// What became of it.
    pub outcome: Outcome,
}

/// What became of a call.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// Done and answered.
    Done,
    /// Answered with this code; not done.
    Refused(String),
    /// Answered with this code although it was done.
    DoneButRefused(String),
    /// Done, never answered.
    DoneButSilent,
    /// Neither done nor answered.
    Silent,
}

/// What the caller gets.
#[derive(Debug)]
pub(super) enum Reply {
    Answer {
        status: u16,
        body: String,
    },
    /// The connection is closed after this time.
    Cut(Duration),
}

/// Everything that changes.
#[derive(Debug)]
pub(super) struct State {
    pub(super) options: Options,
    pub(super) world: World,
    /// What the world was from which time on.
    history: VecDeque<(Instant, Arc<World>)>,
    pub(super) blocks: Blocks,
    pub(super) faults: Faults,
    pub(super) calls: Vec<Call>,
    /// Parameters and volume of the client tokens of `CreateVolume`.
    pub(super) tokens: BTreeMap<String, (BTreeMap<String, String>, String)>,
    /// How many volumes were ever made.
    pub(super) volumes_ever: u64,
}

impl State {
    pub(super) fn new(options: Options, blocks: Blocks) -> State {
        let faults = Faults::new(options.seed);
        let history = [(Instant::now(), Arc::default())].into();
        let (calls, tokens) = (Vec::new(), BTreeMap::new());
        State { options, world: World::default(), history, blocks, faults, calls, tokens, volumes_ever: 0 }
    }

    /// Remembers what the world is now.
    pub(super) fn changed(&mut self, now: Instant) {
        self.history.push_back((now, Arc::new(self.world.clone())));
        while self.history.get(1).is_some_and(|(from, _)| *from + HISTORY < now) {
            self.history.pop_front();
        }
    }

    /// An instance was there before everything that is remembered.
    pub(super) fn add_instance(&mut self, instance: super::InstanceState) {
        let worlds = self.history.iter_mut().map(|(_, world)| Arc::make_mut(world));
        for world in worlds.chain([&mut self.world]) {
            world.instances.insert(instance.id.clone(), instance.clone());
        }
    }

    fn world_of(&self, time: Option<Instant>) -> Arc<World> {
        let then = self.history.iter().rev().find(|(from, _)| time.is_some_and(|time| *from <= time));
        then.or(self.history.front()).map(|(_, world)| Arc::clone(world)).unwrap_or_default()
    }

    /// Changes the states whose time has come.
    pub(super) fn advance(&mut self, now: Instant) {
        let State { world, blocks, options, .. } = self;
        let is_due = |due: &mut Instant| *due <= now;
        let mut changed = false;
        let mut gone = Vec::new();
        for volume in world.volumes.values_mut() {
            if volume.due.take_if(is_due).is_some() {
                changed = true;
                match volume.stage {
                    Stage::Creating => volume.stage = Stage::Usable,
                    Stage::Deleting => gone.push(volume.id.clone()),
                    Stage::Usable | Stage::Error => {}
                }
            }
            let id = &volume.id;
            volume.attachments.retain_mut(|attachment| {
                if attachment.due.take_if(is_due).is_none() {
                    return true;
                }
                changed = true;
                let instance = &world.instances[&attachment.instance];
                match attachment.status {
                    AttachmentStatus::Attaching => {
                        attachment.status = AttachmentStatus::Attached;
                        if instance.power == Power::Running && volume.stage == Stage::Usable {
                            blocks.plug(id, &instance.id, &instance.links, now + options.delays.link);
                        }
                        true
                    }
                    AttachmentStatus::Attached => true,
                    AttachmentStatus::Detaching => {
                        blocks.unplug(id, &instance.id);
                        false
                    }
                }
            });
            if let Some(modification) = &mut volume.modification
                && modification.due.take_if(is_due).is_some()
            {
                changed = true;
                if modification.state == ModificationState::Modifying {
                    modification.state = ModificationState::Optimizing;
                    modification.due = Some(now + options.delays.optimize);
                    (volume.size_gib, volume.iops) = (modification.size_gib.1, modification.iops.1);
                    if volume.stage != Stage::Error {
                        blocks.enlarge(id, volume.size_gib, now + options.delays.capacity);
                    }
                } else {
                    modification.state = ModificationState::Completed;
                    modification.ended = Some(SystemTime::now());
                }
            }
        }
        for id in gone {
            blocks.remove(&id);
            world.volumes.remove(&id);
        }
        for snapshot in world.snapshots.values_mut() {
            if snapshot.due.take_if(is_due).is_some() {
                changed = true;
                snapshot.completed = true;
            }
        }
        blocks.advance(now);
        if changed {
            self.changed(now);
        }
    }

    /// Does a call, or what the faults make of it.
    pub(super) fn call(&mut self, key: &str, mut parameters: BTreeMap<String, String>) -> Reply {
        let now = Instant::now();
        self.advance(now);
        let action = parameters.get("Action").cloned().unwrap_or_default();
        let request = request_id();
        let (outcome, reply) = match self.faults.strike(Moment::Before, &action, key) {
            Some(Kind::TimeoutBefore(hold)) => (Outcome::Silent, Reply::Cut(hold)),
            Some(kind) => {
                let denied = || self.denied(&action, key, &parameters);
                let refusal = faults::refusal(&kind, denied).expect("the others answer nothing");
                (Outcome::Refused(refusal.code.clone()), refused(&request, &refusal))
            }
            None => self.done(&request, &action, key, &parameters, now),
        };
        parameters.remove("Action");
        let (key, time) = (key.to_owned(), SystemTime::now());
        self.calls.push(Call { time, key, action, parameters, outcome });
        reply
    }

    fn done(
        &mut self,
        request: &str,
        action: &str,
        key: &str,
        parameters: &BTreeMap<String, String>,
        now: Instant,
    ) -> (Outcome, Reply) {
        let stale = match self.faults.strike(Moment::Reading, action, key) {
            Some(Kind::StaleReads(age)) => Some(self.world_of(now.checked_sub(age))),
            _ => None,
        };
        let read = Parameters::new(parameters);
        let page_limit = self.options.page_limit;
        let described = match &stale {
            Some(old) => old.describe(action, &read, page_limit),
            None => self.world.describe(action, &read, page_limit),
        };
        let result = match described {
            Some(described) => described,
            None => match stale.map_or(Ok(()), |old| old.knows(parameters)) {
                Ok(()) => self.act(action, &read, key, now).inspect(|_| self.changed(now)),
                Err(refusal) => Err(refusal),
            },
        };
        match result {
            Err(refusal) => (Outcome::Refused(refusal.code.clone()), refused(request, &refusal)),
            Ok(content) => match self.faults.strike(Moment::After, action, key) {
                Some(Kind::TimeoutAfterSuccess(hold)) => (Outcome::DoneButSilent, Reply::Cut(hold)),
                Some(kind) => {
                    let refusal = faults::refusal(&kind, String::new).expect("the other answers nothing");
                    (Outcome::DoneButRefused(refusal.code.clone()), refused(request, &refusal))
                }
                None => {
                    let body = xml::answer(action, request, &content);
                    (Outcome::Done, Reply::Answer { status: 200, body })
                }
            },
        }
    }

    /// EC2's words for those who may not.
    fn denied(&self, action: &str, key: &str, parameters: &BTreeMap<String, String>) -> String {
        let user = match self.world.instances.values().find(|i| i.access_key == key) {
            Some(instance) => format!("arn:aws:sts::{ACCOUNT}:assumed-role/{ROLE}/{}", instance.id),
            None => format!("arn:aws:iam::{ACCOUNT}:user/{key}"),
        };
        let id = |name: &str| parameters.get(name).or_else(|| parameters.get(&format!("{name}.1")));
        let resource = match (id("VolumeId"), id("SnapshotId"), id("InstanceId")) {
            _ if action.starts_with("Describe") => "*".to_owned(),
            (Some(volume), ..) => self.arn("volume", volume),
            (_, Some(snapshot), _) => self.arn("snapshot", snapshot),
            (.., Some(instance)) => self.arn("instance", instance),
            _ => self.arn("volume", "*"),
        };
        format!(
            "You are not authorized to perform this operation. User: {user} is not authorized to perform: \
             ec2:{action} on resource: {resource} because no identity-based policy allows the ec2:{action} action"
        )
    }

    fn arn(&self, kind: &str, id: &str) -> String {
        format!("arn:aws:ec2:{}:{ACCOUNT}:{kind}/{id}", self.options.region)
    }
}

impl World {
    /// Refuses a call of what is not here.
    fn knows(&self, parameters: &BTreeMap<String, String>) -> Result<(), Refusal> {
        if let Some(id) = parameters.get("VolumeId") {
            self.volume(id)?;
        }
        if let Some(id) = parameters.get("SnapshotId") {
            self.snapshot(id)?;
        }
        Ok(())
    }
}

/// The answer to a call that is not done.
pub(super) fn refused(request: &str, refusal: &Refusal) -> Reply {
    Reply::Answer { status: refusal.status, body: xml::error(request, refusal) }
}

/// The answer to a call that nobody signed.
pub(super) fn unsigned() -> Reply {
    let message = "AWS was not able to validate the provided access credentials";
    refused(&request_id(), &Refusal { status: 401, ..refuse("AuthFailure", message) })
}

fn request_id() -> String {
    let bits = fastrand::u128(..);
    let part =
        |from: u32, digits: usize| format!("{bits:032x}")[from as usize..from as usize + digits].to_owned();
    [part(0, 8), part(8, 4), part(12, 4), part(16, 4), part(20, 12)].join("-")
}
