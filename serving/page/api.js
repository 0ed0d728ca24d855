// The server's endpoints, its errors and its event streams. Every address is relative: a proxy may put a path before.

const BASE = new URL(".", document.baseURI);
const KEY = "yunmin.key";

/**
 * What a request failed with.
 *
 * status: HTTP's, 0 where there was no response. code, param: as the server names them.
 * retryAfterS: seconds to wait, or null.
 */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, param = null, retryAfterS = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryAfterS });
  }

  get unreachable() {
    return this.code === "unreachable";
  }
}

let askForKey = async () => false;

/** Sets who is asked for a key after a 401: takes the reason, gives whether there is a new key to try. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

export function currentKey() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function setKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/** Sends a request; throws an ApiError unless the response is a good one, and AbortError after `signal`. */
async function request(method, path, { json, body, signal } = {}) {
  for (;;) {
    const key = currentKey();
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    if (json !== undefined) headers["Content-Type"] = "application/json";
    else if (body !== undefined) headers["Content-Type"] = "application/octet-stream";
    const sent = json === undefined ? body : JSON.stringify(json);
    let response;
    try {
      response = await fetch(new URL(path, BASE), { method, headers, body: sent, signal, cache: "no-store" });
    } catch (error) {
      throw unreachable(error);
    }
    if (response.ok) return response;
    const error = await failure(response);
    if (response.status !== 401) throw error;
    const isNew = currentKey() !== key; // another request has asked meanwhile
    if (!isNew && !(await askForKey(error.message))) throw error;
  }
}

async function failure(response) {
  const retryAfter = Number(response.headers.get("Retry-After") ?? NaN);
  const found = { status: response.status, retryAfterS: Number.isFinite(retryAfter) ? retryAfter : null };
  try {
    const { message, code, param } = (await response.json()).error;
    return new ApiError(String(message), { ...found, code, param });
  } catch {
    return new ApiError(`The server answered ${response.status} ${response.statusText}`.trim(), found);
  }
}

function unreachable(error) {
  if (error.name === "AbortError") return error;
  return new ApiError("The server cannot be reached", { code: "unreachable" });
}

const read = async (...args) => (await request(...args)).json();
const session = (id, rest = "") => `v1/sessions/${encodeURIComponent(id)}${rest}`;

export const models = async () => (await read("GET", "v1/models")).data;
export const states = async () => (await read("GET", "v1/states")).data;
export const createSession = (fields = {}) => read("POST", "v1/sessions", { json: fields });
export const describeSession = (id) => read("GET", session(id));
export const forkSession = (id) => read("POST", session(id, "/fork"));
export const deleteSession = (id) => request("DELETE", session(id));
export const downloadState = async (id) => (await request("GET", session(id, "/state"))).blob();
export const uploadState = (id, file) => read("PUT", session(id, "/state"), { body: file });
export const generate = (fields) => read("POST", "generate", { json: fields });
export const metrics = async () => (await request("GET", "metrics")).text();

/** Whether the server is there and takes requests. */
export async function isReady() {
  try {
    await request("GET", "readyz");
    return true;
  } catch {
    return false;
  }
}

/** The events of a stream; throws an ApiError where it does not come to a good end. */
export async function* stream(fields, signal) {
  const response = await request("POST", "generate_stream", { json: fields, signal });
  let ended = false;
  for await (const data of frames(response.body)) {
    if (data === "[DONE]") {
      ended = true; // and yet read to its end: who leaves before looks like one who gave up
      continue;
    }
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(event.error.message, { ...event.error, status: response.status });
    yield event;
  }
  if (!ended) throw new ApiError("The stream broke off before its end", { status: response.status, code: "broken_stream" });
}

/** The data of server-sent events. */
async function* frames(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (left + value).split("\n\n");
      left = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice("data: ".length);
    }
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError("The connection was lost", { code: "unreachable" });
  } finally {
    reader.cancel().catch(() => {}); // whoever stops reading leaves
  }
}
