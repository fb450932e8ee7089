#!/usr/bin/env python3
"""What workers computed when, as a picture (SVG): a row per worker, a bar per forward.

    python3 bench/gpu/placements.py --timeline --work /tmp/w cuda:0/cuda:1 ...
    python3 bench/gpu/timeline.py /tmp/w/specattn-verify-7472.log /tmp/w/specattn-draft-7492.log > timeline.svg

Reads the forwards that workers log with `--log-json --log-level info,specattn_worker::scheduler=trace`. The window ends --before
seconds before the last forward. Text in a bar is its number of sessions.
"""

import argparse
import json
from datetime import datetime
from html import escape
from pathlib import Path

ROW, GAP, LEFT, TOP, WIDTH = 34, 14, 110, 46, 1100
COLOURS = {"verify": "#2f6f9f", "draft": "#c9782c", "prompt": "#9a9a9a"}


def main():
    args = parser().parse_args()
    rows = [(log.stem.removeprefix("specattn-"), forwards(log)) for log in args.logs]
    end = min(max(stop for _, stop, *_ in bars) for _, bars in rows) - args.before
    start = end - args.ms / 1000
    height = TOP + len(rows) * (ROW + GAP) + 30
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 20} {height}" font-family="sans-serif" font-size="12">']
    out.append(f'<rect width="100%" height="100%" fill="white"/><text x="{LEFT}" y="20" font-size="14">{escape(args.title)}</text>')
    at = lambda t: LEFT + (t - start) * 1000 / args.ms * WIDTH
    for index, (name, bars) in enumerate(rows):
        top = TOP + index * (ROW + GAP)
        seen = [bar for bar in bars if bar[1] > start and bar[0] < end]
        busy = sum(min(bar[1], end) - max(bar[0], start) for bar in seen) / (end - start)
        out.append(f'<text x="8" y="{top + 15}">{escape(name)}</text><text x="8" y="{top + 30}" fill="#666">{busy:.0%} busy</text>')
        for begin, stop, sessions, is_prompt in seen:
            x, right = max(at(begin), LEFT), min(at(stop), LEFT + WIDTH)
            colour = COLOURS["prompt" if is_prompt else name.split("-")[0]]
            out.append(f'<rect x="{x:.1f}" y="{top}" width="{max(right - x, 0.5):.1f}" height="{ROW}" fill="{colour}" stroke="white" stroke-width="0.6">'
                       f"<title>{(stop - begin) * 1000:.2f} ms, {sessions} sessions</title></rect>")
            if right - x > 14:
                out.append(f'<text x="{(x + right) / 2:.1f}" y="{top + 21}" fill="white" text-anchor="middle">{sessions}</text>')
    bottom = TOP + len(rows) * (ROW + GAP)
    step = 10 if args.ms <= 200 else 50
    for ms in range(0, int(args.ms) + 1, step):
        x = at(start + ms / 1000)
        out.append(f'<line x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{bottom}" stroke="#ddd"/>')
        out.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle" fill="#666">{ms}</text>')
    out.append(f'<text x="8" y="{bottom + 16}" fill="#666">ms</text></svg>')
    print("\n".join(out))


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("logs", nargs="+", type=Path)
    p.add_argument("--ms", type=float, default=120, help="length of the window")
    p.add_argument("--before", type=float, default=1.0, help="seconds between the window's end and the last forward")
    p.add_argument("--title", default="", help="what it shows")
    return p


def forwards(log):
    """(start, end, sessions, whether it is a prompt's) of each forward, in seconds."""
    bars = []
    for line in log.open():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        fields = entry.get("fields", {})
        if fields.get("message") == "forward":
            stop = datetime.fromisoformat(entry["timestamp"].replace("Z", "+00:00")).timestamp()
            bars.append((stop - fields["us"] / 1e6, stop, fields["sessions"], fields["is_prompt"]))
    if not bars:
        raise SystemExit(f"{log}: no forwards in it; see --help for how to log them")
    return bars


if __name__ == "__main__":
    main()
