//! [`Tally`]: what all requests of a load came to.
//!
//! A request is measured when it was due within the window. Tokens are counted when they came within it, whichever
//! request they belong to, so that tokens/s is a rate and not a sum over windows of different length.

use std::collections::BTreeMap;
use std::ops::Range;
use std::str::FromStr;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::bench::request_timing::Timed;

/// Longest latency that is told apart from longer ones.
const LONGEST: Duration = Duration::from_secs(3_600);

/// Latencies, to three significant digits from a microsecond on.
#[derive(Debug, Clone)]
pub struct Latencies(Histogram<u64>);

impl Default for Latencies {
    fn default() -> Self {
        let longest = LONGEST.as_micros() as u64;
        Self(Histogram::new_with_bounds(1, longest, 3).expect("the bounds are in order"))
    }
}

impl Latencies {
    /// Notes `count` of them.
    pub fn note(&mut self, latency: Duration, count: u32) {
        let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        self.0.saturating_record_n(micros.max(1), count.into());
    }

    /// The figures.
    pub fn quantiles(&self) -> Quantiles {
        let ms = |micros: u64| micros as f64 / 1e3;
        let at = |quantile| ms(self.0.value_at_quantile(quantile));
        if self.0.is_empty() {
            return Quantiles::default();
        }
        Quantiles {
            samples: self.0.len(),
            mean: Some(self.0.mean() / 1e3),
            p50: Some(at(0.5)),
            p95: Some(at(0.95)),
            p99: Some(at(0.99)),
            max: Some(ms(self.0.max())),
        }
    }
}

/// Figures of a distribution, in milliseconds; `null` without samples.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Quantiles {
    /// How many it was made of.
    pub samples: u64,
    /// The mean.
    pub mean: Option<f64>,
    /// The median.
    pub p50: Option<f64>,
    /// Exceeded by one in twenty.
    pub p95: Option<f64>,
    /// Exceeded by one in a hundred.
    pub p99: Option<f64>,
    /// The longest.
    pub max: Option<f64>,
}

/// What a good request keeps within.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LatencyTarget {
    /// Time to the first token.
    pub ttft: Option<Duration>,
    /// Mean time per token after the first message.
    pub itl: Option<Duration>,
    /// Time to the end.
    pub e2e: Option<Duration>,
}

impl LatencyTarget {
    /// Whether a finished request kept within.
    fn is_met(&self, timed: &Timed) -> bool {
        let within = |limit: Option<Duration>, value: Option<Duration>| {
            limit.is_none_or(|limit| value.is_none_or(|value| value <= limit))
        };
        within(self.ttft, timed.ttft())
            && within(self.itl, timed.mean_gap())
            && within(self.e2e, Some(timed.e2e()))
    }
}

impl FromStr for LatencyTarget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut target = Self::default();
        for part in text.split(',') {
            let (name, ms) = part
                .split_once(':')
                .ok_or_else(|| format!("{part} is not NAME:MILLISECONDS"))?;
            let limit = ms
                .parse()
                .ok()
                .filter(|&ms: &f64| ms > 0.0)
                .and_then(|ms| Duration::try_from_secs_f64(ms / 1e3).ok())
                .ok_or_else(|| format!("{ms} is no number of milliseconds"))?;
            match name {
                "ttft" => target.ttft = Some(limit),
                "itl" => target.itl = Some(limit),
                "e2e" => target.e2e = Some(limit),
                _ => return Err(format!("{name} is not among ttft, itl and e2e")),
            }
        }
        Ok(target)
    }
}

/// Sums over the requests of a load.
#[derive(Debug)]
pub struct Tally {
    window: Range<Duration>,
    target: LatencyTarget,
    ttft: Latencies,
    itl: Latencies,
    e2e: Latencies,
    requests: u64,
    completed: u64,
    good: u64,
    tokens: u64,
    prompt_tokens: u64,
    kv: (u64, u64),
    accepted: (u64, u64),
    forwards: (u64, u64),
    errors: BTreeMap<&'static str, u64>,
}

