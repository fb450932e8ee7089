//! Quality: layer maps fitted on calibration text, and what masks made by them cost.
//!
//! [`align()`] records the attention of a pair of models on the same text and fits the map that says which mixture of
//! draft heads each KV head of the target follows. The crate knows models and masks; it knows no services.
#![forbid(unsafe_code)]

pub mod align;
pub mod cluster;
pub mod divergence;
pub mod error;
pub mod eval;
pub mod layer_alignment;
pub mod mixture;
pub mod recording;
pub mod text;

pub use align::{AlignOptions, MapKind, align};
pub use divergence::Metric;
pub use error::QualityError;
pub use text::Book;
