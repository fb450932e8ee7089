//! The bytes around an encoded mask.
//!
//! ```text
//! version        1 byte    1
//! kind           1 byte    0 full, 1 delta
//!   full:   context varint, granularity varint, sources varint
//!   delta:  base   2 bytes   low half of the base's checksum
//!           growth varint    context less the base's, zigzag
//! length         varint    bytes of payload
//! payload
//! checksum       4 bytes   CRC-32 of the decoded mask
//! ```
//!
//! Integers are little-endian; varints are LEB128 in the shortest form, at most 10 bytes. Nothing follows the checksum.

use crate::error::MaskError;

/// Version of the format written here, and the only one read.
pub const VERSION: u8 = 1;

const FULL: u8 = 0;
const DELTA: u8 = 1;

/// What a mask is relative to, with its shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// To nothing.
    Full {
        context_len: u64,
        granularity: u32,
        sources: u32,
    },
    /// To the last mask, whose granularity and sources it shares.
    Delta { base_tag: u16, growth: i64 },
}

/// An encoded mask taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Frame<'a> {
    pub(crate) kind: Kind,
    pub(crate) payload: &'a [u8],
    pub(crate) checksum: u32,
}

/// How a delta names its base.
pub(crate) fn tag(checksum: u32) -> u16 {
    checksum as u16
}

impl<'a> Frame<'a> {
    /// The frame as bytes.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.payload.len() + 32);
        bytes.push(VERSION);
        match self.kind {
            Kind::Full {
                context_len,
                granularity,
                sources,
            } => {
                bytes.push(FULL);
                put_varint(&mut bytes, context_len);
                put_varint(&mut bytes, u64::from(granularity));
                put_varint(&mut bytes, u64::from(sources));
            }
            Kind::Delta { base_tag, growth } => {
                bytes.push(DELTA);
                bytes.extend(base_tag.to_le_bytes());
                put_varint(&mut bytes, (growth << 1 ^ growth >> 63) as u64);
            }
        }
        put_varint(&mut bytes, self.payload.len() as u64);
        bytes.extend(self.payload);
        bytes.extend(self.checksum.to_le_bytes());
        bytes
    }

    /// Takes `bytes` apart, allocating nothing.
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self, MaskError> {
        let mut rest = bytes;
        let version = take::<1>(&mut rest)?[0];
        if version != VERSION {
            return Err(MaskError::UnknownVersion {
                what: "mask",
                found: u64::from(version),
            });
        }
        let kind = match take::<1>(&mut rest)?[0] {
            FULL => Kind::Full {
                context_len: take_varint(&mut rest)?,
                granularity: take_u32(&mut rest)?,
                sources: take_u32(&mut rest)?,
            },
            DELTA => {
                let base_tag = u16::from_le_bytes(take(&mut rest)?);
                let zigzag = take_varint(&mut rest)?;
                let growth = (zigzag >> 1) as i64 ^ -((zigzag & 1) as i64);
                Kind::Delta { base_tag, growth }
            }
            _ => return Err(MaskError::Malformed("unknown kind")),
        };
        let length = take_varint(&mut rest)?;
        let payload = usize::try_from(length)
            .ok()
            .and_then(|length| rest.split_off(..length))
            .ok_or(TRUNCATED)?;
        let checksum = u32::from_le_bytes(take(&mut rest)?);
        if !rest.is_empty() {
            return Err(MaskError::Malformed("bytes after its end"));
        }
        Ok(Self {
            kind,
            payload,
            checksum,
        })
    }
}

const TRUNCATED: MaskError = MaskError::Malformed("truncated");

fn put_varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], MaskError> {
    let (head, tail) = rest.split_first_chunk::<N>().ok_or(TRUNCATED)?;
    *rest = tail;
    Ok(*head)
}

fn take_varint(rest: &mut &[u8]) -> Result<u64, MaskError> {
    let mut value = 0u64;
    for shift in (0..u64::BITS).step_by(7) {
        let byte = take::<1>(rest)?[0];
        let bits = u64::from(byte & 0x7f);
        if bits << shift >> shift != bits || (byte == 0 && shift > 0) {
            break;
        }
        value |= bits << shift;
        if byte < 0x80 {
            return Ok(value);
        }
    }
    Err(MaskError::Malformed("varint too long"))
}

fn take_u32(rest: &mut &[u8]) -> Result<u32, MaskError> {
    u32::try_from(take_varint(rest)?).map_err(|_| MaskError::Malformed("number too large"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn varints_round_trip(value in any::<u64>(), shift in 0u32..64) {
            let value = value >> shift;
            let mut bytes = Vec::new();
            put_varint(&mut bytes, value);
            let mut rest = &bytes[..];
            prop_assert_eq!(take_varint(&mut rest).unwrap(), value);
            prop_assert!(rest.is_empty());
        }

        #[test]
        fn frames_round_trip(
            growth in any::<i64>(),
            base_tag in any::<u16>(),
            payload in prop::collection::vec(any::<u8>(), 0..300),
            checksum in any::<u32>(),
        ) {
            let frame = Frame { kind: Kind::Delta { base_tag, growth }, payload: &payload, checksum };
            let bytes = frame.to_bytes();
            prop_assert_eq!(Frame::parse(&bytes).unwrap(), frame);
        }
    }

    #[test]
    fn varints_have_one_form() {
        for bytes in [&[0x80, 0x00][..], &[0xff; 10], &[0x80; 11]] {
            assert!(take_varint(&mut &bytes[..]).is_err(), "{bytes:?}");
        }
    }
}
