// The server's public API: which model answers, streamed replies with what they cost, prompt ids.

import { settings } from "./settings.js";

export async function request(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (settings.api_key) headers.Authorization = `Bearer ${settings.api_key}`;
  const method = body ? "POST" : "GET";
  const reply = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  if (!reply.ok) {
    const { error } = await reply.json().catch(() => ({}));
    const message = error?.message ?? `${reply.status} ${reply.statusText}`;
    throw Object.assign(new Error(message), { code: error?.code });
  }
  return reply;
}

/** Stream a reply: `onText(text, index of the choice)` gets it piece by piece.
 *  Returns { usage, finish, promptIds, firstMs, totalMs }. */
export async function generate(path, body, signal, onText) {
  const start = performance.now();
  const result = {};
  const options = { stream: true, stream_options: { include_usage: true }, return_token_ids: true };
  const reply = await request(path, { ...body, ...options }, signal);
  for await (const event of events(reply)) {
    if (event.error) throw new Error(event.error.message);
    for (const choice of event.choices) {
      const text = choice.text ?? choice.delta?.content;
      if (text) {
        result.firstMs ??= performance.now() - start;
        onText(text, choice.index);
      }
      result.finish = choice.finish_reason ?? result.finish;
      result.promptIds ??= choice.prompt_token_ids ?? event.prompt_token_ids;
    }
    result.usage = event.usage ?? result.usage;
  }
  result.totalMs = performance.now() - start;
  return result;
}

/** The JSON objects of a text/event-stream, up to [DONE]. */
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue; // comments keep the connection alive
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

/** One line: tokens, speed with the wait for the first token included, and why it ended. */
export function describe({ usage, finish, firstMs, totalMs }) {
  if (!usage) return "";
  const cached = usage.prompt_tokens_details?.cached_tokens;
  return [
    `${usage.completion_tokens} tokens`,
    `${Math.round((1000 * usage.completion_tokens) / totalMs)} tokens/s`,
    firstMs && `first after ${Math.round(firstMs)} ms`,
    `prompt ${usage.prompt_tokens} tokens${cached ? `, ${cached} from the cache` : ""}`,
    finish === "length" && "ended at the limit of tokens",
  ].filter(Boolean).join(" · ");
}
