//! [`Payoff`]: whether drafts pay, measured, in a session that leaves their use to the worker.
//!
//! A round commits more tokens than a step alone and takes longer. Both are timed as the client feels them, from one
//! commit to the next. While rounds commit fewer tokens a second than steps alone, the session decodes alone and tries a
//! few rounds again later, each time later than before. What a session finds is where the next one of about its length
//! begins: costs belong to the machine and the models, so only the share of accepted tokens is left to find out anew.
//!
//! Costs: four steps alone before the first rounds and after every 64, eight rounds at each trial that fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Steps alone that are timed before rounds are.
const SAMPLE_STEPS: u32 = 4;
/// Rounds of a trial, and the most between two comparisons.
const TRIAL_ROUNDS: u32 = 8;
const ROUNDS_MOST: u32 = 64;
/// Steps alone after the first failed trial, and the most after any.
const REST_FIRST: u32 = 64;
const REST_MOST: u32 = 1_024;

/// What earlier sessions found, by the power of two below the context's length: the steps to rest before a trial; 0 where
/// drafts paid or nothing is known.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    rests: [AtomicU32; 32],
}

impl Findings {
    fn of(&self, context: usize) -> &AtomicU32 {
        let power = context.max(1).ilog2() as usize;
        &self.rests[power.min(self.rests.len() - 1)]
    }
}

/// Tokens and the time they took.
#[derive(Debug, Clone, Copy, Default)]
struct Pace {
    tokens: f64,
    time: Duration,
}

impl Pace {
    fn add(&mut self, tokens: usize, time: Duration) {
        self.tokens += tokens as f64;
        self.time += time;
    }

    /// Lets what comes next count more than what was.
    fn fade(&mut self) {
        self.tokens /= 2.0;
        self.time /= 2;
    }

    /// Tokens per second; `None` before any were timed.
    fn rate(&self) -> Option<f64> {
        let seconds = self.time.as_secs_f64();
        (seconds > 0.0).then(|| self.tokens / seconds)
    }
}

/// What the session does now, and for how many forwards more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Alone { left: u32 },
    Drafted { left: u32 },
}

/// The state of one session.
#[derive(Debug)]
pub(crate) struct Payoff {
    findings: Arc<Findings>,
    phase: Phase,
    /// Rounds of the current stretch between two comparisons.
    stretch: u32,
    /// Steps alone after the next failed trial.
    rest: u32,
    alone: Pace,
    drafted: Pace,
    /// When the last tokens were committed; `None` where the time since then would count for nothing.
    last: Option<Instant>,
}

impl Payoff {
    /// For a session of `context` tokens.
    pub(crate) fn new(findings: Arc<Findings>, context: usize) -> Self {
        let rest = findings.of(context).load(Ordering::Relaxed);
        Self {
            findings,
            phase: Phase::Alone {
                left: rest.max(SAMPLE_STEPS),
            },
            stretch: TRIAL_ROUNDS,
            rest: (2 * rest).clamp(REST_FIRST, REST_MOST),
            alone: Pace::default(),
            drafted: Pace::default(),
            last: None,
        }
    }

    /// Whether rounds are to be run now, if there is a draft.
    pub(crate) fn wants_drafts(&self) -> bool {
        matches!(self.phase, Phase::Drafted { .. })
    }

    /// A forward committed `tokens`, which makes `context` of them.
    pub(crate) fn committed(&mut self, tokens: usize, context: usize, now: Instant) {
        if let Some(last) = self.last.replace(now) {
            let pace = match self.phase {
                Phase::Alone { .. } => &mut self.alone,
                Phase::Drafted { .. } => &mut self.drafted,
            };
            pace.add(tokens, now.saturating_duration_since(last));
        }
        match &mut self.phase {
            Phase::Alone { left } | Phase::Drafted { left } if *left > 1 => {
                *left -= 1;
            }
            Phase::Alone { .. } => {
                self.turn(Phase::Drafted { left: self.stretch });
                self.drafted.fade();
            }
            Phase::Drafted { .. } => self.compare(context),
        }
    }

    /// After a stretch of rounds: go on, or rest.
    fn compare(&mut self, context: usize) {
        let pays = match (self.drafted.rate(), self.alone.rate()) {
            (Some(drafted), Some(alone)) => drafted >= alone,
            _ => true,
        };
        let found = if pays {
            self.rest = REST_FIRST;
            if self.stretch < ROUNDS_MOST {
                self.stretch *= 2;
                self.drafted.fade();
                self.phase = Phase::Drafted { left: self.stretch };
            } else {
                self.turn(Phase::Alone { left: SAMPLE_STEPS });
            }
            0
        } else {
            let rest = self.rest;
            self.rest = (2 * rest).min(REST_MOST);
            self.stretch = TRIAL_ROUNDS;
            self.turn(Phase::Alone { left: rest });
            rest
        };
        if !pays {
            self.alone.fade();
        }
        self.findings.of(context).store(found, Ordering::Relaxed);
    }

    /// The first forward of another phase is not timed: the draft catches up in it.
    fn turn(&mut self, phase: Phase) {
        self.phase = phase;
        self.last = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `tokens` tokens, steps alone taking `alone` and rounds of two tokens `round` microseconds; gives the share of
    /// tokens that came from rounds, and the time.
    fn run(payoff: &mut Payoff, tokens: usize, alone: u64, round: u64) -> (f64, Duration) {
        let (mut now, mut done, mut drafted) = (Instant::now(), 0, 0);
        let begin = now;
        while done < tokens {
            let (count, time) = if payoff.wants_drafts() {
                drafted += 2;
                (2, round)
            } else {
                (1, alone)
            };
            done += count;
            now += Duration::from_micros(time);
            payoff.committed(count, 1_000 + done, now);
        }
        (drafted as f64 / done as f64, now - begin)
    }

    #[test]
    fn drafts_that_pay_are_used_nearly_always() {
        let mut payoff = Payoff::new(Arc::default(), 1_000);
        let (share, _) = run(&mut payoff, 4_000, 1_000, 1_200);
        assert!(share > 0.95, "{share}");
    }

    #[test]
    fn drafts_that_do_not_pay_cost_little_and_less_the_next_time() {
        let findings = Arc::new(Findings::default());
        let mut payoff = Payoff::new(Arc::clone(&findings), 1_000);
        let (share, time) = run(&mut payoff, 1_000, 1_000, 3_000);
        assert!(share < 0.08, "{share}");
        assert!(time < Duration::from_micros(1_050_000), "{time:?}");
        let mut next = Payoff::new(Arc::clone(&findings), 1_500);
        let (share, _) = run(&mut next, 400, 1_000, 3_000);
        assert!(share < 0.05, "{share}");
        // Another length knows nothing of it.
        assert_eq!(findings.of(9_000).load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_change_is_noticed_both_ways() {
        let mut payoff = Payoff::new(Arc::default(), 1_000);
        run(&mut payoff, 500, 1_000, 3_000);
        let (share, _) = run(&mut payoff, 4_000, 1_000, 1_000);
        assert!(share > 0.7, "{share}");
        let (share, _) = run(&mut payoff, 4_000, 1_000, 5_000);
        assert!(share < 0.15, "{share}");
    }
}
