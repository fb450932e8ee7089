//! [`LayerMap`]: which source each KV head of the target takes its selection from.
//!
//! A map comes from `alignment.json` beside the target ([`crate::alignment`]) or, where there is none, from
//! proportional depth. Either way it lists only sources in use, since each costs wire bytes.

use crate::alignment::Calibration;
use crate::error::MaskError;
use crate::memory::MemoryRule;
use crate::source::{Source, layers_in_use};

/// Most sources in use.
pub const MAX_SOURCES: usize = 256;

/// What a map must fit: the target's layers and KV heads, the draft's layers and query heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PairShape {
    /// Target layers.
    pub target_layers: u32,
    /// Target KV heads per layer.
    pub target_kv_heads: u32,
    /// Draft layers.
    pub draft_layers: u32,
    /// Draft query heads per layer.
    pub draft_heads: u32,
}

/// Sources in use, and who uses them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LayerMap {
    /// Sources in the order of the mask codec; each is used by some KV head.
    pub sources: Vec<Source>,
    /// `[target_layers][target_kv_heads]`: index into `sources`.
    pub of_head: Vec<Vec<u32>>,
    /// How the target's own memory adds to the selections; `None`: not at all.
    pub memory: Option<MemoryRule>,
    /// Where the map comes from; `None`: proportional depth.
    pub calibration: Option<Calibration>,
}

impl LayerMap {
    /// The map without calibration: target layer `l` of `L` takes the mean of the heads of the draft layer at the same
    /// proportional depth, `floor((l + 1/2) · D / L)` of `D`.
    pub fn proportional(
        target_layers: u32,
        kv_heads: u32,
        draft_layers: u32,
        draft_heads: u32,
    ) -> Self {
        let mut sources: Vec<Source> = Vec::new();
        let mut of_head = Vec::new();
        let mut last = None;
        for layer in 0..u64::from(target_layers) {
            let depth = (2 * layer + 1) * u64::from(draft_layers) / (2 * u64::from(target_layers));
            if last != Some(depth) {
                sources.push(Source::layer_mean(depth as u32, draft_heads));
                last = Some(depth);
            }
            of_head.push(vec![sources.len() as u32 - 1; kv_heads as usize]);
        }
        Self {
            sources,
            of_head,
            memory: None,
            calibration: None,
        }
    }

    /// The source of KV head `kv_head` of target layer `layer`, or `None` outside the map.
    pub fn source_of(&self, layer: usize, kv_head: usize) -> Option<usize> {
        Some(*self.of_head.get(layer)?.get(kv_head)? as usize)
    }

    /// The draft layers whose attention rows the sources need, increasing.
    pub fn draft_layers(&self) -> Vec<usize> {
        layers_in_use(&self.sources)
    }

    /// Checks that the map fits a pair of models.
    ///
    /// # Errors
    /// [`MaskError::InvalidMap`] for a wrong shape, a source out of range or unused, too many sources, a a memory rule
    /// out of range; [`MaskError::InvalidSource`] for a source that is no mixture of the draft's heads.
    pub fn validate(&self, pair: &PairShape) -> Result<(), MaskError> {
        if self.sources.len() > MAX_SOURCES {
            let found = self.sources.len();
            return invalid(format!("{found} sources, at most {MAX_SOURCES} are taken"));
        }
        for source in &self.sources {
            source.validate(pair.draft_layers, pair.draft_heads)?;
        }
        check_shape("of_head", &self.of_head, pair)?;
        let mut used = vec![false; self.sources.len()];
        for &source in self.of_head.iter().flatten() {
            match used.get_mut(source as usize) {
                Some(used) => *used = true,
                None => return invalid(format!("there is no source {source}")),
            }
        }
        if let Some(unused) = used.iter().position(|used| !used) {
            return invalid(format!("source {unused} is not used"));
        }
        if let Some(memory) = &self.memory {
            check_shape("memory.p_offset", &memory.p_offset, pair)?;
            if !(0.0..1.0).contains(&memory.decay) {
                return invalid(format!("decay {} is not in [0, 1)", memory.decay));
            }
            let mut offsets = memory.p_offset.iter().flatten();
            if let Some(offset) = offsets.find(|x| !x.is_finite()) {
                return invalid(format!("offset {offset} is not finite"));
            }
        }
        if let Some(calibration) = &self.calibration {
            calibration.validate(pair)?;
        }
        Ok(())
    }
}

/// Checks that `table` is `[target_layers][target_kv_heads]`.
pub(crate) fn check_shape<T>(
    name: &str,
    table: &[Vec<T>],
    pair: &PairShape,
) -> Result<(), MaskError> {
    let (layers, heads) = (pair.target_layers as usize, pair.target_kv_heads as usize);
    if table.len() != layers || table.iter().any(|row| row.len() != heads) {
        return invalid(format!("{name} is not [{layers}][{heads}]"));
    }
    Ok(())
}

/// An [`MaskError::InvalidMap`].
pub(crate) fn invalid<T>(reason: String) -> Result<T, MaskError> {
    Err(MaskError::InvalidMap(reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAIR: PairShape = PairShape {
        target_layers: 8,
        target_kv_heads: 2,
        draft_layers: 3,
        draft_heads: 3,
    };

    #[test]
    fn proportional_depth_spreads_the_draft_over_the_target() {
        let map = LayerMap::proportional(8, 2, 3, 3);
        let layers: Vec<usize> = (0..8).map(|l| map.source_of(l, 1).unwrap()).collect();
        assert_eq!(layers, [0, 0, 0, 1, 1, 2, 2, 2]);
        assert_eq!(map.draft_layers(), [0, 1, 2]);
        assert!(map.validate(&PAIR).is_ok());
    }

    #[test]
    fn proportional_depth_lists_only_sources_in_use() {
        let map = LayerMap::proportional(2, 1, 8, 4);
        assert_eq!(map.sources.len(), 2);
        assert_eq!(map.draft_layers(), [2, 6]);
        let one = LayerMap::proportional(1, 1, 1, 1);
        assert_eq!(one.source_of(0, 0), Some(0));
        assert_eq!(one.source_of(1, 0), None);
    }

    fn memory(decay: f32, offset: f32, layers: usize) -> MemoryRule {
        MemoryRule {
            decay,
            p_offset: vec![vec![offset; 2]; layers],
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let ok = LayerMap::proportional(8, 2, 3, 3);
        let with = |change: fn(&mut LayerMap)| {
            let mut map = ok.clone();
            change(&mut map);
            map
        };
        let bad = [
            with(|m| m.of_head.truncate(7)),
            with(|m| m.of_head[3].push(0)),
            with(|m| m.of_head[3][0] = 3),
            with(|m| m.sources.push(Source::layer_mean(0, 3))),
            with(|m| m.sources = vec![Source::layer_mean(0, 3); 257]),
            with(|m| m.memory = Some(memory(0.5, 0.0, 7))),
            with(|m| m.memory = Some(memory(1.0, 0.0, 8))),
            with(|m| m.memory = Some(memory(0.5, f32::NAN, 8))),
        ];
        for map in bad {
            assert_eq!(map.validate(&PAIR).unwrap_err().label(), "invalid_map");
        }
        let foreign = with(|m| m.sources[0] = Source::layer_mean(5, 3));
        assert_eq!(
            foreign.validate(&PAIR).unwrap_err().label(),
            "invalid_source"
        );
    }
}
