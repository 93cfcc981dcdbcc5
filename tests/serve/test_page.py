"""The page in a real browser, against the real server."""

import json
import os
import re
import time
from pathlib import Path

import httpx
import pytest
from servers import in_thread, is_up, wait_for

from codellama.engine.endpoint import Endpoint
from codellama.serve import Service
from codellama.tokenizer import Tokenizer

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
expect.set_options(timeout=30_000)
CHROMIUM = Path("/usr/bin/chromium")
PRETRAINED = Path(__file__).parents[2] / "src" / "codellama" / "pretrained"

# [text, its colour, the colour behind it] of everything that shows text of its own.
COLOURS = """() => [...document.querySelectorAll("body *")]
  .filter((e) => e.checkVisibility() && !e.closest("button:disabled, .hidden"))
  .filter((e) => [...e.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
  .map((e) => {
    const color = getComputedStyle(e).color, text = e.textContent;
    const ground = (e) => getComputedStyle(e).backgroundColor;
    while (ground(e) === "rgba(0, 0, 0, 0)") e = e.parentElement;
    return [text, color, ground(e)];
  })"""
# What the keyboard reaches and nothing names.
NAMELESS = """() => [...document.querySelectorAll("button, input, select, textarea, a")]
  .filter((e) => !(e.ariaLabel || e.labels?.[0]?.textContent.trim() || e.textContent.trim()))
  .map((e) => e.outerHTML)"""


