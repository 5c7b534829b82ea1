"""Files made to do harm, in place of every file a command reads: exit code 2 and one sentence, or a correct read. Never
a traceback, ten seconds, two gigabytes, a file outside the output folder, or code that runs.

The commands run in one long-lived process with a limit on its memory and somebody who watches the clock. All inputs are
written into a table with their outcomes: `table.md` in pytest's folder, or in `$DIFFX2CT_HOSTILE`;
`$DIFFX2CT_HOSTILE_EXAMPLES` sets how many random inputs Hypothesis makes of each kind."""

import gzip
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import sqlite3
import struct
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import ROOT, run_cmd, write_slices
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from diffx2ct.basics import UserError, command, save_tensor
from diffx2ct.checkpoint import CHECKSUM_FILE, describe, load_model, load_training, save_checkpoint
from diffx2ct.config import load_config
from diffx2ct.data import CTPairs, density, read_manifest, save_case, to_unit, write_manifest
from diffx2ct.diffusion import build_denoiser
from diffx2ct.drr import geometry
from diffx2ct.uncertainty import CALIBRATION_FILE

N, MM, SECONDS, BYTES = 16, 20.0, 10, 2 << 30  # SECONDS of the processor
EXAMPLES = int(os.environ.get("DIFFX2CT_HOSTILE_EXAMPLES", 12))
SETS = [
    f"DATA.TARGET_VOLUME_SIZE={N}",
    f"DATA.TARGET_DRR_SIZE={N}",
    "TRAINING.PATCH_SIZE=16",
    "TRAINING.AMP=off",
    "MODEL.UNET.NUM_CHANNELS=[8, 8]",
    "MODEL.UNET.ATTENTION_LEVELS=[false, false]",
    "MODEL.UNET.CROSS_ATTENTION_LEVELS=[false, false]",
    "MODEL.CONDITIONING_ENCODER.NUM_CHANNELS=8",
    "MODEL.CONDITIONING_ENCODER.OUTPUT_DIM=8",
]
slow = pytest.mark.slow


# the process that reads inputs, and its outcome


def network():
    torch.manual_seed(0)
    c = load_config(sets=SETS)
    net = build_denoiser(c, geometry("parallel", N * MM), MM)
    net.mean.copy_(torch.rand(N, N, N))
    net.scales.fill_(0.05)
    return net.requires_grad_(True), c


