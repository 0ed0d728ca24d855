// The page: what is chosen, what runs, and what the keys and buttons do.

import * as api from "./api.js";
import { drawComparison } from "./compare.js";
import { askKey, confirmDeletion, notices } from "./dialogs.js";
import { byId, count, el, Frames, number } from "./dom.js";
import { listen } from "./keys.js";
import { begin, check, drop, emptyTrash, readAgain, run } from "./run.js";
import { Sampling } from "./sampling.js";
import { Server } from "./server.js";
import { Speaker } from "./speaker.js";
import { isTurnKey, Turns } from "./turns.js";
import { drawFigures, drawPath, drawTree } from "./view.js";

const CHECKS = 6; // sessions looked up at a time
const TRASH_MS = 1000;
const NEAR_PX = 40; // to the end of the text: new text is followed
const REDRAW_MS = 250; // of a comparison while one side grows

const turns = new Turns();
const sampling = new Sampling();
const speaker = new Speaker(byId("spoken"));
const notice = notices(byId("notice"));
const prompt = byId("prompt");
const wide = matchMedia("(min-width: 56rem)"); // where turns and text have room beside each other
const server = new Server(connect);

let selected = sessionStorage.getItem("yunmin.selected"); // id of the turn that is shown, and that the next one follows
let compared = sessionStorage.getItem("yunmin.compared"); // id of the turn beside it, or null
let focused = null; // id in the tree
let drawn = null; // id of the turn whose text is shown
// { turn, abort, grows: the node of its text, shown: how much of it, compared: when it was last drawn beside another }
let running = null;
let busy = false; // something else is being done on the server

// ---- drawing

function draw() {
  if (!turns.get(selected)) selected = null;
  if (!turns.get(compared) || compared === selected || selected === null) compared = null;
  for (const [name, id] of [["selected", selected], ["compared", compared]]) {
    if (id === null) sessionStorage.removeItem(`yunmin.${name}`);
    else sessionStorage.setItem(`yunmin.${name}`, id);
  }
  drawTurns();
  drawText();
  drawControls();
}

function drawTurns() {
  const hadFocus = byId("tree").contains(document.activeElement);
  drawTree(byId("tree"), turns, { selected, compared, focused }, { open, compare });
  byId("count").textContent = turns.size ? `(${turns.size})` : "";
  byId("tree-help").hidden = !turns.size;
  if (hadFocus) byId("tree").querySelector('[tabindex="0"]')?.focus();
}

function drawText() {
  const follows = drawn !== selected || atEnd(); // else it is only refreshed, and stays where it is read
  const comparing = compared !== null;
  byId("transcript").hidden = comparing;
  byId("compare").hidden = !comparing;
  const turn = turns.get(selected);
  if (comparing) drawComparison(byId("compare"), turns, turn, turns.get(compared), { choose, go: branch, close: closeComparison });
  const grows = drawPath(byId("transcript"), turns, turn, { branch, again, compareFrom, download, remove, readAgain: revive });
  if (running) Object.assign(running, { grows: running.turn === turn ? grows : null, shown: running.turn.text.length });
  if (!comparing && follows) scrollDown();
  drawn = comparing ? null : selected;
}

function drawControls() {
  const turn = turns.get(selected);
  const where = turn?.figures.position === undefined ? "" : ` at position ${number(turn.figures.position)}`;
  byId("prompt-label").textContent = turn ? `Prompt, after turn ${turns.label(turn)}${where}` : "Prompt, in a new session";
  drawFigures(byId("figures"), running?.turn ?? turn, server.stateBytes);
  const [send, stop] = [byId("send"), byId("stop")];
  const had = [send, stop].includes(document.activeElement);
  send.disabled = busy || running !== null;
  send.hidden = running !== null;
  stop.hidden = running === null;
  if (had) (running ? stop : send).focus();
}

/** What scrolls the text: on narrow screens the whole page. */
const scroller = () => (wide.matches ? byId("transcript") : document.scrollingElement);

function atEnd() {
  const { scrollHeight, scrollTop, clientHeight } = scroller();
  return scrollHeight - scrollTop - clientHeight < NEAR_PX;
}

function scrollDown() {
  const element = scroller();
  element.scrollTop = element.scrollHeight;
}

// ---- running

async function send() {
  if (busy || running || !sampling.report()) return;
  const parent = turns.get(selected);
  if (!prompt.value && parent === null) return notice.show("A new session needs a prompt to start with.");
  const given = prompt.value;
  prompt.value = "";
  const began = await start(parent, given);
  if (!began && !prompt.value) prompt.value = given; // nothing came of it: the text is for another attempt
}

