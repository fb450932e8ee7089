"""What is measured: every configuration of every engine, as a command line for its worker.

Peers get the settings that could help them: both attention kernels, all three weight types, several draft lengths and
stopping thresholds. `group` says what a configuration competes as; run.py reports the best of each group per cell.
"""

import dataclasses
import pathlib
import sys

HERE = pathlib.Path(__file__).parent

OURS_PLAIN, OURS_SPECULATIVE = "SpecAttn plain", "SpecAttn speculative"
OURS_EXACT, OURS_SPARSE = "SpecAttn exact", "SpecAttn sparse"
LLAMA_PLAIN, LLAMA_SPECULATIVE = "llama.cpp plain", "llama.cpp speculative"
HF_PLAIN, HF_ASSISTED = "transformers plain", "transformers assisted"
OURS = (OURS_PLAIN, OURS_SPECULATIVE, OURS_EXACT, OURS_SPARSE)
LLAMA = (LLAMA_PLAIN, LLAMA_SPECULATIVE)
HF = (HF_PLAIN, HF_ASSISTED)
GROUPS = (*OURS, *LLAMA, *HF)
# Groups whose prompt processing is compared: the target alone.
PLAIN = (OURS_PLAIN, LLAMA_PLAIN, HF_PLAIN)


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One worker process."""

    name: str
    group: str
    command: tuple


def worker(script, *arguments):
    return (sys.executable, str(HERE / script), *map(str, arguments))


def ours(args):
    """SpecAttn: plain, speculative, exact, sparse."""
    base = ["--binary", args.binary, "--proto", args.proto, "--target", args.target, "--draft", args.draft]
    base += ["--threads", args.threads, f"--serve-args={args.serve_args}"]

    def configuration(name, group, *more):
        return Configuration(f"specattn {name}", group, worker("worker_specattn.py", *base, *more))

    yield configuration("plain", OURS_PLAIN, "--draft-length", 0)
    yield configuration("draft auto", OURS_SPECULATIVE)
    for length in args.draft_lengths:
        for steps in args.capture_every:
            more = ["--draft-length", length, "--capture-every", steps]
            yield configuration(f"draft {length} capture {steps}", OURS_SPECULATIVE, *more)
    for length in args.exact_draft_lengths:
        yield configuration(f"exact draft {length}", OURS_EXACT, "--mode", "exact", "--draft-length", length)
    for length in args.sparse_draft_lengths:
        for p in args.mask_p:
            more = ["--mode", "sparse", "--draft-length", length, "--mask-p", p]
            yield configuration(f"sparse draft {length} p {p}", OURS_SPARSE, *more)


def llama(args):
    """llama.cpp: plain in each weight type, speculative in the types asked for."""
    for flash in ("on", "off"):
        base = ["--threads", args.threads, "--flash", flash]
        for kind in args.weight_types:
            files = ["--target", args.gguf / f"target-{kind}.gguf"]
            yield Configuration(
                f"llama.cpp {kind} flash {flash}", LLAMA_PLAIN, worker("worker_llama.py", *files, *base)
            )
        for kind in args.speculative_types:
            files = ["--target", args.gguf / f"target-{kind}.gguf", "--draft", args.gguf / f"draft-{kind}.gguf"]
            for most in args.peer_draft_lengths:
                for p_min in args.p_min:
                    more = ["--draft-max", most, "--p-min", p_min]
                    yield Configuration(
                        f"llama.cpp {kind} flash {flash} draft {most} p_min {p_min}",
                        LLAMA_SPECULATIVE,
                        worker("worker_llama.py", *files, *base, *more),
                    )


def transformers(args):
    """transformers: plain and assisted, assisted with its own rule and with fixed draft lengths."""
    for dtype in ("bfloat16", "float32"):
        base = ["--target", args.target, "--threads", args.threads, "--dtype", dtype]
        yield Configuration(f"transformers {dtype}", HF_PLAIN, worker("worker_transformers.py", *base))
        for most in (0, *args.assistant_lengths):
            more = ["--draft", args.draft, "--draft-max", most]
            name = f"transformers {dtype} assisted {most or 'default'}"
            yield Configuration(name, HF_ASSISTED, worker("worker_transformers.py", *base, *more))