def serve(pipe):
    "Run commands until the pipe is closed: (code, output, bytes of memory at most so far)."
    from diffx2ct import evaluate, scans, study, two_images, visualize

    net, _ = network()
    ask = dict(
        prepare=scans.main,
        reconstruct=two_images.main,
        train=study.main,
        evaluate=evaluate.main,
        visualize=visualize.main,
        pairs=command(
            lambda argv: list(
                CTPairs(
                    load_config(
                        sets=[*SETS, f"DATA.PT_DATA_DIR={argv[0]}/volumes", f"DATA.DRR_DIR={argv[0]}/drrs"]
                    ).DATA
                )
            )
        ),
        manifest=command(lambda argv: read_manifest(argv[0])),
        training=command(lambda argv: load_training(argv[0], net, net)),
    )
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    files = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]
    for fd, f in zip((1, 2), files):
        os.dup2(f.fileno(), fd)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", 1, closefd=False, errors="backslashreplace")

    def heard():
        sys.stdout.flush()
        sys.stderr.flush()
        for f in files:
            f.seek(0)
            yield f.read().decode(errors="replace")
            f.truncate(0)
            f.seek(0)

    while True:
        try:
            name, argv = pipe.recv()
        except EOFError:
            return
        code, begun = 0, time.process_time()
        try:
            ask[name](argv)
        except SystemExit as e:
            code = e.code or 0
        except BaseException:
            code = 1
            traceback.print_exc()
        pipe.send(
            (code, *heard(), time.process_time() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
        )


class Reader:
    "The process, the folder it may write to, and the table."

    def __init__(self, at: Path):
        self.at, self.rows, self.seen, self.process = at, [], set(), None
        self.out = at / "out"
        (at / "here").mkdir()

    def __call__(self, name, argv):
        "(code, stdout, stderr)"
        if self.process is None:
            context, old = multiprocessing.get_context("spawn"), os.getcwd()
            self.pipe, theirs = context.Pipe()
            os.chdir(self.at / "here")
            try:
                self.process = context.Process(target=serve, args=(theirs,), daemon=True)
                self.process.start()
            finally:
                os.chdir(old)
            theirs.close()
            self.pipe.send(("manifest", [str(self.at)]))
            self.pipe.recv()  # it is up; the clock begins now
        self.pipe.send((name, [str(a) for a in argv]))
        try:
            if not self.pipe.poll(12 * SECONDS):
                raise TimeoutError  # the machine may be busy
            code, out, err, seconds, peak = self.pipe.recv()
            return (f"{peak >> 20} MB" if peak > BYTES else f"{seconds:.0f} s" if seconds > SECONDS else code), out, err
        except (EOFError, TimeoutError) as e:
            self.process.kill()
            self.process.join()
            how, self.process = self.process.exitcode, None
            return f"no answer in {12 * SECONDS} s" if isinstance(e, TimeoutError) else f"died with {how}", "", ""

    def judge(self, kind, what, name, argv, content=b""):
        "Run one command on one input, note the outcome, and return its fault, if any."
        shutil.rmtree(self.out, ignore_errors=True)
        before = self.files()
        code, out, err = self(name, argv)
        lines = [line for line in err.splitlines() if not line.startswith("diffx2ct: warning: ")]
        wrong = (
            f"{code}: {err[-1500:]}"
            if code not in (0, 2)
            else f"not one sentence: {err[-1500:]!r}"
            if code == 2 and (len(lines) != 1 or not lines[0].startswith("diffx2ct: "))
            else f"said {err[-1500:]!r}"
            if code == 0 and lines
            else None
        )
        if self.files() != before:
            wrong = f"written outside the output folder: {self.files() ^ before}"
        elif code == 2 and any(p.is_file() for p in self.out.rglob("*")):
            wrong = f"refused, but {list(self.out.rglob('*'))} is there"
        key = hashlib.sha256(repr((kind, what if not content else "")).encode() + content).digest()
        if key not in self.seen:
            self.seen.add(key)
            self.rows.append(
                (
                    kind,
                    what,
                    "wrong" if wrong else "refused" if code == 2 else "read",
                    lines[0].removeprefix("diffx2ct: ").replace(f"{self.at}/", "") if code == 2 and lines else "",
                )
            )
        return wrong and f"{kind}, {what}: {wrong}"

    def files(self):
        return {str(p) for p in self.at.rglob("*") if self.out not in (p, *p.parents)}

    def table(self):
        "The rows as Markdown."
        count = {k: sum(r[2] == k for r in self.rows) for k in ("refused", "read", "wrong")}
        plain = lambda text: re.sub(r"[^ -~]", lambda m: f"\\x{ord(m[0]):02x}", text).replace("|", "\\|")[:160]
        return "\n".join(
            [
                f"{len(self.rows)} inputs: " + ", ".join(f"{v} {k}" for k, v in count.items()),
                "",
                "| kind | what was done | outcome | what was said |",
                "|---|---|---|---|",
                *(f"| {' | '.join(map(plain, r))} |" for r in self.rows),
                "",
            ]
        )


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    at = tmp_path_factory.mktemp("hostile")
    r = Reader(at)
    yield r
    if r.process:
        r.pipe.close()
        r.process.join(10)
    out = Path(os.environ.get("DIFFX2CT_HOSTILE") or at.parent)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(r.table())


# good files, of which the bad ones are made


def patient(n=N):
    "(D, H, W) HU: a round body with a lung, spine and noise, which does not compress."
    z, y, x = np.meshgrid(*[(np.arange(n) + 0.5) / n - 0.5] * 3, indexing="ij")
    hu = np.full((n, n, n), -1000, np.int16)
    hu[y**2 + x**2 < 0.18] = 40
    hu[(z / 0.4) ** 2 + y**2 / 0.05 + (x - 0.2) ** 2 / 0.02 < 1] = -800
    hu[(y - 0.3) ** 2 + x**2 < 0.006] = 700
    return hu + np.random.default_rng(0).integers(-20, 20, hu.shape, dtype=np.int16)


def scan(hu, mm=MM):
    img = sitk.GetImageFromArray(hu)
    img.SetSpacing([mm] * 3)
    img.SetDirection((1.0, 0, 0, 0, 1, 0, 0, 0, -1))
    return img


@pytest.fixture(scope="module")
def good(reader):
    "A folder with one good file of every kind."
    at = reader.at / "good"
    at.mkdir()
    hu, rng = patient(), np.random.default_rng(1)
    for name in ("a.nii", "a.nii.gz", "a.nrrd", "a.mha"):
        sitk.WriteImage(scan(hu), str(at / name))
    study = {"0020|000e": "1.2.3.1", "0020|000d": "1.2.3.9"}
    write_slices(scan(patient(32), 10.0), at / "dicom", lambda k: f"s{k:02d}.dcm", study)
    with h5py.File(at / "a.h5", "w") as f:
        f["ct"] = hu + 1024
    np.savez(at / "a.npz", volumes_hu_zyx=hu[None], ids=["P1"], spacing_mm=MM)
    net, c = network()
    views = net.A(density(to_unit(torch.from_numpy(hu).float(), (-1024.0, 1500.0))[None, None], (-1024.0, 1500.0)))[0]
    for i in range(3):
        save_case(
            f"p{i}",
            to_unit(torch.from_numpy(hu).float(), (-1024.0, 1500.0)),
            views,
            at / "data/volumes",
            at / "data/drrs",
        )
    write_manifest(
        at / "data/drrs",
        dict(kind="parallel", sad_mm=0.0, sdd_mm=0.0, panel_mm=N * MM),
        N,
        MM,
        N,
        (-1024, 1500),
        {f"p{i}": {} for i in range(3)},
    )
    for name, view in zip(("AP", "LAT"), views):
        save_tensor(view, at / f"{name}.pt")
        grey = (255 * (view / view.max()).clamp(0).sqrt()).numpy().repeat(5, 0).repeat(5, 1)
        pixels = np.clip(grey + rng.integers(-9, 9, grey.shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(at / f"{name}.png")
        Image.fromarray(pixels).save(at / f"{name}.jpg")
        Image.fromarray(pixels).save(at / f"{name}.tif")
        s = sitk.JoinSeries([sitk.GetImageFromArray(pixels)])
        s.SetSpacing((4.0, 4.0, 1.0))
        sitk.WriteImage(s, str(at / f"{name}.nii"))
        s = sitk.JoinSeries([sitk.GetImageFromArray(pixels.astype(np.uint16))])
        s.SetSpacing((4.0, 4.0, 1.0))
        s.SetMetaData("0008|0060", "DX")
        w = sitk.ImageFileWriter()
        w.KeepOriginalImageUIDOn()
        w.SetFileName(str(at / f"{name}.dcm"))
        w.Execute(s)
    save_checkpoint(
        at / "model", 20, net, net, dict(optimizer={"m": torch.rand(999)}, history=[1.0]), describe(net, c, step=20)
    )
    shutil.copy(ROOT / "config.yml", at / "config.yml")
    return at


VIEWS = ("png", "jpg", "tif", "dcm", "pt", "nii")
KINDS = [
    "config.yml",
    "a.nii",
    "a.nii.gz",
    "a.nrrd",
    "a.mha",
    "dicom/s07.dcm",
    "a.h5",
    "a.npz",
    *(f"AP.{v}" for v in VIEWS),
    "data/volumes/p1.pt",
    "data/drrs/p1/AP.pt",
    "data/drrs/manifest.json",
    "model/model_000020.safetensors",
    "model/training_000020.pt",
]


@pytest.fixture(scope="module")
def trial(reader, good):
    "Put bytes in place of a good file, run the command that reads it, and return what was wrong."
    bad = reader.at / "bad"
    bad.mkdir()
    for folder in ("dicom", "data", "model"):
        shutil.copytree(good / folder, bad / folder)
    (bad / "model" / CHECKSUM_FILE).unlink()  # as after a copy without checksums: the readers themselves must hold
    asks = {
        "config.yml": ("train", "--config", bad / "config.yml", "--explain", "TRAINING"),
        "data/volumes/p1.pt": ("pairs", bad / "data"),
        "data/drrs/p1/AP.pt": ("pairs", bad / "data"),
        "data/drrs/manifest.json": (
            "evaluate",
            "--checkpoint_dir",
            good / "model",
            "--data",
            bad / "data",
            "--methods",
            "mean",
            "--cases",
            "p1",
        ),
        "model/model_000020.safetensors": (
            "reconstruct",
            good / "AP.png",
            good / "LAT.png",
            "--checkpoint_dir",
            bad / "model",
            "--out",
            reader.out / "c.nii.gz",
            "--method",
            "mean",
        ),
        "model/training_000020.pt": ("training", bad / "model"),
    }

    def run(kind, what, content):
        path, old = bad / kind, (good / kind).read_bytes()
        path.write_bytes(content)
        scans = bad / "dicom" if kind.startswith("dicom") else path
        name, *argv = asks.get(kind) or (
            (
                "reconstruct",
                path,
                good / kind.replace("AP", "LAT"),
                "--checkpoint_dir",
                good / "model",
                "--out",
                reader.out / "c.nii.gz",
                "--method",
                "mean",
            )
            if kind.startswith("AP")
            else ("prepare", scans, "--out", reader.out, "--size", N)
        )
        wrong = reader.judge(kind, what, name, argv, content)
        path.write_bytes(old) if "/" in kind else path.unlink(missing_ok=True)
        return wrong

    return run


def none(wrongs):
    wrongs = [w for w in wrongs if w]
    assert not wrongs, f"{len(wrongs)} wrong: " + "\n\n".join(wrongs[:12])


@pytest.mark.parametrize("kind", KINDS)
def test_the_good_file_is_read(reader, trial, good, kind):
    assert trial(kind, "as it is", (good / kind).read_bytes()) is None and reader.rows[-1][2] == "read", reader.rows[-1]


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_cut_at_every_kilobyte(trial, good, kind):
    whole = (good / kind).read_bytes()
    step = 1024 * -(-len(whole) // (64 << 10))  # of a large file at every second kilobyte, or third ...
    none(trial(kind, f"cut after {n} bytes", whole[:n]) for n in range(0, len(whole), step))


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_random_bytes(trial, good, kind):
    "Nothing but noise, and noise behind the beginning of a good file."
    whole, wrongs = (good / kind).read_bytes(), []

    @settings(
        max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.sampled_from([0, 8, 132, 352, 1024]), st.binary(min_size=1, max_size=2000))
    def noise(keep, junk):
        wrongs.append(trial(kind, f"{len(junk)} random bytes after the first {keep}", whole[:keep] + junk))

    noise()
    none(wrongs)


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bytes(trial, good, kind):
    "A few bytes changed, half of them in the first 600, where headers are."
    whole, wrongs = (good / kind).read_bytes(), []

    @settings(
        max_examples=2 * EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        st.lists(
            st.tuples(
                st.one_of(st.integers(0, min(600, len(whole)) - 1), st.integers(0, len(whole) - 1)), st.integers(1, 255)
            ),
            min_size=1,
            max_size=4,
        )
    )
    def flips(changes):
        data = bytearray(whole)
        for at, mask in changes:
            data[at] ^= mask
        wrongs.append(trial(kind, "flipped " + ", ".join(f"{at} by {mask}" for at, mask in changes), bytes(data)))

    flips()
    none(wrongs)


# files that lie: sizes, numbers and names that no writer would write

NUMBERS = ("nan", "inf", "-inf", "0", "-1", "1e30", "1e-30", "1e400", "abc", "")
HUGE = 2**31


def nifti(data, offset, code, *values):
    data = bytearray(data)
    struct.pack_into(f"<{len(values)}{code}", data, offset, *values)
    return bytes(data)


def dicom(data, tag, value):
    "The first element of a tag with another value (implicit VR, little endian)."
    head = struct.pack("<HH", *(int(t, 16) for t in tag.split("|")))
    at = data.index(head)
    return (
        data[:at]
        + head
        + struct.pack("<I", len(value))
        + value
        + data[at + 8 + struct.unpack_from("<I", data, at + 4)[0] :]
    )


def png(width, height, depth=8, colour=0, rows=b"", extra=()):
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
        + b"".join(chunk(*e) for e in extra)
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )


def zeros(n):
    "n zero bytes, compressed."
    z = zlib.compressobj(1)
    return b"".join([*(z.compress(bytes(1 << 20)) for _ in range(n >> 20)), z.flush()])


def saved(write, *args, **kwargs):
    "The bytes that a writer writes to a file."
    with tempfile.TemporaryDirectory() as tmp:
        write(Path(tmp) / "f", *args, **kwargs)
        return next(Path(tmp).iterdir()).read_bytes()


def pt(thing, **how):
    return saved(lambda p: torch.save(thing, p, **how))


def hdf(fill):
    def write(p):
        with h5py.File(p, "w") as f:
            fill(f)

    return saved(write)


def npz(**arrays):
    return saved(lambda p: np.savez(p, **dict(volumes_hu_zyx=patient()[None], ids=["P1"], spacing_mm=MM) | arrays))


def deflated(data, swell=0):
    "A zip file with its members compressed, the first of them swollen by zeros."
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as old,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        for k, i in enumerate(old.infolist()):
            with new.open(i.filename, "w", force_zip64=True) as f:
                f.write(old.read(i))
                for _ in range(0 if k else swell >> 20):
                    f.write(bytes(1 << 20))
    return out.getvalue()


def tagged(good, tags):
    "A radiograph with more in its header."
    ds = pytest.importorskip("pydicom").dcmread(good / "AP.dcm")
    for tag, v in tags.items():
        ds.add_new([int(t, 16) for t in tag.split("|")], "CS" if tag == "0028|0004" else "LO", v)
    return saved(lambda p: ds.save_as(p))


def replaced(data, *pairs):
    for old, new in pairs:
        assert old in data, old
        data = data.replace(old, new, 1)
    return data


def line(data, key, value):
    "A text header with another value of a key."
    new, n = re.subn(rb"(?m)^(" + re.escape(key) + rb" ?[=:] ?).*$", lambda m: m[1] + value, data, count=1)
    assert n, key
    return new


def described(good, change):
    "A model file with another description."
    path = good / "model/model_000020.safetensors"
    n = struct.unpack("<Q", path.read_bytes()[:8])[0]
    meta = json.loads(json.loads(path.read_bytes()[8 : 8 + n])["__metadata__"]["diffx2ct"])
    meta = change(meta)
    return saved(
        lambda p: save_file(load_file(path), p, {"diffx2ct": meta if isinstance(meta, str) else json.dumps(meta)})
    )


def put(path, value):
    "Change a dotted key of a nested mapping."

    def change(d):
        *parents, last = path.split(".")
        at = d
        for k in parents:
            at = at[k]
        at[last] = value
        return d

    return change


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
)
SETTINGS = (
    {
        "billion laughs": LAUGHS + "EPOCHS: *i\n",
        "an alias": "DATA: &d {PHANTOMS: 4}\nMODEL: *d\n",
        "a mapping in itself": "DATA: &d {X: *d}\n",
        "two mappings in themselves": "DATA: &d {X: *d}\nPROFILES: {demo: {DATA: &e {X: *e}}}\n",
        "an object": "EPOCHS: !!python/object/apply:os.mkdir [pwned]\n",
        "a name": "EPOCHS: !!python/name:os.system\n",
        "a module": "EPOCHS: !!python/module:os\n",
        "new": "EPOCHS: !!python/object/new:os.mkdir [pwned]\n",
        "an unknown tag": "EPOCHS: !thing 3\n",
        "a set": "EPOCHS: !!set {1, 2}\n",
        "binary": "EPOCHS: !!binary '%%%'\n",
        "nested lists": "EPOCHS: " + "[" * 50000,
        "nested mappings": "EPOCHS: " + "{a: " * 3000 + "1" + "}" * 3000,
        "an int of 5000 digits": "EPOCHS: " + "9" * 5000,
        "no such day": "PROJECT_NAME: 2001-99-99\n",
        "a day": "PROJECT_NAME: 2001-01-01\n",
        "keys that are numbers": "1: 2\n3: 4\n",
        "a key that is null": "~: 2\n",
        "a key that is a list": "? [1, 2]\n: 3\n",
        "a merge of nothing": "<<: 3\n",
        "a value token": "=: 3\n",
        "NUL": "PROJECT_NAME: 'a\0b'\n",
        "escaped NUL in a folder": 'DATA: {PT_DATA_DIR: "a\\0b", DRR_DIR: "a\\0b"}\n',
        "a long text for a number": "EPOCHS: " + "x" * 100000,
        "two megabytes": "# " + "x" * (2 << 20),
        "UTF-16": "EPOCHS: 3\n".encode("utf-16"),
        "Latin-1": "PROJECT_NAME: Röntgen\n".encode("latin-1"),
        "two documents": "EPOCHS: 1\n---\nEPOCHS: 2\n",
        "only a list": "- 1\n",
        "only a number": "7\n",
        "nothing": "",
        "profiles that are a list": "PROFILES: [1]\n",
        "a profile that is a list": "PROFILES: {demo: [1]}\n",
        "a profile with a list for a name": "PROFILE: [1, 2]\n",
        "a section that is a number": "DATA: 7\n",
        "a search space that is a list": "OPTUNA: {PARAMS: [1]}\n",
        "a search space of NaN": "OPTUNA: {PARAMS: {TRAINING.LEARNING_RATE: {low: .nan, high: 1}}}\n",
        "choices of mappings": "OPTUNA: {PARAMS: {EPOCHS: {choices: [{a: 1}]}}}\n",
        "size of 2^31": f"DATA: {{TARGET_VOLUME_SIZE: {HUGE}}}\n",
        "views of 2^31": f"DATA: {{TARGET_DRR_SIZE: {HUGE}}}\n",
        "levels without end": f"MODEL: {{UNET: {{NUM_CHANNELS: [{'8, ' * 99}8]}}}}\n",
        "escape sequences": 'EPOCHS: "\\e[2J\\e[31m"\n',
        "a device of many lines": 'DEVICES: "cuda\\n\\n:0"\nEPOCHS: x\n',
    }
    | {
        f"EPOCHS: {v}": f"EPOCHS: {v}\n"
        for v in (".nan", ".inf", "-1", "0", "1e400", "1:30", "0x10", "[]", "{}", "2.5", "true", "'3'")
    }
    | {f"CUBE_MM: {v}": f"DATA: {{CUBE_MM: {v}}}\n" for v in (".nan", ".inf", "-1", "0", "1e400", "[]")}
)


def lies(good):
    "(kind, what is wrong, bytes) of files that cannot be right."
    for what, text in SETTINGS.items():
        yield "config.yml", what, text if isinstance(text, bytes) else text.encode()
    nan, inf = float("nan"), float("inf")
    for kind in ("a.nii", "AP.nii"):
        whole = (good / kind).read_bytes()
        for what, offset, code, *values in (
            ("dimensions of 32767", 40, "h", 3, 32767, 32767, 32767),
            ("negative dimensions", 40, "h", 3, -16, -16, -16),
            ("no voxels", 40, "h", 3, 0, 0, 0),
            ("99 dimensions", 40, "h", 99),
            ("no dimensions", 40, "h", 0),
            ("-1 dimensions", 40, "h", -1),
            ("7 dimensions", 40, "h", 7, 16, 16, 16, 32767, 32767, 32767, 32767),
            ("2D", 40, "h", 2, 16, 16),
            ("RGB", 70, "h", 128, 24),
            ("complex", 70, "h", 32, 64),
            ("bits", 70, "h", 1, 1),
            ("long double", 70, "h", 1536, 128),
            ("no such type", 70, "h", 9999, 16),
            ("float of 13 bits", 70, "h", 16, 13),
            ("float of no bits", 70, "h", 16, 0),
            ("float of negative bits", 70, "h", 64, -8),
            *((f"spacing {v}", 76, "f", 1, v, v, v) for v in (nan, inf, 0, -20, 1e30, 1e-30)),
            ("one spacing 1e6", 80, "f", 1e6),
            *((f"voxels begin at {v}", 108, "f", v) for v in (nan, inf, -1, 1, 1e9, 1e30)),
            *((f"slope {v}", 112, "f", v) for v in (nan, inf, 0, 1e38, -1)),
            *((f"intercept {v}", 116, "f", v) for v in (nan, inf, 1e38)),
            ("no affine", 252, "h", 0, 0),
            ("rotation NaN", 256, "f", nan, nan, nan),
            ("rotation of 9", 256, "f", 9, 9, 9),
            ("origin NaN", 268, "f", nan, nan, nan),
            ("affine NaN", 252, "h", 0, 1),
            ("size of another header", 0, "i", 540),
            ("size of no header", 0, "i", -1),
            ("magic of a pair", 344, "B", 110, 105, 49, 0),
            ("no magic", 344, "B", 0, 0, 0, 0),
        ):
            data = nifti(whole, offset, code, *values)
            if what == "affine NaN":
                data = nifti(data, 280, "f", *[nan] * 12)
            yield kind, what, data
    block = gzip.compress(bytes(1 << 24), 1)
    gz = gzip.decompress((good / "a.nii.gz").read_bytes())
    for what, data in {
        "a gzip bomb behind the voxels": gzip.compress(gz) + block * 40,
        "a gzip bomb of voxels": gzip.compress(nifti(nifti(gz, 40, "h", 3, 1500, 1500, 1500), 70, "h", 4, 16))
        + block * 400,
        "a bomb as extension": gzip.compress(nifti(gz, 108, "f", 2.0**29)) + block * 40,
        "no gzip": gz,
        "a NIfTI-2 header of 2^31": gzip.compress(
            struct.pack("<i8shh8q", 540, b"n+2\0\r\n\x1a\n", 4, 16, 3, HUGE, HUGE, HUGE, 1, 1, 1, 1) + bytes(2000)
        ),
        "gzip of gzip": gzip.compress((good / "a.nii.gz").read_bytes()),
        "a wrong checksum": (good / "a.nii.gz").read_bytes()[:-8] + bytes(8),
        "two files in one": (good / "a.nii.gz").read_bytes() * 2,
    }.items():
        yield "a.nii.gz", what, data
    nrrd, mha = (good / "a.nrrd").read_bytes(), (good / "a.mha").read_bytes()
    body = nrrd.split(b"\n\n", 1)[1]
    for key, values in {
        b"sizes": (
            b"2147483648 2147483648 2147483648",
            b"-1 -1 -1",
            b"0 0 0",
            b"nan 1 1",
            b"65536 65536 65536",
            b"16 16",
            b"x",
        ),
        b"space directions": (
            b"(nan,0,0) (0,nan,0) (0,0,nan)",
            b"(0,0,0) (0,0,0) (0,0,0)",
            b"(1e30,0,0) (0,1e30,0) (0,0,1e30)",
            b"none none none",
            b"(1,1,1) (1,1,1) (1,1,1)",
        ),
        b"type": (b"block", b"double", b"x"),
        b"encoding": (b"gzip", b"bzip2", b"hex", b"txt", b"x"),
        b"dimension": (b"0", b"99", b"-1", b"2"),
        b"space origin": (b"(nan,nan,nan)", b"(inf,0,0)"),
    }.items():
        for v in values:
            yield "a.nrrd", f"{key.decode()}: {v.decode()}", line(nrrd, key, v)
    for place in (b"/etc/passwd", b"../good/a.nii", b"..", b"\xff", b"LIST", b"%03d.raw 1 99 1"):
        yield "a.nrrd", f"data file: {place!r}", nrrd.split(b"\n\n")[0] + b"\ndata file: " + place + b"\n\n"
    yield (
        "a.nrrd",
        "a gzip bomb",
        line(line(nrrd, b"sizes", b"1024 1024 1024"), b"encoding", b"gzip").replace(body, b"") + block * 20,
    )
    for key, values in {
        b"DimSize": (b"2147483648 2147483648 2147483648", b"-1 -1 -1", b"0 0 0", b"65536 65536 65536", b"x"),
        b"ElementSpacing": tuple(f"{v} {v} {v}".encode() for v in NUMBERS),
        b"NDims": (b"0", b"-1", b"99", b"4"),
        b"ElementType": (b"MET_NONE", b"MET_DOUBLE", b"x"),
        b"ElementDataFile": (b"/etc/passwd", b"../good/a.nii", b"LIST", b"x%03d.raw 1 99 1", b"a\x1b[31m"),
        b"TransformMatrix": (b"nan nan nan nan nan nan nan nan nan", b"0 0 0 0 0 0 0 0 0", b"1"),
        b"BinaryDataByteOrderMSB": (b"True",),
        b"CompressedData": (b"True",),
        b"Offset": (b"nan nan nan", b"1e400 0 0"),
    }.items():
        for v in values:
            yield "a.mha", f"{key.decode()} = {v!r}", line(mha, key, v)
    yield (
        "a.mha",
        "a zlib bomb",
        re.sub(
            rb"(?s)(ElementDataFile = LOCAL\n).*",
            rb"\1",
            line(line(mha, b"DimSize", b"1024 1024 1024"), b"CompressedData", b"True"),
        )
        + zeros(64 << 20),
    )
    for kind in ("dicom/s07.dcm", "AP.dcm"):
        whole = (good / kind).read_bytes()
        for tag, values in (
            ("0028|0010", (0, 1, 65535)),
            ("0028|0011", (0, 65535)),
            ("0028|0100", (0, 1, 12, 64, 65535)),
            ("0028|0101", (0, 65535)),
            ("0028|0102", (65535,)),
            ("0028|0002", (0, 3, 65535)),
            ("0028|0103", (7,)),
        ):
            for v in values:
                yield kind, f"{tag} {v}", dicom(whole, tag, struct.pack("<H", v))
        for tag, n in (("0028|0030", 2), ("0020|0032", 3), ("0020|0037", 6)) if kind != "AP.dcm" else ():
            for v in NUMBERS:
                yield (
                    kind,
                    f"{tag} {v or 'empty'}",
                    dicom(whole, tag, (t := "\\".join([v] * n).encode()) + b" " * (len(t) % 2)),
                )
        first, last = b"\x28\x00\x10\x00\x02\0\0\0", b"\xe0\x7f\x10\x00"
        yield kind, "all sizes 65535", dicom(dicom(whole, "0028|0010", b"\xff\xff"), "0028|0011", b"\xff\xff")
        yield kind, "2^31 - 1 frames", replaced(whole, (first, b"\x28\x00\x08\x00\x0a\0\0\x002147483647" + first))
        for what, size in (
            ("no known length", b"\xff\xff\xff\xff"),
            ("4 GB", b"\xf0\xff\xff\xff"),
            ("no bytes", bytes(4)),
        ):
            yield (
                kind,
                f"pixel data of {what}",
                re.sub(b"(?s)(" + re.escape(last) + b")....", lambda m: m[1] + size, whole),
            )
        yield (
            kind,
            "a sequence within a sequence, a thousand times",
            replaced(
                whole, (first, b"\x08\x00\x15\x11\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 1000 + first)
            ),
        )
        for what, syntax in (
            ("unknown", b"1.2.840.10008.9.9\0"),
            ("JPEG 2000", b"1.2.840.10008.1.2.4.90"),
            ("deflated", b"1.2.840.10008.1.2.1.99"),
        ):
            yield (
                kind,
                f"transfer syntax {what}",
                replaced(whole, (b"UI\x12\x001.2.840.10008.1.2\0", b"UI" + struct.pack("<H", len(syntax)) + syntax)),
            )
        if kind == "AP.dcm":
            for tag in (
                "0028|0030",
                "0018|1164",
                "0018|1110",
                "0018|1111",
                "0018|1114",
                "0028|1050",
                "0028|1051",
                "0028|1053",
            ):
                for v in NUMBERS[:7]:
                    yield (
                        kind,
                        f"{tag} {v}",
                        tagged(
                            good,
                            {"0028|1050": "100", "0028|1051": "90", "0028|0004": "MONOCHROME1"}
                            | {tag: [v, v] if tag in ("0028|0030", "0018|1164") else v},
                        ),
                    )
    flat, bomb = zlib.compress(bytes(81 * 80)), zeros(169 << 20)
    for what, data in {
        "2^31 pixels a side": png(HUGE, HUGE, rows=flat),
        "2^31 - 1 pixels a side": png(HUGE - 1, HUGE - 1, rows=flat),
        "no pixels": png(0, 0, rows=flat),
        "65535 pixels a side": png(65535, 65535, rows=flat),
        "a bomb": png(13000, 13000, rows=bomb),
        "a bomb in colours": png(7500, 7500, colour=2, rows=bomb),
        "a long strip": png(HUGE - 1, 1, rows=flat),
        "a depth of 7": png(80, 80, 7, rows=flat),
        "no such colours": png(80, 80, 8, 9, rows=flat),
        "a palette without one": png(80, 80, 8, 3, rows=flat),
        "a text bomb": png(80, 80, rows=flat, extra=[(b"zTXt", b"a\0\0" + zeros(100 << 20))]),
        "a profile bomb": png(80, 80, rows=flat, extra=[(b"iCCP", b"a\0\0" + zeros(100 << 20))]),
        "rows that are no zlib": png(80, 80, rows=b"x" * 99),
        "a flat picture": png(80, 80, rows=flat),
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 80 80\n(pwned) (w) file closefile\n",
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "a GIF": saved(lambda p: Image.fromarray(np.eye(80, dtype=np.uint8) * 255).save(p, "GIF")),
        "a PDF": b"%PDF-1.7\n",
        "a PPM": b"P5 99999 99999 255\n",
        "a BMP of 2^31": b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, HUGE - 1, HUGE - 1, 1, 24, 0, 0, 0, 0, 0, 0),
        "a DICOM": (good / "AP.dcm").read_bytes(),
    }.items():
        yield "AP.png", what, data
    jpg, tif = (good / "AP.jpg").read_bytes(), (good / "AP.tif").read_bytes()
    for what, size in (("65500 pixels a side", b"\xff\xdc\xff\xdc"), ("no pixels", bytes(4))):
        yield "AP.jpg", what, re.sub(rb"(?s)(\xff\xc0\x00.\x08)....", lambda m: m[1] + size, jpg)
    tag = lambda n, v: re.sub(
        rb"(?s)" + re.escape(struct.pack("<H", n)) + rb"(\x03\x00|\x04\x00)\x01\0\0\0....",
        lambda m: struct.pack("<HHII", n, 4, 1, v),
        tif,
    )
    for n, name in (
        (256, "width"),
        (257, "height"),
        (258, "depth"),
        (259, "compression"),
        (262, "colours"),
        (273, "place of a strip"),
        (277, "samples"),
        (278, "rows a strip"),
        (279, "bytes of a strip"),
    ):
        for v in (0, 65535, HUGE, 2 * HUGE - 1):
            yield "AP.tif", f"{name} {v}", tag(n, v)

    def virtual(f):
        layout = h5py.VirtualLayout((N,) * 3, "i2")
        layout[:] = h5py.VirtualSource(str(good / "a.h5"), "ct", (N,) * 3)
        f.create_virtual_dataset("ct", layout)

    for what, fill in {
        "a cube of 4096 without a value": lambda f: f.create_dataset("ct", (4096,) * 3, "f4"),
        "a cube of 2^31": lambda f: f.create_dataset("ct", (HUGE,) * 3, "u1", chunks=(16,) * 3),
        "a bomb": lambda f: f.create_dataset(
            "ct", data=np.zeros((512,) * 3, np.uint8), chunks=(512, 512, 64), compression="gzip", compression_opts=1
        ),
        "a group": lambda f: f.create_group("ct"),
        "a link to another file": lambda f: f.__setitem__("ct", h5py.ExternalLink(str(good / "a.h5"), "ct")),
        "a link to itself": lambda f: f.__setitem__("ct", h5py.SoftLink("/ct")),
        "a link to nothing": lambda f: f.__setitem__("ct", h5py.SoftLink("/x")),
        "voxels in another file": lambda f: f.create_dataset("ct", (8,) * 3, "u1", external=[("/etc/passwd", 0, 512)]),
        "a virtual cube": virtual,
        "text": lambda f: f.create_dataset("ct", data=[["a"] * 16] * 16),
        "references": lambda f: f.create_dataset("ct", (16,) * 3, h5py.ref_dtype),
        "pairs": lambda f: f.create_dataset("ct", data=np.zeros((16,) * 3, [("a", "i2"), ("b", "f4")])),
        "complex": lambda f: f.create_dataset("ct", data=np.zeros((16,) * 3, complex)),
        "truth values": lambda f: f.create_dataset("ct", data=np.zeros((16,) * 3, bool)),
        "NaN": lambda f: f.create_dataset("ct", data=np.full((16,) * 3, nan)),
        "one number": lambda f: f.create_dataset("ct", data=1.0),
        "nothing": lambda f: f.create_dataset("ct", data=h5py.Empty("f4")),
        "four axes": lambda f: f.create_dataset("ct", (16,) * 4, "i2"),
        "a cube of 0": lambda f: f.create_dataset("ct", (0,) * 3, "i2"),
        "opaque bytes": lambda f: f.create_dataset("ct", data=np.zeros((16,) * 3, "V8")),
    }.items():
        yield "a.h5", what, hdf(fill)
    header = lambda text: b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text
    for what, data in {
        "spacing NaN": npz(spacing_mm=nan),
        "spacing inf": npz(spacing_mm=inf),
        "spacing -1": npz(spacing_mm=-1),
        "spacing 1e30": npz(spacing_mm=1e30),
        "spacing 1e-30": npz(spacing_mm=1e-30),
        "spacing text": npz(spacing_mm="x"),
        "three spacings": npz(spacing_mm=[1, 1, 1]),
        "complex": npz(volumes_hu_zyx=patient()[None] + 0j),
        "text": npz(volumes_hu_zyx=np.full((1, 4, 4, 4), "x")),
        "objects": npz(volumes_hu_zyx=np.full((1, 4, 4, 4), {}, object)),
        "ids of objects": npz(ids=np.array([{}], object)),
        "two ids": npz(ids=["a", "b"]),
        "no ids": npz(ids=[]),
        "no cube": npz(volumes_hu_zyx=patient()),
        "no scans": npz(volumes_hu_zyx=np.zeros((0, 16, 16, 16)), ids=[]),
        "NaN": npz(volumes_hu_zyx=np.full((1, 16, 16, 16), nan)),
        "a zip bomb": deflated(npz(), 300 << 20),
        "compressed": deflated(npz()),
        "another zip": deflated(pt(torch.ones(3))),
        "a .npy": saved(lambda p: np.save(p.with_suffix(".npy"), patient())),
        "a member without its name": npz().replace(b"volumes_hu_zyx.npy", b"volumes_hu_zyx.npx"),
        **{
            f"a member that says {t[:90]!r}": saved(lambda p, t=t: lying(p, header(t)))
            for t in (
                b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2147483648, 2147483648, 2147483648)}\n",
                b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, -4, -4, -4)}\n",
                b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1024, 1024, 1024)}\n",
                b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n",
                b"__import__('os').mkdir('pwned')\n",
                b"{" * 9999 + b"\n",
                b"\xff\n",
            )
        },
    }.items():
        yield "a.npz", what, data
    v = torch.rand(N, N, N)
    for what, data in {
        "a stride of 0": pt(torch.zeros(1).expand(N, N, N)),
        "2^33 values of one": pt(torch.zeros(1).expand(2048, 2048, 2048)),
        "2^60 values of one": pt(torch.zeros(1).expand(1 << 20, 1 << 20, 1 << 20)),
        "sparse": pt(v.to_sparse()),
        "rows compressed": pt(v[0].to_sparse_csr()),
        "no values at all": pt(torch.empty(N, N, N, device="meta")),
        "eight bits": pt(v.to(torch.float8_e4m3fn)),
        "whole numbers": pt(v.int()),
        "truth values": pt(v > 0.5),
        "complex": pt(v + 0j),
        "double": pt(v.double()),
        "bfloat16": pt(v.bfloat16()),
        "a parameter": pt(torch.nn.Parameter(v)),
        "a list": pt([v]),
        "a mapping": pt({"a": v}),
        "a number": pt(3.0),
        "text": pt("x"),
        "a turned cube": pt(v.mT),
        "part of a larger one": pt(torch.rand(N, N, 2 * N)[:, :, ::2]),
        "no axes": pt(torch.tensor(1.0)),
        "empty": pt(torch.zeros(0, 0, 0)),
        "NaN": pt(v * nan),
        "the old format": pt(v, _use_new_zipfile_serialization=False),
        "compressed": deflated(pt(v)),
        "a zip bomb": deflated(pt(v), 300 << 20),
        "another zip": npz(),
        "a program": saved(lambda p: torch.jit.save(torch.jit.script(torch.nn.ReLU()), p)),
        "a storage of 2^40": pt(v, _use_new_zipfile_serialization=False).replace(
            struct.pack("<H", v.numel()), b"\xff\xff"
        ),
        "quantised": pt(torch.quantize_per_tensor(v, 0.1, 0, torch.quint8)),
    }.items():
        yield "data/volumes/p1.pt", what, data
        yield "model/training_000020.pt", what, data
    for what, data in {
        "NaN": pt(v[0] * nan),
        "three axes": pt(v),
        "2^62 values of one": pt(torch.zeros(1).expand(HUGE, HUGE)),
        "sparse": pt(v[0].to_sparse()),
    }.items():
        yield "data/drrs/p1/AP.pt", what, data
        yield "AP.pt", what, data
    for key, values in {
        "format": (2, "1", None),
        "geometry": (
            None,
            [],
            "parallel",
            {"kind": "parallel"},
            {"kind": "x", "sad_mm": 0, "sdd_mm": 0, "panel_mm": 1},
        ),
        "geometry.panel_mm": (nan, inf, -1, 0, "x", 1e400),
        "geometry.kind": ("cone", 7, None),
        "geometry.sad_mm": (nan, None, "0"),
        "geometry.more": (1,),
        "size": (0, -16, 2**31, "16", 16.5, nan, None, [16]),
        "mm": (nan, inf, 0, -20, "x", None),
        "pixels": (0, 2**31, None),
        "hu_window": ([], [nan, 1], [1500, -1024], 7, None, [0, 1, 2]),
        "cases": (None, [], [1], {"p1": 7}, "p1"),
        "view_domain": (None, 7, "x"),
    }.items():
        for value in values:
            yield (
                "data/drrs/manifest.json",
                f"{key} = {value}",
                json.dumps(put(key, value)(json.loads((good / "data/drrs/manifest.json").read_text()))).encode(),
            )
    for what, text in {
        "a list": b"[]",
        "a number": b"1",
        "null": b"null",
        "nothing": b"",
        "nested lists": b"[" * 100000,
        "nested mappings": b'{"a":' * 100000,
        "an int of 5000 digits": b'{"format": ' + b"9" * 5000 + b"}",
        "UTF-16": "{}".encode("utf-16"),
        "NUL": b"\0\0",
    }.items():
        yield "data/drrs/manifest.json", what, text
    for key, values in {
        "format": (None, 1, 4, 9, "3", [3]),
        "config": (None, [], {"A": 1}),
        "config.DATA.TARGET_VOLUME_SIZE": (8, 24, 1024, 2**31, -8, "x"),
        "config.DATA.TARGET_DRR_SIZE": (4096, 2**31, 17),
        "config.MODEL.UNET.NUM_CHANNELS": ([], [8], [8] * 999, [2**40, 8], [8, 16]),
        "config.MODEL.UNET.NUM_RES_BLOCKS": (10**9, 16),
        "config.MODEL.SCALE": (100, nan, 0),
        "config.MODEL.CONDITIONING_ENCODER.OUTPUT_DIM": (2**40,),
        "config.DIFFUSION.STEPS": ("x",),
        "config.TRAINING.COARSE_EPOCHS": ([1, 1, 1, 1, 1, 1],),
        "geometry": (None, {}, {"kind": "parallel"}),
        "geometry.panel_mm": (nan, 0, "x"),
        "geometry.more": (1,),
        "mm": (None, nan, -1, "x", inf),
        "line_integrals": (None, "perhaps"),
    }.items():
        for value in values:
            yield "model/model_000020.safetensors", f"{key} = {str(value)[:40]}", described(good, put(key, value))
    for what, text in {
        "a list": "[]",
        "null": "null",
        "no JSON": "x",
        "nested lists": "[" * 100000,
        "nothing": "",
    }.items():
        yield "model/model_000020.safetensors", f"described by {what}", described(good, lambda meta: text)
    whole = (good / "model/model_000020.safetensors").read_bytes()
    n = struct.unpack("<Q", whole[:8])[0]
    for what, data in {
        "a header of 2^63 bytes": struct.pack("<Q", 2**63) + whole[8:],
        "a header of no bytes": bytes(8) + whole[8:],
        "a tensor of 2^62": re.sub(rb'"shape":\[8\]', b'"shape":[9]', whole, count=1),
        "no such type": whole.replace(b'"F32"', b'"X32"', 1),
        "no description": struct.pack("<Q", 2) + b"{}",
        "a pickle": pickle.dumps({}),
        "a zip": pt(v),
    }.items():
        yield "model/model_000020.safetensors", what, data


