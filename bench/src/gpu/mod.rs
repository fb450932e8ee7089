//! The GPU backend against a plain oracle, and against the bytes it must move.

pub mod attention_case;
pub mod check_attention;
pub mod check_company;
pub mod check_graphs;
pub mod check_hand_outs;
pub mod check_linear;
pub mod check_selection;
pub mod check_sharing;
pub mod draft_steps;
pub mod forwards;
pub mod graphs;
pub mod listed_steps;
pub mod load;
pub mod numbers;
pub mod pair;
mod rank_sums;
pub mod tensor_parallel;
pub mod time_kernels;
pub mod timer;
