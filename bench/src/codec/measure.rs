//! The measurement: sizes against the entropy of what changed, and times.

use std::time::Instant;

use anyhow::{Result, ensure};
use specattn_mask::RoundMask;

use super::candidate::{Candidate, xor};
use super::recording::Session;

/// What a codec made of some sessions. Each session's first mask, a full one, is coded but not counted.
#[derive(Debug, Clone, Copy)]
pub struct Figures {
    /// Mean bytes per round.
    pub bytes: f64,
    /// Mean bytes per round ÷ mean order-0 entropy per round.
    pub of_entropy: f64,
    /// Mean microseconds to encode a round.
    pub encode_us: f64,
    /// Mean microseconds to decode a round.
    pub decode_us: f64,
    /// Mean microseconds for both in rounds whose context is at least 7,680 positions.
    pub long_us: f64,
}

/// Context from which a round counts as long.
const LONG: usize = 7_680;

/// Bytes that ideal coding of the changed positions takes when each changes with the same chance: for every source
/// n · H(k / n) bits, with k of n positions changed since `previous`.
pub fn order_0_bytes(previous: &RoundMask, mask: &RoundMask) -> f64 {
    let bits = previous
        .sources
        .iter()
        .zip(&mask.sources)
        .map(|(previous, set)| {
            let mut previous = previous.clone();
            previous.resize(set.len());
            let (n, k) = (set.len() as f64, xor(&previous, set).count() as f64);
            let q = k / n;
            if k == 0.0 || k == n {
                0.0
            } else {
                -n * (q * q.log2() + (1.0 - q) * (1.0 - q).log2())
            }
        });
    bits.sum::<f64>() / 8.0
}

/// Runs a codec over `sessions`, `repeats` times. A round's time is its median over the repeats.
///
/// # Errors
/// When a mask does not come back as it was.
pub fn measure(
    open: fn() -> Box<dyn Candidate>,
    sessions: &[&Session],
    repeats: usize,
) -> Result<Figures> {
    let mut rounds: Vec<Round> = Vec::new();
    for session in sessions {
        let first = rounds.len();
        for window in session.windows(2) {
            rounds.push(Round {
                context_len: window[1].context_len,
                entropy: order_0_bytes(&window[0], &window[1]),
                ..Round::default()
            });
        }
        for _ in 0..repeats {
            run(open, session, &mut rounds[first..])?;
        }
    }
    let total = |of: &dyn Fn(&mut Round) -> f64, rounds: &mut [Round]| -> f64 {
        rounds.iter_mut().map(of).sum()
    };
    let count = rounds.len() as f64;
    let bytes = total(&|r| r.bytes as f64, &mut rounds);
    let entropy = total(&|r| r.entropy, &mut rounds);
    let encode = total(&|r| median(&mut r.encode_us), &mut rounds);
    let decode = total(&|r| median(&mut r.decode_us), &mut rounds);
    rounds.retain(|round| round.context_len >= LONG);
    let long = total(
        &|r| median(&mut r.encode_us) + median(&mut r.decode_us),
        &mut rounds,
    );
    Ok(Figures {
        bytes: bytes / count,
        of_entropy: bytes / entropy,
        encode_us: encode / count,
        decode_us: decode / count,
        long_us: long / rounds.len() as f64,
    })
}

/// One round's sizes and times.
#[derive(Debug, Default)]
struct Round {
    context_len: usize,
    entropy: f64,
    bytes: usize,
    encode_us: Vec<f64>,
    decode_us: Vec<f64>,
}

/// Codes a session once; `rounds` are those after its first mask.
fn run(open: fn() -> Box<dyn Candidate>, session: &Session, rounds: &mut [Round]) -> Result<()> {
    let mut codec = open();
    for (index, mask) in session.iter().enumerate() {
        let start = Instant::now();
        let coded = codec.encode(mask);
        let encoded = Instant::now();
        let decoded = codec.decode(&coded)?;
        let done = Instant::now();
        ensure!(decoded == *mask, "round {index} came back changed");
        if let Some(round) = index.checked_sub(1).map(|index| &mut rounds[index]) {
            round.bytes = coded.len();
            round.encode_us.push(1e6 * (encoded - start).as_secs_f64());
            round.decode_us.push(1e6 * (done - encoded).as_secs_f64());
        }
    }
    Ok(())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
