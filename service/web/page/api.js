// The server's answers, and its failures in words.

const GONE = "The server cannot be reached. Is it still running, and the network up?";
const CUT =
  "The answer was cut off before its end: the connection or the server went away. What is shown is incomplete.";

/** A failure that can be shown as it is. */
export class Failure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** The JSON at a path. Throws Failure. */
export async function getJson(path, key) {
  const response = await ask(path, { headers: headersFor(key) });
  return response.json();
}

/** The events of POST /generate as they come. Throws Failure, or AbortError once the signal fires. */
export async function* generate(body, key, signal) {
  const response = await ask("/generate", {
    method: "POST",
    headers: { ...headersFor(key), "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await unlessCut(reader.read());
      if (done) throw new Failure(CUT);
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const data of parts.filter((part) => part.startsWith("data: ")).map((part) => part.slice(6))) {
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new Failure(`The server broke off: ${event.error.message}.`);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // a stream that has failed has nothing left to cancel
  }
}

async function ask(path, options) {
  const response = await fetch(path, options).catch((error) => {
    throw error.name === "AbortError" ? error : new Failure(GONE);
  });
  if (!response.ok) throw await refusal(response);
  return response;
}

function unlessCut(reading) {
  return reading.catch((error) => {
    throw error.name === "AbortError" ? error : new Failure(CUT);
  });
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const reason = body?.error?.message ?? response.statusText;
  const wait = response.headers.get("retry-after");
  const again = wait ? ` Try again in ${wait} s.` : "";
  return new Failure(`${opening(response.status)}: ${reason}.${again}`, response.status);
}

function opening(status) {
  if (status === 401) return "This server wants an API key";
  if (status === 429) return "Too many requests";
  if (status === 503) return "The server cannot take this now";
  if (status === 504) return "It took too long";
  return status < 500 ? "The server refused this" : "The server failed";
}

function headersFor(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}
