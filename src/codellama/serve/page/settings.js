// What the user chose, kept in this browser; the API key only until the tab closes.

const KEY = "codellama";
const stored = JSON.parse(localStorage.getItem(KEY) ?? "{}");
export const settings = {
  temperature: 0, infill_tokens: 64, chat_tokens: 256, order: "", ...stored,
  api_key: sessionStorage.getItem(KEY) ?? "",
};

/** Let the dialog show and change the settings; `onChange` is called when it closes. */
export function bindSettings(dialog, opener, onChange) {
  const form = dialog.querySelector("form");
  opener.addEventListener("click", () => {
    for (const [name, value] of Object.entries(settings)) form.elements[name].value = value;
    dialog.showModal();
  });
  dialog.addEventListener("close", () => {
    for (const name of Object.keys(settings)) {
      const input = form.elements[name];
      if (!input.validity.valid) continue; // Esc closes without the browser's check
      settings[name] = input.type === "number" ? input.valueAsNumber : input.value;
    }
    const { api_key, ...rest } = settings;
    localStorage.setItem(KEY, JSON.stringify(rest));
    sessionStorage.setItem(KEY, api_key);
    onChange();
  });
}
