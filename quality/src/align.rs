//! [`align`]: from calibration text to a layer map.
//!
//! Three kinds of map, from the paper's to the one that serves best:
//!
//! | kind | source of a KV head |
//! | --- | --- |
//! | [`MapKind::Layer`] | the mean of the heads of one draft layer, the same for a whole target layer, in order of depth |
//! | [`MapKind::Head`] | the nearest of all draft layers' means and all single draft heads |
//! | [`MapKind::Mixture`] | a mixture of draft heads, shared by the KV heads of a cluster |

use specattn_engine::Model;
use specattn_mask::alignment::{CalibrationText, ModelIdentity};
use specattn_mask::{Calibration, LayerMap, MemoryRule, PairShape, Source, Term};

use crate::cluster::{Clusters, cluster};
use crate::divergence::Metric;
use crate::error::QualityError;
use crate::layer_alignment::monotone_map;
use crate::mixture;
use crate::recording::{Recording, Sampling, record};
use crate::text::Book;

/// Shares of a mixture below this are dropped: they move nothing and cost a row to mix.
const LEAST_WEIGHT: f32 = 0.01;

/// How sources are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MapKind {
    /// One draft layer per target layer, in order: the paper's.
    Layer,
    /// The best single layer or head per KV head.
    Head,
    /// Mixtures of heads by expectation-maximisation, clustered.
    #[default]
    Mixture,
}

/// How to calibrate.
#[derive(Debug, Clone)]
pub struct AlignOptions {
    /// How sources are chosen.
    pub kind: MapKind,
    /// Most sources in use, for [`MapKind::Mixture`].
    pub max_sources: usize,
    /// By which distance layers and heads are matched, and what the map reports.
    pub metric: Metric,
    /// Tokens per window of text.
    pub context: usize,
    /// Windows per text file.
    pub windows: usize,
    /// Rows recorded per window.
    pub rows: usize,
    /// How the target's own memory adds to mixtures; `None`: not at all.
    pub memory: Option<Remember>,
    /// Of mixtures: the share by which a round's mean row is spread; `None`: unions of the steps' own selections.
    pub spread: Option<f32>,
    /// Of each source, in order: log-odds above those of the session's p, found by evaluating. Empty: none.
    pub p_offsets: Vec<f32>,
}

/// A memory rule that is the same for every KV head.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Remember {
    /// What a round leaves of the scores before it, in `[0, 1)`.
    pub decay: f32,
    /// Log-odds above those of the session's p.
    pub p_offset: f32,
}

impl Default for Remember {
    fn default() -> Self {
        Self {
            decay: 0.8,
            p_offset: 1.5,
        }
    }
}

impl Default for AlignOptions {
    fn default() -> Self {
        Self {
            kind: MapKind::default(),
            max_sources: 6,
            metric: Metric::default(),
            context: 8_192,
            windows: 1,
            rows: 96,
            memory: Some(Remember::default()),
            spread: Some(0.5),
            p_offsets: Vec::new(),
        }
    }
}

impl AlignOptions {
    fn validate(&self) -> Result<(), QualityError> {
        let checks = [
            (self.max_sources, "sources"),
            (self.windows, "windows"),
            (self.rows, "rows"),
        ];
        if let Some((_, what)) = checks.into_iter().find(|(n, _)| *n == 0) {
            return Err(QualityError::InvalidOption {
                what,
                reason: "at least 1".to_owned(),
            });
        }
        if self.context < 2 * self.rows {
            return Err(QualityError::InvalidOption {
                what: "context",
                reason: format!("{} tokens are too few for {} rows", self.context, self.rows),
            });
        }
        Ok(())
    }
}

