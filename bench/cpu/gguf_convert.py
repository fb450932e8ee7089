"""Converts a Hugging Face checkpoint of the Llama architecture to GGUF, for llama.cpp.

    python gguf_convert.py CHECKPOINT OUT.gguf --type bf16|f16|f32

Matrices are stored in the given type, norms in f32, as llama.cpp's own converter does. Covers what the bundled pair
needs: no rope scaling, no biases, one tokenizer.json with byte-level BPE.
"""

import argparse
import json
import pathlib
import sys

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OTHER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
}


def gguf_name(name):
    """The GGUF name of a Hugging Face tensor."""
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def interleave(weight, heads):
    """Reorders the rows of q or k from rotary halves (Hugging Face) to rotary pairs (GGUF's llama)."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def encode(weight, kind):
    """(array, GGUF type or None) as GGUFWriter.add_tensor takes them."""
    if weight.ndim == 1 or kind == "f32":
        return weight.float().numpy(), None
    if kind == "f16":
        return weight.to(torch.float16).numpy(), None
    bits = weight.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
    return bits.view(np.uint8), gguf.GGMLQuantizationType.BF16


def add_vocabulary(writer, folder, vocab_size):
    """The byte-level BPE of tokenizer.json; entries without a token become unused placeholders."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = [f"[UNUSED{i}]" for i in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for token, index in tokenizer["model"]["vocab"].items():
        tokens[index], types[index] = token, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)


def convert(folder, out, kind):
    """Writes `out`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "llama" or config.get("rope_scaling"):
        sys.exit("only the plain Llama architecture is covered")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads

    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_name(folder.resolve().name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    add_vocabulary(writer, folder, config["vocab_size"])

    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        state.update(load_file(file))
    for name, weight in state.items():
        if name.endswith("q_proj.weight"):
            weight = interleave(weight, heads)
        elif name.endswith("k_proj.weight"):
            weight = interleave(weight, kv_heads)
        data, dtype = encode(weight, kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=dtype)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description="Converts a Llama checkpoint to GGUF.")
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--type", choices=sorted(FILE_TYPES), default="bf16")
    args = parser.parse_args()
    convert(args.checkpoint, args.out, args.type)


if __name__ == "__main__":
    main()
