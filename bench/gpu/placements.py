#!/usr/bin/env python3
"""Tokens/s of the services at Llama-3-8B and a draft's shape (Llama-3.2-1B), by which GPUs verify and draft worker run on.

    python3 bench/gpu/placements.py --bin target/release cuda:0/cuda:0 cuda:0/cuda:1 cuda:0,1/cuda:1

A placement is serve:DEVICE, both models in one process of `specattn serve`, or VERIFY/DRAFT, processes of their own; of either there may be several workers, joined by +, as in cuda:0+cuda:1/cuda:2+cuda:3 (a comma splits one
worker over GPUs). Workers' busy shares are of the time in which requests run, and a step is the mean time of a forward of so many
sessions; with --share-prefixes every prompt is processed
beforehand, so that this is decoding alone. Weights are random, so the two models would never agree: requests bias a few tokens of the vocabulary by
+100, and what is drafted is accepted as often as two unrelated choices among those few agree. With one such token every draft is
accepted, the most that drafts can bring; with eight, sampled, two thirds or so. Prints Markdown.

The last column is the cost model's rate where every draft is accepted: a round is the draft's steps and then the target's forward,
each as long as its bytes (weights once, KV entries of the worker's sessions) take at --bandwidth.
"""

import argparse
import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "bench/gpu/configs"
PORT = 7471
URL = f"http://127.0.0.1:{PORT}"
# (name, biased tokens, temperature, tokens drafted)
LOADS = [
    ("no draft", 1, 0.0, 0),
    ("all accepted", 1, 0.0, 4),
    ("sampled from eight", 8, 1.0, 4),
]


def main():
    args = parser().parse_args()
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    columns = "verify | draft | drafts | context | sessions | tokens/s | accepted | tokens per forward | verify busy | verify step | draft busy | draft step | model"
    print(f"| {columns} |\n|{' --- |' * len(columns.split('|'))}")
    for placement in args.placements:
        if placement.startswith("serve:"):
            verify = draft = [placement.removeprefix("serve:")]
            processes = serve(args, verify[0], work)
            sides = [(), ()]
        else:
            verify, draft = (side.split("+") for side in placement.split("/"))
            processes = start(args, verify, draft, work)
            sides = [verify_ports(len(verify)), draft_ports(len(draft))]
        try:
            for name, biased, temperature, drafted in LOADS:
                if args.loads and name not in args.loads:
                    continue
                for sessions in args.sessions:
                    load = (biased, temperature, drafted)
                    cells = measure(args, load, sessions, (len(verify), len(draft)), sides)
                    row = f"{'+'.join(verify)}{' together' * (not sides[0])} | {'+'.join(draft)} | {name} | {args.context} | {sessions} | {cells}"
                    print(f"| {row} |", flush=True)
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(30)


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("placements", nargs="+", metavar="VERIFY/DRAFT", help="devices of the two workers")
    p.add_argument("--bin", default=str(ROOT / "target/release"), help="folder of the programs")
    p.add_argument("--work", default="/tmp/specattn-placements", help="folder for logs")
    p.add_argument("--context", type=int, default=8000, help="tokens of each prompt")
    p.add_argument("--tokens", type=int, default=400, help="tokens of each completion")
    p.add_argument("--sessions", type=int, nargs="+", default=[1, 4], help="requests at a time")
    p.add_argument("--loads", nargs="+", choices=[load[0] for load in LOADS], help="some of the loads only")
    p.add_argument("--kv-mib", type=int, default=16384, help="KV memory of each verify worker")
    p.add_argument("--draft-kv-mib", type=int, default=8192, help="KV memory of each draft worker")
    p.add_argument("--draft-shape", default="llama-3.2-1b.json", help="the draft's shape, a file of configs/")
    p.add_argument("--timeline", action="store_true", help="let workers log their forwards, for timeline.py")
    p.add_argument("--share-prefixes", action="store_true", help="process prompts before the clock starts")
    p.add_argument("--warm-up", type=int, default=64,
                   help="tokens of the requests that do: enough for drafts to have joined and processed the prompts too")
    p.add_argument("--bandwidth", type=float, default=2.9, help="copy bandwidth of one GPU for the cost model, TB/s")
    p.add_argument("--mode", choices=["dense", "sparse", "exact"], default="dense", help="mode of the requests")
    p.add_argument("--mask-p", type=float, help="mass that masks keep; random weights attend evenly, so this is about the share of entries kept")
    p.add_argument("--own-p", type=float, help="mass that the draft's own reads keep, between its captured steps; as for --mask-p")
    p.add_argument("--draft-flags", nargs="*", default=[], help="more arguments of the draft workers, in one word each: --own-p=0.2")
    p.add_argument("--serve-flags", nargs="*", default=[], help="more arguments of specattn serve, in one word: --serve-flags=--io-threads=4")
    p.add_argument("--verify-flags", nargs="*", default=[], help="more arguments of the verify worker")
    return p


