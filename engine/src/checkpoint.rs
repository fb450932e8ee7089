//! Checkpoint folders: config.json, one safetensors file or shards with an index, all memory-mapped.
//!
//! Nothing in the files is trusted: headers are bounded and checked against the file's size before anything is mapped
//! to a tensor, and a shard's name may not leave the folder.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};

use crate::backend::DType;
use crate::config::ModelConfig;
use crate::error::EngineError;
use crate::share::Cut;

/// Largest JSON file read: indexes of the largest public models are under 2 MiB, tokenizers under 40 MiB.
const MAX_JSON_BYTES: u64 = 64 << 20;
/// Longest shard name taken, in bytes: what file systems allow.
const MAX_FILE_NAME: usize = 255;

/// A tensor in a mapped file, or a part of one. Cloning shares the bytes.
#[derive(Debug, Clone)]
pub struct Tensor {
    stored: Stored,
    range: Range<usize>,
    shape: Vec<usize>,
    dtype: DType,
}

/// What holds a tensor's bytes.
#[derive(Debug, Clone)]
enum Stored {
    File(Arc<Mmap>),
    /// A matrix's columns lie apart in the file.
    Copy(Arc<[u8]>),
}

impl Tensor {
    /// The stored bytes, row-major, little-endian.
    pub fn bytes(&self) -> &[u8] {
        match &self.stored {
            Stored::File(map) => &map[self.range.clone()],
            Stored::Copy(bytes) => &bytes[self.range.clone()],
        }
    }

    /// The part that `cut` takes, which lies inside.
    pub(crate) fn part(&self, cut: &Cut) -> Self {
        let mut part = self.clone();
        match cut {
            Cut::Whole => {}
            Cut::Rows(own) => {
                let row = self.shape[1..].iter().product::<usize>() * self.dtype.bytes();
                let start = self.range.start;
                part.range = start + own.start * row..start + own.end * row;
                part.shape[0] = own.len();
            }
            Cut::Columns(own) => {
                let width = self.dtype.bytes();
                let columns = own.start * width..own.end * width;
                let mut bytes = Vec::with_capacity(self.shape[0] * columns.len());
                for row in self.bytes().chunks_exact(self.shape[1] * width) {
                    bytes.extend_from_slice(&row[columns.clone()]);
                }
                part.range = 0..bytes.len();
                part.stored = Stored::Copy(bytes.into());
                part.shape[1] = own.len();
            }
        }
        part
    }

    /// Dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// What elements are stored as.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
}

/// An opened checkpoint folder.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: ModelConfig,
    tensors: HashMap<String, Tensor>,
}

impl Checkpoint {
    /// Opens a folder: reads the configuration and maps every shard.
    ///
    /// # Errors
    /// [`EngineError::Io`], [`EngineError::Checkpoint`] or [`EngineError::Unsupported`], naming the file.
    pub fn open(dir: &Path) -> Result<Self, EngineError> {
        let config_path = dir.join("config.json");
        let config_bytes = read_bounded(&config_path)?;
        let mut config = ModelConfig::parse(&config_path, &config_bytes)?;
        let generation_path = dir.join("generation_config.json");
        if generation_path.exists() {
            config.add_generation_config(&generation_path, &read_bounded(&generation_path)?)?;
        }
        config.name = dir
            .canonicalize()
            .ok()
            .and_then(|folder| name_of(&folder))
            .unwrap_or_else(|| "model".to_owned());
        let tokenizer = dir.join("tokenizer.json");
        if tokenizer.exists() {
            config.tokenizer_hash = hex(&Sha256::digest(read_bounded(&tokenizer)?));
        }
        let mut hasher = Sha256::new();
        hasher.update(&config_bytes);
        let mut tensors = HashMap::new();
        for shard in shards(dir)? {
            map_shard(&shard, &mut hasher, &mut tensors)?;
        }
        config.checkpoint_hash = hex(&hasher.finalize());
        Ok(Self {
            dir: dir.to_owned(),
            config,
            tensors,
        })
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Bytes of all tensors.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|t| t.range.len() as u64).sum()
    }

    /// Whether a tensor exists.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// A tensor of the given shape.
    ///
    /// # Errors
    /// [`EngineError::Checkpoint`] when it is missing or has another shape.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor, EngineError> {
        let fail = |reason| EngineError::Checkpoint {
            path: self.dir.clone(),
            reason,
        };
        let tensor = self
            .tensors
            .get(name)
            .ok_or_else(|| fail(format!("tensor {name} is missing")))?;
        if tensor.shape != shape {
            return Err(fail(format!(
                "tensor {name} has shape {:?}, expected {shape:?}",
                tensor.shape
            )));
        }
        Ok(tensor.clone())
    }
}

/// What a checkpoint folder is called: its own name, or its repository's where it is a snapshot in the Hugging Face cache,
/// whose folders are called `models--ORG--NAME/snapshots/COMMIT`.
fn name_of(folder: &Path) -> Option<String> {
    let own = folder.file_name()?.to_string_lossy();
    let snapshots = folder.parent();
    let repository = snapshots
        .filter(|parent| parent.ends_with("snapshots"))
        .and_then(|parent| {
            parent
                .parent()?
                .file_name()?
                .to_str()?
                .strip_prefix("models--")
        });
    Some(match repository {
        Some(repository) => repository.replacen("--", "/", 1),
        None => own.into_owned(),
    })
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut s, b| {
        write!(s, "{b:02x}").expect("writing to a string succeeds");
        s
    })
}

