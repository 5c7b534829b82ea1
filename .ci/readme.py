"README.md from nbs/index.ipynb. `--check` writes nothing and exits 1 where they differ."

import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

root = Path(__file__).resolve().parents[1]
IMAGES = "nbs/images"  # pictures that cells drew are written here as index_*.png, next to those put there by hand
REPOSITORY = "https://github.com/diffx2ct/diffx2ct"
BADGES = " ".join(
    f"[![{name}]({picture})]({link})"
    for name, picture, link in (
        ("CI", f"{REPOSITORY}/actions/workflows/ci.yml/badge.svg", f"{REPOSITORY}/actions/workflows/ci.yml"),
        ("Python 3.11", "https://img.shields.io/badge/python-3.11%2B-blue", "pyproject.toml"),
        ("Apache-2.0", "https://img.shields.io/badge/licence-Apache--2.0-green", "LICENSE"),
        ("not for clinical use", "https://img.shields.io/badge/not_for-clinical_use-orange", "#limits"),
    )
)  # only in README: a page of the site loads nothing from elsewhere
DIRECTIVE = re.compile(r"^#\|[ \t]*(\S+?):?(?:[ \t]+(.*))?$", re.M)


def prepare(nb):
    "Leave out hidden cells and inputs, and take the directives out of the others."
    cells = []
    for cell in nb.cells:
        found = dict(DIRECTIVE.findall(cell.source)) if cell.cell_type == "code" else {}
        if "hide" in found:
            continue
        if cell.cell_type == "code":
            cell.source = DIRECTIVE.sub("", cell.source).strip()
            if found.get("echo") == "false":
                cell.metadata["tags"] = ["no-input"]
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        cells.append(cell)
    nb.cells = cells
    return nb


def readme() -> dict[Path, bytes]:
    "Every file that belongs to the README, with its content."
    nb = prepare(nbformat.read(root / "nbs/index.ipynb", 4))
    c = Config()
    c.NbConvertBase.display_data_priority = [
        "text/markdown",
        "image/png",
        "image/jpeg",
        "image/svg+xml",
        "text/latex",
        "text/plain",
    ]
    c.TagRemovePreprocessor.enabled = True
    c.TagRemovePreprocessor.remove_input_tags = {"no-input"}
    text, resources = MarkdownExporter(config=c).from_notebook_node(
        nb, {"unique_key": "index", "output_files_dir": IMAGES}
    )
    text = re.sub(r"(\]\(|src=[\"'])(images/|howto/|[\w.-]+\.ipynb)", r"\1nbs/\2", text)  # links that hold inside nbs/
    text = text.replace("](../", "](").replace(f"]({REPOSITORY}/blob/main/", "](")  # and links that leave it
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    text = text.replace("\n\n", f"\n\n{BADGES}\n\n", 1)  # below the title
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    head = "<!-- Made from nbs/index.ipynb by .ci/readme.py; edit the notebook. -->\n\n"
    return {root / "README.md": (head + text).encode()} | {
        root / name: data for name, data in resources.get("outputs", {}).items()
    }


def main():
    files = readme()
    old = [p for p in (root / IMAGES).glob("index_*") if p not in files]
    wrong = [p for p, data in files.items() if not p.exists() or p.read_bytes() != data] + old
    if "--check" in sys.argv[1:]:
        for p in wrong:
            print(f"{p.relative_to(root)} does not agree with nbs/index.ipynb; run python .ci/readme.py")
        sys.exit(bool(wrong))
    for p in old:
        p.unlink()
    for p, data in files.items():
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_bytes(data)


if __name__ == "__main__":
    main()
