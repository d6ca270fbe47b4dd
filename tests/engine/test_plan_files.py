"""Plans in files whose digest fits but whose content is wrong: an error that names the file, or a plan that runs."""

import contextlib
import json

import pytest
import torch

import pfode
from pfode.errors import FileError, PfodeError
from pfode.header import read_header
from pfode.tensors import read_tensors, write_tensors

JUNK = [
    None,
    True,
    5,
    -1,
    1e308,
    "x",
    "",
    [],
    [1],
    ["x"],
    {},
    {"a": 1},
    {"name": ["EDM"]},
    {"name": "EDM", "sigma_min": "x"},
]
TENSORS = {
    "missing": lambda x: None,
    "whole numbers": lambda x: x.long() if x.dtype != torch.int64 else x.double(),
    "8 bits": lambda x: x.to(torch.float8_e4m3fn),
    "complex": lambda x: x.to(torch.complex64),
    "not a number": lambda x: x.double() * torch.nan,
    "infinite": lambda x: x.double() + torch.inf,
    "negative": lambda x: -x.double() - 1,
    "huge": lambda x: x.double() * 1e300,
    "a scalar": lambda x: x.flatten()[0],
    "empty": lambda x: x[:0],
    "longer": lambda x: torch.cat([x, x]),
    "more sides": lambda x: x[None],
    "falling": lambda x: x.flip(0),
}


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    path = tmp_path_factory.mktemp("plans") / "plan.safetensors"
    return pfode.make_plan("er-sde", process=pfode.EDM(), steps=3).save(path)


def use(path):
    """Read a plan and run it: nothing but errors of pfode may come of it."""
    plan, said = None, str(path)
    try:
        plan = pfode.Plan.load(path)
    except FileError as error:
        said = error.message
    assert str(path) in said
    if plan is None:
        return
    assert isinstance(str(plan), str)
    assert plan.fitted_to is None or plan.fitted_to
    with contextlib.suppress(PfodeError):
        bed = pfode.scores.Gaussian([0.0, 1.0], torch.ones(2), process=plan.process)
        pfode.run(plan, bed, torch.ones(1, 2, dtype=torch.float64), seeds=[1])


@pytest.mark.parametrize("junk", JUNK, ids=repr)
@pytest.mark.parametrize("field", ["name", "process", "prediction", "meta", "more"])
def test_fields(honest, tmp_path, field, junk):
    header = read_header(honest)
    for config in ({**header.config("pfode.config"), field: junk}, {"process": {"name": "EDM"}, field: junk}):
        metadata = {"pfode.kind": "plan", "pfode.config": json.dumps(config)}
        use(write_tensors(tmp_path / "p.safetensors", read_tensors(header), metadata))


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors(honest, tmp_path, kind):
    header = read_header(honest)
    tensors = read_tensors(header)
    for name in [*tensors, "another"]:
        changed = {**tensors, name: TENSORS[kind](tensors.get(name, torch.ones(3)))}
        kept = {key: value for key, value in changed.items() if value is not None}
        use(write_tensors(tmp_path / "p.safetensors", kept, header.metadata))
