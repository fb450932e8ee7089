//! The gateway over real sockets, between a client and scripted workers.
#![allow(clippy::unwrap_used)]

mod generation;
mod hostile;
mod openai;
mod resuming;
mod support;
mod workers;
