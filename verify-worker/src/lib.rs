//! The verify worker: the target model, its KV cache, acceptance and sampling, and the truth about what is committed.
//!
//! `service` is the gRPC edge; it talks to `engine_loop`, the one thread that owns the model and every `session`.
//! A session's `draft_link` holds what a draft worker sent and was told, its `events` what the gateway is told. Draft
//! workers are untrusted: whatever they send, the tokens of a `dense` or `exact` session are the target's own.
#![forbid(unsafe_code)]

pub mod args;
mod controller;
mod draft_link;
mod draft_reads;
mod engine_loop;
mod events;
mod kept_map;
mod leash;
mod masks;
mod metrics;
mod origin;
mod oversight;
mod payoff;
mod run;
mod service;
mod session;
mod stats;
pub mod stepwise;
mod trace;
mod trust;
mod waiting;
mod wire;
mod worker;

pub use args::{Args, Config};
pub use masks::{MaskReader, Masking};
pub use specattn_worker::WorkerError;
pub use worker::Worker;
