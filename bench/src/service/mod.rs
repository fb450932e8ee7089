//! What serving costs and gains, with the project's binaries as processes of their own; the binary `service` prints the
//! tables of `bench/serve/service.md`.

mod answer_at_once;
pub mod far;
pub mod hostile;
pub mod prefix;
pub mod round;
mod timed;
pub mod together;
