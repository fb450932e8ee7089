//! Evaluation: what a way of masking costs in quality, teacher-forced, as served.
//!
//! A window of text is prefilled densely up to [`Window::prompt`], then read in rounds: draft steps over the text's own
//! tokens, masks, one masked target forward per round, all of it accepted. The target's KV entries stay as those
//! forwards left them, so errors accumulate as they would in a session. Every row of logits is compared with the dense
//! target's at the same position.

pub mod chosen;
pub mod dense;
pub mod equal_budget;
pub mod figures;
pub mod h2o;
pub mod method;
pub mod plan;
pub mod plot;
pub mod report;
pub mod rounds;
pub mod served;
pub mod streaming;
pub mod trace;

pub use dense::Reference;
pub use figures::Figures;
pub use method::{Choice, Masker};
pub use plan::{Method, Plan, ServedMap, Setting, measure};
pub use report::Row;
pub use rounds::{ROUND_DRAFT, Window, run};
