//! [`Figures`]: sums over judged positions, and the averages reported.

use specattn_engine::KvReads;

use crate::eval::dense::log_sum_exp;

/// What a method came to over some positions; figures of several windows add up.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Figures {
    /// Positions judged.
    pub positions: u64,
    /// Σ KL(dense ‖ method), nats.
    pub kl: f64,
    /// Positions where both have the same most probable token.
    pub agreements: u64,
    /// Σ -ln p(the text's own token) of the method, and of the dense target.
    pub nll: f64,
    /// As `nll`, of the dense target.
    pub dense_nll: f64,
    /// KV entries of the target's forwards.
    pub kv: KvReads,
    /// KV bytes of the target's forwards and of the draft steps that masks need.
    pub system_bytes: KvReads,
    /// Rounds.
    pub rounds: u64,
    /// Encoded mask bytes.
    pub mask_bytes: u64,
}

impl Figures {
    /// Judges one row of logits against the dense log-probabilities there; `next` is the text's own token.
    pub fn judge(&mut self, dense: &[f32], logits: &[f32], next: u32) {
        let normaliser = log_sum_exp(logits);
        let cross: f64 = dense
            .iter()
            .zip(logits)
            .map(|(&d, &x)| f64::from(d.exp() * (d - x)))
            .sum();
        self.positions += 1;
        self.kl += cross + f64::from(normaliser);
        self.agreements += u64::from(argmax(dense) == argmax(logits));
        self.nll += f64::from(normaliser - logits[next as usize]);
        self.dense_nll -= f64::from(dense[next as usize]);
    }

    /// Adds the figures of other positions.
    pub fn add(&mut self, other: &Self) {
        self.positions += other.positions;
        self.kl += other.kl;
        self.agreements += other.agreements;
        self.nll += other.nll;
        self.dense_nll += other.dense_nll;
        self.kv += other.kv;
        self.system_bytes += other.system_bytes;
        self.rounds += other.rounds;
        self.mask_bytes += other.mask_bytes;
    }

    /// Mean KL(dense ‖ method), nats.
    pub fn mean_kl(&self) -> f64 {
        self.kl / self.positions.max(1) as f64
    }

    /// Share of positions with the same most probable token.
    pub fn top1(&self) -> f64 {
        self.agreements as f64 / self.positions.max(1) as f64
    }

    /// Perplexity of the text.
    pub fn perplexity(&self) -> f64 {
        (self.nll / self.positions.max(1) as f64).exp()
    }

    /// Perplexity over the dense target's, minus one.
    pub fn perplexity_loss(&self) -> f64 {
        ((self.nll - self.dense_nll) / self.positions.max(1) as f64).exp() - 1.0
    }

    /// KV entries read over those of dense forwards.
    pub fn kept(&self) -> f64 {
        self.kv.read as f64 / self.kv.dense.max(1) as f64
    }

    /// KV bytes that target and draft read over those of dense forwards of both; for methods that need no draft the
    /// target's alone.
    pub fn system_kept(&self) -> f64 {
        self.system_bytes.read as f64 / self.system_bytes.dense.max(1) as f64
    }

    /// Mean encoded mask bytes per round.
    pub fn mask_bytes_per_round(&self) -> f64 {
        self.mask_bytes as f64 / self.rounds.max(1) as f64
    }
}

fn argmax(row: &[f32]) -> usize {
    let mut best = 0;
    for (index, &x) in row.iter().enumerate() {
        if x > row[best] {
            best = index;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_distributions_have_no_divergence() {
        let logits = [1.0f32, -2.0, 0.5];
        let normaliser = log_sum_exp(&logits);
        let dense: Vec<f32> = logits.iter().map(|x| x - normaliser).collect();
        let mut figures = Figures::default();
        figures.judge(&dense, &logits, 2);
        assert!(figures.mean_kl().abs() < 1e-6);
        assert_eq!(figures.top1(), 1.0);
        assert!(figures.perplexity_loss().abs() < 1e-6);
    }

    #[test]
    fn divergence_is_the_definition() {
        let dense = [0.75f32.ln(), 0.25f32.ln()];
        let mut figures = Figures::default();
        // Logits need not be normalised.
        figures.judge(&dense, &[3.0, 3.0], 0);
        let expected = 0.75 * (0.75f64 / 0.5).ln() + 0.25 * (0.25f64 / 0.5).ln();
        assert!((figures.mean_kl() - expected).abs() < 1e-6);
        assert!((figures.perplexity_loss() - 0.5).abs() < 1e-5);
    }
}
