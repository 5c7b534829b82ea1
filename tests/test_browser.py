"""The viewer in a real JupyterLab, in a real browser: what a user sees after a slider, a button, a click, the wheel, a
key or a drag."""

import os
import shutil
import socket
import sys
import time
from pathlib import Path

import nbformat
import pytest
from conftest import PATIENCE, ROOT, served

SHOTS = Path(os.environ.get("DIFFX2CT_ARTIFACTS", ROOT / "artifacts"))  # screenshots, which CI keeps
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
CELL = """
import numpy as np
from diffx2ct.phantom import phantom
from diffx2ct.viewer import view
hu, _, info = phantom(0, size=48)
truth = hu.numpy()
generated = (truth + np.roll(truth, 1, 0) + np.roll(truth, 1, 2)) / 3
d, h, w = np.meshgrid(*[np.linspace(-1, 1, 48)] * 3, indexing="ij")
coverage = 1 * (abs(d) < 0.9 + 0.2 * h) + (abs(d) < 0.9 + 0.2 * w)
samples = [generated + np.random.default_rng(k).normal(0, 60, truth.shape) for k in range(3)]
viewer = view({"truth": truth, "generated": generated, "samples": samples, "coverage": coverage}, mm=info["mm"])
viewer
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "Start a JupyterLab with settings, kernels and history in a temporary folder; yield its address."
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'diffx2ct[test]'")
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    tmp, port = tmp_path_factory.mktemp("lab"), free_port()
    work = tmp / "work"
    work.mkdir()
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(CELL.strip())],
        metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}},
    )
    nbformat.write(notebook, work / "viewer.ipynb")
    for plugin, text in (
        ("notebook-extension/tracker", '{"autoStartDefaultKernel": true}'),
        ("apputils-extension/notification", '{"fetchNews": "false", "checkForUpdates": false}'),
    ):
        file = tmp / "settings" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(text)
    folders = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "run",
        "IPYTHONDIR": "ipython",
        "JUPYTERLAB_WORKSPACES_DIR": "spaces",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
    }
    env = (
        os.environ
        | {k: str(tmp / v) for k, v in folders.items()}
        | {"JUPYTER_PATH": str(Path(sys.prefix) / "share/jupyter"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    )
    options = (
        f"--no-browser --allow-root --expose-app-in-browser --ip=127.0.0.1 --port={port} "
        f"--ServerApp.port_retries=0 --ServerApp.root_dir={work} --IdentityProvider.token="
    )
    command, address = [sys.executable, "-m", "jupyterlab", *options.split()], f"http://127.0.0.1:{port}/"
    with served(command, address + "api", tmp / "log", env):
        yield address


@pytest.fixture(scope="module")
def driver():
    "Playwright, one for the module."
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'diffx2ct[test]'")
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with api.sync_playwright() as p:
        yield p


@pytest.fixture(scope="module")
def page(lab, driver):
    "The viewer's notebook, opened and run."
    browser = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS.split())
    page = browser.new_page(viewport={"width": 1440, "height": 1300})
    page.set_default_timeout(1000 * PATIENCE)
    page.goto(lab + "lab/tree/viewer.ipynb")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_function(
        "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
    )
    page.evaluate("window.jupyterapp.commands.execute('application:toggle-left-area')")
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_selector(".dx img")
    page.wait_for_function("[...document.querySelectorAll('.dx img')].filter(i => i.naturalWidth > 0).length >= 3")
    yield page
    browser.close()


def pictures(page):
    "The addresses of the pictures in sight; each new picture gets a new one."
    return page.eval_on_selector_all(".dx img", "images => images.filter(i => i.offsetParent).map(i => i.src)")


def changed(page, before, count=3):
    "The pictures in sight, as soon as `count` of them are not those of `before`."
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        now = pictures(page)
        if len(now) >= len(before) and sum(n not in before for n in now) >= count:
            return now
        page.wait_for_timeout(50)
    pytest.fail("the pictures did not change")


def text_soon(page, *words):
    "Wait until the viewer shows all of the words."
    try:
        page.wait_for_function(
            "words => words.every(w => document.querySelector('.dx').innerText.includes(w))",
            arg=list(words),
        )
    except Exception:
        pytest.fail(f"the viewer does not show {words}, but: {page.locator('.dx').inner_text()}")


def lit(page, *names):
    "Wait until only the first of the named buttons is highlighted, or none if it is None."
    page.wait_for_function(
        """([on, names]) => [...document.querySelectorAll('.dx button')].filter(b => names.includes(b.innerText))
            .every(b => b.classList.contains('mod-active') == (b.innerText == on))""",
        arg=[names[0], ["lung", "mediastinum", "bone", "full"]],
    )


def settled(page):
    "Return the visible pictures when kernel and browser are idle."
    page.wait_for_function("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'")
    before = None
    while before != (before := pictures(page)):
        page.wait_for_timeout(300)
    return before


def shoot(page, name):
    page.wait_for_function("[...document.querySelectorAll('.dx img')].every(i => i.complete)")
    page.locator(".dx").screenshot(path=SHOTS / f"viewer_{name}.png")


def spot(page, plane, x, y):
    "A point of a picture, given in shares of its side, in pixels of the page."
    box = page.locator(f".dx .dx-{plane}:visible").first.bounding_box()
    return box["x"] + x * box["width"], box["y"] + y * box["height"]


@pytest.mark.slow
@pytest.mark.browser
def test_controls(page):
    SHOTS.mkdir(exist_ok=True)
    viewer = page.locator(".dx")

    def inked():  # is there a picture of the slice, not only a black square?
        return page.evaluate("""() => {
            const i = document.querySelector('.dx img'), c = document.createElement('canvas');
            c.width = i.naturalWidth;
            c.height = i.naturalHeight;
            const x = c.getContext('2d');
            x.drawImage(i, 0, 0);
            return new Set(x.getImageData(0, 0, c.width, c.height).data).size;
        }""")

    before = settled(page)
    assert len(before) == 3 and inked() > 20
    shoot(page, "start")

    handle = viewer.locator(".noUi-horizontal .noUi-handle:visible").nth(
        3
    )  # the sample's handle and two of the window come first
    handle.focus()
    page.keyboard.press("ArrowRight")
    before = changed(page, before)
    text_soon(page, "voxel (25, 24, 24)")

    lit(page, "full")
    for name, ends in (("lung", "−1350 – 150"), ("bone", "−500 – 1300"), ("mediastinum", "−160 – 240")):
        viewer.get_by_role("button", name=name, exact=True).click()
        before = changed(page, before)
        text_soon(page, ends)
        lit(page, name)
        shoot(page, name)

    for name in ("generated", "difference", "deviation", "coverage"):
        viewer.get_by_role("button", name=name, exact=True).click()
        before = changed(page, before)
        shoot(page, name)
    text_soon(page, "no beam: prior only")

    viewer.get_by_role("button", name="difference", exact=True).click()
    before = changed(page, before)
    handle = viewer.locator(".noUi-horizontal .noUi-handle:visible").first  # another sample: another difference
    handle.focus()
    page.keyboard.press("ArrowRight")
    before = changed(page, before)
    text_soon(page, "sample 1 of 3")
    shoot(page, "sample")

    compared = "select => select.selectedOptions[0]?.innerText"
    assert viewer.locator("select").evaluate(compared) == "nothing"
    for name in ("generated", "difference", "deviation", "coverage", "truth"):
        viewer.locator("select").select_option(name)
        before = changed(page, before)
        assert len(before) == 6 and viewer.locator("select").evaluate(compared) == name
    shoot(page, "compared")
    page.screenshot(path=SHOTS / "viewer_page.png")
    viewer.locator("select").select_option("nothing")
    page.wait_for_function("[...document.querySelectorAll('.dx img')].filter(i => i.offsetParent).length == 3")
    settled(page)
    assert viewer.locator("select").evaluate(compared) == "nothing"
    shoot(page, "nothing")
    viewer.get_by_role("button", name="truth", exact=True).click()
    changed(page, before[:3])


@pytest.mark.slow
@pytest.mark.browser
def test_mouse_and_keys(page):
    """A click moves the cross-hair, a move reads out, the wheel and keys walk, a drag with the right button or shift
    is the window."""
    before = settled(page)

    page.mouse.move(*spot(page, "coronal", 0.25, 0.75))
    text_soon(page, "voxel (37, 24, 10)")  # under the mouse; nothing has moved yet
    assert settled(page) == before
    page.mouse.down()
    page.mouse.up()
    before = changed(page, before)
    text_soon(page, "R 90.0 mm")
    before = settled(page)
    shoot(page, "click")

    def scrolled():
        return page.evaluate("document.querySelector('.jp-WindowedPanel-outer').scrollTop")

    page.mouse.move(*spot(page, "axial", 0.5, 0.5))
    top = scrolled()
    for _ in range(3):
        page.mouse.wheel(0, 120)
    text_soon(page, "voxel (40, 24, 10)")
    before = changed(page, before, 1)
    assert scrolled() == top, "the wheel turned the page instead of the slices"

    page.mouse.down()  # a drag with the left button takes the cross-hair along
    page.mouse.move(*spot(page, "axial", 0.6, 0.4), steps=4)
    page.mouse.up()
    text_soon(page, "voxel (40, 18, 29)")
    for keys, where in (
        (("ArrowLeft", "ArrowLeft"), "voxel (40, 18, 27)"),
        (("ArrowDown",), "voxel (40, 19, 27)"),
        (("PageUp",), "voxel (39, 19, 27)"),
        (("ArrowRight", "ArrowUp", "PageDown"), "voxel (40, 18, 28)"),
        (("ArrowLeft", "ArrowDown", "PageUp"), "voxel (39, 19, 27)"),
    ):
        for key in keys:
            page.keyboard.press(key)
        text_soon(page, where)

    def levels_are(same):
        page.wait_for_function(
            "same => same == ([...document.querySelectorAll('.dx .widget-readout')].some(e => "
            "e.innerText.includes('500 – 1300')))",
            arg=same,
        )

    for button, key in ("right", None), ("left", "Shift"):
        page.locator(".dx").get_by_role("button", name="bone", exact=True).click()
        levels_are(True)
        lit(page, "bone")
        page.mouse.move(*spot(page, "sagittal", 0.6, 0.5))
        if key:
            page.keyboard.down(key)
        page.mouse.down(button=button)
        page.mouse.move(*spot(page, "sagittal", 0.4, 0.4), steps=4)
        page.mouse.up(button=button)
        if key:
            page.keyboard.up(key)
        levels_are(False)
        lit(page, None)
    settled(page)
    assert "voxel (39, 19, 27)" in page.locator(".dx").inner_text()  # the cross-hair stayed where it was
    assert not page.locator(".lm-Menu").count(), "the page opened a menu"
    shoot(page, "window")


@pytest.mark.slow
@pytest.mark.browser
def test_zoom_pan_ends_and_save(page, tmp_path):
    "Home and End, ctrl and the wheel, ctrl and a drag, width and level as typed, the saved picture, the full screen."
    from PIL import Image

    before = settled(page)
    page.mouse.move(*spot(page, "axial", 0.5, 0.5))
    page.mouse.down()
    page.mouse.up()
    page.keyboard.press("End")
    text_soon(page, "48/48, ", "mm to the feet")
    page.keyboard.press("Home")
    text_soon(page, "1/48, ", "mm to the head")
    before = settled(page)
    page.keyboard.down("Control")
    for _ in range(4):
        page.mouse.wheel(0, -120)
    page.keyboard.up("Control")
    text_soon(page, "zoom ")
    before = changed(page, before)
    page.mouse.move(*spot(page, "coronal", 0.5, 0.5))
    page.keyboard.down("Control")
    page.mouse.down()
    page.mouse.move(*spot(page, "coronal", 0.7, 0.5), steps=4)
    page.mouse.up()
    page.keyboard.up("Control")
    before = changed(page, before, 2)
    shoot(page, "zoom")
    with page.expect_download() as got:
        page.locator(".dx .dx-save").click()
    got.value.save_as(tmp_path / "saved.png")
    wide, high = Image.open(tmp_path / "saved.png").size
    assert got.value.suggested_filename == "diffx2ct.png" and wide > 2.5 * high > 500
    page.locator(".dx .dx-axial:visible").first.focus()
    page.keyboard.press("0")
    changed(page, before)
    page.wait_for_function("!document.querySelector('.dx').innerText.includes('zoom 2')")
    for label, value in (("W", "1500"), ("L", "-600")):
        page.locator(".dx .widget-text", has_text=label).locator("input").first.fill(value)
        page.keyboard.press("Enter")
    lit(page, "lung")
    page.locator(".dx .dx-full").click()
    page.wait_for_function("document.fullscreenElement?.classList.contains('dx')")
    settled(page)
    page.screenshot(path=SHOTS / "viewer_full.png")
    page.locator(".dx .dx-full").click()
    page.wait_for_function("!document.fullscreenElement")


@pytest.mark.slow
@pytest.mark.browser
def test_the_cloud_shows_bones(tmp_path, driver):
    "A phantom's bones, at low resolution, are bright against the dark ground."
    pytest.importorskip("k3d", reason="k3d is not installed: pip install 'diffx2ct[volume]'")
    from PIL import Image

    from diffx2ct.phantom import phantom
    from diffx2ct.viewer import view_3d

    hu, _, info = phantom(0, size=32)
    plot = view_3d(hu, mm=info["mm"])
    plot.menu_visibility, plot.colorbar_object_id, plot.axes_helper = False, 0, 0
    (tmp_path / "cloud.html").write_text(plot.get_snapshot(compression_level=1), encoding="utf-8")
    flags = "--use-gl=angle --use-angle=swiftshader --enable-unsafe-swiftshader --ignore-gpu-blocklist"  # no GPU
    args = [f for f in FLAGS.split() if f != "--disable-gpu"] + flags.split()
    browser = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=args)
    page = browser.new_page(viewport={"width": 240, "height": 240})
    page.set_default_timeout(1000 * PATIENCE)
    page.goto((tmp_path / "cloud.html").as_uri())
    SHOTS.mkdir(exist_ok=True)
    end, share = time.monotonic() + PATIENCE, 0.0
    while share < 0.02 and time.monotonic() < end:
        page.wait_for_timeout(1000)
        page.screenshot(path=SHOTS / "cloud.png")
        grey = Image.open(SHOTS / "cloud.png").convert("L")
        share = sum(grey.histogram()[60:]) / (240 * 240)
    browser.close()
    assert share >= 0.02, f"only {share:.1%} of the picture is bright"
