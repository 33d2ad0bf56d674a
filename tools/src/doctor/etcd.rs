//! The metadata store: whether it answers, how fast, and of an etcd whether every member that the address names is well
//! and has room.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use shardfs_node::cluster::connect::MetaSettings;
use shardfs_node::cluster::etcd::EtcdStore;
use shardfs_node::cluster::etcd::health::Health;
use shardfs_node::cluster::records::CLUSTER_KEY;
use shardfs_node::cluster::store::{MetaStore, StoreError, StoreResult, get};
use shardfs_proto::types::clock;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{Check, ms, quantile};
use crate::size;

/// Reads that are timed.
const READS: usize = 20;
/// How long the store is waited for: longer than stores repeat a call to one that is not there, so that they say why.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(12);
/// A heartbeat, every 250 ms, is two rounds.
const SLOW: Duration = Duration::from_millis(50);
/// How long an etcd's metrics are waited for, and how much of them is read.
const METRICS_WAIT_MAX: Duration = Duration::from_secs(3);
const METRICS_BYTES_MAX: u64 = 4 << 20;
/// The share of its quota from which on an etcd is told to be filling up.
const FULL_PERCENT: u64 = 80;

const NAME: &str = "metadata store";
const MEND_SETTINGS: &str = "mend --meta and its settings";

/// What one member said for itself.
type Said = (String, StoreResult<Health>);

/// Asks.
pub async fn checks(settings: &MetaSettings) -> Vec<Check> {
    let address = &settings.address;
    let (store, etcd) = match open(settings) {
        Ok(opened) => opened,
        Err(error) => return vec![Check::fail(NAME, format!("{address}: {error:#}"), MEND_SETTINGS)],
    };
    // Before the reads: a read is answered by whichever member answers.
    let said = match &etcd {
        Some(etcd) => etcd.members().await,
        None => Vec::new(),
    };
    let mut checks = vec![match times(&*store, etcd.as_ref()).await {
        Ok(times) => latency(address, times),
        Err(why) => Check::fail(
            NAME,
            format!("{address}: {why}"),
            "does it run (`etcdctl --endpoints HOST:PORT endpoint health`), and does this machine reach it?",
        ),
    }];
    if etcd.is_none() {
        checks.push(Check::skipped("etcd", format!("{address} is an embedded store")));
        return checks;
    }
    checks.extend(members(&said));
    let healths: Vec<&Health> = said.iter().filter_map(|(_, said)| said.as_ref().ok()).collect();
    checks.extend(version(&healths));
    if let Some(fullest) = fullest(&healths) {
        let quota = if address.starts_with("etcd://") { quota_of(&fullest.member).await } else { None };
        checks.push(room(fullest, quota));
    }
    checks
}

/// The store, and the same as an etcd if it is one.
fn open(settings: &MetaSettings) -> anyhow::Result<(Arc<dyn MetaStore>, Option<EtcdStore>)> {
    let Some(etcd) = settings.etcd()? else { return Ok((settings.connect()?, None)) };
    let store: Arc<dyn MetaStore> = Arc::new(etcd.clone());
    Ok((store, Some(etcd)))
}

/// How long reads took, or why one failed.
async fn times(store: &dyn MetaStore, etcd: Option<&EtcdStore>) -> Result<Vec<Duration>, String> {
    let mut times = Vec::with_capacity(READS);
    for _ in 0..READS {
        let begun = clock::monotonic();
        match tokio::time::timeout(ANSWER_WAIT_MAX, get(store, CLUSTER_KEY)).await {
            Ok(Ok(_)) => times.push(begun.elapsed()),
            Ok(Err(error)) => return Err(error.to_string()),
            Err(_) => {
                let why =
                    etcd.and_then(EtcdStore::troubles).map(|why| format!(": {why}")).unwrap_or_default();
                return Err(format!("no answer within {} s{why}", ANSWER_WAIT_MAX.as_secs()));
            }
        }
    }
    Ok(times)
}

