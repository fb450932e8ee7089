//! [`CounterRng`]: random numbers as a pure function of (seed, position, purpose, attempt), and [`Noise`]: one for each token.
//!
//! Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): a keyed bijection of a 128-bit
//! counter that passes BigCrush, in thirty lines. Chosen over chained SplitMix finalisers because position and purpose sit
//! in separate counter words of one well-studied permutation, so that no two (position, purpose) pairs of a seed can
//! collide and neighbouring seeds and positions are as good as distant ones.
//!
//! A draft worker needs the numbers for its own draws but must not foresee what accepts them: who knows that can propose what
//! will pass. The draft's key is therefore a hash (SHA-256) of the seed, from which the seed cannot be computed; a seed from a small
//! set can still be guessed, so secrecy needs a seed drawn at random.
//!
//! The tokens that the target adds itself, recovered or bonus, are drawn by [`Noise`] that both sides know: a draft that runs ahead
//! then finds, with its own distribution, what the target is likely to draw with its (races.rs). Accepting stays secret. The noise
//! belongs to the text before the token: whether a round is there in time may depend on noise that its draft has looked at, never on
//! that behind its own text, which nobody looks at before the round is sent.
//!
//! Decisions that commit a token are taken once per position. Draft tokens and provisional ones can be withdrawn and
//! drawn again at the same position, perhaps from a distribution that what was withdrawn has shaped: they take the
//! numbers of another *attempt* then, so that a draw never depends on an earlier one. Attempts are counted by the epoch.
//! A draft may also draw rounds for several texts that the session may come to, only one of which will be: each *branch* has
//! numbers of its own, so that what was drawn for one text, and how long that took, says nothing of another's draws.

use sha2::{Digest, Sha256};

/// What a random number is for. One number exists per (seed, position, purpose), level and attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Drawing a draft token from q.
    Draft,
    /// Accepting or rejecting it.
    Accept,
    /// Drawing the token that the target adds: recovered after a rejection, bonus after γ accepted ones, or that of a step
    /// without a draft.
    Next,
}

impl Purpose {
    /// The counter word: part of the replayable format, never to be renumbered.
    fn word(self) -> u32 {
        match self {
            Self::Draft => 1,
            Self::Accept => 2,
            // 3 and 4 once drew recovered and bonus tokens.
            Self::Next => 9,
        }
    }
}

/// The random numbers of one session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CounterRng {
    target_key: u64,
    draft_key: u64,
    level: Level,
    attempt: u32,
    branch: u32,
}

/// Tokens by which texts are told apart as branches: more than a draft runs ahead of what it was told.
const BRANCH_TOKENS: usize = 64;

/// Who decides by a number: part of the replayable format, never to be renumbered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    Committing = 0,
    Provisional = 4,
}

impl CounterRng {
    /// All the numbers of the session with this seed: the target's side.
    pub fn new(seed: u64) -> Self {
        Self {
            target_key: seed,
            draft_key: derive_draft_key(seed),
            level: Level::Committing,
            attempt: 0,
            branch: 0,
        }
    }

    /// The numbers a draft may know, from [`CounterRng::draft_seed`]: [`Purpose::Accept`] does not agree with the target's side.
    pub fn for_draft(draft_seed: u64) -> Self {
        Self {
            target_key: derive_draft_key(draft_seed),
            draft_key: draft_seed,
            level: Level::Committing,
            attempt: 0,
            branch: 0,
        }
    }

    /// The numbers of another attempt, named by the `epoch` it is made in (its low 32 bits).
    pub fn attempt(self, epoch: u64) -> Self {
        Self {
            attempt: epoch as u32,
            ..self
        }
    }

    /// The numbers for a round, or for the target's own token, behind this text, of which the last 64 tokens count. Those that accept
    /// are the same behind any.
    pub fn behind(self, text: impl DoubleEndedIterator<Item = u32>) -> Self {
        // FNV-1a over whole tokens: a text has one hash, whoever calculates it.
        let branch = text
            .rev()
            .take(BRANCH_TOKENS)
            .fold(0x811c_9dc5_u32, |hash, token| {
                (hash ^ token).wrapping_mul(0x0100_0193)
            });
        Self { branch, ..self }
    }

    /// The numbers that accept and add tokens provisionally, in an attempt named by the `epoch`: none of them agrees with one
    /// that commits.
    pub fn provisional(self, epoch: u64) -> Self {
        Self {
            level: Level::Provisional,
            ..self.attempt(epoch)
        }
    }

