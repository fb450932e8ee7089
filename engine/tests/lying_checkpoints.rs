//! Checkpoints that lie: each a clear error, never a panic, never memory beyond what the files and the budget account for.

mod allocations;
mod fixture;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use fixture::Fixture;
use serde_json::{Value, json};
use specattn_engine::{EngineError, LoadOptions, Model};
use tempfile::TempDir;

/// Most bytes that one allocation may take while a fixture of 250 KiB is loaded or refused.
const LARGEST_ALLOCATION: usize = 16 << 20;

/// A private copy of a fixture's checkpoint, to be damaged.
struct Copy {
    folder: TempDir,
}

impl Copy {
    fn of(name: &'static str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for entry in std::fs::read_dir(Fixture::open(name).folder).expect("the fixture's folder") {
            let entry = entry.expect("an entry");
            if entry.file_name() != "golden.safetensors" {
                std::fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("copied");
            }
        }
        Self { folder }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn read(&self, file: &str) -> Vec<u8> {
        std::fs::read(self.path().join(file)).expect("the file is there")
    }

    fn write(&self, file: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.path().join(file), bytes).expect("written");
    }

    fn remove(&self, file: &str) {
        std::fs::remove_file(self.path().join(file)).expect("removed");
    }

    fn edit_json(&self, file: &str, edit: impl FnOnce(&mut Value)) {
        let mut value: Value = serde_json::from_slice(&self.read(file)).expect("JSON");
        edit(&mut value);
        self.write(file, value.to_string());
    }

    /// Edits the JSON header of a safetensors file; the data stay as they are.
    fn edit_header(&self, file: &str, edit: impl FnOnce(&mut Value)) {
        let bytes = self.read(file);
        let (length, rest) = bytes.split_at(8);
        let length = u64::from_le_bytes(length.try_into().expect("eight bytes")) as usize;
        let mut header: Value = serde_json::from_slice(&rest[..length]).expect("a header");
        edit(&mut header);
        let header = header.to_string();
        self.write(
            file,
            [
                &(header.len() as u64).to_le_bytes()[..],
                header.as_bytes(),
                &rest[length..],
            ]
            .concat(),
        );
    }

    fn load(&self) -> Result<Model, EngineError> {
        let options = LoadOptions {
            kv_cache_bytes: 1 << 20,
            threads: 1,
            ..LoadOptions::default()
        };
        Model::load(self.path(), &options, &mut |_, _| {})
    }
}

/// Collects what went wrong over a table of cases, so that one run shows all of it.
#[derive(Default)]
struct Cases {
    failures: Vec<String>,
}

impl Cases {
    /// `copy` must be refused with a message that names `word`.
    fn refused(&mut self, case: &str, copy: &Copy, word: &str) {
        allocations::reset_largest();
        let outcome = catch_unwind(AssertUnwindSafe(|| copy.load()));
        let largest = allocations::largest();
        let fault = match outcome {
            Err(_) => "panicked".to_owned(),
            Ok(Ok(_)) => "was accepted".to_owned(),
            Ok(Err(error)) => {
                let message = error.to_string();
                let of_the_kind = matches!(
                    error,
                    EngineError::Io { .. }
                        | EngineError::Checkpoint { .. }
                        | EngineError::Unsupported(_)
                );
                match () {
                    () if !of_the_kind => format!("gave an error of the wrong kind: {error:?}"),
                    () if !message.contains(word) => format!("does not name {word:?}: {message}"),
                    () if message.len() > 1000 => {
                        format!("gave a message of {} bytes", message.len())
                    }
                    () if largest > LARGEST_ALLOCATION => {
                        format!("allocated {largest} bytes at once: {message}")
                    }
                    () => return,
                }
            }
        };
        self.failures.push(format!("{case}: {fault}"));
    }

    fn finish(self) {
        assert!(self.failures.is_empty(), "\n{}", self.failures.join("\n"));
    }
}

