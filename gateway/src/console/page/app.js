// The console: asks the gateway once a second how things stand, and starts generations.

import { ask, lines } from "/console/api.js";
import { growth, parse, quantile } from "/console/metrics.js";
import { Plot } from "/console/plot.js";
import { shown, watch } from "/console/session.js";

const by = id => document.getElementById(id);
const milliseconds = seconds => seconds < 1 ? `${(seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0)} ms` : `${seconds.toFixed(1)} s`;
const whole = number => Math.round(number).toLocaleString("en");

const plots = {
  tokens: new Plot(by("plots"), "Tokens a second", [""], whole),
  first: new Plot(by("plots"), "Time to first token", ["p50", "p95"], milliseconds),
  next: new Plot(by("plots"), "Time per token", ["p50", "p95"], milliseconds),
};

// Readings of the last seconds, the oldest first: quantiles of one second alone would jump.
const WINDOW = 10;
const readings = [];

async function look() {
  const [status, page] = await Promise.all([
    ask("/console/status").then(response => response.json()),
    ask("/metrics").then(response => response.text()),
  ]);
  const now = { at: performance.now() / 1000, workers: new Map(), ...parse(page) };
  for (const worker of status.workers) now.workers.set(worker.worker_id, worker.tokens_total);
  const before = readings.at(-1);
  if (before) {
    const seconds = now.at - before.at;
    plots.tokens.push([growth(before, now, "gateway_tokens_completion_total") / seconds]);
    for (const [plot, name] of [[plots.first, "gateway_first_token_seconds"], [plots.next, "gateway_inter_token_seconds"]]) {
      plot.push([0.5, 0.95].map(q => quantile(readings[0], now, name, q)));
    }
  }
  workers(status.workers, before, now);
  sessions(status.sessions);
  by("summary").textContent = `workers: ${status.workers.length}, sessions: ${status.sessions.length}, `
    + `waiting: ${status.requests_queued}, tokens so far: ${whole(now.values.get("gateway_tokens_completion_total") ?? 0)}`;
  readings.push(now);
  if (readings.length > WINDOW) readings.shift();
}

function workers(list, before, now) {
  rows("workers", list, worker => {
    const rate = before?.workers.has(worker.worker_id)
      ? (worker.tokens_total - before.workers.get(worker.worker_id)) / (now.at - before.at) : 0;
    const silent = worker.heartbeat_age_ms > 3000 ? `, silent ${milliseconds(worker.heartbeat_age_ms / 1000)}` : "";
    return [
      worker.worker_id, wide(worker.model), wide(worker.endpoint), (worker.draining ? "draining" : "up") + silent,
      number(`${worker.sessions_active} / ${worker.sessions_max}`),
      number(`${worker.kv_blocks_used} / ${worker.kv_blocks_total}`), number(whole(Math.max(rate, 0))),
    ];
  });
}

function sessions(list) {
  rows("sessions", list, session => {
    const button = document.createElement("button");
    button.textContent = session.session_id.slice(0, 8);
    button.title = `Show session ${session.session_id}`;
    button.setAttribute("aria-pressed", session.session_id === shown());
    button.addEventListener("click", () => watch(session.session_id));
    button.dataset.session = session.session_id;
    return [
      button, session.mode, wide(session.verify_worker_id), wide(session.draft_worker_id ?? "–"),
      number(session.prompt_tokens), number(session.completion_tokens), number(milliseconds(session.age_ms / 1000)),
    ];
  });
}

const wide = content => ({ content, kind: "wide" });
const number = content => ({ content, kind: "number" });

/// Writes a table anew; who was on a session's button stays on it.
function rows(id, list, cells) {
  const body = by(id).tBodies[0];
  const focused = document.activeElement?.dataset.session;
  const none = [{ content: "none" }];
  body.replaceChildren(...(list.length ? list.map(cells) : [none]).map(row => {
    const line = document.createElement("tr");
    for (const cell of row) {
      const { content, kind } = cell.content === undefined ? { content: cell } : cell;
      const td = document.createElement("td");
      if (kind) td.className = kind;
      if (!list.length) td.colSpan = by(id).tHead.rows[0].cells.length;
      td.append(content);
      line.append(td);
    }
    return line;
  }));
  if (focused) body.querySelector(`[data-session="${focused}"]`)?.focus();
}

async function run() {
  for (;;) {
    try { await look(); } catch (error) { by("summary").textContent = `The gateway does not answer: ${error.message}`; }
    await new Promise(done => setTimeout(done, 1000));
  }
}

let generating = null;

by("generate").addEventListener("submit", async event => {
  event.preventDefault();
  generating = new AbortController();
  by("start").disabled = true;
  by("stop").disabled = false;
  try {
    const response = await ask("/v1/completions", {
      method: "POST",
      signal: generating.signal,
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        prompt: by("prompt").value, stream: true, max_tokens: Number(by("tokens").value),
        temperature: Number(by("temperature").value), specattn: { mode: by("mode").value, draft_length: 4 },
      }),
    });
    let first = true;
    for await (const line of lines(response)) {
      if (!line.startsWith("data: {")) continue;
      const chunk = JSON.parse(line.slice("data: ".length));
      if (chunk.error) throw new Error(chunk.error.message);
      if (first) watch(chunk.id.replace("cmpl-", ""));
      first = false;
    }
  } catch (error) {
    if (error.name !== "AbortError") by("session-state").textContent = `Not generated: ${error.message}`;
  } finally {
    by("start").disabled = false;
    by("stop").disabled = true;
  }
});

by("stop").addEventListener("click", () => generating?.abort());

run();
