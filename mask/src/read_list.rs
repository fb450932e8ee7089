//! Which cached positions a KV head reads in a round.

use crate::policy::MaskPolicy;
use specattn_positions::PositionSet;

/// The positions that a head reads: `selection` ∪ the first `sink_tokens` ∪ the last `window_tokens` of the
/// `committed` tokens, within `[0, committed - 1)`.
///
/// The last committed token is the round's pending input: not cached yet, it is read as one of the round's own inputs
/// and never listed, so a window of `w` lists at most `w - 1` positions.
pub fn read_list(selection: PositionSet, policy: &MaskPolicy, committed: usize) -> PositionSet {
    let cached = committed.saturating_sub(1);
    let mut read = selection;
    read.resize(cached);
    read.insert_range(0, policy.sink_tokens as usize);
    read.insert_range(
        committed.saturating_sub(policy.window_tokens as usize),
        cached,
    );
    read
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn is_the_union_of_its_parts(
            committed in 0usize..400,
            selection_len in 0usize..500,
            members in prop::collection::vec(0usize..500, 0..40),
            (sink_tokens, window_tokens) in (0u32..40, 0u32..500),
        ) {
            let policy = MaskPolicy { sink_tokens, window_tokens, ..MaskPolicy::default() };
            let selection = PositionSet::from_positions(selection_len, members);
            let expected: BTreeSet<usize> = (0..committed.saturating_sub(1))
                .filter(|&p| {
                    selection.contains(p)
                        || p < sink_tokens as usize
                        || p + window_tokens as usize >= committed
                })
                .collect();
            let list = read_list(selection.clone(), &policy, committed);
            prop_assert!(list.iter().eq(expected));
        }
    }
}
