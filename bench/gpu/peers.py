#!/usr/bin/env python3
"""What PyTorch takes for the work of `gpu time`: SDPA dense, gather + SDPA sparse, causal prefill, top-p by sorting.

    python3 bench/gpu/peers.py

Same shapes, bf16, medians of 30 runs after 5, inputs rotated past the L2 cache. Eager, as a user would call them, and in
a captured graph, which spares the launches. Run it beside `gpu time` and compare within that run. Prints Markdown.
"""

import torch
from torch.nn.attention.bias import causal_lower_right

RUNS, WARM_UP, PER_GRAPH = 30, 5, 10
ROTATED_BYTES = 200 << 20
KEPT = 0.216
SHAPES = [(32, 32, 1, 4096), (32, 32, 1, 16384), (32, 32, 1, 32768), (32, 32, 8, 4096), (32, 8, 1, 4096), (32, 8, 1, 32768),
          (32, 8, 8, 4096), (32, 8, 8, 16384), (32, 8, 8, 32768)]


def median_us(work):
    times = []
    for run in range(WARM_UP + RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work(run)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return sorted(times[WARM_UP:])[RUNS // 2]


def in_graph_us(work):
    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            work(0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(PER_GRAPH):
                work(i)
        return median_us(lambda _: graph.replay()) / PER_GRAPH
    except Exception:
        torch.cuda.synchronize()
        return float("nan")


def attend(q, k, v, bias):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=q.shape[1] != k.shape[1])


def attention(tokens):
    print(f"\nAttention, {tokens} tokens per sequence, head_dim 128, bf16; one list per sequence keeps 21.6 %.\n")
    print("| heads q/kv | batch | context | SDPA dense µs | in graph | gather + SDPA µs | in graph |\n| --- | --- | --- | --- | --- | --- | --- |")
    for heads, kv_heads, batch, context in SHAPES:
        new = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        one = 2 * batch * kv_heads * (context + tokens) * 128 * 2
        sets = max(1, min(8, ROTATED_BYTES // one))
        kv = [(new(batch, kv_heads, context + tokens, 128), new(batch, kv_heads, context + tokens, 128)) for _ in range(sets)]
        q = new(batch, heads, tokens, 128)
        kept = int(context * KEPT)
        lists = torch.stack([torch.randperm(context, device="cuda")[:kept].sort().values for _ in range(batch)])
        own = torch.arange(context, context + tokens, device="cuda").expand(batch, tokens)
        index = torch.cat([lists, own], 1)[:, None, :, None].expand(batch, kv_heads, kept + tokens, 128)
        full, few = causal_lower_right(tokens, context + tokens), causal_lower_right(tokens, kept + tokens)

        def dense(i):
            k, v = kv[i % sets]
            return attend(q, k, v, full)

        def sparse(i):
            k, v = kv[i % sets]
            return attend(q, k.gather(2, index), v.gather(2, index), few)

        cells = []
        for work in (dense, sparse):
            try:
                cells.append(f"{median_us(work):.1f} | {in_graph_us(work):.1f}")
            except Exception as error:
                cells.append(f"{type(error).__name__} | ")
        print(f"| {heads}/{kv_heads} | {batch} | {context} | {' | '.join(cells)} |", flush=True)


def prefill():
    print("\nPrefill, causal, bf16: operations of the unmasked half only.\n")
    print("| heads q/kv | head_dim | tokens | µs | TFLOP/s |\n| --- | --- | --- | --- | --- |")
    for heads, kv_heads, dim in [(32, 32, 128), (32, 8, 128), (32, 8, 64), (16, 8, 256)]:
        new = lambda h: torch.randn(1, h, 8192, dim, device="cuda", dtype=torch.bfloat16)
        q, k, v = new(heads), new(kv_heads), new(kv_heads)
        run = lambda _: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
        us = median_us(run)
        operations = 4 * heads * dim * 8192 * 8193 / 2
        print(f"| {heads}/{kv_heads} | {dim} | 8192 | {us:.0f} | {operations / us * 1e-6:.0f} |", flush=True)


def top_p():
    print("\nTop-p by sorting, p 0.95.\n\n| rows × n | µs |\n| --- | --- |")
    for rows, n in [(32, 4096), (32, 32768), (704, 4096), (704, 32768)]:
        probs = torch.softmax(2 * torch.randn(rows, n, device="cuda"), -1)

        def select(_):
            ordered, order = probs.sort(-1, descending=True)
            before = ordered.cumsum(-1) - ordered
            return torch.zeros_like(probs, dtype=torch.bool).scatter_(1, order, before < 0.95)

        print(f"| {rows} × {n} | {median_us(select):.0f} |", flush=True)


if __name__ == "__main__":
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    with torch.inference_mode():
        for tokens in (5, 1):
            attention(tokens)
        prefill()
        top_p()
