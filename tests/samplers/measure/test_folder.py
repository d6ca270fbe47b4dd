"""The bench's folder: what is kept is checked when it is read again; one process at a time."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import pfode
from pfode.errors import FileError, UsageError
from pfode.samplers.measure import bench, results
from pfode.samplers.measure.problem import Problem
from pfode.samplers.measure.results import Cache, Folder
from pfode.scores.beds import bed
from pfode.tensors import write_tensors


class Pictures:
    """Exact, and its samples are pictures: the cache keeps them."""

    process, shape, data_std = pfode.EDM(), (1, 4, 4), 0.5

    def __call__(self, x, t, **cond):
        return torch.tanh(x / (1 + torch.as_tensor(t).reshape(-1, 1, 1, 1)))


def problem(name: str = "pictures", **options) -> Problem:
    sizes = {"n": 6, "validation": 4, "teacher": 16}
    return Problem(name, Pictures() if name == "pictures" else bed(name), **{**sizes, **options})


def run(out: Path, evals=(3, 4), samplers=("ddim", "dpm++2m?grid=karras/cosine"), stop=None, **options) -> bytes:
    def progress(done: int, total: int, what: str) -> None:
        if done == stop:
            raise KeyboardInterrupt

    overwrite = options.pop("overwrite", False)
    bench.bench([(problem(**options), samplers)], out, evals, overwrite=overwrite, progress=progress)
    return (out / results.RESULTS).read_bytes()


def flipped(file: Path, i: int, bit: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[i] ^= 1 << bit
    file.write_bytes(raw)


def test_no_flipped_bit_of_anything_kept_is_silent(tmp_path):
    """Stopped after two cells, a bit flipped, gone on with: the same bytes, or an error that names the file."""
    expected, draw = run(tmp_path / "whole"), random.Random(0)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(out, stop=3)
    kept = {file: file.read_bytes() for file in out.rglob("*") if file.is_file() and file.name != ".gitignore"}
    assert {file.name for file in kept} >= {results.LINES, "test.safetensors", "validation.safetensors"}
    assert run(tmp_path / "again") == expected
    refused = 0
    for file, raw in [item for item in kept.items() if item[0].suffix == ".jsonl" or item[0].name[0] in "tv"]:
        for _ in range(8):
            for other in out.rglob("*"):
                if other.is_file() and other not in kept and other.name != ".gitignore":
                    other.unlink()
            for one, whole in kept.items():
                one.write_bytes(whole)
            flipped(file, draw.randrange(len(raw)), draw.randrange(8))
            refused += gone_on_or_refused(out, file, expected)
    assert refused >= 12


def gone_on_or_refused(out: Path, file: Path, expected: bytes) -> bool:
    """Whether the run was refused, by the name of the file; else it came to the same bytes."""
    try:
        assert run(out) == expected
    except FileError as error:
        if str(file) not in error.message:
            raise
        return True
    return False


def test_no_flipped_bit_of_results_json_is_silent(tmp_path):
    run(tmp_path)
    (tmp_path / results.LINES).unlink()
    whole, draw = (tmp_path / results.RESULTS).read_bytes(), random.Random(1)
    for _ in range(40):
        (tmp_path / results.RESULTS).write_bytes(whole)
        flipped(tmp_path / results.RESULTS, draw.randrange(len(whole)), draw.randrange(8))
        with pytest.raises(FileError, match=results.RESULTS):
            Folder(tmp_path, [])


def test_the_cache_of_another_problem_is_refused(tmp_path):
    cache = Cache(tmp_path)
    first, other = problem(), problem(seed=7)
    cache.save_reference(first, False, torch.zeros(6, 1, 4, 4), {"calls": 3, "error": 0.5})
    assert cache.reference(first, False) is not None
    assert cache.reference(first, True) is None
    with pytest.raises(FileError, match="other settings"):
        cache.reference(other, False)


@pytest.mark.parametrize(
    ("tensors", "teacher"),
    [
        ({"x": torch.zeros(5, 1, 4, 4)}, "{}"),
        ({"x": torch.zeros(6, 1, 4, 4, dtype=torch.int64)}, "{}"),
        ({"x": torch.zeros(6, 1, 4, 4)}, "[]"),
        ({"x": torch.zeros(6, 1, 4, 4)}, '{"calls": "3"}'),
        ({"y": torch.zeros(6, 1, 4, 4)}, "{}"),
    ],
)
def test_a_cache_that_was_forged(tmp_path, tensors, teacher):
    """Digest and purpose are right, the content is not."""
    cache = Cache(tmp_path)
    cache.save_reference(problem(), False, torch.zeros(6, 1, 4, 4), {})
    (file,) = tmp_path.rglob("test.safetensors")
    metadata = dict(pfode.header.read_header(file).metadata)
    write_tensors(file, tensors, {**metadata, "teacher": teacher})
    with pytest.raises(FileError, match=str(file)):
        cache.reference(problem(), False)


def test_other_truth_other_weights_and_other_features_are_other_settings(tmp_path):
    def two(weight: float) -> pfode.scores.Denoiser:
        network = torch.nn.Linear(2, 2, bias=False)
        torch.nn.init.constant_(network.weight, weight)
        return pfode.scores.Denoiser(network, pfode.EDM(), "edm", shape=(2,))

    def mine(weight: float = 0.5, truth: float = 0.0, features: str = "a") -> dict[str, Any]:
        how: dict[str, Any] = {"features": torch.flatten, "features_digest": features}
        return Problem("mine", two(weight), truth=torch.full((9, 2), truth), **how).settings

    assert mine() == mine()
    assert mine(weight=0.25) != mine() != mine(truth=1.0)
    assert mine(features="b") != mine()


def test_what_one_folder_has_another_takes_over(tmp_path):
    expected = json.loads(run(tmp_path / "whole"))
    run(tmp_path / "a", evals=(3,))
    run(tmp_path / "b", evals=(4,))
    (tmp_path / "out").mkdir()
    folder = Folder(tmp_path / "out", [])
    folder.adopt(tmp_path / "a")
    folder.adopt(tmp_path / "b")
    folder.adopt(tmp_path / "a")
    assert json.loads(json.dumps(folder.finish())) == {k: v for k, v in expected.items() if k != "sha256"}
    assert Cache(tmp_path / "out" / results.CACHE).samples("pictures", "ddim", 4) is not None
    run(tmp_path / "c", seed=3)
    with pytest.raises(UsageError, match="other settings"):
        folder.adopt(tmp_path / "c")
