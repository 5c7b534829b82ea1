"""Calibration of the uncertainty, planted lesions, perturbed views and organ measures of one model.

run.py --checkpoint_dir checkpoints/trial_0                 all missing rows, the most important first; then tables
run.py --checkpoint_dir checkpoints/trial_0 --figure bar    one figure: calibration, bar, lesions, trust or reader
run.py --checkpoint_dir checkpoints/real --data data/test   cases of a folder of diffx2ct_prepare
run.py --checkpoint_dir checkpoints/trial_0 --minutes 30    stop after a time; run the same command to resume
run.py --checkpoint_dir checkpoints/trial_0 --list          list finished and missing rows

The cases are the held-out cases of the checkpoint. Labels of phantoms are exact; labels of real CT come from
thresholds, without heart and liver. Each row is one case and one question; its results are saved when it is finished.
Everything that is fitted is fitted on every other case and tested on the rest, and then the other way round. One
thread, one seed; samples are stored in --work."""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from diffx2ct.augment import insert_lesion, lesion_shape
from diffx2ct.basics import UserError, command, load_tensor, save_tensor, write_atomic
from diffx2ct.checkpoint import file_digest, load_model
from diffx2ct.data import density, show_mpr, to_hu
from diffx2ct.diffusion import AMP
from diffx2ct.drr import coverage
from diffx2ct.evaluate import open_cases, trained_on
from diffx2ct.lesions import (
    auc,
    lesion_centres,
    lesion_metrics,
    lesion_region,
    lesion_template,
    organ_labels,
    organ_metrics,
    outside_beams,
)
from diffx2ct.phantom import phantom
from diffx2ct.reconstruct import draw_samples, finalize, reconstruct
from diffx2ct.uncertainty import (
    CONFIDENCE_LEVELS,
    SCORES,
    TISSUES,
    VOXEL_CLASSES,
    conformal_factors,
    ensemble_statistics,
    gaussian_factors,
    interval_coverage,
    ood_report,
    ood_scores,
    perturbation_tests,
    plot_reliability,
    score_limits,
    voxel_classes,
    z_score,
)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import command_line, save

DIAMETERS = (32, 24, 16, 10, 6)  # mm
# lesions: site, density in HU, spikes
LESIONS = {
    "lung, solid": ("lung", 40, 0),
    "lung, spiculated": ("lung", 40, 12),
    "retrocardiac": ("retrocardiac", 40, 0),
    "mediastinum, calcified": ("mediastinum", 400, 0),
    "chest wall, calcified": ("chest wall", 400, 0),
    "lung, ground glass": ("lung", -500, 0),
    "in no beam": ("unseen", 400, 0),
}
CHEAP = ("consistent_mean", "expected", "expected (off)")  # for every lesion
DRAWN = ("sample", "mean_of_k")  # for solid lesions in lung only, since they take most time
BAR = {24: 0.8, 32: 0.9}  # mm: smallest acceptable AUC of solid nodules in lung
OBSERVERS = {
    "auc": "the filter",
    "auc_known": "the mean patient subtracted",
    "auc_own": "the method's mean subtracted",
}
OTHERS = 7  # patients whose reconstructions give the mean of a method
FINE = [i / 20 for i in range(1, 20)]
FIGURES = {
    "calibration": ("calibration",),
    "bar": tuple(f"lesion · lung, solid · {d} mm" for d in BAR),
    "lesions": ("lesion",),
    "trust": ("calibration", "lies"),
    "reader": ("reader",),
}  # name: beginning of its rows


