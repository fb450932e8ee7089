//! [`Count`]: a session's forwards and KV reads, counted from outside.

use specattn_mask::{LayerMap, RoundMask};
use specattn_proto::v1::SessionStats;

use crate::process;

/// The bundled target's shape.
const LAYERS: usize = 8;
const KV_HEADS: usize = 2;

/// The policy of [`crate::session::open_request`].
const SINK: usize = 4;
const WINDOW: usize = 64;

/// What a count from outside comes to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Target forwards after the prompt.
    pub forwards: u64,
    /// Those without a proposal.
    pub solo: u64,
    /// Draft tokens judged.
    pub proposed: u64,
    /// Draft tokens accepted.
    pub accepted: u64,
    /// KV entries read.
    pub read: u64,
    /// KV entries that dense passes would have read.
    pub dense: u64,
}

impl Count {
    /// A forward over `inputs` tokens after `past` cached ones, masked or dense.
    pub fn forward(
        &mut self,
        past: usize,
        inputs: usize,
        mask: Option<&RoundMask>,
        map: &LayerMap,
    ) {
        self.forwards += 1;
        for layer in 0..LAYERS {
            for head in 0..KV_HEADS {
                let all = past + inputs;
                let read = match mask {
                    None => all,
                    Some(mask) => {
                        let source = &mask.sources[map.of_head[layer][head] as usize];
                        let kept = |&p: &usize| p < SINK || p + WINDOW > past || source.contains(p);
                        (0..past).filter(kept).count() + inputs
                    }
                };
                self.read += read as u64;
                self.dense += all as u64;
            }
        }
    }

    /// What a session says of itself.
    pub fn told(stats: &SessionStats) -> Self {
        Self {
            forwards: stats.target_forwards,
            solo: stats.solo_forwards,
            proposed: stats.proposed_tokens,
            accepted: stats.accepted_tokens,
            read: stats.kv_entries_read,
            dense: stats.kv_entries_dense,
        }
    }
}

/// The bundled map without the target's memory, whose additions no mask shows: for an outside count of what is read. The
/// sources' offsets and spreads, which were chosen together with the memory, go too.
pub fn layer_map() -> LayerMap {
    let mut map = LayerMap::load(&process::target().join("alignment.json")).unwrap();
    map.memory = None;
    for source in &mut map.sources {
        source.p_offset = 0.0;
        source.spread = None;
    }
    map
}

/// That map as a file for a verify worker's `--alignment`, in a folder that lives as long as the value.
pub fn layer_map_file() -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("alignment.json");
    layer_map().save(&file).unwrap();
    let file = file.to_str().unwrap().to_owned();
    (folder, file)
}
