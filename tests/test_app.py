"""The page in a real browser: two films in, the volume in the viewer, the report, the files; no request to another
machine."""

import io
import os
import shutil
import sys
import zipfile
from importlib.util import find_spec

import pytest
import torch
from conftest import PATIENCE, ROOT, served
from PIL import Image
from test_browser import CHROMIUM, FLAGS, SHOTS, free_port

from diffx2ct.checkpoint import describe, save_model
from diffx2ct.config import load_config
from diffx2ct.data import density, to_unit
from diffx2ct.diffusion import build_denoiser
from diffx2ct.drr import geometry
from diffx2ct.phantom import phantom

TINY = [
    "DATA.TARGET_VOLUME_SIZE=32",
    "DATA.TARGET_DRR_SIZE=32",
    "TRAINING.PATCH_SIZE=32",
    "MODEL.SCALE=0.25",
    "DIFFUSION.STEPS=1",
]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    "A folder with a stand-in of a trained model and two films of a phantom, the lateral one facing right."
    tmp = tmp_path_factory.mktemp("page")
    c = load_config(sets=TINY)
    torch.manual_seed(0)
    net = build_denoiser(c, geometry("parallel", 320), 10.0)
    units = torch.stack([to_unit(phantom(k, 32)[0], net.window) for k in range(6)])
    net.mean.copy_(units[1:].mean(0))
    net.usual.copy_(net.A(density(net.mean, net.window))[0])
    net.scales.fill_(0.05)
    save_model(tmp / "model" / "best.safetensors", net, describe(net, c))
    for name, y in zip(("pa", "lateral"), net.A(density(units[:1, None], net.window))[0]):
        grey = (255 * (y / y.max()).sqrt()).byte().numpy()
        Image.fromarray(grey[:, ::-1] if name == "lateral" else grey).resize((512, 512)).save(tmp / f"{name}.png")
    (tmp / "notes.txt").write_text("no film")
    return tmp


@pytest.fixture(scope="module")
def address(case):
    "The page, served by the command; yields its address."
    if find_spec("voila") is None:
        pytest.skip("voila is not installed: pip install 'diffx2ct[app]'")
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    port = free_port()
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    env = os.environ | {k: str(case / k) for k in folders} | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = f"--checkpoint_dir {case / 'model'} --port {port} --no_browser".split()
    command = [sys.executable, "-c", "from diffx2ct.app import main; main()", *line]
    with served(command, f"http://127.0.0.1:{port}/voila/static/", case / "log", env):
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def page(address):
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'diffx2ct[test]'")
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS.split())
        page = browser.new_page(viewport={"width": 1440, "height": 1300})
        page.set_default_timeout(1000 * PATIENCE)
        page.asked = []
        page.on("requestfinished", lambda r: page.asked.append(r.url))
        page.goto(address)
        page.wait_for_selector(".dxa")
        yield page
        browser.close()


def shows(page, *words):
    "Wait until the page shows all of the words."
    try:
        page.wait_for_function(
            "words => words.every(w => document.querySelector('.dxa').innerText.includes(w))", arg=list(words)
        )
    except Exception:
        pytest.fail(f"the page does not show {words}, but: {page.locator('.dxa').inner_text()}")


def give(page, which, path):
    "Choose a file with one of the two buttons."
    with page.expect_file_chooser() as chosen:
        page.get_by_role("button", name=f"{which} film").click()
    chosen.value.set_files(path)


def shoot(page, name):
    SHOTS.mkdir(exist_ok=True)
    page.wait_for_timeout(1000)
    page.screenshot(path=SHOTS / f"app_{name}.png", full_page=True)


@pytest.mark.browser
@pytest.mark.slow
def test_two_films_become_a_volume(page, case):
    shows(page, "Not for clinical use", "not a measurement")
    shoot(page, "start")
    give(page, "frontal", case / "notes.txt")
    shows(page, "notes.txt is of no kind that can be read")
    give(page, "frontal", case / "pa.png")
    shows(page, "pa.png (512 x 512 pixels)", "the lateral film is missing")
    give(page, "lateral", case / "lateral.png")
    shows(page, "lateral.png: ", "the patient faces right", "likeness")
    shoot(page, "films")
    select = page.locator(".dxa select").first
    select.select_option("left")
    shows(page, "the patient faces left")
    select.select_option("right")
    shows(page, "the patient faces right")
    page.get_by_role("button", name="reconstruct").click()
    shows(page, "REPORT", "NOT ASSESSED", "AXIAL")
    page.wait_for_function("[...document.querySelectorAll('.dx img')].filter(i => i.naturalWidth > 0).length >= 3")
    shoot(page, "volume")


@pytest.mark.browser
@pytest.mark.slow
def test_the_files_can_be_taken_home_and_nothing_is_kept(page, case, tmp_path):
    from diffx2ct.scans import find_scans
    from diffx2ct.volumes import load_nifti

    if not page.locator(".dxa-link").count():
        pytest.skip("the volume was not made")
    for name, text in (("ct.nii.gz", "NIfTI"), ("ct_dicom.zip", "DICOM")):
        with page.expect_download() as got:
            page.get_by_role("link", name=text).click()
        assert got.value.suggested_filename == name
        got.value.save_as(tmp_path / name)
    volume, mm = load_nifti(tmp_path / "ct.nii.gz")
    assert volume.shape == (32, 32, 32) and abs(mm - 10) < 1e-4
    zipfile.ZipFile(io.BytesIO((tmp_path / "ct_dicom.zip").read_bytes())).extractall(tmp_path / "series")
    (scan,) = find_scans([tmp_path / "series"])
    assert scan.read().GetSize() == (32, 32, 32)
    memory = "/dev/shm"
    assert not os.path.isdir(memory) or not [
        n for n in os.listdir(memory) if n.startswith("diffx2ct-") and "app" not in n
    ]
    assert not [url for url in page.asked if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))], page.asked
    assert shutil.which("chromium") or CHROMIUM


@pytest.mark.browser
@pytest.mark.slow
def test_an_example_needs_no_films(page):
    page.get_by_role("button", name="example: a phantom").click()
    shows(page, "phantom, lateral: ", "the patient faces left")
    assert page.locator(".dxa-link").count() == 0  # nothing of the case before is left
    page.set_viewport_size({"width": 900, "height": 1000})
    shoot(page, "900")
