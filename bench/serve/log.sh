#!/usr/bin/env bash
# What the session log costs: tokens/s without a log and with each flush policy, a client alone and 32 at once.
#
#   bash bench/serve/log.sh [FOLDER]     logs are written into FOLDER, whose disk is what is measured
set -euo pipefail
cd "$(dirname "$0")/../.."
cargo build --release --quiet -p specattn-cli
folder=$(mktemp -d -p "${1:-.}" log-cost.XXXXXX)
server=
stop() { [ -z "$server" ] || { kill "$server" && wait "$server" || true; server=; }; }
trap 'stop; rm -rf "$folder"' EXIT

echo '| --log-fsync | clients | tokens/s |'
echo '| --- | --- | --- |'
for pass in $(seq "${PASSES:-3}"); do
  for policy in none never interval commit; do
    log=()
    [ $policy = none ] || log=(--log-dir "$folder/$policy" --log-fsync $policy)
    target/release/specattn serve --listen 127.0.0.1:0 "${log[@]}" >"$folder/url" 2>"$folder/errors" &
    server=$!
    until url=$(grep -o 'http://[0-9.:]*' "$folder/url" | head -1) && [ -n "$url" ]; do sleep 0.1; done
    target/release/specattn bench serve --gateway "$url" --concurrency 1,32 --duration 6 --warmup 2 --mode dense --no-draft \
      --prompt-tokens 64 --output-tokens 256 --seed $pass |
      awk -F'|' -v policy=$policy 'NF == 12 && $2 + 0 > 0 { print "| " policy " |" $2 "|" $6 "|" }'
    stop
  done
done
