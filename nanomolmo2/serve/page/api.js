// The server's routes. Addresses are relative, so that the page also works behind a path.

/** A request that the server refused. Its message is the server's own sentence. */
export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

const KEY = "nanomolmo2.key";

// The key lives as long as the tab, and is the only thing that is not kept with the settings.
export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY)),
};

async function request(path, { body, signal } = {}) {
  const headers = {};
  if (apiKey.get()) headers.Authorization = `Bearer ${apiKey.get()}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer: is it still running?", 0);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** The server's sentence, or one of our own where something else answered. */
async function refusal(response) {
  let message;
  try {
    message = (await response.json()).error.message;
  } catch {
    message = null;
  }
  if (typeof message !== "string" || !message) message = `The server answered ${response.status}.`;
  return new ServerError(message, response.status);
}

export async function models() {
  return (await (await request("v1/models")).json()).data;
}

export async function examples() {
  return (await (await request("v1/examples")).json()).data;
}

/** Where a token of an answer looked: {images: [{rows, cols, weights}], note}. */
export async function attention(body, signal) {
  return (await request("v1/attention", { body, signal })).json();
}

/** Everything like some places: the answer of /v1/find. */
export async function findLike(body, signal) {
  return (await request("v1/find", { body, signal })).json();
}

/**
 * Asks, and calls `onText` and `onPoint` as the answer is written. Returns the whole answer.
 * Throws ServerError, and AbortError where `signal` stops it.
 */
export async function ask(body, { signal, onText, onPoint }) {
  const response = await request("v1/query", { body: { ...body, stream: true }, signal });
  let answer = null;
  try {
    for await (const { event, data } of eventsOf(response.body)) {
      if (event === "text") onText(data.text);
      else if (event === "point") onPoint(data);
      else if (event === "answer") answer = data;
      else if (event === "error") throw new ServerError(data.error.message, response.status);
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    throw new ServerError(CUT, 0);
  }
  if (!answer) throw new ServerError(CUT, 0);
  return answer;
}

const CUT = "The answer broke off: the connection to the server was lost.";

/** Server-sent events of a stream of bytes: {event, data}, data from JSON. */
async function* eventsOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      waiting += (value ?? "").replaceAll("\r", "");
      const blocks = waiting.split("\n\n");
      waiting = done ? "" : blocks.pop();
      for (const block of blocks) {
        const event = parsed(block);
        if (event) yield event;
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {}); // the server hears that nobody listens any more
  }
}

function parsed(block) {
  let event = "message";
  const data = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) event = line.slice(6).trim();
    if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
  }
  if (!data.length || data[0] === "[DONE]") return null;
  try {
    return { event, data: JSON.parse(data.join("\n")) };
  } catch {
    return null; // cut off in the middle of a line
  }
}
