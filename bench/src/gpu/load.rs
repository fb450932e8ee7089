//! How fast a checkpoint's weights come to the device, beside copies from memory that is not pinned.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use specattn_engine::cuda::Device;
use specattn_engine::{DeviceChoice, LoadOptions, Model};

/// Bytes of the copies beside.
const COPIED: usize = 1 << 30;

/// A Llama checkpoint of the shape that `config` describes, of zeros: a file with holes, which takes no space on disk. Gives its bytes.
fn checkpoint_of_zeros(config: &Path, folder: &Path) -> Result<u64> {
    let text = std::fs::read(config).with_context(|| format!("reading {}", config.display()))?;
    let shape: Value = serde_json::from_slice(&text)?;
    let size = |name: &str| {
        let size = shape[name].as_u64();
        size.with_context(|| format!("{name} in {}", config.display()))
    };
    let (hidden, wide, vocab) = (
        size("hidden_size")?,
        size("intermediate_size")?,
        size("vocab_size")?,
    );
    let query = size("num_attention_heads")? * size("head_dim")?;
    let kv = size("num_key_value_heads")? * size("head_dim")?;
    let mut tensors = Map::new();
    let mut end = 0;
    let mut add = |name: &str, shape: &[u64]| {
        let start = end;
        end += 2 * shape.iter().product::<u64>();
        let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]});
        tensors.insert(format!("{name}.weight"), entry);
    };
    add("model.embed_tokens", &[vocab, hidden]);
    for layer in 0..size("num_hidden_layers")? {
        let mut of_layer = |name: &str, shape: &[u64]| {
            add(&format!("model.layers.{layer}.{name}"), shape);
        };
        of_layer("input_layernorm", &[hidden]);
        of_layer("self_attn.q_proj", &[query, hidden]);
        of_layer("self_attn.k_proj", &[kv, hidden]);
        of_layer("self_attn.v_proj", &[kv, hidden]);
        of_layer("self_attn.o_proj", &[hidden, query]);
        of_layer("post_attention_layernorm", &[hidden]);
        of_layer("mlp.gate_proj", &[wide, hidden]);
        of_layer("mlp.up_proj", &[wide, hidden]);
        of_layer("mlp.down_proj", &[hidden, wide]);
    }
    add("model.norm", &[hidden]);
    add("lm_head", &[vocab, hidden]);
    let mut header = serde_json::to_vec(&tensors)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = File::create(folder.join("model.safetensors"))?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    file.set_len(8 + header.len() as u64 + end)?;
    std::fs::write(folder.join("config.json"), text)?;
    Ok(end)
}

/// Prints how long loading a model of `config`'s shape takes.
///
/// # Errors
/// When the file cannot be made or the device fails.
pub fn report(config: &Path, device: &Device) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let bytes = checkpoint_of_zeros(config, folder.path())?;
    let options = LoadOptions {
        device: DeviceChoice::gpu(device.ordinal()),
        ..LoadOptions::default()
    };
    let name = config.file_stem().unwrap_or_default().to_string_lossy();
    println!(
        "Loading {name}, {:.2} GB in one file, until its last weight is on its way to the device.\n",
        bytes as f64 / 1e9
    );
    println!("| pages of the file | s | GB/s |\n| --- | --- | --- |");
    for pages in ["never touched", "in memory", "in memory"] {
        let start = Instant::now();
        let mut seconds = 0.0;
        Model::load(folder.path(), &options, &mut |_, _| {
            seconds = start.elapsed().as_secs_f64();
        })?;
        let rate = bytes as f64 / 1e9 / seconds;
        println!("| {pages} | {seconds:.2} | {rate:.1} |");
    }
    let stream = device.stream();
    let host = vec![1u8; COPIED];
    let mut there = stream.alloc_zeros::<u8>(COPIED)?;
    stream.synchronize()?;
    let start = Instant::now();
    stream.memcpy_htod(&host, &mut there)?;
    stream.synchronize()?;
    let rate = COPIED as f64 / 1e9 / start.elapsed().as_secs_f64();
    println!("\nOne copy from memory that is not pinned: {rate:.1} GB/s.\n");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checkpoint_is_one() {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("tiny.json");
        let shape = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "vocab_size": 96, "hidden_size": 32,
            "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
            "tie_word_embeddings": false,
        });
        std::fs::write(&config, shape.to_string()).unwrap();
        let made = tempfile::tempdir().unwrap();
        let bytes = checkpoint_of_zeros(&config, made.path()).unwrap();
        let mut heard = (0, 0);
        Model::load(made.path(), &LoadOptions::default(), &mut |done, total| {
            heard = (done, total);
        })
        .unwrap();
        assert_eq!(heard, (bytes, bytes));
    }
}
