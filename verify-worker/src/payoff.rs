//! [`Payoff`]: whether drafts pay, measured, in a session that leaves their use to the worker.
//!
//! A round commits more tokens than a step alone and takes longer. Both are timed as the client feels them, from one
//! commit to the next. While rounds commit fewer tokens a second than steps alone, the session decodes alone and tries a
//! few rounds again later, each time later than before. What a session finds is where the next one of about its length
//! begins: costs belong to the machine and the models, so only the share of accepted tokens is left to find out anew; it
//! starts alone and its first trial is short.
//!
//! A round that takes longer to arrive than steps alone would take for what a good draft's comes to cannot pay: nobody waits longer
//! for one, and a few such waits in a row end a trial early. So a draft behind a slow network costs little: 4 % where it
//! reads its prompt on the same two cores (bench/serve/service.md).
//!
//! A session begins with a trial of rounds, so that steps alone are not timed while the draft still reads the prompt on
//! the same cores. Costs: eight steps alone after the first twelve rounds and after every 192; six rounds after each rest, and up to three
//! dozen more where those tell too little.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use specattn_worker::expected_tokens;

/// Steps alone that rounds are compared with.
const SAMPLE_STEPS: u32 = 8;
/// Forwards at the beginning of a phase that are not timed: the draft ends a round that nobody wants, or catches up.
const UNSETTLED: u32 = 2;
/// Rounds of the first trial, of one after a rest, and the most between two comparisons.
const TRIAL_ROUNDS: u32 = 12;
const RETRIAL_ROUNDS: u32 = 6;
const ROUNDS_MOST: u32 = 192;
/// Rounds as fast as this share of steps alone go on: resting by mistake costs as much as drafting by mistake.
const ENOUGH: f64 = 0.95;
/// A round's tokens are one now and five then, so a dozen rounds tell their rate to a fourth or so. Where they are too slow by no more than
/// that (one standard error), a trial goes on for as many rounds again, so many times at most.
const TRIALS_MORE: u32 = 3;
/// Steps alone after the first failed trial, and the most after any.
const REST_FIRST: u32 = 128;
const REST_MOST: u32 = 1_024;
/// The most after trials that end with waits in vain: what makes a way too long seldom changes, and each trial has the draft
/// catch up with all that it has not heard.
const REST_MOST_IN_VAIN: u32 = 4_096;
/// Steps alone before the first trial of a session that expects it to fail: many sessions are shorter than the rest that
/// an earlier one came to, and a finding that nobody tries again would last for ever.
const REST_AT_START: u32 = 32;

/// How much longer than steps alone would take a round may be waited for: both are timed roughly, in whatever company.
const PATIENCE: f64 = 1.5;
const PATIENCE_LEAST: Duration = Duration::from_millis(2);
/// The probability that a draft token is accepted of a draft that is waited for. Few drafts are better, and even so a long round comes
/// to half of its tokens.
const HOPED_FOR: f64 = 0.9;
/// Waits in vain, one after another, that end a trial: the first of a session, and those after one that failed.
const VAIN_WAITS: u32 = 3;
const VAIN_WAITS_AGAIN: u32 = 1;

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

/// Forwards, the tokens they committed and the time they took.
#[derive(Debug, Clone, Copy, Default)]
struct Pace {
    forwards: f64,
    tokens: f64,
    /// The sum of each forward's tokens, squared.
    squares: f64,
    time: Duration,
}

impl Pace {
    fn add(&mut self, tokens: usize, time: Duration) {
        self.forwards += 1.0;
        self.tokens += tokens as f64;
        self.squares += (tokens * tokens) as f64;
        self.time += time;
    }

    /// Lets what comes next count more than what was.
    fn fade(&mut self) {
        self.forwards /= 2.0;
        self.tokens /= 2.0;
        self.squares /= 2.0;
        self.time /= 2;
    }

    /// The part of the rate that it may be off by: the standard error of the mean of a forward's tokens, over the mean.
    fn doubt(&self) -> f64 {
        let relative_variance = self.squares * self.forwards / (self.tokens * self.tokens) - 1.0;
        (relative_variance.max(0.0) / self.forwards).sqrt()
    }

    /// Tokens per second; `None` before any were timed.
    fn rate(&self) -> Option<f64> {
        let seconds = self.time.as_secs_f64();
        (seconds > 0.0).then(|| self.tokens / seconds)
    }
}

/// What the session does now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Rounds.
    Drafted,
    /// A few steps alone, to compare rounds with.
    Sampling,
    /// Steps alone, since rounds did not pay.
    Resting,
}

/// The state of one session.
#[derive(Debug)]
pub(crate) struct Payoff {
    findings: Arc<Findings>,
    /// The context's length at the beginning.
    context: usize,
    phase: Phase,
    /// Rounds, or steps alone, left of the phase.
    left: u32,
    /// Rounds of the current stretch between two comparisons.
    stretch: u32,
    /// How often the present trial may go on.
    more: u32,
    /// Steps alone after the next failed trial.
    rest: u32,
    alone: Pace,
    drafted: Pace,
    /// Forwards of this phase still to pass untimed.
    unsettled: u32,
    /// When the last tokens were committed.
    last: Option<Instant>,
    /// Tokens that a round of a good draft adds.
    round: f64,
    /// Seconds that a step alone takes, roughly; never timed by one that follows a wait.
    step: Option<f64>,
    last_step: Option<Instant>,
    /// Waits in vain since the last round.
    vain: u32,
}