class Bench:
    "A model, its cases and cached results."

    def __init__(self, a: argparse.Namespace):
        self.a, self.model = a, load_model(a.checkpoint_dir)
        self.net, self.c = self.model.denoiser, self.model.config.DIFFUSION
        if not self.net.line_integrals:
            raise UserError(
                "this benchmark renders views with and without a lesion and needs a model of line integrals"
            )
        pairs = open_cases(self.model, a.data)
        self.cases, self.phantoms = (
            {case.name: case for case in (pairs[i] for i in range(len(pairs)))},
            not (a.data or self.model.config.DATA.PT_DATA_DIR),
        )
        if len(self.cases) < 2:
            raise UserError(
                "this benchmark needs two held-out cases or more; name a folder of prepared cases with --data"
            )
        if a.data and (learnt := trained_on(list(self.cases), self.model)):
            print(
                f"diffx2ct: warning: the model was trained on {len(learnt)} of these {len(self.cases)} "
                f"patients ({', '.join(learnt[:4])}); the results are not valid",
                file=sys.stderr,
            )
        self.size, self.mm, self.window, self.A = self.net.A.size, self.net.A.mm, self.net.window, self.net.A
        self.digest = file_digest(self.model.path)
        self.work, self.how = (
            a.work / f"{a.name}_{self.digest[:8]}",
            dict(patch=self.model.config.TRAINING.PATCH_SIZE, amp=AMP[self.model.config.TRAINING.AMP]),
        )
        self.seen, self.known = coverage(self.A.geometry, self.size, self.mm)[0], {}

    def look(self, x: Tensor) -> Tensor:
        return self.A(density(x[None], self.window))[0]

    def labels(self, name: str) -> Tensor:
        return self.remember(
            ("labels", name),
            lambda: (
                phantom(int(name.removeprefix("phantom")), self.size, self.mm)[1]
                if self.phantoms
                else organ_labels(self.cases[name].volume, self.window)
            ),
        )

    def remember(self, key, make):
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    def ensemble(self, name: str) -> Tensor:
        "Draw the K samples of a case, or read them from the work folder."
        path = self.work / f"{name}_{self.a.k}_{self.a.seed}.pt"
        if not path.exists():
            save_tensor(
                draw_samples(
                    self.net, self.cases[name].views, [self.a.seed + i for i in range(self.a.k)], self.c, **self.how
                ).half(),
                path,
            )
        return load_tensor(path, 5).float()

    def make(self, views: Tensor, method: str) -> Tensor:
        "Reconstruct with a method without samples."
        off = method.endswith("(off)")
        return reconstruct(
            self.net,
            views,
            method.removesuffix(" (off)"),
            self.c.model_copy(update=dict(CONSISTENCY="off")) if off else self.c,
            **self.how,
        ).float()

    def drawn(self, many: Tensor, views: Tensor) -> dict[str, Tensor]:
        "One sample, and the mean of all samples."
        return {
            "sample": many[0],
            "mean_of_k": finalize(self.net, many.mean(0, keepdim=True), views[None], self.c.CONSISTENCY)[0],
        }

    def healthy(self, name: str, method: str) -> Tensor:
        case = self.cases[name]
        make = lambda: (
            self.drawn(self.ensemble(name)[: self.a.mean_of], case.views)[method]
            if method in DRAWN
            else self.make(case.views, method)
        )
        return self.remember((name, method), make)

    def others(self, name: str) -> list[str]:
        "Choose other patients."
        names = list(self.cases)
        return (names[names.index(name) + 1 :] + names[: names.index(name)])[:OTHERS]

    def mask(self, name: str, where: str) -> Tensor:
        return (
            outside_beams(self.labels(name), self.seen[0])
            if where == "unseen"
            else lesion_region(self.labels(name), where)
        )


def calibration(b: Bench, name: str) -> dict:
    "Draw samples of a case and compute its scores; the tables compute the z scores from the samples."
    case, many = b.cases[name], b.ensemble(name)
    return dict(
        signs=ood_scores(b.net, case.views, many[:2], b.c, **b.how),
        rmse_hu=((many.mean(0) - case.volume).square().mean().sqrt() * (b.window[1] - b.window[0])).item(),
        spread_hu=(many.std(0).square().mean().sqrt() * (b.window[1] - b.window[0])).item(),
    )


