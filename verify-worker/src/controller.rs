//! [`Controller`]: how much of the context the exact mode's masked passes may leave out, and how long what they let
//! through stays provisional.
//!
//! It minimises KV entries read per committed token. In units of one dense pass, a cycle of K provisional tokens and
//! their confirmation costs
//!
//! ```text
//! C(K, p) = 1 + K/g · f(p)            E(K, p) = a + a² + … + aᴷ + 1 + aᴷ (g − 1)
//! ```
//!
//! and commits E on average: f is what a masked round reads of a dense one, g the tokens a round yields, a the overlap
//! Σ min(sparse, dense) of the two distributions, that is the probability that a provisional token is confirmed. The
//! confirming pass takes a round's draft tokens along, which are worth g − 1 tokens once the whole run stands; the 1 is
//! its own recovered or bonus token. K = 0 is dense speculative decoding.
//!
//! Overlaps are calculated for every token of a run, confirmed or not, so that a few runs tell. f and 1 − a move with
//! the mass 1 − p that masks leave out: as powers of it, with exponents fixed below and factors followed online. After
//! each confirmation the cheapest K on a grid is taken, and p moves at most one step of its own.

/// Masses to choose from.
const MASSES: [f32; 13] = [
    0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.88, 0.9, 0.92, 0.94, 0.96, 0.98, 0.99,
];
/// Where a session begins: an index of [`MASSES`].
const FIRST_MASS: usize = 6;
/// Confirm lengths to choose from; 0 confirms every round at once, without a masked pass.
const LENGTHS: [usize; 14] = [0, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32, 40, 48, 64];

/// f falls like the mass left out to this power: measured on the bundled pair, books at 4,096 tokens.
const KEPT_EXPONENT: f64 = -1.0;
/// 1 − a rises like it to this power, measured likewise.
const MISS_EXPONENT: f64 = 0.85;
/// f and 1 − a at a mass of 0.9 before anything is known.
const FIRST_KEPT: f64 = 0.16;
const FIRST_MISS: f64 = 0.04;
/// Tokens per round before anything is known.
const FIRST_YIELD: f64 = 2.5;

/// Rounds of rejecting all masked passes after which one run is tried again: masks and text change.
const RETRY_AFTER: usize = 48;

/// A running mean that forgets, with a prior worth some observations.
#[derive(Debug, Clone, Copy)]
struct Mean {
    sum: f64,
    weight: f64,
    keep: f64,
}

impl Mean {
    fn new(prior: f64, weight: f64, keep: f64) -> Self {
        Self {
            sum: prior * weight,
            weight,
            keep,
        }
    }

    /// Adds `count` observations that sum to `sum`, each worth `unit` of what is averaged.
    fn add(&mut self, sum: f64, count: f64) {
        self.sum = self.sum * self.keep + sum;
        self.weight = self.weight * self.keep + count;
    }

    fn get(&self) -> f64 {
        self.sum / self.weight
    }
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Controller {
    /// Confirm lengths to choose from: [`LENGTHS`], or the request's one.
    lengths: Vec<usize>,
    /// The request's own, in place of [`MASSES`].
    fixed_p: Option<f32>,
    /// Index of [`MASSES`] in force.
    mass: usize,
    length: usize,
    /// Tokens per round.
    tokens: Mean,
    /// f and 1 − a, each at a mass of 0.9.
    kept: Mean,
    miss: Mean,
    /// Rounds since a run was last begun.
    direct: usize,
}

/// (1 − p) ÷ 0.1, the variable of both powers.
fn left_out(p: f32) -> f64 {
    (1.0 - f64::from(p)).max(0.001) / 0.1
}

impl Controller {
    /// A controller that leaves alone what the request fixed.
    pub(crate) fn new(confirm_length: Option<usize>, mask_p: Option<f32>) -> Self {
        let mut controller = Self {
            lengths: confirm_length.map_or_else(|| LENGTHS.to_vec(), |length| vec![length]),
            fixed_p: mask_p,
            mass: FIRST_MASS,
            length: 0,
            tokens: Mean::new(FIRST_YIELD, 4.0, 0.97),
            kept: Mean::new(FIRST_KEPT, 1.0, 0.9),
            miss: Mean::new(FIRST_MISS, 8.0, 0.93),
            direct: 0,
        };
        controller.forget();
        controller
    }

