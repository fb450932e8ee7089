//! [`Lookahead`]: whether drafting ahead of verdicts pays, measured.
//!
//! Far from its verify worker, or before a slow target, a draft that waits for each verdict wastes the wait. Where draft and
//! target share cores, or verdicts come at once, running ahead only takes time from the target. So both ways are timed from
//! verdict to verdict; the faster one goes on, and the other is tried again now and then. They are timed at different places of
//! the text, some easier to draft than others, so what counts is not the tokens that were settled but those that rounds of
//! their lengths settle at one acceptance, the same for both ([`expected_tokens`]). What a
//! session finds is where the worker's next one begins; that tries the other way later, unless its verdicts come at another
//! pace: then it is behind another way, or another target, and knows nothing.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use specattn_worker::expected_tokens;

/// Verdicts of a trial.
const TRIAL: u32 = 12;
/// Verdicts from one trial to the next: at first, and the most.
const STRETCH_FIRST: u32 = 48;
const STRETCH_MOST: u32 = 768;
/// A trial at this share of the other way's rate cost nothing that could be told: the next one is not put off, since what the
/// draft guesses right depends on the text, which changes.
const HARMLESS: f64 = 0.95;
/// Verdicts after a change that are not timed: they answer rounds of before.
const UNSETTLED: u32 = 3;
/// How much faster running ahead must be: a trial tells a rate to some percent.
const MARGIN: f64 = 1.03;
/// What a new trial leaves of what the one before found of the other way.
const OLD_TRIAL: f64 = 0.25;

/// How far the time from verdict to verdict may be from what it was for a finding to hold.
const SAME_PACE: f64 = 1.5;

/// What sessions found last.
#[derive(Debug, Default)]
pub(crate) struct Findings(Mutex<Option<Found>>);

#[derive(Debug, Clone, Copy)]
struct Found {
    ahead: bool,
    /// Seconds from verdict to verdict, waiting and running ahead.
    seconds: [f64; 2],
}

impl Findings {
    fn get(&self) -> Option<Found> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, found: Found) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
    }
}

/// Rounds, and the time they took.
#[derive(Debug, Clone, Default)]
struct Pace {
    /// How many there were of each length.
    rounds: Vec<f64>,
    seconds: f64,
}

impl Pace {
    fn add(&mut self, length: usize, time: Duration) {
        if self.rounds.len() <= length {
            self.rounds.resize(length + 1, 0.0);
        }
        self.rounds[length] += 1.0;
        self.seconds += time.as_secs_f64();
    }

    fn verdicts(&self) -> f64 {
        self.rounds.iter().sum()
    }

    /// Tokens per second that such rounds come to when a draft token is accepted with probability `acceptance`.
    fn rate(&self, acceptance: f64) -> Option<f64> {
        let of_length = self.rounds.iter().enumerate();
        let tokens: f64 = of_length
            .map(|(length, count)| count * expected_tokens(acceptance, length))
            .sum();
        (self.seconds > 0.0).then(|| tokens / self.seconds)
    }

    fn seconds_per_verdict(&self) -> f64 {
        self.seconds / self.verdicts().max(1.0)
    }

    /// Lets what comes next count more than what was.
    fn fade(&mut self, kept: f64) {
        self.rounds.iter_mut().for_each(|count| *count *= kept);
        self.seconds *= kept;
    }
}

/// Both ways' paces, and when the next one is tried.
#[derive(Debug)]
struct Trials {
    findings: Arc<Findings>,
    /// What an earlier session found, until it is known whether that holds here.
    inherited: Option<Found>,
    /// Whether the present way is only on trial.
    on_trial: bool,
    /// Verdicts until the next change.
    left: u32,
    stretch: u32,
    unsettled: u32,
    /// Of waiting and of running ahead.
    paces: [Pace; 2],
    last: Option<Instant>,
}

/// The state of one session.
#[derive(Debug)]
pub(crate) struct Lookahead {
    ahead: bool,
    /// `None` where the way was chosen by whoever runs the worker.
    trials: Option<Trials>,
}

impl Lookahead {
    /// A session begins the way the last one found best, and tries the other one: at once where nothing is known.
    pub(crate) fn measured(findings: Arc<Findings>) -> Self {
        let inherited = findings.get();
        Self {
            ahead: inherited.is_some_and(|found| found.ahead),
            trials: Some(Trials {
                findings,
                inherited,
                on_trial: false,
                left: inherited.map_or(TRIAL, |_| STRETCH_FIRST),
                stretch: STRETCH_FIRST,
                unsettled: UNSETTLED,
                paces: [Pace::default(), Pace::default()],
                last: None,
            }),
        }
    }

    /// One way for good.
    pub(crate) fn fixed(ahead: bool) -> Self {
        Self {
            ahead,
            trials: None,
        }
    }

    /// Whether to run ahead now.
    pub(crate) fn is_on(&self) -> bool {
        self.ahead
    }

    /// A verdict came on a round of `proposed` tokens; a draft token is accepted with this probability.
    pub(crate) fn judged(&mut self, proposed: usize, acceptance: f64, now: Instant) {
        if let Some(trials) = &mut self.trials
            && trials.judged(self.ahead, proposed, now)
        {
            self.ahead = trials.next(self.ahead, acceptance);
        }
    }

    /// Something else than rounds went on: the time to the next verdict says nothing.
    pub(crate) fn interrupted(&mut self) {
        if let Some(trials) = &mut self.trials {
            trials.last = None;
        }
    }
}

