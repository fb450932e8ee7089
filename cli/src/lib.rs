//! `specattn`: the command for people. It generates text, runs all three services in one process, and shows what a
//! running system is doing.
//!
//! Whatever it does goes through the gateway's public API; without `--gateway` it first starts a gateway and its workers
//! in its own process, over loopback gRPC.
#![forbid(unsafe_code)]

pub mod align;
pub mod all_in_one;
pub mod args;
pub mod bench;
pub mod catalog;
pub mod connect;
pub mod error;
pub mod eval;
pub mod generate;
pub mod health;
pub mod key;
pub mod models;
pub mod output;
pub mod pair;
mod progress;
pub mod request;
pub mod resume;
pub mod serve;
mod session;
mod shards;
pub mod status;
mod table;
pub mod top;

pub use error::CliError;
