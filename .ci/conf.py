"""The book as a site, by Sphinx: `python .ci/book.py`. Outputs are the committed ones; formulae become MathML, so a
page needs no network."""

import ast
import re
import sys
from html import escape
from pathlib import Path

import nbformat
from docutils.nodes import SkipNode
from latex2mathml.converter import convert

sys.path.insert(0, str(Path(__file__).parent))
from readme import prepare

project, author, copyright = "diffx2ct", "The diffx2ct developers", "2026 onwards, the diffx2ct developers"
extensions = ["myst_nb"]
root_doc = "index"
exclude_patterns = ["**.ipynb_checkpoints", "_*"]
nb_execution_mode, nb_ipywidgets_js = "off", {}
nb_mime_priority_overrides = [
    ("html", "application/vnd.jupyter.widget-view+json", None)
]  # no kernel: the still picture
myst_enable_extensions, myst_heading_anchors = ["dollarmath", "amsmath"], 3
html_theme, html_title, html_math_renderer = "furo", "diffx2ct", "mathml"
SIDEBAR = {"Chapters": "0*", "How to": "howto/*", "API": "api"}
html_show_sourcelink, html_copy_source = False, False


root = Path(__file__).resolve().parents[1]
CHAPTERS = {p.stem.split("_")[0]: p.name for p in sorted((root / "nbs").glob("0*.ipynb"))}


def linked(text: str) -> str:
    "Text in which `chapter 02a` leads to that chapter."
    return re.sub(
        r"(?<![\[\w])([Cc]hapter (0\d[a-z]?))\b(?!\])",
        lambda m: f"[{m[1]}]({CHAPTERS[m[2]]})" if m[2] in CHAPTERS else m[1],
        text,
    )


def signature(node) -> str:
    "Name and parameters of a function or class, without annotations."
    if isinstance(node, ast.ClassDef):
        made = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        fields = [n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
        return f"{node.name}({', '.join([a.arg for a in made.args.args[1:]] if made else fields)})"
    a = node.args
    names = [x.arg for x in a.posonlyargs + a.args]
    names += [f"*{a.vararg.arg}"] if a.vararg else []
    names += [x.arg for x in a.kwonlyargs]
    names += [f"**{a.kwarg.arg}"] if a.kwarg else []
    return f"{node.name}({', '.join(names)})"


def api() -> str:
    "The page of all names: a table per module, from the source."
    page = ["# API", "Every exported name, by module; the chapter explains and demonstrates it."]
    for path in sorted((root / "diffx2ct").glob("[!_]*.py")):
        tree, text = ast.parse(path.read_text()), path.read_text()
        chapter = re.search(r"File to edit: \.\./nbs/(\S+\.ipynb)", text)
        if not chapter:
            continue
        page += [f"## {path.stem}", f"{ast.get_docstring(tree)} [{chapter[1][:-6]}]({chapter[1]})"]
        rows = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        cells = [(signature(n), (ast.get_docstring(n) or "").split("\n")[0].replace("|", "\\|")) for n in rows]
        page.append("\n".join(["| name | purpose |", "|---|---|"] + [f"| `{name}` | {doc} |" for name, doc in cells]))
    return "\n\n".join(page) + "\n"


def chapters(app, docname: str, source: list[str]):
    "What README leaves out is left out here too; the first page gets the lists of pages for the sidebar."
    if docname == "api":
        source[0] = api()
    if not source[0].startswith("{"):
        return  # a page in Markdown
    nb = prepare(nbformat.reads(source[0], 4))
    if docname == root_doc:
        trees = (
            f"```{{toctree}}\n:hidden:\n:glob:\n:caption: {title}\n\n{pages}\n```" for title, pages in SIDEBAR.items()
        )
        nb.cells += [nbformat.v4.new_markdown_cell(tree) for tree in trees]
    for cell in nb.cells:
        if cell.cell_type == "markdown" and docname != root_doc:
            cell.source = linked(cell.source)
    source[0] = nbformat.writes(nb)


def formula(self, node):
    "One formula as MathML, its source as the title."
    tag, display = ("div", "block") if node.tagname == "math_block" else ("span", "inline")
    self.body.append(
        f'<{tag} class="math" title="{escape(node.astext())}">{convert(node.astext(), display=display)}</{tag}>'
    )
    raise SkipNode


def setup(app):
    app.connect("source-read", chapters)
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