impl Payoff {
    /// For a session of `context` tokens whose rounds have up to `draft_length` draft tokens.
    pub(crate) fn new(findings: Arc<Findings>, context: usize, draft_length: usize) -> Self {
        let rest = findings.of(context).load(Ordering::Relaxed);
        let (phase, left) = match rest {
            0 => (Phase::Drafted, TRIAL_ROUNDS),
            _ => (Phase::Resting, REST_AT_START),
        };
        Self {
            findings,
            context,
            phase,
            left,
            stretch: TRIAL_ROUNDS,
            more: TRIALS_MORE,
            rest: (2 * rest).clamp(REST_FIRST, REST_MOST_IN_VAIN),
            alone: Pace::default(),
            drafted: Pace::default(),
            unsettled: UNSETTLED,
            last: None,
            round: expected_tokens(HOPED_FOR, draft_length),
            step: None,
            last_step: None,
            vain: 0,
        }
    }

    /// How long a round is worth waiting for, as far as steps alone have been timed.
    pub(crate) fn patience(&self) -> Option<Duration> {
        let most = Duration::from_secs_f64(self.step? * self.round * PATIENCE);
        Some(most.max(PATIENCE_LEAST))
    }

    /// A round did not come in time.
    pub(crate) fn waited_in_vain(&mut self) {
        self.last_step = None;
        self.vain += 1;
        let failed_before = self.rest > REST_FIRST;
        let most = if failed_before {
            VAIN_WAITS_AGAIN
        } else {
            VAIN_WAITS
        };
        if self.vain >= most && self.phase == Phase::Drafted {
            self.vain = 0;
            if failed_before {
                self.rest = (2 * self.rest).min(REST_MOST_IN_VAIN);
            }
            self.rest();
        }
    }

    /// Times steps alone that follow one another.
    fn time_step(&mut self, is_round: bool, now: Instant) {
        if is_round {
            self.vain = 0;
            self.last_step = None;
            return;
        }
        if let Some(last) = self.last_step.replace(now) {
            let seconds = now.saturating_duration_since(last).as_secs_f64();
            let before = self.step.unwrap_or(seconds);
            self.step = Some(before + (seconds - before) / 8.0);
        }
    }

    /// Whether rounds are to be run now, if there is a draft.
    pub(crate) fn wants_drafts(&self) -> bool {
        self.phase == Phase::Drafted
    }

    /// A forward, a round or a step alone, committed `tokens`.
    pub(crate) fn committed(&mut self, tokens: usize, is_round: bool, now: Instant) {
        self.time_step(is_round, now);
        let drafted = self.wants_drafts();
        if drafted && !is_round && self.unsettled > 0 {
            // The draft is not there yet.
            self.last = None;
            return;
        }
        let last = self.last.replace(now);
        if self.unsettled > 0 {
            self.unsettled -= 1;
        } else if let Some(last) = last {
            let pace = if drafted {
                &mut self.drafted
            } else {
                &mut self.alone
            };
            pace.add(tokens, now.saturating_duration_since(last));
        }
        // A step alone among rounds is a draft that was late.
        if !drafted || is_round {
            self.left -= 1;
        }
        if self.left == 0 {
            self.next();
        }
    }

    /// After the last forward of a phase.
    fn next(&mut self) {
        let known = self.alone.rate().is_some() && self.drafted.rate().is_some();
        match self.phase {
            Phase::Resting => self.begin(Phase::Drafted, RETRIAL_ROUNDS),
            Phase::Drafted if !known || self.stretch == ROUNDS_MOST => {
                self.begin(Phase::Sampling, SAMPLE_STEPS);
            }
            Phase::Drafted | Phase::Sampling => self.compare(),
        }
    }

    /// More rounds, or rest.
    fn compare(&mut self) {
        let enough = self.alone.rate().map(|rate| ENOUGH * rate);
        let rate = self.drafted.rate();
        let at_best = rate.map(|rate| rate * (1.0 + self.drafted.doubt()));
        if rate >= enough {
            self.rest = REST_FIRST;
            self.stretch = (2 * self.stretch).min(ROUNDS_MOST);
            self.more = TRIALS_MORE;
            self.begin(Phase::Drafted, self.stretch);
            self.found(0);
        } else if at_best >= enough && self.more > 0 {
            self.more -= 1;
            self.turn(Phase::Drafted, TRIAL_ROUNDS);
        } else {
            self.rest = self.rest.min(REST_MOST);
            self.rest();
        }
    }

    /// Rounds do not pay.
    fn rest(&mut self) {
        let rest = self.rest;
        self.rest = (2 * rest).min(REST_MOST_IN_VAIN);
        self.stretch = TRIAL_ROUNDS;
        self.more = TRIALS_MORE;
        self.begin(Phase::Resting, rest);
        self.found(rest);
    }

