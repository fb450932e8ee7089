"""llama.cpp as a worker, through llama-cpp-python's low-level API: plain decoding, or speculative with a draft model.

Speculation follows llama.cpp's own (common/speculative.cpp as its server uses it): the draft proposes its most probable
tokens, up to --draft-max, and stops early below --p-min; the target's sampler draws at every position and a proposal
stands while it equals what was drawn. Python's share per token is a few ctypes calls, some ten microseconds.
"""

import argparse
import ctypes
import pathlib

import llama_cpp as llama
import numpy as np

import worker

# A silent log; the reference must live as long as the library.
SILENT = llama.llama_log_callback(lambda level, text, data: None)


class Context:
    """A model with one sequence."""

    def __init__(self, path, args):
        self.model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        params = llama.llama_context_default_params()
        params.n_ctx = args.context
        params.n_batch = params.n_ubatch = args.batch
        params.n_threads = params.n_threads_batch = args.threads
        params.flash_attn_type = 1 if args.flash == "on" else 0
        params.type_k = params.type_v = {"f16": 1, "f32": 0, "bf16": 30}[args.kv_type]
        self.context = llama.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"llama.cpp cannot make a context for {path}")
        self.memory = llama.llama_get_memory(self.context)
        self.vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.capacity = args.batch
        self.batch = llama.llama_batch_init(args.batch, 0, 1)
        view = lambda pointer: np.ctypeslib.as_array(pointer, (args.batch,))
        self.token, self.pos, self.logits = map(view, (self.batch.token, self.batch.pos, self.batch.logits))
        view(self.batch.n_seq_id)[:] = 1
        for i in range(args.batch):
            self.batch.seq_id[i][0] = 0
        self.held = 0

    def decode(self, tokens, all_logits):
        """Appends tokens; logits of all of them or of the last."""
        count = len(tokens)
        self.batch.n_tokens = count
        self.token[:count] = tokens
        self.pos[:count] = np.arange(self.held, self.held + count)
        self.logits[:count] = all_logits
        self.logits[count - 1] = 1
        status = llama.llama_decode(self.context, self.batch)
        if status != 0:
            raise RuntimeError(f"llama_decode gave {status}")
        self.held += count

    def prefill(self, tokens):
        """Appends a prompt; logits of its last token."""
        for start in range(0, len(tokens), self.capacity):
            self.decode(tokens[start : start + self.capacity], 0)

    def truncate(self, length):
        """Forgets positions from `length` on."""
        if length < self.held:
            llama.llama_memory_seq_rm(self.memory, 0, length, -1)
            self.held = length

    def row(self, index):
        """Logits of the index-th token of the last batch; [vocab]."""
        return np.ctypeslib.as_array(llama.llama_get_logits_ith(self.context, index), (self.vocab_size,))


def sampler(temperature, seed):
    """llama.cpp's own sampler chain."""
    chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    if temperature > 0:
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_temp(temperature))
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_dist(seed))
    else:
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_greedy())
    return chain


def plain(target, request, run):
    """One token a forward."""
    chain = sampler(request["temperature"], request["seed"])
    target.truncate(0)
    target.prefill(request["prompt"])
    for _ in range(request["new_tokens"] - 1):
        token = llama.llama_sampler_sample(chain, target.context, -1)
        run.emit([token])
        target.decode([token], 1)
    run.emit([llama.llama_sampler_sample(chain, target.context, -1)])
    llama.llama_sampler_free(chain)


def propose(draft, tokens, args, most, greedy):
    """Up to `most` draft tokens after `tokens`, which the draft holds up to `draft.held`."""
    draft.decode(tokens[draft.held :], 0)
    proposal = []
    while True:
        token = llama.llama_sampler_sample(greedy, draft.context, -1)
        if args.p_min > 0:
            row = draft.row(-1)
            if 1.0 / np.exp(row - row[token]).sum() < args.p_min:
                return proposal
        proposal.append(token)
        if len(proposal) == most:
            return proposal
        draft.decode([token], 1)


def speculative(target, draft, greedy, args, request, run):
    """Rounds of draft and verification."""
    chain = sampler(request["temperature"], request["seed"])
    tokens = list(request["prompt"])
    limit = len(tokens) + request["new_tokens"]
    draft.truncate(0)
    draft.prefill(tokens)
    target.truncate(0)
    target.prefill(tokens)
    tokens.append(llama.llama_sampler_sample(chain, target.context, -1))
    run.emit(tokens[-1:])
    rounds = proposed = accepted = 0
    while len(tokens) < limit:
        most = min(args.draft_max, limit - len(tokens) - 1)
        proposal = propose(draft, tokens, args, most, greedy) if most > 0 else []
        target.decode(tokens[-1:] + proposal, 1)
        fresh = []
        for index in range(len(proposal) + 1):
            fresh.append(llama.llama_sampler_sample(chain, target.context, index))
            if index == len(proposal) or fresh[-1] != proposal[index]:
                break
        run.emit(fresh)
        tokens += fresh
        target.truncate(len(tokens) - 1)
        draft.truncate(len(tokens) - 1)
        rounds += 1
        proposed += len(proposal)
        accepted += len(fresh) - 1
    llama.llama_sampler_free(chain)
    run.stats = {"target_forwards": rounds, "proposed_tokens": proposed, "accepted_tokens": accepted}


def main():
    parser = argparse.ArgumentParser(description="llama.cpp worker of run.py.")
    parser.add_argument("--target", type=pathlib.Path, required=True, help="GGUF file")
    parser.add_argument("--draft", type=pathlib.Path, help="GGUF file; without it, plain decoding")
    parser.add_argument("--draft-max", type=int, default=4)
    parser.add_argument("--p-min", type=float, default=0.0)
    parser.add_argument("--flash", choices=["on", "off"], default="on")
    parser.add_argument("--kv-type", choices=["f16", "bf16", "f32"], default="f16")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    llama.llama_log_set(SILENT, ctypes.c_void_p(0))
    llama.llama_backend_init()
    target = Context(args.target, args)
    draft = Context(args.draft, args) if args.draft else None
    greedy = sampler(0.0, 0)

    def generate(request, run):
        if draft:
            speculative(target, draft, greedy, args, request, run)
        else:
            plain(target, request, run)

    worker.serve(generate, {"baseline_rss_bytes": worker.BASELINE_RSS, "system": llama.llama_print_system_info().decode()})


if __name__ == "__main__":
    main()