impl Tally {
    /// A tally of requests due in `window`.
    pub fn new(window: Range<Duration>, target: LatencyTarget) -> Self {
        Self {
            window,
            target,
            ttft: Latencies::default(),
            itl: Latencies::default(),
            e2e: Latencies::default(),
            requests: 0,
            completed: 0,
            good: 0,
            tokens: 0,
            prompt_tokens: 0,
            kv: (0, 0),
            accepted: (0, 0),
            forwards: (0, 0),
            errors: BTreeMap::new(),
        }
    }

    /// Takes a request in.
    pub fn take(&mut self, timed: &Timed) {
        let in_window = timed
            .tokens
            .iter()
            .filter(|(at, _)| self.window.contains(at));
        self.tokens += in_window.map(|&(_, count)| u64::from(count)).sum::<u64>();
        if !self.window.contains(&timed.due) {
            return;
        }
        self.requests += 1;
        if let Some(ttft) = timed.ttft() {
            self.ttft.note(ttft, 1);
        }
        for (gap, count) in timed.gaps() {
            self.itl.note(gap / count, count);
        }
        let stats = match &timed.outcome {
            Ok(stats) => stats,
            Err(why) => {
                *self.errors.entry(why).or_default() += 1;
                return;
            }
        };
        self.completed += 1;
        self.good += u64::from(self.target.is_met(timed));
        self.e2e.note(timed.e2e(), 1);
        self.prompt_tokens += stats.prompt_tokens;
        for (sum, (part, whole)) in [
            (
                &mut self.kv,
                (stats.kv_entries_read, stats.kv_entries_dense),
            ),
            (
                &mut self.accepted,
                (stats.accepted_tokens, stats.proposed_tokens),
            ),
            (
                &mut self.forwards,
                (stats.completion_tokens, stats.target_forwards),
            ),
        ] {
            *sum = (sum.0 + part, sum.1 + whole);
        }
    }

    /// The figures.
    pub fn figures(&self) -> Figures {
        let seconds = (self.window.end - self.window.start).as_secs_f64();
        let per_second = |count: u64| {
            if seconds > 0.0 {
                count as f64 / seconds
            } else {
                0.0
            }
        };
        let ratio = |(part, whole): (u64, u64)| (whole > 0).then(|| part as f64 / whole as f64);
        Figures {
            seconds,
            requests: self.requests,
            completed: self.completed,
            errors: self.errors.clone(),
            requests_per_second: per_second(self.completed),
            tokens_per_second: per_second(self.tokens),
            prompt_tokens_per_second: per_second(self.prompt_tokens),
            goodput: per_second(self.good),
            good_share: ratio((self.good, self.requests)),
            ttft_ms: self.ttft.quantiles(),
            itl_ms: self.itl.quantiles(),
            e2e_ms: self.e2e.quantiles(),
            kv_kept_fraction: ratio(self.kv),
            acceptance: ratio(self.accepted),
            tokens_per_forward: ratio(self.forwards),
        }
    }
}

