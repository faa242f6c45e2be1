import json
import os
import re
import shutil
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect, sync_playwright

from nanochat import chat_page
from nanochat.chat_page import CHAT_PAGE, CHAT_SCRIPT, show_chat

TOKEN = "a-token-of-this-test"
REMOTE = "jupyter.test"  # the browser is told that this name is loopback, so it stands for a Jupyter on another machine
expect.set_options(timeout=20_000)  # milliseconds; a busy machine answers late


class Answer(BaseHTTPRequestHandler):
    """One request. A chat request is handed to the test's next script, which says what goes over the wire and when."""

    def log_message(self, *arguments):
        pass

    def reply(self, status, body, kind="application/json"):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status, message):
        self.reply(status, {"error": {"message": message, "type": "server_error", "param": None, "code": None}})

    def do_GET(self):
        path = self.path.removeprefix(self.server.prefix)
        page = self.server.pages.get(self.path)
        if page or not self.path.startswith(self.server.prefix):
            self.reply(200 if page else 404, (page or "Not Found").encode(), "text/html; charset=utf-8")
        elif path == "":
            self.reply(200, CHAT_PAGE.encode(), "text/html; charset=utf-8")
        elif path == "health":
            self.reply(200, {"status": "ok", "model": "d4", "active": 0, "waiting": 0, "slots": 8})
        elif path == "v1/models" and self.is_allowed():
            model = {"id": "d4", "object": "model", "created": 1, "owned_by": "unrolled"}
            self.reply(200, {"object": "list", "data": [model | {"context_length": 512}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != self.server.prefix + "v1/chat/completions":
            self.refuse(404, "no such address")
        elif self.is_allowed():
            self.server.requests.append(body)
            self.server.scripts.pop(0)(self)

    calls = 0

    def is_allowed(self):
        if self.headers["Authorization"] == f"Bearer {self.server.token}":
            return True
        self.refuse(401, "The token is missing or wrong.")

    def begin(self, left_out=0):
        assert self.headers["Accept"] == "text/event-stream"
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.event({"role": "assistant", "content": ""}, left_out_messages=left_out)

    def raw(self, data):
        self.wfile.write(data)
        self.wfile.flush()

    def event(self, delta, finish=None, **more):
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        chunk = {"id": "1", "object": "chat.completion.chunk", "model": "d4", "choices": [choice], **more}
        self.raw(b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n")

    def text(self, *pieces):
        for piece in pieces:
            self.event({"content": piece})

    def calculator(self, expression, result):
        self.calls += 1
        self.event({"calculator": [{"index": self.calls - 1, "expression": expression, "result": result}]})

    def end(self, finish="stop"):
        self.event({}, finish)
        self.raw(b"data: [DONE]\n\n")

    def wait_for_hang_up(self):
        self.connection.settimeout(5)
        try:
            return self.connection.recv(1) == b""
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False


class ScriptedServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # pages do go away
            super().handle_error(request, client_address)


def saying(*pieces, left_out=0, finish="stop"):
    """The script of a whole answer. A tuple is a call of the calculator."""

    def script(answer):
        answer.begin(left_out)
        for piece in pieces:
            answer.calculator(*piece) if isinstance(piece, tuple) else answer.text(piece)
        answer.end(finish)

    return script


@pytest.fixture
def server():
    server = ScriptedServer(("127.0.0.1", 0), Answer)
    server.token, server.prefix = TOKEN, "/"
    server.pages, server.scripts, server.requests = {}, [], []
    server.port = server.server_address[1]
    server.address = f"http://127.0.0.1:{server.port}/#token={TOKEN}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        message = "no browser found (looked for " + ", ".join(names) + ")"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    rules = f"MAP {REMOTE} 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", f"--host-resolver-rules={rules}"]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Function that opens an address in a fresh profile. Afterwards: no error in any page, no request that left."""
    contexts, requests, errors = [], [], []

    def opened(address, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        context.on("request", lambda request: requests.append(request.url))
        context.on("weberror", lambda error: errors.append(str(error.error)))
        context.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page = context.new_page()
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    hosts = {urlsplit(url).hostname for url in requests if not url.startswith("data:")}
    assert hosts <= {"127.0.0.1", "localhost", REMOTE}
    # the browser itself reports each 4xx, 5xx and broken connection
    assert [error for error in errors if not error.startswith("Failed to load resource")] == []


def say(page, text):
    page.get_by_label("Your message").fill(text)
    expect(page.locator("#send")).to_be_visible()  # the page does not send while it answers
    page.keyboard.press("Enter")


def answers(page):
    return page.locator("article.assistant .text")


def wait_until(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_an_answer_is_visible_while_it_is_written(server, open_page):
    """A page that shows an answer only when it is complete, or that keeps the token in the address bar."""
    gate = threading.Event()

    def script(answer):
        answer.begin()
        answer.text("Because of ", "Rayleigh")
        gate.wait(5)
        answer.text(" scattering.")
        answer.end()

    server.scripts.append(script)
    page = open_page(server.address)
    assert "token" not in page.url
    expect(page.get_by_role("heading", name="d4", exact=True)).to_be_visible()
    expect(page.locator("#state")).to_have_text("ready")
    say(page, "Why is the sky blue?")
    expect(answers(page)).to_have_text("Because of Rayleigh")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    gate.set()
    expect(answers(page)).to_have_text("Because of Rayleigh scattering.")
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    expect(page.get_by_label("Your message")).to_be_focused()
    expect(page.locator("#told")).to_have_text("Because of Rayleigh scattering.")
    assert server.requests == [
        {
            "messages": [{"role": "user", "content": "Why is the sky blue?"}],
            "stream": True,
            "temperature": 0.8,
            "top_k": 50,
            "max_tokens": 256,  # half of the context
        }
    ]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_events_and_letters_cut_in_the_middle_survive(server, open_page, newline):
    """Text lost, or U+FFFD shown, when the network splits an event or the bytes of a letter."""
    text = "Grüße 🌍, 日本語"

    def script(answer):
        answer.begin()
        for piece in (text, " ende"):
            chunk = {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]}
            data = json.dumps(chunk, ensure_ascii=False).encode()
            for byte in b": a comment" + newline * 2 + b"data:" + data + newline * 2:
                answer.raw(bytes([byte]))
                time.sleep(0.0005)
        # the last event has no blank line after it
        answer.raw(b'data: {"choices": [{"delta": {"content": "."}, "finish_reason": "stop"}]}')

    server.scripts.append(script)
    page = open_page(server.address)
    say(page, "hello")
    expect(answers(page)).to_have_text(f"{text} ende.")
    expect(page.locator(".error")).to_have_count(0)


def test_stop_hangs_up_and_keeps_what_was_written(server, open_page):
    """A Stop that only looks like one: the server goes on computing, or the written text disappears."""
    hung_up = []

    def script(answer):
        answer.begin()
        answer.text("Once upon a time")
        hung_up.append(answer.wait_for_hang_up())

    server.scripts += [script, saying("yes")]
    page = open_page(server.address)
    say(page, "A story")
    expect(answers(page)).to_have_text("Once upon a time")
    page.get_by_role("button", name="Stop").click()
    wait_until(lambda: hung_up)
    assert hung_up == [True]
    expect(answers(page)).to_have_text("Once upon a time")
    expect(page.locator(".note")).to_have_text("Stopped.")
    say(page, "Is it sad?")
    expect(answers(page)).to_have_text(["Once upon a time", "yes"])
    assert [message["content"] for message in server.requests[1]["messages"]] == [
        "A story",
        "Once upon a time",
        "Is it sad?",
    ]


def test_regenerate_asks_again_and_can_be_undone(server, open_page):
    """A new answer that is added to the history instead of replacing the old one, or an old one lost for good."""
    server.scripts += [saying("first"), saying("second")]
    page = open_page(server.address)
    expect(page.locator("#state")).to_have_text("ready")  # from then on a request names the most tokens wanted
    say(page, "A number")
    expect(answers(page)).to_have_text("first")
    page.get_by_role("button", name="Regenerate").click()
    expect(answers(page)).to_have_text("second")
    assert server.requests[0] == server.requests[1]
    page.get_by_role("button", name="Undo").click()
    expect(answers(page)).to_have_text("first")


def test_an_edited_question_goes_on_from_there(server, open_page):
    """An edit that leaves the later messages in the history, or cannot be cancelled."""
    server.scripts += [saying("1"), saying("2"), saying("3")]
    page = open_page(server.address)
    say(page, "one")
    expect(answers(page)).to_have_text("1")
    say(page, "two")
    expect(answers(page)).to_have_text(["1", "2"])
    edit = page.get_by_role("button", name="Edit")
    edit.first.click()
    page.keyboard.press("Escape")
    expect(answers(page)).to_have_text(["1", "2"])
    edit.first.click()
    page.get_by_label("Edit your message").fill("uno")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text("3")
    expect(page.locator("article.user .text")).to_have_text("uno")
    assert server.requests[2]["messages"] == [{"role": "user", "content": "uno"}]


def test_calculator_calls_stand_where_they_happened_and_go_back_as_parts(server, open_page):
    """A tool call that is hidden, misplaced, or missing from the history that the model sees next."""
    server.scripts += [saying("12 times 37 is ", ("12*37", "444"), "444. And ", ("1/0", None), "no."), saying("ok")]
    page = open_page(server.address)
    say(page, "12 × 37?")
    expect(answers(page)).to_have_text("12 times 37 is Calculator: 12*37 = 444444. And Calculator: 1/0 → no answerno.")
    expect(page.locator(".call")).to_have_count(2)
    expect(page.locator(".call").first).to_be_visible()
    say(page, "thanks")
    expect(answers(page).last).to_have_text("ok")
    assert server.requests[1]["messages"] == [
        {"role": "user", "content": "12 × 37?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "12 times 37 is "},
                {"type": "python", "text": "12*37"},
                {"type": "python_output", "text": "444"},
                {"type": "text", "text": "444. And "},
                {"type": "python", "text": "1/0"},
                {"type": "text", "text": "no."},
            ],
        },
        {"role": "user", "content": "thanks"},
    ]


def test_a_reload_keeps_everything_also_in_the_middle_of_an_answer(server, open_page):
    """A conversation, a half-written answer, a draft or the token lost by a reload."""

    def script(answer):
        answer.begin()
        answer.text("half an")
        answer.wait_for_hang_up()

    server.scripts += [saying(("6*7", "42"), "42"), script, saying("again")]
    page = open_page(server.address)
    say(page, "6 × 7?")
    expect(page.locator(".call")).to_have_count(1)
    say(page, "and then?")
    expect(answers(page).last).to_have_text("half an")
    page.get_by_label("Your message").fill("a draft")
    page.reload()
    expect(page.locator("article .text")).to_have_text(["6 × 7?", "Calculator: 6*7 = 4242", "and then?", "half an"])
    expect(page.locator(".note")).to_have_text("Stopped.")
    expect(page.get_by_label("Your message")).to_have_value("a draft")
    page.get_by_role("button", name="Regenerate").last.click()
    expect(answers(page).last).to_have_text("again")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("article")).to_have_count(0)
    page.reload()
    expect(page.get_by_role("heading", name="Talk to d4")).to_be_visible()


def contrast(page, selector):
    """WCAG's contrast between the text of an element and what it stands on."""
    colours = page.locator(selector).first.evaluate(
        """(node) => {
          let back = node;
          while (getComputedStyle(back).backgroundColor === "rgba(0, 0, 0, 0)") back = back.parentElement;
          return [getComputedStyle(node).color, getComputedStyle(back).backgroundColor];
        }"""
    )
    shades = []
    for colour in colours:
        channels = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        shades.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(shades) + 0.05) / (min(shades) + 0.05), colours[1]


def test_light_and_dark_are_both_readable(server, open_page):
    """Dark text on a dark ground, or a page that ignores the reader's system."""
    server.scripts += [
        saying(("6*7", "42"), "It is `42`.", finish="length"),
        lambda answer: answer.refuse(500, "Something failed."),
    ]
    page = open_page(server.address, color_scheme="light")
    say(page, "6 × 7?")
    expect(page.locator(".call")).to_be_visible()
    say(page, "more")
    expect(page.locator(".error")).to_be_visible()
    grounds = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for selector in (
            ".user .text",
            ".assistant .text",
            ".call",
            ".note",
            ".error",
            "#state",
            "#input",
            ".actions button",
        ):
            ratio, grounds[scheme] = contrast(page, selector)
            assert ratio >= 4.5, (scheme, selector, ratio)
    assert grounds["light"] != grounds["dark"]


def test_a_phone_needs_no_sideways_scrolling(server, open_page):
    """A page wider than the phone, an input below the screen, or one so small that the phone zooms in on it."""
    server.scripts.append(saying("x" * 300, "\n```\n" + "y" * 300 + "\n```\n", ("1+" * 100 + "1", "101")))
    page = open_page(server.address, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    say(page, "z" * 300)
    expect(page.locator(".call")).to_be_visible()
    for locator in (page.locator("html"), page.locator("#scroll")):
        assert locator.evaluate("(node) => node.scrollWidth <= node.clientWidth")
    box = page.get_by_label("Your message").bounding_box()
    assert box["y"] + box["height"] <= 640 and box["width"] > 200
    assert page.get_by_label("Your message").evaluate("(node) => parseFloat(getComputedStyle(node).fontSize)") >= 16
    for name in ("Settings", "New chat", "Send"):
        box = page.get_by_role("button", name=name, exact=True).bounding_box()
        assert min(box["width"], box["height"]) >= 40
    page.get_by_role("button", name="Settings").tap()
    box = page.get_by_role("dialog").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360


def test_the_page_says_what_was_left_out(server, open_page):
    """A reader who wonders why the model forgot, or why it stopped in the middle of a sentence."""
    server.scripts += [saying("one", left_out=3), saying("two", left_out=1, finish="length")]
    page = open_page(server.address)
    say(page, "hello")
    expect(page.locator(".note")).to_have_text("The first 3 messages no longer fit and were left out.")
    say(page, "more")
    expect(page.locator("article").last.locator(".note")).to_have_text(
        ["The first message no longer fit and was left out.", re.compile("reached its longest length")]
    )


def test_a_conversation_longer_than_the_server_takes_loses_its_beginning(server, open_page):
    """A long chat that ends for ever with "the messages have 35000 characters together"."""
    server.scripts += [saying("one"), saying("two", left_out=2)]
    page = open_page(server.address)
    long_ago = [{"role": "user", "text": "x" * 7000}, {"role": "assistant", "parts": [{"text": "y" * 9000}]}] * 2
    page.evaluate("messages = JSON.parse(arguments[0])".replace("arguments[0]", repr(json.dumps(long_ago))))
    say(page, "hello")
    expect(page.locator("article").last).to_contain_text("one")
    say(page, "more")
    expect(page.locator("article").last).to_contain_text("two")
    sent = [[len(message["content"]) for message in body["messages"]] for body in server.requests]
    assert sent == [[7000, 9000, 5], [7000, 9000, 5, 3, 4]]
    expect(page.locator("article").last.locator(".note")).to_have_text(
        "The first 4 messages no longer fit and were left out."
    )


def test_a_refused_question_is_not_sent_again(server, open_page):
    """A pasted text that is too long, after which every other question is refused for its sake."""

    def too_long(answer):
        answer.refuse(400, "The last message has 900 tokens; the model's context is 512.")

    server.scripts += [saying("one"), too_long, saying("two")]
    page = open_page(server.address)
    say(page, "hello")
    say(page, "x" * 3000)
    expect(page.get_by_role("alert")).to_contain_text("900 tokens")
    say(page, "more")
    expect(page.locator("article").last).to_contain_text("two")
    sent = [message["content"] for message in server.requests[-1]["messages"]]
    assert sent == ["hello", "one", "more"]


def test_two_tabs_have_one_conversation(server, open_page):
    """A tab in the background that is closed, and writes its old list over the conversation of the other one."""
    server.scripts += [saying("one"), saying("two")]
    first = open_page(server.address)
    second = first.context.new_page()
    second.goto(server.address)
    say(first, "hello")
    expect(second.locator("article")).to_have_count(2)
    second.reload()
    say(first, "more")
    second.close()
    first.reload()
    expect(first.locator("article")).to_have_count(4)


def test_a_storage_that_is_full_or_spoilt_is_no_end(server, open_page):
    """A page that says "connecting" for ever, or a conversation that is lost without a word."""
    server.scripts += [saying("one")]
    page = open_page(server.address)
    page.evaluate('localStorage.setItem(MEMORY + \'messages\', \'[null, 3, {"role": "user"}, {"role": "assistant"}]\')')
    page.goto("about:blank")
    page.goto(server.address)
    expect(page.locator("article")).to_have_count(0)
    page.evaluate("() => { Storage.prototype.setItem = () => { throw new DOMException('full'); }; }")
    say(page, "hello")
    expect(page.locator(".note")).to_contain_text("does not keep the conversation")


def test_an_error_is_a_sentence_and_nothing_is_lost(server, open_page):
    """The reader's text, or half an answer, lost because of a full, failing or broken server."""

    def broken(answer):
        answer.begin()
        answer.text("half")
        answer.raw(b'data: {"choices": [{"del')

    def failing(answer):
        answer.begin()
        answer.raw(b'data: {"error": {"message": "The model failed here.", "type": "server_error"}}\n\n')

    server.scripts += [
        lambda answer: answer.refuse(429, "All places are taken; try again in a minute."),
        lambda answer: answer.reply(502, b"<html>Bad gateway</html>", "text/html"),
        failing,
        broken,
        saying("whole"),
        saying("second"),
    ]
    page = open_page(server.address)
    say(page, "keep me")
    for words in (
        "All places are taken; try again",
        "status 502",
        "The model failed here.",
        "The connection broke off",
    ):
        expect(page.locator(".error")).to_contain_text(words)
        expect(page.locator("article.user .text")).to_have_text("keep me")
        page.get_by_role("button", name="Try again").click()
    expect(answers(page)).to_have_text("whole")
    expect(page.locator(".error")).to_have_count(0)
    assert all(request["messages"] == server.requests[0]["messages"] for request in server.requests)
    server.shutdown()
    server.server_close()
    say(page, "are you there?")
    expect(page.locator(".error")).to_contain_text("The server cannot be reached.")
    expect(page.locator("#state")).to_have_text("not reachable")
    expect(page.locator("article.user .text").last).to_have_text("are you there?")


def test_a_question_after_a_failed_answer_keeps_the_roles_in_turn(server, open_page):
    """Two user messages in a row, which the model has never seen and the server refuses."""
    server.scripts += [lambda answer: answer.refuse(500, "No."), saying("yes")]
    page = open_page(server.address)
    say(page, "one")
    expect(page.locator(".error")).to_be_visible()
    say(page, "two")
    expect(answers(page).last).to_have_text("yes")
    assert server.requests[1]["messages"] == [{"role": "user", "content": "one\n\ntwo"}]


def test_a_wrong_token_is_asked_for(server, open_page):
    """A 401 that ends the conversation instead of asking, or a question that has to be typed again."""
    page = open_page(f"http://127.0.0.1:{server.port}/")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("This chat needs its token")
    page.locator("#token").fill(server.address)  # the whole address will do
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="d4", exact=True)).to_be_visible()
    expect(dialog).to_be_hidden()
    server.token = "another"
    server.scripts.append(saying("welcome back"))
    say(page, "hello")
    expect(page.locator(".error")).to_contain_text("The token is missing or wrong.")
    page.locator("#token").fill("another")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text("welcome back")
    assert [request["messages"][0]["content"] for request in server.requests] == ["hello"]


def test_what_a_model_writes_stays_text(server, open_page):
    """Markup in an answer, in a calculator call, in an error or in a question that becomes part of the page."""
    evil = '<img src=x onerror="document.title=1"><script>document.title=1</script>**<b>x**`<i>`'
    code = f"\n```html\n{evil}\n```\n# {evil}\n- {evil}"
    server.scripts += [saying(evil, (evil, evil), code), lambda answer: answer.refuse(400, evil)]
    page = open_page(server.address)
    say(page, evil)
    expect(page.locator("article.assistant pre")).to_contain_text(evil)
    expect(page.locator(".call")).to_contain_text(f"{evil} = {evil}")
    say(page, evil)
    expect(page.locator(".error")).to_contain_text(evil)
    page.reload()
    expect(page.locator("article.user .text")).to_have_text([evil, evil])
    assert page.locator("main :is(img, script, i, a, b:not(.call b))").count() == 0
    assert page.title() == "d4"


def test_whitespace_and_light_markdown(server, open_page):
    """Indentation and empty lines swallowed, or code shown with its fences."""
    text = "A **bold** word, 2**3 is 8\n\n  indented\n# Title\n1. item\n```python\nif x:\n    y = 1\n```\nend"
    server.scripts.append(saying(*re.findall(r"(?s).{1,3}", text)))
    page = open_page(server.address, permissions=["clipboard-read", "clipboard-write"])
    say(page, "hello")
    expect(page.locator("article.assistant strong")).to_have_text("bold")
    expect(page.locator("pre")).to_have_text("if x:\n    y = 1\n", use_inner_text=True)
    lines = answers(page).locator("p").evaluate_all("(lines) => lines.map((line) => line.textContent)")
    assert lines == ["A bold word, 2**3 is 8", "", "  indented", "Title", "1. item", "end"]
    assert answers(page).locator("p").nth(2).evaluate("(line) => getComputedStyle(line).whiteSpace") == "pre-wrap"
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == text


def test_enter_sends_but_not_inside_an_input_method(server, open_page):
    """Half-composed Japanese that is sent, or a message that cannot have two lines."""
    server.scripts.append(saying("ok"))
    page = open_page(server.address)
    area = page.get_by_label("Your message")
    area.fill("にほ")
    area.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    area.dispatch_event("keydown", {"key": "Enter", "keyCode": 229})
    area.press("Shift+Enter")
    area.press_sequentially("two")
    expect(area).to_have_value("にほ\ntwo")
    assert server.requests == []
    area.press("Enter")
    expect(answers(page)).to_have_text("ok")
    assert server.requests[0]["messages"][0]["content"] == "にほ\ntwo"


def test_settings_reach_the_server_and_stay(server, open_page):
    """A setting that is forgotten, top-k 0 refused, or a number out of range sent."""
    server.scripts += [saying("ok"), saying("ok")]
    page = open_page(server.address)
    page.get_by_role("button", name="Settings").click()
    page.locator("#temperature").fill("0.3")
    page.locator("#top_k").fill("0")
    page.locator("#max_tokens").fill("99")
    page.locator("#max_tokens").fill("100000")  # more than the context: not taken
    page.keyboard.press("Escape")
    page.reload()
    say(page, "hello")
    expect(answers(page)).to_have_text("ok")
    sent = server.requests[0]
    assert (sent["temperature"], sent["top_k"], sent["max_tokens"]) == (0.3, 0, 99)
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Defaults").click()
    page.get_by_role("button", name="Done").click()
    say(page, "hello")
    expect(answers(page)).to_have_count(2)
    sent = server.requests[1]
    assert (sent["temperature"], sent["top_k"], sent["max_tokens"]) == (0.8, 50, 256)


def test_the_page_scrolls_along_only_for_a_reader_at_the_bottom(server, open_page):
    """Somebody who reads further up and is torn away by each new word."""
    gates = [threading.Event(), threading.Event()]

    def script(answer):
        answer.begin()
        answer.text("line\n" * 80)
        gates[0].wait(5)
        answer.text("more\n" * 80)
        gates[1].wait(5)
        answer.text("end")
        answer.end()

    server.scripts.append(script)
    page = open_page(server.address)
    say(page, "hello")
    expect(answers(page)).to_contain_text("line")
    distance = "(node) => node.scrollHeight - node.scrollTop - node.clientHeight"
    wait_until(lambda: page.locator("#scroll").evaluate(distance) < 2)
    page.locator("#scroll").evaluate("(node) => { node.scrollTop = 0; }")
    newest = page.get_by_role("button", name="Go to the newest message")
    expect(newest).to_be_visible()
    gates[0].set()
    expect(answers(page)).to_contain_text("more")
    assert page.locator("#scroll").evaluate("(node) => node.scrollTop") == 0
    newest.click()
    gates[1].set()
    expect(answers(page)).to_contain_text("end")
    wait_until(lambda: page.locator("#scroll").evaluate(distance) < 2)


def test_the_keyboard_is_enough(server, open_page):
    """A control that only a mouse reaches, a button without a name, or a focus that cannot be seen."""
    server.scripts += [saying("one"), saying("two")]
    page = open_page(server.address)
    say(page, "hello")
    expect(answers(page)).to_have_text("one")
    names = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => [document.activeElement.ariaLabel || document.activeElement.textContent.trim(),
                      getComputedStyle(document.activeElement).outlineStyle]"""
        )
        names.add(name)
        assert outline == "solid" or name == "Your message" or page.evaluate("document.activeElement.tagName") == "BODY"
        if name == "Regenerate":
            page.keyboard.press("Enter")
            expect(answers(page)).to_have_text("two")
    assert {"Settings", "New chat", "Edit", "Regenerate"} <= names


def test_blocked_storage_breaks_nothing(server, open_page):
    """A dead page in Colab's frame, where a browser may forbid storage."""
    server.scripts.append(saying("fine"))
    page = open_page(server.address)
    page.add_init_script(
        """for (const name of ["localStorage", "sessionStorage"])
             Object.defineProperty(window, name, {get() { throw new DOMException("denied", "SecurityError"); }});"""
    )
    page.goto("about:blank")
    page.goto(server.address)
    say(page, "hello")
    expect(answers(page)).to_have_text("fine")


def test_the_policy_allows_this_script_alone():
    """A page that could run a script that somebody slipped into it, or load one from elsewhere."""
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', CHAT_PAGE)[1]
    assert "script-src 'sha256-" in policy and "default-src 'none'" in policy
    assert "</script" not in CHAT_SCRIPT and "innerHTML" not in CHAT_SCRIPT
    assert not re.search(r"""(src|href)=["']?(https?:)?//|url\(|@import""", CHAT_PAGE)


@pytest.fixture
def output(server, monkeypatch):
    """The HTML that `show_chat` puts below a cell."""
    shown = []
    monkeypatch.setattr(chat_page, "in_notebook", lambda: True)
    monkeypatch.setattr(chat_page, "show_html", shown.append)
    show_chat(server.port, TOKEN, height=500)
    return shown[0]


RERUN = "The chat runs while this notebook's kernel does; run this cell again."


def test_a_notebook_on_this_machine_shows_the_chat(server, open_page, output):
    """A frame that stays empty in the commonest case: browser and kernel on one machine."""
    server.scripts.append(saying("from the frame"))
    server.pages["/lab/tree/x.ipynb"] = "<body>" + output
    page = open_page(f"http://localhost:{server.port}/lab/tree/x.ipynb")
    frame = page.frame_locator("iframe")
    frame.get_by_label("Your message").fill("hello")
    frame.get_by_label("Your message").press("Enter")
    expect(frame.locator("article.assistant .text")).to_have_text("from the frame")
    assert page.locator("iframe").bounding_box()["height"] == 500
    expect(page.get_by_text(RERUN)).to_have_count(0)


@pytest.mark.parametrize("where", ["config", "body", "path"])
def test_a_remote_notebook_goes_through_jupyters_proxy(server, open_page, output, where):
    """A frame that points at the reader's own machine while the kernel runs on another."""
    server.prefix = f"/user/ada/proxy/{server.port}/"
    server.scripts.append(saying("from afar"))
    config = '<script id="jupyter-config-data" type="application/json">{"baseUrl": "/user/ada/"}</script>'
    head = {"config": f"{config}<body>", "body": '<body data-base-url="/user/ada/">', "path": "<body>"}[where]
    address = "/user/ada/lab/tree/x.ipynb" if where == "path" else "/x"
    server.pages[address] = head + output
    page = open_page(f"http://{REMOTE}:{server.port}{address}")
    frame = page.frame_locator("iframe")
    frame.get_by_label("Your message").fill("hello")
    frame.get_by_label("Your message").press("Enter")
    expect(frame.locator("article.assistant .text")).to_have_text("from afar")


def test_colabs_own_proxy_is_used_in_colab(server, open_page, output):
    """A frame that points at 127.0.0.1, which in Colab is the reader's machine."""
    proxy = f"window.google = {{colab: {{kernel: {{accessAllowed: true, proxyPort: async (port) => `http://{REMOTE}:${{port}}/`}}}}}};"
    server.pages["/x"] = f"<body><script>{proxy}</script>{output}"
    page = open_page(f"http://127.0.0.1:{server.port}/x")
    expect(page.frame_locator("iframe").get_by_role("heading", name="Talk to d4")).to_be_visible()
    assert urlsplit(page.locator("iframe").get_attribute("src")).hostname == REMOTE
    server.pages["/y"] = server.pages["/x"].replace("accessAllowed: true", "accessAllowed: false")
    page.goto(f"http://127.0.0.1:{server.port}/y")
    expect(page.get_by_text(RERUN)).to_be_visible()
    expect(page.locator("iframe")).to_have_count(0)


def test_no_kernel_means_a_sentence_and_no_broken_frame(server, open_page, output):
    """A saved notebook that shows an error page in a frame, or nothing at all, to whoever opens it next year."""
    server.prefix = "/nowhere/"
    # a second chat, further down in the notebook, does answer
    other = '<script>setInterval(() => postMessage("nanochat page is here", "*"), 50)</script>'
    server.pages["/lab"] = f"<body>{other}{output}"
    page = open_page(f"http://{REMOTE}:{server.port}/lab")
    expect(page.get_by_text(RERUN)).to_be_visible()
    expect(page.get_by_text("jupyter-server-proxy")).to_be_visible()
    expect(page.get_by_text(f"ssh -L {server.port}:127.0.0.1:{server.port}")).to_be_visible()
    expect(page.locator("iframe")).to_have_count(0)
    page = open_page(f"http://{REMOTE}:{server.port}/lab", java_script_enabled=False)  # as in an untrusted notebook
    expect(page.get_by_text(RERUN)).to_be_visible()
    expect(page.get_by_text("jupyter-server-proxy")).to_be_hidden()


def test_a_token_cannot_end_the_script(monkeypatch):
    """A token with markup in it that breaks out of the output's script."""
    shown = []
    monkeypatch.setattr(chat_page, "in_notebook", lambda: True)
    monkeypatch.setattr(chat_page, "show_html", shown.append)
    show_chat(8000, 'PORT"</script><b>')
    assert r'"PORT\"\u003c/script>\u003cb>"' in shown[0]
    assert shown[0].count("</script>") == 1


def test_a_script_gets_the_address(capsys):
    """A program without a notebook that shows nothing at all."""
    assert "ipykernel" not in sys.modules or not chat_page.in_notebook()
    show_chat(8000, "abc")
    assert capsys.readouterr().out == "Chat: http://127.0.0.1:8000/#token=abc\n"
