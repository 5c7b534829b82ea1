"Rules of chapter 00 by numbers: who is held out, what is on the disk before a name exists, which letter stands where."

import os

import pytest
import torch

from diffx2ct.basics import UserError, load_tensor, save_tensor, write_together
from diffx2ct.config import load_config
from diffx2ct.data import crop_origin, density, mpr_planes, patient_of, show_mpr, split_cases, to_unit
from diffx2ct.drr import Projector, geometry

CASES = [f"p{i:02d}.scan{k}" for i in range(20) for k in range(1 + i % 2)]  # every second patient has two scans


def held_out(seed: int, *sets: str) -> tuple[list[str], list[str]]:
    return split_cases(CASES, load_config(sets=[f"SEED={seed}", *sets]))


def test_another_seed_is_another_split():
    splits = [tuple(held_out(seed)[1]) for seed in range(6)]
    assert len(set(splits)) == 6 and splits == [tuple(held_out(seed)[1]) for seed in range(6)]
    assert held_out(3) == split_cases(CASES[::-1], load_config(sets=["SEED=3"]))  # whatever the order of the files


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_the_split_is_by_patient_and_of_the_size_asked_for(share):
    for seed in range(6):
        train, valid = held_out(seed, f"VALIDATION_SPLIT={share}")
        assert sorted(train + valid) == sorted(CASES)
        assert len({patient_of(case) for case in valid}) == round(20 * share)
        assert not {patient_of(case) for case in train} & {patient_of(case) for case in valid}
        fewer, same = held_out(seed, f"VALIDATION_SPLIT={share}", "DATA.DATA_RATIO=0.5")
        assert same == valid and set(fewer) < set(train)
        assert len({patient_of(case) for case in fewer}) == round(0.5 * (20 - round(20 * share)))


def test_every_file_is_on_the_disk_before_any_takes_its_place(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def synced(number):
        done.append(("fsync", os.fstat(number).st_ino))
        fsync(number)

    def replaced(old, new):
        done.append(("replace", os.stat(old).st_ino))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    paths = [tmp_path / "views", tmp_path / "volume"]
    for text in ("old", "new"):  # the first time nothing is there, the second time both are replaced
        done.clear()
        write_together({path: lambda p: p.write_text(text) for path in paths})
        files = [path.stat().st_ino for path in paths]
        assert done == [("fsync", i) for i in files] + [("replace", i) for i in files]
        assert [path.read_text() for path in paths] == [text] * 2


def test_the_last_of_several_files_vouches_for_the_others(tmp_path, monkeypatch):
    "Killed between two names: the last file is not there, neither the old one nor the new one."
    paths, replace = [tmp_path / name for name in ("AP", "LAT", "volume")], os.replace
    write_together({path: lambda p: p.write_text("old") for path in paths})
    for survivors in range(3):
        write_together({path: lambda p: p.write_text("old") for path in paths})
        left = [survivors]

        def killed(old, new):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            replace(old, new)

        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_together({path: lambda p: p.write_text("new") for path in paths})
        monkeypatch.setattr(os, "replace", replace)
        assert not paths[-1].exists()


ENDS = {("D", 0): "H", ("D", 1): "F", ("H", 0): "A", ("H", 1): "P", ("W", 0): "R", ("W", 1): "L"}


def test_letters_stand_where_the_patient_is():
    "A bright slab at one end of an axis: in every picture where a border is bright, the letter there is that end's."
    found, window = set(), (-1024.0, 1500.0)
    A = Projector(geometry("parallel", 320), 16, 20.0, 16)
    for (axis, end), letter in ENDS.items():
        hu = torch.full((16, 16, 16), -1000.0)
        hu.narrow("DHW".index(axis), 12 * end, 4).fill_(1000.0)
        views = A(density(to_unit(hu, window)[None, None], window))[0]
        for ax in show_mpr({"truth": hu}, views=views).axes:
            if not ax.images:
                continue
            image, name = torch.as_tensor(ax.images[0].get_array()).float(), ax.get_title().split(", ")[-1]
            at = [text.get_position() for text in ax.texts]
            letters = {
                "left": ax.texts[min(range(4), key=lambda k: at[k][0])],
                "right": ax.texts[max(range(4), key=lambda k: at[k][0])],
                "top": ax.texts[max(range(4), key=lambda k: at[k][1])],
                "bottom": ax.texts[min(range(4), key=lambda k: at[k][1])],
            }
            edges = {
                "left": image[:, :3].mean(),
                "right": image[:, -3:].mean(),
                "top": image[:3].mean(),
                "bottom": image[-3:].mean(),
            }
            brightest = max(edges, key=lambda side: edges[side])
            if edges[brightest] - sorted(edges.values())[-2] < 0.2 * (image.max() - image.min()) or not image.std():
                continue  # the slab is not at a border of this picture
            assert letters[brightest].get_text() == letter, (name, axis, end, brightest)
            found.add((name, letter))
    seen = {"axial": "RLAP", "coronal": "RLHF", "sagittal": "APHF", "AP view": "RLHF", "LAT view": "APHF"}
    assert found == {(name, letter) for name, letters in seen.items() for letter in letters}


def test_unit_values_and_densities_of_known_hu():
    window = (-1024.0, 1500.0)
    unit = to_unit(torch.tensor([-3000.0, -1024.0, 0.0, 238.0, 1500.0, 3000.0]), window)
    torch.testing.assert_close(unit, torch.tensor([0, 0, 1024 / 2524, 0.5, 1, 1]))
    got = density(to_unit(torch.tensor([-1000.0, 0.0, 1000.0]), window), window)
    torch.testing.assert_close(got, torch.tensor([0.0, 1.0, 2.0]), atol=1e-5, rtol=0)


def test_crops_begin_at_every_place_that_there_is():
    at = [crop_origin(10, 8, (0, k)) for k in range(60)]
    assert all({o[axis] for o in at} == {0, 1, 2} for axis in range(3))
    assert crop_origin(8, 8, (0, 0)) == (0, 0, 0)


def test_planes_go_through_their_voxel():
    v = torch.arange(4 * 5 * 6).view(4, 5, 6)
    axial, coronal, sagittal = mpr_planes(v, (1, 2, 3))
    assert torch.equal(axial, v[1]) and torch.equal(coronal, v[:, 2]) and torch.equal(sagittal, v[:, :, 3])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_value_that_is_no_number_is_refused(value, tmp_path):
    x = torch.ones(4, 4, 4)
    x[1, 2, 3] = value
    torch.save(x, tmp_path / "x.pt")
    with pytest.raises(UserError, match="NaN or infinite"):
        load_tensor(tmp_path / "x.pt")
    save_tensor(torch.ones(4, 4, 4), tmp_path / "y.pt")
    assert load_tensor(tmp_path / "y.pt").eq(1).all()


def test_a_profile_goes_before_the_settings_of_all(tmp_path):
    (tmp_path / "c.yml").write_text("EPOCHS: 7\nSEED: 5\nPROFILES:\n  long:\n    EPOCHS: 90\n")
    assert load_config(tmp_path / "c.yml", "long").EPOCHS == 90 and load_config(tmp_path / "c.yml", "long").SEED == 5
    assert load_config(tmp_path / "c.yml").EPOCHS == 7
