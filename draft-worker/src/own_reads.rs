//! [`OwnReads`]: which KV entries the draft itself reads: all on some steps, its own last selection on the others.
//!
//! A *captured* step is dense and hands out attention rows: for the target's masks, and for the draft's own selection,
//! which holds for each of its KV heads the positions that carry a share p of the head's mass. Steps up to the next
//! captured one read that selection, the sinks, the window as it stood then, and everything since. What the draft reads
//! changes how good its proposals and masks are, never what is committed.

use specattn_engine::{AttentionRows, HeadLists, MixedHead, MixedRow, SelectedRows};
use specattn_mask::{MaskPolicy, PositionSet, read_list, select_top_p};

/// How often the draft reads everything, and how much it reads in between.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OwnPolicy {
    /// At most so many draft steps go by from one captured step to the next, at least 1; 1 captures every step.
    pub capture_every: usize,
    /// Share of a head's attention mass that its selection must reach, in `(0, 1]`.
    pub p: f32,
}

impl Default for OwnPolicy {
    fn default() -> Self {
        Self {
            capture_every: 4,
            p: 0.8,
        }
    }
}

/// The schedule of captured steps and the selection in force, of one session.
#[derive(Debug)]
pub struct OwnReads {
    capture_every: usize,
    num_kv_heads: usize,
    /// Of the draft's own selections; p is the draft's.
    policy: MaskPolicy,
    /// Steps since the last captured one, itself included; `None` before the first.
    age: Option<usize>,
    /// A list for each KV head of each layer. Invariant: of the positions `seen` and above none is in it.
    lists: HeadLists,
    seen: usize,
    /// A KV head's row: kept between captured steps.
    row: Vec<f32>,
}

impl OwnReads {
    /// A schedule for a draft with `num_kv_heads` KV heads per layer, in a session whose masks are made by `masks`: sinks,
    /// window and granularity are the same here.
    pub fn new(policy: OwnPolicy, masks: &MaskPolicy, num_kv_heads: usize) -> Self {
        Self {
            capture_every: policy.capture_every,
            num_kv_heads,
            policy: MaskPolicy {
                p: policy.p,
                ..*masks
            },
            age: None,
            lists: HeadLists::default(),
            seen: 0,
            row: Vec::new(),
        }
    }

    /// Whether the draft ever reads less than everything.
    pub fn is_sparse(&self) -> bool {
        self.capture_every > 1
    }

    /// Whether there is a selection to read by.
    pub fn has_selection(&self) -> bool {
        self.is_sparse() && self.age.is_some()
    }

    /// Whether step `step` of a round of `round_length` is to be captured. A captured step that falls due within a round
    /// is its first: the rest of the round then gains by it, and every mask has a row as fresh as can be.
    pub fn captures(&self, step: usize, round_length: usize) -> bool {
        let ahead = if step == 0 { round_length } else { 1 };
        self.captures_within(ahead)
    }

    /// Whether a captured step falls due within the next `left` steps: whether any of those that are left of a round, whose first
    /// went by, is to be captured.
    pub fn captures_within(&self, left: usize) -> bool {
        self.age.is_none_or(|age| age + left > self.capture_every)
    }

    /// Takes the rows of a captured step, of all layers.
    pub fn captured(&mut self, rows: &AttentionRows) {
        if !self.renew(rows.kv_len, rows.layers.len() * self.num_kv_heads) {
            return;
        }
        let group = rows.num_heads / self.num_kv_heads;
        let mut sums = std::mem::take(&mut self.row);
        // Rows lie as [layers, num_kv_heads, group, kv_len].
        let heads = rows.probs.chunks_exact(group * rows.kv_len);
        for (number, head) in heads.enumerate() {
            sums.clear();
            sums.resize(rows.kv_len, 0.0);
            for row in head.chunks_exact(rows.kv_len) {
                for (sum, &x) in sums.iter_mut().zip(row) {
                    *sum += x;
                }
            }
            let p = self.policy.p;
            self.renew_list(number, |list| {
                select_top_p(&sums, p, list);
            });
        }
        self.row = sums;
    }

    /// Takes a captured step's selections: those of [`OwnReads::mixed_rows`], from row `first` on.
    pub fn selected(&mut self, selected: &SelectedRows, first: usize) {
        let rows = selected.words.len() / selected.words_per_row().max(1);
        if !self.renew(selected.kv_len, rows - first) {
            return;
        }
        for row in first..rows {
            self.renew_list(row - first, |list| {
                list.union_with_words(selected.row(row));
            });
        }
    }

    /// The rows that a device may select from in place of handing them out: the mean of each KV head's query heads.
    pub fn mixed_rows(
        &self,
        num_layers: usize,
        num_heads: usize,
    ) -> impl Iterator<Item = MixedRow> + use<> {
        let layers = if self.is_sparse() { num_layers } else { 0 };
        let (kv_heads, p) = (self.num_kv_heads, self.policy.p);
        let group = num_heads / kv_heads;
        (0..layers * kv_heads).map(move |row| {
            let first = row % kv_heads * group;
            let term = |head| MixedHead {
                layer: (row / kv_heads) as u32,
                head: head as u32,
                weight: 1.0 / group as f32,
            };
            MixedRow {
                terms: (first..first + group).map(term).collect(),
                p,
                spread: None,
            }
        })
    }

