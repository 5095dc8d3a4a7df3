/**
 * Server-sent events (the WHATWG standard's event stream), read from a fetched body.
 */

/**
 * Yields the data of each complete event. Chunks may be cut anywhere, inside a character or between CR and LF too;
 * comments and fields other than `data` are passed over, and an event the stream ends within is dropped.
 *
 * @param {ReadableStream<Uint8Array>} stream
 */
export async function* serverSentEvents(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let line = "";
  let data = [];
  let afterReturn = false;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      let text = decoder.decode(value, { stream: true });
      // The line ended at the CR already: its LF, come with the next chunk, ends no second one.
      if (afterReturn && text.startsWith("\n")) text = text.slice(1);
      afterReturn = text.endsWith("\r");

      const lines = (line + text).split(/\r\n|\r|\n/);
      line = lines.pop();
      for (const whole of lines) {
        if (whole.startsWith("data:")) {
          data.push(whole.slice(whole.startsWith("data: ") ? 6 : 5));
        } else if (whole === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    // Reached too when the caller leaves its loop early; a stream that failed has nothing left to cancel.
    await reader.cancel().catch(() => {});
  }
}