def lying(path, data):
    "An .npz whose volumes are these bytes."
    with zipfile.ZipFile(io.BytesIO(npz())) as old, zipfile.ZipFile(path, "w") as new:
        for i in old.infolist():
            new.writestr(i.filename, data if i.filename.startswith("volumes") else old.read(i))


@pytest.fixture(scope="module")
def lie(good):
    return list(lies(good))


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_files_that_lie(trial, lie, kind):
    none(trial(kind, what, data) for k, what, data in lie if k == kind)


# names

NAMES = [
    "a b",
    "it's",
    'say "x"',
    "new\nline",
    "tab\there",
    "back\\slash",
    "ünïcode",
    "胸部",
    "рентген",
    "صدر",
    "\U0001f480",
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned",
    "-rf",
    "--out",
    "%s%n",
    "{x}",
    "con",
    "NUL",
    "aux",
    "..",
    "...",
    "_",
    "~",
    "*",
    "?",
    "[!.]",
    "#",
    "&",
    "a" * 200,
    "1.2.840.113619.2.55.3.604688119",
    "\x1b[31mred",
    "\u202ereversed",
    "\udcff\udcfe",
]


@slow
@pytest.mark.parametrize("name", NAMES)
def test_names(reader, good, name):
    """A scan, a folder of slices and an image whose name is a trap are read, unless it is no text, and what is
    written lies in the output folder under a plain name."""
    at = reader.at / "names"
    shutil.rmtree(at, ignore_errors=True)
    (at / "x" / f"{name}.d").mkdir(parents=True)
    scan, folder, view = at / f"{name}.nii.gz", at / "x" / f"{name}.d", at / f"{name}.png"
    shutil.copy(good / "a.nii.gz", scan)
    shutil.copy(good / "AP.png", view)
    shutil.copytree(good / "dicom", folder, dirs_exist_ok=True)
    out = ["--out", reader.out, "--size", N]
    for kind, _path, *argv in (
        ("scan", scan, "prepare", scan, *out),
        ("folder", folder, "prepare", folder, *out),
        (
            "image",
            view,
            "reconstruct",
            view,
            good / "LAT.png",
            "--checkpoint_dir",
            good / "model",
            "--out",
            reader.out / "c.nii.gz",
            "--method",
            "mean",
        ),
    ):
        wrong, text = (
            reader.judge(f"name of a {kind}", repr(name)[:90], argv[0], argv[1:]),
            not re.search("[\udc80-\udcff]", name),
        )
        assert wrong is None and reader.rows[-1][2] == ("read" if text else "refused"), (wrong, reader.rows[-1])
        assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,80}", p.name) for p in reader.out.rglob("*")), list(
            reader.out.rglob("*")
        )
    scan.write_bytes(b"x")
    view.write_bytes(b"x")
    for kind, _path, *argv in (
        ("scan", scan, "prepare", scan, *out),
        (
            "image",
            view,
            "reconstruct",
            view,
            good / "LAT.png",
            "--checkpoint_dir",
            good / "model",
            "--out",
            reader.out / "c.nii.gz",
        ),
    ):
        assert (
            reader.judge(f"name of a bad {kind}", repr(name)[:90], argv[0], argv[1:]) is None
            and reader.rows[-1][2] == "refused"
        ), reader.rows[-1]