    /// Begins new lists, for `heads` KV heads, after a captured step that reached `kv_len`; false where none are kept.
    fn renew(&mut self, kv_len: usize, heads: usize) -> bool {
        self.age = Some(1);
        if !self.is_sparse() {
            return false;
        }
        self.seen = kv_len;
        self.lists.lists.resize_with(heads, PositionSet::default);
        self.lists.of_head.clear();
        self.lists.of_head.extend(0..heads as u32);
        true
    }

    /// Makes a head's list anew, in the memory of the one before: what `select` adds to it, sinks and window.
    fn renew_list(&mut self, head: usize, select: impl FnOnce(&mut PositionSet)) {
        let mut list = std::mem::take(&mut self.lists.lists[head]);
        list.clear();
        list.resize(self.seen);
        select(&mut list);
        list.fill_groups(self.policy.granularity as usize);
        self.lists.lists[head] = read_list(list, &self.policy, self.seen + 1);
    }

    /// A step went by that was not captured.
    pub fn passed(&mut self) {
        self.age = self.age.map(|age| age + 1);
    }

    /// Fits the lists to a cache of `past` positions, after which [`OwnReads::lists`] is what a step reads.
    pub fn fit(&mut self, past: usize) {
        for list in &mut self.lists.lists {
            list.resize(past);
            list.insert_range(self.seen, past);
        }
        self.seen = past;
    }

    /// What each KV head reads of the cache that [`OwnReads::fit`] was told of.
    pub fn lists(&self) -> &HeadLists {
        &self.lists
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MASKS: MaskPolicy = MaskPolicy {
        p: 0.5,
        sink_tokens: 1,
        window_tokens: 3,
        granularity: 1,
    };

    fn own(capture_every: usize) -> OwnReads {
        OwnReads::new(
            OwnPolicy {
                capture_every,
                p: 0.9,
            },
            &MASKS,
            2,
        )
    }

    /// Rows of one layer of four query heads; head h puts its mass on `heavy[h]`.
    fn rows(kv_len: usize, heavy: [usize; 4]) -> AttentionRows {
        let mut probs = vec![0.0; 4 * kv_len];
        for (head, position) in heavy.into_iter().enumerate() {
            probs[head * kv_len + position] = 1.0;
        }
        AttentionRows {
            layers: vec![0],
            num_heads: 4,
            kv_len,
            probs,
        }
    }

    /// Which of `rounds` rounds' steps are captured.
    fn schedule(capture_every: usize, round_length: usize, rounds: usize) -> Vec<Vec<usize>> {
        let mut own = own(capture_every);
        let mut foretold = Vec::new();
        let mut captured = |step: &usize| {
            let now = own.captures(*step, round_length);
            if now {
                own.captured(&rows(9, [1; 4]));
            } else {
                own.passed();
            }
            foretold.push(own.captures_within(round_length - 1 - step));
            now
        };
        let rounds: Vec<Vec<usize>> = (0..rounds)
            .map(|_| (0..round_length).filter(&mut captured).collect())
            .collect();
        let comes = rounds.iter().flat_map(|round| {
            (0..round_length).map(|step| round.iter().any(|&captured| captured > step))
        });
        assert!(comes.eq(foretold));
        rounds
    }

    #[test]
    fn what_falls_due_within_a_round_is_captured_at_its_start() {
        assert_eq!(schedule(1, 2, 2), [[0, 1], [0, 1]]);
        assert_eq!(schedule(2, 4, 2), [[0, 2], [0, 2]]);
        assert_eq!(schedule(4, 4, 3), [[0], [0], [0]]);
        assert_eq!(schedule(7, 4, 3), [[0], [0], [0]]);
        assert_eq!(schedule(8, 4, 4), [vec![0], vec![], vec![0], vec![]]);
        assert_eq!(
            schedule(4, 1, 5),
            [vec![0], vec![], vec![], vec![], vec![0]]
        );
    }

    fn list(own: &OwnReads, head: usize) -> Vec<usize> {
        own.lists().lists[head].iter().collect()
    }

    #[test]
    fn lists_hold_selection_sinks_window_and_all_since() {
        let mut own = own(4);
        own.captured(&rows(20, [5, 7, 9, 9]));
        own.fit(20);
        assert_eq!(own.lists().of_head, [0, 1]);
        assert_eq!(list(&own, 0), [0, 5, 7, 18, 19]);
        assert_eq!(list(&own, 1), [0, 9, 18, 19]);
        own.fit(22);
        assert_eq!(list(&own, 1), [0, 9, 18, 19, 20, 21]);
    }

    #[test]
    fn a_rollback_forgets_and_what_comes_after_is_read() {
        let mut own = own(4);
        own.captured(&rows(20, [5, 7, 9, 9]));
        own.fit(23);
        own.fit(19);
        assert_eq!(list(&own, 1), [0, 9, 18]);
        own.fit(21);
        assert_eq!(list(&own, 1), [0, 9, 18, 19, 20]);
        own.fit(6);
        assert_eq!(list(&own, 0), [0, 5]);
        own.fit(8);
        assert_eq!(list(&own, 0), [0, 5, 6, 7]);
    }
}
