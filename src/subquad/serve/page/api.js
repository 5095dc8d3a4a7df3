/**
 * The server's OpenAI-compatible API, as far as the page needs it. Paths are relative, so that a proxy may add a prefix.
 */

import { serverSentEvents } from "./sse.js";
import { keyStore } from "./stores.js";

/** What went wrong, in words for the reader; `status` is HTTP's, or 0 where no answer came. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** A response with a good status; an ApiError otherwise. An abort stays an AbortError. */
export async function request(path, { body, signal } = {}) {
  const headers = {};
  const key = keyStore.read();
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    const method = body ? "POST" : "GET";
    response = await fetch(path, { method, headers, signal, cache: "no-store", body: body && JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server can't be reached.");
  }
  if (!response.ok) throw new ApiError(await refusal(response), response.status);
  return response;
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const words = body?.error?.message ?? `The server answered ${response.status} ${response.statusText}`.trim() + ".";
  const wait = response.headers.get("Retry-After");
  return /^\d+$/.test(wait ?? "") ? `${words} Try again in ${wait} s.` : words;
}

/** The names of the served models. */
export async function listModels() {
  const list = await (await request("v1/models")).json();
  return list.data.map((model) => model.id);
}

/** Yields the chunks of a streamed chat completion; ends at `[DONE]`, and with an ApiError where that never comes. */
export async function* chat(body, signal) {
  const options = { stream: true, stream_options: { include_usage: true } };
  const response = await request("v1/chat/completions", { body: { ...body, ...options }, signal });
  let complete = false;
  try {
    for await (const data of serverSentEvents(response.body)) {
      // Read on to the end, so that the connection can serve again.
      if (data === "[DONE]") complete = true;
      if (complete) continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, response.status);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    if (error instanceof SyntaxError) throw new ApiError("The server sent a chunk that is not JSON.", response.status);
    throw new ApiError("The connection was lost before the answer was complete.");
  }
  if (!complete) throw new ApiError("The connection closed before the answer was complete.");
}
