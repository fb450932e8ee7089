#!/usr/bin/env python3
"""KV entries read by exact mode beside plain dense speculative decoding, on the same prompts.

For every context length and temperature: dense decoding at several draft lengths, of which the one that reads the
least per token counts, and exact mode at its own. Every read after the prompt counts, confirmations included. Greedy
runs also compare the token ids of exact mode with those of the target alone.

    cargo build --release -p specattn-cli
    python3 bench/exact/run.py --books ../shared/corpus/test
"""

import argparse
import datetime
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

# Bytes per token of English prose with the bundled tokenizer, at least: prompts are cut by it and must fit the context.
BYTES_PER_TOKEN = 3.6


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specattn", default="target/release/specattn", help="the program to measure")
    parser.add_argument("--books", type=pathlib.Path, required=True, help="folder of text files")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 8192], help="tokens at the end, prompt included")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--tokens", type=int, default=500, help="tokens to generate")
    parser.add_argument("--prompts", type=int, default=8, help="prompts per setting")
    parser.add_argument("--dense-lengths", type=int, nargs="+", default=[2, 3, 4, 6, 8], help="draft lengths of dense mode")
    parser.add_argument("--exact-lengths", type=int, nargs="+", default=[4], help="draft lengths of exact mode")
    parser.add_argument("--option", action="append", default=[], help="one more flag of exact runs, as --option=--mask-p=0.9")
    parser.add_argument("--output", type=pathlib.Path, help="folder for the table and every run's statistics")
    return parser.parse_args()


def prompts(books, context, tokens, count):
    """`count` stretches of text from the middles of the books."""
    files = sorted(books.glob("*.txt"))
    size = int((context - tokens - 64) * BYTES_PER_TOKEN)
    for index in range(count):
        file = files[index % len(files)]
        text = file.read_bytes()
        begin = int(len(text) * (0.3 + 0.2 * (index // len(files)) % 0.6))
        yield file.name, text[begin : begin + size].decode("utf-8", "ignore")


class Server:
    """One `specattn serve` for all runs."""

    def __init__(self, program):
        self.program = program
        self.process = subprocess.Popen(
            [program, "serve", "--listen", "127.0.0.1:0", "--quiet", "--log-level", "warn"],
            stdout=subprocess.PIPE,
            text=True,
        )
        self.url = self.process.stdout.readline().strip()

    def generate(self, text, flags):
        with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            line = [self.program, "generate", "--gateway", self.url, "--prompt-file", file.name, "--json", "--quiet"]
            for _ in range(5):
                done = subprocess.run(line + flags, capture_output=True, text=True, check=False)
                if done.returncode == 0:
                    return json.loads(done.stdout)
                # A machine that stood still has missed heartbeats; the workers come back.
                time.sleep(3)
        sys.exit(f"{' '.join(flags)}: {done.stderr}")

    def stop(self):
        self.process.terminate()
        self.process.wait()


def per_token(runs):
    """KV entries read per generated token, in units of one dense pass over the context at the time."""
    reads = sum(run["stats"]["kv_entries_read"] for run in runs)
    tokens = sum(run["usage"]["completion_tokens"] for run in runs)
    return reads / tokens


def measure(server, args, context, temperature):
    texts = list(prompts(args.books, context, args.tokens, args.prompts))
    common = ["-n", str(args.tokens), "--ignore-eos", "--temperature", str(temperature)]

    def runs(*flags):
        made = []
        for seed, (_, text) in enumerate(texts):
            made.append(server.generate(text, common + ["--seed", str(seed), *flags]))
        return made

    dense = {length: runs("--mode", "dense", "--draft-length", str(length)) for length in args.dense_lengths}
    best = min(dense, key=lambda length: per_token(dense[length]))
    exact = {}
    for length in args.exact_lengths:
        exact[length] = runs("--mode", "exact", "--draft-length", str(length), *args.option)
    chosen = min(exact, key=lambda length: per_token(exact[length]))
    row = {
        "context": context,
        "temperature": temperature,
        "dense": {length: per_token(made) for length, made in dense.items()},
        "exact": {length: per_token(made) for length, made in exact.items()},
        "best dense": best,
        "best exact": chosen,
        "ratio": per_token(exact[chosen]) / per_token(dense[best]),
        "books": [per_token([e]) / per_token([d]) for e, d in zip(exact[chosen], dense[best])],
        "confirmed": sum(r["stats"]["confirmed_tokens"] for r in exact[chosen])
        / max(1, sum(r["stats"]["provisional_tokens"] for r in exact[chosen])),
        "masks": [r["stats"]["mask_p"] for r in exact[chosen]],
        "lengths": [r["stats"]["confirm_length"] for r in exact[chosen]],
        "prompt tokens": [r["usage"]["prompt_tokens"] for r in exact[chosen]],
    }
    if temperature == 0:
        alone = runs("--mode", "dense", "--draft-length", "0")
        same = [a["token_ids"] == e["token_ids"] for a, e in zip(alone, exact[chosen])]
        row["identical"] = f"{sum(same)} of {len(same)}"
    return row, {"dense": dense, "exact": exact}


def table(rows):
    lines = [
        "| context | temperature | best dense draft length | exact ÷ dense KV reads | per book | confirmed | greedy ids equal |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        spread = f"{min(row['books']):.2f} to {max(row['books']):.2f}, median {statistics.median(row['books']):.2f}"
        lines.append(
            f"| {row['context']} | {row['temperature']} | {row['best dense']} | {row['ratio']:.3f} | {spread} "
            f"| {100 * row['confirmed']:.1f} % | {row.get('identical', '')} |"
        )
    return "\n".join(lines)


def main():
    args = arguments()
    server = Server(args.specattn)
    rows = []
    try:
        for context in args.contexts:
            for temperature in args.temperatures:
                row, _ = measure(server, args, context, temperature)
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    finally:
        server.stop()
    text = table(rows)
    print(text)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        date = datetime.date.today().isoformat()
        (args.output / f"{date}.md").write_text(
            f"# Exact mode's KV reads, {date}\n\n{platform.machine()}, {args.prompts} prompts of "
            f"{args.books.name}, {args.tokens} tokens each.\n\n{text}\n"
        )
        (args.output / f"{date}.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
