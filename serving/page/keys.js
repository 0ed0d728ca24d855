// What keys and buttons do that are always there.

import { byId } from "./dom.js";

/** Binds them; `act` has send, stop, begin, startNew, changeKey, and for a turn's id open, compare, remove and focus. */
export function listen(act) {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    act.send();
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    act.send();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) act.stop();
  });
  byId("stop").addEventListener("click", act.stop);
  byId("new").addEventListener("click", act.startNew);
  byId("key-button").addEventListener("click", act.changeKey);
  byId("upload").addEventListener("click", () => byId("upload-file").click());
  byId("upload-file").addEventListener("change", (event) => {
    const [file] = event.target.files;
    if (file) act.begin({ file });
    event.target.value = "";
  });
  byId("states").addEventListener("change", (event) => {
    const state = event.target.value;
    if (state) act.begin({ state });
    event.target.value = "";
  });
  byId("tree").addEventListener("keydown", (event) => moveInTree(event, act));
}

function moveInTree(event, act) {
  const rows = [...byId("tree").children];
  const at = rows.indexOf(event.target);
  if (at < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1 }[event.key];
  const action = { Enter: act.open, " ": act.open, c: act.compare, C: act.compare, Delete: act.remove }[event.key];
  if (to === undefined && action === undefined) return;
  event.preventDefault();
  if (action !== undefined) return void action(event.target.dataset.id);
  const row = rows[Math.max(0, Math.min(to, rows.length - 1))];
  for (const other of rows) other.tabIndex = other === row ? 0 : -1;
  row.focus();
  act.focus(row.dataset.id);
}
