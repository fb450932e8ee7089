//! What a cheap draft costs and saves: speculative rounds under several ways of reading the draft's own KV cache.
//!
//! `cargo run --release -p specattn-bench --bin draft` prints the table of `bench/draft.md`.

pub mod figures;
pub mod rounds;

pub use figures::{Figures, MaskFigures};
pub use rounds::{Pair, Setting};
