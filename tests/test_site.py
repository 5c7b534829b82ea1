"The check of the site finds what a reader would stumble over."
import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / ".ci"))
from book import complaints

HEAD = '<meta name="viewport" content="width=device-width,initial-scale=1">'


def test_a_whole_site_has_nothing_to_say(tmp_path):
    (tmp_path / "a.html").write_text(f'{HEAD}<a href="b.html#here">b</a><a href="https://example.org">out</a><img src="x%20y.png"><math><mi>x</mi></math>')
    (tmp_path / "b.html").write_text(f'{HEAD}<h1 id="here">b</h1><a href="#here">up</a><img src="data:image/png;base64,AA=="><pre>\\frac</pre>')
    (tmp_path / "x y.png").write_bytes(b"")
    assert complaints(tmp_path) == []

def test_every_flaw_is_named(tmp_path):
    (tmp_path / "a.html").write_text(f'{HEAD}<a href="gone.html">1</a><a href="#nowhere">2</a><img src="gone.png"><script src="https://cdn.example/x.js"></script><math><mi>\\oops</mi></math>')
    (tmp_path / "b.html").write_text('<a href="a.html#top">3</a>')
    said = complaints(tmp_path)
    for word in ("gone.html", "#nowhere", "gone.png", "cdn.example", "oops", "b.html has no viewport", "a.html#top"): assert sum(word in s for s in said) == 1, (word, said)
    assert len(said) == 7

def test_an_empty_folder_is_no_site(tmp_path):
    assert complaints(tmp_path) == [f"{tmp_path} holds no page"]
