//! [`Report`]: what a simulated run came to; [`Outcomes`] gathers it.

use std::fmt::Write;
use std::ops::Range;
use std::time::Duration;

use serde::Serialize;
use specattn_cli::bench::request_timing::Timed;
use specattn_cli::bench::tally::{Figures, LatencyTarget, Quantiles, Tally};
use specattn_proto::v1::{SessionStats, WorkerRole};

use crate::simulate::node::{Node, Worker};

/// How busy the workers of a role were.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Utilisation {
    /// Mean share of the window spent in forwards.
    pub mean: f64,
    /// The idlest worker's.
    pub least: f64,
    /// The busiest worker's.
    pub most: f64,
}

/// What the workers of a role came to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RoleFigures {
    /// How many there are.
    pub workers: usize,
    /// How busy; `null` without any.
    pub busy: Option<Utilisation>,
    /// Prompt tokens taken from others' work.
    pub prefix_tokens: u64,
    /// Sessions preempted for want of KV blocks.
    pub preemptions: u64,
    /// KV blocks still in use at the end. There must be none.
    pub blocks_left: u64,
}

/// The figures of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// As `specattn bench serve` reports them, of the requests that were due in the window.
    pub clients: Figures,
    /// Sessions in all, those that ended as they should, and those that were refused, given up or failed.
    pub sessions: u64,
    /// See above.
    pub finished: u64,
    /// See above.
    pub refused: u64,
    /// Finished sessions that went on at another verify worker in between.
    pub reopened: u64,
    /// Deaths of workers.
    pub deaths: u64,
    /// Verdicts that rejected a token: rollbacks of draft and target.
    pub rollbacks: u64,
    /// Proposals that came too late.
    pub stale_proposals: u64,
    /// Share of target forwards without a proposal.
    pub solo_share: f64,
    /// Tokens that are not the target's own continuation. There must be none.
    pub wrong_tokens: u64,
    /// Targets.
    pub verify: RoleFigures,
    /// Drafts.
    pub draft: RoleFigures,
    /// Events simulated.
    pub events: u64,
    /// What they took of real time.
    pub wall_seconds: f64,
}

/// Sums of a run.
#[derive(Debug)]
pub struct Outcomes {
    window: Range<Duration>,
    tally: Tally,
    /// Each worker's time in forwards at the window's beginning, and at its end.
    busy: Vec<Vec<Duration>>,
    stats: SessionStats,
    finished: u64,
    refused: u64,
    /// See [`Report`].
    pub reopened: u64,
    /// See [`Report`].
    pub deaths: u64,
    /// See [`Report`].
    pub wrong_tokens: u64,
}

impl Outcomes {
    /// None yet, of requests due in `window`.
    pub fn new(window: Range<Duration>, target: LatencyTarget) -> Self {
        Self {
            tally: Tally::new(window.clone(), target),
            window,
            busy: Vec::new(),
            stats: SessionStats::default(),
            finished: 0,
            refused: 0,
            reopened: 0,
            deaths: 0,
            wrong_tokens: 0,
        }
    }

    /// The window begins, or ends.
    pub fn mark(&mut self, nodes: &[Node], now: Duration) {
        let busy = nodes.iter().map(|node| node.busy_until(now));
        self.busy.push(busy.collect());
    }

    /// Takes a session in that is over.
    pub fn take(&mut self, timed: &Timed) {
        self.tally.take(timed);
        match &timed.outcome {
            Ok(stats) => {
                self.finished += 1;
                self.stats.target_forwards += stats.target_forwards;
                self.stats.solo_forwards += stats.solo_forwards;
                self.stats.rollbacks += stats.rollbacks;
                self.stats.stale_proposals += stats.stale_proposals;
            }
            Err(_) => self.refused += 1,
        }
    }

    /// The figures.
    pub fn report(&self, nodes: &[Node], events: u64, wall: Duration) -> Report {
        let forwards = self.stats.target_forwards.max(1);
        Report {
            clients: self.tally.figures(),
            sessions: self.finished + self.refused,
            finished: self.finished,
            refused: self.refused,
            reopened: self.reopened,
            deaths: self.deaths,
            rollbacks: self.stats.rollbacks,
            stale_proposals: self.stats.stale_proposals,
            solo_share: self.stats.solo_forwards as f64 / forwards as f64,
            wrong_tokens: self.wrong_tokens,
            verify: self.role(nodes, WorkerRole::Verify),
            draft: self.role(nodes, WorkerRole::Draft),
            events,
            wall_seconds: wall.as_secs_f64(),
        }
    }

    fn role(&self, nodes: &[Node], role: WorkerRole) -> RoleFigures {
        let seconds = (self.window.end - self.window.start).as_secs_f64();
        let (mut shares, mut sums) = (Vec::new(), (0, 0, 0));
        for (at, node) in nodes
            .iter()
            .enumerate()
            .filter(|(_, node)| node.role == role)
        {
            if let [begin, end] = &self.busy[..] {
                let busy = end[at].saturating_sub(begin[at]);
                shares.push(busy.as_secs_f64() / seconds.max(1e-9));
            }
            let (shared, preempted) = node.shared_and_preempted();
            let load = node.worker.as_ref().map(Worker::load).unwrap_or_default();
            sums = (
                sums.0 + shared,
                sums.1 + preempted,
                sums.2 + load.kv_blocks_used,
            );
        }
        RoleFigures {
            workers: nodes.iter().filter(|node| node.role == role).count(),
            busy: (!shares.is_empty()).then(|| Utilisation {
                mean: shares.iter().sum::<f64>() / shares.len() as f64,
                least: shares.iter().copied().fold(f64::INFINITY, f64::min),
                most: shares.iter().copied().fold(0.0, f64::max),
            }),
            prefix_tokens: sums.0,
            preemptions: sums.1,
            blocks_left: sums.2,
        }
    }
}

