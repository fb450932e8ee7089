#!/usr/bin/env bash
# What masks cost in quality: every method over the given books. Writes eval.md, eval.csv and eval.svg into OUT.
# SPECATTN names the program (default: built here); JOBS the processes (default: all cores); further flags go to FLAGS.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
[ $# -gt 0 ] || { echo "usage: $0 BOOK.txt..." >&2; exit 64; }
if [ -z "${SPECATTN:-}" ]; then
  (cd "$root" && cargo build --release -p specattn-cli)
  SPECATTN=$root/target/release/specattn
fi
# shellcheck disable=SC2086
exec "$SPECATTN" eval --text "$@" --target "$root/models/target" --draft "$root/models/draft" \
  --paper-map "$here/paper-map.json" --contexts 4096,8192 --judged 1024 --p 0.6,0.7,0.8,0.885,0.93,0.96,0.98,0.99 \
  --budgets 0.05,0.1,0.15,0.2,0.3,0.5 --capture-every 1 --jobs "${JOBS:-$(nproc)}" --out "${OUT:-$here/results}" \
  ${FLAGS:-}
