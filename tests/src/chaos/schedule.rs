//! [`schedule`]: which fault strikes what and when, all from one seed.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

use crate::chaos::fleet::{Place, Role};

/// Mean seconds between two strikes.
const MEAN_GAP: f64 = 1.5;

/// Shortest and longest time that a fault lasts, in seconds.
const LASTS: (f64, f64) = (0.3, 4.0);

/// The time before the first strike.
const GRACE: Duration = Duration::from_secs(2);

/// A fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// `kill -9`; it is started again when the fault ends.
    Kill,
    /// The process stands still, its sockets stay open.
    Freeze,
    /// The process runs one fifth of the time.
    Slow,
    /// No byte comes in.
    Partition,
    /// Bytes take tens of milliseconds.
    Late,
    /// Every connection to it breaks once.
    Cut,
    /// Proposals and committed tokens are said twice.
    Twice,
    /// The disk of the session log is full.
    FullDisk,
}

/// What may strike a gateway. What is listed twice strikes twice as often.
const GATEWAY: &[Fault] = &[
    Fault::Kill,
    Fault::Kill,
    Fault::Freeze,
    Fault::Partition,
    Fault::Late,
    Fault::Cut,
    Fault::FullDisk,
];

/// What may strike a worker.
const WORKER: &[Fault] = &[
    Fault::Kill,
    Fault::Kill,
    Fault::Freeze,
    Fault::Slow,
    Fault::Partition,
    Fault::Late,
    Fault::Cut,
];

/// What may strike a worker behind a proxy.
const PROXIED: &[Fault] = &[
    Fault::Kill,
    Fault::Kill,
    Fault::Freeze,
    Fault::Slow,
    Fault::Partition,
    Fault::Late,
    Fault::Cut,
    Fault::Twice,
    Fault::Twice,
];

/// A fault that strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Strike {
    /// When, since the start.
    pub at: Duration,
    /// When it ends.
    pub ends: Duration,
    /// Which member of the fleet.
    pub target: usize,
    /// What.
    pub fault: Fault,
}

/// Strikes on the members at `places` over `duration`, by `seed`. All end within it.
///
/// A member suffers one fault at a time. Of each role one member is not killed in the first half and another in the
/// second, so that their memory can be watched for long.
pub fn schedule(seed: u64, places: &[Place], duration: Duration) -> Vec<Strike> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut strikes: Vec<Strike> = Vec::new();
    let mut busy = vec![Duration::ZERO; places.len()];
    let mut now = GRACE;
    loop {
        let gap = -MEAN_GAP * (1.0 - rng.random::<f64>()).ln();
        now += Duration::from_secs_f64(gap);
        let lasts = Duration::from_secs_f64(rng.random_range(LASTS.0..LASTS.1));
        if now + lasts >= duration {
            return strikes;
        }
        let free: Vec<usize> = (0..places.len()).filter(|&i| busy[i] < now).collect();
        let Some(&target) = free.choose(&mut rng) else {
            continue;
        };
        let choices = match places[target] {
            Place { proxied: true, .. } => PROXIED,
            Place {
                role: Role::Gateway,
                ..
            } => GATEWAY,
            _ => WORKER,
        };
        let mut fault = choices[rng.random_range(0..choices.len())];
        if fault == Fault::Kill && is_spared(places, target, now * 2 >= duration) {
            fault = Fault::Late;
        }
        busy[target] = now + lasts;
        strikes.push(Strike {
            at: now,
            ends: now + lasts,
            target,
            fault,
        });
    }
}

/// Whether a member lives through this half.
fn is_spared(places: &[Place], member: usize, second_half: bool) -> bool {
    let mut of_role = (0..places.len()).filter(|&index| places[index].role == places[member].role);
    of_role.nth(usize::from(second_half)) == Some(member)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chaos::fleet::PLACES;

    const LONG: Duration = Duration::from_secs(600);

    #[test]
    fn a_seed_repeats_itself_and_every_fault_has_its_turn() {
        let strikes = schedule(3, &PLACES, LONG);
        assert_eq!(strikes, schedule(3, &PLACES, LONG));
        assert_ne!(strikes, schedule(4, &PLACES, LONG));
        for fault in [GATEWAY, WORKER, PROXIED].concat() {
            let strikes_somewhere = strikes.iter().any(|strike| strike.fault == fault);
            assert!(strikes_somewhere, "{fault:?}");
        }
        for role in [Role::Gateway, Role::Verify, Role::Draft] {
            let kills = |s: &&Strike| s.fault == Fault::Kill && PLACES[s.target].role == role;
            assert!(strikes.iter().filter(kills).count() > 5, "{role:?}");
        }
    }

    #[test]
    fn a_member_suffers_one_fault_at_a_time_and_witnesses_live() {
        let strikes = schedule(5, &PLACES, LONG);
        for (index, strike) in strikes.iter().enumerate() {
            assert!(strike.at < strike.ends && strike.ends < LONG);
            for later in &strikes[index + 1..] {
                assert!(later.target != strike.target || later.at > strike.ends);
            }
            let spared = is_spared(&PLACES, strike.target, strike.at * 2 >= LONG);
            assert!(!(spared && strike.fault == Fault::Kill));
        }
        assert!(is_spared(&PLACES, 0, false) && is_spared(&PLACES, 5, true));
        assert!(!is_spared(&PLACES, 1, false) && !is_spared(&PLACES, 6, true));
    }
}
