//! The node's metrics, in the Prometheus text format.
//!
//! Counting is atomic adds on figures that exist beforehand or are made once per label set; nothing here
//! blocks a call. Gauges of the shards and volumes are read when somebody asks, not kept up to date.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use shardfs_proto::types::ViewFigures;
use shardfs_proto::types::cluster::NodeStatus;
use tonic::Code;

use crate::catalog::{Cause, Failovers};
use crate::rpc::CallObserver;

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct CallLabels {
    method: &'static str,
    code: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct MethodLabels {
    method: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct VolumeLabels {
    volume: String,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct TakeoverLabels {
    volume: String,
    phase: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct CauseLabels {
    cause: &'static str,
}

/// Name, help and value of what is counted of reads from backups.
type ViewCounter = (&'static str, &'static str, fn(&ViewFigures) -> u64);

const VIEW_COUNTERS: [ViewCounter; 9] = [
    ("views_published", "Views published as a primary", |f| f.published),
    ("views_publish_failures", "Views that could not be published", |f| f.publish_failures),
    ("views_opened", "Views opened as a backup", |f| f.opened),
    ("view_answers", "Reads answered from views", |f| f.answers),
    ("view_refusals_stale", "Reads sent to the primary: no view was young enough", |f| f.refused_stale),
    ("view_refusals_lost", "Reads sent to the primary: the lease or the hold on the view had ended", |f| {
        f.refused_lost
    }),
    ("view_refusals_unreadable", "Reads sent to the primary: checksum or I/O trouble", |f| {
        f.refused_unreadable
    }),
    ("view_devices_retired", "Devices of views that were retired", |f| f.devices_retired),
    ("view_sectors_written", "Sectors written to devices of views: always 0", |f| f.sectors_written),
];

/// A node's figures.
pub struct Metrics {
    registry: Registry,
    calls: Family<CallLabels, Counter>,
    call_seconds: Family<MethodLabels, Histogram, fn() -> Histogram>,
    open_shards: Gauge,
    block_cache_used: Gauge,
    block_cache_capacity: Gauge,
    write_buffer_used: Gauge,
    store_reachable: Gauge,
    damaged_shards: Gauge,
    views_open: Gauge,
    views: [Counter; VIEW_COUNTERS.len()],
    volume_total: Family<VolumeLabels, Gauge>,
    volume_free: Family<VolumeLabels, Gauge>,
    volume_shards: Family<VolumeLabels, Gauge>,
    volume_trouble: Family<VolumeLabels, Gauge>,
    volume_epoch: Family<VolumeLabels, Gauge>,
    takeover: Family<TakeoverLabels, Gauge<f64, AtomicU64>>,
    failovers: Arc<Failovers>,
    takeovers: Family<CauseLabels, Counter>,
    hand_overs: Counter,
    step_downs: Counter,
    /// Gauges of volumes are made anew for every reader: one reader at a time.
    rendering: Mutex<()>,
}

/// 20 us to 10 s, doubling: from a read in memory to a stream of a large value.
fn latency_buckets() -> Histogram {
    Histogram::new(exponential_buckets(20e-6, 2.0, 20))
}

impl Metrics {
    /// All figures at zero; no volume comes or goes.
    pub fn new() -> Arc<Metrics> {
        Metrics::of(Arc::default())
    }

    /// All figures at zero but those of `failovers`, which somebody else counts.
    pub fn of(failovers: Arc<Failovers>) -> Arc<Metrics> {
        let mut registry = Registry::with_prefix("shardfs_node");
        let calls: Family<CallLabels, Counter> = Family::default();
        registry.register("calls", "gRPC calls by method and status code", calls.clone());
        let call_seconds: Family<MethodLabels, Histogram, fn() -> Histogram> =
            Family::new_with_constructor(latency_buckets);
        let help = "Time from a gRPC call's arrival to its answer";
        registry.register_with_unit("call_duration", help, Unit::Seconds, call_seconds.clone());
        let gauge = |registry: &mut Registry, name: &str, help: &str| {
            let gauge: Gauge = Gauge::default();
            registry.register(name, help, gauge.clone());
            gauge
        };
        let by_volume = |registry: &mut Registry, name: &str, help: &str| {
            let family: Family<VolumeLabels, Gauge> = Family::default();
            registry.register(name, help, family.clone());
            family
        };
        let counter = |registry: &mut Registry, name: &str, help: &str| {
            let counter: Counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let takeovers: Family<CauseLabels, Counter> = Family::default();
        let help = "Volumes that came to this node to be served, by cause: their primary gave them away (hand_over), was seen to \
                    end (death), was silent (silence) or not there (absence), or was this node before (reclaim)";
        registry.register("volume_takeovers", help, takeovers.clone());
        let takeover: Family<TakeoverLabels, Gauge<f64, AtomicU64>> = Family::default();
        registry.register_with_unit(
            "volume_takeover",
            "How long the phases took by which the volume came to this node last",
            Unit::Seconds,
            takeover.clone(),
        );
        Arc::new(Metrics {
            takeover,
            failovers,
            takeovers,
            hand_overs: counter(
                &mut registry,
                "volume_hand_overs",
                "Volumes that this node gave away in order",
            ),
            step_downs: counter(
                &mut registry,
                "volume_step_downs",
                "Volumes that this node stopped serving because another has them or they failed",
            ),
            open_shards: gauge(&mut registry, "open_shards", "Shards open"),
            block_cache_used: gauge(&mut registry, "block_cache_used_bytes", "Block cache in use"),
            block_cache_capacity: gauge(&mut registry, "block_cache_capacity_bytes", "Block cache"),
            write_buffer_used: gauge(&mut registry, "write_buffer_used_bytes", "Write buffers in use"),
            store_reachable: gauge(&mut registry, "store_reachable", "1 if the metadata store answers"),
            damaged_shards: gauge(&mut registry, "damaged_shards", "Shards of which damage was found"),
            views_open: gauge(&mut registry, "views_open", "Views open as a backup"),
            views: VIEW_COUNTERS.map(|(name, help, _)| counter(&mut registry, name, help)),
            volume_total: by_volume(&mut registry, "volume_total_bytes", "Bytes of a volume"),
            volume_free: by_volume(&mut registry, "volume_free_bytes", "Bytes free on a volume"),
            volume_shards: by_volume(&mut registry, "volume_shards", "Shards on a volume"),
            volume_trouble: by_volume(&mut registry, "volume_trouble", "1 if a volume is not served"),
            volume_epoch: by_volume(
                &mut registry,
                "volume_epoch",
                "The epoch under which a volume is served: grows whenever it moves",
            ),
            registry,
            calls,
            call_seconds,
            rendering: Mutex::default(),
        })
    }

    /// The figures as text, with those of `status` in the gauges.
    pub fn render(&self, status: &NodeStatus) -> String {
        let _one_at_a_time = self.rendering.lock();
        let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        self.open_shards.set(status.open_shards.into());
        self.block_cache_used.set(signed(status.block_cache_used_bytes));
        self.block_cache_capacity.set(signed(status.block_cache_capacity_bytes));
        self.write_buffer_used.set(signed(status.write_buffer_used_bytes));
        self.store_reachable.set(status.store_reachable.into());
        self.damaged_shards.set(status.damaged_shards.len() as i64);
        self.views_open.set(status.views.open.into());
        for (counter, (_, _, value)) in self.views.iter().zip(VIEW_COUNTERS) {
            counter.inner().store(value(&status.views), Ordering::Relaxed);
        }
        for cause in Cause::ALL {
            let counter = self.takeovers.get_or_create_owned(&CauseLabels { cause: cause.as_str() });
            counter.inner().store(self.failovers.takeovers(cause), Ordering::Relaxed);
        }
        self.hand_overs.inner().store(self.failovers.hand_overs(), Ordering::Relaxed);
        self.step_downs.inner().store(self.failovers.step_downs(), Ordering::Relaxed);
        // A volume that has moved away is told of by its node, and by no other.
        let of_volumes = [
            &self.volume_total,
            &self.volume_free,
            &self.volume_shards,
            &self.volume_trouble,
            &self.volume_epoch,
        ];
        of_volumes.iter().for_each(|family| family.clear());
        self.takeover.clear();
        for volume in &status.volumes {
            let labels = VolumeLabels { volume: volume.id.to_string() };
            self.volume_total.get_or_create(&labels).set(signed(volume.total_bytes));
            self.volume_free.get_or_create(&labels).set(signed(volume.free_bytes));
            self.volume_shards.get_or_create(&labels).set(volume.shards.into());
            self.volume_trouble.get_or_create(&labels).set((!volume.trouble.is_empty()).into());
            // Only what is served has been taken.
            let Some(times) = volume.takeover else { continue };
            self.volume_epoch.get_or_create(&labels).set(signed(volume.epoch.get()));
            for (phase, from, to) in [
                ("election", times.begun_ns, times.elected_ns),
                ("fence", times.elected_ns, times.fenced_ns),
                ("mount", times.fenced_ns, times.mounted_ns),
            ] {
                let labels = TakeoverLabels { volume: volume.id.to_string(), phase };
                self.takeover.get_or_create(&labels).set(to.saturating_sub(from) as f64 / 1e9);
            }
        }
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("writing to a string does not fail");
        text
    }
}

impl CallObserver for Metrics {
    fn call_finished(&self, method: &'static str, code: Code, elapsed: Duration) {
        self.calls.get_or_create(&CallLabels { method, code: code_name(code) }).inc();
        self.call_seconds.get_or_create(&MethodLabels { method }).observe(elapsed.as_secs_f64());
    }
}

fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "ok",
        Code::Cancelled => "cancelled",
        Code::Unknown => "unknown",
        Code::InvalidArgument => "invalid_argument",
        Code::DeadlineExceeded => "deadline_exceeded",
        Code::NotFound => "not_found",
        Code::AlreadyExists => "already_exists",
        Code::PermissionDenied => "permission_denied",
        Code::ResourceExhausted => "resource_exhausted",
        Code::FailedPrecondition => "failed_precondition",
        Code::Aborted => "aborted",
        Code::OutOfRange => "out_of_range",
        Code::Unimplemented => "unimplemented",
        Code::Internal => "internal",
        Code::Unavailable => "unavailable",
        Code::DataLoss => "data_loss",
        Code::Unauthenticated => "unauthenticated",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shardfs_proto::types::cluster::{Takeover, VolumeStatus};
    use shardfs_proto::types::{Epoch, NodeId, VolumeId};

    fn volume(id: &str, epoch: u64, takeover: Option<Takeover>) -> VolumeStatus {
        VolumeStatus {
            id: VolumeId::new(id).unwrap(),
            provider: "loop".into(),
            total_bytes: 1000,
            free_bytes: 600,
            shards: 2,
            epoch: Epoch::new(epoch).unwrap(),
            source: String::new(),
            mount_point: String::new(),
            trouble: takeover.map_or("not attached yet", |_| "").into(),
            takeover,
        }
    }

    fn status(volumes: Vec<VolumeStatus>) -> NodeStatus {
        NodeStatus {
            id: NodeId::new("n").unwrap(),
            version: String::new(),
            uptime_ms: 0,
            volumes,
            open_shards: 3,
            open_shards_max: 4,
            block_cache_used_bytes: 5,
            block_cache_capacity_bytes: 6,
            write_buffer_used_bytes: 7,
            store_reachable: true,
            cluster_id: String::new(),
            damaged_shards: Vec::new(),
            views: ViewFigures { answers: 8, open: 2, ..ViewFigures::default() },
        }
    }

    #[test]
    fn figures_are_rendered() {
        let metrics = Metrics::new();
        metrics.call_finished("Storage/Put", Code::Ok, Duration::from_millis(1));
        metrics.call_finished("Storage/Put", Code::NotFound, Duration::from_millis(1));
        let text = metrics.render(&status(Vec::new()));
        assert!(text.contains("shardfs_node_calls_total{method=\"Storage/Put\",code=\"ok\"} 1"), "{text}");
        assert!(text.contains("shardfs_node_open_shards 3"), "{text}");
        assert!(text.contains("shardfs_node_view_answers_total 8"), "{text}");
        assert!(text.contains("shardfs_node_views_open 2"), "{text}");
        assert!(
            text.contains("shardfs_node_call_duration_seconds_count{method=\"Storage/Put\"} 2"),
            "{text}"
        );
    }

    #[test]
    fn volumes_that_come_and_go() {
        let failovers = Arc::new(Failovers::default());
        let metrics = Metrics::of(failovers.clone());
        let id = VolumeId::new("vol-1").unwrap();
        failovers.note_election(&id, Cause::Death);
        failovers.note_takeover(&id, false);
        let second = 1_000_000_000;
        let times = Takeover {
            begun_ns: second,
            elected_ns: 2 * second,
            fenced_ns: 2 * second,
            mounted_ns: 5 * second,
            opened_ns: 0,
        };
        let text = metrics.render(&status(vec![volume("vol-1", 7, Some(times)), volume("vol-2", 4, None)]));
        for line in [
            "shardfs_node_volume_epoch{volume=\"vol-1\"} 7",
            "shardfs_node_volume_takeover_seconds{volume=\"vol-1\",phase=\"mount\"} 3.0",
            "shardfs_node_volume_trouble{volume=\"vol-2\"} 1",
            "shardfs_node_volume_takeovers_total{cause=\"death\"} 1",
            "shardfs_node_volume_takeovers_total{cause=\"hand_over\"} 0",
            "shardfs_node_volume_hand_overs_total 0",
        ] {
            assert!(text.lines().any(|found| found.starts_with(line)), "{line}: {text}");
        }
        assert!(!text.contains("epoch{volume=\"vol-2\"}"), "it is not served: {text}");

        // Both have moved away.
        failovers.note_hand_over();
        failovers.note_step_down();
        let text = metrics.render(&status(Vec::new()));
        assert!(!text.contains("vol-"), "{text}");
        for line in ["shardfs_node_volume_hand_overs_total 1", "shardfs_node_volume_step_downs_total 1"] {
            assert!(text.lines().any(|found| found.starts_with(line)), "{line}: {text}");
        }
    }
}
