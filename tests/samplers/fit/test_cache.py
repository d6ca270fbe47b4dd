"""What a fit keeps: verified when it is read again, of one process at a time; arguments that no fit can have."""

import math
import random

import pytest
import torch

import pfode
from pfode.errors import FileError, NumericalError, PfodeError, UsageError
from pfode.samplers import fit_plan, gits, measure_jumps
from pfode.scores.beds import bed
from pfode.tensors import write_tensors
from tests.held import held

MIXTURE = bed("mixture-4")
FEW = {"n": 8, "active": 8, "check": 8, "teacher": 6, "iterations": 2, "start": "ddim"}
BIG, NAN = 10**30, math.nan


def fit(nfe=3, denoiser=MIXTURE, **options):
    return fit_plan(denoiser, nfe, **{**FEW, **options})


def interrupted(done):
    if done.stage == "fit" and done.done == 1:
        raise KeyboardInterrupt


def test_no_flipped_bit_is_silent_and_the_rest_goes_on_to_the_same_plan(tmp_path):
    expected, draw = fit(), random.Random(0)
    with pytest.raises(KeyboardInterrupt):
        fit(cache=tmp_path, callback=interrupted)
    kept = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert sorted(file.name.split("-")[0] for file in kept) == ["fit", "teacher", "teacher"]
    for file, whole in kept.items():
        for _ in range(12):
            raw = bytearray(whole)
            raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
            file.write_bytes(raw)
            with pytest.raises(FileError, match=file.name):
                fit(cache=tmp_path)
            file.write_bytes(whole)
    assert fit(cache=tmp_path) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"theta": torch.zeros(3)},
        {"theta": torch.zeros(3, dtype=torch.int64)},
        {"rest": torch.full((6,), NAN)},
        {"rest": torch.full((6,), 99.0)},
        {"rest": torch.full((6,), -1.0)},
        {"other": torch.zeros(1)},
    ],
)
def test_a_state_that_was_forged(tmp_path, change):
    """Digest and name are right, the content is not."""
    with pytest.raises(KeyboardInterrupt):
        fit(cache=tmp_path, callback=interrupted)
    (file,) = tmp_path.glob("fit-*")
    header = pfode.header.read_header(file)
    tensors = {**pfode.tensors.read_tensors(header), **change}
    write_tensors(file, tensors, header.metadata)
    with pytest.raises(FileError, match=file.name):
        fit(cache=tmp_path)


def test_a_file_under_the_name_of_another_is_refused(tmp_path):
    fit(cache=tmp_path)
    first, second = sorted(tmp_path.glob("teacher-*"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(FileError, match=second.name):
        fit(cache=tmp_path)


def test_a_second_fit_in_the_folder_is_told_so(tmp_path):
    with held(tmp_path), pytest.raises(UsageError, match="another fit is working in it"):
        fit(cache=tmp_path)
    assert not list(tmp_path.iterdir())
    fit(cache=tmp_path)


@pytest.mark.parametrize("key", ["nfe", "n", "active", "check", "teacher", "iterations", "batch", "seed"])
@pytest.mark.parametrize("value", [-1, NAN, "x", None, 2.5, True])
def test_sizes_of_a_fit(key, value):
    with pytest.raises(UsageError, match=f"{key}: need an integer"):
        fit(**{key: value})


@pytest.mark.parametrize(
    "options",
    [
        {"nfe": BIG},
        {"n": BIG},
        {"check": BIG},
        {"teacher": BIG},
        {"batch": BIG},
        {"seed": BIG},
        {"nfe": 150, "active": 256, "n": 256},
        {"loss": ["l2"]},
        {"parameterisation": None},
        {"time_only": "x"},
        {"start": None},
        {"start": [None]},
        {"start": 3},
        {"guidance": (1, 2, 3)},
        {"guidance": ()},
        {"guidance": (NAN, 1)},
        {"features": 3},
        {"features": lambda x: 3},
        {"features": lambda x: x.sum()},
        {"features": lambda x: x[:1]},
        {"callback": 3},
        {"cache": 3},
        {"denoiser": None},
        {"denoiser": "digits"},
    ],
)
def test_what_no_fit_can_have(options):
    with pytest.raises(UsageError):
        fit(**options)


def test_features_that_are_not_finite():
    with pytest.raises(NumericalError, match="features"):
        fit(features=lambda x: NAN * x)


@pytest.mark.parametrize(
    "options",
    [
        {"n": 0},
        {"n": BIG},
        {"nodes": 2},
        {"nodes": BIG},
        {"seed": -1},
        {"seed": BIG},
        {"seed": NAN},
        {"seed": None},
        {"batch": 0},
        {"batch": -1},
        {"batch": NAN},
        {"metric": "x"},
        {"teacher": "heun"},
        {"teacher": "euler-a"},
        {"denoiser": None},
        {"denoiser": 3},
    ],
)
def test_what_no_search_can_have(options):
    given = {"denoiser": MIXTURE, "n": 4, "nodes": 11, **options}
    with pytest.raises(UsageError):
        measure_jumps(given.pop("denoiser"), **given)


@pytest.mark.parametrize("steps", [0, 11, BIG, NAN, "x", None, True])
def test_steps_of_a_searched_grid(steps):
    with pytest.raises(PfodeError, match="steps"):
        gits(MIXTURE, steps, n=4, nodes=11)