/// What a load came to. Ratios are `null` where nothing was counted.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figures {
    /// Length of the window.
    pub seconds: f64,
    /// Requests due in it.
    pub requests: u64,
    /// Those that ended as they should.
    pub completed: u64,
    /// The others, by why.
    pub errors: BTreeMap<&'static str, u64>,
    /// Requests that were due in the window and completed, by its length.
    pub requests_per_second: f64,
    /// Tokens that came in the window, by its length.
    pub tokens_per_second: f64,
    /// Prompt tokens of the completed requests, by the window's length.
    pub prompt_tokens_per_second: f64,
    /// Requests that completed within the latency target, by the window's length.
    pub goodput: f64,
    /// Their share of all that were due.
    pub good_share: Option<f64>,
    /// Time to the first token.
    pub ttft_ms: Quantiles,
    /// Time per token after the first message: a message of k tokens counts as k of a k-th of its wait.
    pub itl_ms: Quantiles,
    /// Time to the end, of completed requests.
    pub e2e_ms: Quantiles,
    /// KV entries that target forwards read ÷ those dense ones would have read.
    pub kv_kept_fraction: Option<f64>,
    /// Draft tokens accepted ÷ verified.
    pub acceptance: Option<f64>,
    /// Tokens ÷ target forwards.
    pub tokens_per_forward: Option<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use specattn_proto::v1::SessionStats;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Due at `due`, first of ten tokens `ttft` later, then nine in `rest`.
    fn timed(due: u64, ttft: u64, rest: u64) -> Timed {
        let first = ms(due + ttft);
        let end = first + ms(rest);
        Timed {
            due: ms(due),
            end,
            tokens: vec![(first, 1), (end, 9)],
            outcome: Ok(SessionStats {
                kv_entries_read: 20,
                kv_entries_dense: 80,
                accepted_tokens: 6,
                proposed_tokens: 8,
                completion_tokens: 10,
                target_forwards: 4,
                prompt_tokens: 100,
                ..SessionStats::default()
            }),
        }
    }

    #[test]
    fn quantiles_are_those_of_the_samples() {
        let mut latencies = Latencies::default();
        assert_eq!(latencies.quantiles(), Quantiles::default());
        for latency in 1..=1_000 {
            latencies.note(ms(latency), 1);
        }
        let close = |value: Option<f64>, expected: f64| {
            let value = value.unwrap();
            assert!((value / expected - 1.0).abs() < 2e-3, "{value}, {expected}");
        };
        let figures = latencies.quantiles();
        close(figures.p50, 500.0);
        close(figures.p95, 950.0);
        close(figures.p99, 990.0);
        close(figures.max, 1_000.0);
        close(figures.mean, 500.5);
        // What is too long or too short is still counted.
        latencies.note(Duration::from_secs(1 << 40), 1);
        latencies.note(Duration::ZERO, 2);
        assert_eq!(latencies.quantiles().samples, 1_003);
    }

    #[test]
    fn only_the_window_is_measured() {
        let target = "ttft:50,itl:10".parse().unwrap();
        let mut tally = Tally::new(ms(1_000)..ms(3_000), target);
        tally.take(&timed(900, 200, 45)); // due before, tokens within
        tally.take(&timed(1_500, 40, 45)); // good
        tally.take(&timed(1_600, 60, 45)); // first token too late
        tally.take(&timed(2_000, 40, 450)); // too slow after it
        tally.take(&timed(2_990, 40, 45)); // good, tokens after the window
        tally.take(&Timed::failed(ms(2_000), ms(2_001), "unavailable"));
        tally.take(&Timed::failed(ms(4_000), ms(4_001), "unavailable"));
        let figures = tally.figures();
        assert_eq!((figures.requests, figures.completed), (5, 4));
        assert_eq!(figures.errors, BTreeMap::from([("unavailable", 1)]));
        assert_eq!(figures.tokens_per_second, 20.0);
        assert_eq!(figures.prompt_tokens_per_second, 200.0);
        assert_eq!(figures.goodput, 1.0);
        assert_eq!(figures.good_share, Some(0.4));
        assert_eq!(figures.itl_ms.samples, 36);
        assert_eq!(figures.kv_kept_fraction, Some(0.25));
        assert_eq!(figures.acceptance, Some(0.75));
        assert_eq!(figures.tokens_per_forward, Some(2.5));
    }

    #[test]
    fn a_failed_request_is_never_good() {
        let mut tally = Tally::new(ms(0)..ms(1_000), LatencyTarget::default());
        tally.take(&Timed::failed(ms(5), ms(6), "resource_exhausted"));
        assert_eq!(tally.figures().good_share, Some(0.0));
        let nothing = Tally::new(ms(0)..ms(0), LatencyTarget::default()).figures();
        assert_eq!((nothing.goodput, nothing.acceptance), (0.0, None));
    }

    #[test]
    fn targets_are_read() {
        let target: LatencyTarget = "itl:2.5,e2e:4000".parse().unwrap();
        assert_eq!(target.itl, Some(Duration::from_micros(2_500)));
        assert_eq!((target.ttft, target.e2e), (None, Some(ms(4_000))));
        for text in ["", "ttft", "ttft:x", "ttft:-1", "ttft:nan", "p99:3"] {
            assert!(text.parse::<LatencyTarget>().is_err(), "{text}");
        }
    }
}
