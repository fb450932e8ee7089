//! The engine: Hugging Face checkpoints, one transformer for both roles, a paged KV cache and sampling.
//!
//! A service sees [`Model`]: it loads a checkpoint folder, hands out [`Sequence`]s (paged KV caches) and runs ragged
//! batches of [`Step`]s. Draft and target differ by checkpoint and by what they ask of a step (attention rows or index
//! lists), never by code. Devices sit behind [`backend::Backend`].

pub mod attention;
pub mod backend;
pub mod checkpoint;
pub mod chooser;
mod communicator;
pub mod config;
mod cpu;
pub mod crew;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device;
pub mod error;
mod floats;
pub mod kv_cache;
mod loading;
pub mod model;
mod pass_layout;
mod prefix;
mod ranks;
pub mod row_selection;
pub mod sampling;
mod scripted;
mod share;
mod transformer;
mod weights;

pub use attention::{AttentionRows, EntryMasses, HeadLists, KvReads, SpanLists};
pub use backend::DType;
pub use chooser::{KeyChooser, LayerKeys};
pub use config::ModelConfig;
pub use cpu::Isa as CpuIsa;
pub use crew::Crew;
pub use device::{DeviceChoice, DeviceInfo, DeviceLink};
pub use error::EngineError;
pub use floats::Floats;
pub use kv_cache::{BLOCK_TOKENS, BlockPool, CHUNK_TOKENS, Sequence, SharingCounters};
pub use loading::LoadOptions;
pub use model::{LogitRows, Model, Step, StepOutput};
pub use row_selection::{MixedHead, MixedRow, Round, RoundId, RowSelection, SelectedRows, Spread};
pub use scripted::{Script, ScriptedShape};
pub use specattn_positions::PositionSet;
