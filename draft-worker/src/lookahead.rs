//! [`Lookahead`]: whether drafting ahead of verdicts pays, measured.
//!
//! Far from its verify worker, or before a slow target, a draft that waits for each verdict wastes the wait. Where draft and
//! target share cores, or verdicts come at once, running ahead only takes time from the target; and where guesses often fail
//! behind a long way, the target does better to step alone than to wait for a draft that has to hear of it first. So the [`Way`]s
//! are timed from verdict to verdict; the fastest goes on, and the others are tried again now and then, in turn. They are timed at
//! different places of the text, some easier to draft than others, so what counts is not the tokens that were settled but
//! those that rounds of their lengths settle at one acceptance, the same for all ([`expected_tokens`]); a step alone is a round
//! of no tokens. What a session finds is where the worker's next one begins; that tries the other ways later, unless its
//! verdicts come at another pace: then it is behind another way, or another target, and knows nothing.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use specattn_worker::expected_tokens;

/// Verdicts of a trial: of a way that guesses, now rightly and now wrongly, or in which the length of rounds is not found yet, and of one in
/// which rounds are waited for, which take about as long as each other.
const TRIAL: u32 = 12;
const TRIAL_WAITING: u32 = 5;
/// Verdicts from one trial to the next: at first, and the most.
const STRETCH_FIRST: u32 = 48;
const STRETCH_MOST: u32 = 768;
/// A trial at this share of the best way's rate cost nothing that could be told: the next one is not put off, since what the
/// draft guesses right depends on the text, which changes.
const HARMLESS: f64 = 0.95;
/// Verdicts after a change that are not timed: they answer rounds of before.
const UNSETTLED: u32 = 3;
/// How much faster a way must be than one that asks less of draft and target: a trial tells a rate to some percent.
const MARGIN: f64 = 1.03;
/// What a new trial leaves of what the one before found of a way.
const OLD_TRIAL: f64 = 0.25;

/// How far the time from verdict to verdict may be from what it was for a finding to hold.
const SAME_PACE: f64 = 1.5;

/// What a draft does while a verdict is out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// It waits.
    Waiting,
    /// It drafts for what the verdict may be; where it is another, the target waits for a round.
    Ahead,
    /// The same, but the target need not wait: it steps alone, and the draft guesses the outcome of that.
    Unawaited,
}

/// How many there are.
pub(crate) const WAYS: usize = 3;

impl Way {
    /// Verdicts of a trial that is not the session's first.
    fn trial(self) -> u32 {
        match self {
            Way::Waiting => TRIAL_WAITING,
            Way::Ahead | Way::Unawaited => TRIAL,
        }
    }
}

/// What a worker's sessions know of each other.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    /// What the last one found.
    found: Mutex<Option<Found>>,
    /// How many draft for more than one thing that may come.
    explorers: AtomicUsize,
}

/// Counts a session among those that do, as long as it lives.
#[derive(Debug)]
pub(crate) struct Explorer(Arc<Findings>);

impl Explorer {
    /// Counts one more.
    pub(crate) fn new(findings: Arc<Findings>) -> Self {
        findings.explorers.fetch_add(1, Ordering::Relaxed);
        Self(findings)
    }

    /// How many there are.
    pub(crate) fn all(&self) -> usize {
        self.0.explorers.load(Ordering::Relaxed)
    }
}

impl Drop for Explorer {
    fn drop(&mut self) {
        self.0.explorers.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Debug, Clone, Copy)]
struct Found {
    best: Way,
    /// Verdicts from one trial to the next, and how many of them are left.
    stretch: u32,
    left: u32,
    /// Seconds from verdict to verdict of each way, as far as it was tried.
    seconds: [Option<f64>; WAYS],
}

impl Findings {
    fn get(&self) -> Option<Found> {
        *self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, found: Found) {
        *self.found.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
    }

