//! `shardfs volume policy`: what the cluster adds by itself when it runs out of room.

use clap::Subcommand;
use serde_json::{Value, json};
use shardfs_proto::client::Client;
use shardfs_proto::types::NodeId;
use shardfs_proto::types::provisioning::{IOPS_TIERS, Money, Policy, Prices, Provisioning};

use crate::failure::{Failure, Result};
use crate::output::Out;
use crate::size;

/// What EBS counts in.
const GIB: u64 = 1 << 30;

/// Of `shardfs volume policy`.
pub(super) const EXAMPLES: &str = "Examples:
  shardfs volume policy set --min-free 100GiB --size 200GiB --iops 6000 --max-volumes 12 --max-cost 5000
  shardfs volume policy
  shardfs volume policy off";

const SET_EXAMPLES: &str = "Examples:
  shardfs volume policy set --min-free 100GiB --size 200GiB --max-volumes 12 --max-cost 3000
  shardfs volume policy set --min-free 50GiB --size 200GiB --iops 6000 --encrypted --max-volumes 6 --max-cost 2500 \\
    --nodes node-1,node-2,node-3 --price-gib 0.14 --price-iops 0.072,0.05,0.036

What a volume costs a month: its GiB times the price of a GiB, and its IOPS times the price of an IOPS: the first price up to 32000 of a volume, \
                             the second from there to 64000, the third above. Without --price-gib and --price-iops: the list prices of \
                             us-east-1 of the middle of 2025, in US dollars. They are not looked up: give those of your region. Nothing but volumes \
                             is counted: no machines, no snapshots.";

/// `shardfs volume policy`.
#[derive(clap::Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Say when a volume is added, and how far that may go
    ///
    /// When no volume that is served has --min-free of room for shards, one EBS volume (io2) of --size is made, attached to all living nodes, and served
    /// by the one that serves the fewest. The next one is not made before that one is served. Never more than --max-volumes volumes of kind
    /// `aws`, and never above --max-cost for all of them; those that were added by hand count. Nothing is ever removed or made smaller.
    ///
    /// Replaces the policy that there was. New shards go to the new volume; a shard that grows stays where it is.
    #[command(after_help = SET_EXAMPLES)]
    Set(SetArgs),
    /// Add nothing by itself any more
    ///
    /// The volumes stay. One whose disk is being made is given up, unless it is there already.
    #[command(after_help = "Example:\n  shardfs volume policy off")]
    Off {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(clap::Args, Debug)]
