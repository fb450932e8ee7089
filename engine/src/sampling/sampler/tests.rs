use super::*;
use crate::sampling::CounterRng;

fn sampler(change: impl FnOnce(&mut SamplingParams), vocab_size: usize) -> Sampler {
    let mut params = SamplingParams {
        temperature: 1.0,
        ..SamplingParams::default()
    };
    change(&mut params);
    Sampler::new(params, vocab_size).unwrap()
}

fn probs(distribution: &Distribution, vocab_size: u32) -> Vec<f32> {
    (0..vocab_size)
        .map(|token| distribution.prob(token))
        .collect()
}

fn assert_close(actual: &[f32], expected: &[f32]) {
    assert_eq!(actual.len(), expected.len());
    for (a, e) in actual.iter().zip(expected) {
        assert!((a - e).abs() < 1e-6, "{actual:?} is not {expected:?}");
    }
}

/// ln of each weight: the logits whose softmax they are.
fn logits(weights: &[f32]) -> Vec<f32> {
    weights.iter().map(|w| w.ln()).collect()
}

#[test]
fn greedy_is_argmax_with_ties_to_the_lowest_id() {
    let mut greedy = sampler(|p| p.temperature = 0.0, 600);
    let mut row = vec![-1.0; 600];
    for id in [599, 400, 3] {
        row[id] = 2.5;
        let distribution = greedy.distribution(&row, History::default()).unwrap();
        assert_eq!(distribution, Distribution::single(id as u32));
        assert_eq!(distribution.draw(&CounterRng::new(1).noise(2)), id as u32);
    }
    // -0.0 and 0.0 are equal.
    let mut two = sampler(|p| p.temperature = 0.0, 2);
    let distribution = two.distribution(&[-0.0, 0.0], History::default()).unwrap();
    assert_eq!(distribution.argmax(), 0);
}

#[test]
fn temperature_sharpens() {
    let row = logits(&[1.0, 2.0, 4.0]);
    let mut plain = sampler(|_| {}, 3);
    let at_one = plain.distribution(&row, History::default()).unwrap();
    assert_close(&probs(&at_one, 3), &[1.0 / 7.0, 2.0 / 7.0, 4.0 / 7.0]);
    let mut sharp = sampler(|p| p.temperature = 0.5, 3);
    let squared = sharp.distribution(&row, History::default()).unwrap();
    assert_close(&probs(&squared, 3), &[1.0 / 21.0, 4.0 / 21.0, 16.0 / 21.0]);
    // The smallest positive temperature there is: the inverse overflows, the argmax remains.
    let mut coldest = sampler(|p| p.temperature = f32::from_bits(1), 3);
    let coldest = coldest.distribution(&row, History::default()).unwrap();
    assert_close(&probs(&coldest, 3), &[0.0, 0.0, 1.0]);
}

#[test]
fn truncations_apply_in_order() {
    let row = logits(&[0.3, 0.1, 0.4, 0.2]);
    let dist = |change: fn(&mut SamplingParams)| {
        let distribution = sampler(change, 4).distribution(&row, History::default());
        probs(&distribution.unwrap(), 4)
    };
    assert_close(&dist(|p| p.top_k = 2), &[3.0 / 7.0, 0.0, 4.0 / 7.0, 0.0]);
    assert_close(&dist(|p| p.top_k = 9), &[0.3, 0.1, 0.4, 0.2]);
    assert_close(&dist(|p| p.top_p = 0.65), &[3.0 / 7.0, 0.0, 4.0 / 7.0, 0.0]);
    assert_close(&dist(|p| p.top_p = 1e-6), &[0.0, 0.0, 1.0, 0.0]);
    assert_close(&dist(|p| p.min_p = 0.6), &[3.0 / 7.0, 0.0, 4.0 / 7.0, 0.0]);
    assert_close(&dist(|p| p.min_p = 1.0), &[0.0, 0.0, 1.0, 0.0]);
    // Top-p acts on what top-k left: 0.4 of 0.7 reaches 0.57, though not of 1.
    let both = |p: &mut SamplingParams| (p.top_k, p.top_p) = (2, 0.57);
    assert_close(&dist(both), &[0.0, 0.0, 1.0, 0.0]);
}