    /// A session ended so many verdicts before its next trial: that is for the next one, or sessions that are shorter than a stretch would
    /// never try anything again.
    fn leave(&self, left: u32) {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = &mut *found {
            found.left = left;
        }
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

    fn seconds_per_verdict(&self) -> Option<f64> {
        (self.seconds > 0.0).then(|| self.seconds / self.verdicts())
    }

    /// Lets what comes next count more than what was.
    fn fade(&mut self, kept: f64) {
        self.rounds.iter_mut().for_each(|count| *count *= kept);
        self.seconds *= kept;
    }
}

/// The ways' paces, and when the next one is tried.
#[derive(Debug)]
struct Trials {
    findings: Arc<Findings>,
    /// Those that may be gone.
    ways: &'static [Way],
    /// What an earlier session found, until it is known whether that holds here.
    inherited: Option<Found>,
    /// Whether the present way is only on trial.
    on_trial: bool,
    /// The way tried last.
    tried: Way,
    /// Verdicts until the next change.
    left: u32,
    stretch: u32,
    unsettled: u32,
    paces: [Pace; WAYS],
    last: Option<Instant>,
}

/// The state of one session.
#[derive(Debug)]
pub(crate) struct Lookahead {
    way: Way,
    /// `None` where the way was chosen by whoever runs the worker.
    trials: Option<Trials>,
}

impl Lookahead {
    /// A session begins the way the last one found best, and tries the others of `ways` when that one would have: at once where
    /// nothing is known.
    pub(crate) fn measured(findings: Arc<Findings>, ways: &'static [Way]) -> Self {
        let inherited = findings.get();
        let way = match inherited.map(|found| found.best) {
            None => Way::Waiting,
            Some(best) if ways.contains(&best) => best,
            Some(_) => Way::Ahead,
        };
        Self {
            way,
            trials: Some(Trials {
                findings,
                ways,
                inherited,
                on_trial: false,
                tried: way,
                left: inherited.map_or(TRIAL, |found| found.left),
                stretch: inherited.map_or(STRETCH_FIRST, |found| found.stretch),
                unsettled: UNSETTLED,
                paces: Default::default(),
                last: None,
            }),
        }
    }

    /// One way for good.
    pub(crate) fn fixed(way: Way) -> Self {
        Self { way, trials: None }
    }

    /// What to do now.
    pub(crate) fn way(&self) -> Way {
        self.way
    }

