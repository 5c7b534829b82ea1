"""The book as a site in _docs/, from the committed notebooks: built by Sphinx with .ci/conf.py, then checked as a
browser reads it; exits 1 if a page is wrong."""

import shutil
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

root = Path(__file__).resolve().parents[1]


class Page(HTMLParser):
    "Of one page: anchors, targets of links, files it loads, fit on a phone, formulae that stayed LaTeX."

    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.links, self.loads, self.viewport, self.tags, self.latex = {""}, set(), set(), False, [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.tags.append(tag)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        self.viewport |= tag == "meta" and a.get("name") == "viewport" and "width=device-width" in a["content"]
        if a.get("href"):
            (self.links if tag == "a" else self.loads).add(a["href"])
        if a.get("src"):
            self.loads.add(a["src"])

    def handle_endtag(self, tag):
        while tag in self.tags and self.tags.pop() != tag:
            pass

    def handle_data(self, data):
        if "math" in self.tags and "\\" in data:
            self.latex.append(data)


def complaints(folder: Path) -> list[str]:
    "One sentence for each broken link, missing or foreign file, formula left as LaTeX and page without a viewport."
    pages, errors = {p: Page(p) for p in sorted(folder.rglob("*.html"))}, []
    for path, page in pages.items():
        for link in sorted(page.links | page.loads):
            url = urlsplit(link)
            if url.scheme == "data":
                continue
            if url.scheme or url.netloc:
                if link in page.loads:
                    errors.append(f"{path.name} loads {link}; a page must need no network")
                continue
            there = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not there.is_file():
                errors.append(f"{path.name} names {link}, which is not there")
            elif there in pages and unquote(url.fragment) not in pages[there].ids:
                errors.append(f"{path.name} names {link}, but there is no such anchor")
        errors += [f"{path.name}: the formula {text!r} was not understood" for text in page.latex]
        if not page.viewport:
            errors.append(f"{path.name} has no viewport for phones")
    return errors if pages else [f"{folder} holds no page"]


def build(scratch: Path) -> Path:
    "Make the site in a folder of an empty folder; whatever Sphinx warns of ends it."
    from sphinx.cmd.build import main as sphinx

    if sphinx(
        [
            "-q",
            "-W",
            "--keep-going",
            "-c",
            str(root / ".ci"),
            "-d",
            str(scratch / "trees"),
            str(root / "nbs"),
            str(scratch / "html"),
        ]
    ):
        sys.exit(1)
    return scratch / "html"


def main():
    with tempfile.TemporaryDirectory() as scratch:
        made = build(Path(scratch))
        shutil.rmtree(root / "_docs", ignore_errors=True)
        shutil.move(made, root / "_docs")
    wrong = complaints(root / "_docs")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
