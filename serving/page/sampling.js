// The controls of sampling, which the browser remembers.

import { byId } from "./dom.js";

const NAMES = ["temperature", "top_p", "max_tokens", "seed"];
const STORED = "yunmin.sampling";
const SEEDS = 2 ** 31;

export class Sampling {
  constructor() {
    const stored = JSON.parse(localStorage.getItem(STORED) ?? "{}");
    for (const name of NAMES) {
      if (stored[name] !== undefined) byId(name).value = stored[name];
      byId(name).addEventListener("change", () => this.store());
    }
  }

  store() {
    localStorage.setItem(STORED, JSON.stringify(Object.fromEntries(NAMES.map((name) => [name, byId(name).value]))));
  }

  /** Whether every value is possible; the browser points at one that is not. */
  report() {
    return NAMES.every((name) => byId(name).reportValidity());
  }

  /** As a request names them. An empty seed is drawn here, so that each turn can be repeated. */
  read() {
    const [temperature, topP, maxTokens, seed] = NAMES.map((name) => byId(name).value);
    return {
      temperature: Number(temperature),
      top_p: Number(topP),
      max_tokens: Number(maxTokens),
      seed: seed === "" ? Math.floor(Math.random() * SEEDS) : Number(seed),
    };
  }
}
