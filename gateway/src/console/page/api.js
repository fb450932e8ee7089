// Requests to the gateway, with the reader's API key where the gateway asks for one.

const STORED = "specattn-key";
const form = document.getElementById("key");

form.addEventListener("submit", event => {
  event.preventDefault();
  sessionStorage.setItem(STORED, document.getElementById("key-text").value);
  form.hidden = true;
});

/// Fetches `path`; fails with the gateway's own words.
export async function ask(path, options = {}) {
  const key = sessionStorage.getItem(STORED);
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) form.hidden = false;
  if (!response.ok) {
    const body = await response.text();
    let reason = body;
    try { reason = JSON.parse(body).error.message; } catch { /* Not OpenAI's shape: as it is. */ }
    throw new Error(reason || `${response.status} ${response.statusText}`);
  }
  return response;
}

/// The lines of a response as they come.
export async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const whole = (rest + value).split("\n");
    rest = whole.pop();
    yield* whole.filter(line => line !== "");
  }
}
