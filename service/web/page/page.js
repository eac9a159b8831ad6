// The page: what is served, one run at a time, and what the server remembers.

import { Failure, generate, getJson } from "./api.js";
import { Lane } from "./lane.js";
import { drawRecent, fillTable, inSum } from "./recent.js";
import { drawTracks } from "./tracks.js";
import { rankInWords, verdict } from "./words.js";

const BASELINE = "fp16";
const REFRESH_MS = 10_000;
const CALM_MS = 500;
const HINTS = {
  fair: "Same prompt, same seed, each with the device to itself: the times can be compared.",
  "at-once": "Both share the device and slow each other down: good to watch, not to measure.",
};
const isCalm = matchMedia("(prefers-reduced-motion: reduce)");
const at = (id) => document.getElementById(id);

let lanes = [];
let recent = [];
let loading = null; // the answer of /info that is on its way
let running = null; // AbortController of the run in progress
let drawnAt = 0;
let wantsKey = false;

// What is served

function loadInfo() {
  loading ??= showInfo().finally(() => (loading = null));
  return loading;
}

async function showInfo() {
  const info = await getJson("/info", at("key").value);
  const variants = Object.entries(info.variants ?? {});
  at("served").textContent = [info.model, info.device].filter(Boolean).join(" · ");
  showRanks(info.ranks ?? []);
  at("versions").textContent = info.versions?.ottava ? `ottava ${info.versions.ottava}` : "";
  const quantized = variants.filter(([name, variant]) => name !== BASELINE && variant.description);
  const described = quantized.map(([name, variant]) => `${name}: ${variant.description}`);
  at("lede").textContent = [...described, info.one_token?.text].filter(Boolean).join(" ");
  lanes = variants.map(([name, variant]) => new Lane(name, variant.weight_bytes));
  at("lanes").replaceChildren(...lanes.map((lane) => lane.element));
  at("order").hidden = at("order-hint").hidden = lanes.length < 2;
}

/** Each rank of a model on several devices. */
function showRanks(ranks) {
  at("ranks").hidden = ranks.length < 2;
  at("ranks").replaceChildren(
    ...ranks.map((rank) => {
      const item = document.createElement("li");
      item.textContent = rankInWords(rank);
      item.classList.toggle("ended", rank.state === "ended");
      return item;
    }),
  );
}

async function refresh() {
  if (document.hidden || wantsKey) return;
  try {
    const key = at("key").value;
    const [{ requests }, sums] = await Promise.all([getJson("/requests/recent", key), getJson("/compare", key)]);
    if (!at("ranks").hidden) showRanks((await getJson("/info", key)).ranks);
    recent = requests;
    drawRecent(at("chart"), recent, at("measure").value);
    fillTable(at("rows"), recent);
    at("recent-summary").textContent = inSum(sums);
  } catch (error) {
    // A server that is gone is told by the next run, not every ten seconds.
    if (error.status === 401) fail(error);
  }
}

// One run

async function run() {
  if (running) return;
  running = new AbortController();
  setRunning(true);
  at("verdict").textContent = "Running.";
  at("error").hidden = true;
  let inTurn = true;
  try {
    if (!lanes.length) await loadInfo();
    inTurn = isFair();
    await race(inTurn);
  } finally {
    for (const lane of lanes.filter((lane) => !lane.isOver)) lane.end(running.signal.aborted ? "stopped" : "failed");
    running = null;
    setRunning(false);
    draw();
  }
  conclude(inTurn);
  await refresh();
}

async function race(inTurn) {
  for (const lane of lanes) lane.reset(inTurn && lane.variant === BASELINE ? "waits its turn" : "");
  requestAnimationFrame(draw);
  await (inTurn ? runInTurn() : runAtOnce());
}

function isFair() {
  return lanes.length < 2 || new FormData(at("form")).get("order") === "fair";
}

/** The lanes, the baseline's last. */
function inOrder() {
  return [...lanes].sort((one, other) => (one.variant === BASELINE) - (other.variant === BASELINE));
}

async function runInTurn() {
  const order = inOrder();
  const [first, second] = order;
  first.start(performance.now(), "reading");
  let last = first.startedAt;
  const body = { ...asked(), variant: first.variant, compare: Boolean(second) };
  for await (const event of generate(body, at("key").value, running.signal)) {
    if (event.metrics) {
      first.finish(event);
      second?.finish(event.baseline);
      continue;
    }
    const lane = order.find((lane) => lane.variant === event.variant);
    if (lane.startedAt === null) {
      first.end("finished");
      lane.start(last, "reading");
    }
    last = performance.now();
    lane.push(event, last);
  }
}

async function runAtOnce() {
  const seed = crypto.getRandomValues(new Uint32Array(1))[0];
  const streams = lanes.map(async (lane) => {
    lane.start(performance.now(), "reading");
    const body = { ...asked(), variant: lane.variant, seed };
    for await (const event of generate(body, at("key").value, running.signal)) {
      if (event.metrics) lane.finish(event);
      else lane.push(event, performance.now());
    }
  });
  const results = await Promise.allSettled(streams);
  const failed = results.find((result) => result.status === "rejected");
  if (failed) throw failed.reason;
}

function asked() {
  const number = (id) => at(id).valueAsNumber;
  return { prompt: at("prompt").value, max_tokens: number("max-tokens"), temperature: number("temperature") };
}

function conclude(inTurn) {
  const [first, baseline] = inOrder().map((lane) => lane.answer);
  at("verdict").textContent = baseline ? verdict(first, baseline, inTurn, first.contended) : "Finished.";
}

function draw(now = performance.now()) {
  if (running && isCalm.matches && now - drawnAt < CALM_MS) return requestAnimationFrame(draw);
  drawnAt = now;
  const areWhole = lanes.length === 2 && lanes.every((lane) => lane.answer);
  lanes.forEach((lane, place) => lane.render(now, lanes.length === 2 ? lanes[1 - place].text : null, areWhole));
  drawTracks(at("tracks"), lanes, now);
  if (running) requestAnimationFrame(draw);
}

function setRunning(isRunning) {
  const hadFocus = [at("run"), at("stop")].includes(document.activeElement);
  at("run").disabled = isRunning;
  at("stop").disabled = !isRunning;
  if (hadFocus) at(isRunning ? "stop" : "run").focus();
}

function fail(error) {
  if (error.name === "AbortError") {
    at("verdict").textContent = "Stopped.";
    return;
  }
  if (!(error instanceof Failure)) throw error;
  at("verdict").textContent = "";
  at("error").textContent = error.message;
  at("error").hidden = false;
  if (error.status === 401) {
    wantsKey = true;
    at("key-field").hidden = false;
    at("key").focus();
  }
}

// Wiring

function stop() {
  running?.abort();
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run().catch(fail);
});
at("stop").addEventListener("click", stop);
at("key").addEventListener("change", () => {
  wantsKey = false;
  at("error").hidden = true;
  (lanes.length ? Promise.resolve() : loadInfo()).then(refresh).catch(fail);
});
at("order").addEventListener("change", showHint);
at("measure").addEventListener("change", () => drawRecent(at("chart"), recent, at("measure").value));
document.addEventListener("visibilitychange", refresh);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
});
new ResizeObserver(() => {
  if (!running) draw();
  drawRecent(at("chart"), recent, at("measure").value);
}).observe(at("results"));

function showHint() {
  at("order-hint").textContent = HINTS[new FormData(at("form")).get("order")];
}

showHint();
loadInfo().then(refresh).catch(fail);
setInterval(refresh, REFRESH_MS);
