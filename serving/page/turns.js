// Turns: a forest of texts. A turn is a prompt and what followed it, and owns the session whose state has read it all.
//
// parent: id of the turn before it, or null.      session: id on the server, or null where it never had a whole one.
// status: running, done, stopped, failed, origin (a state that came without a text).    gone: the server does not know it (any more).
// foreign: it belongs to another model than the one that is served.
// prompt, text, tokenIds: what went in, and what came out.    sampling: temperature, top_p, max_tokens, seed.
// figures: firstMs, speed, generated, promptTokens, cached, position, stateBytes, as far as they are known.

const TURN = "yunmin.turn.";
const TRASH = "yunmin.trash."; // sessions to delete when the server can be reached again
const BEAT_MS = 1000;
const SILENT_MS = 10_000;
const LETTERS = "abcdefghijklmnopqrstuvwxyz";

/** The turns of this browser, each under a key of its own: tabs add to them without overwriting each other's. */
export class Turns {
  constructor() {
    this.tab = sessionStorage.getItem("yunmin.tab") ?? crypto.getRandomValues(new Uint32Array(2)).join("-");
    sessionStorage.setItem("yunmin.tab", this.tab);
    this.left = false;
    this.read();
  }

  /** Reads them from the browser's storage, where other tabs may have written. */
  read() {
    const before = this.all ?? new Map();
    this.all = new Map();
    for (const key of Object.keys(localStorage).filter((name) => name.startsWith(TURN))) {
      const stored = JSON.parse(localStorage.getItem(key));
      const turn = before.get(stored.id) ?? {};
      this.all.set(stored.id, this.isOurs(turn) ? turn : Object.assign(turn, stored));
    }
    for (const turn of this.all.values()) {
      if (turn.parent !== null && !this.all.has(turn.parent)) turn.parent = null;
    }
  }

  isOurs(turn) {
    return turn.status === "running" && turn.tab === this.tab;
  }

  /** Ends turns that were cut off when their tab was closed or loaded again; call it before this tab starts any. */
  endInterrupted() {
    for (const turn of this.all.values()) {
      if (turn.status !== "running" || (turn.tab !== this.tab && Date.now() - turn.saved < SILENT_MS)) continue;
      turn.status = turn.tokenIds.length ? "stopped" : "failed";
      turn.error = "Cut off when its page was closed";
      if (turn.session !== null) trash.put(turn.session);
      turn.session = null;
      this.save(turn);
    }
  }

  /** Whether the server has a state to go on from. */
  isAlive(turn) {
    return turn.session !== null && !turn.gone && !turn.foreign;
  }

  owns(session) {
    return [...this.all.values()].some((turn) => turn.session === session);
  }

  get(id) {
    return this.all.get(id) ?? null;
  }

  get size() {
    return this.all.size;
  }

  add(fields) {
    const id = `${Date.now().toString(36)}-${crypto.getRandomValues(new Uint32Array(1))[0].toString(36)}`;
    const empty = { prompt: "", text: "", tokenIds: [], sampling: {}, figures: {}, session: null };
    const turn = { id, parent: null, ...empty, gone: false, foreign: false, error: null, tab: this.tab, created: Date.now(), ...fields };
    this.all.set(id, turn);
    return turn;
  }

  /** Stores a turn; throws where the browser has no room left. */
  save(turn) {
    if (this.left || !this.all.has(turn.id)) return;
    if (turn.status === "running") turn.saved = Date.now(); // alone: other tabs hear only of what is new
    localStorage.setItem(TURN + turn.id, JSON.stringify(turn));
  }

  /** Stores what runs as it is now, and nothing after: a stream that ends because its page is closed has not failed. */
  leave() {
    for (const turn of this.all.values()) if (this.isOurs(turn)) this.save(turn);
    this.left = true;
  }

  /** Stores a turn that grows, but not at each token. */
  beat(turn) {
    if (Date.now() - turn.saved >= BEAT_MS) this.save(turn);
  }

  /** Removes a turn and all that follow it. */
  remove(turn) {
    const removed = this.below(turn);
    for (const { id } of removed) {
      this.all.delete(id);
      localStorage.removeItem(TURN + id);
    }
    return removed;
  }

  children(id) {
    return [...this.all.values()].filter((turn) => turn.parent === id).sort((a, b) => a.created - b.created);
  }

  /** A turn and all that follow it. */
  below(turn) {
    return [turn, ...this.children(turn.id).flatMap((child) => this.below(child))];
  }

  /** From the first turn to this one. */
  path(turn) {
    const turns = [];
    for (let at = turn; at !== null; at = this.get(at.parent)) turns.unshift(at);
    return turns;
  }

  /** Every turn in the order of reading, with its level: a turn is indented where its parent has several children. */
  rows() {
    const rows = [];
    const walk = (turn, level) => {
      rows.push({ turn, level });
      const children = this.children(turn.id);
      for (const child of children) walk(child, level + (children.length > 1 ? 1 : 0));
    };
    for (const root of this.children(null)) walk(root, 0);
    return rows;
  }

  /** Its number on its path, with a letter where there are branches: 3b. */
  label(turn) {
    const depth = this.path(turn).length;
    const siblings = this.children(turn.parent);
    if (turn.parent === null || siblings.length === 1) return `${depth}`;
    const index = siblings.indexOf(turn);
    return `${depth}${LETTERS[index] ?? `.${index + 1}`}`;
  }

  /** Its latest sibling or, where it has none, the latest end of a branch beside it. */
  counterpart(turn) {
    const others = this.children(turn.parent).filter((other) => other !== turn && turn.parent !== null);
    if (others.length) return others.at(-1);
    const line = new Set([...this.path(turn), ...this.below(turn)]);
    const ends = [...this.all.values()].filter((other) => !line.has(other) && !this.children(other.id).length);
    const rooted = ends.filter((other) => this.path(other)[0] === this.path(turn)[0]);
    return (rooted.length ? rooted : ends).sort((a, b) => a.created - b.created).at(-1) ?? null;
  }
}

export const isTurnKey = (key) => key === null || key.startsWith(TURN);

export const trash = {
  put: (session) => localStorage.setItem(TRASH + session, ""),
  drop: (session) => localStorage.removeItem(TRASH + session),
  all: () => Object.keys(localStorage).filter((key) => key.startsWith(TRASH)).map((key) => key.slice(TRASH.length)),
};