impl Trials {
    /// Times a verdict on the present way; whether it was the last of its stretch.
    fn judged(&mut self, ahead: bool, proposed: usize, now: Instant) -> bool {
        let last = self.last.replace(now);
        if self.unsettled > 0 {
            self.unsettled -= 1;
            return false;
        }
        if let Some(last) = last {
            let time = now.saturating_duration_since(last);
            self.paces[usize::from(ahead)].add(proposed, time);
        }
        self.left = self.left.saturating_sub(1);
        self.left == 0 || !self.still_holds(ahead)
    }

    /// Whether what was inherited holds here, as far as is known; asked once, after as many verdicts as a trial has.
    fn still_holds(&mut self, ahead: bool) -> bool {
        let pace = &self.paces[usize::from(ahead)];
        if pace.verdicts() < f64::from(TRIAL) {
            return true;
        }
        let Some(found) = self.inherited.take() else {
            return true;
        };
        let ratio = pace.seconds_per_verdict() / found.seconds[usize::from(ahead)];
        (1.0 / SAME_PACE..=SAME_PACE).contains(&ratio)
    }

    /// The way to go on after a stretch of the present one.
    fn next(&mut self, ahead: bool, acceptance: f64) -> bool {
        let [waiting, running] = [0, 1].map(|way: usize| self.paces[way].rate(acceptance));
        let Some((waiting, running)) = waiting.zip(running) else {
            return self.turn(ahead, true);
        };
        let best = running > MARGIN * waiting;
        self.findings.set(Found {
            ahead: best,
            seconds: [0, 1].map(|way: usize| self.paces[way].seconds_per_verdict()),
        });
        if !self.on_trial {
            self.paces[usize::from(!ahead)].fade(OLD_TRIAL);
            let same_weight = f64::from(TRIAL) / f64::from(self.stretch);
            self.paces[usize::from(ahead)].fade(same_weight);
            return self.turn(ahead, true);
        }
        let (tried, other) = if ahead {
            (running, waiting)
        } else {
            (waiting, running)
        };
        self.stretch = if best != ahead && tried >= HARMLESS * other {
            STRETCH_FIRST
        } else {
            (2 * self.stretch).min(STRETCH_MOST)
        };
        if best == ahead {
            self.on_trial = false;
            self.left = self.stretch;
            return ahead;
        }
        self.turn(ahead, false)
    }

    /// Goes over to the other way.
    fn turn(&mut self, ahead: bool, on_trial: bool) -> bool {
        self.on_trial = on_trial;
        self.left = if on_trial { TRIAL } else { self.stretch };
        self.unsettled = UNSETTLED;
        self.last = None;
        !ahead
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::acceptance::Acceptance;

    /// Runs `verdicts` verdicts that take `waiting` or `ahead` ms; the share of them that ran ahead.
    fn run(lookahead: &mut Lookahead, verdicts: u32, [waiting, ahead]: [u64; 2]) -> f64 {
        let (mut now, mut acceptance) = (Instant::now(), Acceptance::default());
        let mut ran_ahead = 0;
        for _ in 0..verdicts {
            let ms = if lookahead.is_on() { ahead } else { waiting };
            ran_ahead += u32::from(lookahead.is_on());
            now += Duration::from_millis(ms);
            acceptance.count(4, 2);
            lookahead.judged(4, acceptance.probability(), now);
        }
        f64::from(ran_ahead) / f64::from(verdicts)
    }

    #[test]
    fn the_faster_way_is_taken() {
        let mut lookahead = Lookahead::measured(Arc::default());
        assert!(run(&mut lookahead, 1_000, [80, 50]) > 0.9);
        let mut lookahead = Lookahead::measured(Arc::default());
        assert!(run(&mut lookahead, 1_000, [50, 80]) < 0.1);
        // What makes no difference is left, but tried again.
        let mut lookahead = Lookahead::measured(Arc::default());
        assert!((0.15..0.3).contains(&run(&mut lookahead, 1_000, [50, 50])));
    }

    #[test]
    fn an_easy_passage_does_not_decide() {
        // Waiting is timed where nothing is accepted, running ahead, which is slower, where all is.
        let mut lookahead = Lookahead::measured(Arc::default());
        let (mut now, mut acceptance) = (Instant::now(), Acceptance::default());
        for _ in 0..40 {
            let ahead = lookahead.is_on();
            now += Duration::from_millis(if ahead { 80 } else { 50 });
            acceptance.count(4, if ahead { 4 } else { 0 });
            lookahead.judged(4, acceptance.probability(), now);
        }
        assert!(!lookahead.is_on());
    }

    #[test]
    fn a_change_is_noticed_and_the_next_session_knows() {
        let findings = Arc::new(Findings::default());
        let mut lookahead = Lookahead::measured(Arc::clone(&findings));
        run(&mut lookahead, 500, [50, 80]);
        assert!(run(&mut lookahead, 4_000, [80, 50]) > 0.6);
        assert!(Lookahead::measured(findings).is_on());
    }

    #[test]
    fn what_is_known_is_tried_again_later_and_at_once_where_it_does_not_hold() {
        let findings = Arc::new(Findings::default());
        let session = |times| run(&mut Lookahead::measured(Arc::clone(&findings)), 60, times);
        let first = session([50, 80]);
        assert!(first > 0.2, "{first}");
        let next = session([50, 80]);
        assert!(next < 0.17, "{next}");
        let farther = session([90, 60]);
        assert!(farther > 0.6, "{farther}");
    }

    #[test]
    fn a_way_that_was_chosen_is_kept() {
        let mut lookahead = Lookahead::fixed(true);
        assert!(run(&mut lookahead, 1_000, [50, 80]) == 1.0);
    }
}
