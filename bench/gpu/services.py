#!/usr/bin/env python3
"""The three services as processes on a GPU, in every mode, against the target alone on the CPU: token ids and rates.

    python3 bench/gpu/services.py --bin target/release --device cuda:0 --draft-device cuda:1

Greedy, the bundled pair. Text on a GPU may leave the CPU's at a near tie (ARCHITECTURE.md); what must be equal on the
GPU is dense, exact and the target alone. Prints Markdown.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["README.md", "ARCHITECTURE.md", "docs/method.md"]
LENGTHS = [400, 4000, 20000]
NEW_TOKENS = 96


def main():
    args = parser().parse_args()
    bin_ = Path(args.bin)
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    prompts = write_prompts(work, args.lengths)
    alone = ["--device", "cpu", "--mode", "dense", "--no-draft"]
    on_cpu = {name: generate(bin_, file, alone) for name, file in prompts}
    services = start(bin_, args.device, args.draft_device or args.device, work)
    try:
        report(bin_, services[0], prompts, on_cpu)
    finally:
        for process in services[1]:
            process.terminate()
        for process in services[1]:
            process.wait(30)


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--bin", default=str(ROOT / "target/release"), help="folder of the programs")
    p.add_argument("--device", default="cuda:0", help="where the verify worker runs")
    p.add_argument("--draft-device", help="where the draft worker runs [default: where the verify worker does]")
    p.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="characters of the prompts")
    p.add_argument("--work", default="/tmp/specattn-services", help="folder for logs and prompts")
    return p


def write_prompts(work, lengths):
    prompts = []
    for text in TEXTS:
        whole = (ROOT / text).read_text() if (ROOT / text).exists() else ""
        for length in lengths:
            if len(whole) >= length:
                file = work / f"{Path(text).stem}-{length}.txt"
                file.write_text(whole[:length])
                prompts.append((file.stem, file))
    return prompts


def generate(bin_, file, extra):
    line = [bin_ / "specattn", "generate", "--prompt-file", file, "--json", "-n", str(NEW_TOKENS), "--ignore-eos", *extra]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        print(f"FAILED: {' '.join(map(str, line))}\n{done.stderr}")
        return None
    return json.loads(done.stdout)


def start(bin_, device, draft_device, work):
    """Starts the services and waits until both workers have registered; the gateway's URL and the processes."""
    target, draft = ROOT / "models/target", ROOT / "models/draft"
    processes = []

    def spawn(name, *line):
        log = open(work / f"{name}.log", "w")
        processes.append(subprocess.Popen([bin_ / name, *line], stdout=log, stderr=log))

    url = "http://127.0.0.1:7461"
    spawn("specattn-gateway", "--tokenizer", target, "--listen", "127.0.0.1:7461")
    for name, model, port, on in [("specattn-verify", target, 7462, device), ("specattn-draft", draft, 7463, draft_device)]:
        spawn(name, "--model", model, "--device", on, "--gateway", url, "--listen", f"127.0.0.1:{port}")
    for _ in range(240):
        time.sleep(0.5)
        status = subprocess.run([bin_ / "specattn", "status", "--gateway", url, "--json"], capture_output=True, text=True)
        if status.returncode == 0 and len(re.findall(r'"role"', status.stdout)) >= 2:
            return url, processes
        if any(process.poll() is not None for process in processes):
            break
    for log in sorted(work.glob("*.log")):
        print(f"--- {log.name}\n{log.read_text()[-2000:]}")
    sys.exit("the services did not start")


MODES = [
    ("alone", ["--mode", "dense", "--no-draft"]),
    ("dense", ["--mode", "dense", "--draft-length", "4"]),
    ("exact", ["--mode", "exact"]),
    ("sparse", ["--mode", "sparse"]),
    ("sparse, every step captured", ["--mode", "sparse", "--capture-every", "1"]),
]


def report(bin_, url, prompts, on_cpu):
    print("| prompt | tokens | mode | equal to the CPU's | to the GPU's alone | tokens/s | tokens per forward | accepted | KV kept |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, file in prompts:
        alone = None
        for mode, flags in MODES:
            out = generate(bin_, file, ["--gateway", url, *flags])
            if out is None:
                print(f"| {name} | | {mode} | FAILED | | | | | |")
                continue
            ids = out["token_ids"]
            alone = alone or ids
            stats = out.get("stats", out)
            cells = [rate(stats, key) for key in ("tokens_per_second", "tokens_per_forward", "acceptance", "kv_kept_fraction")]
            cpu = on_cpu[name]["token_ids"] if on_cpu[name] else []
            print(f"| {name} | {out['usage']['prompt_tokens']} | {mode} | {same(ids, cpu)} | {same(ids, alone)} | {' | '.join(cells)} |", flush=True)


def rate(stats, key):
    value = stats.get(key)
    return "" if value is None else f"{value:.3g}"


def same(ids, others):
    first = next((i for i, (a, b) in enumerate(zip(ids, others)) if a != b), None)
    return "all" if first is None and len(ids) == len(others) else f"first {first}"


if __name__ == "__main__":
    main()