#[test]
fn config_json_that_is_no_config() {
    let mut cases = Cases::default();
    let copy = Copy::of("llama2");
    let whole = copy.read("config.json");
    let nested = "[".repeat(200_000);
    for (case, bytes) in [
        ("empty", &b""[..]),
        ("half", &whole[..whole.len() / 2]),
        ("a list", b"[]"),
        ("a number", b"3"),
        ("an empty object", b"{}"),
        ("not UTF-8", b"{\"model_type\": \"\xff\xfe\"}"),
        ("deeply nested", nested.as_bytes()),
    ] {
        copy.write("config.json", bytes);
        cases.refused(case, &copy, "config.json");
    }
    copy.remove("config.json");
    cases.refused("missing", &copy, "config.json");
    cases.finish();
}

#[test]
fn dimensions_out_of_range() {
    let mut cases = Cases::default();
    let keys = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "head_dim",
        "max_position_embeddings",
    ];
    let values = [
        json!(0),
        json!(-1),
        json!(1u64 << 40),
        json!(u64::MAX),
        json!(1.5),
        json!("48"),
        json!([48]),
    ];
    for key in keys {
        for value in &values {
            let copy = Copy::of("llama2");
            copy.edit_json("config.json", |config| config[key] = value.clone());
            // A dimension in range that the weights contradict is reported against a tensor, any other by its key.
            cases.refused(&format!("{key} = {value}"), &copy, "");
        }
    }
    for key in [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
    ] {
        let copy = Copy::of("llama2");
        copy.edit_json("config.json", |config| {
            drop(config.as_object_mut().expect("an object").remove(key))
        });
        cases.refused(&format!("no {key}"), &copy, key);
    }
    for (case, key, value) in [
        (
            "KV heads that do not divide",
            "num_key_value_heads",
            json!(2),
        ),
        ("more KV heads than heads", "num_key_value_heads", json!(6)),
        ("heads that do not divide", "num_attention_heads", json!(5)),
        ("too few layers' tensors", "num_hidden_layers", json!(3)),
        ("too wide", "hidden_size", json!(96)),
        ("too many tokens", "vocab_size", json!(97)),
    ] {
        let copy = Copy::of("llama2");
        copy.edit_json("config.json", |config| config[key] = value);
        cases.refused(case, &copy, "");
    }
    cases.finish();
}

#[test]
fn numbers_that_break_the_arithmetic() {
    let mut cases = Cases::default();
    for (key, bad) in [
        ("rms_norm_eps", "NaN"),
        ("rms_norm_eps", "1e400"),
        ("rms_norm_eps", "-1e-5"),
        ("rms_norm_eps", "\"1e-5\""),
        ("rope_theta", "0"),
        ("rope_theta", "-10000"),
        ("rope_theta", "Infinity"),
        ("rope_theta", "\"10000\""),
    ] {
        let copy = Copy::of("llama2");
        let text = String::from_utf8(copy.read("config.json")).expect("UTF-8");
        let old = text
            .lines()
            .find(|line| line.contains(key))
            .expect("the key is there")
            .to_owned();
        copy.write(
            "config.json",
            text.replace(&old, &format!("\"{key}\": {bad},")),
        );
        cases.refused(&format!("{key} = {bad}"), &copy, "config.json");
    }
    for (key, bad) in [
        ("eos_token_id", json!(-1)),
        ("eos_token_id", json!("end")),
        ("eos_token_id", json!([[1]])),
    ] {
        let copy = Copy::of("llama2");
        copy.edit_json("config.json", |config| config[key] = bad.clone());
        cases.refused(&format!("{key} = {bad}"), &copy, "eos_token_id");
    }
    for (case, scaling) in [
        ("factor 0", json!({"rope_type": "linear", "factor": 0.0})),
        (
            "negative factor",
            json!({"rope_type": "linear", "factor": -2.0}),
        ),
        ("no factor", json!({"rope_type": "linear"})),
        ("a list", json!([1])),
        (
            "no band between the factors",
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 64}),
        ),
        (
            "no original context",
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 0}),
        ),
    ] {
        let copy = Copy::of("llama2");
        copy.edit_json("config.json", |config| config["rope_scaling"] = scaling);
        cases.refused(&format!("rope_scaling: {case}"), &copy, "rope");
    }
    cases.finish();
}

