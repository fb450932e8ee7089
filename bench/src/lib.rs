//! Measurements of single parts of the system; each binary under `src/bin/` prints one table.

pub mod book;
pub mod codec;
pub mod draft;
#[cfg(feature = "cuda")]
pub mod gpu;
pub mod host;
pub mod service;
pub mod simulate;
