//! Methods that look at the target's own queries and keys: Quest, the oracle, and the oracle a round late.

use specattn_engine::{KeyChooser, LayerKeys};
use specattn_mask::{MaskPolicy, PositionSet, read_list, select_top_p};

use crate::error::QualityError;
use crate::eval::method::{Choice, Masker};

/// A chooser as a method: it needs no start and keeps no state between rounds.
#[derive(Debug)]
pub struct ByKeys<C>(pub C);

impl<C: KeyChooser> Masker for ByKeys<C> {
    fn choose(&mut self, _base: usize) -> Result<Choice<'_>, QualityError> {
        Ok(Choice::ByKeys(&mut self.0))
    }
}

/// The target's own top-p: exact attention of the round's rows over the cached positions, their mean over rows and the
/// query heads that share a KV head, then the top-p set of that, with the policy's sinks and window.
///
/// The best that a mask could know; p covers the cached positions, without the round's own.
#[derive(Debug, Clone, Copy)]
pub struct Oracle {
    /// p, sinks and window.
    pub policy: MaskPolicy,
}

impl KeyChooser for Oracle {
    fn choose(&mut self, _layer: usize, layer: &LayerKeys<'_>) -> Vec<PositionSet> {
        let of_head = |kv_head| read_by_mass(&attention(layer, kv_head), &self.policy);
        (0..layer.num_kv_heads).map(of_head).collect()
    }
}

/// The previous round's attention: what [`Oracle`] would have chosen a round ago. The first round reads everything.
///
/// A little more than a served target can know, whose last round weighed only what it had read.
#[derive(Debug, Clone)]
pub struct Previous {
    /// p, sinks and window.
    pub policy: MaskPolicy,
    /// `[layers][KV heads][cached positions]` of the round before.
    pub last: Vec<Vec<Vec<f32>>>,
}

impl KeyChooser for Previous {
    fn choose(&mut self, index: usize, layer: &LayerKeys<'_>) -> Vec<PositionSet> {
        let now = (0..layer.num_kv_heads).map(|kv_head| attention(layer, kv_head));
        let now: Vec<Vec<f32>> = now.collect();
        if self.last.len() <= index {
            let all: PositionSet = (0..now[0].len()).collect();
            self.last.push(now);
            return vec![all; layer.num_kv_heads];
        }
        let before = std::mem::replace(&mut self.last[index], now);
        let lists = before.into_iter().zip(&self.last[index]);
        lists
            .map(|(mut before, now)| {
                // What was appended since is read: no round has weighed it.
                before.resize(now.len(), 1.0);
                read_by_mass(&before, &self.policy)
            })
            .collect()
    }
}

/// The top-p set of a row over the cached positions, with the policy's sinks and window.
fn read_by_mass(row: &[f32], policy: &MaskPolicy) -> PositionSet {
    let mut selection = PositionSet::new(row.len());
    select_top_p(row, policy.p, &mut selection);
    read_list(selection, policy, row.len() + 1)
}

/// What a KV head attends to: the sum over the step's rows and the query heads that share it, of the cached positions.
fn attention(layer: &LayerKeys<'_>, kv_head: usize) -> Vec<f32> {
    let cached = layer.keys.len() / (layer.num_kv_heads * layer.width);
    let mut weights = vec![0.0f32; cached];
    let mut total = vec![0.0f32; cached];
    let keys = &layer.keys[kv_head * cached * layer.width..][..cached * layer.width];
    for q in queries_of(layer, kv_head) {
        for (weight, key) in weights.iter_mut().zip(keys.chunks_exact(layer.width)) {
            *weight = dot(q, key);
        }
        let top = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0;
        for weight in &mut weights {
            *weight = (*weight - top).exp();
            sum += *weight;
        }
        for (total, weight) in total.iter_mut().zip(&weights) {
            *total += weight / sum;
        }
    }
    total
}

/// Positions per page of [`Quest`], as its authors use.
const PAGE: usize = 16;

/// Quest (Tang et al. 2024): pages of 16 positions, ranked by the largest score that any key within the page's
/// element-wise bounds could have. A KV head's score of a page is the largest over the round's rows and its query heads;
/// sinks and window are read besides, within the same budget.
#[derive(Debug, Clone, Copy)]
pub struct Quest {
    /// Share of the cached positions that is read.
    pub budget: f64,
    /// Sinks and window; p is not looked at.
    pub policy: MaskPolicy,
}

impl KeyChooser for Quest {
    fn choose(&mut self, _layer: usize, layer: &LayerKeys<'_>) -> Vec<PositionSet> {
        let cached = layer.keys.len() / (layer.num_kv_heads * layer.width);
        let room = (cached as f64 * self.budget) as usize;
        (0..layer.num_kv_heads)
            .map(|kv_head| {
                let keys = &layer.keys[kv_head * cached * layer.width..][..cached * layer.width];
                let mut pages: Vec<(f32, usize)> = keys
                    .chunks(PAGE * layer.width)
                    .enumerate()
                    .map(|(page, keys)| (bound(layer, kv_head, keys), page))
                    .collect();
                pages.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
                let mut selection = PositionSet::new(cached);
                let mut list = read_list(selection.clone(), &self.policy, cached + 1);
                for (_, page) in pages {
                    selection.insert_range(page * PAGE, (page + 1) * PAGE);
                    let wider = read_list(selection.clone(), &self.policy, cached + 1);
                    if wider.count() > room {
                        break;
                    }
                    list = wider;
                }
                list
            })
            .collect()
    }
}

/// The largest score that a key within the bounds of `keys` could have with any of the rows.
fn bound(layer: &LayerKeys<'_>, kv_head: usize, keys: &[f32]) -> f32 {
    let mut low = vec![f32::INFINITY; layer.width];
    let mut high = vec![f32::NEG_INFINITY; layer.width];
    for key in keys.chunks_exact(layer.width) {
        for ((low, high), &x) in low.iter_mut().zip(&mut high).zip(key) {
            *low = low.min(x);
            *high = high.max(x);
        }
    }
    let scores = queries_of(layer, kv_head).map(|q| {
        let bounds = low.iter().zip(&high);
        q.iter()
            .zip(bounds)
            .map(|(&q, (&l, &h))| (q * l).max(q * h))
            .sum::<f32>()
    });
    scores.fold(f32::NEG_INFINITY, f32::max)
}

/// The queries, of all rows, of the heads that share `kv_head`.
fn queries_of<'a>(
    layer: &'a LayerKeys<'_>,
    kv_head: usize,
) -> impl Iterator<Item = &'a [f32]> + use<'a> {
    let group = layer.num_heads / layer.num_kv_heads;
    let (row, width) = (layer.num_heads * layer.width, layer.width);
    layer.q.chunks_exact(row).flat_map(move |row| {
        row[kv_head * group * width..(kv_head + 1) * group * width].chunks_exact(width)
    })
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0.0f32; LANES];
    let (a_vectors, b_vectors) = (a.as_chunks::<LANES>().0, b.as_chunks::<LANES>().0);
    for (a, b) in a_vectors.iter().zip(b_vectors) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum()
}
