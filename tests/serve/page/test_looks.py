"""How the page is used and seen: by keyboard, on a phone, in two schemes, with charts that live."""

import re

import pytest

expect = pytest.importorskip("playwright.sync_api", reason="the page's tests drive a browser with playwright").expect


def test_all_of_it_by_keyboard(visit, stub):
    reader = visit()
    reader.page.keyboard.type("one")
    reader.page.keyboard.press("Shift+Enter")
    reader.page.keyboard.type("two")
    reader.page.keyboard.press("Enter")
    reader.wait_for(2)
    assert stub.bodies[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]
    reader.page.keyboard.type("forever")
    reader.page.keyboard.press("Enter")
    expect(reader.answer("teacher")).to_contain_text("on on")
    reader.page.keyboard.press("Escape")
    reader.wait_for(4)

    reader.page.locator(".skip").focus()
    expect(reader.page.locator(".skip")).to_be_in_viewport()
    tools = ["charts-button", "settings-button", "clear"]
    for wanted in ["first", "second", "side", *tools, "transcript", "message", "send"]:
        reader.page.keyboard.press("Tab")
        expect(reader.page.locator(f"#{wanted}")).to_be_focused()
        expect(reader.page.locator(f"#{wanted}")).to_have_css("outline-style", "solid")

    reader.page.locator("#settings-button").focus()
    reader.page.keyboard.press("Enter")
    reader.page.keyboard.press("Tab")
    reader.page.keyboard.press("Tab")
    reader.page.keyboard.type("Be brief.")
    reader.page.keyboard.press("Tab")
    reader.page.keyboard.type("3")
    reader.say("not sent")
    expect(reader.page.locator("[name=temperature]")).to_be_focused()
    reader.page.keyboard.press("Control+A")
    reader.page.keyboard.type("0.5")
    reader.say("sent")
    reader.wait_for(6)
    assert stub.bodies[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert stub.bodies[-1]["temperature"] == 0.5 and "seed" not in stub.bodies[-1]
    reader.page.reload()
    expect(reader.page.locator("[name=temperature]")).to_have_value("0.5")
    reader.page.locator("#settings-button").click()
    reader.page.get_by_role("button", name="Reset").click()
    expect(reader.page.locator("#system")).to_have_value("")


def test_a_phone_shows_all_of_it_in_its_width(visit, stub):
    stub.models = ["teacher-with-a-name-longer-than-a-phone-is-wide-0123456789", "hybrid"]
    reader = visit(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    expect(reader.page.locator("#charts")).to_be_hidden()
    reader.say("long")
    reader.wait_for(2)
    first, second = (reader.answer(name).bounding_box() for name in stub.models)
    assert first["y"] + first["height"] <= second["y"] and first["x"] == second["x"]
    reader.page.locator("#charts-button").tap()
    reader.page.locator("#settings-button").tap()
    expect(reader.page.locator(".chart").first).to_be_visible()
    for part in ("html", "#transcript", "#panels"):
        assert reader.page.locator(part).evaluate("e => e.scrollWidth - e.clientWidth") == 0, f"{part} scrolls sideways"
    for button in reader.page.locator("button:visible, select:visible, .check:visible").all():
        box = button.bounding_box()
        assert box["height"] >= 40 and box["x"] >= 0 and box["x"] + box["width"] <= 360, button.inner_text()
    expect(reader.page.locator("#message")).to_be_in_viewport(ratio=1)


def test_charts_draw_what_the_metrics_say(visit, stub):
    stub.models = ["teacher", stub.odd]
    reader = visit()
    reader.page.clock.install(time=0)
    reader.page.clock.pause_at(1)
    reader.page.reload()
    chart = reader.page.locator(".chart:visible")
    # The page's clock stands still but for the test: each sample comes a second after the one before.
    for points in range(1, 5):
        if points > 1:
            reader.page.clock.run_for(1000)
        expect(chart).to_have_count(5)
        expect(chart.nth(3).locator("path")).to_have_attribute("d", re.compile(rf"^M[^ML]*(L[^ML]*){{{points}}}$"))
    expect(chart.locator("figcaption")).to_have_text(
        [
            f"Tokens per secondteacher: 40.0{stub.odd}: 100",
            f"Guesses accepted{stub.odd}: 80 %",
            f"Requests running{stub.odd}: 3",
            f"State memory{stub.odd}: 1.5 MiB",
            f"Prefix hit rate{stub.odd}: 25 %",
        ]
    )
    expect(reader.page.locator("#legend li")).to_have_text(stub.models)
    colours = reader.page.evaluate("""() => {
      const charts = [...document.querySelectorAll('.chart')].filter((chart) => chart.checkVisibility());
      const second = (parent, name) => parent.querySelectorAll(name)[1];
      const places = [second(document, '#legend li'), second(charts[0], '.value'), charts[1].querySelector('.value')];
      return places.map((place) => getComputedStyle(place).color);
    }""")
    assert len(set(colours)) == 1 and colours[0].startswith("rgb"), "a model has two colours"
    slow, fast = (chart.first.locator("path").nth(i).bounding_box() for i in range(2))
    assert slow["width"] > 2 and slow["y"] > fast["y"], "more is drawn higher"

    asked = stub.asked
    reader.page.locator("#charts-button").click()
    reader.page.clock.run_for(5000)
    reader.page.evaluate("() => fetch('v1/models')")
    assert stub.asked == asked, "nobody looks, and the server is asked"


CONTRASTS = """() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (; element; element = element.parentElement) {
      const colour = parts(getComputedStyle(element).backgroundColor);
      if (colour[3] !== 0) return colour;
    }
  };
  const ratio = (a, b) => ([a, b] = [light(a), light(b)].sort((x, y) => y - x), (a + 0.05) / (b + 0.05));
  const found = [];
  const check = (name, least, colour, behind) => found.push([name, least, ratio(parts(colour), ground(behind))]);
  for (const e of document.body.querySelectorAll('*')) {
    if (!e.checkVisibility()) continue;
    const style = getComputedStyle(e), name = `${e.tagName}#${e.id}.${e.getAttribute('class') ?? ''}`;
    const written = [...e.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    if (written || e.value) check(name, 4.5, style.color, e);
    if (e.placeholder) check(`${name} placeholder`, 4.5, getComputedStyle(e, '::placeholder').color, e);
    if (e.matches('input, select, textarea')) check(`${name} edge`, 3, style.borderColor, e.parentElement);
    if (e.matches('path')) check(`${name} line`, 3, style.stroke, e);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_meets_wcag_aa(visit, stub, scheme):
    stub.models = ["teacher", stub.odd]
    reader = visit("429", color_scheme=scheme)
    reader.say("hostile")
    reader.wait_for(2)
    stub.bodies.clear()
    reader.say("refuse")
    reader.wait_for(4)
    reader.page.locator("#settings-button").click()
    expect(reader.page.locator(".chart:visible")).to_have_count(5)
    found = reader.page.evaluate(CONTRASTS)
    names = {name for name, _, _ in found}
    assert {"P#.error", "CODE#.", "H3#.name", "TEXTAREA#message. placeholder", "path#.colour-1 line"} <= names
    assert [each for each in found if each[2] < each[1]] == []


def test_who_wants_less_motion_sees_none(visit, stub):
    reader = visit(reduced_motion="reduce")
    reader.say("hold")
    expect(reader.answer("hybrid")).to_contain_text("first half")
    moving = "() => document.getAnimations().length"
    assert reader.page.evaluate(moving) == 0
    reader.page.emulate_media(reduced_motion="no-preference")
    assert reader.page.evaluate(moving) == 2
