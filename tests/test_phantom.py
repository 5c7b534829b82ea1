"Phantoms: sides, places and variety, at a size that takes a second."

import numpy as np
import pytest

from diffx2ct.phantom import LABELS, canvas, draw_patient, phantom

SEEDS = range(6)


@pytest.fixture(scope="module")
def people():
    return [phantom(seed, 32) for seed in SEEDS]


def centre(labels, name):
    "Mean index (d, h, w) of a label."
    return (labels == LABELS[name]).nonzero().float().mean(0)


def test_voxels_lie_evenly_about_the_middle():
    c = canvas(draw_patient(0), 24, 10.0)
    assert c.v[0] == -c.v[-1] == -115


def test_organs_are_on_their_side(people):
    for _, labels, _ in people:
        at = {name: centre(labels, name)[2] for name in ("lung_right", "lung_left", "liver", "heart", "stomach")}
        middle = (at["lung_right"] + at["lung_left"]) / 2
        assert at["lung_right"] < middle < at["lung_left"] and at["liver"] < middle < at["stomach"]
        assert at["heart"] > middle
    for seed in range(20):
        chambers = draw_patient(seed).chambers
        assert chambers["lv"][0][0] > chambers["rv"][0][0] > chambers["ra"][0][0]


def test_patients_differ(people):
    scales = np.array([draw_patient(seed).scale for seed in SEEDS])
    assert (scales.std(0) > 0.01).all()
    lungs = [info["lung_litres"]["right"] for *_, info in people]
    assert max(lungs) > 1.15 * min(lungs)


def test_nodules_lie_where_they_are_said_to():
    _, labels, info = phantom(3, 64)
    assert info["nodules"]
    for n in info["nodules"]:
        d, h, w = (round(v / info["mm"] - 0.5) for v in n["centre_mm"])
        assert n["label"] in labels[d - 1 : d + 2, h - 1 : h + 2, w - 1 : w + 2], n
