//! The mask within a frame: for each source, class by class, where the selection surprises.
//!
//! Groups that were selected about equally often of late form a class ([`super::history`]). For each class the encoder
//! says whether its groups are mostly selected or mostly not, and which ones are the exceptions. Within a class
//! exceptions come almost at random, so that the gaps between them are close to geometric and Rice codes close to
//! their entropy:
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
use super::select::Ranked;
use specattn_positions::PositionSet;

/// Stands for the Rice parameter of a class without exceptions.
const NO_EXCEPTIONS: u32 = MAX_PARAMETER + 1;

/// Writes the selection `set` of a source, given its `history`.
pub(super) fn put_source(writer: &mut BitWriter, history: &History, set: &PositionSet) {
    let classes = history.classes(set.len());
    let (mut members, mut ranks) = (Vec::new(), Vec::new());
    for class in 0..CLASSES {
        classes.members(class, &mut members);
        let size = count(members.iter().copied());
        if size == 0 {
            continue;
        }
        let selected = count(members.iter().zip(set.words()).map(|(m, s)| m & s));
        let mostly = 2 * selected > size;
        rank_exceptions(&members, set.words(), mostly, &mut ranks);
        let parameter = parameter(size, ranks.len() as u32);
        writer.put(u64::from(mostly) | u64::from(parameter) << 1, 5);
        if parameter != NO_EXCEPTIONS {
            put_ranks(writer, parameter, size, &ranks);
        }
    }
}

/// Reads the selection over `len` groups of a source, given its `history`; `None` for a payload that is not one.
pub(super) fn take_source(
    reader: &mut BitReader,
    history: &History,
    len: usize,
) -> Option<PositionSet> {
    let classes = history.classes(len);
    let (mut members, mut ranks) = (Vec::new(), Vec::new());
    let mut selected = vec![0; len.div_ceil(64)];
    for class in 0..CLASSES {
        classes.members(class, &mut members);
        let size = count(members.iter().copied());
        if size == 0 {
            continue;
        }
        let head = reader.take(5)?;
        let parameter = (head >> 1) as u32;
        if head & 1 == 1 {
            for (selected, &members) in selected.iter_mut().zip(&members) {
                *selected |= members;
            }
        }
        if parameter != NO_EXCEPTIONS {
            take_ranks(reader, parameter, size, &mut ranks)?;
            toggle_exceptions(&members, &ranks, &mut selected);
        }
    }
    Some(PositionSet::from_words(len, selected))
}

/// The ranks among a class's `members` of those that are not `selected` as `mostly` says.
fn rank_exceptions(members: &[u64], selected: &[u64], mostly: bool, ranks: &mut Vec<u32>) {
    let flip = if mostly { u64::MAX } else { 0 };
    let mut before = 0;
    ranks.clear();
    for (&members, &selected) in members.iter().zip(selected) {
        let mut exceptions = members & (selected ^ flip);
        while exceptions != 0 {
            let lower = (exceptions & exceptions.wrapping_neg()) - 1;
            ranks.push(before + (members & lower).count_ones());
            exceptions &= exceptions - 1;
        }
        before += members.count_ones();
    }
}

/// Toggles in `selected` the members of a class that have the given ranks.
fn toggle_exceptions(members: &[u64], ranks: &[u32], selected: &mut [u64]) {
    let mut ranks = ranks.iter().copied();
    let mut next = ranks.next();
    let mut before = 0;
    for (&members, selected) in members.iter().zip(selected) {
        let members = Ranked::new(members);
        let end = before + members.count();
        while let Some(rank) = next.filter(|&rank| rank < end) {
            *selected ^= members.select(rank - before);
            next = ranks.next();
        }
        before = end;
    }
}

/// Writes the gaps between ranks in a class of `size` groups.
fn put_ranks(writer: &mut BitWriter, parameter: u32, size: u32, ranks: &[u32]) {
    let mut next = 0;
    for &rank in ranks {
        writer.put_rice(rank - next, parameter);
        next = rank + 1;
    }
    if next < size {
        writer.put_rice(size - next, parameter);
    }
}

/// Reads ranks in a class of `size` groups, increasing and below `size`.
fn take_ranks(
    reader: &mut BitReader,
    parameter: u32,
    size: u32,
    ranks: &mut Vec<u32>,
) -> Option<()> {
    ranks.clear();
    let size = u64::from(size);
    let mut next = 0;
    while next < size {
        let rank = reader.take_rice(parameter)? + next;
        if rank >= size {
            return (rank == size).then_some(());
        }
        ranks.push(rank as u32);
        next = rank + 1;
    }
    Some(())
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