struct SetArgs {
    /// Add a volume when none has so much room, such as 100GiB; at most three quarters of --size
    #[arg(long, value_name = "BYTES", value_parser = size::parse)]
    min_free: u64,
    /// Size of a volume that is added: a whole number of GiB, such as 200GiB
    #[arg(long, value_name = "BYTES", value_parser = size::parse)]
    size: u64,
    /// Its reads and writes a second [default: 10 for every GiB, at least 3000]
    #[arg(long, value_name = "N", default_value = "0", hide_default_value = true)]
    iops: u32,
    /// How many volumes of kind `aws` there may be
    #[arg(long, value_name = "N")]
    max_volumes: u32,
    /// What all of them may cost a month, such as 2000
    #[arg(long, value_name = "MONEY")]
    max_cost: Money,
    /// Encrypt it with the account's default key [default: as the account has it]
    #[arg(long)]
    encrypted: bool,
    /// Encrypt it with this key: its id, ARN, or alias/NAME
    #[arg(long, value_name = "KEY")]
    kms_key: Option<String>,
    /// The nodes that may have it [default: all that use the cloud]
    #[arg(long, value_name = "NODE,...", value_delimiter = ',')]
    nodes: Vec<NodeId>,
    /// A GiB a month [default: 0.125]
    #[arg(long, value_name = "MONEY")]
    price_gib: Option<Money>,
    /// An IOPS a month, in three tiers [default: 0.065,0.0455,0.032]
    #[arg(long, value_name = "MONEY,MONEY,MONEY", value_delimiter = ',')]
    price_iops: Vec<Money>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl SetArgs {
    fn policy(self) -> Result<Policy> {
        let gib = u32::try_from(self.size / GIB).ok().filter(|_| self.size.is_multiple_of(GIB));
        let gib = gib.ok_or_else(|| {
            Failure::usage(format!("--size is {} bytes, which EBS cannot make", self.size))
                .hint("it counts in GiB: give a whole number of them, such as 200GiB")
        })?;
        let list = Prices::LIST;
        let iops = match self.price_iops.as_slice() {
            [] => list.iops,
            prices => <[Money; 3]>::try_from(prices).map_err(|_| {
                Failure::usage(format!("--price-iops has {} prices, not three", prices.len())).hint(
                    "one up to 32000 IOPS of a volume, one from there to 64000, one above; the same three times if there are no tiers",
                )
            })?,
        };
        Ok(Policy {
            min_free_bytes: self.min_free,
            gib,
            iops: self.iops,
            kms_key: self.kms_key.or_else(|| self.encrypted.then(String::new)),
            volumes_max: self.max_volumes,
            cost_max: self.max_cost,
            prices: Prices { gib: self.price_gib.unwrap_or(list.gib), iops },
            nodes: self.nodes,
        })
    }
}

/// Runs.
pub(super) async fn run(client: &Client, args: Args) -> Result<()> {
    let (state, as_json) = match args.command {
        None => (client.provisioning().await?, args.json),
        Some(Command::Off { json }) => (client.set_provisioning(None).await?, json),
        Some(Command::Set(set)) => {
            let json = set.json;
            (client.set_provisioning(Some(&set.policy()?)).await?, json)
        }
    };
    let mut out = Out::new();
    match as_json {
        true => out.json(&to_json(&state))?,
        false => out.bytes(details(&state).as_bytes())?,
    }
    out.flush()
}

/// For people.
fn details(state: &Provisioning) -> String {
    let mut lines = Vec::new();
    match &state.policy {
        None => lines.push(("policy", "off: no volume is added by itself".to_owned())),
        Some(policy) => {
            lines.push((
                "policy",
                format!(
                    "add a volume of {} GiB with {} IOPS when none has {} of room",
                    policy.gib,
                    policy.iops,
                    size::human(policy.min_free_bytes)
                ),
            ));
            lines.push((
                "ceilings",
                format!("{} volumes of kind aws, {} a month", policy.volumes_max, policy.cost_max),
            ));
            let [first, second, third] = policy.prices.iops;
            let [low, high] = IOPS_TIERS;
            lines.push((
                "prices",
                format!(
                    "a GiB {}, an IOPS {first} up to {low}, {second} up to {high}, {third} above; a month",
                    policy.prices.gib
                ),
            ));
            lines.push((
                "encryption",
                match policy.kms_key.as_deref() {
                    None => "as the account has it".to_owned(),
                    Some("") => "with the account's default key".to_owned(),
                    Some(key) => format!("with {key}"),
                },
            ));
            let names: Vec<&str> = policy.nodes.iter().map(NodeId::as_str).collect();
            lines.push((
                "nodes",
                match names.len() {
                    0 => "all that live and use the cloud".to_owned(),
                    _ => format!("{}, as far as they live", names.join(" ")),
                },
            ));
            lines.push((
                "acts",
                state.acting.as_ref().map_or_else(|| "no node".to_owned(), |node| node.to_string()),
            ));
        }
    }
    lines.push(("volumes", format!("{} of kind aws, {} a month", state.volumes, state.monthly)));
    lines.push((
        "most room",
        match &state.roomiest {
            Some((volume, bytes)) => format!("{} on {volume}", size::human(*bytes)),
            None => "not known".to_owned(),
        },
    ));
    lines.push(("now", state.verdict.clone()));
    if state.failures > 0 {
        lines.push(("failed", format!("{} times: {}", state.failures, state.last_error)));
    }
    lines.into_iter().map(|(name, value)| format!("{name:<12}{value}\n")).collect()
}

/// As JSON.
fn to_json(state: &Provisioning) -> Value {
    json!({
        "policy": state.policy.as_ref().map(|policy| json!({
            "min_free_bytes": policy.min_free_bytes,
            "size_bytes": u64::from(policy.gib) * GIB,
            "iops": policy.iops,
            "encrypted": policy.kms_key.is_some(),
            "kms_key": policy.kms_key.as_deref().filter(|key| !key.is_empty()),
            "max_volumes": policy.volumes_max,
            "max_cost": policy.cost_max.units(),
            "price_gib": policy.prices.gib.units(),
            "price_iops": policy.prices.iops.map(Money::units),
            "nodes": policy.nodes,
        })),
        "acting": state.acting,
        "volumes": state.volumes,
        "monthly_cost": state.monthly.units(),
        "roomiest": state.roomiest.as_ref().map(|(volume, bytes)| json!({ "volume": volume, "free_bytes": bytes })),
        "making": state.making,
        "adds": state.adds,
        "now": state.verdict,
        "failures": state.failures,
        "last_error": (!state.last_error.is_empty()).then_some(&state.last_error),
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use shardfs_proto::types::VolumeId;

    use super::*;

    #[derive(Parser, Debug)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn set(more: &[&str]) -> Result<Policy> {
        let words = ["policy", "set", "--min-free", "100GiB", "--max-volumes", "12", "--max-cost", "2000.50"];
        let line = Line::try_parse_from(words.iter().chain(more)).unwrap();
        match line.args.command {
            Some(Command::Set(set)) => set.policy(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_policy_is_what_was_typed() {
        let policy = set(&["--size", "200GiB"]).unwrap();
        assert_eq!((policy.min_free_bytes, policy.gib, policy.iops), (100 * GIB, 200, 0));
        assert_eq!((policy.volumes_max, policy.cost_max.to_string().as_str()), (12, "2000.50"));
        assert_eq!((policy.prices, policy.kms_key, policy.nodes.len()), (Prices::LIST, None, 0));
        let more = [
            "--size",
            "1TiB",
            "--encrypted",
            "--nodes",
            "a,b",
            "--price-iops",
            "1,2,0.5",
            "--price-gib",
            "3",
        ];
        let policy = set(&more).unwrap();
        assert_eq!((policy.gib, policy.kms_key.as_deref(), policy.nodes.len()), (1024, Some(""), 2));
        assert_eq!(policy.prices.iops.map(Money::micros), [1_000_000, 2_000_000, 500_000]);
        assert_eq!(policy.prices.gib.micros(), 3_000_000);
        for wrong in [&["--size", "1500MiB"][..], &["--size", "8GiB", "--price-iops", "1,2"]] {
            set(wrong).unwrap_err();
        }
        let bare = Line::try_parse_from(["policy", "--json"]).unwrap();
        assert!(bare.args.json && bare.args.command.is_none());
        for wrong in [&["policy", "set"][..], &["policy", "set", "--max-cost", "$5"], &["policy", "on"]] {
            assert!(Line::try_parse_from(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn what_is_shown_says_why() {
        let mut state = Provisioning {
            policy: Some(set(&["--size", "200GiB", "--iops", "6000"]).unwrap()),
            acting: NodeId::new("node-1").ok(),
            volumes: 3,
            monthly: "1245".parse().unwrap(),
            roomiest: Some((VolumeId::new("vol-2").unwrap(), 140 * GIB)),
            making: None,
            adds: None,
            verdict: "nothing: vol-2 has 140 GiB of room".into(),
            failures: 0,
            last_error: String::new(),
        };
        let said = details(&state);
        for part in [
            "a volume of 200 GiB with 6000 IOPS when none has 100 GiB of room",
            "12 volumes of kind aws, 2000.50 a month",
            "3 of kind aws, 1245.00 a month",
            "140 GiB on vol-2",
            "now         nothing: vol-2 has",
        ] {
            assert!(said.contains(part), "no {part:?} in\n{said}");
        }
        assert!(!said.contains("failed"), "{said}");
        (state.failures, state.last_error) = (2, "no quota".into());
        assert!(details(&state).contains("failed      2 times: no quota"));
        let json = to_json(&state);
        assert_eq!(
            (json["monthly_cost"].as_f64(), json["policy"]["max_cost"].as_f64()),
            (Some(1245.0), Some(2000.5))
        );
        assert_eq!(json["policy"]["price_iops"][1].as_f64(), Some(0.0455));
        state.policy = None;
        assert!(details(&state).starts_with("policy      off"));
        assert!(to_json(&state)["policy"].is_null());
    }
}