def lesion(b: Bench, name: str, kind: str, diameter: int, n: int, methods: tuple[str, ...]) -> dict:
    "Plant a lesion, render, reconstruct and measure; the same without the lesion."
    where, hu, spikes = LESIONS[kind]
    case = b.cases[name]
    found = lesion_centres(
        b.mask(name, where), diameter, b.mm, n + 1, seed=b.a.seed + 1000 * diameter + sorted(b.cases).index(name)
    )
    if len(found) <= n:
        return dict(room=False)
    at = found[n]
    ill = insert_lesion(case.volume, lesion_shape(b.size, b.mm, at, diameter, spikes, seed=n), hu, b.window)
    views, here = b.look(ill), lesion_template(b.size, b.mm, at, diameter)
    after = {m: b.make(views, m) for m in methods if m not in DRAWN}
    if DRAWN[0] in methods:
        after |= b.drawn(
            draw_samples(b.net, views, [b.a.seed + i for i in range(b.a.mean_of)], b.c, **b.how).float(), views
        )
    at_spot = lambda x: (here * to_hu(x[0], b.window)).sum().item()
    usual = lambda of: statistics.mean(at_spot(of(o)) for o in b.others(name))
    judged = {
        m: lesion_metrics(x, b.healthy(name, m), ill, case.volume, at, diameter, b.mm, b.window)
        | dict(empty=at_spot(b.healthy(name, m)), own=usual(lambda o: b.healthy(o, m)))
        for m, x in after.items()
    }
    change = views - case.views
    return dict(
        room=True,
        at=list(at),
        view_mm=change.abs().max().item(),
        view_relative=(change.norm() / case.views.norm()).item(),
        usual=at_spot(b.net.mean[0]),
        truth=dict(response=at_spot(ill), empty=at_spot(case.volume), own=usual(lambda o: b.cases[o].volume)),
        methods=judged,
    )


def lies(b: Bench, name: str) -> dict:
    "Compute the scores of perturbed views."
    case, other = b.cases[name], b.cases[b.others(name)[0]]
    return {
        what: ood_scores(b.net, y, draw_samples(b.net, y, [b.a.seed, b.a.seed + 1], b.c, **b.how), b.c, **b.how)
        for what, y in perturbation_tests(case.volume, other.views, b.A, b.window).items()
        if what != "true"
    }


def reader(b: Bench, name: str) -> dict:
    "Compare organ measures with the truth."
    return {
        m: organ_metrics(b.healthy(name, m), b.cases[name].volume, b.labels(name), b.mm, b.window)
        for m in (*CHEAP, *DRAWN)
    }


def rows(b: Bench) -> dict[str, tuple]:
    "List all rows, the most important first: name -> function and arguments."
    names, out = list(b.cases), {}
    add = lambda kind, n, diameters: out.update(
        {
            f"lesion · {kind} · {d} mm · {n} · {name}": (
                lesion,
                name,
                kind,
                d,
                n,
                CHEAP + DRAWN if kind == "lung, solid" else CHEAP,
            )
            for d in diameters
            for name in names
        }
    )
    soft = ("retrocardiac", "mediastinum, calcified", "chest wall, calcified")
    add("lung, solid", 0, BAR)
    out |= {f"calibration · {name}": (calibration, name) for name in names} | {
        f"reader · {name}": (reader, name) for name in names
    }
    for n in range(1, b.a.plants):
        add("lung, solid", n, BAR)
    out |= {f"lies · {name}": (lies, name) for name in names[:3]}
    for kind in soft:
        add(kind, 0, (32, 16))
    add("lung, solid", 0, DIAMETERS)
    add("lung, spiculated", 0, DIAMETERS[:3])
    add("lung, ground glass", 0, DIAMETERS[:2])
    if (b.seen == 0).any():
        add("in no beam", 0, (32, 16))
    out |= {f"lies · {name}": (lies, name) for name in names[3:]}
    for kind in soft:
        add(kind, 0, (24, 10, 6))
    for n in range(1, b.a.plants):
        for kind in LESIONS:
            add(kind, n, DIAMETERS) if kind != "in no beam" else None
    return out


