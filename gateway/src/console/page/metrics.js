// The gateway's /metrics page: what two readings of it say about the time between them.

/// Samples by name, labels summed; buckets of histograms as [upper bound, count], ascending.
export function parse(text) {
  const values = new Map(), buckets = new Map();
  for (const line of text.split("\n")) {
    const match = /^(\w+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!match) continue;
    const [, name, labels, value] = match;
    const bound = /le="([^"]+)"/.exec(labels ?? "");
    if (name.endsWith("_bucket") && bound) {
      const base = name.slice(0, -"_bucket".length);
      if (!buckets.has(base)) buckets.set(base, []);
      buckets.get(base).push([bound[1] === "+Inf" ? Infinity : Number(bound[1]), Number(value)]);
    } else {
      values.set(name, (values.get(name) ?? 0) + Number(value));
    }
  }
  return { values, buckets };
}

/// How much a counter has grown.
export function growth(before, now, name) {
  return (now.values.get(name) ?? 0) - (before.values.get(name) ?? 0);
}

/// The quantile `q` of what a histogram observed in between, by interpolation within its bucket; null without any.
export function quantile(before, now, name, q) {
  const late = now.buckets.get(name) ?? [], early = before.buckets.get(name) ?? [];
  const counts = late.map(([bound, count], i) => [bound, count - (early[i]?.[1] ?? 0)]);
  const total = counts.at(-1)?.[1] ?? 0;
  if (total <= 0) return null;
  let [lower, below] = [0, 0];
  for (const [bound, count] of counts) {
    if (count >= q * total) {
      if (bound === Infinity) return lower;
      return lower + (bound - lower) * (q * total - below) / Math.max(count - below, 1);
    }
    [lower, below] = [bound, count];
  }
  return lower;
}
