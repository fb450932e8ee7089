"""Models on disk: Hugging Face folders of bf16 safetensors, and the state that a run resumes from."""
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llama import Llama
from recipe import BEGIN_OF_TEXT, END_OF_TEXT, ModelShape

STATE = "state.pt"


def _config(shape):
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers, "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads, "head_dim": shape.head_dim, "hidden_act": "silu",
        "max_position_embeddings": shape.max_context, "rms_norm_eps": shape.rms_norm_eps, "rope_theta": shape.rope_theta,
        "rope_scaling": None, "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
        "initializer_range": 0.02, "tie_word_embeddings": True, "use_cache": True, "bos_token_id": BEGIN_OF_TEXT,
        "eos_token_id": END_OF_TEXT, "torch_dtype": "bfloat16"}


def _shards(weights, shard_bytes):
    """Splits weights, in order, into files of at most `shard_bytes` (a larger tensor has a file of its own)."""
    shards, size = [{}], 0
    for name, tensor in weights.items():
        bytes_ = tensor.numel() * tensor.element_size()
        if shards[-1] and size + bytes_ > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += bytes_
    return shards


def export(model, folder, tokenizer, shard_bytes):
    """Writes a model folder that transformers and SpecAttn read; `tokenizer` is the folder of the tokenizer's files."""
    folder = Path(folder)
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    weights = {
        f"model.{name}": p.detach().to(torch.bfloat16).cpu().contiguous() for name, p in model.named_parameters()}
    shards = _shards(weights, shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        index = {
            "metadata": {"total_size": sum(t.numel() * t.element_size() for t in weights.values())},
            "weight_map": {key: name for name, shard in zip(names, shards) for key in shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for name, shard in zip(names, shards):
        save_file(shard, folder / name, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(model.shape), indent=1))
    generation = {"bos_token_id": BEGIN_OF_TEXT, "eos_token_id": END_OF_TEXT, "do_sample": True, "temperature": 0.8}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1))
    for file in Path(tokenizer).iterdir():
        shutil.copy(file, folder)


def load(folder, device):
    """A model folder as float32 for evaluation."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    shape = ModelShape(
        vocab_size=config["vocab_size"], hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"], num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"], num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"], max_context=config["max_position_embeddings"], rope_theta=config["rope_theta"],
        rms_norm_eps=config["rms_norm_eps"])
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights.update(load_file(file))
    model = Llama(shape)
    model.load_state_dict({name.removeprefix("model."): tensor.float() for name, tensor in weights.items()})
    return model.to(device).eval().requires_grad_(False)


def save_state(folder, state):
    """Replaces the saved state in one step: an interruption leaves the old one or the new one."""
    path = Path(folder) / STATE
    torch.save(state, f"{path}.new")
    os.replace(f"{path}.new", path)


def load_state(folder, device):
    """The saved state, or None."""
    path = Path(folder) / STATE
    return torch.load(path, map_location=device, weights_only=True) if path.exists() else None