impl Report {
    /// What must hold of every run.
    ///
    /// # Errors
    /// What does not.
    pub fn check(&self) -> Result<(), String> {
        let blocks = self.verify.blocks_left + self.draft.blocks_left;
        match (self.wrong_tokens, blocks) {
            (0, 0) => Ok(()),
            _ => Err(format!(
                "{} tokens are not the target's, {blocks} KV blocks are left in use",
                self.wrong_tokens
            )),
        }
    }

    /// A table of two columns.
    pub fn markdown(&self) -> String {
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        let maybe = |share: Option<f64>| share.map_or("-".to_owned(), percent);
        let clients = &self.clients;
        let busy = |role: &RoleFigures| {
            role.busy.map_or("-".to_owned(), |busy| {
                let (mean, least, most) = (busy.mean, busy.least, busy.most);
                format!(
                    "{} ({} to {})",
                    percent(mean),
                    percent(least),
                    percent(most)
                )
            })
        };
        let errors: Vec<String> = clients
            .errors
            .iter()
            .map(|(why, n)| format!("{n} {why}"))
            .collect();
        let (verify, draft) = (&self.verify, &self.draft);
        let rows = [
            (
                "verify, draft workers",
                format!("{}, {}", verify.workers, draft.workers),
            ),
            (
                "sessions finished, refused",
                format!("{}, {}", self.finished, self.refused),
            ),
            (
                "refused in the window, by why",
                if errors.is_empty() {
                    "none".to_owned()
                } else {
                    errors.join(", ")
                },
            ),
            (
                "tokens/s, requests/s",
                format!(
                    "{:.0}, {:.1}",
                    clients.tokens_per_second, clients.requests_per_second
                ),
            ),
            (
                "good requests/s, share",
                format!("{:.1}, {}", clients.goodput, maybe(clients.good_share)),
            ),
            ("TTFT p50 / p95 / p99", quantiles(&clients.ttft_ms)),
            ("time per token p50 / p95 / p99", quantiles(&clients.itl_ms)),
            ("end to end p50 / p95 / p99", quantiles(&clients.e2e_ms)),
            ("verify workers busy, mean (least to most)", busy(verify)),
            ("draft workers busy", busy(draft)),
            (
                "acceptance, tokens per target forward",
                format!(
                    "{}, {}",
                    maybe(clients.acceptance),
                    clients
                        .tokens_per_forward
                        .map_or("-".to_owned(), |n| format!("{n:.2}"))
                ),
            ),
            (
                "rollbacks, stale proposals, forwards alone",
                format!(
                    "{}, {}, {}",
                    self.rollbacks,
                    self.stale_proposals,
                    percent(self.solo_share)
                ),
            ),
            (
                "workers died, sessions gone on elsewhere",
                format!("{}, {}", self.deaths, self.reopened),
            ),
            (
                "prompt tokens taken over: target, draft",
                format!("{}, {}", verify.prefix_tokens, draft.prefix_tokens),
            ),
            (
                "sessions preempted: target, draft",
                format!("{}, {}", verify.preemptions, draft.preemptions),
            ),
            (
                "events, real seconds",
                format!("{}, {:.1}", self.events, self.wall_seconds),
            ),
        ];
        let mut text = "| figure | value |\n| --- | --- |\n".to_owned();
        for (name, value) in rows {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "| {name} | {value} |");
        }
        text
    }
}

/// A table of fleets that differ in their split, and the best of them: by good requests, then by tokens.
pub fn sweep(reports: &[Report]) -> String {
    let mut text = "| verify | draft | tokens/s | good requests/s | TTFT p95 ms | time per token p95 ms | verify busy | draft busy | refused |\n\
                    | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        .to_owned();
    let busy = |role: &RoleFigures| {
        role.busy
            .map_or("-".to_owned(), |busy| format!("{:.0} %", 100.0 * busy.mean))
    };
    let ms = |value: Option<f64>| value.map_or("-".to_owned(), |ms| format!("{ms:.1}"));
    for report in reports {
        let clients = &report.clients;
        let _ = writeln!(
            text,
            "| {} | {} | {:.0} | {:.1} | {} | {} | {} | {} | {} |",
            report.verify.workers,
            report.draft.workers,
            clients.tokens_per_second,
            clients.goodput,
            ms(clients.ttft_ms.p95),
            ms(clients.itl_ms.p95),
            busy(&report.verify),
            busy(&report.draft),
            report.refused,
        );
    }
    let best = reports.iter().max_by(|a, b| {
        let by_goodput = a.clients.goodput.total_cmp(&b.clients.goodput);
        let by_tokens = a
            .clients
            .tokens_per_second
            .total_cmp(&b.clients.tokens_per_second);
        by_goodput.then(by_tokens)
    });
    if let Some(best) = best {
        let (verify, draft) = (best.verify.workers, best.draft.workers);
        let _ = writeln!(
            text,
            "\nBest: {verify} verify workers and {draft} draft workers."
        );
    }
    text
}

fn quantiles(q: &Quantiles) -> String {
    let ms = |value: Option<f64>| value.map_or("-".to_owned(), |ms| format!("{ms:.1}"));
    format!("{} / {} / {} ms", ms(q.p50), ms(q.p95), ms(q.p99))
}
