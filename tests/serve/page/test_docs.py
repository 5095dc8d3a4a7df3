"""The page at /docs in a real browser: the whole API, with nothing from elsewhere."""

import pytest

expect = pytest.importorskip("playwright.sync_api", reason="the page's tests drive a browser with playwright").expect


def test_the_api_is_shown_with_nothing_from_elsewhere(running, visit):
    reader = visit(url=f"{running.url}/docs", ready=False)
    expect(reader.page.locator("h2", has_text="/v1/chat/completions")).to_have_count(1)
    body = reader.page.locator("details", has_text="ChatBody").first
    expect(body.locator("dt", has_text="temperature")).to_be_visible()
    expect(body.locator("dd", has_text="at least 0, at most 2")).not_to_have_count(0)
    # Urls of what was loaded are compared with the page's own when the reader leaves.
    reader.url = running.url
    reader.page.get_by_text("The chat", exact=True).click()
    expect(reader.page.locator("#message")).to_be_visible()
