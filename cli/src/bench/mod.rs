//! `specattn bench`: measurements from a client's seat.
//!
//! `bench serve` offers a gateway requests as many clients would and reports how long they waited. What is asked follows
//! from the seed alone: request number i is the same at every load. The parts: when requests come ([`arrivals`]), what
//! they ask ([`lengths`], [`prompts`]), one request timed ([`request_timing`]), a load held for a while ([`load_test`]),
//! what that came to ([`tally`], [`worker_use`]), and how it is told ([`report`], [`plot`]).

pub mod args;
pub mod arrivals;
pub mod lengths;
pub mod load_test;
pub mod plot;
pub mod prompts;
pub mod report;
pub mod request_timing;
pub mod serve;
pub mod tally;
pub mod worker_use;

pub use args::BenchArgs;
pub use serve::run;