/// What the engine does not compute it must refuse: silently ignored, it would give wrong text.
#[test]
fn features_the_engine_does_not_run() {
    let mut cases = Cases::default();
    for (family, key, value, word) in [
        ("llama2", "model_type", json!("mamba"), "mamba"),
        ("llama2", "model_type", json!(7), "model_type"),
        ("llama2", "hidden_act", json!("gelu"), "gelu"),
        (
            "llama2",
            "rope_scaling",
            json!({"rope_type": "yarn", "factor": 4.0}),
            "yarn",
        ),
        (
            "llama2",
            "rope_scaling",
            json!({"type": "dynamic", "factor": 4.0}),
            "dynamic",
        ),
        (
            "llama2",
            "quantization_config",
            json!({"quant_method": "gptq", "bits": 4}),
            "quantization",
        ),
    ] {
        let copy = Copy::of(family);
        copy.edit_json("config.json", |config| config[key] = value.clone());
        cases.refused(&format!("{family}: {key} = {value}"), &copy, word);
    }
    cases.finish();
}

/// Within the window sliding attention is plain attention, so the context is capped there and stays exact.
#[test]
fn a_sliding_window_caps_the_context() {
    let mistral = Copy::of("mistral");
    mistral.edit_json("config.json", |config| {
        config["sliding_window"] = json!(128)
    });
    let qwen = Copy::of("qwen2");
    qwen.edit_json("config.json", |config| {
        config["use_sliding_window"] = json!(true);
        config["sliding_window"] = json!(128);
    });
    for copy in [mistral, qwen] {
        let model = copy.load().expect("a sliding window is no error");
        assert_eq!(model.config().max_context, 128);
    }
}

#[test]
fn options_the_tensors_contradict() {
    let mut cases = Cases::default();
    for (family, key, value, word) in [
        ("llama2", "attention_bias", json!(true), "bias"),
        ("llama2", "mlp_bias", json!(true), "bias"),
        (
            "llama3",
            "tie_word_embeddings",
            json!(false),
            "lm_head.weight",
        ),
    ] {
        let copy = Copy::of(family);
        copy.edit_json("config.json", |config| config[key] = value.clone());
        cases.refused(&format!("{family}: {key} = {value}"), &copy, word);
    }
    cases.finish();
}

#[test]
fn safetensors_files_cut_short() {
    let mut cases = Cases::default();
    let copy = Copy::of("llama2");
    let whole = copy.read("model.safetensors");
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().expect("eight bytes")) as usize;
    for length in [
        0,
        1,
        7,
        8,
        9,
        header - 1,
        header,
        header + 1,
        whole.len() / 2,
        whole.len() - 1,
    ] {
        copy.write("model.safetensors", &whole[..length]);
        cases.refused(
            &format!("{length} of {} bytes", whole.len()),
            &copy,
            "model.safetensors",
        );
    }
    copy.write("model.safetensors", [&whole[..], &[0; 5]].concat());
    cases.refused("bytes after the data", &copy, "model.safetensors");
    for length in [
        1u64 << 40,
        u64::MAX,
        u64::MAX - 7,
        1 << 63,
        whole.len() as u64,
        0,
        1,
    ] {
        copy.write(
            "model.safetensors",
            [&length.to_le_bytes()[..], &whole[8..]].concat(),
        );
        cases.refused(
            &format!("header length {length}"),
            &copy,
            "model.safetensors",
        );
    }
    copy.remove("model.safetensors");
    cases.refused("no file", &copy, "safetensors");
    std::fs::create_dir(copy.path().join("model.safetensors")).expect("created");
    cases.refused("a folder", &copy, "safetensors");
    cases.finish();
}