IDS = [
    "../x",
    "../../../../tmp/x",
    "/etc/passwd",
    "..",
    ".",
    "",
    "\0",
    "a\0b",
    "a/b",
    "a\\b",
    "C:\\x",
    "con",
    "p\n1",
    "x" * 9999,
    "ünï",
    "胸部",
    "~root",
    "$HOME",
    "volumes",
    ".hidden",
    "\x1b[2J",
]


@slow
@pytest.mark.parametrize("name", IDS)
def test_ids_of_a_packed_array(reader, good, name):
    path = reader.at / "names" / "ids.npz"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(npz(ids=[name]))
    assert (
        reader.judge("id in a packed array", repr(name)[:90], "prepare", [path, "--out", reader.out]) is None
        and reader.rows[-1][2] == "read"
    ), reader.rows[-1]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,80}", p.name) for p in reader.out.rglob("*")), list(
        reader.out.rglob("*")
    )


@pytest.mark.parametrize(
    "name", ["../x", "/tmp/x", "..", ".", "", "a/b", "a b", "a\nb", "-x", "'", "\x1b[31m", "a\\b", ".hidden", "$(id)"]
)
def test_study_names(reader, name):
    wrong = reader.judge("study name", repr(name), "train", [f"--study_name={name}", "--set", "DATA.PHANTOMS=2"])
    assert wrong is None and reader.rows[-1][2] == "refused", (wrong, reader.rows[-1])