    /// Tells sessions to come.
    fn found(&self, rest: u32) {
        self.findings
            .of(self.context)
            .store(rest, Ordering::Relaxed);
    }

    /// For tests that do not take time.
    #[cfg(test)]
    pub(crate) fn let_drafts_pay(&mut self) {
        self.drafted.add(1_000, Duration::from_nanos(1));
    }

    /// Begins a phase that is timed anew.
    fn begin(&mut self, phase: Phase, left: u32) {
        self.turn(phase, left);
        let pace = match phase {
            Phase::Drafted => &mut self.drafted,
            Phase::Sampling | Phase::Resting => &mut self.alone,
        };
        pace.fade();
    }

    fn turn(&mut self, phase: Phase, left: u32) {
        if (phase == Phase::Drafted) != self.wants_drafts() {
            self.unsettled = UNSETTLED;
        }
        (self.phase, self.left) = (phase, left);
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
            payoff.committed(count, count > 1, now);
        }
        (drafted as f64 / done as f64, now - begin)
    }

    #[test]
    fn drafts_that_pay_are_used_nearly_always() {
        let mut payoff = Payoff::new(Arc::default(), 1_000, 4);
        let (share, _) = run(&mut payoff, 4_000, 1_000, 1_200);
        assert!(share > 0.95, "{share}");
    }

    #[test]
    fn drafts_that_do_not_pay_cost_little_and_less_the_next_time() {
        let findings = Arc::new(Findings::default());
        let mut payoff = Payoff::new(Arc::clone(&findings), 1_100, 4);
        let (share, time) = run(&mut payoff, 1_000, 1_000, 3_000);
        assert!(share < 0.08, "{share}");
        assert!(time < Duration::from_micros(1_050_000), "{time:?}");
        let mut next = Payoff::new(Arc::clone(&findings), 1_500, 4);
        let (share, _) = run(&mut next, 400, 1_000, 3_000);
        assert!(share < 0.05, "{share}");
        // Another length knows nothing of it.
        assert_eq!(findings.of(9_000).load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_few_poor_rounds_do_not_decide() {
        // Rounds of one token or of six: a third faster than steps alone, but not the first twelve.
        let mut payoff = Payoff::new(Arc::default(), 1_000, 4);
        let (mut now, mut drafted) = (Instant::now(), 0);
        for forward in 0..400 {
            let wants = payoff.wants_drafts();
            let (tokens, ms) = match (wants, forward % 24) {
                (true, 3 | 9 | 14..20) => (6, 90),
                (true, _) => (1, 90),
                (false, _) => (1, 45),
            };
            now += Duration::from_millis(ms);
            drafted += u32::from(wants);
            payoff.committed(tokens, wants, now);
        }
        assert!(drafted > 300, "{drafted}");
    }

    #[test]
    fn a_change_is_noticed_both_ways() {
        let mut payoff = Payoff::new(Arc::default(), 1_000, 4);
        run(&mut payoff, 500, 1_000, 3_000);
        let (share, _) = run(&mut payoff, 4_000, 1_000, 1_000);
        assert!(share > 0.7, "{share}");
        let (share, _) = run(&mut payoff, 4_000, 1_000, 5_000);
        assert!(share < 0.15, "{share}");
    }

    #[test]
    fn rounds_that_come_too_late_end_the_trial() {
        let findings = Arc::new(Findings::default());
        let mut payoff = Payoff::new(Arc::clone(&findings), 1_000, 4);
        assert_eq!(payoff.patience(), None);
        let mut now = Instant::now();
        for _ in 0..20 {
            now += Duration::from_millis(1);
            payoff.committed(1, false, now);
        }
        // Steps alone take a millisecond, and a round of four of which nine in ten are right is 4.1 tokens.
        let patience = payoff.patience().unwrap();
        assert!(
            (6.1..6.2).contains(&(1e3 * patience.as_secs_f64())),
            "{patience:?}"
        );
        for wait in 0..VAIN_WAITS {
            assert!(payoff.wants_drafts(), "after {wait} waits");
            now += patience;
            payoff.waited_in_vain();
            payoff.committed(1, false, now);
        }
        assert!(!payoff.wants_drafts());
        // The waits are no part of what a step takes, and the next session begins alone.
        assert_eq!(payoff.patience().unwrap(), patience);
        // The next trial costs one.
        for _ in 0..REST_FIRST {
            now += Duration::from_millis(1);
            payoff.committed(1, false, now);
        }
        assert!(payoff.wants_drafts());
        payoff.waited_in_vain();
        assert!(!payoff.wants_drafts());
        // Now it rests for longer: what it was and twice more.
        for step in 0..4 * REST_FIRST {
            assert!(!payoff.wants_drafts(), "after {step} steps");
            now += Duration::from_millis(1);
            payoff.committed(1, false, now);
        }
        assert!(payoff.wants_drafts());
        assert!(!Payoff::new(findings, 1_000, 4).wants_drafts());
    }
}
