//! What the cluster may add by itself when it runs out of room, and what volumes cost.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::error::{Error, Result};
use super::ids::{NodeId, VolumeId};

/// Digits behind the point of an amount.
const MONEY_DIGITS: usize = 6;
/// Millionths of a unit of money.
const MICROS: u64 = 1_000_000;

/// An amount of money, exact to a millionth: of whatever the prices are in. List prices are in US dollars.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Money(u64);

impl Money {
    /// In millionths.
    pub const fn from_micros(micros: u64) -> Money {
        Money(micros)
    }

    /// In millionths.
    pub const fn micros(self) -> u64 {
        self.0
    }

    /// As programs read it; rounded.
    pub fn units(self) -> f64 {
        self.0 as f64 / MICROS as f64
    }

    /// So many times.
    pub const fn times(self, n: u64) -> Money {
        Money(self.0.saturating_mul(n))
    }

    /// Both; what is too much for a number stays the most there is, which is above every ceiling.
    pub const fn plus(self, other: Money) -> Money {
        Money(self.0.saturating_add(other.0))
    }
}

impl fmt::Display for Money {
    /// Two digits behind the point, or as many as it takes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, micros) = (self.0 / MICROS, self.0 % MICROS);
        let digits = format!("{micros:06}");
        let shown = digits.trim_end_matches('0').len().max(2);
        write!(f, "{whole}.{}", &digits[..shown])
    }
}

impl FromStr for Money {
    type Err = Error;

    fn from_str(text: &str) -> Result<Money> {
        let wrong = || {
            Error::invalid(format!(
                "{text:?} is no amount: write a number, with up to {MONEY_DIGITS} digits behind the point, such as 2000 or 0.125"
            ))
        };
        let (whole, rest) = text.trim().split_once('.').unwrap_or((text.trim(), "0"));
        let digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        if !digits(whole) || !digits(rest) || rest.len() > MONEY_DIGITS {
            return Err(wrong());
        }
        let whole: u64 = whole.parse().map_err(|_| wrong())?;
        let micros: u64 = format!("{rest:0<MONEY_DIGITS$}").parse().map_err(|_| wrong())?;
        whole.checked_mul(MICROS).and_then(|sum| sum.checked_add(micros)).map(Money).ok_or_else(wrong)
    }
}

/// IOPS of one volume up to which the first and the second price hold; the third is for what is above.
pub const IOPS_TIERS: [u32; 2] = [32_000, 64_000];

/// What an io2 volume costs a month.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Prices {
    /// A GiB.
    pub gib: Money,
    /// One of its IOPS, by tiers: see [`IOPS_TIERS`].
    pub iops: [Money; 3],
}

impl Prices {
    /// The list prices of us-east-1 as they were published in the middle of 2025, in US dollars. Not looked up since.
    pub const LIST: Prices = Prices {
        gib: Money::from_micros(125_000),
        iops: [Money::from_micros(65_000), Money::from_micros(45_500), Money::from_micros(32_000)],
    };

    /// A volume of this size, a month.
    pub fn monthly(&self, gib: u32, iops: u32) -> Money {
        let [first, second] = IOPS_TIERS;
        let tiers = [iops.min(first), iops.clamp(first, second) - first, iops.max(second) - second];
        let of_iops = self.iops.iter().zip(tiers).map(|(price, n)| price.times(u64::from(n)));
        of_iops.fold(self.gib.times(u64::from(gib)), Money::plus)
    }
}

impl Default for Prices {
    fn default() -> Prices {
        Prices::LIST
    }
}

/// When the cluster adds a volume by itself, which, and how many at most. The metadata store keeps it in this form.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Policy {
    /// A volume is added when none has so much room.
    pub min_free_bytes: u64,
    /// GiB of a volume that is added.
    pub gib: u32,
    /// Its reads and writes a second. 0, in a request: as for a volume that an operator adds.
    pub iops: u32,
    /// It is encrypted with this key; empty: with the account's default key. `None`: as the account has it.
    #[serde(default)]
    pub kms_key: Option<String>,
    /// How many volumes of kind `aws` there may be, those that operators added included.
    pub volumes_max: u32,
    /// What all of them may cost a month.
    pub cost_max: Money,
    /// By these prices.
    #[serde(default)]
    pub prices: Prices,
    /// The nodes that may have it; empty: all whose machines are of the cloud.
    #[serde(default)]
    pub nodes: Vec<NodeId>,
}

/// What the cluster does by itself about its room, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Provisioning {
    /// `None`: it adds nothing by itself.
    pub policy: Option<Policy>,
    /// The node that looks, and would act; `None`: no living node uses a cloud, or it is not clear yet which.
    pub acting: Option<NodeId>,
    /// How many volumes of kind `aws` there are, those that are being made included.
    pub volumes: u32,
    /// What they cost a month, by the policy's prices, or else by list prices.
    pub monthly: Money,
    /// The volume with the most room for shards, and its bytes.
    pub roomiest: Option<(VolumeId, u64)>,
    /// The volume that is being made by policy.
    pub making: Option<VolumeId>,
    /// The volume that would be added now.
    pub adds: Option<VolumeId>,
    /// What would be done now and why, for people.
    pub verdict: String,
    /// Attempts in a row that failed.
    pub failures: u32,
    /// What the last one that failed said; empty: it succeeded, or there was none.
    pub last_error: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_read_and_written_exactly() {
        for (text, micros, shown) in [
            ("0", 0, "0.00"),
            ("2000", 2_000_000_000, "2000.00"),
            ("0.125", 125_000, "0.125"),
            (" 0.0455 ", 45_500, "0.0455"),
            ("1.5", 1_500_000, "1.50"),
            ("7.000001", 7_000_001, "7.000001"),
        ] {
            let money: Money = text.parse().unwrap();
            assert_eq!((money.micros(), money.to_string().as_str()), (micros, shown), "{text}");
            assert_eq!(money.to_string().parse::<Money>().unwrap(), money);
        }
        for wrong in
            ["", ".", "1.", ".5", "-1", "+1", "1,5", "$5", "1.0000001", "1e3", "99999999999999999999"]
        {
            assert!(wrong.parse::<Money>().is_err(), "{wrong}");
        }
        assert!("18446744073710".parse::<Money>().is_err(), "more than fits");
    }

    #[test]
    fn volumes_cost_by_size_and_by_tiers_of_iops() {
        let monthly = |gib, iops| Prices::LIST.monthly(gib, iops).to_string();
        // As DEPLOYMENT.md has it.
        assert_eq!(monthly(100, 2_000), "142.50");
        assert_eq!(monthly(200, 6_000), "415.00");
        assert_eq!(monthly(1_024, 10_000), "778.00");
        assert_eq!(monthly(0, 32_000), "2080.00");
        assert_eq!(monthly(0, 32_001), "2080.0455");
        assert_eq!(monthly(0, 64_000), "3536.00");
        assert_eq!(monthly(0, 64_001), "3536.032");
        let dear = Prices { gib: Money::from_micros(u64::MAX), ..Prices::LIST };
        assert_eq!(dear.monthly(2, 100), Money::from_micros(u64::MAX));
    }
}
