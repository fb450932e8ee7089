// One session as it goes: its text by where each token came from, and what its masks keep.

import { ask, lines } from "/console/api.js";

const ORIGINS = ["unknown", "accepted", "recovered", "bonus", "solo"];

const text = document.getElementById("text");
const state = document.getElementById("session-state");
const kept = document.getElementById("kept");

let watching = null;

/// The session that is shown, or null.
export const shown = () => watching?.id ?? null;

/// Shows session `id` in place of the one shown before.
export async function watch(id) {
  watching?.abort.abort();
  const mine = watching = { id, abort: new AbortController(), counts: {}, open: true };
  text.replaceChildren();
  kept.hidden = true;
  state.textContent = `${id}: reading …`;
  count(mine);
  try {
    const response = await ask(`/console/sessions/${id}`, { signal: mine.abort.signal });
    drawKept(mine);
    for await (const line of lines(response)) {
      if (watching !== mine) return;
      show(mine, JSON.parse(line));
    }
  } catch (error) {
    if (watching === mine) state.textContent = `${id}: ${error.message}`;
  } finally {
    mine.open = false;
  }
}

function show(mine, { prompt_tokens, pieces = [], end }) {
  const follows = text.scrollHeight - text.scrollTop - text.clientHeight < 40;
  for (const [piece, origin] of pieces) {
    const name = ORIGINS[origin] ?? ORIGINS[0];
    mine.counts[name] = (mine.counts[name] ?? 0) + 1;
    const last = text.lastElementChild;
    // Neighbours of one kind are one element: a long text stays light.
    if (last?.className === name) last.append(piece);
    else {
      const span = document.createElement("span");
      span.className = name;
      span.append(piece);
      text.append(span);
    }
  }
  if (follows) text.scrollTop = text.scrollHeight;
  if (prompt_tokens !== undefined) mine.prompt = prompt_tokens;
  count(mine);
  const tokens = Object.values(mine.counts).reduce((a, b) => a + b, 0);
  state.textContent = `${mine.id}: ${mine.prompt} tokens of prompt, ${tokens} of output${end ? `; ${end}` : ""}`;
}

function count(mine) {
  for (const output of document.querySelectorAll("#legend output")) {
    output.textContent = mine.counts[output.dataset.origin] ?? 0;
  }
}

/// Asks what the masks keep, once a second for as long as the session is shown and runs.
async function drawKept(mine) {
  while (watching === mine && mine.open) {
    try {
      const response = await ask(`/console/sessions/${mine.id}/kept`, { signal: mine.abort.signal });
      const map = await response.json();
      if (watching === mine && map.kept.length > 0) draw(map);
    } catch { /* The session ends, or its worker is busy: the next look tells. */ }
    await new Promise(done => setTimeout(done, 1000));
  }
}

function draw({ tokens, num_layers, columns, kept: shares }) {
  const canvas = kept.querySelector("canvas");
  [canvas.width, canvas.height] = [columns, num_layers];
  const colour = getComputedStyle(document.documentElement).getPropertyValue("--heat").trim().split(" ").map(Number);
  const pixels = new ImageData(columns, num_layers);
  shares.forEach((share, i) => pixels.data.set([...colour, share], 4 * i));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  const means = Array.from({ length: num_layers }, (_, layer) => {
    const row = shares.slice(layer * columns, (layer + 1) * columns);
    return Math.round(row.reduce((a, b) => a + b, 0) / columns / 2.55);
  });
  const words = `What each layer of the target may read: rows are layers, the first on top; columns are ${tokens} tokens of context, `
    + `the latest at the right; the stronger the colour, the more of the KV heads. By layer: ${means.map(mean => `${mean} %`).join(", ")}.`;
  canvas.setAttribute("aria-label", words);
  kept.querySelector("figcaption").textContent = words;
  kept.hidden = false;
}
