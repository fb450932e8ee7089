"""NVIDIA's AIPerf (the successor of genai-perf) against `specattn serve`: both endpoints, streaming and not.

    python load_tool_test.py --binary ../../target/release/specattn

What the tool reports is held against what it asked for and against the server's own counters.

Exit status: 0 passed, 1 failed, 77 skipped because a package is missing (with a line on stderr that begins with SKIPPED).
"""

import argparse
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest
import urllib.request

from local_server import serve_chat

if importlib.util.find_spec("aiperf") is None:
    print("SKIPPED: the load tool's test needs aiperf", file=sys.stderr)
    sys.exit(77)

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TOKENIZER = ROOT / "models" / "target"
MODEL = "bundled/target"
REQUESTS, WARMUP, PROMPT_TOKENS, TOKENS = 8, 2, 100, 48
TOOL_TIMEOUT_S = 240

url = None


def counted():
    """Completion tokens and requests that ended at their length, by the server's own counters."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    names = (r"gateway_tokens_completion_total", r'gateway_requests_total\{outcome="length"\}')
    found = [re.search(rf"^{name} (\d+)$", text, re.MULTILINE) for name in names]
    return [int(match.group(1)) if match else 0 for match in found]


def profile(folder, *arguments):
    """A run of the tool: its report, and a record for each measured request."""
    command = [sys.executable, "-m", "aiperf", "profile", "--model", MODEL, "--url", url, "--tokenizer", TOKENIZER]
    command += ["--concurrency", 4, "--request-count", REQUESTS, "--warmup-request-count", WARMUP]
    command += ["--synthetic-input-tokens-mean", PROMPT_TOKENS, "--synthetic-input-tokens-stddev", 0]
    command += ["--output-tokens-mean", TOKENS, "--output-tokens-stddev", 0, "--random-seed", 7]
    command += ["--extra-inputs", "ignore_eos:true", "--extra-inputs", f"min_tokens:{TOKENS}"]
    command += ["--ui-type", "none", "--output-artifact-dir", folder, *arguments]
    # Offline it takes tokenizers from the hub's cache alone, and none from a folder.
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    run = subprocess.run(
        [*map(str, command)], env=environment, timeout=TOOL_TIMEOUT_S, capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise RuntimeError(f"aiperf ended with {run.returncode}:\n{run.stdout[-4000:]}{run.stderr[-4000:]}")
    report = json.loads((pathlib.Path(folder) / "profile_export_aiperf.json").read_text(encoding="utf-8"))
    lines = (pathlib.Path(folder) / "profile_export.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return report, [r["metrics"] for r in records if r["metadata"]["benchmark_phase"] == "profiling"]


class LoadTool(unittest.TestCase):
    def measure(self, *arguments):
        """What the tool says, after what must hold of every run."""
        before = counted()
        with tempfile.TemporaryDirectory() as folder:
            report, records = profile(folder, *arguments)
            served = pathlib.Path(folder) / "server_metrics_export.json"
            served = json.loads(served.read_text(encoding="utf-8"))["metrics"]
        tokens, ended = (after - then for after, then in zip(counted(), before))
        self.assertEqual((tokens, ended), ((REQUESTS + WARMUP) * TOKENS, REQUESTS + WARMUP))
        self.assertEqual((report["request_count"]["avg"], report["request_error_rate"]["avg"]), (REQUESTS, 0))
        self.assertEqual(report["error_summary"], [])
        self.assertEqual(len(records), REQUESTS)
        for record in records:
            self.assertEqual(record["usage_completion_tokens"]["value"], TOKENS)
            self.assertGreaterEqual(record["usage_prompt_tokens"]["value"], PROMPT_TOKENS)
        # It reads the server's metrics beside its own.
        self.assertIn("gateway_first_token_seconds", served)
        return report, records

    def streamed(self, *arguments):
        report, records = self.measure("--streaming", *arguments)
        for record in records:
            first, whole = record["time_to_first_token"]["value"], record["request_latency"]["value"]
            self.assertTrue(0 < first < whole, (first, whole))
            self.assertGreater(record["inter_token_latency"]["value"], 0)
        return report, records

    def test_completions(self):
        self.measure("--endpoint-type", "completions")

    def test_completions_streamed(self):
        self.streamed("--endpoint-type", "completions")

    def test_chat(self):
        self.measure("--endpoint-type", "chat")

    def test_chat_streamed_with_usage_in_every_chunk(self):
        options = ("--use-server-token-count", "--per-chunk-usage")
        _, records = self.streamed("--endpoint-type", "chat", *options)
        # Gaps by the tool's count: the tokens less those of the first chunk, which only that chunk's usage tells.
        for record in records:
            gaps = record["decode_duration"]["value"] / record["inter_token_latency"]["value"]
            self.assertTrue(1 <= round(gaps) < TOKENS, gaps)


def main():
    global url
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", type=pathlib.Path, required=True)
    binary = parser.parse_args().binary.resolve()
    with tempfile.TemporaryDirectory() as folder, serve_chat(binary, MODEL, folder) as url:
        result = unittest.main(argv=["load_tool_test"], exit=False, verbosity=2).result
    sys.exit(0 if result.wasSuccessful() else 1)


if __name__ == "__main__":
    main()
