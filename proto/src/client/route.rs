//! Which node serves which shard, and where any node may be asked. Learned from GetShard and from errors that say where to
//! go; forgotten when a call fails in a way that another node might not.
//!
//! A client may be given the address of one node and live longer than that: every location names its shard's backups, one of
//! which serves it next, and the list of nodes is looked at now and then. Addresses outlive the routes that they came with.

use std::collections::HashMap;
use std::iter;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::Client;
use super::channel::{Node, is_endpoint};
use super::reads::Avoided;
use crate::convert;
use crate::types::cluster::{NodeInfo, Selector, ShardInfo};
use crate::types::op::ShardState;
use crate::types::{Backup, Error, Location, Result, ShardId, clock};
use crate::wire;

/// How long one node is waited for when it is asked where a shard lives: it answers from memory.
const ASK_WAIT_MAX: Duration = Duration::from_secs(1);
/// It is taken for silent as late as in a second attempt: a busy machine is none that is gone.
const ASK_PATIENCE: u32 = 1;
/// Backups come and go without a change of the primary: a client that finds none to ask looks again after so long.
const BACKUPS_AGE_MAX: Duration = Duration::from_secs(2);
/// Shards whose routes are kept.
const ROUTES_MAX: usize = 65_536;
/// Endpoints of nodes that are kept for calls that any node answers.
const ENDPOINTS_MAX: usize = 256;
/// How old the list of nodes may be: nodes are added by people.
const NODES_AGE_MAX: Duration = Duration::from_secs(60);
/// How long one node is waited for when it is asked for that list: it may look into the metadata store.
const NODES_WAIT_MAX: Duration = Duration::from_secs(3);

pub(super) struct Routes {
    state: Mutex<State>,
}

struct State {
    shards: HashMap<ShardId, Route>,
    /// Where any node may be asked; the first is the one that worked last.
    known: Vec<Known>,
    /// How often addresses were named.
    namings: u64,
    /// When the list of nodes was.
    listed: Option<Instant>,
    /// Backups that did not answer.
    avoided: Avoided,
}

/// An address.
struct Known {
    endpoint: String,
    /// All those of its node, as far as that is known.
    node: Vec<String>,
    /// By whoever made the client: it stays.
    configured: bool,
    /// The last naming that it was in.
    named: u64,
}

impl State {
    /// Notes the addresses of some nodes. What is new comes last: it has not been tried.
    fn name(&mut self, nodes: &[&[String]]) {
        self.namings += 1;
        for known in &mut self.known {
            if let Some(node) = nodes.iter().find(|node| node.contains(&known.endpoint)) {
                known.named = self.namings;
                if known.node.as_slice() != *node {
                    known.node = node.to_vec();
                }
            }
        }
        for node in nodes {
            for endpoint in *node {
                // A later version may have addresses of a kind that is not understood here.
                if self.known.iter().any(|known| known.endpoint == *endpoint) || !is_endpoint(endpoint) {
                    continue;
                }
                if self.known.len() >= ENDPOINTS_MAX && !self.make_room() {
                    return;
                }
                self.known.push(Known {
                    endpoint: endpoint.clone(),
                    node: node.to_vec(),
                    configured: false,
                    named: self.namings,
                });
            }
        }
    }

    /// Drops the address that was named longest ago; of several, the one that is asked last. Those of this naming stay: a list
    /// that does not fit would push itself out.
    fn make_room(&mut self) -> bool {
        let oldest = self
            .known
            .iter()
            .enumerate()
            .rev()
            .filter(|(_, known)| !known.configured && known.named < self.namings)
            .min_by_key(|(_, known)| known.named)
            .map(|(at, _)| at);
        if let Some(at) = oldest {
            self.known.remove(at);
        }
        oldest.is_some()
    }

    /// Puts a node behind the others, by all its addresses.
    fn put_back(&mut self, endpoint: &str) {
        let Some(known) = self.known.iter().find(|known| known.endpoint == endpoint) else { return };
        let node = known.node.clone();
        // Stable: the others keep their order.
        self.known.sort_by_key(|known| node.contains(&known.endpoint));
    }
}

struct Route {
    endpoint: String,
    epoch: u64,
    endpoints: Vec<String>,
    backups: Vec<Backup>,
    /// It never changes again, and any node may be asked.
    closed: bool,
    learned: Instant,
}