    /// A verdict came on a round of `proposed` tokens, none of them for a step that the target took alone as the draft expected; a
    /// draft token is accepted with this probability.
    pub(crate) fn judged(&mut self, proposed: usize, acceptance: f64, now: Instant) {
        if let Some(trials) = &mut self.trials
            && trials.judged(self.way, proposed, now)
        {
            self.way = trials.next(self.way, acceptance);
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
    fn judged(&mut self, way: Way, proposed: usize, now: Instant) -> bool {
        let last = self.last.replace(now);
        if self.unsettled > 0 {
            self.unsettled -= 1;
            return false;
        }
        if let Some(last) = last {
            let time = now.saturating_duration_since(last);
            self.paces[way as usize].add(proposed, time);
        }
        self.left = self.left.saturating_sub(1);
        self.left == 0 || !self.still_holds(way)
    }

    /// Whether what was inherited holds here, as far as is known; asked once, after as many verdicts as a trial has.
    fn still_holds(&mut self, way: Way) -> bool {
        let pace = &self.paces[way as usize];
        if pace.verdicts() < f64::from(TRIAL) {
            return true;
        }
        let found = self.inherited.take();
        let then = found.and_then(|found| found.seconds[way as usize]);
        let ratio = pace
            .seconds_per_verdict()
            .zip(then)
            .map(|(now, then)| now / then);
        let holds = ratio.is_none_or(|ratio| (1.0 / SAME_PACE..=SAME_PACE).contains(&ratio));
        if !holds {
            self.stretch = STRETCH_FIRST;
        }
        holds
    }

    /// The way to go on after a stretch of the present one.
    fn next(&mut self, way: Way, acceptance: f64) -> Way {
        let rate = |way: Way| self.paces[way as usize].rate(acceptance);
        if let Some(&unknown) = self.ways.iter().find(|&&other| rate(other).is_none()) {
            return self.turn(unknown, true);
        }
        // Of ways as fast as each other the one that asks least.
        let mut best = self.ways[0];
        for &other in &self.ways[1..] {
            if rate(other) > rate(best).map(|rate| MARGIN * rate) {
                best = other;
            }
        }
        let harmless = rate(way) >= rate(best).map(|rate| HARMLESS * rate);
        if self.on_trial {
            self.stretch = if best != way && harmless {
                STRETCH_FIRST
            } else {
                (2 * self.stretch).min(STRETCH_MOST)
            };
        }
        self.findings.set(Found {
            best,
            stretch: self.stretch,
            left: self.stretch,
            seconds: [0, 1, 2].map(|way: usize| self.paces[way].seconds_per_verdict()),
        });
        if !self.on_trial {
            // In turn, and never the present one.
            let at = |way| {
                self.ways
                    .iter()
                    .position(|&other| other == way)
                    .unwrap_or(0)
            };
            let following = |way| self.ways[(at(way) + 1) % self.ways.len()];
            let mut other = following(self.tried);
            if other == way {
                other = following(other);
            }
            self.paces[other as usize].fade(OLD_TRIAL);
            let same_weight = f64::from(other.trial()) / f64::from(self.stretch);
            self.paces[way as usize].fade(same_weight);
            return self.turn(other, true);
        }
        if best == way {
            self.on_trial = false;
            self.left = self.stretch;
            return way;
        }
        self.turn(best, false)
    }

    /// Goes over to another way.
    fn turn(&mut self, way: Way, on_trial: bool) -> Way {
        self.on_trial = on_trial;
        if on_trial {
            self.tried = way;
        }
        let is_known = self.paces[way as usize].verdicts() > 0.0;
        self.left = match (on_trial, is_known) {
            (false, _) => self.stretch,
            (true, true) => way.trial(),
            (true, false) => TRIAL,
        };
        self.unsettled = UNSETTLED;
        self.last = None;
        way
    }
}

impl Drop for Trials {
    fn drop(&mut self) {
        if !self.on_trial {
            // The next one has to find out first whether what it inherits holds there.
            self.findings.leave(self.left.max(TRIAL));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::acceptance::Acceptance;

    const TWO: &[Way] = &[Way::Waiting, Way::Ahead];
    const THREE: &[Way] = &[Way::Waiting, Way::Ahead, Way::Unawaited];

    fn measured(findings: &Arc<Findings>) -> Lookahead {
        Lookahead::measured(Arc::clone(findings), TWO)
    }

    /// Runs `verdicts` verdicts that take `waiting` or `ahead` ms; the share of them that ran ahead.
    fn run(lookahead: &mut Lookahead, verdicts: u32, [waiting, ahead]: [u64; 2]) -> f64 {
        let (mut now, mut acceptance) = (Instant::now(), Acceptance::default());
        let mut ran_ahead = 0;
        for _ in 0..verdicts {
            let is_ahead = lookahead.way() != Way::Waiting;
            let ms = if is_ahead { ahead } else { waiting };
            ran_ahead += u32::from(is_ahead);
            now += Duration::from_millis(ms);
            acceptance.count(&[None; 4], 2);
            lookahead.judged(4, acceptance.probability(), now);
        }
        f64::from(ran_ahead) / f64::from(verdicts)
    }

    #[test]
    fn the_faster_way_is_taken() {
        let mut lookahead = measured(&Arc::default());
        assert!(run(&mut lookahead, 1_000, [80, 50]) > 0.9);
        let mut lookahead = measured(&Arc::default());
        assert!(run(&mut lookahead, 1_000, [50, 80]) < 0.1);
        // What makes no difference is left, but tried again.
        let mut lookahead = measured(&Arc::default());
        assert!((0.15..0.3).contains(&run(&mut lookahead, 1_000, [50, 50])));
    }

    #[test]
    fn an_easy_passage_does_not_decide() {
        // Waiting is timed where nothing is accepted, running ahead, which is slower, where all is.
        let mut lookahead = measured(&Arc::default());
        let (mut now, mut acceptance) = (Instant::now(), Acceptance::default());
        for _ in 0..40 {
            let ahead = lookahead.way() == Way::Ahead;
            now += Duration::from_millis(if ahead { 80 } else { 50 });
            acceptance.count(&[None; 4], if ahead { 4 } else { 0 });
            lookahead.judged(4, acceptance.probability(), now);
        }
        assert_eq!(lookahead.way(), Way::Waiting);
    }

    #[test]
    fn a_change_is_noticed_and_the_next_session_knows() {
        let findings = Arc::new(Findings::default());
        let mut lookahead = measured(&findings);
        run(&mut lookahead, 500, [50, 80]);
        assert!(run(&mut lookahead, 4_000, [80, 50]) > 0.6);
        assert_eq!(measured(&findings).way(), Way::Ahead);
    }

    #[test]
    fn what_is_known_is_tried_again_later_and_at_once_where_it_does_not_hold() {
        let findings = Arc::new(Findings::default());
        let session = |times| run(&mut measured(&findings), 60, times);
        let first = session([50, 80]);
        assert!(first > 0.2, "{first}");
        let next = session([50, 80]);
        assert!(next < 0.17, "{next}");
        let farther = session([90, 60]);
        assert!(farther > 0.6, "{farther}");
    }

    #[test]
    fn short_sessions_try_again_too() {
        let findings = Arc::new(Findings::default());
        run(&mut measured(&findings), 60, [80, 50]);
        // It takes as long as ever, and waiting has become faster.
        let went: Vec<f64> = (0..40)
            .map(|_| run(&mut measured(&findings), 30, [30, 50]))
            .collect();
        assert_eq!(went[0], 1.0);
        assert_eq!(went.last(), Some(&0.0), "{went:?}");
    }

    #[test]
    fn each_of_three_ways_is_tried_and_the_fastest_kept() {
        for fastest in THREE {
            let mut lookahead = Lookahead::measured(Arc::default(), THREE);
            let mut now = Instant::now();
            let mut went = [0; WAYS];
            for verdict in 0..4_000 {
                let way = lookahead.way();
                now += Duration::from_millis(if way == *fastest { 50 } else { 80 });
                lookahead.judged(4, 0.5, now);
                if verdict >= 100 {
                    went[way as usize] += 1;
                }
            }
            assert!(went[*fastest as usize] > 3_500, "{fastest:?} {went:?}");
            assert!(went.iter().all(|&went| went > 20), "{fastest:?} {went:?}");
        }
    }

    #[test]
    fn steps_alone_count_as_one_token() {
        let mut lookahead = Lookahead::measured(Arc::default(), THREE);
        let mut now = Instant::now();
        let mut unawaited = 0;
        for verdict in 0..2_000 {
            // Rounds of three tokens at 80 ms, or in turns with steps alone at 40: 37 tokens a second and 50, at this acceptance.
            let steps = lookahead.way() == Way::Unawaited;
            unawaited += u32::from(steps);
            now += Duration::from_millis(if steps { 40 } else { 80 });
            let alone = steps && verdict % 2 == 0;
            lookahead.judged(if alone { 0 } else { 4 }, 0.7, now);
        }
        assert!(unawaited > 1_700, "{unawaited}");
    }

    #[test]
    fn a_way_that_was_chosen_is_kept() {
        let mut lookahead = Lookahead::fixed(Way::Ahead);
        assert!(run(&mut lookahead, 1_000, [50, 80]) == 1.0);
    }
}
