//! Masks on the target's side: which layer map serves a draft, and what its masks let each KV head read.

use std::path::Path;
use std::sync::Arc;

use specattn_engine::{HeadLists, ModelConfig};
use specattn_mask::{
    Decoder, LayerMap, Limits, MaskError, MaskPolicy, PairShape, alignment, read_list,
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
    /// be missing.
    ///
    /// # Errors
    /// A [`MaskError`] when the file was named and cannot be used; one that was only found is passed over with a warning.
    pub(crate) fn load(
        config: &ModelConfig,
        file: Option<&Path>,
        folder: &Path,
    ) -> Result<Self, MaskError> {
        let calibrated = match file {
            Some(path) => Some(LayerMap::load(path)?),
            None => found_beside(&folder.join(alignment::FILE_NAME)),
        };
        Ok(Self {
            layers: config.num_layers as u32,
            kv_heads: config.num_kv_heads as u32,
            checkpoint_hash: config.checkpoint_hash.clone(),
            calibrated: calibrated.map(Arc::new),
        })
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
pub(crate) struct MaskReader {
    map: Arc<LayerMap>,
    policy: MaskPolicy,
    decoder: Decoder,
    lists: HeadLists,
}

/// What a mask came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Masking {
    /// [`MaskReader::lists`] holds what each head reads.
    Ready,
    /// The mask is a delta against one that is not held: the round goes dense and a full mask is asked for.
    MissingBase,
}

impl MaskReader {
    /// A reader for masks over at most `max_context` positions.
    pub(crate) fn new(map: Arc<LayerMap>, policy: MaskPolicy, max_context: usize) -> Self {
        let decoder = Decoder::new(Limits {
            max_context,
            max_sources: map.sources.len(),
        });
        let lists = HeadLists {
            lists: Vec::new(),
            of_head: map.of_head.iter().flatten().copied().collect(),
        };
        Self {
            map,
            policy,
            decoder,
            lists,
        }
    }

    /// The map in force.
    pub(crate) fn map(&self) -> &LayerMap {
        &self.map
    }

    /// Decodes the mask of a round that builds on `base` committed tokens.
    ///
    /// # Errors
    /// [`Fault::InvalidArgument`] for bytes that are no mask of this session.
    pub(crate) fn read(&mut self, bytes: &[u8], base: usize) -> Result<Masking, Fault> {
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
        self.lists.lists.clear();
        let read = mask
            .sources
            .iter()
            .map(|s| read_list(s, &self.policy, base));
        self.lists.lists.extend(read);
        Ok(Masking::Ready)
    }

    /// What each KV head reads by the last mask that was [`Masking::Ready`].
    pub(crate) fn lists(&self) -> &HeadLists {
        &self.lists
    }
}

#[cfg(test)]
mod tests {
    use specattn_mask::{Encoder, PositionSet, RoundMask};

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
        assert_eq!(reader.lists().lists, [vec![0, 3, 4, 8], vec![0, 8]]);
        assert_eq!(reader.lists().of_head, [0, 0, 0, 0, 1, 1, 1, 1]);
        let delta = encoder.encode(&mask(12, [&[5], &[6]]));
        assert_eq!(reader.read(&delta, 13), Ok(Masking::Ready));
        assert_eq!(reader.lists().lists, [vec![0, 5, 11], vec![0, 6, 11]]);
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
