//! The controller against simulated sessions whose laws it does not know.

use specattn_engine::sampling::{CounterRng, Purpose};

use super::*;

/// A session's law: what a mask of mass p keeps, and how often a token it lets through is confirmed.
#[derive(Clone, Copy)]
struct Law {
    /// Kept at a mass of 0.9, and its power of the mass left out.
    kept: (f64, f64),
    miss: (f64, f64),
    /// Probability that a draft token is accepted; four are proposed.
    draft: f64,
}

impl Law {
    fn kept(&self, p: f32) -> f64 {
        (self.kept.0 * left_out(p).powf(self.kept.1)).min(1.0)
    }

    fn miss(&self, p: f32) -> f64 {
        (self.miss.0 * left_out(p).powf(self.miss.1)).min(1.0)
    }
}

/// Dense passes per committed token over a session of `length` tokens.
fn simulate(law: Law, controller: &mut Controller, length: usize, seed: u64) -> f64 {
    let rng = CounterRng::new(seed);
    let mut draws = 0;
    let mut happens = |probability: f64| {
        draws += 1;
        rng.uniform(draws, Purpose::Accept) < probability
    };
    let (mut committed, mut cost) = (0, 0.0);
    while committed < length {
        let p = controller.mask_p();
        let mut run = Vec::new();
        while !controller.is_due(run.len()) {
            let accepted = (0..4).take_while(|_| happens(law.draft)).count();
            // Overlaps scatter: most tokens are sure, some are not.
            for _ in 0..=accepted {
                let unsure = happens(0.2);
                run.push(
                    1.0 - if unsure {
                        (5.0 * law.miss(p)).min(1.0)
                    } else {
                        0.0
                    },
                );
            }
            cost += law.kept(p);
            controller.round(law.kept(p), accepted + 1);
        }
        if run.is_empty() {
            controller.round(law.kept(p), 0);
        }
        cost += 1.0;
        let stands = run.iter().take_while(|&&overlap| happens(overlap)).count();
        committed += stands + 1;
        if stands == run.len() {
            committed += (0..4).take_while(|_| happens(law.draft)).count();
        }
        controller.confirmed(run.into_iter());
    }
    cost / committed as f64
}

/// The least cost of any fixed choice.
fn best_fixed(law: Law) -> f64 {
    let choices = MASSES
        .iter()
        .flat_map(|&p| LENGTHS.map(|length| (p, length)));
    choices
        .map(|(p, length)| simulate(law, &mut Controller::new(Some(length), Some(p)), 4_000, 1))
        .fold(f64::INFINITY, f64::min)
}

/// Laws, and how far from the best fixed choice the controller may end up: it takes the exponents for granted, and where
/// they are others it settles beside the optimum.
const LAWS: [(Law, f64); 5] = [
    // As its priors say.
    (
        Law {
            kept: (0.16, -1.0),
            miss: (0.04, 0.85),
            draft: 0.5,
        },
        1.1,
    ),
    // Masks that hit, and ones that miss.
    (
        Law {
            kept: (0.1, -0.8),
            miss: (0.01, 1.1),
            draft: 0.7,
        },
        1.4,
    ),
    (
        Law {
            kept: (0.3, -1.1),
            miss: (0.12, 0.7),
            draft: 0.5,
        },
        1.45,
    ),
    // Short contexts: everything is kept.
    (
        Law {
            kept: (1.0, -0.1),
            miss: (0.001, 0.6),
            draft: 0.6,
        },
        1.1,
    ),
    // Useless masks.
    (
        Law {
            kept: (0.4, -0.2),
            miss: (0.9, 0.1),
            draft: 0.6,
        },
        1.2,
    ),
];

#[test]
fn it_comes_close_to_the_best_fixed_choice() {
    for (index, (law, slack)) in LAWS.into_iter().enumerate() {
        let best = best_fixed(law);
        let mut controller = Controller::new(None, None);
        let long = simulate(law, &mut controller, 4_000, 2);
        let short = (0..20).map(|seed| simulate(law, &mut Controller::new(None, None), 400, seed));
        let short = short.sum::<f64>() / 20.0;
        println!(
            "law {index}: best fixed {best:.3}, online {long:.3}, in a short session {short:.3}"
        );
        assert!(long < slack * best, "law {index}: {long} of {best}");
        assert!(short < slack * best, "law {index}: {short} of {best}");
    }
}

#[test]
fn what_is_fixed_stays() {
    let mut controller = Controller::new(Some(9), Some(0.77));
    simulate(LAWS[4].0, &mut controller, 500, 3);
    assert_eq!(
        (controller.confirm_length(), controller.mask_p()),
        (9, 0.77)
    );
}

#[test]
fn choices_stay_within_bounds_whatever_it_is_told() {
    let mut controller = Controller::new(None, None);
    for round in 0..2_000_u32 {
        let kept = f64::from(round % 7) / 3.0;
        controller.round(kept, (round % 18) as usize);
        controller.confirmed((0..round % 5).map(|i| f64::from(i) - 1.0));
        assert!((0.5..=0.99).contains(&controller.mask_p()));
        assert!(controller.confirm_length() <= 64);
    }
}