def calibrated(b: Bench, done: dict) -> dict:
    "Compute the shares inside the intervals with and without calibration; of two folds the worse one."
    names = [n for n in b.cases if f"calibration · {n}" in done]
    if len(names) < 4:
        return {}
    seen, data = b.seen, {}
    for n in names:
        m, s, _ = ensemble_statistics(b.ensemble(n))
        data[n] = z_score(b.cases[n].volume, m, s, b.window).flatten(), voxel_classes(m, seen, b.window).flatten()
    cat = lambda ns: [torch.cat([data[n][i] for n in ns]) for i in (0, 1)]
    parts, per = {}, {}
    for ways, levels in (("levels", CONFIDENCE_LEVELS), ("fine", FINE)):
        for fold in (0, 1):
            fit, test = cat(names[fold::2]), cat(names[1 - fold :: 2])
            for how, q in (("before", gaussian_factors(levels)), ("after", conformal_factors(*fit, levels))):
                covered = test[1] < len(TISSUES)
                groups = {
                    "all voxels": test[1] >= 0,
                    "body": test[1] % len(TISSUES) > 0,
                    "in the beams": covered,
                    "in no beam": ~covered,
                } | {k: test[1] == i for i, k in enumerate(VOXEL_CLASSES)}
                for g, mask in groups.items():
                    if mask.sum() < 100:
                        continue
                    parts.setdefault(ways, {}).setdefault(g, {}).setdefault(how, []).append(
                        interval_coverage(test[0][mask], test[1][mask], q)
                    )
                if ways == "levels" and how == "after":
                    for n in names[1 - fold :: 2]:
                        per[n] = interval_coverage(*[v[data[n][1] % len(TISSUES) > 0] for v in data[n]], q)
    farther = lambda folds, levels: [
        max(v, key=lambda x: abs(x - p)) for p, v in zip(levels, zip(*folds))
    ]  # the mean of two folds is right by symmetry
    worse = {
        w: {
            g: {h: farther(folds, CONFIDENCE_LEVELS if w == "levels" else FINE) for h, folds in hs.items()}
            for g, hs in gs.items()
        }
        for w, gs in parts.items()
    }
    q = conformal_factors(*cat(names))
    return worse | dict(
        cases=len(names),
        k=b.a.k,
        factors={k: q[i].tolist() for i, k in enumerate(VOXEL_CLASSES) if (cat(names)[1] == i).any()},
        body_of_each_case=per,
        spread_hu=statistics.mean(done[f"calibration · {n}"]["spread_hu"] for n in names),
        rmse_hu=statistics.mean(done[f"calibration · {n}"]["rmse_hu"] for n in names),
    )


def detected(done: dict) -> dict:
    "Collect results: kind -> diameter -> method -> results over all lesions."
    out = {}
    for key, r in done.items():
        if not key.startswith("lesion") or not r["room"]:
            continue
        kind, d = key.split(" · ")[1:3]
        into = out.setdefault(kind, {}).setdefault(int(d.removesuffix(" mm")), {})
        for m, v in (r["methods"] | {"truth": r["truth"]}).items():
            into.setdefault(m, []).append(v | dict(view_mm=r["view_mm"], usual=r["usual"]))
    seen_by = lambda v, less: list(
        auc([p["response"] - p.get(less, 0) for p in v], [p["empty"] - p.get(less, 0) for p in v])
    )
    figures = lambda v: (
        dict(
            plants=len(v),
            auc=seen_by(v, ""),
            auc_known=seen_by(v, "usual"),
            auc_own=seen_by(v, "own"),
            view_mm=statistics.median(p["view_mm"] for p in v),
        )
        | (
            {k: statistics.mean(p[k] for p in v) for k in ("contrast", "off_d", "off_h", "off_w", "ghosts")}
            if "contrast" in v[0]
            else {}
        )
    )
    return {
        kind: {d: {m: figures(v) for m, v in ms.items() if len(v) > 1} for d, ms in sorted(ds.items())}
        for kind, ds in out.items()
    }


