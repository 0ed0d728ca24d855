// The server as a whole: whether it is there, what it serves, how much it has to do.

import * as api from "./api.js";
import { byId, bytes, el } from "./dom.js";

const READY_MS = 3000;

export class Server {
  /** back: called when the server can be reached again. */
  constructor(back) {
    Object.assign(this, { back, waiting: false, stateBytes: null });
  }

  /** Learns what it serves. */
  async learn() {
    const [model] = await api.models();
    this.stateBytes = model.state_bytes;
    byId("model").textContent = model.id;
    byId("max_tokens").max = model.max_tokens;
    if (!model.has_tokenizer) throw new api.ApiError("This model has no tokenizer: the API takes token ids, this page only text");
    const states = await api.states();
    const options = states.map(({ id }) => el("option", {}, id));
    byId("states").hidden = !states.length;
    byId("states").replaceChildren(el("option", { value: "" }, "Start from…"), ...options);
  }

  /** Says that it is gone, and waits for it. */
  async lost() {
    if (this.waiting) return;
    this.waiting = true;
    byId("health").textContent = "not reachable";
    while (!(await api.isReady())) await new Promise((resolve) => setTimeout(resolve, READY_MS));
    byId("health").textContent = "";
    this.waiting = false;
    await this.back();
  }

  /** Shows some of its metrics. */
  async drawMetrics() {
    const list = byId("server");
    try {
      const facts = factsOf(await api.metrics());
      list.replaceChildren(...facts.map(([term, text]) => el("div", {}, el("dt", {}, term), el("dd", {}, text))));
      list.hidden = false;
    } catch (error) {
      if (!(error instanceof api.ApiError)) throw error;
      list.hidden = true; // beside the point where something else fails, or where they are kept from us
    }
  }
}

/** What a text of Prometheus' says, for people. */
function factsOf(text) {
  const lines = text.split("\n").map((line) => line.match(/^yunmin_(\S+) (\S+)$/));
  const values = new Map(lines.filter(Boolean).map(([, name, value]) => [name, Number(value)]));
  const value = (name) => values.get(name) ?? 0;
  const saved = value("prefix_cache_tokens_total");
  const all = saved + value("prompt_tokens_total");
  return [
    ["Running", `${value("running_sequences")} of ${value("state_slots")}`],
    ["Waiting", `${value("waiting_sequences")}`],
    ["Prompt cached", all ? `${Math.round((100 * saved) / all)} %` : "–"],
    ["Cached states", `${value("prefix_cache_checkpoints")}, ${bytes(value('state_bytes{place="prefix_cache"}'))}`],
  ];
}
