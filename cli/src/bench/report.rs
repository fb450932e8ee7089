//! [`Report`]: the results as JSON and as Markdown tables, with what it takes to measure them again.

use std::fmt::Write;
use std::fs;
use std::thread;
use std::time::SystemTime;

use serde::Serialize;

use crate::bench::load_test::Measured;
use crate::bench::tally::{Figures, Quantiles};
use crate::bench::worker_use::WorkerUse;

/// How it was measured.
#[derive(Debug, Clone, Serialize)]
pub struct Setup {
    /// The command line.
    pub command: String,
    /// When, in UTC.
    pub date: String,
    /// The clients' machine: processor and cores in use.
    pub client_machine: String,
    /// Whether the services ran in the clients' process.
    pub all_in_one: bool,
    /// The target model's name.
    pub target: String,
    /// Whether a latency target was given, without which goodput says nothing.
    #[serde(skip)]
    pub has_latency_target: bool,
    /// The program's version.
    pub version: &'static str,
}

impl Setup {
    /// The setup of this process, now.
    pub fn here(target: String, all_in_one: bool, has_latency_target: bool) -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name"))
            .map_or("unknown processor", |rest| {
                rest.trim_start_matches([' ', '\t', ':'])
            });
        let cores = thread::available_parallelism().map_or(0, usize::from);
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let now = humantime::format_rfc3339_seconds(SystemTime::now());
        Self {
            command: format!("specattn {}", arguments.join(" ")),
            date: now.to_string(),
            client_machine: format!("{model}, {cores} cores"),
            all_in_one,
            target,
            has_latency_target,
            version: env!("CARGO_PKG_VERSION"),
        }
    }
}

/// One load's results.
#[derive(Debug, Clone, Serialize)]
pub struct LoadReport {
    /// Requests per second, or clients.
    pub load: f64,
    /// Which of the two.
    pub unit: &'static str,
    /// What clients saw.
    #[serde(flatten)]
    pub figures: Figures,
    /// What workers did.
    pub workers: Vec<WorkerUse>,
}

/// All results.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// How it was measured.
    pub setup: Setup,
    /// The loads in the order of measuring.
    pub loads: Vec<LoadReport>,
}

impl Report {
    /// Puts results together.
    pub fn new(setup: Setup, loads: Vec<Measured>) -> Self {
        let loads = loads.into_iter().map(|measured| LoadReport {
            load: measured.load.value(),
            unit: measured.load.unit(),
            figures: measured.figures,
            workers: measured.workers,
        });
        Self {
            setup,
            loads: loads.collect(),
        }
    }

    /// The results for people.
    pub fn markdown(&self) -> String {
        let setup = &self.setup;
        let place = if setup.all_in_one {
            "services and clients in one process"
        } else {
            "clients of a gateway"
        };
        let mut text = format!(
            "`{}`\n\n{}, {}, {place}, target {}, specattn {}\n\n",
            setup.command, setup.date, setup.client_machine, setup.target, setup.version
        );
        self.latencies(&mut text);
        text.push('\n');
        self.rates(&mut text);
        text.push('\n');
        self.workers(&mut text);
        text
    }

    fn unit(&self) -> &'static str {
        self.loads.first().map_or("load", |load| load.unit)
    }

    fn latencies(&self, text: &mut String) {
        text.push_str(&header(&[
            self.unit(),
            "TTFT p50 / p95 / p99 ms",
            "time per token p50 / p95 / p99 ms",
            "end to end p50 / p95 / p99 ms",
        ]));
        for load in &self.loads {
            let figures = &load.figures;
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} |",
                load.load,
                quantiles(&figures.ttft_ms),
                quantiles(&figures.itl_ms),
                quantiles(&figures.e2e_ms),
            );
        }
    }

    fn rates(&self, text: &mut String) {
        text.push_str(&header(&[
            self.unit(),
            "requests",
            "errors",
            "completed/s",
            "tokens/s",
            "prompt tokens/s",
            "good requests/s",
            "KV kept",
            "acceptance",
            "tokens per forward",
        ]));
        for load in &self.loads {
            let f = &load.figures;
            let errors: Vec<String> = f
                .errors
                .iter()
                .map(|(why, count)| format!("{count} {why}"))
                .collect();
            let errors = if errors.is_empty() {
                "0".to_owned()
            } else {
                errors.join(", ")
            };
            let good = if self.setup.has_latency_target {
                let share = percent(f.good_share);
                format!("{:.2} ({share})", f.goodput)
            } else {
                "-".to_owned()
            };
            let _ = writeln!(
                text,
                "| {} | {} | {errors} | {:.2} | {:.1} | {:.0} | {good} | {} | {} | {} |",
                load.load,
                f.requests,
                f.requests_per_second,
                f.tokens_per_second,
                f.prompt_tokens_per_second,
                percent(f.kv_kept_fraction),
                percent(f.acceptance),
                number(f.tokens_per_forward, 2),
            );
        }
    }

    fn workers(&self, text: &mut String) {
        text.push_str(&header(&[
            self.unit(),
            "worker",
            "sessions, mean of most",
            "KV blocks in use, mean (peak)",
            "tokens/s, prompts included",
        ]));
        for load in &self.loads {
            for worker in &load.workers {
                let _ = writeln!(
                    text,
                    "| {} | {} | {:.1} of {} | {} ({}) | {:.0} |",
                    load.load,
                    worker.worker_id,
                    worker.sessions_mean,
                    worker.sessions_max,
                    percent(Some(worker.kv_mean)),
                    percent(Some(worker.kv_peak)),
                    worker.tokens_per_second,
                );
            }
        }
    }
}

