//! Masks on the target's side: which layer map serves a draft, and what its masks let each KV head read.

use std::path::Path;
use std::sync::Arc;

use specattn_engine::{EntryMasses, HeadLists, ModelConfig};
use specattn_mask::memory::shifted_mass;
use specattn_mask::{
    Decoder, HeadMemory, LayerMap, Limits, MaskError, MaskPolicy, PairShape, PositionSet,
    alignment, read_list,
};
use specattn_proto::v1::ModelInfo;
use specattn_proto::{Fault, limits};

/// Most layers a draft may claim to have; bounds the proportional map.
const MAX_DRAFT_LAYERS: u32 = 4_096;

/// The target's layer maps: a calibrated one for the draft it was made with, proportional depth for all others.
#[derive(Debug)]
pub(crate) struct LayerMaps {
    layers: u32,
    kv_heads: u32,
    checkpoint_hash: String,
    calibrated: Option<Arc<LayerMap>>,
}

impl LayerMaps {
    /// The maps of a target; `file` is its alignment file. Without one, the file is looked for in `folder`, where it may
    /// be missing; random weights have no folder.
    ///
    /// # Errors
    /// A [`MaskError`] when the file was named and cannot be used; one that was only found is passed over with a warning.
    pub(crate) fn load(
        config: &ModelConfig,
        file: Option<&Path>,
        folder: Option<&Path>,
    ) -> Result<Self, MaskError> {
        let calibrated = match file {
            Some(path) => Some(LayerMap::load(path)?),
            None => folder.and_then(|folder| found_beside(&folder.join(alignment::FILE_NAME))),
        };
        Ok(Self {
            calibrated: calibrated.map(Arc::new),
            ..Self::proportional(config)
        })
    }

    /// Proportional depth for every draft.
    pub(crate) fn proportional(config: &ModelConfig) -> Self {
        Self {
            layers: config.num_layers as u32,
            kv_heads: config.num_kv_heads as u32,
            checkpoint_hash: config.checkpoint_hash.clone(),
            calibrated: None,
        }
    }

    /// The map for a draft model, which is a stranger's word.
    ///
    /// # Errors
    /// [`Fault::InvalidArgument`] for a model of absurd shape.
    pub(crate) fn for_draft(&self, draft: &ModelInfo) -> Result<Arc<LayerMap>, Fault> {
        let pair = PairShape {
            target_layers: self.layers,
            target_kv_heads: self.kv_heads,
            draft_layers: draft.num_layers,
            draft_heads: draft.num_heads,
        };
        if let Some(map) = self.calibrated_for(draft, &pair) {
            return Ok(map);
        }
        let layers = (1..=MAX_DRAFT_LAYERS).contains(&pair.draft_layers);
        let heads = (1..=limits::MAX_SOURCE_TERMS).contains(&(pair.draft_heads as usize));
        if !layers || !heads {
            return Err(Fault::InvalidArgument(format!(
                "a draft model of {} layers with {} heads is not taken",
                pair.draft_layers, pair.draft_heads
            )));
        }
        let map = LayerMap::proportional(
            pair.target_layers,
            pair.target_kv_heads,
            pair.draft_layers,
            pair.draft_heads,
        );
        map.validate(&pair)
            .map_err(|error| Fault::InvalidArgument(error.to_string()))?;
        Ok(Arc::new(map))
    }

    fn calibrated_for(&self, draft: &ModelInfo, pair: &PairShape) -> Option<Arc<LayerMap>> {
        let map = self.calibrated.as_ref()?;
        let fits = map.validate(pair).and_then(|()| match &map.calibration {
            Some(c) => c.check_checkpoints(&self.checkpoint_hash, &draft.checkpoint_hash),
            None => Ok(()),
        });
        match fits {
            Ok(()) => Some(Arc::clone(map)),
            Err(error) => {
                tracing::warn!(%error, "layer map passed over: proportional depth serves this draft");
                None
            }
        }
    }
}

fn found_beside(path: &Path) -> Option<LayerMap> {
    match LayerMap::load(path) {
        Ok(map) => Some(map),
        Err(MaskError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            tracing::info!(path = %path.display(), "no layer map: proportional depth serves every draft");
            None
        }
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "layer map passed over");
            None
        }
    }
}

/// Decodes one link's masks, in the order in which they were encoded, and expands them to index lists.
#[derive(Debug)]
pub struct MaskReader {
    map: Arc<LayerMap>,
    policy: MaskPolicy,
    decoder: Decoder,
    /// A list for each source; for each KV head where heads remember.
    lists: HeadLists,
    /// One per KV head; none where the map has no memory.
    memory: Vec<Remembering>,
}

/// What a KV head remembers, and how much of it is read again.
#[derive(Debug)]
struct Remembering {
    scores: HeadMemory,
    /// Log-odds above those of the session's p.
    p_offset: f32,
}

