// One variant's column: its text as it comes, and its numbers.

import { digits, duration, firstDifference, memory, wordAt } from "./words.js";

export class Lane {
  constructor(variant, weightBytes) {
    const template = document.getElementById("lane");
    this.variant = variant;
    this.element = template.content.firstElementChild.cloneNode(true);
    this.element.dataset.variant = variant;
    this.find("h2").textContent = variant;
    this.find(".text").setAttribute("aria-label", `Answer of ${variant}`);
    this.show("weights", memory(weightBytes));
    this.reset("");
  }

  /** Forget the last run. */
  reset(state) {
    this.text = "";
    this.times = []; // of each token, milliseconds since the start
    this.startedAt = null;
    this.answer = null;
    this.isOver = false;
    this.setState(state);
    this.parted(null);
    for (const name of ["speed", "ttft", "tokens"]) this.show(name, "–");
  }

  /** Start the clock. */
  start(now, state) {
    this.startedAt = now;
    this.setState(state);
  }

  /** Take what a step added. */
  push(delta, now) {
    this.text += delta.text;
    for (const _ of delta.token_ids) this.times.push(now - this.startedAt);
    this.setState("writing");
  }

  /** Take the whole answer: the server's own numbers stand in for ours. */
  finish(answer) {
    this.answer = answer;
    this.text = answer.text;
    const { e2e_ms: end, ttft_ms: first } = answer.metrics;
    const late = end === null ? 0 : end - this.times.at(-1);
    this.times = this.times.map((time) => time + late);
    if (first !== null) this.times[0] = first;
    this.end({ stop: "finished", length: "reached the limit", abort: "cut off" }[answer.finish_reason]);
  }

  /** Stop the clock at the last token. */
  end(state) {
    this.isOver = true;
    this.setState(state);
  }

  get isRunning() {
    return this.startedAt !== null && !this.isOver;
  }

  /** Milliseconds from the start to now, or to the end. */
  elapsed(now) {
    if (this.startedAt === null) return 0;
    return this.isOver ? (this.times.at(-1) ?? 0) : now - this.startedAt;
  }

  /** Bring the column up to date; `other` is the text beside it, null where there is none. */
  render(now, other, areWhole) {
    this.parted(other === null ? null : firstDifference(this.text, other, areWhole));
    if (!this.times.length) return;
    const speed = this.answer?.metrics.tokens_per_s ?? (this.times.length / this.elapsed(now)) * 1000;
    this.show("speed", Number.isFinite(speed) ? digits(speed) : "–");
    this.show("ttft", duration(this.answer?.metrics.ttft_ms ?? this.times[0]));
    this.show("tokens", String(this.times.length));
  }

  setState(state) {
    this.find(".state").textContent = state;
    this.find(".text").setAttribute("aria-busy", String(state === "reading" || state === "writing"));
  }

  /** Show the text with a mark at a place, or plain. */
  parted(at) {
    const isParted = at !== null;
    const word = isParted ? wordAt(this.text, at) : "";
    const [space, mark] = [word.match(/^\s*/)[0], this.find("mark")];
    this.find(".same").textContent = isParted ? this.text.slice(0, at) + space : this.text;
    mark.hidden = !isParted;
    mark.textContent = word.slice(space.length) || (isParted ? "end" : "");
    mark.setAttribute("title", "Here the texts part");
    this.find(".rest").textContent = isParted ? this.text.slice(at + word.length) : "";
    this.element.classList.toggle("is-parted", isParted);
  }

  show(name, value) {
    const shown = this.find(`[data-of="${name}"]`);
    shown.textContent = value;
    shown.classList.toggle("none", value === "–");
  }

  find(selector) {
    return this.element.querySelector(selector);
  }
}