fn header(columns: &[&str]) -> String {
    format!(
        "| {} |\n|{}\n",
        columns.join(" | "),
        " --- |".repeat(columns.len())
    )
}

fn quantiles(q: &Quantiles) -> String {
    let three = [q.p50, q.p95, q.p99].map(|value| {
        // Three significant digits are what the histogram keeps.
        let digits = match value {
            Some(value) if value < 10.0 => 2,
            Some(value) if value < 100.0 => 1,
            _ => 0,
        };
        number(value, digits)
    });
    three.join(" / ")
}

fn percent(share: Option<f64>) -> String {
    share.map_or("-".to_owned(), |share| format!("{:.1} %", 100.0 * share))
}

fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.digits$}"))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// Two loads, the second with failures.
    pub(crate) fn report() -> Report {
        let load = |load: f64, errors: &[(&'static str, u64)]| {
            let quantiles = Quantiles {
                samples: 100,
                mean: Some(9.0 * load),
                p50: Some(8.0 * load),
                p95: Some(20.0 * load),
                p99: Some(123.0 * load),
                max: Some(200.0 * load),
            };
            LoadReport {
                load,
                unit: "requests/s",
                figures: Figures {
                    seconds: 10.0,
                    requests: 20,
                    completed: 18,
                    errors: errors.iter().copied().collect(),
                    requests_per_second: 1.8,
                    tokens_per_second: 230.0,
                    prompt_tokens_per_second: 900.0,
                    goodput: 1.5,
                    good_share: Some(0.75),
                    ttft_ms: quantiles,
                    itl_ms: quantiles,
                    e2e_ms: Quantiles::default(),
                    kv_kept_fraction: Some(0.4),
                    acceptance: None,
                    tokens_per_forward: Some(2.5),
                },
                workers: vec![WorkerUse {
                    worker_id: "verify-1".to_owned(),
                    role: "verify",
                    sessions_mean: 3.25,
                    sessions_max: 64,
                    kv_mean: 0.1,
                    kv_peak: 0.2,
                    tokens_per_second: 1_130.0,
                }],
            }
        };
        Report {
            setup: Setup::here("target".to_owned(), true, true),
            loads: vec![
                load(1.0, &[]),
                load(2.0, &[("deadline", 1), ("unavailable", 1)]),
            ],
        }
    }

    #[test]
    fn tables_have_every_figure() {
        let text = report().markdown();
        for line in [
            "| 1 | 8.00 / 20.0 / 123 | 8.00 / 20.0 / 123 | - / - / - |",
            "| 2 | 20 | 1 deadline, 1 unavailable | 1.80 | 230.0 | 900 | 1.50 (75.0 %) | 40.0 % | - | 2.50 |",
            "| 1 | verify-1 | 3.2 of 64 | 10.0 % (20.0 %) | 1130 |",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        assert!(text.contains("cores, services and clients in one process, target target"));
    }

    #[test]
    fn json_has_the_documented_shape() {
        let json = serde_json::to_value(report()).unwrap();
        assert_eq!(json["loads"][1]["errors"]["deadline"], 1);
        assert_eq!(json["loads"][0]["ttft_ms"]["p99"], 123.0);
        assert_eq!(json["loads"][0]["acceptance"], serde_json::Value::Null);
        assert_eq!(json["loads"][0]["workers"][0]["kv_peak"], 0.2);
        assert!(json["setup"]["command"].is_string());
        let _: BTreeMap<String, u64> =
            serde_json::from_value(json["loads"][0]["errors"].clone()).unwrap();
    }
}
