//! A fleet in virtual time: hundreds of workers and 10^5 sessions on the product's own decisions.
//!
//! Real: the schedulers, sessions, KV block pools, prefix sharing, draft links, epochs and rollbacks of both workers, whether
//! drafts pay, how long rounds are and whether drafts run ahead, the checks of the wire, and the gateway's admission,
//! assignment, rebalancing and reopening: the `Stepwise` of each of the three services. Modelled: how long forwards take
//! ([`cost`]), how long messages travel ([`network`]), what models answer ([`script`]) and what is asked ([`workload`]). Every
//! session's tokens are compared with its target's own continuation as they come.

pub mod agenda;
pub mod cost;
pub mod fleet;
pub mod network;
pub mod node;
pub mod report;
pub mod script;
pub mod workload;

pub use fleet::{Plan, run};
