//! Masks: which KV cache positions the target reads in a round, chosen from the draft's attention.
//!
//! The draft side mixes its heads' attention rows into [`Source`] rows, selects from each step's row the positions
//! that carry a share `p` of its mass ([`select_top_p`]), pools a round's steps ([`RoundSelector`]) and sends the
//! [`RoundMask`] compressed against the previous round's ([`Encoder`]). The target side decodes it ([`Decoder`]), looks
//! up each KV head's source in the [`LayerMap`] and makes the list of positions that the head reads ([`read_list()`]).
//!
//! The crate knows neither models nor gRPC; the only files it touches are layer maps, when asked to. Everything that
//! crosses the wire is untrusted here: [`Decoder`] takes any bytes and bounds its memory by [`Limits`].
#![forbid(unsafe_code)]

pub mod alignment;
pub mod codec;
pub mod error;
pub mod layer_map;
pub mod memory;
pub mod policy;
pub mod read_list;
pub mod round;
pub mod source;
pub mod spread;
pub mod top_p;

pub use alignment::Calibration;
pub use codec::{Decoder, Encoder, Limits};
pub use error::MaskError;
pub use layer_map::{LayerMap, PairShape};
pub use memory::{HeadMemory, MemoryRule};
pub use policy::MaskPolicy;
pub use read_list::read_list;
pub use round::{RoundMask, RoundSelector};
pub use source::{Source, Term};
pub use specattn_positions::PositionSet;
pub use top_p::{Selection, select_top_p};
