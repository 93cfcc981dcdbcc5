// What prompt was really sent: its text, and its ids on demand.

import { request } from "./api.js";

/** Fill a <details> element; the text is fetched when it is opened. */
export function showPrompt(details, ids) {
  details.replaceChildren();
  if (!ids) return;
  const summary = document.createElement("summary");
  summary.textContent = `The prompt that was sent: ${ids.length} tokens`;
  const text = document.createElement("pre"), numbers = document.createElement("pre");
  const button = document.createElement("button");
  button.textContent = "Show the ids";
  button.addEventListener("click", () => {
    numbers.textContent = ids.join(" ");
    button.remove();
  });
  details.append(summary, text, button, numbers);
  const fill = async () => {
    if (!details.open || text.textContent) return;
    try {
      const reply = await request("detokenize", { tokens: ids });
      text.textContent = (await reply.json()).content;
    } catch (error) {
      text.textContent = error.message;
    }
  };
  details.ontoggle = fill;
  fill();
}
