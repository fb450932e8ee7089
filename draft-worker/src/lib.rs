//! The draft worker: the draft model, its KV cache, proposals, attention capture and masks.
//!
//! `service` is the gRPC edge towards gateways, `link` the stream to a verify worker; both talk to `engine_loop`, the
//! one thread that owns the model and every `session`. All a draft worker holds can be rebuilt from a session's
//! committed tokens: when it dies, another takes over and nothing is lost.
#![forbid(unsafe_code)]

mod acceptance;
pub mod args;
mod capturing;
mod channels;
mod engine_loop;
mod guesses;
mod link;
mod lookahead;
mod metrics;
mod outgoing;
pub mod own_reads;
mod prospects;
mod round_length;
mod round_trips;
pub mod rows;
mod service;
mod session;
pub mod stepwise;
mod wire;
mod worker;

pub use args::{Args, Config, LookaheadMode};
pub use own_reads::{OwnPolicy, OwnReads};
pub use round_trips::RoundTrips;
pub use rows::RowSelector;
pub use specattn_worker::WorkerError;
pub use worker::Worker;
