//! What the draft worker and the verify worker share: model arguments, the engine thread, its inbox and its scheduler, the
//! load report and the frame in which a worker serves.
//!
//! A worker is one engine thread that owns a model and all session state, and a gRPC edge that talks to it through one
//! bounded [`inbox`]. Blocking engine work never runs on the edge's threads, and the edge never touches a model.

pub mod args;
pub mod clock;
pub mod convert;
pub mod engine_thread;
mod error;
mod expected;
pub mod gathering;
pub mod host;
pub mod inbox;
mod load;
pub mod metrics;
mod prefill_share;
pub mod scheduler;
pub mod served_model;

pub use engine_thread::EngineThread;
pub use error::WorkerError;
pub use expected::expected_tokens;
pub use gathering::{Patience, Readiness, usual_time};
pub use inbox::{Inbox, Received};
pub use load::LoadGauge;
pub use scheduler::{Limits, Plan, Scheduler, Session};
pub use served_model::{ServedModel, model_info};
