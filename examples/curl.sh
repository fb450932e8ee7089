#!/usr/bin/env bash
# Streams a completion with curl, as server-sent events. Chat works likewise at /v1/chat/completions, where the model has a template.
set -euo pipefail

gateway=${SPECATTN_GATEWAY:-http://127.0.0.1:7400}
prompt=${1:-It was a bright cold day in April}

# JSON's own escapes for what a prompt may hold.
quoted=${prompt//\\/\\\\}
quoted=${quoted//\"/\\\"}
quoted=${quoted//$'\n'/\\n}
quoted=${quoted//$'\t'/\\t}

header=()
if [ -n "${SPECATTN_API_KEY:-}" ]; then
  header=(--header "Authorization: Bearer $SPECATTN_API_KEY")
fi

# Without a model's name the first one answers.
curl --silent --show-error --fail-with-body --no-buffer "$gateway/v1/completions" "${header[@]}" \
  --header 'Content-Type: application/json' \
  --data "{\"prompt\": \"$quoted\", \"max_tokens\": 64, \"temperature\": 0.8, \"seed\": 7, \"stream\": true,
           \"stream_options\": {\"include_usage\": true}, \"specattn\": {\"mode\": \"exact\"}}"
