// What happens on the server when a turn runs. A session's state is at its end, so each turn owns a session of its own:
// a turn forks the session before it, generates there, and leaves that one for other branches.

import * as api from "./api.js";
import { trash } from "./turns.js";

/** Runs a turn that has been added; calls `changed` for each event. Ends with the turn done, stopped or failed. */
export async function run(turns, turn, { signal, changed }) {
  const parent = turns.get(turn.parent);
  try {
    turn.session = await open(parent);
    turns.save(turn);
    signal.throwIfAborted();
    await generate(turns, turn, signal, changed);
    turn.status = "done";
  } catch (error) {
    if (turn.session !== null) trash.put(turn.session); // still in use until the server notices that we left
    turn.session = null;
    turn.status = error.name === "AbortError" ? "stopped" : "failed";
    if (turn.status === "stopped") return;
    turn.error = error.message;
    if (error.status === 404 && parent !== null) await check(turns, parent);
    throw error;
  } finally {
    turns.save(turn);
  }
  await describe(turn);
  turns.save(turn);
}

async function generate(turns, turn, signal, changed) {
  const began = performance.now();
  let first = 0;
  const fields = { prompt: turn.prompt, session_id: turn.session, ...turn.sampling };
  for await (const event of api.stream(fields, signal)) {
    const now = performance.now();
    if (typeof event.token_id === "number") {
      turn.tokenIds.push(event.token_id);
      first ||= now;
    }
    turn.text += event.text;
    turn.figures.generated = turn.tokenIds.length;
    if (first) turn.figures.firstMs = first - began;
    if (now > first && turn.tokenIds.length > 1) turn.figures.speed = (turn.tokenIds.length - 1) / ((now - first) / 1000);
    if (event.finish_reason) finish(turn, event);
    turns.beat(turn);
    changed(event);
  }
}

function finish(turn, event) {
  turn.ending = event.finish_reason;
  turn.timings = event.timings;
  turn.figures.promptTokens = event.usage.prompt_tokens;
  turn.figures.cached = event.usage.prompt_tokens_details?.cached_tokens ?? 0;
  turn.figures.position = event.session.position;
}

/** A session that continues after a turn, or a new one. */
async function open(parent) {
  if (parent === null) return (await api.createSession()).id;
  return (await api.forkSession(parent.session)).id;
}

/** Gives a turn without a session one again, by reading its text: that of a stream that was cut off, or of a lost session. */
export async function readAgain(turns, turn) {
  if (turns.isAlive(turn)) return;
  const parent = turns.get(turn.parent);
  if (parent !== null) await readAgain(turns, parent);
  if (turn.status === "origin" && turn.state === undefined) {
    throw new api.ApiError("This state was uploaded, and its text is not known here: upload the file again");
  }
  const session = turn.state === undefined ? await open(parent) : (await api.createSession({ state: turn.state })).id;
  try {
    if (turn.prompt) await api.generate({ session_id: session, prompt: turn.prompt, max_tokens: 0 });
    if (turn.tokenIds.length) await api.generate({ session_id: session, token_ids: turn.tokenIds, max_tokens: 0 });
  } catch (error) {
    await drop(session);
    throw error;
  }
  if (turn.status === "failed") turn.status = "stopped";
  Object.assign(turn, { session, error: null });
  await describe(turn);
  turns.save(turn);
}

/** Takes over the position and the size that the server tells. */
async function describe(turn) {
  const record = await api.describeSession(turn.session);
  turn.figures.position = record.position;
  turn.figures.savedBytes = record.state_bytes;
  turn.gone = false;
  turn.foreign = record.model === null;
}

/** Looks whether the server still has a turn's session. */
export async function check(turns, turn) {
  try {
    await describe(turn);
  } catch (error) {
    if (error.status !== 404) throw error;
    turn.gone = true; // for this key: its id is kept, since another may know it
  }
  turns.save(turn);
}

/** A new first turn from a state file or, by its name, from a state of the server. */
export async function begin(turns, { file, state }) {
  const session = (await api.createSession(state === undefined ? {} : { state })).id;
  const turn = turns.add({ status: "origin", session, state, prompt: "", source: state ?? file.name });
  try {
    if (file !== undefined) await api.uploadState(session, file);
    await describe(turn);
    turns.save(turn);
  } catch (error) {
    turns.remove(turn);
    await drop(session);
    throw error;
  }
  return turn;
}

/** Deletes a session now or, where the server cannot be reached or still uses it, later. */
export async function drop(session) {
  if (session === null) return;
  trash.put(session);
  try {
    await api.deleteSession(session);
  } catch (error) {
    if (error.status !== 404) return;
  }
  trash.drop(session);
}

let emptying = false;

/** Deletes what could not be deleted before. */
export async function emptyTrash(turns) {
  if (emptying) return;
  emptying = true;
  for (const session of trash.all()) {
    if (turns.owns(session)) trash.drop(session);
    else await drop(session);
  }
  emptying = false;
}
