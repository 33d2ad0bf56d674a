//! Figures: latency histograms, medians over repeated runs, and how figures are written for people.
//!
//! Nothing here measures. A histogram holds nanoseconds; a rate is a plain `f64` of its [`Unit`].

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

/// Longest latency that is told apart, nanoseconds: what takes longer counts as this long.
const LATENCY_MAX_NS: u64 = 1_000_000_000_000;
/// Decimal digits of a latency that are kept.
const LATENCY_DIGITS: u8 = 3;

/// How long calls took.
#[derive(Clone)]
pub struct Latencies(Histogram<u64>);

impl Latencies {
    /// Empty.
    pub fn new() -> Latencies {
        Latencies(
            Histogram::new_with_bounds(1, LATENCY_MAX_NS, LATENCY_DIGITS)
                .expect("the bounds are constants in range"),
        )
    }

    /// Adds one call.
    pub fn record(&mut self, took: Duration) {
        self.0.saturating_record(took.as_nanos().clamp(1, u128::from(LATENCY_MAX_NS)) as u64);
    }

    /// Adds all calls of another.
    pub fn add(&mut self, other: &Latencies) {
        self.0.add(&other.0).expect("all histograms have the same bounds");
    }

    /// Calls recorded.
    pub fn count(&self) -> u64 {
        self.0.len()
    }

    /// The percentiles that are reported; `None` if nothing was recorded.
    pub fn summary(&self) -> Option<LatencySummary> {
        if self.0.is_empty() {
            return None;
        }
        let us = |ns: u64| ns as f64 / 1_000.0;
        Some(LatencySummary {
            calls: self.0.len(),
            p50_us: us(self.0.value_at_quantile(0.50)),
            p95_us: us(self.0.value_at_quantile(0.95)),
            p99_us: us(self.0.value_at_quantile(0.99)),
            max_us: us(self.0.max()),
        })
    }
}

impl Default for Latencies {
    fn default() -> Latencies {
        Latencies::new()
    }
}

/// Percentiles of the latency of one kind of call, microseconds.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct LatencySummary {
    /// Calls, over all runs.
    pub calls: u64,
    /// Half took no longer.
    pub p50_us: f64,
    /// 95 of 100 took no longer.
    pub p95_us: f64,
    /// 99 of 100 took no longer.
    pub p99_us: f64,
    /// The longest.
    pub max_us: f64,
}

/// What a figure counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub enum Unit {
    /// Operations per second.
    #[serde(rename = "op/s")]
    PerSecond,
    /// 2^20 bytes per second.
    #[serde(rename = "MiB/s")]
    MebibytesPerSecond,
    /// Seconds of wall time: less is better.
    #[serde(rename = "s")]
    Seconds,
}

impl Unit {
    /// As it stands behind a figure.
    pub fn as_str(self) -> &'static str {
        match self {
            Unit::PerSecond => "/s",
            Unit::MebibytesPerSecond => "MiB/s",
            Unit::Seconds => "s",
        }
    }
}

/// The middle of the figures, or the mean of the two middle ones; `None` if there are none.
pub fn median(figures: &[f64]) -> Option<f64> {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

/// The value below which a share of the others lie; 0 of none.
pub fn quantile(sorted: &[f64], share: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted.get((share * last as f64).round() as usize).copied().unwrap_or(0.0)
}

/// `count` per second; 0 if no time passed, which no clock that works shows.
pub fn per_second(count: u64, took: Duration) -> f64 {
    if took.is_zero() { 0.0 } else { count as f64 / took.as_secs_f64() }
}

/// Bytes as 2^20 bytes per second.
pub fn mebibytes_per_second(bytes: u64, took: Duration) -> f64 {
    per_second(bytes, took) / f64::from(1 << 20)
}

/// Three digits that mean something, thousands apart: `1.23`, `45.6`, `789`, `12,300`.
pub fn figure(value: f64) -> String {
    if !value.is_finite() {
        return "-".to_owned();
    }
    let size = value.abs();
    if size < 10.0 {
        return format!("{value:.2}");
    }
    if size < 100.0 {
        return format!("{value:.1}");
    }
    let mut step = 1.0;
    while size / step >= 1_000.0 {
        step *= 10.0;
    }
    let rounded = ((value / step).round() * step) as i64;
    thousands(rounded)
}

/// A latency in the unit in which it is short: `870 ns`, `12.3 us`, `4.56 ms`, `1.20 s`.
pub fn microseconds(us: f64) -> String {
    let (value, unit) = match us {
        us if us < 1.0 => (us * 1_000.0, "ns"),
        us if us < 1_000.0 => (us, "us"),
        us if us < 1_000_000.0 => (us / 1_000.0, "ms"),
        us => (us / 1_000_000.0, "s"),
    };
    format!("{} {unit}", figure(value))
}

fn thousands(number: i64) -> String {
    let digits = number.unsigned_abs().to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    if number < 0 { format!("-{text}") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[7.0]), Some(7.0));
        assert_eq!(median(&[9.0, 1.0, 5.0]), Some(5.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 9.0]), Some(3.0));
    }

    #[test]
    fn percentiles_are_those_of_the_calls() {
        let mut a = Latencies::new();
        let mut b = Latencies::new();
        for ms in 1..=50 {
            a.record(Duration::from_millis(ms));
            b.record(Duration::from_millis(50 + ms));
        }
        a.add(&b);
        let s = a.summary().unwrap();
        assert_eq!(s.calls, 100);
        for (got, want_ms) in [(s.p50_us, 50.0), (s.p95_us, 95.0), (s.p99_us, 99.0), (s.max_us, 100.0)] {
            assert!((got / (want_ms * 1_000.0) - 1.0).abs() < 0.002, "{got} us, expected {want_ms} ms");
        }
        assert_eq!(Latencies::new().summary(), None);
    }

    #[test]
    fn no_latency_is_out_of_range() {
        let mut l = Latencies::new();
        l.record(Duration::ZERO);
        l.record(Duration::from_secs(1_000_000));
        let s = l.summary().unwrap();
        assert_eq!(s.calls, 2);
        assert!(s.max_us >= 999e6, "{}", s.max_us);
    }

    #[test]
    fn figures_for_people() {
        for (value, text) in [
            (0.0, "0.00"),
            (1.234, "1.23"),
            (45.67, "45.7"),
            (789.4, "789"),
            (999.6, "1,000"),
            (12_345.0, "12,300"),
            (1_234_567.0, "1,230,000"),
            (f64::NAN, "-"),
        ] {
            assert_eq!(figure(value), text, "{value}");
        }
        for (us, text) in
            [(0.87, "870 ns"), (12.34, "12.3 us"), (4_560.0, "4.56 ms"), (1_200_000.0, "1.20 s")]
        {
            assert_eq!(microseconds(us), text, "{us}");
        }
    }

    #[test]
    fn rates() {
        assert_eq!(per_second(500, Duration::from_millis(250)), 2_000.0);
        assert_eq!(per_second(500, Duration::ZERO), 0.0);
        assert_eq!(mebibytes_per_second(8 << 20, Duration::from_secs(2)), 4.0);
    }
}
