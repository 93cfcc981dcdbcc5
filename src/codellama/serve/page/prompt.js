// What prompt was really sent, token by token, with ids on demand.

import { request } from "./api.js";

/** Fill a <details> element; pieces of text are fetched when it is opened, by an echo of the ids. */
export function showPrompt(details, model, ids) {
  details.replaceChildren();
  if (!ids) return;
  const summary = document.createElement("summary"), pre = document.createElement("pre");
  summary.textContent = `The prompt that was sent: ${ids.length} tokens`;
  const button = document.createElement("button");
  button.textContent = "Show ids";
  button.ariaPressed = "false";
  button.addEventListener("click", () => {
    button.ariaPressed = String(pre.classList.toggle("with-ids"));
  });
  details.append(summary, button, pre);
  details.ontoggle = async () => {
    if (!details.open || pre.childNodes.length) return;
    const body = { model: model.id, prompt: ids, echo: true, logprobs: 0, max_tokens: 0 };
    try {
      const { choices } = await (await request("v1/completions", body)).json();
      pre.replaceChildren(...choices[0].logprobs.tokens.map((text, n) => token(text, ids[n])));
    } catch (error) {
      pre.textContent = error.message;
    }
  };
  details.ontoggle();
}

/** A control id has no text and shows its number. */
function token(text, id) {
  const span = document.createElement("span");
  span.textContent = text || `⟨${id}⟩`;
  if (text) span.dataset.id = id;
  else span.className = "control";
  return span;
}