@slow
def test_links_and_devices(reader, good):
    """Links out of the folder are read or refused like files; a pipe or a device is never waited for; a link in the
    output folder is replaced, not followed."""
    at, wrongs = reader.at / "links", []
    (at / "in").mkdir(parents=True)
    precious = at / "precious.pt"
    precious.write_text("mine")
    out = ["--out", reader.out, "--size", N]

    def ask(what, *argv):
        wrongs.append(reader.judge("links and devices", what, *argv))

    for suffix in (".nii", ".nii.gz", ".nrrd", ".mha", ".h5", ".npz", ".png", ".pt", ".yml"):
        link = at / f"in/link{suffix}"
        for target in ("/etc/passwd", "/dev/zero", "/dev/null", str(link), "/proc/self/mem", "pipe"):
            link.unlink(missing_ok=True)
            os.mkfifo(link) if target == "pipe" else link.symlink_to(target)
            name, *argv = {
                ".png": (
                    "reconstruct",
                    link,
                    good / "LAT.png",
                    "--checkpoint_dir",
                    good / "model",
                    "--out",
                    reader.out / "c.nii.gz",
                ),
                ".pt": (
                    "visualize",
                    "--checkpoint_dir",
                    good / "model",
                    "--ap",
                    link,
                    "--lat",
                    good / "LAT.pt",
                    "--out",
                    reader.out,
                ),
                ".yml": ("train", "--config", link, "--explain", "EPOCHS"),
            }.get(suffix, ("prepare", link, *out))
            if target != "pipe" or suffix != ".yml":
                ask(f"{suffix} is {target if target != str(link) else 'a link to itself'}", name, argv)
        link.unlink()
    (at / "in/up").symlink_to(at)
    (at / "in/s.dcm").symlink_to("/dev/zero")
    os.mkfifo(at / "in/t.dcm")
    ask("a folder with a link to its parent, a device and a pipe", "prepare", [at / "in", *out])
    shutil.copy(good / "a.nii", at / "a.nii")
    code, said, err = reader("prepare", [at / "a.nii", "--out", at / "out", "--size", N])
    (at / "out/volumes/a.pt").unlink()
    (at / "out/volumes/a.pt").symlink_to(precious)
    code, said, err = reader("prepare", [at / "a.nii", "--out", at / "out", "--overwrite"])
    assert code == 0 and precious.read_text() == "mine" and not (at / "out/volumes/a.pt").is_symlink(), err
    none(wrongs)