/// How each member is that the address names. One that does not answer is a warning: an etcd is there for that, as long
/// as the others are more than half of all.
fn members(said: &[Said]) -> Vec<Check> {
    let ours = etcd_of_most(said);
    let check = |(member, said): &Said| {
        let name = format!("etcd member {member}");
        match (said, &ours) {
            (Ok(health), Some(ours)) if health.etcd_id != ours.etcd_id => Check::fail(
                &name,
                format!(
                    "answers, but belongs to another etcd ({:x}) than {} ({:x})",
                    health.etcd_id, ours.member, ours.etcd_id
                ),
                "name the members of one etcd only: records in two would be two clusters",
            ),
            (Ok(health), _) => Check::ok(&name, format!("answers, version {}", health.version)),
            (Err(StoreError::Invalid(why)), _) => Check::warn(
                &name,
                format!("refuses: {}", without_name(member, why)),
                "see --meta and its settings, and which users and roles this etcd has",
            ),
            (Err(error), _) => Check::warn(
                &name,
                format!("cannot be used: {}", without_name(member, &reason(error))),
                "start it, or see what keeps it from answering here; until then fewer others may fail. One that is \
                 gone for good is replaced in etcd and in --meta",
            ),
        }
    };
    said.iter().map(check).collect()
}

/// Of the etcds that answered the one to which most members belong, the first of equals, as one of its members says.
fn etcd_of_most(said: &[Said]) -> Option<&Health> {
    let healths = || said.iter().filter_map(|(_, said)| said.as_ref().ok());
    let mut counts: HashMap<u64, usize> = HashMap::new();
    for health in healths() {
        *counts.entry(health.etcd_id).or_default() += 1;
    }
    let most = counts.values().copied().max()?;
    healths().find(|health| counts.get(&health.etcd_id) == Some(&most))
}

/// What an error says beyond its kind.
fn reason(error: &StoreError) -> String {
    match error {
        StoreError::Unavailable(why)
        | StoreError::OutcomeUnknown(why)
        | StoreError::Invalid(why)
        | StoreError::Failed(why) => why.clone(),
        StoreError::Compacted | StoreError::LeaseUnknown => error.to_string(),
    }
}

/// A reason without the member that the check is named after.
fn without_name<'a>(member: &str, why: &'a str) -> &'a str {
    why.strip_prefix(member).and_then(|rest| rest.strip_prefix(": ")).unwrap_or(why)
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

/// Of all members that answer, the worst; `None`: none answers.
fn version(healths: &[&Health]) -> Option<Check> {
    const NAME: &str = "etcd version";
    if healths.is_empty() {
        return None;
    }
    let told: Vec<String> =
        healths.iter().map(|health| format!("{} ({})", health.version, health.member)).collect();
    let detail = told.join(", ");
    let numbers = |health: &&Health| {
        let mut parts = health.version.split('.').map(|part| part.parse::<u32>().ok());
        Some((parts.next().flatten()?, parts.next().flatten()?))
    };
    let versions: Vec<Option<(u32, u32)>> = healths.iter().map(numbers).collect();
    Some(if versions.iter().flatten().any(|version| *version < (3, 4)) {
        Check::fail(NAME, detail, "use etcd 3.4 or later")
    } else if versions.contains(&None) {
        Check::warn(NAME, detail, "a version that cannot be read: see that it is 3.4 or later")
    } else {
        Check::ok(NAME, detail)
    })
}

/// The member with the largest database; one that has no room left comes first.
fn fullest<'a>(healths: &[&'a Health]) -> Option<&'a Health> {
    healths.iter().copied().max_by_key(|health| (health.out_of_space == Some(true), health.db_bytes))
}

