//! [`PrefillShare`]: how much of the time prompts may take from sessions that generate.
//!
//! A prompt's chunk takes as long as dozens of decode steps. While nobody generates, chunks run one after another; else
//! they may take a share of the time, so that a burst of new prompts slows the others down by a bounded factor and no
//! prompt waits for ever.

use std::time::Duration;

/// Most time that prompts may be owed: after a long stretch without any, a burst is no reason to catch up.
const MOST_OWED: Duration = Duration::from_millis(50);

/// The account of one engine.
#[derive(Debug)]
pub(crate) struct PrefillShare {
    /// Seconds of prefill per second of decoding.
    per_decode: f64,
    /// Seconds that prompts may take now; below 0 after a chunk, until decoding has had its part.
    owed: f64,
}

impl PrefillShare {
    /// Prompts get `share` of the time, in `(0, 1)`.
    pub(crate) fn new(share: f64) -> Self {
        Self {
            per_decode: share / (1.0 - share),
            owed: 0.0,
        }
    }

    /// Whether a chunk may run beside decode steps.
    pub(crate) fn allows(&self) -> bool {
        self.owed >= 0.0
    }

    /// Decode steps took so long.
    pub(crate) fn decoded(&mut self, time: Duration) {
        let owed = self.owed + time.as_secs_f64() * self.per_decode;
        self.owed = owed.min(MOST_OWED.as_secs_f64());
    }

    /// A chunk took so long while others would have decoded.
    pub(crate) fn prefilled(&mut self, time: Duration) {
        self.owed -= time.as_secs_f64();
    }

    /// Nobody decodes: what prompts took meanwhile was nobody's.
    pub(crate) fn nobody_decodes(&mut self) {
        self.owed = 0.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_get_their_share_and_no_more() {
        let mut share = PrefillShare::new(0.5);
        let (step, chunk) = (Duration::from_millis(1), Duration::from_millis(20));
        let (mut decoding, mut prefilling) = (Duration::ZERO, Duration::ZERO);
        for _ in 0..2_000 {
            if share.allows() {
                share.prefilled(chunk);
                prefilling += chunk;
            }
            share.decoded(step);
            decoding += step;
        }
        let part = prefilling.as_secs_f64() / (prefilling + decoding).as_secs_f64();
        assert!((part - 0.5).abs() < 0.02, "{part}");
    }

    #[test]
    fn idle_time_is_not_saved_up() {
        let mut share = PrefillShare::new(0.5);
        share.decoded(Duration::from_secs(60));
        let mut chunks = 0;
        while share.allows() {
            share.prefilled(Duration::from_millis(20));
            chunks += 1;
        }
        assert!(chunks <= 3, "{chunks}");
        share.nobody_decodes();
        assert!(share.allows());
    }
}