# code


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def evils(path):
    "A pickle that makes a folder, in every wrapping that some loader would open."
    array = np.empty(1, object)
    array[0] = Evil(path)
    return {
        "pickle": pickle.dumps(Evil(path), protocol=2),
        "pickle of today": pickle.dumps(Evil(path)),
        "pickle as text": pickle.dumps(Evil(path), protocol=0),
        ".pt": pt({"step": Evil(path), "a": torch.ones(2)}),
        "old .pt": pt([Evil(path)], _use_new_zipfile_serialization=False),
        ".npz": npz(volumes_hu_zyx=array),
        ".npy": saved(lambda p: np.save(p.with_suffix(".npy"), array, allow_pickle=True)),
        "YAML": f"EPOCHS: !!python/object/apply:os.mkdir [{path}]\n".encode(),
        "JSON": json.dumps({"py/reduce": [{"py/function": "os.mkdir"}, {"py/tuple": [str(path)]}]}).encode(),
    }


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_is_never_opened(reader, trial, kind):
    pwned = reader.at / "pwned"
    for what, data in evils(pwned).items():
        assert trial(kind, f"code: {what}", data) is None and reader.rows[-1][2] == "refused", reader.rows[-1]
        assert not pwned.exists()


@slow
def test_what_is_kept_beside_a_model_is_never_opened(reader, good):
    "doubt.json, from which intervals are calibrated: damaged, it counts as absent, and the report states it."
    at, pwned, out = reader.at / "kept", reader.at / "pwned", reader.out / "c.nii.gz"
    shutil.copytree(good / "model", at)
    (at / CHECKSUM_FILE).unlink()
    for what, data in (
        evils(pwned)
        | {"nested lists": b"[" * 100000, "numbers for text": b'{"factors": 7}', "nothing": b"", "a list": b"[]"}
    ).items():
        (at / CALIBRATION_FILE).write_bytes(data)
        assert (
            reader.judge(
                CALIBRATION_FILE,
                f"code: {what}",
                "reconstruct",
                [
                    good / "AP.png",
                    good / "LAT.png",
                    "--checkpoint_dir",
                    at,
                    "--out",
                    out,
                    "--method",
                    "mean",
                    "--samples",
                    "2",
                    "--steps",
                    "1",
                ],
                data,
            )
            is None
            and reader.rows[-1][2] == "read"
        )
        assert not pwned.exists() and any("damaged" in p.read_text() for p in reader.out.glob("*.json"))


