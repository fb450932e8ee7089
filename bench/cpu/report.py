"""Turns the runs of run.py into Markdown: medians with ranges, ratios paired by pass, memory, checks.

    python report.py results.json > results.md
"""

import json
import statistics
import sys

import configurations

median = statistics.median


def speed(run):
    """Tokens per second: decoding after the first mark, or the prompt up to the first token."""
    if run["kind"] == "prefill":
        return run["prompt_tokens"] / run["ttft_s"]
    return run["decode_tokens"] / max(run["decode_s"], 1e-9)


def end_to_end(run):
    """New tokens over the whole time, prompt included."""
    return len(run["tokens"]) / run["elapsed_s"]


def number(value):
    """Three significant digits."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(values, unit=""):
    """median (least–most)."""
    return f"{number(median(values))}{unit} ({number(min(values))}–{number(max(values))})"


def table(header, rows):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


class Runs:
    """The measured runs, without the tuning ones."""

    def __init__(self, result):
        self.all = [run for run in result["runs"] if not run["tuning"]]
        self.cells = list(dict.fromkeys(run["cell"] for run in sorted(self.all, key=lambda r: r["prompt_tokens"])))

    def of(self, cell, name):
        return sorted((r for r in self.all if r["cell"] == cell and r["configuration"] == name), key=lambda r: r["pass"])

    def names(self, cell, groups):
        return list(dict.fromkeys(r["configuration"] for r in self.all if r["cell"] == cell and r["group"] in groups))

    def best(self, cell, groups, rate):
        """The configuration with the largest median rate among `groups`, or None."""
        names = self.names(cell, groups)
        return max(names, key=lambda name: median(map(rate, self.of(cell, name))), default=None)

    def ratio(self, cell, name, other, rate):
        """Rates of `name` over those of `other`, pass by pass: the same text, minutes apart."""
        base = {run["pass"]: rate(run) for run in self.of(cell, other)}
        return [rate(run) / base[run["pass"]] for run in self.of(cell, name) if run["pass"] in base]


def group_table(runs, kind, rate):
    """One row a group, one pair of columns a cell: the best configuration, and its ratio to llama.cpp's best."""
    cells = [cell for cell in runs.cells if cell.startswith(kind)]
    header = ["tokens/s"] + [head for cell in cells for head in (cell, "× llama.cpp's best")]
    rows = []
    for group in configurations.GROUPS:
        row, seen = [group], False
        for cell in cells:
            name = runs.best(cell, (group,), rate)
            peer = runs.best(cell, configurations.LLAMA, rate)
            if name is None:
                row += ["", ""]
                continue
            seen = True
            row.append(f"{spread([rate(run) for run in runs.of(cell, name)])}<br>{name}")
            pairs = runs.ratio(cell, name, peer, rate) if peer else []
            row.append(spread(pairs) if pairs else "")
        if seen:
            rows.append(row)
    return table(header, rows)


def aims(runs):
    """The ratios that matter, each of best against best, paired by pass."""
    wanted = [
        ("plain / llama.cpp plain", (configurations.OURS_PLAIN,), (configurations.LLAMA_PLAIN,)),
        ("speculative / own plain", (configurations.OURS_SPECULATIVE,), (configurations.OURS_PLAIN,)),
        ("exact / own plain", (configurations.OURS_EXACT,), (configurations.OURS_PLAIN,)),
        ("sparse / own plain", (configurations.OURS_SPARSE,), (configurations.OURS_PLAIN,)),
        ("best mode / llama.cpp's best", configurations.OURS, configurations.LLAMA),
        ("best mode / transformers' best", configurations.OURS, configurations.HF),
    ]
    cells = [cell for cell in runs.cells if not cell.startswith("prefill")]
    rows = []
    for label, ours, theirs in wanted:
        row = [label]
        for cell in cells:
            name, other = runs.best(cell, ours, speed), runs.best(cell, theirs, speed)
            pairs = runs.ratio(cell, name, other, speed) if name and other else []
            row.append(spread(pairs, " ×") if pairs else "")
        rows.append(row)
    return table(["SpecAttn", *cells], rows)