impl Routes {
    pub(super) fn new(endpoints: Vec<String>) -> Routes {
        let mut known: Vec<Known> = Vec::new();
        for endpoint in endpoints {
            if known.iter().all(|known| known.endpoint != endpoint) {
                known.push(Known { node: vec![endpoint.clone()], endpoint, configured: true, named: 0 });
            }
        }
        let avoided = Avoided::new(fastrand::u64(..));
        Routes {
            state: Mutex::new(State { shards: HashMap::new(), known, namings: 0, listed: None, avoided }),
        }
    }

    /// Notes where a shard lives now, and the addresses of its primary and its backups.
    pub(super) fn learn(&self, shard: ShardId, location: &Location) {
        let mut state = self.state.lock();
        let backups = location.backups.iter().map(|backup| backup.endpoints.as_slice());
        let nodes: Vec<&[String]> = iter::once(location.endpoints.as_slice()).chain(backups).collect();
        state.name(&nodes);
        if location.node.is_none() || location.endpoints.is_empty() {
            state.shards.remove(&shard);
            return;
        }
        // A node that is behind knows an earlier place.
        if state.shards.get(&shard).is_some_and(|known| known.epoch > location.epoch.get()) {
            return;
        }
        if state.shards.len() >= ROUTES_MAX {
            state.shards.clear();
        }
        let route = Route {
            endpoint: String::new(),
            epoch: location.epoch.get(),
            endpoints: location.endpoints.clone(),
            backups: location.backups.clone(),
            // Once closed, always closed.
            closed: state.shards.get(&shard).is_some_and(|known| known.closed),
            learned: clock::monotonic(),
        };
        state.shards.insert(shard, route);
    }

    /// Notes where a shard lives, and whether it is closed.
    pub(super) fn learn_info(&self, info: &ShardInfo) {
        self.learn(info.id, &info.location);
        if info.state == ShardState::ReadOnly
            && let Some(route) = self.state.lock().shards.get_mut(&info.id)
        {
            route.closed = true;
        }
    }

    /// Whether the shard is known to be closed.
    pub(super) fn is_closed(&self, shard: ShardId) -> bool {
        self.state.lock().shards.get(&shard).is_some_and(|route| route.closed)
    }

    /// Whether what is known of a shard's backups may be old.
    pub(super) fn is_old(&self, shard: ShardId) -> bool {
        let state = self.state.lock();
        state.shards.get(&shard).is_some_and(|route| route.learned.elapsed() >= BACKUPS_AGE_MAX)
    }

    /// Chooses among a shard's backups.
    pub(super) fn with_backups<T>(
        &self,
        shard: ShardId,
        choose: impl FnOnce(&[Backup], &mut Avoided) -> Option<T>,
    ) -> Option<T> {
        let State { shards, avoided, .. } = &mut *self.state.lock();
        choose(&shards.get(&shard)?.backups, avoided)
    }

    /// Does not ask a backup for a shard for a while.
    pub(super) fn avoid(&self, shard: ShardId, endpoint: &str) {
        self.state.lock().avoided.note(shard, endpoint, clock::monotonic());
    }

    /// Forgets a route that led to a failure at `endpoint`.
    pub(super) fn forget(&self, shard: ShardId, endpoint: &str) {
        let mut state = self.state.lock();
        if state.shards.get(&shard).is_some_and(|r| r.endpoint == endpoint) {
            state.shards.remove(&shard);
        }
        drop(state);
        self.rotate(endpoint);
    }

    /// Puts a node that failed behind the others, by whichever of its addresses it was asked.
    pub(super) fn rotate(&self, endpoint: &str) {
        self.state.lock().put_back(endpoint);
    }

    /// Notes which nodes there are.
    pub(super) fn learn_nodes(&self, nodes: &[NodeInfo]) {
        let living: Vec<&[String]> =
            nodes.iter().filter(|node| node.alive).map(|node| node.endpoints.as_slice()).collect();
        let mut state = self.state.lock();
        state.listed = Some(clock::monotonic());
        state.name(&living);
    }

    fn is_list_old(&self) -> bool {
        self.state.lock().listed.is_none_or(|at| at.elapsed() >= NODES_AGE_MAX)
    }

    /// Where any node may be asked, in order.
    fn endpoints(&self) -> Vec<String> {
        self.state.lock().known.iter().map(|known| known.endpoint.clone()).collect()
    }
}

impl Client {
    /// A node that may be asked what any node knows.
    pub(super) fn any_node(&self) -> Result<Node> {
        let endpoints = self.inner.routes.endpoints();
        let endpoint =
            self.inner.channels.usable(&endpoints).ok_or_else(|| Error::unavailable("no node is known"))?;
        self.inner.channels.node(endpoint)
    }