def noticed(b: Bench, done: dict) -> dict:
    "Collect mean scores and detections of each perturbation; thresholds come from the other half of the cases."
    names = [n for n in b.cases if f"calibration · {n}" in done]
    if len(names) < 4:
        return {}
    halves = [score_limits([done[f"calibration · {n}"]["signs"] for n in names[i::2]]) for i in (0, 1)]
    usual = {n: halves[1 - i % 2] for i, n in enumerate(names)}
    found = {"true": {n: done[f"calibration · {n}"]["signs"] for n in names}}
    for n in names:
        for what, s in done.get(f"lies · {n}", {}).items():
            found.setdefault(what, {})[n] = s
    return {
        what: dict(
            cases=len(of),
            noticed=sum(bool(ood_report(s, usual[n])[0]) for n, s in of.items()),
            by={k: c for k in SCORES if (c := sum(k in ood_report(s, usual[n])[0] for n, s in of.items()))},
            signs={k: statistics.mean(s[k] for s in of.values()) for k in SCORES},
            report=ood_report(next(iter(of.values())), usual[next(iter(of))])[1],
        )
        for what, of in found.items()
    }


def read(done: dict) -> dict:
    "Average the organ measures over cases, signed ones as absolute values."
    got = [r for k, r in done.items() if k.startswith("reader")]
    if not got:
        return {}
    mean = lambda v: statistics.mean(v) if (v := [x for x in v if math.isfinite(x)]) else None
    return {
        m: {k: mean([r[m][k] if "dice" in k else abs(r[m][k]) for r in got]) for k in got[0][m]} | dict(cases=len(got))
        for m in got[0]
    }


def label(m: str) -> str:
    return (
        m.replace("_", " ")
        .replace("(off)", "without consistency")
        .replace("mean of k", "mean of K")
        .replace("consistent mean", "consistent mean (POCS)")
        .replace("sample", "one sample")
    )


def area(v: list[float]) -> str:
    return f"{v[0]:.2f} [{v[1]:.2f}, {v[2]:.2f}]"


def for_card(lesions: dict, mm: float) -> dict:
    "Detectability by size, as benchmarks/chest/card.py reads it."
    table = {}
    for kind, sizes in lesions.items():
        for diameter, found in sizes.items():
            table[f"{kind}, {diameter} mm"] = {
                "lesions": found["expected"]["plants"],
                "AUC, truth": area(found["truth"]["auc"]),
                "AUC, consistent mean": area(found["consistent_mean"]["auc"]),
                "AUC, expected": area(found["expected"]["auc"]),
                "recovered contrast, expected, %": f"{100 * found['expected']['contrast']:.0f}",
            }
    return dict(
        title="Planted lesions by size",
        columns=list(next(iter(table.values()))),
        rows=table,
        note=f"Voxels of {mm:g} mm. AUC of a matched filter (ball minus shell) at the known place: reconstructions "
        "with the lesion against those without; 0.5 is chance, in brackets the 95 % bootstrap interval.",
        command=command_line("uncertainty/run.py"),
    )