    /// The mass that masks are to reach.
    pub(crate) fn mask_p(&self) -> f32 {
        self.fixed_p.unwrap_or(MASSES[self.mass])
    }

    /// Provisional tokens at which a run is confirmed.
    pub(crate) fn confirm_length(&self) -> usize {
        self.length
    }

    /// Whether a run of `length` is to be confirmed by the next pass.
    pub(crate) fn is_due(&self, length: usize) -> bool {
        length >= self.length
    }

    /// Back to the priors.
    pub(crate) fn forget(&mut self) {
        self.kept = Mean::new(FIRST_KEPT, 1.0, self.kept.keep);
        self.miss = Mean::new(FIRST_MISS, 8.0, self.miss.keep);
        self.choose_length();
    }

    /// A round whose mask keeps `kept` of the context: a masked pass that gave `tokens`, or none that was run.
    pub(crate) fn round(&mut self, kept: f64, tokens: usize) {
        let scale = left_out(self.mask_p()).powf(KEPT_EXPONENT);
        self.kept.add(kept / scale, 1.0);
        if tokens > 0 {
            self.tokens.add(tokens as f64, 1.0);
            self.direct = 0;
            return;
        }
        self.direct += 1;
        self.choose_length();
        if self.direct >= RETRY_AFTER && self.length == 0 {
            self.direct = 0;
            self.length = LENGTHS[1];
        }
    }

    /// A run was confirmed or withdrawn: `overlaps` of its tokens' distributions with those of the dense pass.
    pub(crate) fn confirmed(&mut self, overlaps: impl Iterator<Item = f64>) {
        let (mut missed, mut count) = (0.0, 0.0);
        for overlap in overlaps {
            missed += (1.0 - overlap).clamp(0.0, 1.0);
            count += 1.0;
        }
        if count == 0.0 {
            return;
        }
        let scale = left_out(self.mask_p()).powf(MISS_EXPONENT);
        self.miss.add(missed / scale, count);
        if self.fixed_p.is_none() {
            self.step_mass();
        }
        self.choose_length();
    }

    /// Moves p one step towards the mass that is cheapest at its best length.
    fn step_mass(&mut self) {
        let cost = |mass: usize| self.best_length(MASSES[mass]).1;
        let first = self.mass.saturating_sub(1);
        let last = (self.mass + 1).min(MASSES.len() - 1);
        let best = (first..=last).min_by(|&a, &b| cost(a).total_cmp(&cost(b)));
        self.mass = best.unwrap_or(self.mass);
    }

    fn choose_length(&mut self) {
        self.length = self.best_length(self.mask_p()).0;
    }

    /// The cheapest confirm length at `p`, and its cost in dense passes per token.
    fn best_length(&self, p: f32) -> (usize, f64) {
        let left_out = left_out(p);
        let kept = (self.kept.get() * left_out.powf(KEPT_EXPONENT)).min(1.0);
        let confirmed = 1.0 - (self.miss.get() * left_out.powf(MISS_EXPONENT)).clamp(1e-4, 1.0);
        let tokens = self.tokens.get().max(1.0);
        let costs = self.lengths.iter().map(|&length| {
            // A run ends with the round in which it reaches its length.
            let whole_run = match length {
                0 => 0.0,
                _ => length as f64 + (tokens - 1.0) / 2.0,
            };
            let whole = confirmed.powf(whole_run);
            let run = confirmed * (1.0 - whole) / (1.0 - confirmed);
            let cost = 1.0 + whole_run / tokens * kept;
            (length, cost / (run + 1.0 + whole * (tokens - 1.0)))
        });
        costs
            .min_by(|a, b| a.1.total_cmp(&b.1))
            .unwrap_or((0, f64::INFINITY))
    }
}

#[cfg(test)]
mod tests;
