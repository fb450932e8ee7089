#!/usr/bin/env python3
"""What PyTorch and FlashInfer take for the work of `gpu time`: attention dense and sparse, causal prefill, top-p.

    python3 bench/gpu/peers.py

PyTorch: SDPA, gather + SDPA, top-p by sorting. FlashInfer, where it is installed (`pip install flashinfer-python`): paged
attention, planned before the timing, single prefill, top_p_renorm_probs; it compiles what it needs first, with nvcc.
Same shapes, bf16, medians of 30 runs after 5, inputs rotated past the L2 cache. Eager, as a user would call them, and in
a captured graph, which spares the launches. Run it beside `gpu time` and compare within that run. Prints Markdown.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn.attention.bias import causal_lower_right

try:
    import flashinfer
except Exception as error:
    flashinfer, why_not = None, error

RUNS, WARM_UP, PER_GRAPH = 30, 5, 10
ROTATED_BYTES = 200 << 20
KEPT = 0.216
PAGE = 64
KINDS = ["fa2", "fa3", "decode"]
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


def cell(prepare, digits=1):
    try:
        work = prepare()
        return f"{median_us(work):.{digits}f} | {in_graph_us(work):.{digits}f}"
    except Exception as error:
        return f"{type(error).__name__} | "


def header(*names):
    print(f"| {' | '.join(names)} |\n{'| --- ' * len(names)}|")


def new(*shape):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def rotated(batch, kv_heads, rows, *shape):
    one = 2 * batch * kv_heads * rows * 128 * 2
    return [(new(*shape), new(*shape)) for _ in range(max(1, min(8, ROTATED_BYTES // one)))]


def kept_positions(batch, context, tokens):
    lists = torch.stack([torch.randperm(context, device="cuda")[: int(context * KEPT)].sort().values for _ in range(batch)])
    return torch.cat([lists, torch.arange(context, context + tokens, device="cuda").expand(batch, tokens)], 1)


def attend(q, k, v, bias):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=q.shape[1] != k.shape[1])


def attention(tokens):
    print(f"\nAttention, {tokens} tokens per sequence, head_dim 128, bf16; one list per sequence keeps 21.6 %.\n")
    header("heads q/kv", "batch", "context", "SDPA dense µs", "in graph", "gather + SDPA µs", "in graph")
    for heads, kv_heads, batch, context in SHAPES:
        kv = rotated(batch, kv_heads, context + tokens, batch, kv_heads, context + tokens, 128)
        q = new(batch, heads, tokens, 128)
        kept = kept_positions(batch, context, tokens)
        index = kept[:, None, :, None].expand(-1, kv_heads, -1, 128)
        full, few = causal_lower_right(tokens, context + tokens), causal_lower_right(tokens, kept.shape[1])

        def dense(i):
            k, v = kv[i % len(kv)]
            return attend(q, k, v, full)

        def sparse(i):
            k, v = kv[i % len(kv)]
            return attend(q, k.gather(2, index), v.gather(2, index), few)

        print(f"| {heads}/{kv_heads} | {batch} | {context} | {cell(lambda: dense)} | {cell(lambda: sparse)} |", flush=True)


def planned(kind, workspace, tokens, heads, kv_heads, lists, page, rows):
    """A wrapper of FlashInfer that reads `rows` rows a sequence from the pages in its list."""
    batch, pages = lists.shape
    starts = torch.arange(batch + 1, device="cuda", dtype=torch.int32)
    last = torch.full((batch,), (rows - 1) % page + 1, device="cuda", dtype=torch.int32)
    paging = (starts * pages, lists.int().flatten(), last, heads, kv_heads, 128, page)
    types = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    if kind == "decode":
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, use_tensor_cores=heads != kv_heads)
        wrapper.plan(*paging, **types)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, backend=kind)
        wrapper.plan(starts * tokens, *paging, causal=True, **types)
    return wrapper


def compiled(kinds):
    """Has FlashInfer compile all that the tables need, side by side; names those of the kinds of paged attention that work."""
    begun = time.perf_counter()

    def paged(kind):
        workspace, kv = torch.zeros(128 << 20, device="cuda", dtype=torch.uint8), new(1, PAGE, 8, 128)
        first = torch.zeros(1, 1, device="cuda")
        planned(kind, workspace, 1, 8, 8, first, PAGE, 1).run(new(1, 8, 128), (kv, kv))
        torch.cuda.synchronize()

    def single(dim):
        flashinfer.single_prefill_with_kv_cache(new(PAGE, 8, dim), new(PAGE, 8, dim), new(PAGE, 8, dim), causal=True)

    kinds = [kind for kind in kinds if kind != "fa3" or torch.cuda.get_device_capability()[0] == 9]
    with ThreadPoolExecutor() as pool:
        attempts = {kind: pool.submit(paged, kind) for kind in kinds}
        attempts |= {f"prefill of head_dim {dim}": pool.submit(single, dim) for dim in (64, 128, 256)}
        attempts["top-p"] = pool.submit(flashinfer.sampling.top_p_renorm_probs, torch.full((1, 8), 0.125, device="cuda"), 0.95)
    torch.cuda.synchronize()
    print(f"\nFlashInfer {flashinfer.__version__} was ready after {time.perf_counter() - begun:.1f} s, compiling what no cache had.")
    errors = {name: attempt.exception() for name, attempt in attempts.items() if attempt.exception()}
    for name, error in errors.items():
        print(f"Its {name} does not work here: {type(error).__name__}: {str(error)[:300]}")
    return [kind for kind in kinds if kind not in errors]


def paged_attention(tokens, kinds):
    print(f"\nThe same by FlashInfer: dense in shuffled pages of {PAGE} rows, sparse in pages of one row.\n")
    columns = [name for kind in kinds for what in ("dense", "sparse") for name in (f"{kind} {what} µs", "in graph")]
    header("heads q/kv", "batch", "context", *columns)
    workspace = torch.zeros(128 << 20, device="cuda", dtype=torch.uint8)
    for heads, kv_heads, batch, context in SHAPES:
        pages = -(-(context + tokens) // PAGE)
        kv = rotated(batch, kv_heads, context + tokens, batch * pages, PAGE, kv_heads, 128)
        q = new(batch * tokens, heads, 128)
        table = torch.randperm(batch * pages, device="cuda").view(batch, pages)
        kept = kept_positions(batch, context, tokens)
        kept = table.gather(1, kept // PAGE) * PAGE + kept % PAGE

        def prepare(kind, lists, page, rows):
            wrapper = planned(kind, workspace, tokens, heads, kv_heads, lists, page, rows)
            views = [(k.view(-1, page, kv_heads, 128), v.view(-1, page, kv_heads, 128)) for k, v in kv]
            return lambda i: wrapper.run(q, views[i % len(views)])

        cells = []
        for kind in kinds:
            cells.append(cell(lambda: prepare(kind, table, PAGE, context + tokens)))
            cells.append(cell(lambda: prepare(kind, kept, 1, kept.shape[1])))
        print(f"| {heads}/{kv_heads} | {batch} | {context} | {' | '.join(cells)} |", flush=True)


def prefill():
    print("\nPrefill, causal, bf16: operations of the unmasked half only.\n")
    header("heads q/kv", "head_dim", "tokens", "SDPA µs", "TFLOP/s", *["FlashInfer µs", "TFLOP/s"] * bool(flashinfer))
    for heads, kv_heads, dim in [(32, 32, 128), (32, 8, 128), (32, 8, 64), (16, 8, 256)]:
        q, k, v = new(1, heads, 8192, dim), new(1, kv_heads, 8192, dim), new(1, kv_heads, 8192, dim)
        rows = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]
        sdpa = lambda _: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
        single = lambda _: flashinfer.single_prefill_with_kv_cache(*rows, causal=True)
        operations = 4 * heads * dim * 8192 * 8193 / 2
        cells = []
        for work in [sdpa] + [single] * bool(flashinfer):
            try:
                us = median_us(work)
                cells.append(f"{us:.0f} | {operations / us * 1e-6:.0f}")
            except Exception as error:
                cells.append(f"{type(error).__name__} | ")
        print(f"| {heads}/{kv_heads} | {dim} | 8192 | {' | '.join(cells)} |", flush=True)


def top_p():
    print("\nTop-p, p 0.95.\n")
    header("rows × n", "by sorting µs", "in graph", *["top_p_renorm_probs µs", "in graph"] * bool(flashinfer))
    for rows, n in [(32, 4096), (32, 32768), (704, 4096), (704, 32768)]:
        probs = torch.softmax(2 * torch.randn(rows, n, device="cuda"), -1)

        def select(_):
            ordered, order = probs.sort(-1, descending=True)
            before = ordered.cumsum(-1) - ordered
            return torch.zeros_like(probs, dtype=torch.bool).scatter_(1, order, before < 0.95)

        renorm = lambda _: flashinfer.sampling.top_p_renorm_probs(probs, 0.95)
        cells = [cell(lambda: work, 0) for work in [select] + [renorm] * bool(flashinfer)]
        print(f"| {rows} × {n} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="FlashInfer's kinds of paged attention")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    with torch.inference_mode():
        if flashinfer:
            kinds = compiled(args.kinds)
        else:
            print(f"\nWithout FlashInfer: {why_not}.")
        for tokens in (5, 1):
            attention(tokens)
            if flashinfer:
                paged_attention(tokens, [kind for kind in kinds if tokens == 1 or kind != "decode"])
        prefill()
        top_p()