fn io_error(path: &Path) -> impl FnOnce(std::io::Error) -> EngineError {
    let path = path.to_owned();
    move |source| EngineError::Io { path, source }
}

/// A whole file, if it is of a sane size.
pub(crate) fn read_bounded(path: &Path) -> Result<Vec<u8>, EngineError> {
    let file = File::open(path).map_err(io_error(path))?;
    let mut bytes = Vec::new();
    file.take(MAX_JSON_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(io_error(path))?;
    if bytes.len() as u64 > MAX_JSON_BYTES {
        let reason = format!("larger than {MAX_JSON_BYTES} bytes");
        return Err(EngineError::Checkpoint {
            path: path.to_owned(),
            reason,
        });
    }
    Ok(bytes)
}

/// A safetensors file and, when an index names them, the tensors to take from it.
struct Shard {
    path: PathBuf,
    tensors: Option<BTreeSet<String>>,
}

/// The safetensors files of a folder, in order.
fn shards(dir: &Path) -> Result<Vec<Shard>, EngineError> {
    let index = dir.join("model.safetensors.index.json");
    if !index.exists() {
        return Ok(vec![Shard {
            path: dir.join("model.safetensors"),
            tensors: None,
        }]);
    }
    let fail = |reason| EngineError::Checkpoint {
        path: index.clone(),
        reason,
    };
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let parsed: Index =
        serde_json::from_slice(&read_bounded(&index)?).map_err(|e| fail(e.to_string()))?;
    let mut by_file: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (tensor, file) in parsed.weight_map {
        let mut parts = Path::new(&file).components();
        let plain = matches!(
            (parts.next(), parts.next()),
            (Some(Component::Normal(_)), None)
        );
        if !plain || file.len() > MAX_FILE_NAME {
            let shown: String = file.chars().take(MAX_FILE_NAME).collect();
            return Err(fail(format!(
                "shard name {shown:?} is not a plain file name"
            )));
        }
        by_file.entry(file).or_default().insert(tensor);
    }
    if by_file.is_empty() {
        return Err(fail("weight_map is empty".to_owned()));
    }
    Ok(by_file
        .into_iter()
        .map(|(file, tensors)| Shard {
            path: dir.join(file),
            tensors: Some(tensors),
        })
        .collect())
}

/// Maps one safetensors file and adds its tensors.
fn map_shard(
    shard: &Shard,
    hasher: &mut Sha256,
    tensors: &mut HashMap<String, Tensor>,
) -> Result<(), EngineError> {
    let path = &shard.path;
    let fail = |reason| EngineError::Checkpoint {
        path: path.to_owned(),
        reason,
    };
    let file = File::open(path).map_err(io_error(path))?;
    // SAFETY: the file is only read. A file that another process shortens while it is mapped would end this one with
    // a bus error; checkpoints are not edited in place.
    let map = Arc::new(unsafe { Mmap::map(&file) }.map_err(io_error(path))?);
    // The header's length and every offset are checked against the file's size here.
    let (header_len, metadata) =
        SafeTensors::read_metadata(&map).map_err(|e| fail(e.to_string()))?;
    let data = 8 + header_len;
    hasher.update(&map[..data]);
    let infos = metadata.tensors();
    if let Some(missing) = shard
        .tensors
        .iter()
        .flatten()
        .find(|name| !infos.contains_key(*name))
    {
        return Err(fail(format!(
            "the index places tensor {missing} here, but the file lacks it"
        )));
    }
    for (name, info) in infos {
        if shard
            .tensors
            .as_ref()
            .is_some_and(|wanted| !wanted.contains(&name))
        {
            continue;
        }
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::BF16 => DType::Bf16,
            Dtype::F16 => DType::F16,
            // Buffers of other types (masks, position ids) are not weights.
            _ => continue,
        };
        let (start, end) = info.data_offsets;
        let elements = info.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let bytes = elements.and_then(|n| n.checked_mul(dtype.bytes()));
        if start > end || bytes != Some(end - start) || end > map.len() - data {
            return Err(fail(format!(
                "tensor {name}: offsets do not fit its shape or the file"
            )));
        }
        let tensor = Tensor {
            stored: Stored::File(Arc::clone(&map)),
            range: data + start..data + end,
            shape: info.shape.clone(),
            dtype,
        };
        if tensors.insert(name.clone(), tensor).is_some() {
            return Err(fail(format!("tensor {name} occurs in two shards")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots_are_called_like_their_repository() {
        let name = |path: &str| name_of(Path::new(path)).unwrap();
        assert_eq!(name("/models/target"), "target");
        assert_eq!(
            name("/cache/hub/models--Qwen--Qwen2.5-3B/snapshots/0123"),
            "Qwen/Qwen2.5-3B"
        );
        assert_eq!(name("/mine/snapshots/0123"), "0123");
    }
}
