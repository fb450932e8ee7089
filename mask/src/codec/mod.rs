//! The wire codec: a round's mask as bytes, relative to the previous round's.
//!
//! [`Encoder`] and [`Decoder`] are the two ends of one session's masks and keep the same state: the last few masks that
//! crossed. The first mask after [`Encoder::new`] or [`Encoder::reset`] is a full one and starts the state afresh on
//! both sides; every other is a delta and decodes only where its base is the last mask decoded. See [`frame`] for the
//! bytes around a mask and `payload` for those within.

mod bits;
pub mod frame;
mod history;
mod payload;
mod select;

use bits::{BitReader, BitWriter};
use frame::{Frame, Kind};
use history::History;

use crate::error::MaskError;
use crate::layer_map::MAX_SOURCES;
use crate::policy::MAX_GRANULARITY;
use crate::round::RoundMask;
use specattn_positions::PositionSet;

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
    /// One per source.
    histories: Vec<History>,
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
        let (kind, mut histories) = match self.base.take() {
            Some(base)
                if base.granularity == granularity && base.histories.len() == groups.len() =>
            {
                let kind = Kind::Delta {
                    base_tag: frame::tag(base.checksum),
                    growth: mask.context_len as i64 - base.context_len as i64,
                };
                (kind, base.histories)
            }
            _ => {
                let kind = Kind::Full {
                    context_len: mask.context_len as u64,
                    granularity,
                    sources: groups.len() as u32,
                };
                (kind, vec![History::default(); groups.len()])
            }
        };
        let mut writer = BitWriter::default();
        for (history, set) in histories.iter_mut().zip(&groups) {
            payload::put_source(&mut writer, history, set);
            history.push(set);
        }
        let bytes = Frame {
            kind,
            payload: &writer.finish(),
            checksum,
        }
        .to_bytes();
        self.base = Some(Base {
            context_len: mask.context_len,
            granularity,
            checksum,
            histories,
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
        let (context_len, granularity, sources) = self.shape(&frame.kind)?;
        let len = context_len.div_ceil(granularity as usize);
        let fresh = History::default();
        let mut reader = BitReader::new(frame.payload);
        let mut groups = Vec::with_capacity(sources);
        for source in 0..sources {
            let history = match (&frame.kind, &self.base) {
                (Kind::Delta { .. }, Some(base)) => &base.histories[source],
                _ => &fresh,
            };
            let set = payload::take_source(&mut reader, history, len)
                .ok_or(MaskError::Malformed("its payload does not fit its shape"))?;
            groups.push(set);
        }
        if !reader.is_finished() {
            return Err(MaskError::Malformed("its payload goes on"));
        }
        if checksum(context_len, granularity, &groups) != frame.checksum {
            return Err(MaskError::Checksum);
        }
        // Nothing fails from here on.
        let mut histories = match (&frame.kind, self.base.take()) {
            (Kind::Delta { .. }, Some(base)) => base.histories,
            _ => vec![History::default(); sources],
        };
        for (history, set) in histories.iter_mut().zip(&groups) {
            history.push(set);
        }
        self.base = Some(Base {
            context_len,
            granularity,
            checksum: frame.checksum,
            histories,
        });
        self.mask = RoundMask {
            context_len,
            granularity,
            sources: groups
                .iter()
                .map(|set| PositionSet::from_groups(set, granularity as usize, context_len))
                .collect(),
        };
        Ok(&self.mask)
    }

    /// Context, granularity and sources of a mask of kind `kind`, within the limits.
    fn shape(&self, kind: &Kind) -> Result<(usize, u32, usize), MaskError> {
        let (context_len, granularity, sources) = match *kind {
            Kind::Full {
                context_len,
                granularity,
                sources,
            } => (context_len, granularity, sources as usize),
            Kind::Delta { base_tag, growth } => {
                let base = self.base.as_ref().ok_or(MaskError::MissingBase)?;
                if frame::tag(base.checksum) != base_tag {
                    return Err(MaskError::MissingBase);
                }
                let context_len = (base.context_len as u64)
                    .checked_add_signed(growth)
                    .ok_or(MaskError::Malformed("its context is negative"))?;
                (context_len, base.granularity, base.histories.len())
            }
        };
        if granularity == 0 {
            return Err(MaskError::Malformed("its granularity is 0"));
        }
        // Positions are 32-bit numbers, whatever the limits say.
        let max_context = (self.limits.max_context as u64).min(u64::from(u32::MAX));
        within("context", context_len, max_context)?;
        within(
            "granularity",
            u64::from(granularity),
            u64::from(MAX_GRANULARITY),
        )?;
        within("sources", sources as u64, self.limits.max_sources as u64)?;
        Ok((context_len as usize, granularity, sources))
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
