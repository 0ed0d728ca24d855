// The tree of turns, and the text of one path through it.

import { button, byId, bytes, count, el, milliseconds, number, snippet, speed } from "./dom.js";

const ENDINGS = { stop: "the model ended it", length: "reached max tokens" };

/** Draws every turn as an item of the tree; `act` has open, compare and remove. */
export function drawTree(element, turns, { selected, compared, focused }, act) {
  const rows = turns.rows();
  const ids = rows.map(({ turn }) => turn.id);
  const tabbable = [focused, selected, ids[0]].find((id) => ids.includes(id));
  const items = rows.map(({ turn, level }) => {
    const label = turns.label(turn);
    const item = el(
      "div",
      {
        role: "treeitem",
        className: `row ${turn.status}`,
        tabIndex: turn.id === tabbable ? 0 : -1,
        dataset: { id: turn.id },
        "aria-level": `${level + 1}`,
        "aria-selected": `${turn.id === selected}`,
        "aria-label": [`Turn ${label}`, name(turn, 60), ...marks(turn)].join(", "),
        onclick: () => act.open(turn.id),
      },
      ...Array.from({ length: level }, () => el("span", { className: "branch", "aria-hidden": "true" })),
      el("span", { className: "number" }, label),
      el("span", { className: "name" }, title(turn)),
      ...marks(turn).map((text) => el("span", { className: "mark" }, text)),
    );
    if (turn.id === compared) item.classList.add("compared");
    if (turn.id !== selected) {
      const compare = (event) => {
        event.stopPropagation();
        act.compare(turn.id);
      };
      item.append(button("Compare", compare, { tabIndex: -1, "aria-hidden": "true" }));
    }
    return item;
  });
  element.replaceChildren(...items);
}

function title(turn) {
  if (turn.status === "origin") return turn.source;
  const given = snippet(turn.prompt, 40);
  return el("span", {}, el("span", { className: "given" }, given || "…"), ` ${snippet(turn.text, 60)}`);
}

/** A turn in a few words. */
export function name(turn, length) {
  return turn.status === "origin" ? turn.source : snippet(`${turn.prompt}${turn.text}`, length) || "(nothing)";
}

function marks(turn) {
  if (turn.gone) return ["gone"];
  if (turn.foreign) return ["other model"];
  return ["running", "stopped", "failed"].filter((status) => status === turn.status);
}

/** Draws a path; gives the node that the text of its last turn grows in. */
export function drawPath(element, turns, turn, act) {
  if (turn === null) {
    element.replaceChildren(welcome(turns.size));
    return null;
  }
  const path = turns.path(turn);
  element.replaceChildren(...path.map((at) => drawTurn(turns, at, act, at === turn)));
  return element.lastElementChild.querySelector(".came");
}

function welcome(known) {
  const text = known
    ? "A new session starts with the next prompt. Choose a turn to go on from it, or to branch there."
    : "Type a prompt below. Each turn keeps the model's state, so that any of them can be continued, branched and compared.";
  return el("p", { className: "welcome quiet" }, text);
}

function drawTurn(turns, turn, act, isLast) {
  const label = turns.label(turn);
  const heading = el("h2", {}, `Turn ${label}`);
  const tags = marks(turn).map((text) => el("span", { className: "mark" }, text));
  const article = el("article", { className: `turn ${turn.status}`, dataset: { id: turn.id } });
  if (isLast) article.setAttribute("aria-current", "true");
  article.append(el("div", { className: "head" }, heading, ...tags), drawText(turn));
  if (turn.error) article.append(el("p", { className: "error" }, turn.error));
  article.append(drawFacts(turn));
  if (turn.status !== "running") article.append(drawActions(turns, turn, label, act, isLast));
  return article;
}

function drawText(turn) {
  if (turn.status === "origin") {
    const what = turn.state === undefined ? "A state that was uploaded" : "A state of the server";
    return el("p", { className: "quiet" }, `${what}: ${turn.source}`);
  }
  const given = el("span", { className: "given" }, turn.prompt);
  return el("div", { className: "text" }, given, el("span", { className: "came" }, turn.text));
}

function drawFacts(turn) {
  const { generated, speed: rate, firstMs, promptTokens, cached, position, savedBytes } = turn.figures;
  const facts = [];
  if (generated !== undefined) facts.push(count(generated, "token"));
  if (turn.status === "stopped") facts.push("stopped");
  else if (turn.ending) facts.push(ENDINGS[turn.ending] ?? turn.ending);
  if (rate !== undefined) facts.push(speed(rate));
  if (firstMs !== undefined) facts.push(`first token after ${milliseconds(firstMs)}`);
  if (promptTokens !== undefined) facts.push(`${number(cached)} of ${count(promptTokens, "prompt token")} cached`);
  if (position !== undefined) facts.push(`position ${number(position)}`);
  if (savedBytes !== undefined) facts.push(`saved as ${bytes(savedBytes)}`);
  if (turn.sampling.seed !== undefined) facts.push(`seed ${turn.sampling.seed}`);
  return el("ul", { className: "facts" }, ...facts.map((fact) => el("li", {}, fact)));
}

function drawActions(turns, turn, label, act, isLast) {
  const of = (verb) => ({ "aria-label": `${verb} turn ${label}` });
  const actions = [];
  if (!turns.isAlive(turn)) {
    const known = turn.status !== "origin" || turn.state !== undefined;
    if (known) actions.push(button("Read again", () => act.readAgain(turn.id), of("Read again")));
  } else if (!isLast) {
    actions.push(button("Branch here", () => act.branch(turn.id), of("Branch at")));
  }
  if (turn.status !== "origin") actions.push(button("Again", () => act.again(turn.id), of("Run again")));
  if (turns.counterpart(turn)) actions.push(button("Compare", () => act.compareFrom(turn.id), of("Compare")));
  if (turns.isAlive(turn)) actions.push(button("Download", () => act.download(turn.id), of("Download the state of")));
  actions.push(button("Delete", () => act.remove(turn.id), of("Delete")));
  return el("div", { className: "bar" }, ...actions);
}

/** Fills the figures over the prompt; `stateBytes` is the size of any sequence's state. */
export function drawFigures(element, turn, stateBytes) {
  element.hidden = turn === null;
  const { generated, speed: rate, firstMs, promptTokens, cached, position } = turn?.figures ?? {};
  const show = (id, value) => (byId(`figure-${id}`).textContent = value ?? "–");
  show("first", firstMs && milliseconds(firstMs));
  show("speed", rate && speed(rate));
  show("tokens", generated === undefined ? null : count(generated, "token"));
  show("cached", promptTokens && `${number(cached)} of ${number(promptTokens)}`);
  show("position", position && number(position));
  show("state", stateBytes && bytes(stateBytes));
}
