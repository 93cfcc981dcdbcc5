// The page: which of the two views is shown, the settings, and which model answers.

import { request } from "./api.js";
import { startChat } from "./chat.js";
import { startEditor } from "./editor.js";
import { bindSettings } from "./settings.js";

const find = (id) => document.getElementById(id);
const model = { id: "", max_model_len: 1024 }; // until the server has said

/** Say something to everyone: on screen, and through the live region. */
function announce(text, element) {
  if (element) element.textContent = text;
  find("announcement").textContent = text;
}

function showView() {
  const shown = location.hash === "#chat" ? "chat" : "infill";
  for (const id of ["infill", "chat"]) {
    find(id).hidden = id !== shown;
    const link = document.querySelector(`nav a[href="#${id}"]`);
    link.ariaCurrent = id === shown ? "page" : null;
  }
}

async function findModel() {
  try {
    const { data } = await (await request("v1/models")).json();
    Object.assign(model, data[0]);
    const n = model.meta?.n_params;
    const [size, unit] = n < 1e9 ? [n / 1e6, "million"] : [n / 1e9, "billion"];
    find("chat-note").hidden = model.capabilities?.includes("chat") ?? true;
    find("model").textContent = [
      model.id,
      n && `${size.toFixed(n < 1e9 ? 0 : 1)} ${unit} parameters`,
      `${model.max_model_len} tokens of context`,
    ].filter(Boolean).join(" · ");
  } catch (error) {
    announce(`No model: ${error.message}`, find("model"));
  }
}

window.addEventListener("hashchange", showView);
showView();
startEditor(model, announce);
startChat(model, announce);
bindSettings(find("settings"), find("open-settings"), findModel);
findModel();