/** Runs a turn after another; gives whether anything came of it. */
async function start(parent, given) {
  if (busy || running) return false;
  notice.clear();
  if (parent !== null && !turns.isAlive(parent)) {
    const message = `The server has no state to go on from after turn ${turns.label(parent)}. It can read the text again.`;
    notice.show(message, { label: "Read again and send", again: async () => (await revive(parent.id)) && send() });
    return false;
  }
  const turn = turns.add({ status: "running", parent: parent?.id ?? null, prompt: given, sampling: sampling.read() });
  running = { turn, abort: new AbortController(), grows: null, shown: 0, compared: 0 };
  selected = turn.id;
  speaker.begin();
  draw();
  const frames = new Frames(grow);
  try {
    await run(turns, turn, { signal: running.abort.signal, changed: (event) => frames.add(event.text) });
  } catch (error) {
    fail(error, () => retry(turn));
  }
  frames.end();
  running = null;
  const came = turn.tokenIds.length > 0;
  if (!came && turn.status !== "done") {
    turns.remove(turn);
    if (selected === turn.id) selected = turn.parent;
  }
  if (came && turn.status === "stopped") await doing(() => readAgain(turns, turn));
  speaker.end(turn.status === "done" ? count(turn.tokenIds.length, "token") : turn.status);
  draw();
  setTimeout(() => emptyTrash(turns), TRASH_MS);
  server.drawMetrics();
  return came || turn.status === "done";
}

/** Draws what has come of the turn that runs. */
function grow(text) {
  const follows = atEnd();
  running.grows?.append(running.turn.text.slice(running.shown));
  running.shown = running.turn.text.length;
  if (follows) scrollDown();
  speaker.add(text);
  drawFigures(byId("figures"), running.turn, server.stateBytes);
  if (compared !== null && performance.now() - running.compared > REDRAW_MS) {
    running.compared = performance.now();
    drawText();
  }
}

function retry(turn) {
  const parent = turns.get(turn.parent);
  if (prompt.value === turn.prompt) prompt.value = "";
  start(parent, turn.prompt);
}

/** Does something on the server, one thing at a time; gives whether it went well. */
async function doing(action) {
  if (busy) return false;
  busy = true;
  drawControls();
  try {
    await action();
    return true;
  } catch (error) {
    fail(error, null);
    return false;
  } finally {
    busy = false;
    draw();
  }
}

function fail(error, again) {
  if (!(error instanceof api.ApiError)) {
    const full = error.name === "QuotaExceededError";
    notice.show(full ? "The browser's storage is full: delete turns to keep new ones." : `Something went wrong: ${error.message}`);
    if (!full) console.error(error);
    return;
  }
  if (error.unreachable) server.lost();
  notice.show(error.message, again && { label: "Try again", again, afterS: error.retryAfterS ?? 0 });
}

// ---- what the buttons do

function open(id) {
  selected = id;
  focused = id;
  compared = null;
  if (!wide.matches) byId("panel").open = false;
  draw();
}

function branch(id) {
  open(id);
  prompt.focus();
}

function again(id) {
  if (busy || running || !sampling.report()) return;
  const turn = turns.get(id);
  start(turns.get(turn.parent), turn.prompt);
}

function compare(id) {
  if (selected === null || id === selected) return;
  compared = id;
  draw();
}

function compareFrom(id) {
  const turn = turns.get(id);
  selected = id;
  compared = turns.counterpart(turn)?.id ?? null;
  draw();
  byId("compare-right").focus();
}

function choose(side, id) {
  const other = side === "left" ? compared : selected;
  if (id === other) [selected, compared] = [compared, selected];
  else if (side === "left") selected = id;
  else compared = id;
  draw();
  byId(`compare-${side}`)?.focus();
}

function closeComparison() {
  compared = null;
  draw();
  byId("transcript").focus();
}

const revive = (id) => doing(() => readAgain(turns, turns.get(id)));

function download(id) {
  return doing(async () => {
    const turn = turns.get(id);
    const url = URL.createObjectURL(await api.downloadState(turn.session));
    el("a", { href: url, download: `${turn.session}.safetensors` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  });
}

function upload(from) {
  return doing(async () => open((await begin(turns, from)).id));
}

function startNew() {
  selected = null;
  compared = null;
  draw();
  prompt.focus();
}

function stop() {
  if (running) running.abort.abort();
  else if (compared !== null) closeComparison();
}

function focus(id) {
  focused = id;
}

async function changeKey() {
  if (await askKey("Sent with each request from now on; leave it empty to send none.")) await connect();
}

async function remove(id) {
  const turn = turns.get(id);
  const below = turns.below(turn);
  if (running && below.includes(running.turn)) return;
  if (!(await confirmDeletion(turns.label(turn), below.length))) return;
  if (below.some((at) => at.id === selected)) selected = turn.parent;
  focused = turn.parent;
  const removed = turns.remove(turn);
  draw();
  await Promise.all(removed.map(({ session }) => drop(session)));
}

// ---- the server

/** Learns what the server has, and which of our sessions it still knows. */
async function connect() {
  try {
    await server.learn();
    const known = [...turns.all.values()].filter((turn) => turn.session !== null && turn.status !== "running");
    while (known.length) await Promise.all(known.splice(0, CHECKS).map((turn) => check(turns, turn)));
    await emptyTrash(turns);
  } catch (error) {
    fail(error, null);
  }
  draw();
  server.drawMetrics();
}

addEventListener("pagehide", () => turns.leave());
addEventListener("pageshow", (event) => event.persisted && location.reload());
addEventListener("storage", (event) => {
  if (!isTurnKey(event.key)) return;
  turns.read();
  draw();
});

const fold = () => (byId("panel").open = wide.matches);
wide.addEventListener("change", fold);
fold();
api.onKeyNeeded(askKey);
listen({ send, stop, begin: upload, startNew, changeKey, open, compare, remove, focus });
turns.endInterrupted();
draw();
prompt.focus();
connect();
