// Highlighting by name of a language or of a file, the same in the editor and in answers.

import {
  StreamLanguage, c, classHighlighter, cpp, csharp, go, highlightCode, java, javascript, json,
  kotlin, pythonLanguage, rust, scala, shell, typescript,
} from "./vendored/codemirror.js";

const MODES = [
  [c, "c h"], [cpp, "cpp c++ cc hpp"], [csharp, "cs csharp"], [go, "go"], [java, "java"],
  [javascript, "js javascript mjs jsx"], [json, "json"], [kotlin, "kt kotlin"], [rust, "rs rust"],
  [scala, "scala"], [shell, "sh bash shell"], [typescript, "ts typescript tsx"],
];
const LANGUAGES = { py: pythonLanguage, python: pythonLanguage };
for (const [mode, names] of MODES) {
  const language = StreamLanguage.define(mode);
  for (const name of names.split(" ")) LANGUAGES[name] = language;
}

/** The language of `main.py`, `py` or `python`; undefined where none is known. */
export function languageOf(name) {
  return LANGUAGES[name.toLowerCase().split(".").pop()];
}

/** Append highlighted code to an element. */
export function highlightInto(element, code, name) {
  const language = languageOf(name);
  if (!language) return element.append(code);
  const emit = (text, classes) => {
    const span = document.createElement("span");
    span.className = classes;
    span.textContent = text;
    element.append(span);
  };
  highlightCode(code, language.parser.parse(code), classHighlighter, emit, () => element.append("\n"));
}
