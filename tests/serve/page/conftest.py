"""A server that plays the API by heart, and a real Chromium whose reader looks at the page."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import subquad

if TYPE_CHECKING:
    from playwright.sync_api import Page

FILES = Path(subquad.__file__).parent / "serve" / "page"
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HOSTILE = (
    "<img src=https://elsewhere.invalid/x onerror=alert(1)><script>alert(2)</script> **<b>bold</b>**\n\n```\n<i>\n```"
)
BACKSLASH, QUOTE = "\\", '"'
ODD = f"hy{BACKSLASH}b{QUOTE}r}}id"
"""A model's name that Prometheus must escape."""
TEXT = "Grüße, 世界 🌍, done."


class Player(BaseHTTPRequestHandler):
    """Plays the server; the last message says which part."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        stub = self.server
        if self.path == "/" or (FILES / self.path[1:]).is_file():
            file = FILES / (self.path[1:] or "index.html")
            self.whole(200, file.read_bytes(), TYPES[file.suffix])
        elif not self.known():
            self.refuse(401, "The key is missing or wrong.")
        elif self.path == "/v1/models":
            self.whole(200, json.dumps({"object": "list", "data": [{"id": name} for name in stub.models]}).encode())
        elif self.path == "/metrics" and stub.metrics:
            stub.asked += 1
            self.whole(200, stub.metrics(stub.asked).encode(), "text/plain; version=0.0.4")
        else:
            self.refuse(404, "Nothing here.")

    def do_POST(self):
        stub, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.known():
            return self.refuse(401, "The key is missing or wrong.")
        stub.bodies.append(body)
        part = body["messages"][-1]["content"]
        if part == "refuse" and len(stub.bodies) == 1:
            return self.refuse(429, "The queue is full.", {"Retry-After": "2"})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        if part == "hold":
            self.send(event("first half, "))
            stub.gate.wait(20)
            return self.send(event("second half") + ending(7))
        if part == "forever":
            return self.flow()
        if part == "broken" and len(stub.bodies) == 1:
            return self.send(event("cut") + b'data: {"choices": [')
        text = {"hostile": HOSTILE, "long": "word " * 400 + "W" * 400 + "\n\n```\n" + "c" * 300 + "\n```"}.get(part)
        # Comments, CRLF, and writes of five bytes, so that characters and line ends are cut.
        data = b": hello\r\n\r\n" + event(f"{body['model']} says: ") + event(text or TEXT) + ending(12)
        data = data.replace(b"\n", b"\r\n") if part == "crlf" else data
        for start in range(0, len(data), 5):
            self.send(data[start : start + 5])

    def flow(self):
        try:
            while not self.server.gate.wait(0.02):
                self.send(event("on "))
        except OSError:
            self.server.left.release()

    def known(self):
        return self.server.key is None or self.headers["Authorization"] == f"Bearer {self.server.key}"

    def send(self, data):
        self.wfile.write(data)
        self.wfile.flush()

    def refuse(self, status, words, headers=()):
        self.whole(status, json.dumps({"error": {"message": words, "type": "x"}}).encode(), headers=dict(headers))

    def whole(self, status, body, kind="application/json", headers=()):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def event(text):
    chunk = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()


def ending(tokens):
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": tokens + 3}}
    return f"data: {json.dumps(last)}\n\ndata: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode()


def metrics(asked):
    """40 and 100 tokens a second where the page asks each second; one model guesses, and has a name to be escaped."""
    other = f'model="{ODD.replace(BACKSLASH, 2 * BACKSLASH).replace(QUOTE, BACKSLASH + QUOTE)}"'
    return f"""# HELP subquad_tokens_total Tokens.
# TYPE subquad_tokens_total counter
subquad_tokens_total{{model="teacher"}} {40 * asked}
subquad_tokens_total{{{other}}} {100 * asked}.0
subquad_guesses_total{{{other},what="read"}} {70 * asked}
subquad_guesses_total{{{other},what="judged"}} {50 * asked}
subquad_guesses_total{{what="kept",{other}}} {40 * asked}
subquad_batch{{{other}}} 3 1700000000000
subquad_state_bytes{{kind="slots",{other}}} 1048576
subquad_state_bytes{{kind="aside",{other}}} 0
subquad_state_bytes{{kind="prefixes",{other}}} 5.24288e+05
subquad_state_bytes{{kind="allocated",{other}}} 9e+09
subquad_prefix_hits_total{{{other}}} 1
subquad_prefix_misses_total{{{other}}} 3
"""


class Stub(ThreadingHTTPServer):
    """What is served and what was asked; a test may change it at any time."""

    daemon_threads = True
    odd, text, hostile = ODD, TEXT, HOSTILE
    key = None

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Player)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.models, self.metrics = ["teacher", "hybrid"], metrics
        self.bodies, self.asked = [], 0
        self.gate, self.left = threading.Event(), threading.Semaphore(0)


@pytest.fixture
def stub():
    with Stub() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.gate.set()
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("the page's tests need Chromium, and none is on the PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Reader:
    """Someone before the page, and what the browser had to complain of."""

    page: Page
    url: str
    expected: tuple[str, ...]
    errors: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.page.set_default_timeout(5000)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("request", lambda request: self.urls.append(request.url))

    def say(self, text):
        self.page.locator("#message").fill(text)
        self.page.locator("#message").press("Enter")

    def answer(self, name):
        """The newest answer of a model."""
        return self.page.get_by_role("article", name=f"Answer of {name}", exact=True).last

    def wait_for(self, count):
        """Until all is answered, and that many answers are shown."""
        from playwright.sync_api import expect

        expect(self.page.locator("#send")).to_be_visible()
        expect(self.page.locator(".answer[aria-busy=false]")).to_have_count(count)

    def leave(self):
        self.page.context.close()
        assert [error for error in self.errors if not any(words in error for words in self.expected)] == []
        assert [url for url in self.urls if not url.startswith(self.url)] == []


@pytest.fixture
def visit(browser, stub):
    """Opens the page. Errors in the console but for the `expected`, and requests to other hosts, fail the test."""
    from playwright.sync_api import expect

    readers = []

    def open_page(*expected, url=stub.url, ready=True, before="", **context):
        page = browser.new_context(**context).new_page()
        readers.append(Reader(page, url, expected))
        page.add_init_script(before)
        page.goto(url)
        if ready:
            expect(page.locator("#message")).to_be_focused()
            expect(page.locator("#welcome-text")).to_contain_text("answer")
        return readers[-1]

    yield open_page
    for reader in readers:
        reader.leave()
