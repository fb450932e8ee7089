//! The gateway over real sockets, between a client and scripted workers.
#![allow(clippy::unwrap_used)]

mod console;
mod generation;
mod hostile;
mod http;
mod keys;
mod openai;
mod resuming;
mod support;
mod workers;
