// Elements, and figures as people read them.

/** An element with properties, attributes (names with a dash, and role) and children. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "dataset") Object.assign(element.dataset, value);
    else if (name === "role" || name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export const byId = (id) => document.getElementById(id);

export function button(label, onclick, properties = {}) {
  return el("button", { type: "button", className: "plain", onclick, ...properties }, label);
}

export function count(value, noun) {
  return `${number(value)} ${noun}${value === 1 ? "" : "s"}`;
}

export function number(value) {
  return value.toLocaleString("en");
}

export function milliseconds(value) {
  return value < 10 ? `${value.toFixed(1)} ms` : value < 10_000 ? `${number(Math.round(value))} ms` : `${(value / 1000).toFixed(1)} s`;
}

export function speed(tokensPerSecond) {
  return `${tokensPerSecond.toFixed(tokensPerSecond < 100 ? 1 : 0)} tokens/s`;
}

/** Decimal units, as disks and networks count. */
export function bytes(value) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (value >= size) return `${(value / size).toFixed(value < 10 * size ? 2 : 1)} ${unit}`;
  }
  return `${value} bytes`;
}

/** The beginning of a text on one line. */
export function snippet(text, length) {
  const line = text.trim().replace(/\s+/g, " ");
  return line.length > length ? `${line.slice(0, length)}…` : line;
}

/** Collects text and draws it once per frame of the screen: tokens can come faster. */
export class Frames {
  constructor(draw) {
    Object.assign(this, { draw, text: "", asked: 0 });
  }

  add(text) {
    this.text += text;
    this.asked ||= requestAnimationFrame(() => this.flush());
  }

  flush() {
    this.asked = 0;
    this.draw(this.text);
    this.text = "";
  }

  end() {
    cancelAnimationFrame(this.asked);
    this.flush();
  }
}
