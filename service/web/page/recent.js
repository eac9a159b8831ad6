// The last hundred requests: drawn, in a sentence, and as a table.

import { add, canvas, tickLabel, ticks } from "./draw.js";
import { digits, duration, median } from "./words.js";

const HEIGHT = 190;
const LEFT = 52;
const RIGHT = 76;
const BOTTOM = 24;
const NAMES = { tpot_ms: "Time per token", ttft_ms: "Time to the first token", e2e_ms: "Time of the whole answer" };

/** Draw one measure of the requests, oldest left. */
export function drawRecent(host, requests, measure) {
  const all = requests.map((request, place) => ({ ...request, place, value: request[measure] }));
  const points = all.filter((point) => point.value !== null);
  const medians = mediansOf(points);
  host.setAttribute("aria-label", inWords(NAMES[measure], points.length, medians));
  if (!points.length) return host.replaceChildren();
  const { svg, width } = canvas(host, HEIGHT);
  const marks = ticks(Math.max(...points.map((point) => point.value)), 4);
  const x = (place) => LEFT + ((place + 0.5) / requests.length) * (width - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - (value / marks.at(-1)) * (HEIGHT - BOTTOM - 10);
  drawAxes(svg, marks, width, y);
  drawMedians(svg, medians, width, y);
  for (const point of points) {
    const words = [point.variant, duration(point.value), `${point.generated_tokens} tokens`, ago(point.age_s)];
    add(drawPoint(svg, point, x(point.place), y(point.value)), "title", {}, words.join(", "));
  }
}

function mediansOf(points) {
  const variants = [...new Set(points.map((point) => point.variant))].sort().reverse();
  return variants.map((variant) => {
    const own = points.filter((point) => point.variant === variant);
    return [variant, median(own.map((point) => point.value))];
  });
}

function inWords(name, count, medians) {
  if (!count) return "No requests yet";
  const said = medians.map(([variant, value]) => `${variant}: ${duration(value)}`);
  return `${name} of the last ${count} requests. Median of ${said.join(", ")}.`;
}

function drawAxes(svg, marks, width, y) {
  for (const value of marks) {
    add(svg, "path", { class: "grid", d: `M${LEFT} ${y(value)}H${width - RIGHT}` });
    add(svg, "text", { x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, tickLabel(value, marks.at(-1)));
  }
  add(svg, "text", { x: LEFT, y: HEIGHT - 6 }, "older");
  add(svg, "text", { x: width - RIGHT, y: HEIGHT - 6, "text-anchor": "end" }, "newest");
}

function drawMedians(svg, medians, width, y) {
  let above = -Infinity;
  for (const [variant, value] of [...medians].sort((a, b) => b[1] - a[1])) {
    const at = Math.max(y(value), above + 28); // two labels, two lines each, must not cover one another
    above = at;
    add(svg, "path", { class: `median ${variant}`, d: `M${LEFT} ${y(value)}H${width - RIGHT}` });
    add(svg, "text", { class: `own ${variant}`, x: width - RIGHT + 8, y: at }, variant);
    add(svg, "text", { x: width - RIGHT + 8, y: at + 13 }, duration(value));
  }
}

function drawPoint(svg, point, x, y) {
  const look = { class: `mark ${point.variant}` };
  if (point.variant === "fp16") return add(svg, "rect", { ...look, x: x - 3, y: y - 3, width: 6, height: 6 });
  return add(svg, "circle", { ...look, cx: x, cy: y, r: 3.2 });
}

/** The same as rows of a table, newest first. */
export function fillTable(body, requests) {
  const rows = requests.toReversed().map((request) => {
    const row = document.createElement("tr");
    const times = [request.ttft_ms, request.tpot_ms, request.e2e_ms].map(duration);
    const texts = [ago(request.age_s), request.variant, request.route, ...times];
    texts.push(request.generated_tokens, request.finish_reason);
    for (const text of texts) row.insertCell().textContent = text;
    return row;
  });
  body.replaceChildren(...rows);
}

/** What all comparisons so far say, in a sentence. */
export function inSum({ compare, shadow }) {
  const sums = [said("Asked for", compare), said("In shadow mode", shadow)].filter(Boolean);
  return sums.join(" ") || "No comparison with the baseline yet.";
}

function said(how, summary) {
  if (!summary.count) return "";
  const speed = summary.speedup_median.tokens_per_s;
  const faster = speed === null ? "" : `, at a median of ${digits(speed)} times the speed`;
  const count = `${summary.count} ${summary.count === 1 ? "comparison" : "comparisons"} with the baseline`;
  return `${how}: ${count}${faster}, ${digits(summary.agreement_mean * 100)} % of tokens the same.`;
}

function ago(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s ago`;
  return seconds < 3600 ? `${Math.round(seconds / 60)} min ago` : `${Math.round(seconds / 3600)} h ago`;
}