def tables(t: dict) -> str:
    "Write all tables in Markdown."
    said, percent = [], lambda v: " / ".join(f"{x:.1%}" for x in v)
    if c := t["calibration"]:
        said += [
            f"### Calibration: {c['cases']} cases, {c['k']} samples each, fitted on one half and tested on "
            "the other; of both folds, the worse share",
            "",
            f"Root mean square standard deviation {c['spread_hu']:.0f} HU, error of the mean {c['rmse_hu']:.0f} HU.",
            "",
            "| voxels | stated | without calibration | with calibration |",
            "|---|---|---|---|",
        ]
        said += [
            f"| {g} | {percent(CONFIDENCE_LEVELS)} | {percent(h['before'])} | {percent(h['after'])} |"
            for g, h in c["levels"].items()
        ] + [""]
        worst = (
            [min(v[i] for v in c["body_of_each_case"].values()) for i in range(3)],
            [max(v[i] for v in c["body_of_each_case"].values()) for i in range(3)],
        )
        said += [
            f"Within the body of a single case the shares range from {percent(worst[0])} to {percent(worst[1])}.",
            "",
            "Factors q, all cases: "
            + "; ".join(f"{k} {', '.join(f'{x:.2f}' for x in v)}" for k, v in c["factors"].items())
            + ".",
            "",
        ]
    for kind, ds in t["lesions"].items():
        said += [
            f"### Lesions: {kind}",
            "",
            "| diameter, mm | method | lesions | change of the views, mm of water | AUC [95 %] | AUC, mean "
            "patient subtracted | AUC, method's mean subtracted | recovered contrast | offset along D, "
            "H, W, mm | ghosts |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for d, ms in ds.items():
            for m, f in ms.items():
                said.append(
                    f"| {d} | {label(m)} | {f['plants']} | {f['view_mm']:.1f} | "
                    f"{' | '.join(area(f[o]) + ' (chance)' * (f[o][1] <= 0.5 <= f[o][2]) for o in OBSERVERS)} "
                    "| "
                    + (
                        f"{f['contrast']:.2f} | {f['off_d']:.0f}, {f['off_h']:.0f}, {f['off_w']:.0f} | "
                        f"{f['ghosts']:.1f} |"
                        if "contrast" in f
                        else "1 | | |"
                    )
                )
        said.append("")
    if n := t["lies"]:
        said += [
            "### Perturbed views",
            "",
            "| views | cases | detected | by | " + " | ".join(k.replace("_", " ") for k in SCORES) + " |",
            "|---|---|---|---|" + "---|" * len(SCORES),
        ]
        said += [
            f"| {what} | {v['cases']} | {v['noticed']} | {', '.join(f'{k} {c}' for k, c in v['by'].items()) or '-'} | "
            + " | ".join(f"{v['signs'][k]:{f}}" for k, (_, f) in SCORES.items())
            + " |"
            for what, v in n.items()
        ] + [""]
    if r := t["reader"]:
        columns = [k for k in next(iter(r.values())) if k != "cases"]
        said += [
            f"### Organ measures: {next(iter(r.values()))['cases']} cases; overlap, and mean "
            "absolute error of the rest",
            "",
            "| method | " + " | ".join(columns) + " |",
            "|---|" + "---|" * len(columns),
        ]
        said += [
            f"| {label(m)} | "
            + " | ".join(
                "-" if v[k] is None else f"{v[k]:.0f}" if k.startswith("hu") else f"{v[k]:.3f}" for k in columns
            )
            + " |"
            for m, v in r.items()
        ] + [""]
    return "\n".join(said)


def cleared(out: Path) -> str:
    "Table of solid nodules in lung for every model in the folder."
    methods = (*CHEAP, *DRAWN)
    said = [
        "### AUC of solid nodules in lung [95 %]",
        "",
        "| model | beams | observer | diameter, mm | lesions | bar | " + " | ".join(map(label, methods)) + " |",
        "|---|---|---|---|---|---|" + "---|" * len(methods),
    ]
    for path in sorted(out.glob("*_tables.json")):
        t = json.loads(path.read_text())
        found = [
            (o, d, least, t["lesions"]["lung, solid"][str(d)])
            for o in OBSERVERS
            for d, least in BAR.items()
            if str(d) in t["lesions"].get("lung, solid", {})
        ]
        for o, d, least, ms in found:
            cell = lambda m: (
                "-"
                if m not in ms or o not in ms[m]
                else f"**{area(ms[m][o])}**"
                if ms[m][o][0] >= least
                else area(ms[m][o])
            )
            said.append(
                f"| {path.name.removesuffix('_tables.json')} | {t['settings']['geometry']} | {OBSERVERS[o]} "
                f"| {d} | {ms['expected']['plants']} | {least} | " + " | ".join(map(cell, methods)) + " |"
            )
    return "\n".join([*said, "", "Bold: at or above the bar."])


def curves(t: dict, out: Path, name: str) -> None:
    "Plot detectability and recovered contrast against diameter, and reliability."
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    styles = dict(zip(("truth", *CHEAP, *DRAWN), ("k:", "C0o-", "C1o-", "C2s--", "C3^-", "C4v-")))
    if planted := list(t["lesions"]):
        fig, axes = plt.subplots(
            4, len(planted), figsize=(2.6 * len(planted) + 0.6, 8.6), dpi=80, squeeze=False, sharey="row"
        )
        for column, kind in zip(axes.T, planted):
            for m, style in styles.items():
                at = [(d, ms[m]) for d, ms in t["lesions"][kind].items() if m in ms]
                if not at:
                    continue
                for ax, which in zip(column, OBSERVERS):
                    ax.plot(
                        [d for d, _ in at], [f[which][0] for _, f in at], style, ms=3, lw=1, label=m.replace("_", " ")
                    )
                    ax.fill_between(
                        [d for d, _ in at],
                        [f[which][1] for _, f in at],
                        [f[which][2] for _, f in at],
                        color=style[:2] if style[0] == "C" else "k",
                        alpha=0.08,
                    )
                    ax.axhline(0.5, color="grey", lw=0.7)
                if m != "truth":
                    column[3].plot([d for d, _ in at], [f["contrast"] for _, f in at], style, ms=3, lw=1)
            column[0].set_title(kind, fontsize=8)
            column[3].set_xlabel("diameter, mm", fontsize=8)
            column[3].axhline(0, color="grey", lw=0.7)
            for ax in column:
                ax.grid(alpha=0.3)
                ax.tick_params(labelsize=7)
                ax.set_xticks(sorted(DIAMETERS))
        for ax, what in zip(
            axes[:, 0], ("AUC", "AUC, mean patient subtracted", "AUC, method's mean subtracted", "recovered contrast")
        ):
            ax.set_ylabel(what, fontsize=8)
        axes[0, 0].legend(fontsize=6)
        fig.tight_layout()
        write_atomic(out / f"{name}_lesions.png", lambda p: fig.savefig(p))
        plt.close(fig)
    if t["calibration"]:
        fig, axes = plt.subplots(1, 2, figsize=(8.6, 3.4), dpi=90)
        for ax, how, title in zip(axes, ("before", "after"), ("without calibration", "with calibration")):
            plot_reliability({g: (FINE, v[how]) for g, v in t["calibration"]["fine"].items()}, ax)
            ax.set_title(title, fontsize=9)
        fig.legend(
            *axes[0].get_legend_handles_labels(), loc="center right", fontsize=7
        )  # up to twelve groups, so the legend is outside the axes
        fig.tight_layout(rect=(0, 0, 0.8, 1))
        write_atomic(out / f"{name}_reliability.png", lambda p: fig.savefig(p))
        plt.close(fig)


def picture(b: Bench, done: dict, out: Path) -> None:
    "Draw one planted lesion of 24 mm: truth, reconstructions and their change by the lesion."
    row = next(
        ((k, r) for k, r in done.items() if k.startswith("lesion · lung, solid · 24 mm · 0") and r["room"]), None
    )
    if row is None or (path := out / f"{b.a.name}_lesion.png").exists():
        return
    case, at = b.cases[row[0].split(" · ")[4]], row[1]["at"]
    ill = insert_lesion(case.volume, lesion_shape(b.size, b.mm, at, 24), LESIONS["lung, solid"][1], b.window)
    views, hu = b.look(ill), lambda x: to_hu(x[0], b.window)
    made = {m: b.make(views, m) for m in ("consistent_mean", "expected")}
    show_mpr(
        {"truth": hu(ill)}
        | {m.replace("_", " "): hu(x) for m, x in made.items()}
        | {f"difference, {m.replace('_', ' ')}": hu(x) - hu(b.healthy(case.name, m)) for m, x in made.items()},
        at=tuple(at),
        views=views,
        path=path,
    )


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--checkpoint_dir", required=True, metavar="C", help="folder that diffx2ct_train wrote, or one model file"
    )
    p.add_argument(
        "--data", metavar="DIR", help="folder with volumes/ and drrs/ (default: the checkpoint's own held-out cases)"
    )
    p.add_argument("--name", default="demo", help="name of this model in the results (default: %(default)s)")
    p.add_argument("--figure", choices=list(FIGURES), help="only the rows of one figure (default: all)")
    p.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="WORD",
        help="only rows with all of these words in their name, for instance: --only spiculated '24 mm'",
    )
    p.add_argument("--out", type=Path, default=HERE / "results", help="results (default: %(default)s)")
    p.add_argument("--work", type=Path, default=Path("data/doubt"), help="samples (default: %(default)s)")
    p.add_argument("--k", type=int, default=8, help="samples of each case, for the calibration (default: %(default)s)")
    p.add_argument("--mean_of", type=int, default=4, metavar="K", help="samples of mean_of_k (default: %(default)s)")
    p.add_argument(
        "--plants", type=int, default=3, help="lesions of each kind and size in each case (default: %(default)s)"
    )
    p.add_argument("--seed", type=int, default=0, help="of samples, spots and spikes (default: %(default)s)")
    p.add_argument("--minutes", type=float, default=math.inf, help="start no row after this time")
    p.add_argument("--card", type=Path, metavar="FILE", help="write lesions by size here, for benchmarks/chest/card.py")
    p.add_argument("--list", action="store_true", help="list finished and missing rows")
    return p