def test_the_pickle_would_have_worked(tmp_path):
    pickle.loads(evils(tmp_path / "pwned")["pickle"])
    assert (tmp_path / "pwned").is_dir()


PLACES = ["study", "journal", "user attribute", "system attribute", "distribution", "id", "checksums", "image"]


@pytest.mark.parametrize("place", [p if p == "study" else pytest.param(p, marks=pytest.mark.slow) for p in PLACES])
def test_a_pickle_in_a_study_is_never_opened(reader, good, place):
    "The study, its contents, and the files next to it."
    import optuna

    here, pwned = reader.at / "here", reader.at / "pwned"
    evil = evils(pwned)["pickle as text"]
    sets = [
        f"DATA.PT_DATA_DIR={good}/data/volumes",
        f"DATA.DRR_DIR={good}/data/drrs",
        "OPTUNA.N_TRIALS=1",
        "EPOCHS=1",
        "OPTUNA.PARAMS={EPOCHS: {choices: [1]}}",
        *SETS,
    ]
    url = f"sqlite:///{here}/s.db" if place != "journal" else None
    if url:
        study = optuna.create_study(storage=url, study_name="s", direction="maximize")
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.PRUNED,
                params={"EPOCHS": "1"},
                distributions={"EPOCHS": optuna.distributions.CategoricalDistribution(["1"])},
                user_attrs={"folder": "x"},
                system_attrs={"x": 1},
            )
        )
        del study
        table = {
            "user attribute": ("trial_user_attributes", "value_json"),
            "system attribute": ("trial_system_attributes", "value_json"),
            "distribution": ("trial_params", "distribution_json"),
        }.get(place)
        if table:
            with sqlite3.connect(here / "s.db") as db:
                assert db.execute(f"update {table[0]} set {table[1]} = ?", (evil.decode("latin-1"),)).rowcount
    else:
        sets.append("OPTUNA.STORAGE=journal:s.log")
    folder = here / "checkpoints/s"
    folder.mkdir(parents=True)
    path = {
        "study": here / "s.db",
        "journal": here / "s.log",
        "id": folder / "id",
        "checksums": folder / "trial_0" / CHECKSUM_FILE,
        "image": folder / "history.png",
    }.get(place)
    if path:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(evils(pwned)["pickle"])
    code, out, err = reader("train", ["--study_name", "s", *(x for s in sets for x in ("--set", s))])
    reader.rows.append(
        (
            "code in a study",
            place,
            "refused" if code == 2 else "read" if code == 0 else "wrong",
            err.strip().replace(f"{reader.at}/", ""),
        )
    )
    for p in here.iterdir():
        shutil.rmtree(p) if p.is_dir() else p.unlink()
    assert code in (0, 2) and "Traceback" not in err and not pwned.exists(), (code, err)