#[test]
fn safetensors_headers_that_lie() {
    const NAME: &str = "model.layers.1.mlp.up_proj.weight";
    let mut cases = Cases::default();
    let mut edited = |case: &str, word: &str, edit: &dyn Fn(&mut Value)| {
        let copy = Copy::of("llama2");
        copy.edit_header("model.safetensors", edit);
        cases.refused(case, &copy, word);
    };
    edited("a list", "model.safetensors", &|header| {
        *header = json!([1, 2])
    });
    edited("no tensors", "", &|header| *header = json!({}));
    edited("a missing tensor", "", &|header| {
        drop(header.as_object_mut().expect("an object").remove(NAME))
    });
    edited("a renamed tensor", NAME, &|header| {
        let entry = header
            .as_object_mut()
            .expect("an object")
            .remove(NAME)
            .expect("the tensor");
        header["model.layers.7.mlp.up_proj.weight"] = entry;
    });
    edited("a transposed tensor", NAME, &|header| {
        header[NAME]["shape"] = json!([48, 88])
    });
    edited("one dimension", NAME, &|header| {
        header[NAME]["shape"] = json!([88 * 48])
    });
    edited("three dimensions", NAME, &|header| {
        header[NAME]["shape"] = json!([88, 48, 1])
    });
    edited("a shape of 2^40", "model.safetensors", &|header| {
        header[NAME]["shape"] = json!([1u64 << 40, 48])
    });
    edited("a shape that overflows", "model.safetensors", &|header| {
        header[NAME]["shape"] = json!([1u64 << 40, 1u64 << 40]);
    });
    edited("a negative dimension", "model.safetensors", &|header| {
        header[NAME]["shape"] = json!([-88, -48])
    });
    edited("an unknown type", "model.safetensors", &|header| {
        header[NAME]["dtype"] = json!("F1")
    });
    // Four bytes each, so that the sizes still agree.
    for dtype in ["I32", "U32"] {
        edited(dtype, NAME, &|header| header[NAME]["dtype"] = json!(dtype));
    }
    edited("8 byte elements", "model.safetensors", &|header| {
        header[NAME]["dtype"] = json!("F64")
    });
    edited("integers of one byte", NAME, &|header| {
        header[NAME]["dtype"] = json!("I8");
        header[NAME]["shape"] = json!([88, 48 * 4]);
    });
    edited("half precision of twice the width", NAME, &|header| {
        header[NAME]["dtype"] = json!("BF16");
        header[NAME]["shape"] = json!([88, 48 * 2]);
    });
    for offsets in [
        json!([0, u64::MAX]),
        json!([u64::MAX, u64::MAX]),
        json!([0, 1u64 << 40]),
        json!([1u64 << 40, (1u64 << 40) + 88 * 48 * 4]),
        json!([88 * 48 * 4, 0]),
        json!([-1, 88 * 48 * 4 - 1]),
        json!([0]),
        json!([1, 88 * 48 * 4 + 1]),
        json!([0, 88 * 48 * 4]),
    ] {
        edited(
            &format!("offsets {offsets}"),
            "model.safetensors",
            &|header| {
                header[NAME]["data_offsets"] = offsets.clone();
            },
        );
    }
    cases.finish();
}

#[test]
fn indexes_that_lie() {
    const INDEX: &str = "model.safetensors.index.json";
    const NAME: &str = "model.norm.weight";
    let mut cases = Cases::default();
    for (case, bytes) in [
        ("empty", &b""[..]),
        ("a list", b"[]"),
        ("no map", b"{\"metadata\": {}}"),
        ("an empty map", b"{\"weight_map\": {}}"),
        (
            "a map of numbers",
            b"{\"weight_map\": {\"model.norm.weight\": 1}}",
        ),
        (
            "a map that is a list",
            b"{\"weight_map\": [\"model.norm.weight\"]}",
        ),
    ] {
        let copy = Copy::of("llama_linear");
        copy.write(INDEX, bytes);
        cases.refused(case, &copy, "");
    }

    // A folder beside the checkpoint holds a valid shard: naming it must be refused all the same.
    let outside = Copy::of("llama_linear");
    let shard = "model-00001-of-00003.safetensors";
    let absolute = outside.path().join(shard);
    let copy = Copy::of("llama_linear");
    let parent = copy
        .path()
        .file_name()
        .expect("a name")
        .to_str()
        .expect("UTF-8")
        .to_owned();
    let sibling = outside
        .path()
        .file_name()
        .expect("a name")
        .to_str()
        .expect("UTF-8")
        .to_owned();
    std::fs::create_dir(copy.path().join("inner")).expect("created");
    std::fs::copy(
        copy.path().join(shard),
        copy.path().join("inner").join(shard),
    )
    .expect("copied");
    let original = copy.read(INDEX);
    for file in [
        format!("../{sibling}/{shard}"),
        format!("../{parent}/{shard}"),
        absolute.to_str().expect("UTF-8").to_owned(),
        format!("inner/{shard}"),
        format!("inner/../{shard}"),
        format!("./{shard}"),
        "..".to_owned(),
        ".".to_owned(),
        String::new(),
        "model\0.safetensors".to_owned(),
        "/dev/zero".to_owned(),
        "a".repeat(5000),
        "model-00009-of-00003.safetensors".to_owned(),
        "config.json".to_owned(),
        // There, and a valid shard, but not the one that holds this tensor.
        if String::from_utf8_lossy(&original).contains(&format!("\"{NAME}\": \"{shard}\"")) {
            "model-00002-of-00003.safetensors".to_owned()
        } else {
            shard.to_owned()
        },
    ] {
        copy.write(INDEX, &original);
        copy.edit_json(INDEX, |index| {
            index["weight_map"][NAME] = json!(file.as_str())
        });
        cases.refused(&format!("a shard named {:.60?}", file), &copy, "");
    }

    copy.write(INDEX, &original);
    copy.edit_json(INDEX, |index| {
        drop(
            index["weight_map"]
                .as_object_mut()
                .expect("a map")
                .remove(NAME),
        )
    });
    cases.refused("a tensor left out", &copy, NAME);

    let copy = Copy::of("llama_linear");
    copy.remove("model-00002-of-00003.safetensors");
    cases.refused("a shard missing", &copy, "model-00002-of-00003.safetensors");
    let copy = Copy::of("llama_linear");
    let bytes = copy.read("model-00003-of-00003.safetensors");
    copy.write(
        "model-00003-of-00003.safetensors",
        &bytes[..bytes.len() / 2],
    );
    cases.refused(
        "a shard cut short",
        &copy,
        "model-00003-of-00003.safetensors",
    );
    cases.finish();
}

