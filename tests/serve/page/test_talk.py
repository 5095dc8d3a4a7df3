"""What is said on the page: streams, histories, errors, keys, and text that is never more than text."""

import json

import pytest

expect = pytest.importorskip("playwright.sync_api", reason="the page's tests drive a browser with playwright").expect


def test_text_appears_as_it_comes_and_ends_with_its_figures(visit, stub):
    stub.models = ["hybrid"]
    reader = visit()
    expect(reader.page.locator("#side-label")).to_be_hidden()
    reader.say("hold")
    expect(reader.answer("hybrid")).to_contain_text("first half,")
    expect(reader.answer("hybrid")).to_have_attribute("aria-busy", "true")
    expect(reader.answer("hybrid").locator(".stats")).to_contain_text("≥ 1 token")
    expect(reader.answer("hybrid")).not_to_contain_text("second half")
    assert "first half" not in reader.page.locator("#announcer").text_content(), "a screen reader hears whole answers"
    reader.page.wait_for_timeout(100)
    stub.gate.set()
    reader.wait_for(1)
    expect(reader.answer("hybrid").locator(".text")).to_have_text("first half, second half")
    figures = reader.answer("hybrid").locator(".stats").inner_text()
    tokens_per_second = float(figures.split()[0])
    assert "7 tokens" in figures and "≥" not in figures and "cut at the token limit" in figures
    assert 0 < tokens_per_second <= 6 / 0.1
    assert reader.page.locator("#announcer").text_content().count("hybrid: first half, second half") == 1
    assert stub.bodies[0]["stream_options"] == {"include_usage": True} and stub.bodies[0]["stream"] is True


def test_two_models_answer_side_by_side_each_with_its_own_history(visit, stub):
    reader = visit()
    reader.say("crlf")
    reader.wait_for(2)
    for name in stub.models:
        expect(reader.answer(name).locator(".text")).to_have_text(f"{name} says: {stub.text}")
        expect(reader.answer(name).locator(".stats")).to_contain_text("12 tokens")
    first, second = (reader.answer(name).bounding_box() for name in stub.models)
    assert first["y"] == second["y"] and first["x"] + first["width"] <= second["x"]

    reader.say("again")
    reader.wait_for(4)
    for body in stub.bodies[2:]:
        said = [(message["role"], message["content"]) for message in body["messages"]]
        assert said == [("user", "crlf"), ("assistant", f"{body['model']} says: {stub.text}"), ("user", "again")]

    reader.page.get_by_label("Side by side").uncheck()
    reader.page.locator("#first").select_option("hybrid")
    reader.say("alone")
    reader.wait_for(5)
    assert len(stub.bodies) == 5 and len(stub.bodies[4]["messages"]) == 5
    reader.page.get_by_role("button", name="Clear").click()
    reader.say("anew")
    reader.wait_for(1)
    assert stub.bodies[5]["messages"] == [{"role": "user", "content": "anew"}]
    reader.page.reload()
    expect(reader.page.get_by_label("Side by side")).not_to_be_checked()


def test_stop_ends_the_requests_and_keeps_what_came(visit, stub):
    reader = visit()
    reader.say("forever")
    for name in stub.models:
        expect(reader.answer(name)).to_contain_text("on on")
    reader.say("too early")
    expect(reader.page.locator("#message")).to_have_value("too early")
    reader.page.get_by_role("button", name="Stop").click()
    assert all(stub.left.acquire(timeout=5) for _ in stub.models), "the server still sends"
    reader.wait_for(2)
    expect(reader.answer("hybrid").locator(".stats")).to_contain_text("stopped")
    expect(reader.page.locator("#message")).to_be_focused()
    reader.page.keyboard.press("Enter")
    reader.wait_for(4)
    assert stub.bodies[-1]["messages"][1]["content"].startswith("on on")