/// Records both models on windows of `books` and fits a layer map. `progress` hears (tokens done, tokens in all) of
/// the recording, which is nearly all of the time.
///
/// # Errors
/// [`QualityError`] for options out of range, books that are too short, and models that fail.
pub fn align(
    target: &mut Model,
    draft: &mut Model,
    books: &[Book],
    options: &AlignOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<LayerMap, QualityError> {
    options.validate()?;
    let mut windows = Vec::new();
    for book in books {
        windows.extend(book.windows(options.context, options.windows)?);
    }
    // Rows from a sixteenth of the window on: shorter contexts have little to mask.
    let first = options.context / 16;
    let sampling = Sampling {
        first,
        stride: ((options.context - first) / options.rows).max(1),
    };
    let recording = record(target, draft, &windows, sampling, progress)?;
    let mut map = fit_map(&recording, options);
    let calibration = Calibration {
        target: identity(target, recording.pair.target_kv_heads),
        draft: identity(draft, recording.pair.draft_heads),
        text: CalibrationText {
            files: books.iter().map(Book::text_file).collect(),
            tokens: windows.iter().map(|w| w.len() as u64).sum(),
        },
        metric: options.metric.description().to_owned(),
        divergences: divergences(&recording, &map, options.metric),
    };
    if !options.p_offsets.is_empty() {
        if options.p_offsets.len() != map.sources.len() {
            return Err(QualityError::InvalidOption {
                what: "offsets of p",
                reason: format!(
                    "{} for {} sources",
                    options.p_offsets.len(),
                    map.sources.len()
                ),
            });
        }
        for (source, &offset) in map.sources.iter_mut().zip(&options.p_offsets) {
            source.p_offset = offset;
        }
    }
    for source in &mut map.sources {
        source.spread = options.spread;
    }
    map.memory = options.memory.map(|rule| MemoryRule {
        decay: rule.decay,
        p_offset: map
            .of_head
            .iter()
            .map(|heads| vec![rule.p_offset; heads.len()])
            .collect(),
    });
    map.calibration = Some(calibration);
    map.validate(&recording.pair)?;
    Ok(map)
}

fn identity(model: &Model, heads: u32) -> ModelIdentity {
    ModelIdentity {
        checkpoint_hash: model.config().checkpoint_hash.clone(),
        layers: model.config().num_layers as u32,
        heads,
    }
}

/// The map of the wanted kind for recorded rows, not yet calibrated in name.
pub fn fit_map(recording: &Recording, options: &AlignOptions) -> LayerMap {
    let pair = &recording.pair;
    let clusters = match options.kind {
        MapKind::Layer => by_layer(recording, options.metric),
        MapKind::Head => by_head(recording, options.metric),
        MapKind::Mixture => {
            let heads = 0..recording.target_heads();
            let own: Vec<Vec<f32>> = heads.map(|h| mixture::fit(recording, &[h])).collect();
            cluster(recording, &own, options.max_sources, LEAST_WEIGHT)
        }
    };
    to_map(&clusters, pair)
}

/// Weights of the mean of each draft layer's heads.
fn layer_means(pair: &PairShape) -> Vec<Vec<f32>> {
    let (layers, heads) = (pair.draft_layers as usize, pair.draft_heads as usize);
    (0..layers)
        .map(|layer| {
            let mut weights = vec![0.0; layers * heads];
            weights[layer * heads..(layer + 1) * heads].fill(1.0 / heads as f32);
            weights
        })
        .collect()
}

fn by_layer(recording: &Recording, metric: Metric) -> Clusters {
    let pair = &recording.pair;
    let candidates = layer_means(pair);
    let distances = distances(recording, &candidates, metric);
    let kv_heads = pair.target_kv_heads as usize;
    let cost: Vec<Vec<f64>> = distances
        .chunks(kv_heads)
        .map(|heads| {
            (0..candidates.len())
                .map(|c| heads.iter().map(|head| head[c]).sum())
                .collect()
        })
        .collect();
    let of_layer = monotone_map(&cost);
    let of_head = (0..recording.target_heads()).map(|h| of_layer[h / kv_heads]);
    Clusters::of_used(candidates, of_head.collect())
}

fn by_head(recording: &Recording, metric: Metric) -> Clusters {
    let heads = recording.draft_heads();
    let mut candidates = layer_means(&recording.pair);
    candidates.extend((0..heads).map(|head| {
        let mut weights = vec![0.0; heads];
        weights[head] = 1.0;
        weights
    }));
    let of_head = distances(recording, &candidates, metric)
        .iter()
        .map(|row| {
            let best = (0..row.len()).min_by(|&a, &b| row[a].total_cmp(&row[b]));
            best.unwrap_or(0)
        })
        .collect();
    Clusters::of_used(candidates, of_head)
}

/// `[target heads][candidates]`: mean distance over samples.
fn distances(recording: &Recording, candidates: &[Vec<f32>], metric: Metric) -> Vec<Vec<f64>> {
    let heads = recording.target_heads();
    let mut sums = vec![vec![0.0; candidates.len()]; heads];
    let mut mixed = Vec::new();
    for sample in &recording.samples {
        for (c, weights) in candidates.iter().enumerate() {
            mixture::mix(weights, &sample.draft, sample.len, &mut mixed);
            for (head, sums) in sums.iter_mut().enumerate() {
                sums[c] += metric.distance(sample.target_row(head), &mixed);
            }
        }
    }
    let samples = recording.samples.len().max(1) as f64;
    for sum in sums.iter_mut().flatten() {
        *sum /= samples;
    }
    sums
}

/// `[target layers][KV heads]`: each head's distance from its source.
fn divergences(recording: &Recording, map: &LayerMap, metric: Metric) -> Vec<Vec<f32>> {
    let heads = recording.pair.draft_heads as usize;
    let candidates: Vec<Vec<f32>> = map
        .sources
        .iter()
        .map(|source| {
            let mut weights = vec![0.0; recording.draft_heads()];
            for term in &source.terms {
                weights[term.layer as usize * heads + term.head as usize] = term.weight;
            }
            weights
        })
        .collect();
    let distances = distances(recording, &candidates, metric);
    let of_head = map.of_head.iter().flatten();
    let flat: Vec<f32> = of_head
        .zip(&distances)
        .map(|(&source, row)| row[source as usize] as f32)
        .collect();
    let kv_heads = recording.pair.target_kv_heads as usize;
    flat.chunks(kv_heads).map(<[f32]>::to_vec).collect()
}

fn to_map(clusters: &Clusters, pair: &PairShape) -> LayerMap {
    let heads = pair.draft_heads as usize;
    let source = |weights: &Vec<f32>| Source {
        p_offset: 0.0,
        spread: None,
        terms: weights
            .iter()
            .enumerate()
            .filter(|(_, weight)| **weight > 0.0)
            .map(|(index, &weight)| Term {
                layer: (index / heads) as u32,
                head: (index % heads) as u32,
                weight,
            })
            .collect(),
    };
    LayerMap {
        sources: clusters.weights.iter().map(source).collect(),
        of_head: clusters
            .of_head
            .chunks(pair.target_kv_heads as usize)
            .map(|layer| layer.iter().map(|&s| s as u32).collect())
            .collect(),
        ..LayerMap::default()
    }
}
