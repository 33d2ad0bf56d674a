//! From measurements to a report: samples of many runs are gathered per metric and target, and written as a text
//! table or JSON. Targets are what is compared (directories, a cluster); the ratios are against one of them.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use serde::Serialize;

use super::environment::Environment;
use super::stats::{Latencies, LatencySummary, Unit, figure, median, microseconds};

/// Format of the JSON report; grows when a field changes its meaning or goes away.
const JSON_FORMAT: u32 = 1;

/// Prints the text of a report, and writes its JSON where that was asked for; `-` means standard output, instead of the text.
pub fn write(
    to: Option<&Path>,
    json: impl FnOnce() -> Result<String>,
    text: impl FnOnce() -> String,
) -> Result<()> {
    if to == Some(Path::new("-")) {
        println!("{}", json()?);
        return Ok(());
    }
    if let Some(path) = to {
        std::fs::write(path, json()? + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    print!("{}", text());
    Ok(())
}

/// One figure of one run.
pub struct Sample {
    /// What was measured, the same for every target: `create+write+close`.
    pub name: String,
    /// How many worked at it at a time.
    pub workers: usize,
    /// What `value` counts.
    pub unit: Unit,
    /// The rate.
    pub value: f64,
    /// How long each call took, where single calls were timed.
    pub latencies: Option<Latencies>,
}

/// What is compared.
#[derive(Clone, Debug, Serialize)]
pub struct Target {
    /// Its column.
    pub name: String,
    /// The type of its filesystem, or `cluster`.
    pub filesystem: String,
}

struct Metric {
    name: String,
    workers: usize,
    unit: Unit,
    /// One an entry of `targets`.
    columns: Vec<Column>,
}

#[derive(Default)]
struct Column {
    values: Vec<f64>,
    latencies: Option<Latencies>,
}

/// Everything that one invocation measured.
pub struct Report {
    environment: Environment,
    /// Settings that the figures depend on, in words.
    settings: Vec<(String, String)>,
    targets: Vec<Target>,
    base: usize,
    metrics: Vec<Metric>,
}

impl Report {
    /// An empty one. `base` names the target that ratios refer to; default: the first.
    pub fn new(environment: Environment, targets: Vec<Target>, base: Option<&str>) -> Result<Report> {
        for (i, target) in targets.iter().enumerate() {
            if targets[..i].iter().any(|t| t.name == target.name) {
                bail!("two targets are called {:?}: name them with NAME=DIR", target.name);
            }
        }
        let base = match base {
            None => 0,
            Some(name) => targets.iter().position(|t| t.name == name).with_context(|| {
                let names: Vec<&str> = targets.iter().map(|t| t.name.as_str()).collect();
                format!("--base {name}: no such target; there are {}", names.join(", "))
            })?,
        };
        Ok(Report { environment, settings: Vec::new(), targets, base, metrics: Vec::new() })
    }

    /// Notes a setting for the head.
    pub fn setting(&mut self, name: &str, value: impl Into<String>) {
        self.settings.push((name.to_owned(), value.into()));
    }

    /// Adds one run's figures of the target with that number.
    pub fn add(&mut self, target: usize, samples: Vec<Sample>) {
        for sample in samples {
            let known =
                self.metrics.iter().position(|m| m.name == sample.name && m.workers == sample.workers);
            let at = known.unwrap_or_else(|| {
                self.metrics.push(Metric {
                    name: sample.name.clone(),
                    workers: sample.workers,
                    unit: sample.unit,
                    columns: self.targets.iter().map(|_| Column::default()).collect(),
                });
                self.metrics.len() - 1
            });
            let column = &mut self.metrics[at].columns[target];
            column.values.push(sample.value);
            if let Some(latencies) = sample.latencies {
                match &mut column.latencies {
                    Some(all) => all.add(&latencies),
                    none => *none = Some(latencies),
                }
            }
        }
    }

    /// The text for people: a head, the medians, the latencies.
    pub fn text(&self) -> String {
        let mut out = String::new();
        let _ = writeln!(out, "{}", self.environment.line());
        for target in &self.targets {
            let _ = writeln!(out, "{}: {}", target.name, target.filesystem);
        }
        for (name, value) in &self.settings {
            let _ = writeln!(out, "{name}: {value}");
        }
        out.push('\n');
        out.push_str(&self.rates().to_text());
        let latencies = self.latency_table();
        if !latencies.rows.is_empty() {
            out.push_str("\nlatency of single calls, all runs together\n");
            out.push_str(&latencies.to_text());
        }
        out
    }

    fn rates(&self) -> Table {
        let mut head = vec!["median".to_owned(), "workers".to_owned()];
        let base = &self.targets[self.base].name;
        for (i, target) in self.targets.iter().enumerate() {
            head.push(target.name.clone());
            if i != self.base {
                head.push(format!("/ {base}"));
            }
        }
        let mut table = Table { head, rows: Vec::new() };
        for metric in &self.metrics {
            let mut row = vec![metric.name.clone(), metric.workers.to_string()];
            let base = median(&metric.columns[self.base].values);
            for (i, column) in metric.columns.iter().enumerate() {
                let value = median(&column.values);
                row.push(value.map_or("-".to_owned(), |v| format!("{} {}", figure(v), metric.unit.as_str())));
                if i != self.base {
                    row.push(ratio(value, base).map_or("-".to_owned(), ratio_text));
                }
            }
            table.rows.push(row);
        }
        table
    }

    fn latency_table(&self) -> Table {
        let head = ["call", "workers", "target", "p50", "p95", "p99", "max", "calls"];
        let mut table = Table { head: head.map(str::to_owned).to_vec(), rows: Vec::new() };
        for metric in &self.metrics {
            for (target, column) in self.targets.iter().zip(&metric.columns) {
                let Some(s) = column.latencies.as_ref().and_then(Latencies::summary) else { continue };
                let mut row = vec![metric.name.clone(), metric.workers.to_string(), target.name.clone()];
                row.extend([s.p50_us, s.p95_us, s.p99_us, s.max_us].map(microseconds));
                row.push(s.calls.to_string());
                table.rows.push(row);
            }
        }
        table
    }

    /// The report as JSON.
    pub fn json(&self) -> Result<String> {
        let metrics = self.metrics.iter().map(|metric| {
            let base = median(&metric.columns[self.base].values);
            let results = self.targets.iter().zip(&metric.columns).filter(|(_, c)| !c.values.is_empty());
            JsonMetric {
                name: &metric.name,
                workers: metric.workers,
                unit: metric.unit,
                results: results
                    .map(|(target, column)| JsonResult {
                        target: &target.name,
                        median: median(&column.values),
                        ratio: ratio(median(&column.values), base),
                        runs: &column.values,
                        latency: column.latencies.as_ref().and_then(Latencies::summary),
                    })
                    .collect(),
            }
        });
        let document = JsonReport {
            format: JSON_FORMAT,
            program: "shardfs bench",
            environment: &self.environment,
            settings: self.settings.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect(),
            targets: &self.targets,
            base: &self.targets[self.base].name,
            metrics: metrics.collect(),
        };
        serde_json::to_string_pretty(&document).context("a report is always JSON")
    }

    /// See [`write()`].
    pub fn write(&self, json: Option<&Path>) -> Result<()> {
        write(json, || self.json(), || self.text())
    }
}

fn ratio(value: Option<f64>, base: Option<f64>) -> Option<f64> {
    match (value, base) {
        (Some(value), Some(base)) if base > 0.0 => Some(value / base),
        (_, _) => None,
    }
}

/// Two digits that mean something: `1.27`, `0.34`, `0.0026`.
fn ratio_text(ratio: f64) -> String {
    match ratio {
        r if r >= 0.1 || r == 0.0 => format!("{r:.2}"),
        r if r >= 0.01 => format!("{r:.3}"),
        r => format!("{r:.4}"),
    }
}

#[derive(Serialize)]
struct JsonReport<'a> {
    format: u32,
    program: &'a str,
    environment: &'a Environment,
    settings: std::collections::BTreeMap<&'a str, &'a str>,
    targets: &'a [Target],
    base: &'a str,
    metrics: Vec<JsonMetric<'a>>,
}

#[derive(Serialize)]
struct JsonMetric<'a> {
    name: &'a str,
    workers: usize,
    unit: Unit,
    results: Vec<JsonResult<'a>>,
}

