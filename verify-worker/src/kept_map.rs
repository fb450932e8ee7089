//! [`KeptMap`]: what the lists of a session let each layer read, small enough to look at.

use specattn_engine::HeadLists;

/// Shares of KV entries by layer and part of the context.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct KeptMap {
    /// Tokens of the session, of which the columns are equal parts.
    pub(crate) tokens: usize,
    pub(crate) num_layers: usize,
    pub(crate) columns: usize,
    /// `[num_layers, columns]`: share of the entries that are read, of 255. Empty without lists.
    pub(crate) kept: Vec<u8>,
}

impl KeptMap {
    /// A map without shares.
    pub(crate) fn empty(tokens: usize) -> Self {
        Self {
            tokens,
            ..Self::default()
        }
    }

    /// The map of a session of `tokens` tokens in so many columns, at most one a token.
    pub(crate) fn of(lists: &HeadLists, num_layers: usize, tokens: usize, columns: usize) -> Self {
        let columns = columns.min(tokens);
        let heads = lists.of_head.len() / num_layers.max(1);
        // Before the first mask there are lists, and nothing in them.
        let masked = lists.lists.iter().any(|list| !list.is_empty());
        if columns == 0 || heads == 0 || !masked {
            return Self::empty(tokens);
        }
        let column = |position: usize| position * columns / tokens;
        // Heads share lists: each is counted once.
        let counts: Vec<Vec<u32>> = lists
            .lists
            .iter()
            .map(|list| {
                let mut count = vec![0; columns];
                for position in list {
                    count[column(position).min(columns - 1)] += 1;
                }
                count
            })
            .collect();
        let mut width = vec![0_u32; columns];
        (0..tokens).for_each(|position| width[column(position)] += 1);
        let mut kept = Vec::with_capacity(num_layers * columns);
        for layer in lists.of_head.chunks_exact(heads).take(num_layers) {
            for (column, &width) in width.iter().enumerate() {
                let read: u32 = layer.iter().map(|&l| counts[l as usize][column]).sum();
                let whole = width * heads as u32;
                // At most 255: a list names a position once.
                kept.push((u64::from(read) * 255 / u64::from(whole)).min(255) as u8);
            }
        }
        Self {
            tokens,
            num_layers,
            columns,
            kept,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_counted_by_layer_and_column() {
        let lists = HeadLists {
            lists: [&[0, 1, 2, 3, 9][..], &[0]]
                .map(|list| list.iter().copied().collect())
                .to_vec(),
            of_head: vec![0, 0, 0, 1],
        };
        let map = KeptMap::of(&lists, 2, 10, 2);
        // Columns of five: the first layer reads four and one by both heads, the second half of that and one more.
        assert_eq!(map.kept, [204, 51, 127, 25]);
        assert_eq!((map.num_layers, map.columns), (2, 2));
        // Never more columns than tokens.
        assert_eq!(KeptMap::of(&lists, 2, 10, 256).columns, 10);
        assert_eq!(
            KeptMap::of(&HeadLists::default(), 2, 10, 4),
            KeptMap::empty(10)
        );
    }
}
