"""The live page in a real browser: silent, alone with its server, readable, and usable with a keyboard alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ...browser import Browser, find_chromium, open_browser
from .conftest import Served
from .test_tenants import ADMIN, A
from .traffic import NASTY, traffic

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed: apt-get install chromium")
WIDTHS, SCHEMES = (1280, 390), ("light", "dark")

# Texts with too little contrast for WCAG's level AA: 4.5, or 3 for large ones. Colours of the page have no alpha.
FAINT = """
(() => {
  const channel = value => (value /= 255, value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = colour => {
    const [red, green, blue] = numbers(colour).map(channel);
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const seen = colour => numbers(colour).length < 4 || numbers(colour)[3] > 0;
  const behind = element => {
    for (let one = element; one; one = one.parentElement) {
      const box = one.namespaceURI.endsWith('svg') && one.tagName === 'g' ? one.querySelector('rect') : null;
      const colour = box ? getComputedStyle(box).fill : getComputedStyle(one).backgroundColor;
      if (seen(colour)) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  return [...document.querySelectorAll('body *')].flatMap(element => {
    const own = [...element.childNodes].filter(node => node.nodeType === 3);
    const text = own.map(node => node.textContent.trim()).join('');
    const hidden = element.getClientRects().length === 0 || ['OPTION', 'title'].includes(element.tagName);
    if (!text || hidden) return [];
    const style = getComputedStyle(element);
    const front = element.namespaceURI.endsWith('svg') ? style.fill : style.color;
    const [light, dark] = [luminance(front), luminance(behind(element))].sort((a, b) => b - a);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.6 && style.fontWeight >= 700);
    const contrast = (light + 0.05) / (dark + 0.05);
    return contrast < (large ? 3 : 4.5) ? [`${text}: ${contrast.toFixed(2)}`] : [];
  });
})()
"""
# Texts of the drawing that lie on one another, or outside of it.
OVERLAPS = """
[...document.querySelectorAll('.graph')].flatMap(drawing => {
  const edge = drawing.getBoundingClientRect();
  const boxes = [...drawing.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
  return boxes.flatMap(([name, a], i) => [
    ...(a.left < edge.left || a.right > edge.right || a.top < edge.top || a.bottom > edge.bottom
      ? [name + ' is cut off'] : []),
    ...boxes.slice(i + 1)
      .filter(([, b]) => a.left < b.right && b.left < a.right && a.top < b.bottom - 3 && b.top < a.bottom - 3)
      .map(([other]) => name + ' lies on ' + other)]);
})
"""
TEXT = "document.getElementById('{}').textContent"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with open_browser(tmp_path / "profile") as browser:
        yield browser


def text(browser: Browser, id: str) -> str:
    return browser.evaluate(TEXT.format(id))


def is_shown(id: str) -> str:
    return f"document.getElementById('{id}').getClientRects().length > 0"


def reached_by_tab(browser: Browser, most: int = 12) -> list[str]:
    """The elements that Tab reaches in turn, each with a visible focus."""
    found: list[str] = []
    for _ in range(most):
        browser.press("Tab", 9)
        name, outline = browser.evaluate(
            "(one => [one.id || one.tagName.toLowerCase(), getComputedStyle(one).outlineStyle])(document.activeElement)"
        )
        if name in found or name == "body":
            break
        assert outline != "none", f"the focus on {name} is visible"
        found.append(name)
    return found


def test_traffic_at_two_widths_in_both_schemes(served: Served, browser: Browser, tmp_path: Path):
    with traffic(served, live=2):
        for width in WIDTHS:
            for scheme in SCHEMES:
                browser.prefer(scheme)
                browser.load(f"{served.root}/", width)
                browser.until("document.querySelectorAll('.graph rect').length === 5")
                assert browser.complaints() == []
                assert {url.split("/", 3)[2] for url in browser.requests()} == {served.root.split("/")[2]}
                assert browser.evaluate("document.documentElement.scrollWidth") <= width
                assert browser.evaluate(FAINT) == []
                assert browser.evaluate(OVERLAPS) == []
                assert browser.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") is (scheme == "dark")
        browser.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
        dark = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        browser.prefer("light")
        assert browser.evaluate("getComputedStyle(document.body).backgroundColor") != dark
        assert text(browser, "status") == "live"
        assert browser.evaluate("document.querySelectorAll('#requests tbody tr').length") == 2
        # A name with markup is a text.
        assert NASTY in browser.evaluate("[...document.querySelectorAll('.name')].map(one => one.textContent)")
        assert browser.evaluate("document.title + document.images.length") == "tenure: tiny1"
        check_keyboard(browser)


def check_keyboard(browser: Browser) -> None:
    browser.evaluate("document.activeElement.blur()")
    assert reached_by_tab(browser) == ["a", "pause", "summary", "workflow", "graph"]
    browser.evaluate("document.getElementById('pause').focus()")
    before = len(browser.requests())
    browser.press(" ", 32)
    browser.until(f"{TEXT.format('status')} === 'paused'")
    browser.evaluate("new Promise(done => setTimeout(done, 2500))")
    assert len(browser.requests()) <= before + 1, "nothing is asked for while it is paused"
    browser.press(" ", 32)
    browser.until(f"{TEXT.format('status')} === 'live'")
    browser.evaluate("document.querySelector('.skip').focus()")
    browser.press("Enter", 13)
    browser.until("location.hash === '#main'")


def test_an_empty_server_that_goes_away(served: Served, browser: Browser):
    browser.load(f"{served.root}/", 1280)
    browser.until(is_shown("content"))
    assert "No request is in progress" in text(browser, "requests") and f"curl {served.root}/v1" in text(
        browser, "requests"
    )
    assert "No workflow is known" in text(browser, "graph-empty") and "No copy" in text(browser, "copies")
    assert browser.evaluate(FAINT) == [] and browser.complaints() == []
    served.stop()
    browser.until(f"{TEXT.format('status')} === 'disconnected'")
    assert "does not answer" in text(browser, "notice") and browser.evaluate(is_shown("content"))


def test_a_server_that_drains(served: Served, browser: Browser):
    with traffic(served, live=1):
        browser.load(f"{served.root}/", 1280)
        browser.until(f"{TEXT.format('status')} === 'live'")
        drain = threading.Thread(target=served.client.drain, args=(20.0,))
        drain.start()
        browser.until(f"{TEXT.format('status')} === 'draining'")
        assert "takes no new requests" in text(browser, "notice") and browser.complaints() == []
    drain.join(30)


def test_a_key_is_asked_for(serve, keys, browser: Browser):
    served = serve(keys)
    browser.load(f"{served.root}/", 390)
    browser.until(is_shown("login"))
    assert not any("admin" in url for url in browser.requests()), "nothing is asked for without a key"
    assert browser.complaints() == [] and browser.evaluate(FAINT) == []
    enter(browser, A)
    browser.until(f"{TEXT.format('login-error')}.includes('admin')")
    enter(browser, "wrong")
    browser.until(f"{TEXT.format('login-error')}.includes('does not know')")
    enter(browser, "not a key")
    assert "no spaces" in text(browser, "login-error")
    enter(browser, ADMIN)
    browser.until(is_shown("content"))
    assert (
        not browser.evaluate(is_shown("login")) and browser.evaluate("sessionStorage.length + localStorage.length") == 1
    )
    browser.load(f"{served.root}/", 390)
    browser.until(is_shown("content"))  # the tab keeps the key
    assert not any(ADMIN in url for url in browser.requests()) and browser.complaints() == []
    browser.evaluate("document.getElementById('forget').click()")
    assert browser.evaluate(is_shown("login")) and browser.evaluate("sessionStorage.length") == 0


def enter(browser: Browser, key: str) -> None:
    browser.evaluate("document.getElementById('key').value = ''; document.getElementById('key').focus()")
    browser.ask("Input.insertText", text=key)
    browser.evaluate("document.getElementById('login').requestSubmit()")


def test_the_policy_is_enforced(served: Served, browser: Browser):
    """The tests above rely on complaints of the browser."""
    browser.load(f"{served.root}/", 800)
    assert browser.complaints() == []
    refused = browser.evaluate(
        "(() => { try { document.body.innerHTML = '<b>'; } catch (error) { return error.name; } })()"
    )
    assert refused == "TypeError", "nothing is put in as markup"
    browser.evaluate("document.body.setAttribute('style', 'display: none')")
    browser.evaluate("fetch('http://127.0.0.1:9/x').catch(() => 0)")
    blocked: list[Any] = [event for event in browser.complaints() if "Content Security Policy" in str(event)]
    assert len(blocked) >= 2 and browser.evaluate(is_shown("main"))