def serve(args, device, work):
    line = ["serve", "--random-weights", CONFIGS / "llama-3-8b.json", "--random-draft-weights", CONFIGS / args.draft_shape,
            "--device", device, "--kv-cache-mib", args.kv_mib, "--draft-kv-cache-mib", args.draft_kv_mib]
    if not args.share_prefixes:
        line.append("--no-prefix-sharing")
    line += logging(args) + args.serve_flags
    processes = []
    spawn(args, work, processes, "specattn", PORT, *line)
    wait(args, work, processes, 2)
    return processes


def start(args, verify, draft, work):
    processes = []

    def worker(*line):
        spawn(args, work, processes, *line)

    worker("specattn-gateway", PORT, "--tokenizer", ROOT / "models/target")
    common = ["--gateway", URL] + ([] if args.share_prefixes else ["--no-prefix-sharing"])
    common += logging(args)
    for port, device in zip(verify_ports(len(verify)), verify):
        worker("specattn-verify", port, "--random-weights", CONFIGS / "llama-3-8b.json", "--device", device, "--kv-cache-mib", args.kv_mib,
              *common, *args.verify_flags)
    for port, device in zip(draft_ports(len(draft)), draft):
        worker("specattn-draft", port, "--random-weights", CONFIGS / args.draft_shape, "--device", device, "--kv-cache-mib", args.draft_kv_mib,
              *common, *args.draft_flags)
    wait(args, work, processes, len(verify) + len(draft))
    return processes


def logging(args):
    return ["--log-json", "--log-level", "info,specattn_worker::scheduler=trace"] if args.timeline else []


def spawn(args, work, processes, name, port, *line):
    log = open(work / f"{name}-{port}.log", "w")
    line = [*line, "--listen", f"127.0.0.1:{port}"]
    processes.append(subprocess.Popen([Path(args.bin) / name, *map(str, line)], stdout=log, stderr=log))


def wait(args, work, processes, workers):
    for _ in range(240):
        time.sleep(0.5)
        status = subprocess.run([Path(args.bin) / "specattn", "status", "--gateway", URL, "--json"], capture_output=True, text=True)
        if status.returncode == 0 and status.stdout.count('"role"') >= workers:
            return
        if any(process.poll() is not None for process in processes):
            break
    for process in processes:
        process.terminate()
    for log in sorted(work.glob("*.log")):
        print(f"--- {log.name}\n{log.read_text()[-2000:]}")
    sys.exit("the services did not start")


def verify_ports(count):
    return range(PORT + 1, PORT + 1 + count)


def draft_ports(count):
    return range(PORT + 21, PORT + 21 + count)


