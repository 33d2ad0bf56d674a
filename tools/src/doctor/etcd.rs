//! The metadata store: whether it answers, how fast, and whether an etcd has room.

use std::time::Duration;

use shardfs_node::cluster::connect::MetaSettings;
use shardfs_node::cluster::etcd::health::Health;
use shardfs_node::cluster::records::CLUSTER_KEY;
use shardfs_node::cluster::store::get;
use shardfs_proto::types::clock;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{Check, ms, quantile};
use crate::size;

/// Reads that are timed.
const READS: usize = 20;
/// How long the store is waited for.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(8);
/// A heartbeat, every 250 ms, is two rounds.
const SLOW: Duration = Duration::from_millis(50);
/// How long an etcd's metrics are waited for, and how much of them is read.
const METRICS_WAIT_MAX: Duration = Duration::from_secs(3);
const METRICS_BYTES_MAX: u64 = 4 << 20;
/// The share of its quota from which on an etcd is told to be filling up.
const FULL_PERCENT: u64 = 80;

const NAME: &str = "metadata store";

/// Asks.
pub async fn checks(settings: &MetaSettings) -> Vec<Check> {
    let address = &settings.address;
    let store = match settings.connect() {
        Ok(store) => store,
        Err(error) => {
            return vec![Check::fail(NAME, format!("{address}: {error:#}"), "mend --meta and its settings")];
        }
    };
    let mut times = Vec::with_capacity(READS);
    for _ in 0..READS {
        let begun = clock::monotonic();
        let failed = match tokio::time::timeout(ANSWER_WAIT_MAX, get(&*store, CLUSTER_KEY)).await {
            Ok(Ok(_)) => {
                times.push(begun.elapsed());
                continue;
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} s", ANSWER_WAIT_MAX.as_secs()),
        };
        return vec![Check::fail(
            NAME,
            format!("{address}: {failed}"),
            "does it run (`etcdctl --endpoints HOST:PORT endpoint health`), and does this machine reach it?",
        )];
    }
    let mut checks = vec![latency(address, times)];
    match settings.etcd() {
        Ok(Some(etcd)) => match etcd.health().await {
            Ok(health) => {
                checks.push(version(&health));
                let quota =
                    if address.starts_with("etcd://") { quota_of(&health.member).await } else { None };
                checks.push(room(&health, quota));
            }
            Err(error) => {
                checks.push(Check::warn("etcd", error.to_string(), "may this user ask for its status?"))
            }
        },
        Ok(None) => checks.push(Check::skipped("etcd", format!("{address} is an embedded store"))),
        Err(error) => checks.push(Check::fail("etcd", format!("{error:#}"), "mend --meta and its settings")),
    }
    checks
}

fn latency(address: &str, mut times: Vec<Duration>) -> Check {
    times.sort_unstable();
    let (median, worst) = (quantile(&times, 0.5), quantile(&times, 0.95));
    let detail = format!("{address}: a read takes {}, 1 of 20 more than {}", ms(median), ms(worst));
    if median > SLOW {
        return Check::warn(
            NAME,
            detail,
            "failover is timed in tenths of a second: keep it near, on a fast disk",
        );
    }
    Check::ok(NAME, detail)
}

fn version(health: &Health) -> Check {
    const NAME: &str = "etcd version";
    let mut numbers = health.version.split('.').map(|part| part.parse::<u32>().ok());
    let detail = format!("{} ({})", health.version, health.member);
    match (numbers.next().flatten(), numbers.next().flatten()) {
        (Some(major), Some(minor)) if (major, minor) >= (3, 4) => Check::ok(NAME, detail),
        (Some(_), Some(_)) => Check::fail(NAME, detail, "use etcd 3.4 or later"),
        _ => Check::warn(NAME, detail, "a version that cannot be read: see that it is 3.4 or later"),
    }
}

fn room(health: &Health, quota: Option<u64>) -> Check {
    const NAME: &str = "etcd room";
    let used = size::human(health.db_bytes);
    if health.out_of_space == Some(true) {
        return Check::fail(
            NAME,
            format!("{used}: its quota is used up and it refuses changes (alarm NOSPACE)"),
            "compact and defragment it, then `etcdctl alarm disarm`; start it with --auto-compaction-retention=1h",
        );
    }
    match quota {
        Some(quota) if health.db_bytes.saturating_mul(100) > quota.saturating_mul(FULL_PERCENT) => {
            Check::warn(
                NAME,
                format!("{used} of its quota of {}", size::human(quota)),
                "compact and defragment it, or raise --quota-backend-bytes; start it with --auto-compaction-retention=1h",
            )
        }
        Some(quota) => Check::ok(NAME, format!("{used} of its quota of {}", size::human(quota))),
        None => Check::ok(NAME, format!("{used}; its quota cannot be read, etcd's default is 2.0 GiB")),
    }
}

/// The quota, from the metrics that a member without TLS serves to everybody.
async fn quota_of(member: &str) -> Option<u64> {
    let address = member.trim_start_matches("http://");
    let text = tokio::time::timeout(METRICS_WAIT_MAX, metrics(address)).await.ok()?.ok()?;
    quota(&text)
}

async fn metrics(address: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(format!("GET /metrics HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes()).await?;
    let mut text = Vec::new();
    stream.take(METRICS_BYTES_MAX).read_to_end(&mut text).await?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// `etcd_server_quota_backend_bytes 2.147483648e+09`
fn quota(metrics: &str) -> Option<u64> {
    let line = metrics.lines().find_map(|line| line.strip_prefix("etcd_server_quota_backend_bytes "))?;
    let bytes = line.trim().parse::<f64>().ok()?;
    (bytes >= 1.0).then_some(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Outcome;

    fn health(version: &str, db_bytes: u64, out_of_space: Option<bool>) -> Health {
        Health { member: "127.0.0.1:2379".into(), version: version.into(), db_bytes, out_of_space }
    }

    #[test]
    fn an_etcd_is_judged() {
        assert_eq!(version(&health("3.5.16", 0, None)).outcome, Outcome::Ok);
        assert_eq!(version(&health("3.3.27", 0, None)).outcome, Outcome::Fail);
        assert_eq!(version(&health("", 0, None)).outcome, Outcome::Warn);
        let full = health("3.5.16", 90, Some(false));
        assert_eq!(room(&full, Some(100)).outcome, Outcome::Warn);
        assert_eq!(room(&full, Some(1000)).outcome, Outcome::Ok);
        assert_eq!(room(&full, None).outcome, Outcome::Ok);
        assert_eq!(room(&health("3.5.16", 1, Some(true)), Some(1000)).outcome, Outcome::Fail);
        assert_eq!(latency("x", vec![Duration::from_millis(1)]).outcome, Outcome::Ok);
        assert_eq!(latency("x", vec![Duration::from_millis(80)]).outcome, Outcome::Warn);
    }

    #[test]
    fn the_quota_is_found_in_the_metrics() {
        let text =
            "HTTP/1.0 200 OK\r\n\r\n# HELP x\netcd_server_quota_backend_bytes 2.147483648e+09\nmore 1\n";
        assert_eq!(quota(text), Some(2 << 30));
        assert_eq!(quota("etcd_server_quota_backend_bytes x\n"), None);
        assert_eq!(quota(""), None);
    }
}