#[derive(Serialize)]
struct JsonResult<'a> {
    target: &'a str,
    median: Option<f64>,
    ratio: Option<f64>,
    runs: &'a [f64],
    latency: Option<LatencySummary>,
}

/// Text in columns: the first to the left, the others to the right.
struct Table {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    fn to_text(&self) -> String {
        let widths: Vec<usize> = (0..self.head.len())
            .map(|i| {
                self.rows.iter().chain([&self.head]).map(|row| row[i].chars().count()).max().unwrap_or(0)
            })
            .collect();
        let mut out = String::new();
        for row in [&self.head].into_iter().chain(&self.rows) {
            let mut line = String::new();
            for (i, (cell, width)) in row.iter().zip(&widths).enumerate() {
                if i == 0 {
                    let _ = write!(line, "{cell:<width$}");
                } else {
                    let _ = write!(line, "  {cell:>width$}");
                }
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn report(base: Option<&str>) -> Result<Report> {
        let environment = Environment {
            version: "0.0.0".to_owned(),
            started: "2026-01-02T03:04:05Z".to_owned(),
            cpus: 2,
            memory_bytes: 24 << 30,
            kernel: "6.18".to_owned(),
        };
        let target = |name: &str| Target { name: name.to_owned(), filesystem: "ext4".to_owned() };
        let mut report = Report::new(environment, vec![target("a"), target("b")], base)?;
        report.setting("runs", "3");
        for value in [100.0, 300.0, 200.0] {
            report.add(0, vec![sample("create", value)]);
            report.add(1, vec![sample("create", value / 4.0)]);
        }
        report.add(1, vec![sample("only b", 7.0)]);
        Ok(report)
    }

    fn sample(name: &str, value: f64) -> Sample {
        let mut latencies = Latencies::new();
        latencies.record(Duration::from_millis(2));
        Sample { name: name.to_owned(), workers: 8, unit: Unit::PerSecond, value, latencies: Some(latencies) }
    }

    #[test]
    fn text() {
        let want = "\
shardfs 0.0.0 on 2 CPUs, 24 GiB, Linux 6.18, 2026-01-02T03:04:05Z
a: ext4
b: ext4
runs: 3

median  workers       a        b   / a
create        8  200 /s  50.0 /s  0.25
only b        8       -  7.00 /s     -

latency of single calls, all runs together
call    workers  target      p50      p95      p99      max  calls
create        8       a  2.00 ms  2.00 ms  2.00 ms  2.00 ms      3
create        8       b  2.00 ms  2.00 ms  2.00 ms  2.00 ms      3
only b        8       b  2.00 ms  2.00 ms  2.00 ms  2.00 ms      1
";
        assert_eq!(report(None).unwrap().text(), want);
    }

    #[test]
    fn ratios() {
        for (ratio, text) in
            [(1.274, "1.27"), (0.25, "0.25"), (0.0431, "0.043"), (0.00264, "0.0026"), (0.0, "0.00")]
        {
            assert_eq!(ratio_text(ratio), text);
        }
    }

    #[test]
    fn json() {
        let text = report(Some("b")).unwrap().json().unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["format"], 1);
        assert_eq!(value["base"], "b");
        assert_eq!(value["environment"]["cpus"], 2);
        assert_eq!(value["settings"]["runs"], "3");
        let create = &value["metrics"][0];
        assert_eq!((create["name"].as_str(), create["unit"].as_str()), (Some("create"), Some("op/s")));
        assert_eq!(create["results"][0]["median"], 200.0);
        assert_eq!(create["results"][0]["ratio"], 4.0);
        assert_eq!(create["results"][0]["runs"], serde_json::json!([100.0, 300.0, 200.0]));
        assert_eq!(create["results"][1]["latency"]["calls"], 3);
        assert_eq!(value["metrics"][1]["results"].as_array().unwrap().len(), 1);
    }

    #[test]
    fn targets_are_told_apart() {
        assert!(report(Some("c")).err().unwrap().to_string().contains("a, b"));
        let twice = vec![Target { name: "x".into(), filesystem: "ext4".into() }; 2];
        let environment = Environment::look(shardfs_proto::types::clock::now());
        assert!(Report::new(environment, twice, None).is_err());
    }
}
