//! The mask within a frame: for each source, class by class, where the selection surprises.
//!
//! A group's class is the number of the last [`ROUNDS`](super::history::ROUNDS) rounds in which it was selected. For
//! each class, from 0 up, the encoder says whether its groups are mostly selected or mostly not, and which ones are the
//! exceptions. Within a class exceptions come almost at random, so that the gaps between them are close to
//! geometric and Rice codes close to their entropy:
//!
//! ```text
//! for each source, for each class that has groups:
//!   selected     1 bit     what the class's groups are but for the exceptions
//!   parameter    4 bits    Rice parameter 0 to 14, or 15: no exceptions
//!   gaps         Rice      groups of the class between exceptions; the last gap reaches the end of the class, and is
//!                          left away when the class ends with an exception
//! ```
//!
//! The statistics travel with each mask, so that both ends need only remember selections.

use super::bits::{BitReader, BitWriter, MAX_PARAMETER};
use super::history::{CLASSES, History};
use crate::error::MaskError;
use crate::position_set::PositionSet;

/// Stands for the Rice parameter of a class without exceptions.
const NO_EXCEPTIONS: u32 = MAX_PARAMETER + 1;

/// Writes the selection `set` of a source, given its `history`.
pub(super) fn put_source(writer: &mut BitWriter, history: &History, set: &PositionSet) {
    let classes = history.classes(set.len());
    let mut members = Vec::new();
    for class in 0..CLASSES {
        classes.members(class, &mut members);
        let size = count(members.iter().copied());
        if size == 0 {
            continue;
        }
        let selected = count(members.iter().zip(set.words()).map(|(m, s)| m & s));
        let mostly = 2 * selected > size;
        let exceptions = if mostly { size - selected } else { selected };
        let parameter = parameter(size, exceptions);
        writer.put(u64::from(mostly), 1);
        writer.put(u64::from(parameter), 4);
        if parameter != NO_EXCEPTIONS {
            put_exceptions(writer, parameter, &members, set.words(), mostly);
        }
    }
}

/// Writes the gaps between the members of a class that are not selected as `mostly` says.
fn put_exceptions(
    writer: &mut BitWriter,
    parameter: u32,
    members: &[u64],
    selected: &[u64],
    mostly: bool,
) {
    let flip = if mostly { u64::MAX } else { 0 };
    // Members before the word, and those before the next gap.
    let (mut before, mut next) = (0, 0);
    for (&members, &selected) in members.iter().zip(selected) {
        let mut exceptions = members & (selected ^ flip);
        while exceptions != 0 {
            let lower = (exceptions & exceptions.wrapping_neg()) - 1;
            let rank = before + (members & lower).count_ones();
            writer.put_rice(rank - next, parameter);
            next = rank + 1;
            exceptions &= exceptions - 1;
        }
        before += members.count_ones();
    }
    if next < before {
        writer.put_rice(before - next, parameter);
    }
}

/// Reads the selection over `len` groups of a source, given its `history`.
pub(super) fn take_source(
    reader: &mut BitReader<'_>,
    history: &History,
    len: usize,
) -> Result<PositionSet, MaskError> {
    let classes = history.classes(len);
    let mut members = Vec::new();
    let mut selected = vec![0; len.div_ceil(64)];
    for class in 0..CLASSES {
        classes.members(class, &mut members);
        if members.iter().all(|&word| word == 0) {
            continue;
        }
        let head = reader.take(5).ok_or(ENDED)?;
        let parameter = (head >> 1) as u32;
        if head & 1 == 1 {
            for (selected, &members) in selected.iter_mut().zip(&members) {
                *selected |= members;
            }
        }
        if parameter != NO_EXCEPTIONS {
            take_exceptions(reader, parameter, &members, &mut selected)?;
        }
    }
    Ok(PositionSet::from_words(len, selected))
}

/// Reads the gaps between the exceptions of a class and toggles those.
fn take_exceptions(
    reader: &mut BitReader<'_>,
    parameter: u32,
    members: &[u64],
    selected: &mut [u64],
) -> Result<(), MaskError> {
    let mut left: u32 = members.iter().map(|word| word.count_ones()).sum();
    let mut gap = reader.take_rice(parameter).ok_or(ENDED)?;
    for (&members, selected) in members.iter().zip(selected) {
        // Members of the word that the gaps so far have not passed.
        let mut members = members;
        let mut size = members.count_ones();
        while gap < size {
            for _ in 0..gap {
                members &= members - 1;
            }
            *selected ^= members & members.wrapping_neg();
            members &= members - 1;
            size -= gap + 1;
            left -= gap + 1;
            if left == 0 {
                return Ok(());
            }
            gap = reader.take_rice(parameter).ok_or(ENDED)?;
        }
        gap -= size;
        left -= size;
    }
    if gap == 0 {
        Ok(())
    } else {
        Err(MaskError::Malformed("a gap beyond its class"))
    }
}

/// The Rice parameter for `exceptions` spread evenly over a class of `size` groups: the logarithm of the gaps' median.
fn parameter(size: u32, exceptions: u32) -> u32 {
    if exceptions == 0 {
        return NO_EXCEPTIONS;
    }
    // ln 2 = 0.69 times the mean gap.
    let median = (size - exceptions) / exceptions * 11 / 16;
    (median + 1).ilog2().min(MAX_PARAMETER)
}

fn count(words: impl Iterator<Item = u64>) -> u32 {
    words.map(u64::count_ones).sum()
}

const ENDED: MaskError = MaskError::Malformed("its payload ends early");
