// The race: each variant's tokens on one time axis, both from their own start.

import { add, canvas, tickLabel, ticks } from "./draw.js";
import { duration } from "./words.js";

const ROW = 30;
const LEFT = 48;
const RIGHT = 14;

/** Draw the lanes' tokens so far, and put the same in words. */
export function drawTracks(host, lanes, now) {
  const started = lanes.filter((lane) => lane.isRunning || lane.times.length);
  if (!started.length) return host.replaceChildren();
  const { svg, width } = canvas(host, lanes.length * ROW + 24);
  const longest = Math.max(...started.map((lane) => lane.elapsed(now)), 1);
  const x = (ms) => LEFT + (ms / longest) * (width - LEFT - RIGHT);
  drawAxis(svg, longest, x, lanes.length * ROW);
  lanes.forEach((lane, row) => drawLane(svg, lane, now, x, row * ROW + ROW / 2));
  const running = started.find((lane) => lane.isRunning && started.some((other) => other.isOver));
  if (running) add(svg, "path", { class: "ghost", d: `M${x(running.elapsed(now))} 0V${lanes.length * ROW}` });
  host.setAttribute("aria-label", started.map((lane) => inWords(lane, now)).join("; "));
}

function drawAxis(svg, longest, x, bottom) {
  for (const time of ticks(longest, 5).filter((tick) => tick <= longest)) {
    add(svg, "path", { class: "grid", d: `M${x(time)} 0V${bottom}` });
    add(svg, "text", { x: x(time), y: bottom + 16, "text-anchor": "middle" }, tickLabel(time, longest));
  }
}

function drawLane(svg, lane, now, x, y) {
  add(svg, "text", { class: `own ${lane.variant}`, x: 0, y: y + 4 }, lane.variant);
  if (!lane.isRunning && !lane.times.length) return;
  const [first, end] = [lane.times[0] ?? lane.elapsed(now), lane.elapsed(now)];
  add(svg, "path", { class: `wait ${lane.variant}`, d: `M${x(0)} ${y}H${x(first)}` });
  if (!lane.times.length) return;
  add(svg, "path", { class: `run ${lane.variant}`, d: `M${x(first)} ${y}H${x(end)}` });
  const ticked = lane.times.map((time) => `M${x(time).toFixed(1)} ${y - 6}v12`).join("");
  add(svg, "path", { class: `ticks ${lane.variant}`, d: ticked });
  add(svg, "circle", { class: `mark ${lane.variant}`, cx: x(end), cy: y, r: 4 });
}

function inWords(lane, now) {
  const first = lane.times.length ? `first token after ${duration(lane.times[0])}, ` : "";
  return `${lane.variant}: ${first}${lane.times.length} tokens in ${duration(lane.elapsed(now))}`;
}
