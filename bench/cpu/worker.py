"""What the measured subprocesses have in common: the line protocol with run.py, and the clock.

A worker is one configuration of one engine in a process of its own. It reads one JSON object a line from stdin,

    {"prompt": [ids], "new_tokens": n, "temperature": t, "seed": s}        t = 0: greedy

and answers each with one line on stdout: Run.result(), or {"error": text}. Its first line is {"ready": {...}}, with
whatever describes the engine. Everything else it prints goes to stderr.

The clock is the same for every engine: `start` when the request is handed over, one mark whenever tokens become
available to the caller. First token to last gives the decode rate: tokens after the first mark / time after it.
Whatever an engine does before its first token (prompts of target and draft alike) counts as time to first token.
"""

import hashlib
import json
import os
import pathlib
import sys
import time


def prompt_hash(prompt):
    """Identifies a list of token ids."""
    return hashlib.sha256(",".join(map(str, prompt)).encode()).hexdigest()[:16]


def peak_rss(pid="self"):
    """Largest resident set of a process so far, in bytes."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM line: Linux only")


# Noted when this module is imported, after the engine's library and before any model is loaded.
BASELINE_RSS = peak_rss()


class Run:
    """Clock and tokens of one request."""

    def __init__(self, prompt):
        self.prompt = prompt
        self.tokens = []
        self.marks = []
        self.stats = {}
        self.start = time.perf_counter()

    def emit(self, tokens):
        """Notes that `tokens` have become available."""
        if tokens:
            self.tokens.extend(tokens)
            self.marks.append((time.perf_counter(), len(tokens)))

    def result(self, **extra):
        """The answer to run.py."""
        first, last = self.marks[0], self.marks[-1]
        return {
            "tokens": self.tokens,
            "prompt_hash": prompt_hash(self.prompt),
            "ttft_s": first[0] - self.start,
            "decode_s": last[0] - first[0],
            "decode_tokens": len(self.tokens) - first[1],
            "elapsed_s": last[0] - self.start,
            "stats": self.stats,
            **extra,
        }


def serve(generate, ready, rss_pid="self"):
    """Answers requests until stdin ends. `generate(request, run)` emits tokens into the run."""
    # The protocol keeps the real stdout; anything a library prints goes to stderr instead.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value):
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    answer({"ready": ready})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            run = Run(request["prompt"])
            generate(request, run)
            answer(run.result(peak_rss_bytes=peak_rss(rss_pid)))
        except Exception as error:  # One failed cell must not end the measurement; run.py reports it.
            answer({"error": f"{type(error).__name__}: {error}"})
