// Numbers and comparisons as people say them.

/** Milliseconds with three digits, seconds from one on; a dash where there is nothing. */
export function duration(ms) {
  if (ms === null || ms === undefined) return "–";
  return ms < 1000 ? `${digits(ms)} ms` : `${digits(ms / 1000)} s`;
}

/** Bytes in MB or GB. */
export function memory(bytes) {
  if (!bytes) return "–";
  return bytes < 1e9 ? `${digits(bytes / 1e6)} MB` : `${digits(bytes / 1e9)} GB`;
}

/** A rank: its device, what its part of all variants takes there, and whether its process runs. */
export function rankInWords(rank) {
  const sum = (sizes) => memory(Object.values(sizes).reduce((one, other) => one + other, 0));
  const free = rank.free_bytes === null ? [] : [`${memory(rank.free_bytes)} free`];
  const sizes = [`${sum(rank.weight_bytes)} weights`, `${sum(rank.kv_cache_bytes)} KV`, ...free].join(", ");
  return `rank ${rank.rank} · ${rank.device} · ${sizes} · ${rank.state}`;
}

/** Three digits, and all of a larger whole number. */
export function digits(value) {
  if (value >= 100) return String(Math.round(value));
  return value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

const LONGEST_WORD = 24; // beyond it, as in scripts without spaces, a place is where it is

/** Where two texts first differ, at the start of that word; null as long as one goes on where the other ends. */
export function firstDifference(one, other, areWhole) {
  const shorter = Math.min(one.length, other.length);
  let at = 0;
  while (at < shorter && one[at] === other[at]) at += 1;
  if (at === shorter) return areWhole && one.length !== other.length ? at : null;
  const before = one.slice(Math.max(0, at - LONGEST_WORD), at).match(/\S*$/)[0];
  if (before.length < LONGEST_WORD) return at - before.length;
  return at - (/[\udc00-\udfff]/.test(one[at]) ? 1 : 0); // never between the halves of a character
}

/** The word that begins at a place, with the space before it. */
export function wordAt(text, at) {
  return text.slice(at).match(new RegExp(`^\\s*\\S{0,${LONGEST_WORD}}`, "u"))[0];
}

/** Tokens that two answers begin with alike. */
export function commonPrefix(one, other) {
  const at = one.findIndex((id, place) => id !== other[place]);
  return at < 0 ? one.length : at;
}

/** What a run of both variants showed. `first` and `baseline` are answers; `isFair`: one ran after the other. */
export function verdict(first, baseline, isFair, isContended) {
  const ratio = first.metrics.tokens_per_s / baseline.metrics.tokens_per_s;
  const speeds = `${digits(first.metrics.tokens_per_s)} against ${digits(baseline.metrics.tokens_per_s)} tokens/s`;
  const starts = `${duration(first.metrics.ttft_ms)} against ${duration(baseline.metrics.ttft_ms)} to the first token`;
  const where = isFair ? "" : "Sharing the device, ";
  const times = `${first.variant} ran at ${digits(ratio)} times the speed of ${baseline.variant}`;
  const faster = Number.isFinite(ratio) ? `${where}${times}: ${speeds}, ${starts}.` : "";
  return [faster, alike(first.token_ids, baseline.token_ids), caution(isFair, isContended)].filter(Boolean).join(" ");
}

function alike(one, other) {
  const same = commonPrefix(one, other);
  if (same === one.length && same === other.length) return `Both wrote the same ${same} tokens.`;
  if (same === 0) return "The texts differ from the first token on.";
  return `The first ${same} tokens are the same, then the texts part.`;
}

function caution(isFair, isContended) {
  if (!isFair) return "Each slowed the other, so the times are for watching, not for measuring.";
  return isContended ? "Other requests ran meanwhile, so the times are not clean." : "";
}

/** The middle of some numbers; null of none. */
export function median(values) {
  if (!values.length) return null;
  const sorted = [...values].sort((a, b) => a - b);
  return (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2;
}
