// The editor: a file to type in, with infilling at the cursor.

import {
  EditorState, EditorView, bracketMatching, classHighlighter, defaultKeymap, drawSelection,
  dropCursor, highlightActiveLine, highlightSpecialChars, history, historyKeymap, indentOnInput,
  indentUnit, indentWithTab, keymap, lineNumbers, syntaxHighlighting,
} from "./vendored/codemirror.js";
import { describe, generate } from "./api.js";
import { ghostText } from "./ghost.js";
import { languageOf } from "./languages.js";
import { settings } from "./settings.js";
import { showPrompt } from "./prompt.js";

const EXAMPLE = [`def add(a, b):
    """Return the sum of a and b."""
`, `


def sub(a, b):
    """Return the difference of a and b."""
    return a - b
`]; // before the cursor and behind it
const LINES_BEFORE = 256, LINES_AFTER = 64; // what llama.vim sends as well
const CHARACTERS_PER_TOKEN = 2.5; // of source code, low enough that the context rarely overflows
const CALM = matchMedia("(prefers-reduced-motion: reduce)");
const find = (id) => document.getElementById(id);

export function startEditor(model, announce) {
  const status = find("infill-status");

  async function ask(state, n, signal, onTexts, nTokens = model.max_model_len) {
    status.textContent = "…";
    const [prompt, suffix] = aroundCursor(state, nTokens - settings.infill_tokens);
    const texts = [];
    const body = {
      model: model.id, prompt, suffix, n, max_tokens: settings.infill_tokens,
      // Alternatives differ only where tokens are drawn.
      temperature: n > 1 ? Math.max(settings.temperature, 0.8) : settings.temperature,
      trim_suffix: true, end_at_line: true,
      ...(settings.order && { suffix_first: settings.order === "spm" }),
    };
    let result;
    try {
      result = await generate("v1/completions", body, signal, (text, index) => {
        texts[index] = (texts[index] ?? "") + text;
        onTexts(texts.filter(Boolean).map((text) => text.replace(/\r?\n/g, state.lineBreak)));
      });
    } catch (error) {
      if (signal.aborted) status.textContent = "";
      if (error.code !== "context_length_exceeded" || nTokens < 256) throw error;
      return ask(state, n, signal, onTexts, nTokens / 2); // text of more tokens than source code
    }
    status.textContent = describe(result);
    showPrompt(find("infill-prompt"), model, result.promptIds);
    if (texts.some((text) => text?.trim())) return;
    announce(`No suggestion here · ${status.textContent}`, status);
  }

  const ghost = ghostText({
    ask,
    onShow(value) {
      for (const id of ["accept", "reject", "previous", "next"]) find(id).disabled = !value;
      find("which").textContent = value ? `${value.at + 1}/${value.texts.length}` : "";
    },
    onDone: ({ texts, at }) =>
      announce(`Suggestion ${at + 1} of ${texts.length}: ${texts[at]}. Tab accepts, Escape rejects.`),
    onError: (error) => announce(error.message, status),
  });
  const view = new EditorView({ parent: find("editor") });

  function open(name, text, cursor = 0) {
    ghost.reject(view);
    find("file-name").textContent = name;
    const lineBreak = text.includes("\r\n") ? "\r\n" : "\n";
    view.setState(EditorState.create({
      doc: EditorState.create({ doc: text }).doc, // splits at any line break
      selection: { anchor: cursor },
      extensions: [
        ghost.extension, EditorState.lineSeparator.of(lineBreak), languageOf(name) ?? [],
        lineNumbers(), highlightSpecialChars(), history(), dropCursor(), indentOnInput(),
        drawSelection({ cursorBlinkRate: CALM.matches ? 0 : 1200 }),
        indentUnit.of("    "), bracketMatching(), highlightActiveLine(),
        syntaxHighlighting(classHighlighter), EditorView.lineWrapping,
        EditorView.contentAttributes.of({ "aria-label": "Code", "aria-describedby": "keys" }),
        keymap.of([indentWithTab, ...defaultKeymap, ...historyKeymap]),
      ],
    }));
  }

  async function openFile(file) {
    if (!file) return;
    open(file.name, await file.text());
    view.focus();
  }
  find("file").addEventListener("change", (event) => openFile(event.target.files[0]));
  find("infill").addEventListener("dragover", (event) => event.preventDefault());
  find("infill").addEventListener("drop", (event) => {
    if (!event.dataTransfer.files.length) return; // a selection that is moved within the text
    event.preventDefault();
    event.stopPropagation();
    openFile(event.dataTransfer.files[0]);
  }, true); // before the editor, which would insert the file's text
  const commands = {
    suggest: () => ghost.fetchTexts(view, 1), accept: ghost.accept, reject: ghost.reject,
    previous: () => ghost.step(view, -1), next: () => ghost.step(view, 1),
  };
  for (const [id, command] of Object.entries(commands)) {
    find(id).addEventListener("click", () => {
      command(view);
      view.focus();
    });
  }
  open("example.py", EXAMPLE.join(""), EXAMPLE[0].length);
}

/** [prefix, suffix]: lines around the cursor, three quarters of the room before it. */
function aroundCursor(state, nTokens) {
  const head = state.selection.main.head, doc = state.doc, line = doc.lineAt(head).number;
  const room = Math.max(0, nTokens * CHARACTERS_PER_TOKEN);
  let first = Math.max(1, line - LINES_BEFORE), last = Math.min(doc.lines, line + LINES_AFTER);
  while (first < line && head - doc.line(first).from > room * 0.75) first++;
  while (last > line && doc.line(last).to - head > room * 0.25) last--;
  const from = Math.max(doc.line(first).from, head - Math.floor(room * 0.75));
  const to = Math.min(doc.line(last).to, head + Math.floor(room * 0.25)); // in a long line, too
  return [state.sliceDoc(from, head), state.sliceDoc(head, to)];
}
