//! The mask crate's own codec, through its public API.

use anyhow::Result;
use specattn_mask::{Decoder, Encoder, Limits, RoundMask};

use super::candidate::Candidate;

/// An encoder and its decoder.
#[derive(Debug)]
pub struct HistoryClasses {
    encoder: Encoder,
    decoder: Decoder,
}

impl Default for HistoryClasses {
    fn default() -> Self {
        Self {
            encoder: Encoder::new(),
            decoder: Decoder::new(Limits::default()),
        }
    }
}

impl Candidate for HistoryClasses {
    fn encode(&mut self, mask: &RoundMask) -> Vec<u8> {
        self.encoder.encode(mask)
    }

    fn decode(&mut self, bytes: &[u8]) -> Result<RoundMask> {
        Ok(self.decoder.decode(bytes)?.clone())
    }
}