fn room(health: &Health, quota: Option<u64>) -> Check {
    const NAME: &str = "etcd room";
    let used = size::human(health.db_bytes);
    if health.out_of_space == Some(true) {
        return Check::fail(
            NAME,
            format!("{used}: its quota is used up and it refuses changes (alarm NOSPACE)"),
            "compact it (`etcdctl compact REVISION`) and defragment it (`etcdctl defrag --cluster`), or raise \
             --quota-backend-bytes; then `etcdctl alarm disarm`. Start it with --auto-compaction-retention=1h",
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
        Health {
            member: "127.0.0.1:2379".into(),
            etcd_id: 7,
            version: version.into(),
            db_bytes,
            out_of_space,
        }
    }

    #[test]
    fn an_etcd_is_judged() {
        let full = health("3.5.16", 90, Some(false));
        assert_eq!(room(&full, Some(100)).outcome, Outcome::Warn);
        assert_eq!(room(&full, Some(1000)).outcome, Outcome::Ok);
        assert_eq!(room(&full, None).outcome, Outcome::Ok);
        assert_eq!(room(&health("3.5.16", 1, Some(true)), Some(1000)).outcome, Outcome::Fail);
        assert_eq!(latency("x", vec![Duration::from_millis(1)]).outcome, Outcome::Ok);
        assert_eq!(latency("x", vec![Duration::from_millis(80)]).outcome, Outcome::Warn);
    }

    #[test]
    fn the_worst_version_counts() {
        assert_eq!(version(&[]), None);
        for (versions, expected) in [
            (&["3.5.16"][..], Outcome::Ok),
            (&["3.5.16", "3.4.23", "4.0.0"], Outcome::Ok),
            (&["3.5.16", "3.3.27"], Outcome::Fail),
            (&["", "3.5.16"], Outcome::Warn),
            (&["next", "2.3.8"], Outcome::Fail),
        ] {
            let healths: Vec<Health> = versions.iter().map(|version| health(version, 0, None)).collect();
            let check = version(&healths.iter().collect::<Vec<_>>()).unwrap();
            assert_eq!(check.outcome, expected, "{check:?}");
        }
    }

    #[test]
    fn the_fullest_member_counts() {
        let of = |all: &[Health]| {
            fullest(&all.iter().collect::<Vec<_>>()).map(|health| (health.db_bytes, health.out_of_space))
        };
        assert_eq!(of(&[]), None);
        let (small, large) = (health("3.5.16", 1, Some(false)), health("3.5.16", 9, None));
        assert_eq!(of(&[small.clone(), large.clone()]), Some((9, None)));
        assert_eq!(of(&[large, health("3.5.16", 2, Some(true)), small]), Some((2, Some(true))));
    }

    #[test]
    fn each_member_is_judged_for_itself() {
        let answers = |etcd_id| Ok(Health { etcd_id, ..health("3.5.16", 0, None) });
        let away = || Err(StoreError::Unavailable("b:1: not connected: Connection refused".into()));
        let refuses = || Err(StoreError::Invalid("etcdserver: user name is empty".into()));
        let anew = || Err(StoreError::Failed("it has gone back".into()));
        use Outcome::{Fail, Ok as Fine, Warn};
        for (what, answers, expected) in [
            ("all well", [answers(7), answers(7), answers(7)], [Fine, Fine, Fine]),
            ("one away", [answers(7), away(), answers(7)], [Fine, Warn, Fine]),
            ("all away", [away(), away(), away()], [Warn, Warn, Warn]),
            ("a stranger first", [answers(8), answers(7), answers(7)], [Fail, Fine, Fine]),
            ("a stranger last", [answers(7), answers(7), answers(8)], [Fine, Fine, Fail]),
            ("a stranger, and one away", [answers(7), away(), answers(8)], [Fine, Warn, Fail]),
            ("strangers", [answers(7), answers(8), answers(9)], [Fine, Fail, Fail]),
            ("users and backups", [answers(7), refuses(), anew()], [Fine, Warn, Warn]),
        ] {
            let names = ["a:1", "b:1", "c:1"].map(str::to_owned);
            let said: Vec<Said> = names.into_iter().zip(answers).collect();
            let checks = members(&said);
            assert_eq!(checks.iter().map(|check| check.outcome).collect::<Vec<_>>(), expected, "{what}");
            assert_eq!(checks[1].check, "etcd member b:1");
            for check in &checks {
                assert_eq!(check.advice.is_empty(), check.outcome == Fine, "{what}: {check:?}");
            }
        }
        let told = |said: StoreResult<Health>| members(&[("b:1".to_owned(), said)]).remove(0).detail;
        assert_eq!(told(answers(7)), "answers, version 3.5.16");
        assert_eq!(told(away()), "cannot be used: not connected: Connection refused");
        assert_eq!(told(refuses()), "refuses: etcdserver: user name is empty");
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