#[test]
fn penalties_and_bias_apply_in_order() {
    let row = [2.0, -2.0, 1.0, 1.0];
    let history = History {
        prompt: &[0, 1, 77],
        output: &[2, 2],
        pending: &[2, 1],
    };
    let adjusted = |change: fn(&mut SamplingParams)| {
        let mut sampler = sampler(change, 4);
        sampler.distribution(&row, history).unwrap();
        sampler.adjusted
    };
    assert_eq!(
        adjusted(|p| p.repetition_penalty = 2.0),
        [1.0, -4.0, 0.5, 1.0]
    );
    assert_eq!(
        adjusted(|p| p.presence_penalty = 0.5),
        [2.0, -2.5, 0.5, 1.0]
    );
    assert_eq!(
        adjusted(|p| p.frequency_penalty = 0.5),
        [2.0, -2.5, -0.5, 1.0]
    );
    assert_eq!(
        adjusted(|p| p.logit_bias = vec![(3, -9.0)]),
        [2.0, -2.0, 1.0, -8.0]
    );
    let all = |p: &mut SamplingParams| {
        p.logit_bias = vec![(2, 1.0)];
        p.repetition_penalty = 2.0;
        p.presence_penalty = 0.25;
        p.frequency_penalty = 0.5;
    };
    // Token 2: (1 + 1) / 2 − 0.25 − 3 · 0.5.
    assert_eq!(adjusted(all), [1.0, -4.75, -0.75, 1.0]);
}

#[test]
fn penalties_change_the_greedy_token() {
    let mut greedy = sampler(
        |p| {
            p.temperature = 0.0;
            p.presence_penalty = 1.0;
        },
        3,
    );
    let row = [1.0, 0.5, 0.0];
    let mut next = |output: &[u32]| {
        let history = History {
            output,
            ..History::default()
        };
        greedy.distribution(&row, history).unwrap().argmax()
    };
    assert_eq!(next(&[]), 0);
    assert_eq!(next(&[0]), 1);
    assert_eq!(next(&[0, 1]), 0);
}

#[test]
fn bad_rows_are_errors_and_extreme_ones_are_not() {
    for temperature in [0.0, 1.0] {
        let mut sampler = sampler(
            |p| {
                p.temperature = temperature;
                p.repetition_penalty = 0.1;
            },
            3,
        );
        for row in [
            [0.0, f32::NAN, 0.0],
            [0.0, f32::INFINITY, 0.0],
            [f32::NEG_INFINITY; 3],
        ] {
            let error = sampler.distribution(&row, History::default()).unwrap_err();
            assert_eq!(error.label(), "invalid_argument");
        }
        assert!(sampler.distribution(&[0.0], History::default()).is_err());
        // Dividing by 0.1 would overflow.
        let history = History {
            prompt: &[1],
            ..History::default()
        };
        let distribution = sampler.distribution(&[f32::MIN, f32::MAX, 0.0], history);
        assert_eq!(distribution.unwrap().argmax(), 1);
    }
}

#[test]
fn generations_wrap_around() {
    let mut seen = SeenTokens {
        generation: u32::MAX - 1,
        ..SeenTokens::default()
    };
    for _ in 0..4 {
        seen.clear(3);
        assert!(seen.insert(2));
        assert!(!seen.insert(2));
        assert!(!seen.insert(3));
    }
}

/// The cost of the common calls. Run with `cargo test --release -p specattn-engine sampling -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement, meaningful in release builds only"]
fn measure() {
    use crate::sampling::draft_token;
    for vocab_size in [8_192_usize, 32_000, 151_936] {
        let row: Vec<f32> = (0..vocab_size as u64)
            .map(|i| 12.0 * CounterRng::new(1).uniform(i, super::super::Purpose::Draft) as f32)
            .collect();
        let time = |name: &str, change: fn(&mut SamplingParams)| {
            let mut sampler = sampler(change, vocab_size);
            let mut best = f64::MAX;
            for _ in 0..200 {
                let start = std::time::Instant::now();
                let distribution = sampler.distribution(&row, History::default()).unwrap();
                best = best.min(start.elapsed().as_secs_f64());
                std::hint::black_box(distribution);
            }
            println!("{vocab_size:>7} {name:<22} {:>8.1} us", best * 1e6);
        };
        time("greedy", |p| p.temperature = 0.0);
        time("temperature", |p| p.temperature = 0.8);
        time("top_k 50", |p| p.top_k = 50);
        time("top_p 0.9", |p| p.top_p = 0.9);
        time("top_k 50, top_p 0.9", |p| (p.top_k, p.top_p) = (50, 0.9));
        time("min_p 0.05", |p| p.min_p = 0.05);
        let p = sampler(|_| {}, vocab_size)
            .distribution(&row, History::default())
            .unwrap();
        let rng = CounterRng::new(3);
        let mut best = [f64::MAX; 2];
        for position in 0..200 {
            let start = std::time::Instant::now();
            std::hint::black_box(p.draw(&rng.noise(position)));
            best[0] = best[0].min(start.elapsed().as_secs_f64());
            let start = std::time::Instant::now();
            std::hint::black_box(draft_token(&p, 64, &rng, position));
            best[1] = best[1].min(start.elapsed().as_secs_f64());
        }
        println!(
            "{vocab_size:>7} draw                   {:>8.1} us",
            best[0] * 1e6
        );
        println!(
            "{vocab_size:>7} draft_token(64)        {:>8.1} us",
            best[1] * 1e6
        );
    }
}
