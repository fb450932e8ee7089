//! Mask codecs side by side: candidates behind one trait, masks recorded from a draft model, and the measurement.
//!
//! `cargo run --release -p specattn-bench --bin codec` prints the table of `bench/codec.md`. The winner lives in the
//! mask crate and takes part through its public API; the others live here, each in the simplest form that is fair.

pub mod candidate;
pub mod history_classes;
pub mod measure;
pub mod range_coder;
pub mod recorder;
pub mod recording;
pub mod rice_gaps;
pub mod roaring_xor;
pub mod zstd_xor;

pub use candidate::{Candidate, candidates};
pub use recording::{Recording, Session};