def test_what_a_model_writes_stays_text(visit, stub):
    reader = visit()
    reader.say("hostile")
    reader.wait_for(2)
    text = reader.answer("hybrid").locator(".text")
    expect(text.locator("p")).to_have_text("hybrid says: " + stub.hostile.partition("\n")[0].replace("**", ""))
    expect(text.locator("pre")).to_have_text("<i>")
    expect(text.locator("img, script, b, i")).to_have_count(0)
    reader.say("<u>mine</u>")
    expect(reader.page.locator(".asked").last).to_have_text("<u>mine</u>")


def test_a_server_with_a_key_is_asked_with_it(visit, stub):
    stub.key = "open-sesame"
    reader = visit("401", ready=False)
    key = reader.page.get_by_role("textbox", name="API key")
    expect(key).to_be_focused()
    key.fill("wrong")
    key.press("Enter")
    expect(reader.page.get_by_text("The server refused this key.")).to_be_visible()
    key.fill(stub.key)
    key.press("Enter")
    expect(reader.page.locator("#message")).to_be_focused()
    expect(key).to_be_hidden()
    reader.say("hello")
    reader.wait_for(2)
    assert reader.page.evaluate("() => [...Object.values(localStorage), document.cookie].join()").count("sesame") == 0
    reader.page.reload()
    expect(reader.page.locator("#welcome-text")).to_contain_text("side by side")
    stub.key = "changed"
    reader.say("hello")
    expect(key).to_be_focused()
    for name in stub.models:
        expect(reader.answer(name)).to_contain_text("The key is missing or wrong.")
    expect(reader.page.get_by_text("The server refused this key.")).to_be_visible()


@pytest.mark.parametrize(
    ("part", "words"),
    [("refuse", "The queue is full. Try again in 2 s."), ("broken", "closed before the answer was complete")],
)
def test_an_error_is_told_in_words_and_can_be_tried_again(visit, stub, part, words):
    stub.models = ["hybrid"]
    reader = visit("429")
    reader.say(part)
    expect(reader.answer("hybrid").locator(".error")).to_contain_text(words)
    reader.page.get_by_role("button", name="Try again").press("Enter")
    expect(reader.answer("hybrid").locator(".text")).to_have_text(f"hybrid says: {stub.text}")
    expect(reader.page.locator(".error:visible")).to_have_count(0)
    assert stub.bodies[0] == stub.bodies[1], "the failed try left something in the history"


def test_without_metrics_or_storage_the_page_talks_all_the_same(visit, stub):
    stub.metrics = None
    forbid = (
        "Object.defineProperty(window, '{}', {{ get() {{ throw new DOMException('forbidden', 'SecurityError') }} }});"
    )
    reader = visit("404", before=forbid.format("localStorage") + forbid.format("sessionStorage"))
    expect(reader.page.get_by_text("The server's metrics can't be read.")).to_be_visible()
    expect(reader.page.locator(".chart:visible")).to_have_count(0)
    reader.page.locator("#settings-button").click()
    reader.page.locator("[name=seed]").fill("7")
    reader.say("hello")
    reader.wait_for(2)
    assert stub.bodies[0]["seed"] == 7


def test_events_are_read_however_the_stream_is_cut(visit):
    whole = ": comment\r\nevent: x\r\ndata: Grüße 🌍\r\ndata:second\n\n\ndata: a: b\r\r\ndata:  c\r\n\r\ndata: lost"
    read = """async (whole) => {
      const { serverSentEvents } = await import(new URL('sse.js', location));
      const stream = (pieces) => new ReadableStream({
        pull: (to) => pieces.length ? to.enqueue(pieces.shift()) : to.close(),
      });
      const bytes = new TextEncoder().encode(whole);
      const cuts = [];
      for (let cut = 0; cut <= bytes.length; cut++) cuts.push([bytes.slice(0, cut), bytes.slice(cut)]);
      cuts.push([...bytes].map((byte) => Uint8Array.of(byte)));
      const found = new Set();
      for (const pieces of cuts) {
        const events = [];
        for await (const data of serverSentEvents(stream(pieces))) events.push(data);
        found.add(JSON.stringify(events));
      }
      return [...found];
    }"""
    expected = ["Grüße 🌍\nsecond", "a: b", " c"]
    assert [json.loads(events) for events in visit().page.evaluate(read, whole)] == [expected]
