// Questions to the user, and what went wrong.

import { currentKey, setKey } from "./api.js";
import { button, byId, count, el } from "./dom.js";

let asking = null;

/** Asks for a bearer key; gives whether there is one to try. Requests that fail together ask once. */
export function askKey(reason) {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    const key = byId("key");
    byId("key-reason").textContent = reason;
    key.value = currentKey();
    dialog.returnValue = "";
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      dialog.close("use");
    };
    byId("key-cancel").onclick = () => dialog.close("");
    dialog.onclose = () => {
      asking = null;
      const used = dialog.returnValue === "use";
      if (used) setKey(key.value.trim());
      key.value = "";
      resolve(used);
    };
    dialog.showModal();
    key.select();
  });
  return asking;
}

/** Asks whether a turn and those after it may go. */
export function confirmDeletion(label, size) {
  return new Promise((resolve) => {
    const dialog = byId("delete-dialog");
    const rest = size > 1 ? ` and the ${count(size - 1, "turn")} after it` : "";
    byId("delete-title").textContent = `Delete turn ${label}${rest}?`;
    dialog.returnValue = "";
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      dialog.close(event.submitter.value);
    };
    dialog.onclose = () => resolve(dialog.returnValue === "delete");
    dialog.showModal();
    byId("delete-cancel").focus();
  });
}

/** One message at a time in an element; with a way to try again, which opens after the seconds that the server asks for. */
export function notices(element) {
  let timer = 0;

  function clear() {
    clearInterval(timer);
    element.replaceChildren();
  }

  function show(message, retry = null) {
    clear();
    const line = el("p", {}, message);
    element.append(line, button("Dismiss", clear));
    if (retry === null) return;
    const again = el("button", { type: "button" });
    again.onclick = () => {
      clear();
      retry.again();
    };
    const until = performance.now() + 1000 * (retry.afterS ?? 0);
    const tick = () => {
      const leftS = Math.ceil((until - performance.now()) / 1000);
      again.disabled = leftS > 0;
      again.textContent = leftS > 0 ? `${retry.label} in ${leftS} s` : retry.label;
      if (leftS <= 0) clearInterval(timer);
    };
    timer = setInterval(tick, 250);
    tick();
    element.insertBefore(again, element.lastChild);
  }

  return { show, clear };
}