    /// A node that may be asked instead of the one that the shard's calls go to; another one each time.
    pub(super) fn another_node(&self, shard: ShardId) -> Result<Option<Node>> {
        let endpoint = {
            let mut state = self.inner.routes.state.lock();
            let its: Vec<String> =
                state.shards.get(&shard).map(|route| route.endpoints.clone()).unwrap_or_default();
            let endpoints = state.known.iter().map(|known| &known.endpoint);
            let others: Vec<String> = endpoints.filter(|endpoint| !its.contains(endpoint)).cloned().collect();
            let Some(first) = self.inner.channels.usable(&others).map(str::to_owned) else { return Ok(None) };
            state.put_back(&first);
            first
        };
        self.inner.channels.node(&endpoint).map(Some)
    }

    /// The node that serves a shard, and its epoch.
    pub(super) async fn route(&self, shard: ShardId) -> Result<(Node, u64)> {
        if let Some(found) = self.cached_route(shard)? {
            return Ok(found);
        }
        let node = self.any_node()?;
        let info = self.ask_shard(&node, &Selector::Id(shard)).await.inspect_err(|error| {
            if error.is_retryable() {
                self.inner.routes.rotate(&node.endpoint);
            }
        })?;
        self.cached_route(shard)?.ok_or_else(|| {
            Error::unavailable(format!(
                "shard {shard} has no primary at the moment (volume {})",
                info.location.volume
            ))
            .with_shard(shard)
        })
    }

    fn cached_route(&self, shard: ShardId) -> Result<Option<(Node, u64)>> {
        let mut state = self.inner.routes.state.lock();
        let Some(route) = state.shards.get_mut(&shard) else { return Ok(None) };
        if route.endpoint.is_empty() {
            let endpoint = self.inner.channels.usable(&route.endpoints);
            route.endpoint = endpoint.expect("learn keeps no route without endpoints").to_owned();
        }
        let (endpoint, epoch) = (route.endpoint.clone(), route.epoch);
        drop(state);
        Ok(Some((self.inner.channels.node(&endpoint)?, epoch)))
    }

    /// Asks one node, once, about a shard, and learns where it lives.
    pub(super) async fn ask_shard(&self, node: &Node, selector: &Selector) -> Result<ShardInfo> {
        let request = wire::GetShardRequest { shard: Some(convert::selector_to_wire(selector)) };
        let mut storage = node.storage();
        let call = storage.get_shard(node.request(request));
        let silent = || Error::unavailable(format!("{} did not answer", node.endpoint));
        let reply = tokio::select! {
            reply = tokio::time::timeout(ASK_WAIT_MAX, call) => match reply {
                Ok(reply) => reply.map_err(|status| crate::status::from_status(&status))?,
                Err(_) => return Err(silent()),
            },
            // Sooner, if it shows no sign of life.
            () = node.silent(ASK_PATIENCE) => return Err(silent()),
        };
        let info = convert::shard_info_from_wire(reply.into_inner())?;
        self.inner.routes.learn_info(&info);
        Ok(info)
    }

