// Two branches side by side, with what differs in their texts and figures.

import { bytes, count, el, milliseconds, number, speed } from "./dom.js";
import { name } from "./view.js";

const MOST_CELLS = 4_000_000; // of the table of common words; longer texts are compared by their beginnings and ends

/**
 * The words of two texts that are not in both, in order (a longest common subsequence).
 *
 * Gives for each text its words as [word, differs]; space between words never differs.
 */
export function differences(left, right) {
  const [a, b] = [left, right].map((text) => text.match(/\s+|[^\s\p{P}]+|\p{P}/gu) ?? []);
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start += 1;
  let end = 0;
  while (end < a.length - start && end < b.length - start && a.at(-1 - end) === b.at(-1 - end)) end += 1;
  const [inA, inB] = common(a.slice(start, a.length - end), b.slice(start, b.length - end));
  const marked = (words, kept) =>
    words.map((word, i) => [word, word.trim() !== "" && i >= start && i < words.length - end && !kept.has(i - start)]);
  return [marked(a, inA), marked(b, inB)];
}

/** Indices of a longest common subsequence in either list. */
function common(a, b) {
  const [inA, inB] = [new Set(), new Set()];
  const width = b.length + 1;
  if ((a.length + 1) * width > MOST_CELLS) return [inA, inB];
  const longest = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      const at = i * width + j;
      longest[at] = a[i] === b[j] ? longest[at + width + 1] + 1 : Math.max(longest[at + width], longest[at + 1]);
    }
  }
  for (let i = 0, j = 0; i < a.length && j < b.length; ) {
    const at = i * width + j;
    if (a[i] === b[j]) {
      inA.add(i++);
      inB.add(j++);
    } else if (longest[at + width] >= longest[at + 1]) i += 1;
    else j += 1;
  }
  return [inA, inB];
}

/** Draws two turns with the paths that lead to them; `act` has choose(side, id), go(id) and close. */
export function drawComparison(element, turns, left, right, act) {
  const [pathL, pathR] = [left, right].map((turn) => turns.path(turn));
  const shared = pathL.filter((turn, i) => turn === pathR[i]);
  const [ownL, ownR] = [pathL, pathR].map((path) => path.slice(shared.length));
  const [wordsL, wordsR] = differences(textOf(ownL), textOf(ownR));
  element.replaceChildren(
    el(
      "div",
      { className: "head" },
      el("h2", {}, "Compare"),
      el("p", { className: "quiet" }, summary(wordsL, wordsR)),
      el("button", { type: "button", id: "compare-close", onclick: act.close }, "Close"),
    ),
    ...drawShared(shared),
    el(
      "div",
      { className: "columns" },
      drawColumn(turns, "left", left, ownL, wordsL, act),
      drawColumn(turns, "right", right, ownR, wordsR, act),
    ),
    drawTable(turns, left, right),
  );
}

const textOf = (path) => path.map((turn) => turn.prompt + turn.text).join("");

function summary(wordsL, wordsR) {
  const differing = [...wordsL, ...wordsR].filter(([, differs]) => differs).length;
  if (!differing) return "The same text.";
  let same = 0;
  for (const [word, differs] of wordsL) {
    if (differs) break;
    same += word.length;
  }
  return `The same for ${count(same, "character")}; ${count(differing, "word")} in only one of them.`;
}

function drawShared(path) {
  if (!path.length) return [];
  const text = path.map((turn) => turn.prompt + turn.text || `[${turn.source}]`).join("");
  const position = path.at(-1).figures.position;
  const length = position === undefined ? "" : `, up to position ${number(position)}`;
  return [
    el(
      "details",
      { className: "shared" },
      el("summary", {}, `${count(path.length, "turn")} in common${length}`),
      el("div", { className: "text" }, text),
    ),
  ];
}

function drawColumn(turns, side, turn, own, words, act) {
  const options = turns.rows().map(({ turn: other, level }) => {
    const indent = "\u2003".repeat(level);
    return el("option", { value: other.id, selected: other === turn }, `${indent}${turns.label(other)} ${name(other, 40)}`);
  });
  const [label, title] = [`compare-${side}`, side === "left" ? "Left branch" : "Right branch"];
  const given = own.map((at) => at.prompt.length);
  const text = el("div", { className: "text" });
  let [index, length] = [0, 0]; // the turn that the next word belongs to, and how much of it is drawn
  for (const [word, differs] of words) {
    let rest = word;
    while (rest) {
      const until = length < given[index] ? given[index] : given[index] + own[index].text.length;
      const part = rest.slice(0, until - length);
      const kind = length < given[index] ? "given" : "came";
      if (part) text.append(el(differs ? "mark" : "span", { className: kind }, part));
      rest = rest.slice(part.length);
      length += part.length;
      if (length === given[index] + own[index].text.length) [index, length] = [index + 1, 0];
    }
  }
  if (!own.length) text.append(el("span", { className: "quiet" }, "Nothing of its own: the other branch begins here."));
  return el(
    "section",
    { className: "column", "aria-label": title },
    el("label", { className: "visually-hidden", htmlFor: label }, title),
    el("select", { id: label, onchange: (event) => act.choose(side, event.target.value) }, ...options),
    text,
    el("div", { className: "bar" }, el("button", { type: "button", className: "plain", onclick: () => act.go(turn.id) }, "Go on here")),
  );
}

const ROWS = [
  ["Temperature", (turn) => turn.sampling.temperature],
  ["Top p", (turn) => turn.sampling.top_p],
  ["Max tokens", (turn) => turn.sampling.max_tokens],
  ["Seed", (turn) => turn.sampling.seed],
  ["Generated", ({ figures }) => figures.generated !== undefined && count(figures.generated, "token")],
  ["First token", ({ figures }) => figures.firstMs !== undefined && milliseconds(figures.firstMs)],
  ["Speed", ({ figures }) => figures.speed !== undefined && speed(figures.speed)],
  ["Prompt cached", ({ figures }) => figures.promptTokens !== undefined && `${number(figures.cached)} of ${number(figures.promptTokens)}`],
  ["Position", ({ figures }) => figures.position !== undefined && number(figures.position)],
  ["Saved as", ({ figures }) => figures.savedBytes !== undefined && bytes(figures.savedBytes)],
];

function drawTable(turns, left, right) {
  const [labelL, labelR] = [left, right].map((turn) => `Turn ${turns.label(turn)}`);
  const head = el("tr", {}, el("td"), ...[labelL, labelR].map((text) => el("th", { scope: "col" }, text)));
  const rows = ROWS.map(([title, value]) => {
    const [a, b] = [left, right].map((turn) => `${value(turn) || value(turn) === 0 ? value(turn) : "–"}`);
    const className = a === b ? "same" : "differs";
    return el("tr", { className }, el("th", { scope: "row" }, title), el("td", {}, a), el("td", {}, b));
  });
  return el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows));
}
