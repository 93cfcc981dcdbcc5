// Ghost text: a suggestion at the cursor that is not yet part of the document.
//
// The state holds the alternatives and which one is shown. A keystroke or a moved cursor clears it
// and aborts the request under way; after a pause the next one starts. What is asked is the caller's.

import { Decoration, EditorView, Prec, StateEffect, StateField, WidgetType, keymap }
  from "./vendored/codemirror.js";

const PAUSE_MS = 250;
const show = StateEffect.define();

class GhostWidget extends WidgetType {
  constructor(text) {
    super();
    this.text = text;
  }
  eq(other) {
    return other.text === this.text;
  }
  get lineBreaks() {
    return this.text.split("\n").length - 1;
  }
  toDOM() {
    const span = document.createElement("span");
    span.className = "ghost";
    span.textContent = this.text;
    span.setAttribute("aria-hidden", "true"); // announced whole, once, by the live region
    return span;
  }
}

/** null, or { texts: alternatives, at: number of the one shown }. */
const ghost = StateField.define({
  create: () => null,
  update(value, transaction) {
    for (const effect of transaction.effects) if (effect.is(show)) return effect.value;
    return transaction.docChanged || transaction.selection ? null : value;
  },
  provide: (field) => EditorView.decorations.compute([field, "selection"], (state) => {
    const value = state.field(field);
    if (!value) return Decoration.none;
    const widget = new GhostWidget(value.texts[value.at].replaceAll("\r\n", "\n"));
    return Decoration.set(Decoration.widget({ widget, side: 1 }).range(state.selection.main.head));
  }),
});

/** The extension and the commands on it.
 *
 * ask(state, n, signal, onTexts): fetch n alternatives at the cursor, calling onTexts with the
 *   texts so far; onShow(value): what is shown has changed; onDone(value): and is whole now.
 */
export function ghostText({ ask, onShow, onDone, onError }) {
  let timer, request;

  function stop() {
    clearTimeout(timer);
    request?.abort();
    request = undefined;
  }

  async function fetchTexts(view, n) {
    stop();
    const mine = (request = new AbortController());
    const before = n > 1 ? current(view) : null;
    const onTexts = (texts) => {
      if (mine.signal.aborted) return;
      const all = [...new Set([...(before?.texts ?? []), ...texts.filter((text) => text.trim())])];
      if (all.length) view.dispatch({ effects: show.of({ texts: all, at: before?.at ?? 0 }) });
    };
    try {
      await ask(view.state, n, mine.signal, onTexts);
      const value = current(view);
      if (value && before && value.texts.length > before.texts.length) step(view, 1);
      else if (value) onDone(value);
    } catch (error) {
      if (!mine.signal.aborted) onError(error);
    }
  }

  function current(view) {
    return view.state.field(ghost, false) ?? null;
  }

  function accept(view) {
    const value = current(view);
    if (!value) return false;
    const text = view.state.toText(value.texts[value.at]);
    view.dispatch(view.state.replaceSelection(text), { userEvent: "input.complete" });
    return true;
  }

  function reject(view) {
    const had = current(view) !== null;
    stop();
    if (had) view.dispatch({ effects: show.of(null) });
    return had;
  }

  function step(view, by) {
    const value = current(view);
    if (!value) return false;
    const { texts } = value;
    if (texts.length === 1) fetchTexts(view, 3);
    else {
      const next = { texts, at: (value.at + by + texts.length) % texts.length };
      view.dispatch({ effects: show.of(next) });
      onDone(next);
    }
    return true;
  }

  const watch = EditorView.updateListener.of((update) => {
    if (update.docChanged || update.selectionSet) stop();
    const typed = (t) => t.isUserEvent("input") || t.isUserEvent("delete");
    if (update.docChanged && update.transactions.some(typed)) {
      timer = setTimeout(() => fetchTexts(update.view, 1), PAUSE_MS);
    }
    const value = update.state.field(ghost);
    if (value !== update.startState.field(ghost)) onShow(value);
  });
  const keys = Prec.highest(keymap.of([
    { key: "Tab", run: accept },
    { key: "Escape", run: reject },
    { key: "Alt-]", run: (view) => step(view, 1) },
    { key: "Alt-[", run: (view) => step(view, -1) },
  ]));
  return { extension: [ghost, watch, keys], fetchTexts, accept, reject, step };
}
