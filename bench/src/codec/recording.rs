//! [`Recording`]: masks of real sessions, in memory and in files.
//!
//! A file is the magic `SAMASKS1`, then records of little-endian 32-bit numbers: p in thousandths, session, context,
//! granularity, sources; then each source's bitmap in 64-bit words. Records of one p and session stand in order.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use specattn_mask::{PositionSet, RoundMask};

const MAGIC: &[u8; 8] = b"SAMASKS1";

/// One session's masks, in order.
pub type Session = Vec<RoundMask>;

/// Masks by p in thousandths, then by session.
#[derive(Debug, Default)]
pub struct Recording {
    /// p in thousandths to session to masks.
    pub by_p: BTreeMap<u32, BTreeMap<u32, Session>>,
}

impl Recording {
    /// Adds a session's next mask.
    pub fn push(&mut self, p_thousandths: u32, session: u32, mask: RoundMask) {
        self.by_p
            .entry(p_thousandths)
            .or_default()
            .entry(session)
            .or_default()
            .push(mask);
    }

    /// Reads a recording.
    ///
    /// # Errors
    /// When the file cannot be read or is not a recording.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).with_context(|| path.display().to_string())?;
        let mut rest = bytes
            .strip_prefix(MAGIC)
            .context("not a recording of masks")?;
        let mut recording = Self::default();
        while !rest.is_empty() {
            let [p, session, context_len, granularity, sources] = take_header(&mut rest)?;
            let words = (context_len as usize).div_ceil(64);
            let mut sets = Vec::new();
            for _ in 0..sources {
                ensure!(rest.len() / 8 >= words, "truncated");
                let (bitmap, tail) = rest.split_at(8 * words);
                rest = tail;
                let words = bitmap
                    .as_chunks::<8>()
                    .0
                    .iter()
                    .map(|word| u64::from_le_bytes(*word));
                sets.push(PositionSet::from_words(
                    context_len as usize,
                    words.collect(),
                ));
            }
            let mask = RoundMask {
                context_len: context_len as usize,
                granularity,
                sources: sets,
            };
            recording.push(p, session, mask);
        }
        Ok(recording)
    }

    /// Writes the recording.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut bytes = MAGIC.to_vec();
        for (&p, sessions) in &self.by_p {
            for (&session, masks) in sessions {
                for mask in masks {
                    let shape = [
                        p,
                        session,
                        mask.context_len as u32,
                        mask.granularity,
                        mask.sources.len() as u32,
                    ];
                    bytes.extend(shape.iter().flat_map(|n| n.to_le_bytes()));
                    let words = mask.sources.iter().flat_map(PositionSet::words);
                    bytes.extend(words.flat_map(|word| word.to_le_bytes()));
                }
            }
        }
        fs::write(path, bytes).with_context(|| path.display().to_string())
    }
}

fn take_header(rest: &mut &[u8]) -> Result<[u32; 5]> {
    let (header, tail) = rest.split_first_chunk::<20>().context("truncated")?;
    *rest = tail;
    let mut numbers = [0; 5];
    for (number, bytes) in numbers.iter_mut().zip(header.as_chunks::<4>().0) {
        *number = u32::from_le_bytes(*bytes);
    }
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn saves_and_loads() {
        let mut recording = Recording::default();
        for (p, session, context_len) in [(800, 0, 0), (800, 1, 64), (950, 0, 130), (950, 0, 134)] {
            let set = PositionSet::from_positions(context_len, (0..context_len).step_by(3));
            let mask = RoundMask {
                context_len,
                granularity: 1,
                sources: vec![set; 2],
            };
            recording.push(p, session, mask);
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("masks");
        recording.save(&path).unwrap();
        assert_eq!(Recording::load(&path).unwrap().by_p, recording.by_p);
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert!(Recording::load(&path).is_err());
    }
}
