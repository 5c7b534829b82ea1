"The book as a site, by Sphinx: `python .ci/book.py`. Outputs are the committed ones; formulae become MathML here, so a page needs no network."

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
myst_enable_extensions, myst_heading_anchors = ["dollarmath", "amsmath"], 3
html_theme, html_title, html_math_renderer = "furo", "diffx2ct", "mathml"
html_show_sourcelink, html_copy_source = False, False


def chapters(app, docname: str, source: list[str]):
    "What README leaves out is left out here too; the first page gets the list of chapters for the sidebar."
    nb = prepare(nbformat.reads(source[0], 4))
    if docname == root_doc:
        nb.cells.append(nbformat.v4.new_markdown_cell("```{toctree}\n:hidden:\n:glob:\n\n0*\n```"))
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