    /// Looks which nodes there are, if that was long ago. Asked once: what fails leaves the addresses as they are, and is asked
    /// again at the next occasion.
    pub(super) async fn keep_nodes(&self) {
        if self.inner.routes.is_list_old()
            && let Err(error) = self.nodes_within(Duration::ZERO, NODES_WAIT_MAX).await
        {
            tracing::debug!(%error, "no list of nodes: later");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::ClientConfig;
    use crate::types::{ClientId, Epoch, NodeId, Timestamp, VolumeId};

    /// Endpoints of these names.
    fn at(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| format!("http://{name}:1")).collect()
    }

    fn location(primary: &[&str], backups: &[&[&str]]) -> Location {
        let id = |name: &str| NodeId::new(name).unwrap();
        Location {
            volume: VolumeId::new("vol-1").unwrap(),
            node: primary.first().copied().map(id),
            endpoints: at(primary),
            epoch: Epoch::FIRST,
            backups: backups
                .iter()
                .map(|names| Backup { node: id(names[0]), endpoints: at(names) })
                .collect(),
        }
    }

    fn node(name: &str, alive: bool) -> NodeInfo {
        NodeInfo {
            id: NodeId::new(name).unwrap(),
            endpoints: at(&[name]),
            http_address: String::new(),
            version: String::new(),
            alive,
            heartbeat: 0,
            started: Timestamp::default(),
            draining: false,
            dead: false,
        }
    }

    #[test]
    fn a_node_that_failed_is_asked_last_at_all_its_addresses() {
        let routes = Routes::new(at(&["a1", "b1", "c1", "a1"]));
        let shard = ShardId::new(1).unwrap();
        routes.learn(shard, &location(&["a1", "a2"], &[]));
        routes.learn(shard, &location(&["b1", "b2"], &[]));
        assert_eq!(routes.endpoints(), at(&["a1", "b1", "c1", "a2", "b2"]));
        routes.rotate(&at(&["a1"])[0]);
        assert_eq!(routes.endpoints(), at(&["b1", "c1", "b2", "a1", "a2"]));
        routes.rotate(&at(&["b2"])[0]);
        assert_eq!(routes.endpoints(), at(&["c1", "a1", "a2", "b1", "b2"]));
        // One of which nothing else is known goes alone, and one that is not known changes nothing.
        routes.rotate(&at(&["c1"])[0]);
        routes.rotate(&at(&["d"])[0]);
        assert_eq!(routes.endpoints(), at(&["a1", "a2", "b1", "b2", "c1"]));
    }

    #[tokio::test]
    async fn backups_are_asked_when_the_only_node_that_was_given_has_failed() {
        let config = ClientConfig::new(at(&["a1"]), ClientId::new("test").unwrap());
        let client = Client::new(config).unwrap();
        let (routes, shard) = (&client.inner.routes, ShardId::new(1).unwrap());
        routes.learn(shard, &location(&["a1", "a2"], &[&["b1", "b2"], &["c1"]]));
        assert_eq!(routes.endpoints(), at(&["a1", "a2", "b1", "b2", "c1"]));
        let (primary, _) = client.cached_route(shard).unwrap().unwrap();
        assert_eq!(*primary.endpoint, at(&["a1"])[0]);
        // Its own addresses are none of another node.
        assert_eq!(*client.another_node(shard).unwrap().unwrap().endpoint, at(&["b1"])[0]);
        routes.forget(shard, &primary.endpoint);
        assert!(client.cached_route(shard).unwrap().is_none());
        assert_eq!(routes.endpoints(), at(&["c1", "b1", "b2", "a1", "a2"]));
        assert_eq!(*client.any_node().unwrap().endpoint, at(&["c1"])[0]);
        // A volume without a primary has backups still.
        routes.learn(shard, &location(&[], &[&["d1"]]));
        assert!(client.cached_route(shard).unwrap().is_none());
        assert_eq!(*routes.endpoints().last().unwrap(), at(&["d1"])[0]);
    }

    #[test]
    fn what_was_not_named_for_longest_makes_room_and_what_was_configured_stays() {
        let routes = Routes::new(at(&["own"]));
        let shard = ShardId::new(1).unwrap();
        let learn = |name: &str| routes.learn(shard, &location(&[name], &[]));
        for number in 1..ENDPOINTS_MAX {
            learn(&format!("n{number}"));
        }
        assert_eq!(routes.endpoints().len(), ENDPOINTS_MAX);
        // Named again, so the next one goes.
        learn("n1");
        learn("new");
        let endpoints = routes.endpoints();
        assert_eq!(endpoints.len(), ENDPOINTS_MAX);
        assert!(at(&["own", "n1", "n3", "new"]).iter().all(|endpoint| endpoints.contains(endpoint)));
        assert!(!endpoints.contains(&at(&["n2"])[0]));
        // Who was given more than that keeps to it.
        let many: Vec<String> = (0..=ENDPOINTS_MAX).map(|number| format!("http://m{number}:1")).collect();
        let routes = Routes::new(many.clone());
        routes.learn(shard, &location(&["new"], &[]));
        assert_eq!(routes.endpoints(), many);
    }

    #[test]
    fn nodes_that_live_are_known_from_their_list() {
        let routes = Routes::new(at(&["a"]));
        assert!(routes.is_list_old());
        let foreign = NodeInfo { endpoints: vec!["quic:h:1".to_owned()], ..node("foreign", true) };
        routes.learn_nodes(&[node("a", true), node("b", false), node("c", true), foreign]);
        assert!(!routes.is_list_old());
        assert_eq!(routes.endpoints(), at(&["a", "c"]));
        // A list that does not fit is the same the next time.
        let many: Vec<NodeInfo> = (0..2 * ENDPOINTS_MAX).map(|n| node(&format!("n{n}"), true)).collect();
        routes.learn_nodes(&many);
        let known = routes.endpoints();
        assert_eq!((known.len(), &known[0]), (ENDPOINTS_MAX, &at(&["a"])[0]));
        routes.learn_nodes(&many);
        assert_eq!(routes.endpoints(), known);
    }
}
