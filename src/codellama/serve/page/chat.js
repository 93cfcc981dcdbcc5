// The chat: streamed answers, code in them highlighted, both to copy.

import { describe, generate } from "./api.js";
import { highlightInto } from "./languages.js";
import { settings } from "./settings.js";
import { showPrompt } from "./prompt.js";

const find = (id) => document.getElementById(id);

export function startChat(model, announce) {
  const log = find("log"), question = find("question"), send = find("send"), status = find("chat-status");
  let messages = [], request;

  async function ask(content) {
    request = new AbortController();
    send.textContent = "Stop";
    status.textContent = "…";
    add("user", content);
    const [article, body] = add("assistant", "");
    log.ariaBusy = "true"; // a screen reader waits for the whole answer
    const dialog = [...messages, { role: "user", content }];
    let answer = "", result;
    try {
      const options = { max_tokens: settings.chat_tokens, temperature: settings.temperature };
      const payload = { model: model.id, messages: dialog, ...options };
      result = await generate("v1/chat/completions", payload, request.signal, (text) => {
        answer += text;
        keepEnd(() => body.replaceChildren(...rendered(answer)));
      });
      status.textContent = describe(result);
      showPrompt(find("chat-prompt"), model, result.promptIds);
    } catch (error) {
      if (request.signal.aborted) announce("Stopped.", status);
      else announce(error.message, status);
    }
    if (answer || result) {
      messages = [...dialog, { role: "assistant", content: answer }];
      keepEnd(() => body.after(copyButton("Copy answer", () => answer)));
    } else { // nothing came: the question can be mended and sent again
      article.previousSibling.remove();
      article.remove();
      question.value ||= content;
    }
    log.ariaBusy = "false";
    send.textContent = "Send";
    request = undefined;
  }

  function add(role, text) {
    const article = document.createElement("article"), body = document.createElement("div");
    article.className = role;
    article.ariaLabel = role === "user" ? "You" : model.id;
    body.append(...rendered(text));
    article.append(body);
    log.append(article);
    log.scrollTop = log.scrollHeight;
    return [article, body];
  }

  /** Change the log; where its end was in view, it stays so. */
  function keepEnd(change) {
    const follow = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    change();
    if (follow) log.scrollTop = log.scrollHeight;
  }

  find("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const content = question.value.trim();
    if (request) return request.abort();
    if (!content) return;
    question.value = "";
    ask(content);
  });
  question.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!request) find("ask").requestSubmit();
  });
  find("reset").addEventListener("click", () => {
    request?.abort();
    messages = [];
    log.replaceChildren();
    status.textContent = "";
    showPrompt(find("chat-prompt"), model, null);
    question.focus();
  });
}

/** Text, with fenced code as highlighted blocks; an unfinished fence reaches to the end. */
function rendered(text) {
  return text.split(/^```/m).map((part, n) => {
    const element = document.createElement(n % 2 ? "figure" : "p");
    if (n % 2 === 0) {
      element.textContent = part.trim();
      return element;
    }
    const [, language, code] = part.match(/^([^\n]*)\n?([^]*)$/);
    const caption = document.createElement("figcaption"), pre = document.createElement("pre");
    caption.append(language.trim() || "code", copyButton("Copy code", () => code));
    highlightInto(pre, code, language.trim());
    pre.tabIndex = 0; // scrolls by keyboard
    element.append(caption, pre);
    return element;
  }).filter((element) => element.textContent);
}

function copyButton(label, text) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = label;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text());
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = label), 1500);
  });
  return button;
}
