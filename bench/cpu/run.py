"""Decoding, prefill and memory of SpecAttn beside llama.cpp and transformers: same machine, same prompts, same run.

    python run.py --binary ../../target/release/specattn --text BOOK.txt ... --out results

README.md beside this file states the rules. Writes OUT.json (every single run) and OUT.md (medians and ranges).
"""

import argparse
import datetime
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import threading
import time

from tokenizers import Tokenizer

import configurations
import gguf_convert
import report
from worker import prompt_hash

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent


class Worker:
    """A running configuration."""

    def __init__(self, configuration, timeout_s, log):
        self.configuration = configuration
        self.timeout_s = timeout_s
        self.process = subprocess.Popen(
            configuration.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=HERE
        )
        line = self.answer()
        if "ready" not in line:
            raise RuntimeError(f"{configuration.name} did not start: {line.get('error')}")
        self.ready = line["ready"]

    def answer(self):
        """The next line, or an error where the process ends or takes too long."""
        timer = threading.Timer(self.timeout_s, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if not line:
            return {"error": f"the process ended with {self.process.wait()}, or took over {self.timeout_s} s"}
        return json.loads(line)

    def ask(self, request):
        """Runs a request; the answer must be about the same token ids and of the length asked for."""
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return {"error": "the process is gone"}
        result = self.answer()
        if "error" not in result:
            if result["prompt_hash"] != prompt_hash(request["prompt"]):
                return {"error": "the worker saw other token ids"}
            if len(result["tokens"]) != request["new_tokens"]:
                return {"error": f"{len(result['tokens'])} tokens instead of {request['new_tokens']}"}
        return result

    def pids(self):
        """The processes that do the work."""
        server = self.ready.get("server_pid")
        return [self.process.pid, server] if server else [self.process.pid]

    def ask_undisturbed(self, request, most, retries):
        """Runs a request, again while others used more than `most` of the machine; the least disturbed run counts."""
        best = None
        for _ in range(1 + retries):
            disturbance = Disturbance(self.pids())
            result = self.ask(request)
            if "error" in result:
                return result
            result["disturbance"] = disturbance.share()
            if best is None or result["disturbance"] < best["disturbance"]:
                best = result
            if best["disturbance"] <= most:
                break
            time.sleep(2)
        return best

    def stop(self):
        """Ends the process by closing its input."""
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Progress:
    """A line with the time left, from what each kind of run took last time."""

    def __init__(self, total):
        self.total, self.done = total, 0
        self.took = {}
        self.printed = 0.0

    def note(self, key, seconds, left):
        """`left`: keys of the runs still to come in this phase."""
        self.done += 1
        self.took[key] = seconds
        mean = sum(self.took.values()) / len(self.took)
        remaining = sum(self.took.get(other, mean) for other in left)
        now = time.monotonic()
        if sys.stderr.isatty() or now - self.printed > 15 or not left:
            end = "\r" if sys.stderr.isatty() else "\n"
            text = f"run {self.done} of {self.total}, {datetime.timedelta(seconds=round(remaining))} left: {key[0]}, {key[1]}"
            print(f"{text:110}", file=sys.stderr, end=end, flush=True)
            self.printed = now


def machine_times():
    """(all, idle) processor seconds of the machine so far."""
    tick = os.sysconf("SC_CLK_TCK")
    values = list(map(int, pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]))
    return sum(values) / tick, (values[3] + values[4]) / tick