#[test]
fn generation_config_that_lies() {
    let mut cases = Cases::default();
    for bytes in [
        &b"{"[..],
        b"[]",
        b"{\"eos_token_id\": -1}",
        b"{\"eos_token_id\": \"x\"}",
    ] {
        let copy = Copy::of("llama2");
        copy.write("generation_config.json", bytes);
        cases.refused(
            &String::from_utf8_lossy(bytes),
            &copy,
            "generation_config.json",
        );
    }
    cases.finish();
}

/// Strictness must not shut out what real checkpoints carry.
#[test]
fn harmless_additions_are_accepted() {
    let copy = Copy::of("llama2");
    let bytes = copy.read("model.safetensors");
    copy.edit_header("model.safetensors", |header| {
        let end = header
            .as_object()
            .expect("an object")
            .values()
            .filter_map(|entry| entry["data_offsets"][1].as_u64())
            .max()
            .expect("tensors");
        header["model.layers.0.self_attn.rotary_emb.inv_freq"] =
            json!({"dtype": "F32", "shape": [8], "data_offsets": [end, end + 32]});
    });
    let longer = [&copy.read("model.safetensors")[..], &[0; 32]].concat();
    assert!(longer.len() > bytes.len());
    copy.write("model.safetensors", longer);
    copy.edit_json("config.json", |config| {
        config["transformers_version"] = json!("4.40.0");
        config["pretraining_tp"] = json!(1);
        config["head_dim"] = Value::Null;
        config["num_key_value_heads"] = Value::Null;
    });
    copy.write(
        "generation_config.json",
        r#"{"eos_token_id": [1, 5], "temperature": 0.6}"#,
    );
    let model = copy.load().unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(model.config().head_dim, 16);
    assert_eq!(model.config().num_kv_heads, 3);
    let mut eos = model.config().eos_token_ids.clone();
    eos.sort_unstable();
    assert_eq!(eos, [1, 5], "both files' end tokens, once each");
}

#[test]
fn checkpoint_hashes_tell_checkpoints_apart() {
    let hash = |copy: &Copy| {
        copy.load()
            .unwrap_or_else(|e| panic!("{e}"))
            .config()
            .checkpoint_hash
            .clone()
    };
    let (one, other) = (Copy::of("llama2"), Copy::of("llama2"));
    assert_eq!(hash(&one), hash(&other));
    assert_eq!(hash(&one).len(), 64);
    other.edit_json("config.json", |config| {
        config["rope_theta"] = json!(20000.0)
    });
    assert_ne!(hash(&one), hash(&other));
    assert_ne!(hash(&one), hash(&Copy::of("llama_linear")));
}
