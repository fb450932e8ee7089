#!/usr/bin/env python3
"""Tokens/s of the services at Llama-3-8B and Llama-3.2-1B shapes, by which GPUs verify and draft worker run on.

    python3 bench/gpu/placements.py --bin target/release cuda:0/cuda:0 cuda:0/cuda:1 cuda:0,1/cuda:1

A placement is VERIFY/DRAFT. Weights are random, so the two models would never agree: requests bias a few tokens of the vocabulary by
+100, and what is drafted is accepted as often as two unrelated choices among those few agree. With one such token every draft is
accepted, the most that drafts can bring; with eight, sampled, two thirds or so. Prints Markdown.
"""

import argparse
import json
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
    print("| verify | draft | drafts | context | sessions | tokens/s | accepted | tokens per forward |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for placement in args.placements:
        verify, draft = placement.split("/")
        processes = start(Path(args.bin), verify, draft, work, args.verify_flags)
        try:
            for name, biased, temperature, drafted in LOADS:
                for sessions in args.sessions:
                    cells = measure(args, (biased, temperature, drafted), sessions)
                    print(f"| {verify} | {draft} | {name} | {args.context} | {sessions} | {cells} |", flush=True)
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
    p.add_argument("--verify-flags", nargs="*", default=[], help="more arguments of the verify worker")
    return p


def start(bin_, verify, draft, work, verify_flags):
    processes = []

    def spawn(name, *line):
        log = open(work / f"{name}.log", "w")
        processes.append(subprocess.Popen([bin_ / name, *map(str, line)], stdout=log, stderr=log))

    spawn("specattn-gateway", "--tokenizer", ROOT / "models/target", "--listen", f"127.0.0.1:{PORT}")
    common = ["--gateway", URL, "--no-prefix-sharing"]
    spawn("specattn-verify", "--random-weights", CONFIGS / "llama-3-8b.json", "--device", verify, "--kv-cache-mib", 16384,
          "--listen", f"127.0.0.1:{PORT + 1}", *common, *verify_flags)
    spawn("specattn-draft", "--random-weights", CONFIGS / "llama-3.2-1b.json", "--device", draft, "--kv-cache-mib", 8192,
          "--listen", f"127.0.0.1:{PORT + 2}", *common)
    for _ in range(240):
        time.sleep(0.5)
        status = subprocess.run([bin_ / "specattn", "status", "--gateway", URL, "--json"], capture_output=True, text=True)
        if status.returncode == 0 and status.stdout.count('"role"') >= 2:
            return processes
        if any(process.poll() is not None for process in processes):
            break
    for process in processes:
        process.terminate()
    for log in sorted(work.glob("*.log")):
        print(f"--- {log.name}\n{log.read_text()[-2000:]}")
    sys.exit("the services did not start")


def measure(args, load, sessions):
    """Rates are those after each session's first token."""
    results = [None] * sessions

    def run(index):
        try:
            results[index] = request(args, load, index)
        except Exception as error:
            results[index] = str(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(sessions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = [r for r in results if not isinstance(r, dict)]
    if failed:
        return f"FAILED: {failed[0]} | | "
    rate = sum(u["completion_tokens"] / (u["specattn"]["elapsed_seconds"] - u["specattn"]["ttft_seconds"]) for u in results)
    accepted = share(results, "accepted_tokens", "proposed_tokens")
    tokens = sum(u["completion_tokens"] for u in results)
    forwards = sum(u["specattn"]["target_forwards"] for u in results)
    return f"{rate:.0f} | {accepted} | {tokens / max(forwards, 1):.2f}"


def share(results, part, whole):
    parts, wholes = (sum(u["specattn"][key] for u in results) for key in (part, whole))
    return f"{parts / wholes:.2f}" if wholes else ""


def served_model():
    with urllib.request.urlopen(f"{URL}/v1/models", timeout=10) as answer:
        return json.load(answer)["data"][0]["id"]


def request(args, load, index):
    biased, temperature, drafted = load
    prompt = [(100 + 7919 * i + 31 * index) % 8000 for i in range(args.context)]
    body = {
        "model": served_model(),
        "prompt": prompt,
        "max_tokens": args.tokens,
        "ignore_eos": True,
        "temperature": temperature,
        "seed": index,
        "logit_bias": {str(1000 + 17 * i): 100 for i in range(biased)},
        "specattn": {"mode": "dense", "draft_length": drafted},
    }
    data = json.dumps(body).encode()
    call = urllib.request.Request(f"{URL}/v1/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=120) as answer:
        return json.load(answer)["usage"]


if __name__ == "__main__":
    main()