/// What a mask came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Masking {
    /// [`MaskReader::lists`] holds what each head reads.
    Ready,
    /// The mask is a delta against one that is not held: the round goes dense and a full mask is asked for.
    MissingBase,
}

impl MaskReader {
    /// A reader for masks over at most `max_context` positions.
    pub fn new(map: Arc<LayerMap>, policy: MaskPolicy, max_context: usize) -> Self {
        let decoder = Decoder::new(Limits {
            max_context,
            max_sources: map.sources.len(),
        });
        let offsets = map.memory.iter().flat_map(|rule| &rule.p_offset).flatten();
        let memory = offsets
            .map(|&p_offset| Remembering {
                scores: HeadMemory::default(),
                p_offset,
            })
            .collect::<Vec<_>>();
        let lists = HeadLists {
            lists: vec![PositionSet::default(); memory.len()],
            of_head: if memory.is_empty() {
                map.of_head.iter().flatten().copied().collect()
            } else {
                (0..memory.len() as u32).collect()
            },
        };
        Self {
            map,
            policy,
            decoder,
            lists,
            memory,
        }
    }

    /// The map in force.
    pub(crate) fn map(&self) -> &LayerMap {
        &self.map
    }

    /// Changes the mass that selections are to reach: the share that is read by memory moves with it.
    pub(crate) fn set_p(&mut self, p: f32) {
        self.policy.p = p;
    }

    /// Decodes the mask of a round that builds on `base` committed tokens.
    ///
    /// # Errors
    /// [`Fault::InvalidArgument`] for bytes that are no mask of this session.
    pub fn read(&mut self, bytes: &[u8], base: usize) -> Result<Masking, Fault> {
        let mask = match self.decoder.decode(bytes) {
            Ok(mask) => mask,
            Err(MaskError::MissingBase) => return Ok(Masking::MissingBase),
            Err(error) => return Err(Fault::InvalidArgument(error.to_string())),
        };
        let expected = (
            base.saturating_sub(1),
            self.policy.granularity,
            self.map.sources.len(),
        );
        let found = (mask.context_len, mask.granularity, mask.sources.len());
        if found != expected {
            return Err(Fault::InvalidArgument(format!(
                "mask of {found:?} (context, granularity, sources) in a round of {expected:?}"
            )));
        }
        if self.memory.is_empty() {
            let read = |set: &PositionSet| read_list(set.clone(), &self.policy, base);
            self.lists.lists = mask.sources.iter().map(read).collect();
            return Ok(Masking::Ready);
        }
        let sources = self.map.of_head.iter().flatten();
        let heads = self.lists.lists.iter_mut().zip(&self.memory);
        for ((list, memory), &source) in heads.zip(sources) {
            let mut selection = mask.sources[source as usize].clone();
            let p = shifted_mass(self.policy.p, memory.p_offset);
            memory.scores.select(p, &mut selection);
            selection.fill_groups(self.policy.granularity as usize);
            *list = read_list(selection, &self.policy, base);
        }
        Ok(Masking::Ready)
    }

    /// What each KV head reads by the last mask that was [`Masking::Ready`].
    pub fn lists(&self) -> &HeadLists {
        &self.lists
    }

    /// Whether the forward of a masked round should say what its entries weighed.
    pub fn wants_masses(&self) -> bool {
        !self.memory.is_empty()
    }

    /// Takes what the entries of [`MaskReader::lists`] weighed in the round.
    pub fn observe(&mut self, masses: &EntryMasses) {
        let Some(rule) = &self.map.memory else { return };
        let heads = self.memory.iter_mut().zip(&self.lists.lists);
        for ((memory, list), masses) in heads.zip(&masses.of_head) {
            memory.scores.observe(list, masses, rule.decay);
        }
    }

    /// Takes what all entries weighed in a dense pass.
    pub fn observe_dense(&mut self, masses: &EntryMasses) {
        let Some(rule) = &self.map.memory else { return };
        for (memory, masses) in self.memory.iter_mut().zip(&masses.of_head) {
            memory.scores.observe(0..masses.len(), masses, rule.decay);
        }
    }
}

#[cfg(test)]
mod tests {
    use specattn_mask::{Encoder, MemoryRule, RoundMask};

    use super::*;

    fn reader() -> MaskReader {
        let map = Arc::new(LayerMap::proportional(4, 2, 2, 3));
        let policy = MaskPolicy {
            sink_tokens: 1,
            window_tokens: 2,
            ..MaskPolicy::default()
        };
        MaskReader::new(map, policy, 100)
    }

