"""The page as the server itself gives it, with the server's own models, streams and metrics."""

import re

import pytest

expect = pytest.importorskip("playwright.sync_api", reason="the page's tests drive a browser with playwright").expect


def test_two_models_answer_and_all_charts_are_drawn(running, visit):
    reader = visit(url=f"{running.url}/")
    expect(reader.page.locator("#welcome-text")).to_have_text("tiny and scripted answer side by side.")
    reader.page.locator("#settings-button").click()
    reader.page.locator("[name=max_tokens]").fill("8")
    reader.say("hello")
    reader.wait_for(2)
    for name in ("tiny", "scripted"):
        expect(reader.answer(name).locator(".stats")).to_have_text(re.compile(r"[1-8] tokens?"))
        expect(reader.answer(name).locator(".error")).to_have_count(0)
    expect(reader.page.locator(".chart:visible")).to_have_count(6)
