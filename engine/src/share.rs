//! [`Share`]: which part of a model one rank of a tensor-parallel group holds.
//!
//! Query heads, KV heads, the MLP's inner width and the vocabulary are cut into equal runs, one per rank (Shoeybi et al. 2019,
//! Megatron-LM, section 3). Projections into them are cut by output rows, projections out of them by input columns, so that
//! ranks meet twice per layer: to add up what attention and what the MLP give to the residual stream. The KV cache is cut
//! with its heads; block tables are the same on every rank. Norms and the embedding table are whole everywhere: rows of the
//! table are looked up, not multiplied with, so that cutting it would spare memory alone and cost a third meeting.

use std::ops::Range;

use crate::attention::{HeadLists, SpanLists};
use crate::backend::AttentionShape;
use crate::config::ModelConfig;
use crate::error::EngineError;

/// Which part of a weight to take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cut {
    /// All of it.
    Whole,
    /// These rows of a matrix, or these elements of a vector.
    Rows(Range<usize>),
    /// These columns of a matrix.
    Columns(Range<usize>),
}

impl Cut {
    /// The rows and columns that it takes of a matrix.
    pub(crate) fn of(&self, (rows, columns): (usize, usize)) -> (Range<usize>, Range<usize>) {
        match self {
            Self::Whole => (0..rows, 0..columns),
            Self::Rows(own) => (own.clone(), 0..columns),
            Self::Columns(own) => (0..rows, own.clone()),
        }
    }
}

/// One rank's part of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Share {
    rank: usize,
    of: usize,
}

impl Share {
    /// The shares of a model split over `of` ranks.
    ///
    /// # Errors
    /// [`EngineError::InvalidArgument`] naming the first size that does not divide.
    pub(crate) fn all(of: usize, config: &ModelConfig) -> Result<Vec<Self>, EngineError> {
        let sizes = [
            ("KV heads", config.num_kv_heads),
            ("query heads", config.num_heads),
            ("intermediate size", config.intermediate_size),
            ("vocabulary", config.vocab_size),
        ];
        let uneven = sizes.iter().find(|(_, n)| of == 0 || n % of != 0);
        if let Some((name, size)) = uneven {
            let reason = format!("{name} of {}: {size} does not divide by {of}", config.name);
            return Err(EngineError::InvalidArgument {
                what: "tensor parallelism",
                reason,
            });
        }
        Ok((0..of).map(|rank| Self { rank, of }).collect())
    }

    /// Whether this is all there is.
    pub(crate) fn is_whole(self) -> bool {
        self.of == 1
    }

    /// Whether this rank brings what a sum over the ranks holds once: the residual stream and biases.
    pub(crate) fn is_first(self) -> bool {
        self.rank == 0
    }

    /// This rank's run of `size` things.
    pub(crate) fn range(self, size: usize) -> Range<usize> {
        let part = size / self.of;
        self.rank * part..(self.rank + 1) * part
    }

    /// This rank's part of `size` rows.
    pub(crate) fn rows(self, size: usize) -> Cut {
        if self.is_whole() {
            Cut::Whole
        } else {
            Cut::Rows(self.range(size))
        }
    }

    /// This rank's part of `size` columns.
    pub(crate) fn columns(self, size: usize) -> Cut {
        if self.is_whole() {
            Cut::Whole
        } else {
            Cut::Columns(self.range(size))
        }
    }

    /// The shape of attention on this rank.
    pub(crate) fn attention(self, config: &ModelConfig) -> AttentionShape {
        AttentionShape {
            num_heads: config.num_heads / self.of,
            num_kv_heads: config.num_kv_heads / self.of,
            head_dim: config.head_dim,
        }
    }

    /// What this rank's KV heads read of `lists`, which are the whole model's.
    pub(crate) fn lists<'a>(self, lists: &'a HeadLists, config: &ModelConfig) -> SpanLists<'a> {
        if self.is_whole() {
            return SpanLists::from(lists);
        }
        let own = self.range(config.num_kv_heads);
        let layers = lists.of_head.chunks_exact(config.num_kv_heads);
        SpanLists::of_heads(lists, layers.flat_map(|heads| &heads[own.clone()]))
    }
}

#[cfg(test)]
mod tests {
    use specattn_positions::PositionSet;

    use super::*;
    use crate::scripted::ScriptedShape;

    fn config() -> ModelConfig {
        let shape = ScriptedShape {
            vocab_size: 96,
            max_context: 64,
            kv_blocks: 1,
        };
        ModelConfig {
            num_layers: 2,
            num_heads: 8,
            num_kv_heads: 4,
            intermediate_size: 40,
            ..shape.config()
        }
    }

    #[test]
    fn what_does_not_divide_is_named() {
        let refused = |of, config: &ModelConfig| Share::all(of, config).unwrap_err().to_string();
        assert!(refused(3, &config()).contains("KV heads"));
        assert!(refused(0, &config()).contains("KV heads"));
        let narrow = ModelConfig {
            intermediate_size: 42,
            ..config()
        };
        assert!(refused(4, &narrow).contains("intermediate size of scripted: 42"));
        let odd = ModelConfig {
            vocab_size: 97,
            ..config()
        };
        assert!(refused(2, &odd).contains("vocabulary"));
        assert!(Share::all(1, &odd).unwrap()[0].is_whole());
    }

    fn sets(lists: &[&[usize]]) -> Vec<PositionSet> {
        let set = |list: &&[usize]| list.iter().copied().collect();
        lists.iter().map(set).collect()
    }

    #[test]
    fn ranks_see_the_lists_of_their_own_heads() {
        let lists = HeadLists {
            lists: sets(&[&[1], &[2, 3], &[]]),
            of_head: vec![0, 0, 1, 2, 2, 1, 1, 0],
        };
        let shares = Share::all(2, &config()).unwrap();
        let read = |share: Share, head: usize| {
            share.lists(&lists, &config()).of(head).positions().to_vec()
        };
        let of_rank = |share| (0..4).map(|head| read(share, head)).collect::<Vec<_>>();
        assert_eq!(of_rank(shares[0]), [vec![1], vec![1], vec![], vec![2, 3]]);
        assert_eq!(
            of_rank(shares[1]),
            [vec![2, 3], vec![], vec![2, 3], vec![1]]
        );
        assert_eq!(shares[0].lists(&lists, &config()).lists().len(), 3);
        let alone = HeadLists {
            lists: sets(&[&[7], &[8]]),
            of_head: vec![0, 0, 1, 1, 0, 0, 1, 1],
        };
        let own = shares[1].lists(&alone, &config());
        assert_eq!(own.lists().len(), 1);
        assert_eq!(own.of(0).positions(), [8]);
    }
}