    fn mask(context_len: usize, kept: [&[usize]; 2]) -> RoundMask {
        RoundMask {
            context_len,
            granularity: 1,
            sources: kept
                .map(|k| PositionSet::from_positions(context_len, k.iter().copied()))
                .to_vec(),
        }
    }

    #[test]
    fn masks_become_lists_by_the_layer_map() {
        let (mut reader, mut encoder) = (reader(), Encoder::new());
        let bytes = encoder.encode(&mask(9, [&[3, 4], &[]]));
        assert_eq!(reader.read(&bytes, 10), Ok(Masking::Ready));
        assert_eq!(of_layers(&reader, [0, 2]), [vec![0, 3, 4, 8], vec![0, 8]]);
        let delta = encoder.encode(&mask(12, [&[5], &[6]]));
        assert_eq!(reader.read(&delta, 13), Ok(Masking::Ready));
        assert_eq!(of_layers(&reader, [1, 3]), [vec![0, 5, 11], vec![0, 6, 11]]);
    }

    /// The lists of two layers, the same for both of their heads.
    fn of_layers(reader: &MaskReader, layers: [usize; 2]) -> [Vec<usize>; 2] {
        layers.map(|layer| {
            let of_head = |head: usize| {
                let index = reader.lists().of_head[2 * layer + head] as usize;
                reader.lists().lists[index].iter().collect::<Vec<_>>()
            };
            assert_eq!(of_head(0), of_head(1));
            of_head(0)
        })
    }

    /// The list of a KV head of a map whose heads remember.
    fn of_head(reader: &MaskReader, head: usize) -> Vec<usize> {
        reader.lists().lists[head].iter().collect()
    }

    #[test]
    fn what_a_head_found_heavy_is_read_again() {
        let mut map = LayerMap::proportional(4, 2, 2, 3);
        map.memory = Some(MemoryRule {
            decay: 0.5,
            p_offset: vec![vec![0.0; 2]; 4],
        });
        let policy = MaskPolicy {
            sink_tokens: 1,
            window_tokens: 2,
            ..MaskPolicy::default()
        };
        let mut reader = MaskReader::new(Arc::new(map), policy, 100);
        assert!(reader.wants_masses());
        let mut encoder = Encoder::new();
        let bytes = encoder.encode(&mask(9, [&[3, 4], &[]]));
        assert_eq!(reader.read(&bytes, 10), Ok(Masking::Ready));
        // Only the first head of the first layer, which read 0, 3, 4 and 8, found anything heavy.
        let mut masses = EntryMasses {
            of_head: reader
                .lists()
                .lists
                .iter()
                .map(|l| vec![0.0; l.count()])
                .collect(),
        };
        masses.of_head[0] = vec![0.01, 0.9, 0.0, 0.0];
        reader.observe(&masses);
        let bytes = encoder.encode(&mask(12, [&[5], &[]]));
        assert_eq!(reader.read(&bytes, 13), Ok(Masking::Ready));
        assert_eq!(of_head(&reader, 0), [0, 3, 5, 11]);
        assert_eq!(of_head(&reader, 1), [0, 5, 11]);
        // A dense pass over 14 entries finds what no mask has named.
        let mut masses = EntryMasses {
            of_head: vec![vec![0.0; 14]; 8],
        };
        masses.of_head[1][7] = 0.8;
        reader.observe_dense(&masses);
        let bytes = encoder.encode(&mask(15, [&[5], &[]]));
        assert_eq!(reader.read(&bytes, 16), Ok(Masking::Ready));
        assert_eq!(of_head(&reader, 1), [0, 5, 7, 14]);
    }

    #[test]
    fn a_lost_base_is_no_fault_but_another_round_is() {
        let (mut reader, mut encoder) = (reader(), Encoder::new());
        let full = encoder.encode(&mask(9, [&[], &[]]));
        let delta = encoder.encode(&mask(10, [&[1], &[]]));
        assert_eq!(reader.read(&delta, 11), Ok(Masking::MissingBase));
        for base in [0, 1, 9, 11, usize::MAX] {
            assert_eq!(
                reader.read(&full, base).unwrap_err().label(),
                "invalid_argument"
            );
        }
        assert!(reader.read(b"no mask", 10).is_err());
    }

    #[test]
    fn absurd_drafts_get_no_map() {
        let maps = LayerMaps {
            layers: 4,
            kv_heads: 2,
            checkpoint_hash: String::new(),
            calibrated: None,
        };
        let draft = |num_layers, num_heads| ModelInfo {
            num_layers,
            num_heads,
            ..ModelInfo::default()
        };
        assert_eq!(maps.for_draft(&draft(2, 3)).unwrap().sources.len(), 2);
        for (layers, heads) in [(0, 1), (1, 0), (u32::MAX, 1), (1, u32::MAX)] {
            assert!(maps.for_draft(&draft(layers, heads)).is_err());
        }
    }
}