def test_no_loader_that_runs_code():
    "Every call of a loader in the package forbids code in the file."
    text = {p.name: p.read_text() for p in (ROOT / "diffx2ct").glob("*.py")}
    found = [
        (name, m[0])
        for name, t in text.items()
        for m in re.finditer(
            r"\b(torch\.load|np\.load|yaml\.\w*load\w*)\(.*|\b(import|from) "
            r"(pickle|dill|joblib|cloudpickle|shelve|marshal)\b",
            t,
        )
    ]
    assert len(found) > 3
    for name, call in found:
        assert (
            "weights_only=True" in call
            or "allow_pickle=False" in call
            or call.startswith("yaml.load(")
            and ", YamlLoader)" in call
        ), (name, call)


# checkpoints


@slow
def test_any_flipped_byte_of_a_checkpoint_is_noticed(good, tmp_path, capsys):
    """200 bytes drawn at random in all files of a folder, the checksums among them: named, and where there is a pair
    before it, that one is used."""
    net, c = network()

    def flipped(folder, name):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "copy")
        data = bytearray((tmp_path / "copy" / name).read_bytes())
        data[rng.integers(len(data))] ^= rng.integers(1, 256)
        (tmp_path / "copy" / name).write_bytes(data)
        return tmp_path / "copy"

    rng, files = np.random.default_rng(0), sorted(p.name for p in (good / "model").iterdir() if p.is_file())
    assert len(files) == 3
    for k in range(200):
        with pytest.raises(UserError, match="is damaged"):
            load_training(flipped(good / "model", files[k % 3]), net, net)
    for step in (10, 20):
        save_checkpoint(tmp_path / "two", step, net, net, dict(history=[step]), describe(net, c, step=step))
    for name in files:
        if name == CHECKSUM_FILE:
            continue
        copy = flipped(tmp_path / "two", name)
        assert load_training(copy, net, net)["step"] == 10 and f"{name} is damaged" in capsys.readouterr().err
        assert load_model(copy).path.name == (
            "model_000010.safetensors" if name.startswith("model") else "model_000020.safetensors"
        )


@slow
def test_through_the_command_itself(reader, good, tmp_path):
    "Some of the above as a user meets it: a process of its own."
    bad = dict(
        [
            ("prepare.nii.gz", gzip.compress(gzip.decompress((good / "a.nii.gz").read_bytes())[:2000])),
            ("b\nc.nii", b"x"),
            ("d.h5", b"\x89HDF\r\n\x1a\n" + bytes(99)),
            ("e.npz", npz(spacing_mm=float("nan"))),
            ("f.yml", LAUGHS.encode() + b"EPOCHS: *i\n"),
            ("g.yml", b"EPOCHS: !!python/object/apply:os.mkdir [pwned]\n"),
            ("h.png", png(13000, 13000, rows=zeros(169 << 20))),
        ]
    )
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
        p = run_cmd(
            {
                "yml": ["diffx2ct_train", "--config", name],
                "png": [
                    "diffx2ct_reconstruct",
                    name,
                    good / "LAT.png",
                    "--checkpoint_dir",
                    good / "model",
                    "--out",
                    "out/c.nii.gz",
                ],
            }.get(name[-3:], ["diffx2ct_prepare", name, "--out", "out"]),
            cwd=tmp_path,
        )
        assert p.returncode == 2 and p.stderr.startswith("diffx2ct: ") and p.stderr.count("\n") == 1 and not p.stdout, (
            name,
            p.stdout,
            p.stderr,
        )
        assert {x.name for x in tmp_path.iterdir()} <= set(bad)