def detail(runs):
    """Every configuration in every cell."""
    rows = []
    for cell in runs.cells:
        for name in runs.names(cell, configurations.GROUPS):
            these = runs.of(cell, name)
            rates = [speed(run) for run in these]
            row = [cell, name, len(these), spread(rates), spread([run["ttft_s"] for run in these])]
            stats = [run["stats"] for run in these if run["stats"].get("target_forwards")]
            proposed = sum(s.get("proposed_tokens", 0) for s in stats)
            if proposed:
                forwards = sum(s["target_forwards"] for s in stats)
                new_tokens = sum(len(run["tokens"]) for run in these if run["stats"].get("target_forwards"))
                row += [number(sum(s["accepted_tokens"] for s in stats) / proposed), number(new_tokens / forwards)]
            else:
                row += ["", ""]
            dense = sum(s.get("kv_entries_dense", 0) for s in stats)
            row.append(number(sum(s.get("kv_entries_read", 0) for s in stats) / dense) if dense else "")
            rounds = sum(s.get("mask_rounds", 0) for s in stats)
            row.append(number(sum(s["mask_bytes"] for s in stats) / rounds) if rounds else "")
            rows.append(row)
    header = ["cell", "configuration", "runs", "tokens/s", "first token s", "acceptance", "tokens / forward"]
    return table([*header, "KV kept", "mask bytes / round"], rows)


def memory(result):
    """Peak resident set of each process over all it ran."""
    peaks = {}
    for run in result["runs"]:
        peaks[run["configuration"]] = max(peaks.get(run["configuration"], 0), run["peak_rss_bytes"])
    rows = []
    for name, peak in peaks.items():
        baseline = result["engines"].get(name, {}).get("baseline_rss_bytes")
        rows.append([name, number(peak / 2**20), number(baseline / 2**20) if baseline else ""])
    return table(["configuration", "peak MiB", "of it before any model was loaded"], rows)


def agreement(runs):
    """Greedy tokens against transformers in float32: the least number of equal leading tokens over the passes."""
    reference = next((n for c in runs.cells for n in runs.names(c, configurations.HF) if n == "transformers float32"), None)
    if reference is None:
        return "transformers float32 was not part of this run.\n"
    rows = []
    cells = [cell for cell in runs.cells if cell.startswith("greedy")]
    for name in dict.fromkeys(n for cell in cells for n in runs.names(cell, configurations.GROUPS)):
        row = [name]
        for cell in cells:
            truth = {run["pass"]: run["tokens"] for run in runs.of(cell, reference)}
            equal = [
                next((i for i, (a, b) in enumerate(zip(run["tokens"], truth[run["pass"]])) if a != b), len(run["tokens"]))
                for run in runs.of(cell, name)
                if run["pass"] in truth
            ]
            row.append(", ".join(map(str, equal)))
        rows.append(row)
    return table(["equal leading tokens, pass by pass", *cells], rows)


def markdown(result):
    """The whole report."""
    runs = Runs(result)
    machine = result["machine"]
    limit = float(result["arguments"]["disturbance"])
    disturbed = [run for run in runs.all if run["disturbance"] > limit]
    parts = [
        "# CPU measurements\n",
        f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['flags'])}), {machine['date']}. "
        "Medians with (least–most) over interleaved passes, another text each pass; ratios are paired by pass. "
        "Rules: README.md.\n",
    ]
    if disturbed:
        worst = max(run["disturbance"] for run in disturbed)
        parts.append(
            f"**{len(disturbed)} of {len(runs.all)} runs were disturbed**: other processes used more than "
            f"{100 * limit:.0f} % of the machine while they ran, at worst {100 * worst:.0f} %. "
            "Do not quote these figures.\n"
        )
    parts += [
        "## Ratios\n", aims(runs),
        "## Decoding, sampled text\n", group_table(runs, "sampled", speed),
        "## Decoding, greedy\n", group_table(runs, "greedy", speed),
        "## End to end, sampled text (prompt included)\n", group_table(runs, "sampled", end_to_end),
        "## Prefill\n", group_table(runs, "prefill", speed),
        "## Peak memory\n", memory(result),
        "## Greedy tokens against transformers in float32\n", agreement(runs),
        "## Every configuration\n", detail(runs),
    ]
    if result["failures"]:
        rows = [[f["configuration"], f.get("cell", ""), f["error"].replace("|", "/")[:200]] for f in result["failures"]]
        parts += ["## Failures\n", table(["configuration", "cell", "error"], rows)]
    return "\n".join(parts)


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        print(markdown(json.load(file)))