def measure(args, load, sessions, workers, ports):
    """Rates are all tokens over the time from the first session's first token to the last one's end."""
    if args.share_prefixes:
        every(sessions, lambda index: request(args, load, index, args.warm_up))
    before = [work(side) for side in ports]
    start = time.monotonic()
    results = every(sessions, lambda index: request(args, load, index, args.tokens))
    took = time.monotonic() - start
    after = [work(side) for side in ports]
    failed = [r for r in results if not isinstance(r, dict)]
    if failed:
        return f"FAILED: {failed[0]} | | | | | | | "
    rate = sum(u["completion_tokens"] for u in results) / (took - min(u["specattn"]["ttft_seconds"] for u in results))
    accepted = share(results, "accepted_tokens", "proposed_tokens")
    tokens = sum(u["completion_tokens"] for u in results)
    forwards = sum(u["specattn"]["target_forwards"] for u in results)
    sides = [spent(*side, took) for side in zip(after, before)]
    model = modelled(args, load, sessions, workers)
    return f"{rate:.0f} | {accepted} | {tokens / max(forwards, 1):.2f} | {sides[0]} | {sides[1]} | {model}"


def every(sessions, call):
    results = [None] * sessions

    def run(index):
        try:
            results[index] = call(index)
        except Exception as error:
            results[index] = str(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(sessions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def work(ports):
    """Of each worker: seconds spent in forwards; seconds and number of generating ones; sessions in them."""

    def of(port):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        names = ["busy_seconds_total", "forward_duration_seconds_sum", "forward_duration_seconds_count", "batch_sessions_sum"]
        return [float(re.search(rf"^\w*{name}(?:{{.*}})? (\S+)", text, re.MULTILINE)[1]) for name in names]

    return [of(port) for port in ports]


def spent(after, before, took):
    """Busy shares and mean steps of the workers of one side."""
    shares, steps = [], []
    for worker in zip(after, before):
        busy, seconds, count, sessions = (a - b for a, b in zip(*worker))
        shares.append(f"{busy / took:.2f}")
        steps.append(f"{seconds / count * 1e3:.1f} ms of {sessions / count:.1f}" if count else "none")
    return f"{', '.join(shares)} | {', '.join(steps)}"


def modelled(args, load, sessions, workers):
    """Tokens/s by bytes alone, every draft accepted."""
    biased, _, drafted = load
    if biased > 1:
        return ""

    def seconds(config, share):
        shape = json.loads((CONFIGS / config).read_text())
        width, layers, kv = shape["hidden_size"], shape["num_hidden_layers"], shape["num_key_value_heads"] * shape["head_dim"]
        q = shape["num_attention_heads"] * shape["head_dim"]
        weights = layers * width * (2 * q + 2 * kv + 3 * shape["intermediate_size"]) + shape["vocab_size"] * width
        entries = share * (args.context + args.tokens / 2) * layers * 2 * kv
        return 2 * (weights + entries) / (args.bandwidth * 1e12)

    verify, draft = workers
    round_ = seconds("llama-3-8b.json", sessions / verify) + drafted * seconds(args.draft_shape, sessions / draft)
    return f"{sessions * (drafted + 1) / round_:.0f}"


def share(results, part, whole):
    parts, wholes = (sum(u["specattn"][key] for u in results) for key in (part, whole))
    return f"{parts / wholes:.2f}" if wholes else ""


def served_model():
    with urllib.request.urlopen(f"{URL}/v1/models", timeout=10) as answer:
        return json.load(answer)["data"][0]["id"]


def request(args, load, index, tokens):
    biased, temperature, drafted = load
    prompt = [(100 + 7919 * i + 31 * index) % 8000 for i in range(args.context)]
    body = {
        "model": served_model(),
        "prompt": prompt,
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": temperature,
        "seed": index,
        "logit_bias": {str(1000 + 17 * i): 100 for i in range(biased)},
        "specattn": {"mode": args.mode, "draft_length": drafted} | {key: p for key in ("mask_p", "own_p") if (p := getattr(args, key))},
    }
    data = json.dumps(body).encode()
    call = urllib.request.Request(f"{URL}/v1/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=120) as answer:
        return json.load(answer)["usage"]


if __name__ == "__main__":
    main()
