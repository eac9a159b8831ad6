// SVG in pixels of the screen, so that text keeps its size on a phone.

const NAMESPACE = "http://www.w3.org/2000/svg";

/** An element with attributes, appended to its parent. */
export function add(parent, name, attributes = {}, text = "") {
  const element = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text) element.textContent = text;
  return parent.appendChild(element);
}

/** An empty drawing over the full width of its host, in place of the one before. */
export function canvas(host, height) {
  const width = Math.max(host.clientWidth, 200);
  const svg = document.createElementNS(NAMESPACE, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  svg.setAttribute("aria-hidden", "true"); // the host has the words
  host.replaceChildren(svg);
  return { svg, width };
}

/** What stands at a tick of an axis of milliseconds: in seconds where the axis reaches one. */
export function tickLabel(ms, max) {
  if (!ms) return "0";
  return max < 1000 ? `${ms} ms` : `${Number((ms / 1000).toFixed(4))} s`;
}

/** Round numbers from 0 up to the first at or above max, about `count` of them. */
export function ticks(max, count) {
  const raw = (max || 1) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= raw) * power;
  const places = Math.max(0, -Math.floor(Math.log10(step)));
  const found = [0];
  while (found.at(-1) < max) found.push(Number((found.length * step).toFixed(places)));
  return found;
}
