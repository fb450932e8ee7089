//! What the host does for sessions between forwards, with neither a model nor a GPU; the binary `host` prints the tables of
//! `bench/host.md`.

pub mod seat;
pub mod selections;

pub use seat::{Part, Seat, Shape};
pub use selections::Selections;
