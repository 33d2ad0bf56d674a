//! Which node serves which shard. Learned from GetShard and from errors that say where to go; forgotten
//! when a call fails in a way that another node might not.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::Client;
use super::channel::Node;
use super::reads::Avoided;
use crate::convert;
use crate::types::cluster::{Selector, ShardInfo};
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

pub(super) struct Routes {
    state: Mutex<State>,
}

struct State {
    shards: HashMap<ShardId, Route>,
    /// Where any node may be asked; the first is the one that worked last.
    endpoints: Vec<String>,
    /// By endpoint: all those of its node, as far as that is known.
    siblings: HashMap<String, Vec<String>>,
    /// Backups that did not answer.
    avoided: Avoided,
}

impl State {
    /// Notes that these are addresses of one node.
    fn note_siblings(&mut self, node: &[String]) {
        for endpoint in node {
            if self.siblings.len() < ENDPOINTS_MAX || self.siblings.contains_key(endpoint) {
                self.siblings.insert(endpoint.clone(), node.to_vec());
            }
        }
    }

    /// Puts a node behind the others, by all its addresses.
    fn put_back(&mut self, endpoint: &str) {
        let own = [endpoint.to_owned()];
        let node = self.siblings.get(endpoint).map_or(&own[..], Vec::as_slice);
        // Stable: the others keep their order.
        self.endpoints.sort_by_key(|endpoint| node.contains(endpoint));
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
        let avoided = Avoided::new(fastrand::u64(..));
        let (shards, siblings) = (HashMap::new(), HashMap::new());
        Routes { state: Mutex::new(State { shards, endpoints, siblings, avoided }) }
    }

    /// Notes where a shard lives now.
    pub(super) fn learn(&self, shard: ShardId, location: &Location) {
        let mut state = self.state.lock();
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
        for backup in &info.location.backups {
            self.state.lock().note_siblings(&backup.endpoints);
        }
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

    fn add_endpoints(&self, more: &[String]) {
        let mut state = self.state.lock();
        state.note_siblings(more);
        for endpoint in more {
            if state.endpoints.len() < ENDPOINTS_MAX && !state.endpoints.contains(endpoint) {
                state.endpoints.push(endpoint.clone());
            }
        }
    }
}

impl Client {
    /// A node that may be asked what any node knows.
    pub(super) fn any_node(&self) -> Result<Node> {
        let endpoints = self.inner.routes.state.lock().endpoints.clone();
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
            let others: Vec<String> =
                state.endpoints.iter().filter(|endpoint| !its.contains(endpoint)).cloned().collect();
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
        self.inner.routes.add_endpoints(&info.location.endpoints);
        Ok(info)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_failed_is_asked_last_at_all_its_addresses() {
        let strings = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let routes = Routes::new(strings(&["a1", "b1", "c1"]));
        let order = || routes.state.lock().endpoints.clone();
        routes.add_endpoints(&strings(&["a1", "a2"]));
        routes.add_endpoints(&strings(&["b1", "b2"]));
        assert_eq!(order(), ["a1", "b1", "c1", "a2", "b2"]);
        routes.rotate("a1");
        assert_eq!(order(), ["b1", "c1", "b2", "a1", "a2"]);
        routes.rotate("b2");
        assert_eq!(order(), ["c1", "a1", "a2", "b1", "b2"]);
        // One of which nothing else is known goes alone, and one that is not known changes nothing.
        routes.rotate("c1");
        routes.rotate("d");
        assert_eq!(order(), ["a1", "a2", "b1", "b2", "c1"]);
    }
}