    /// What to tell a draft worker in place of the seed.
    pub fn draft_seed(&self) -> u64 {
        self.draft_key
    }

    /// The number for `purpose` at token index `position` (prompt included): uniform over multiples of 2⁻⁵³ in [0, 1).
    pub fn uniform(&self, position: u64, purpose: Purpose) -> f64 {
        let [a, b, ..] = self.block(position, purpose);
        unit(a, b)
    }

    /// What draws the token that the target adds at index `position`.
    pub fn noise(&self, position: u64) -> Noise {
        let [a, b, ..] = self.block(position, Purpose::Next);
        Noise { key: [a, b] }
    }

    fn block(&self, position: u64, purpose: Purpose) -> [u32; 4] {
        let (key, level, branch) = match purpose {
            Purpose::Draft => (self.draft_key, Level::Committing, self.branch),
            Purpose::Accept => (self.target_key, self.level, 0),
            Purpose::Next => (self.draft_key, self.level, self.branch),
        };
        let counter = [
            position as u32,
            (position >> 32) as u32 ^ branch,
            purpose.word() + level as u32,
            self.attempt,
        ];
        philox4x32_10(counter, [key as u32, (key >> 32) as u32])
    }
}

/// Independent numbers for the tokens that one draw may give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Noise {
    key: [u32; 2],
}

impl Noise {
    /// The token's own number: exponentially distributed with mean 1.
    pub fn of(&self, token: u32) -> f64 {
        self.exponential([token, 0])
    }

    /// The number of all tokens that are not told apart.
    pub(super) fn of_rest(&self) -> f64 {
        self.exponential([0, 1])
    }

    /// Which of them it is: uniform over multiples of 2⁻⁵³ in [0, 1).
    pub(super) fn among_rest(&self) -> f64 {
        let [a, b, ..] = philox4x32_10([0, 2, 0, 0], self.key);
        unit(a, b)
    }

    fn exponential(&self, [low, high]: [u32; 2]) -> f64 {
        let [a, b, ..] = philox4x32_10([low, high, 0, 0], self.key);
        -ln(1.0 - unit(a, b))
    }
}

/// The natural logarithm of a normal number in (0, 1], within 1e-9 of it and the same on every machine, as the library's is not.
fn ln(x: f64) -> f64 {
    use std::f64::consts::{LN_2, SQRT_2};
    let bits = x.to_bits();
    let mut exponent = (bits >> 52) as i32 - 1023;
    let mut mantissa = f64::from_bits(bits & ((1 << 52) - 1) | 1023 << 52);
    if mantissa > SQRT_2 {
        mantissa /= 2.0;
        exponent += 1;
    }
    // artanh, of at most 0.172.
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let square = s * s;
    let mut series = 0.0;
    for odd in [11.0, 9.0, 7.0, 5.0, 3.0, 1.0] {
        series = series * square + 1.0 / odd;
    }
    f64::from(exponent) * LN_2 + 2.0 * s * series
}

/// 64 random bits as a uniform number: multiples of 2⁻⁵³ in [0, 1).
fn unit(a: u32, b: u32) -> f64 {
    const UNIT: f64 = 1.0 / (1_u64 << 53) as f64;
    let bits = u64::from(a) << 32 | u64::from(b);
    (bits >> 11) as f64 * UNIT
}

fn derive_draft_key(seed: u64) -> u64 {
    let digest = Sha256::new()
        .chain_update(b"specattn draft seed v1")
        .chain_update(seed.to_le_bytes())
        .finalize();
    digest
        .iter()
        .take(8)
        .fold(0, |key, &byte| key << 8 | u64::from(byte))
}

fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    const ROUNDS: usize = 10;
    const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    for _ in 0..ROUNDS {
        let a = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let b = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_known_answers() {
        // The test vectors published with the Random123 library.
        assert_eq!(
            philox4x32_10([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox4x32_10([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32_10(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn uniform_is_uniform_over_positions_and_seeds() {
        for (over_seeds, purpose) in [
            (false, Purpose::Draft),
            (false, Purpose::Accept),
            (true, Purpose::Accept),
            (true, Purpose::Next),
        ] {
            let mut bins = [0_u32; 64];
            for i in 0..64_000 {
                let (seed, position) = if over_seeds { (i, 7) } else { (7, i) };
                let u = CounterRng::new(seed).uniform(position, purpose);
                assert!((0.0..1.0).contains(&u));
                bins[(u * 64.0) as usize] += 1;
            }
            let statistic: f64 = bins
                .iter()
                .map(|&n| (f64::from(n) - 1000.0).powi(2) / 1000.0)
                .sum();
            // Chi-square with 63 degrees of freedom: the 0.9999 quantile is 114.
            assert!(statistic < 114.0, "{statistic}");
        }
    }

    #[test]
    fn a_draft_knows_its_own_draws_only() {
        let target = CounterRng::new(42);
        let draft = CounterRng::for_draft(target.draft_seed());
        assert_ne!(target.draft_seed(), 42);
        for position in [0, 1, u64::from(u32::MAX) + 1] {
            assert_eq!(
                draft.uniform(position, Purpose::Draft),
                target.uniform(position, Purpose::Draft)
            );
            assert_ne!(
                draft.uniform(position, Purpose::Accept),
                target.uniform(position, Purpose::Accept)
            );
        }
        // It knows what the target's own token is drawn by, behind each text.
        for text in [&[1, 2][..], &[3]] {
            let behind = |rng: CounterRng| rng.behind(text.iter().copied()).noise(9);
            assert_eq!(behind(draft), behind(target));
        }
        assert_ne!(draft.noise(9), draft.behind([1].into_iter()).noise(9));
        // A draft's numbers are the same at both levels of the target, and others in another attempt.
        assert_eq!(
            draft.attempt(5).uniform(9, Purpose::Draft),
            target.provisional(5).uniform(9, Purpose::Draft)
        );
        assert_ne!(
            draft.attempt(5).uniform(9, Purpose::Draft),
            draft.uniform(9, Purpose::Draft)
        );
        // A draft's numbers are others behind another text, the same on both sides, and only a draft's.
        let behind = |rng: CounterRng, text: &[u32]| rng.behind(text.iter().copied());
        assert_eq!(
            behind(draft, &[1, 2]).uniform(9, Purpose::Draft),
            behind(target, &[1, 2]).uniform(9, Purpose::Draft)
        );
        for other in [&[2, 1][..], &[2], &[1, 3], &[0, 1, 2]] {
            assert_ne!(
                behind(draft, &[1, 2]).uniform(9, Purpose::Draft),
                behind(draft, other).uniform(9, Purpose::Draft)
            );
        }
        assert_eq!(
            behind(target, &[1, 2]).uniform(9, Purpose::Accept),
            target.uniform(9, Purpose::Accept)
        );
        // Positions beyond 32 bits are counted apart.
        assert_ne!(
            target.uniform(1, Purpose::Draft),
            target.uniform((1 << 32) + 1, Purpose::Draft)
        );
    }

    #[test]
    fn levels_and_attempts_share_no_number() {
        let rng = CounterRng::new(42);
        let purposes = [Purpose::Accept, Purpose::Next];
        let rngs = [rng, rng.provisional(0), rng.provisional(1)];
        let mut numbers: Vec<u64> = rngs
            .iter()
            .flat_map(|rng| purposes.map(|purpose| rng.uniform(3, purpose).to_bits()))
            .collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), 6);
    }

    #[test]
    fn the_logarithm_is_one() {
        for step in 0..100_000 {
            let x = 1.0 - f64::from(step) / 100_000.0;
            for x in [x, x * 2f64.powi(-40), 1.0 - (1.0 - x) * 2f64.powi(-40)] {
                let error = (ln(x) - x.ln()).abs();
                assert!(error <= 1e-9 * x.ln().abs(), "{x}: {error}");
            }
        }
    }

    #[test]
    fn noise_is_exponential() {
        let mut bins = [0_u32; 64];
        for i in 0..640 {
            let noise = CounterRng::new(i / 10).noise(i % 10);
            for token in 0..100 {
                let u = (-noise.of(token)).exp();
                bins[((u * 64.0) as usize).min(63)] += 1;
            }
        }
        let statistic: f64 = bins
            .iter()
            .map(|&n| (f64::from(n) - 1000.0).powi(2) / 1000.0)
            .sum();
        assert!(statistic < 114.0, "{statistic}");
        let noise = CounterRng::new(1).noise(1);
        assert_ne!(noise.of(0), noise.of(1));
        assert_ne!(noise.of(0), noise.of_rest());
    }
}
