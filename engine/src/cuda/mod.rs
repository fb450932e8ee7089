//! The GPU backend: kernels compiled at start by NVRTC, one stream, no wait inside a forward.
//!
//! Weights, queries, keys and values are 16-bit (bfloat16 or f16, the checkpoint's type); the residual stream, sums, softmax
//! and logits are f32. Small passes run on kernels whose row results do not depend on the other rows, so that greedy
//! speculative text equals plain text here as on the CPU; long prompt chunks use cuBLAS and their own attention kernels.
//!
//! A model may be split over GPUs, which add up through each other's memory and NCCL.
//!
//! The driver, NVRTC and cuBLAS are loaded when a device is opened, NCCL when a model is split, so a binary with this backend runs on hosts without them.

mod argmax;
mod attention;
mod attention_prefill;
mod backend;
mod batch;
mod bucket;
mod chunks;
mod device;
mod elementwise;
mod error;
mod graph_cache;
mod hand_out;
mod kernel_cache;
mod kv_store;
mod linear;
mod linear_wgmma;
mod linear_wide;
mod memory;
mod nccl;
mod peer_memory;
mod peer_norm;
mod peer_sum;
mod pinned;
mod rank_group;
mod recorder;
mod recording;
mod round_sums;
mod row_mixer;
pub mod selection;
mod staging;
mod tensor_map;
mod topology;
mod turnstile;
mod weights;

pub use attention_prefill::PrefillKernel;
pub use backend::CudaBackend;
pub use device::{Device, Turn, device_count};
pub use error::CudaError;
pub use graph_cache::GraphCounts;
pub use kv_store::KvStore;
pub use linear::ProductKernel;
pub use linear_wgmma::WARPGROUP_CUTS;
pub use memory::{Buffer, DeviceMemory, Weight};
pub use nccl::keep_multicast_off;
pub use rank_group::{RankGroup, SumWay};
pub(crate) use rank_group::{open, ranks};
pub(crate) use topology::describe;
