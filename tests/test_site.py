"The site: its check finds what a reader would stumble over, and a phone shows it without a network."

import sys

import pytest
from conftest import ROOT
from test_browser import CHROMIUM, FLAGS, SHOTS

sys.path.insert(0, str(ROOT / ".ci"))
from book import build, complaints

HEAD = '<meta name="viewport" content="width=device-width,initial-scale=1">'


def test_a_whole_site_has_nothing_to_say(tmp_path):
    (tmp_path / "a.html").write_text(
        f'{HEAD}<a href="b.html#here">b</a><a href="https://example.org">out</a><img '
        'src="x%20y.png"><math><mi>x</mi></math>'
    )
    (tmp_path / "b.html").write_text(
        f'{HEAD}<h1 id="here">b</h1><a href="#here">up</a><img src="data:image/png;base64,AA=="><pre>\\frac</pre>'
    )
    (tmp_path / "x y.png").write_bytes(b"")
    assert complaints(tmp_path) == []


def test_every_flaw_is_named(tmp_path):
    (tmp_path / "a.html").write_text(
        f'{HEAD}<a href="gone.html">1</a><a href="#nowhere">2</a><img src="gone.png"><script '
        'src="https://cdn.example/x.js"></script><math><mi>\\oops</mi></math>'
    )
    (tmp_path / "b.html").write_text('<a href="a.html#top">3</a>')
    said = complaints(tmp_path)
    for word in ("gone.html", "#nowhere", "gone.png", "cdn.example", "oops", "b.html has no viewport", "a.html#top"):
        assert sum(word in s for s in said) == 1, (word, said)
    assert len(said) == 7


def test_an_empty_folder_is_no_site(tmp_path):
    assert complaints(tmp_path) == [f"{tmp_path} holds no page"]


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.filterwarnings("ignore:'myst_parser")
def test_on_a_phone_without_a_network(tmp_path):
    "Every page fits the screen and loads nothing from other machines, and the search finds a word."
    pytest.importorskip("sphinx", reason="sphinx is not installed: pip install 'diffx2ct[docs]'")
    browser = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install 'diffx2ct[test]'"
    )
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    site, asked = build(tmp_path), []
    with browser.sync_playwright() as p:
        page = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split()).new_page(
            viewport={"width": 390, "height": 844}
        )
        page.on("request", lambda r: asked.append(r.url))
        for path in sorted(site.glob("*.html")):
            page.goto(path.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") == 390, path.name
            if path.stem == "00d_consistency":
                assert page.locator("img").count() >= 3  # the slider needs a kernel; its still picture is there
            if path.stem == "00a_drr":
                assert (
                    page.locator("div.math math").first.bounding_box()["height"] > 20
                )  # an integral, set by the browser
                page.screenshot(path=SHOTS / "site_phone.png")
        page.goto((site / "search.html").as_uri() + "?q=haar")
        page.wait_for_selector("#search-results li a")
        assert "U-Net" in page.inner_text("#search-results")
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]
