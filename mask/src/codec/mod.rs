//! The wire codec: a round's mask as bytes, relative to the previous round's.
//!
//! [`Encoder`] and [`Decoder`] are the two ends of one session's masks and keep the same state: the last masks that
//! crossed and the statistics learnt from them. The first mask after [`Encoder::new`] or [`Encoder::reset`] is a full
//! one and starts the state afresh on both sides; every other is a delta and decodes only where its base is the last
//! mask decoded. See [`frame`] for the bytes around a mask and `payload` for those within.

pub mod frame;
mod payload;
mod range_coder;

use frame::{Frame, Kind};
use payload::State;

use crate::error::MaskError;
use crate::layer_map::MAX_SOURCES;
use crate::policy::MAX_GRANULARITY;
use crate::position_set::PositionSet;
use crate::round::RoundMask;

/// What a decoder accepts. Its memory stays proportional to `max_sources * max_context` bits, whatever it is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Longest context in positions.
    pub max_context: usize,
    /// Most sources.
    pub max_sources: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_context: 1 << 18,
            max_sources: MAX_SOURCES,
        }
    }
}

/// What both ends hold of the last mask.
#[derive(Debug, Clone)]
struct Base {
    context_len: usize,
    granularity: u32,
    checksum: u32,
    state: State,
}

/// Checksum of a mask: of what it says, not of its bytes, so that a wrong base is found out as well.
fn checksum(context_len: usize, granularity: u32, groups: &[PositionSet]) -> u32 {
    let words = groups.iter().map(|set| set.words().len()).sum::<usize>();
    let mut bytes = Vec::with_capacity(16 + 8 * words);
    bytes.extend((context_len as u64).to_le_bytes());
    bytes.extend(granularity.to_le_bytes());
    bytes.extend((groups.len() as u32).to_le_bytes());
    for word in groups.iter().flat_map(|set| set.words()) {
        bytes.extend(word.to_le_bytes());
    }
    crc32fast::hash(&bytes)
}

/// The sending end of a session's masks.
#[derive(Debug, Default)]
pub struct Encoder {
    base: Option<Base>,
}

impl Encoder {
    /// An encoder whose first mask is a full one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets the base: the next mask is a full one. For a new receiver, or one that lacks the base.
    pub fn reset(&mut self) {
        self.base = None;
    }

    /// Encodes the session's next mask. Sources are cut or extended to the mask's context, and to whole groups.
    pub fn encode(&mut self, mask: &RoundMask) -> Vec<u8> {
        let granularity = mask.granularity.clamp(1, MAX_GRANULARITY);
        let groups: Vec<PositionSet> = mask
            .sources
            .iter()
            .map(|source| {
                let mut source = source.clone();
                source.resize(mask.context_len);
                source.to_groups(granularity as usize)
            })
            .collect();
        let checksum = checksum(mask.context_len, granularity, &groups);
        let (kind, mut state) = match self.base.take() {
            Some(base)
                if base.granularity == granularity && base.state.sources() == groups.len() =>
            {
                let kind = Kind::Delta {
                    base_tag: frame::tag(base.checksum),
                    growth: mask.context_len as i64 - base.context_len as i64,
                };
                (kind, base.state)
            }
            _ => {
                let kind = Kind::Full {
                    context_len: mask.context_len as u64,
                    granularity,
                    sources: groups.len() as u32,
                };
                (kind, State::new(groups.len()))
            }
        };
        let payload = state.encode(&groups);
        let bytes = Frame {
            kind,
            payload: &payload,
            checksum,
        }
        .to_bytes();
        state.advance(groups);
        self.base = Some(Base {
            context_len: mask.context_len,
            granularity,
            checksum,
            state,
        });
        bytes
    }
}

/// The receiving end of a session's masks.
#[derive(Debug)]
pub struct Decoder {
    limits: Limits,
    base: Option<Base>,
    mask: RoundMask,
}

impl Decoder {
    /// A decoder without a base: it takes a full mask first.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            base: None,
            mask: RoundMask::default(),
        }
    }

    /// Forgets the base: deltas fail until a full mask arrives.
    pub fn reset(&mut self) {
        self.base = None;
    }

    /// Decodes the session's next mask. After an error the decoder is as it was before.
    ///
    /// # Errors
    /// [`MaskError::MissingBase`] for a delta against another mask than the last one decoded: the sender must send a
    /// full one. [`MaskError::UnknownVersion`], [`MaskError::Malformed`], [`MaskError::LimitExceeded`] and
    /// [`MaskError::Checksum`] for bytes that no encoder sent, or that were damaged on the way.
    pub fn decode(&mut self, bytes: &[u8]) -> Result<&RoundMask, MaskError> {
        let frame = Frame::parse(bytes)?;
        let (context_len, granularity, mut state) = match frame.kind {
            Kind::Full {
                context_len,
                granularity,
                sources,
            } => {
                within(
                    "sources",
                    u64::from(sources),
                    self.limits.max_sources as u64,
                )?;
                if granularity == 0 {
                    return Err(MaskError::Malformed("granularity 0"));
                }
                within(
                    "granularity",
                    u64::from(granularity),
                    u64::from(MAX_GRANULARITY),
                )?;
                (context_len, granularity, State::new(sources as usize))
            }
            Kind::Delta { base_tag, growth } => {
                let base = self.base.as_ref().ok_or(MaskError::MissingBase)?;
                if frame::tag(base.checksum) != base_tag {
                    return Err(MaskError::MissingBase);
                }
                let context_len = (base.context_len as u64)
                    .checked_add_signed(growth)
                    .ok_or(MaskError::Malformed("negative context"))?;
                (context_len, base.granularity, base.state.clone())
            }
        };
        within("context", context_len, self.limits.max_context as u64)?;
        let context_len = context_len as usize;
        let groups = state.decode(frame.payload, context_len.div_ceil(granularity as usize));
        if checksum(context_len, granularity, &groups) != frame.checksum {
            return Err(MaskError::Checksum);
        }
        self.mask = RoundMask {
            context_len,
            granularity,
            sources: groups
                .iter()
                .map(|set| PositionSet::from_groups(set, granularity as usize, context_len))
                .collect(),
        };
        state.advance(groups);
        self.base = Some(Base {
            context_len,
            granularity,
            checksum: frame.checksum,
            state,
        });
        Ok(&self.mask)
    }
}

fn within(what: &'static str, value: u64, limit: u64) -> Result<(), MaskError> {
    if value > limit {
        return Err(MaskError::LimitExceeded { what, value, limit });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