@command
def main(argv: list[str]) -> None:
    a = parser().parse_args(argv)
    for option, least in (("k", 2), ("mean_of", 1), ("plants", 1), ("seed", 0)):
        if getattr(a, option) < least:
            raise UserError(f"--{option} {getattr(a, option)} must be {least} or more")
    if a.mean_of > a.k:
        raise UserError(
            f"--mean_of {a.mean_of} takes its samples from the {a.k} of --k; give a smaller --mean_of or a larger --k"
        )
    torch.set_num_threads(1)
    b, path = Bench(a), a.out / f"{a.name}.json"
    facts = dict(
        model=b.digest,
        step=b.model.meta.get("step"),
        signs=list(SCORES),
        size=b.size,
        mm=b.mm,
        geometry=b.A.geometry.kind,
        steps=b.c.STEPS,
        sampler=b.c.SAMPLER,
        k=a.k,
        mean_of=a.mean_of,
        seed=a.seed,
        cases=list(b.cases),
    )
    try:
        kept = json.loads(path.read_text()) if path.exists() else dict(settings=facts, rows={})
    except ValueError:
        raise UserError(f"{path} is damaged; remove it, or choose another --name") from None
    if kept["settings"] != facts:
        raise UserError(
            f"{path} was made with other settings "
            f"({', '.join(k for k in facts if kept['settings'].get(k) != facts[k])} differ); choose another "
            "--name or --out"
        )
    done, wanted = (
        kept["rows"],
        {
            k: v
            for k, v in rows(b).items()
            if (not a.figure or k.startswith(FIGURES[a.figure])) and all(word in k for word in a.only)
        },
    )
    if not wanted:
        raise UserError(f"no row's name has {' and '.join(map(repr, a.only))}; --list shows them all")
    if a.list:
        for k in wanted:
            print("there  " if k in done else "missing", k)
        return
    start, bar = time.time(), tqdm(wanted.items(), desc="uncertainty", unit="row", disable=None)
    for key, (ask, *args) in bar:
        if key in done:
            continue
        if time.time() - start > 60 * a.minutes:
            break
        bar.set_postfix_str(key)
        done[key] = ask(b, *args)
        write_atomic(path, lambda p: p.write_text(json.dumps(kept, indent=0)))
    t = dict(calibration=calibrated(b, done), lesions=detected(done), lies=noticed(b, done), reader=read(done))
    write_atomic(
        a.out / f"{a.name}_tables.json", lambda p: p.write_text(json.dumps(dict(settings=facts) | t, indent=1))
    )
    if a.card and t["lesions"]:
        save(a.card, for_card(t["lesions"], b.mm))
    text = tables(t)
    write_atomic(a.out / f"{a.name}.md", lambda p: p.write_text(text + "\n"))
    curves(t, a.out, a.name)
    picture(b, done, a.out)
    write_atomic(a.out / "bar.md", lambda p: p.write_text(cleared(a.out) + "\n"))
    print(text)
    left = sum(k not in done for k in wanted)
    if left:
        print(f"{left} of {len(wanted)} rows are missing; run the same command to resume")


if __name__ == "__main__":
    main()