def luminance(colour):
    """WCAG 2's relative luminance of rgb(r, g, b)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(p * weight for p, weight in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is absent")
    with playwright.sync_playwright() as runner:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = runner.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server, request):
    """The page with its model known; at the end nothing came from elsewhere and nothing failed."""
    with browser.new_context(base_url=server, **getattr(request, "param", {})) as context:
        page = context.new_page()
        requested, errors = [], []
        page.on("request", lambda request: requested.append(request.url))
        page.on("pageerror", lambda error: errors.append(error))
        page.goto("/")
        expect(page.locator("#model")).to_contain_text("tokens of context")
        yield page
        assert not errors
        assert not [url for url in requested if not url.startswith((server, "data:"))]


def sent(page, action, path="**/v1/completions"):
    """The body of the request that an action causes."""
    with page.expect_request(path) as caught:
        action()
    return caught.value.post_data_json


def document(page):
    return "\n".join(page.locator(".cm-line").all_text_contents())


def suggest(page):
    """Ask, wait until the suggestion is whole, and return (request, suggestion)."""
    body = sent(page, lambda: page.click("#suggest"))
    expect(page.locator("#infill-status")).to_contain_text("tokens/s")
    return body, page.locator(".ghost").inner_text()


def drop(page, name, text):
    make = "(file) => { const d = new DataTransfer(); d.items.add(new File(...file)); return d; }"
    files = page.evaluate_handle(make, [[text], name])
    page.dispatch_event(".cm-content", "drop", {"dataTransfer": files})
    expect(page.locator("#file-name")).to_have_text(name)
    expect(page.locator("#accept")).to_be_disabled()


def test_a_suggestion(page, server):
    """It is what the server writes; Esc rejects it, Tab accepts it; its prompt can be looked at."""
    body, ghost = suggest(page)
    before = body["prompt"] + body["suffix"]
    reply = httpx.post(f"{server}/v1/completions", json=body | {"stream": False}, timeout=60)
    assert ghost == reply.json()["choices"][0]["text"]
    expect(page.locator("#announcement")).to_contain_text(ghost.strip().split("\n")[0])
    page.keyboard.press("Escape")
    expect(page.locator(".ghost")).to_have_count(0)
    assert document(page) == before
    page.keyboard.press("Escape")
    page.keyboard.press("Tab")  # leaves the editor
    expect(page.locator("#suggest")).to_be_focused()
    page.click("#infill-prompt summary")
    page.click("text=Show ids")
    tokens = page.locator("#infill-prompt pre span")
    tokens.first.wait_for()
    id_of = "all => all.map((e) => +(e.dataset.id ?? e.textContent.slice(1, -1)))"
    prompt = Tokenizer.load(PRETRAINED).encode_infilling(body["prompt"], body["suffix"])
    assert tokens.evaluate_all(id_of) == prompt
    suggest(page)
    page.keyboard.press("Tab")
    assert document(page) == body["prompt"] + ghost + body["suffix"]


def test_in_front_of_a_cluster(browser, server, engine):
    """The page uses the public interface only, which a gateway has, too."""
    endpoint = Endpoint(server, tokenizer=engine.tokenizer)
    service = Service(endpoint, engine.tokenizer, "codellama", {"n_params": 9_000_000})
    with in_thread(engine, load=lambda: service) as (url, _):
        wait_for(lambda: is_up(url))
        with browser.new_context(base_url=url) as context:
            page = context.new_page()
            page.goto("/")
            expect(page.locator("#model")).to_contain_text("1024 tokens of context")
            body, ghost = suggest(page)
            reply = httpx.post(
                f"{server}/v1/completions", json=body | {"stream": False}, timeout=60
            )
            assert ghost == reply.json()["choices"][0]["text"]
            ask(page, "Say hi.")
            expect(page.locator("#chat-status")).to_contain_text("tokens/s")


def test_alternatives_cycle(page):
    first = suggest(page)[1]
    body = sent(page, lambda: page.keyboard.press("Alt+]"))
    assert body["n"] == 3
    assert body["temperature"] > 0
    expect(page.locator("#announcement")).to_contain_text("Suggestion 2 of")
    assert page.locator(".ghost").inner_text() != first
    page.keyboard.press("Alt+[")
    assert page.locator(".ghost").inner_text() == first
    page.keyboard.press("Alt+[")
    assert page.locator(".ghost").inner_text() != first


def test_keystrokes_wait_and_abort(page):
    """Five quick keys make one request, and the next key ends it."""
    asked = []
    page.route("**/v1/completions", lambda route: asked.append(route))  # no answer
    page.click(".cm-content")
    page.keyboard.type("abcde", delay=20)
    page.wait_for_timeout(600)  # more than twice the pause
    assert len(asked) == 1
    with page.expect_event("requestfailed") as failed:
        page.keyboard.type("f")
    assert "ABORTED" in failed.value.failure


def test_a_dropped_file(page):
    """Far longer than the context, with CRLF: lines around the cursor are sent, as they are."""
    lines = [f"value_{n} = {n}" for n in range(3000)]
    drop(page, "big.py", "\r\n".join(lines))
    page.keyboard.press("Control+End")
    body, _ = suggest(page)
    assert "\r\n".join(lines).endswith(body["prompt"])
    assert body["suffix"] == ""
    assert 20 < body["prompt"].count("\r\n") <= 256
    drop(page, "dense.txt", "\u6f22\u5b57" * 4000)  # several tokens for each character
    suggest(page)


def test_settings_are_sent_and_kept_but_for_the_key(page):
    values = {"temperature": "0.5", "infill_tokens": "7", "chat_tokens": "9", "api_key": "secret"}
    page.click("#open-settings")
    for name, value in values.items():
        page.fill(f"[name={name}]", value)
    page.select_option("[name=order]", "spm")
    page.keyboard.press("Enter")
    with page.expect_request("**/v1/completions") as caught:
        page.click("#suggest")
    body, headers = caught.value.post_data_json, caught.value.headers
    assert (body["temperature"], body["max_tokens"], body["suffix_first"]) == (0.5, 7, True)
    assert headers["authorization"] == "Bearer secret"
    kept = page.evaluate("JSON.stringify(localStorage)")
    assert "0.5" in kept
    assert "secret" not in kept


def ask(page, question):
    page.click("nav >> text=Chat")
    page.fill("#question", question)
    page.keyboard.press("Enter")


def test_chat_streams_and_stops(browser, engine, monkeypatch):
    run = engine._runner.run  # slower, so that there is time to stop it
    monkeypatch.setattr(engine._runner, "run", lambda plan: (time.sleep(0.1), run(plan))[1])
    with in_thread(engine) as (url, _), browser.new_context(base_url=url) as context:
        page = context.new_page()
        page.goto("/")
        ask(page, "Write a long story about lists.")
        answer = page.locator("article").last.locator("div")
        expect(answer).to_contain_text(re.compile(r"\w"))
        expect(page.locator("#send")).to_have_text("Stop")  # there is text, and more to come
        page.click("#send")
        expect(page.locator("#chat-status")).to_have_text("Stopped.")
        written = answer.inner_text()
        body = sent(page, lambda: ask(page, "More."), "**/v1/chat/completions")
        assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
        assert body["messages"][1]["content"].split() == written.split()


def test_chat_shows_code(page):
    """An answer that no small model writes: fenced code, and HTML that must stay text."""
    code, html = "def f(x):\n    return 'a'  # why\n", "<img src=x onerror=alert(1)>"
    pieces = [f"{html}\n``", f"`python\n{code[:9]}", f"{code[9:]}```\n", "Done."]
    chunks = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
    stream = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    reply = {"body": stream, "content_type": "text/event-stream"}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**reply))
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    ask(page, "Go.")
    answer = page.locator("article").last
    expect(answer.locator(".tok-keyword").first).to_have_text("def")
    expect(answer.locator(".tok-comment")).to_have_text("# why")
    expect(answer.locator("p").first).to_have_text(html)
    answer.get_by_text("Copy code").click()
    expect(answer.get_by_text("Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == code


def test_errors_are_said(page):
    busy = {"error": {"message": "the server is busy"}}
    page.route("**/v1/completions", lambda route: route.fulfill(status=429, json=busy))
    page.click("#suggest")
    for place in ("#infill-status", "#announcement"):
        expect(page.locator(place)).to_have_text("the server is busy")


PHONE = {"viewport": {"width": 360, "height": 640}}


@pytest.mark.parametrize(
    "page", [PHONE | {"color_scheme": scheme} for scheme in ("light", "dark")], indirect=True
)
def test_a_phone_in_light_and_dark(page):
    """Nothing sticks out, everything has a name and can be read (WCAG AA: 4.5 to 1)."""
    suggest(page)
    page.click("#infill-prompt summary")
    page.locator("#infill-prompt pre span").first.wait_for()
    for view in ("Infill", "Chat", "Settings"):
        page.click(f"text={view}")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.evaluate(NAMELESS) == []
        seen = page.evaluate(COLOURS)
        assert len(seen) > 5
        for text, *colours in seen:
            dark, light = sorted(luminance(colour) for colour in colours)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, colours)