def process_time(pid):
    """Processor seconds of a process so far, all its threads."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Disturbance:
    """How much of the machine others used while something was measured: a share of all its cores."""

    def __init__(self, pids):
        self.pids = [os.getpid(), *pids]
        self.start = self.now()

    def now(self):
        own = sum(process_time(pid) for pid in self.pids)
        return (*machine_times(), own)

    def share(self):
        everything, idle, own = (after - before for after, before in zip(self.now(), self.start))
        return max(0.0, (everything - idle - own) / everything) if everything > 0 else 0.0


def machine():
    """What the figures were taken on."""
    info = pathlib.Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*:\s*(.*)", info)
    flags = re.search(r"flags\s*:\s*(.*)", info)
    known = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "cpu": model.group(1) if model else "unknown",
        "cores": os.cpu_count(),
        "flags": [flag for flag in known if flags and f" {flag} " in f" {flags.group(1)} "],
        "kernel": os.uname().release,
        "load_average": os.getloadavg(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def prompts(args, tokenizer):
    """{(pass, length): token ids}: another text each pass, the same for every configuration."""
    chosen = {}
    lengths = sorted({*args.lengths, *args.prefill})
    for index in range(args.tuning_passes + args.passes):
        path = args.text[index % len(args.text)]
        text = path.read_text(encoding="utf-8")
        # A different place each time the list of texts comes round.
        start = text.find("\n\n", (index // len(args.text) + 1) * len(text) // 8) + 2
        ids = tokenizer.encode(text[start : start + max(lengths) * 8 + 1000].strip()).ids
        if len(ids) < max(lengths):
            sys.exit(f"{path} is too short for a prompt of {max(lengths)} tokens")
        for length in lengths:
            chosen[index, length] = ids[:length]
    return chosen


def cells(args):
    """(name, kind, prompt length, new tokens, temperature) of everything measured."""
    for length in args.lengths:
        yield f"sampled {length}", "decode", length, args.new_tokens, args.temperature
    for length in args.lengths if args.greedy else ():
        yield f"greedy {length}", "decode", length, args.new_tokens, 0.0
    for length in args.prefill:
        yield f"prefill {length}", "prefill", length, 1, 0.0


def finalists(records, chosen, keep):
    """{cell: configurations}: the `keep` fastest of each group in the tuning passes."""
    kept = {}
    by_cell = {}
    for record in records:
        by_cell.setdefault((record["cell"], record["group"]), {}).setdefault(record["configuration"], []).append(
            report.speed(record)
        )
    for (cell, _), rates in by_cell.items():
        best = sorted(rates, key=lambda name: -report.median(rates[name]))[:keep]
        kept.setdefault(cell, []).extend(c for c in chosen if c.name in best)
    return kept


def measure(args, chosen, log):
    """(records, failures, description)."""
    texts = prompts(args, Tokenizer.from_file(str(args.target / "tokenizer.json")))
    table = list(cells(args))
    workers, failures = {}, []
    for configuration in chosen:
        print(f"starting {configuration.name:70}", file=sys.stderr, end="\r", flush=True)
        try:
            started = Worker(configuration, args.timeout, log)
        except RuntimeError as error:
            failures.append({"configuration": configuration.name, "error": str(error)})
            continue
        workers[configuration.name] = started
        # Twice: pages, caches and threads of both the short and the long path.
        for length in (64, 600):
            warm = texts[0, max(args.lengths)][:length]
            started.ask({"prompt": warm, "new_tokens": 16, "temperature": args.temperature, "seed": 0})
    chosen = [c for c in chosen if c.name in workers]

    def matches(cell, configuration):
        return cell[1] == "decode" or configuration.group in configurations.PLAIN

    everything = {cell[0]: [c for c in chosen if matches(cell, c)] for cell in table}
    runs_per_pass = sum(map(len, everything.values()))
    progress = Progress(args.tuning_passes * runs_per_pass)
    shuffle = random.Random(args.seed)
    records = []
    allowed = everything
    for index in range(args.tuning_passes + args.passes):
        tuning = index < args.tuning_passes
        if index == args.tuning_passes:
            if args.tuning_passes:
                allowed = finalists(records, chosen, args.keep)
            per_pass = sum(len(allowed.get(cell[0], [])) for cell in table)
            progress.total = progress.done + args.passes * per_pass
        queue = [(cell, c) for cell in table for c in allowed.get(cell[0], [])]
        shuffle.shuffle(queue)
        keys = [(c.name, cell[0]) for cell, c in queue]
        last_of_phase = args.tuning_passes if tuning else args.tuning_passes + args.passes
        later = keys * (last_of_phase - index - 1)
        for at, (cell, configuration) in enumerate(queue):
            name, kind, length, new_tokens, temperature = cell
            request = {
                "prompt": texts[index, length],
                "new_tokens": new_tokens,
                "temperature": temperature,
                "seed": args.seed + index,
            }
            begun = time.monotonic()
            result = workers[configuration.name].ask_undisturbed(request, args.disturbance, args.retries)
            entry = {
                "configuration": configuration.name, "group": configuration.group, "cell": name, "kind": kind,
                "pass": index, "tuning": tuning, "prompt_tokens": length, "new_tokens": new_tokens,
            }
            (failures if "error" in result else records).append({**entry, **result})
            progress.note((configuration.name, name), time.monotonic() - begun, keys[at + 1 :] + later)
    for started in workers.values():
        started.stop()
    description = {
        "machine": machine(),
        "engines": {name: started.ready for name, started in workers.items()},
        "texts": [path.name for path in args.text],
        "prompts": {f"pass {i}, {n} tokens": prompt_hash(ids) for (i, n), ids in texts.items()},
    }
    return records, failures, description


def convert_weights(args):
    """Writes the GGUF files that are not there yet."""
    args.gguf.mkdir(parents=True, exist_ok=True)
    for role, folder in (("target", args.target), ("draft", args.draft)):
        for kind in sorted({*args.weight_types, *args.speculative_types}):
            out = args.gguf / f"{role}-{kind}.gguf"
            if not out.exists():
                gguf_convert.convert(folder, out, kind)


def arguments():
    parser = argparse.ArgumentParser(description="SpecAttn beside llama.cpp and transformers on one CPU.")
    path = pathlib.Path
    parser.add_argument("--text", type=path, nargs="+", required=True, help="text files to take prompts from")
    parser.add_argument("--target", type=path, default=ROOT / "models" / "target")
    parser.add_argument("--draft", type=path, default=ROOT / "models" / "draft")
    parser.add_argument("--binary", type=path, default=ROOT / "target" / "release" / "specattn")
    parser.add_argument("--proto", type=path, default=ROOT / "proto")
    parser.add_argument("--serve-args", default="", help="more arguments for `specattn serve`")
    parser.add_argument("--gguf", type=path, default=path("/tmp/specattn-bench-gguf"), help="where to keep GGUF files")
    parser.add_argument("--out", type=path, default=path("cpu"), help="results go to OUT.json and OUT.md")
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 1000, 6000], help="prompt tokens")
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 4096], help="prompt tokens")
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--no-greedy", dest="greedy", action="store_false")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--tuning-passes", type=int, default=1, help="passes over everything, to choose; not reported")
    parser.add_argument("--keep", type=int, default=2, help="configurations of each group and cell kept after tuning")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--timeout", type=float, default=300, help="seconds a single run may take")
    parser.add_argument("--disturbance", type=float, default=0.05, help="share of the machine others may use in a run")
    parser.add_argument("--retries", type=int, default=2, help="how often a run disturbed by others is repeated")
    parser.add_argument("--only", default="", help="regular expression: configurations to run")
    parser.add_argument("--draft-lengths", type=int, nargs="*", default=[2, 3, 4])
    parser.add_argument("--capture-every", type=int, nargs="*", default=[4, 8], help="of those draft lengths")
    parser.add_argument("--exact-draft-lengths", type=int, nargs="*", default=[3, 4])
    parser.add_argument("--sparse-draft-lengths", type=int, nargs="*", default=[2, 3, 4])
    parser.add_argument("--mask-p", type=float, nargs="*", default=[0.8, 0.9, 0.95])
    parser.add_argument("--weight-types", nargs="*", default=["bf16", "f16", "f32"])
    parser.add_argument("--speculative-types", nargs="*", default=["bf16", "f16"])
    parser.add_argument("--peer-draft-lengths", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--p-min", type=float, nargs="*", default=[0.0, 0.5])
    parser.add_argument("--assistant-lengths", type=int, nargs="*", default=[4])
    return parser.parse_args()


def main():
    args = arguments()
    for name in ("target", "draft", "binary", "proto", "gguf", "out"):
        setattr(args, name, getattr(args, name).resolve())
    chosen = [*configurations.ours(args), *configurations.llama(args), *configurations.transformers(args)]
    chosen = [c for c in chosen if re.search(args.only, c.name)]
    if any(c.group in configurations.LLAMA for c in chosen):
        convert_weights(args)
    with open(f"{args.out}.log", "w", encoding="utf-8") as log:
        records, failures, description = measure(args, chosen, log)
    description["arguments"] = {key: str(value) for key, value in vars(args).items()}
    result = {**description, "failures": failures, "runs": records}
    pathlib.Path(f"{args.out}.json").write_text(json.dumps(result), encoding="utf-8")
    text = report.markdown(result)
    pathlib.Path(f"{args.out}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
