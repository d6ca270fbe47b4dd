"""docs/ways.md: every cell of its table, run; what the ways draw is compared."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import pfode
from pfode import noise
from pfode.cli.images import to_pixels
from pfode.samplers import PFODEScheduler
from pfode.samplers import kdiffusion as K
from tests.cli.conftest import cli  # noqa: F401  (the fixture)

PAGE = (Path(__file__).parents[1] / "docs" / "ways.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")][
    1:
]
IDS = [row[0] for row in ROWS]
MODULE = """
import pfode
def network(x, t, label=None):
    return 0.5 * x - 0.1
net = pfode.Denoiser(network, pfode.EDM(), "flow", shape=(1, 8, 8))
"""
CONFIG = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "scaled_linear"}


def code(cell: str) -> str | None:
    """The code of a cell; None for words, and for what a pipeline of its own is needed for."""
    found = re.fullmatch(r"`(.*)`", cell)
    return None if found is None or found[1].startswith("pipe(") else found[1]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a plan, six.safetensors, and a module, mynet; what the code of the table may name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mynet.py").write_text(MODULE)
    digits = pfode.load("digits")
    pfode.make_plan("dpm++2m", digits.process, 6, grid="karras").save("six.safetensors")
    yield {"net": digits, "network": lambda x, t, **_: 0.5 * x - 0.1, "process": digits.process}
    sys.modules.pop("mynet", None)


def python(cell: str, place: dict[str, Any], **base: Any) -> Tensor:
    """What a cell of the column of Python draws; `base` says the rest."""
    names = {"pfode": pfode, "torch": torch, "K": K, **place}
    if " = " in cell:
        exec(cell, names)
        return pfode.sample(names["net"], 2, **base).x
    given = eval(f"dict({cell})", names)
    if "safetensors" in cell:
        base = {key: value for key, value in base.items() if key not in ("steps", "grid", "sampler")}
    return pfode.sample(names["net"], 2, **{**base, **given}).x


def base_of(row: list[str]) -> dict[str, Any]:
    """What is asked for besides the row."""
    base: dict[str, Any] = {"steps": 6, "seed": 7}
    return base | ({"label": 3} if row[0].startswith("guidance") else {})


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_the_command_draws_what_python_draws(cli, place, row):  # noqa: F811
    words, there = code(row[1]), code(row[2])
    assert words is not None
    assert there is not None
    base = base_of(row)
    rest = ["--n", "2", *(["--model", "digits"] if "--model" not in words else [])]
    for key, value in base.items():
        if f"--{key}" not in words and not (key == "steps" and "safetensors" in words):
            rest += [f"--{key}", str(value)]
    run = cli("sample", *shlex.split(words), *rest, "--separate", "each")
    assert run.code == 0, run.err
    names = sorted(Path("each").glob("0*.png"))
    drawn = np.stack([np.asarray(Image.open(name)) for name in names])
    assert np.array_equal(drawn, to_pixels(python(there, place, **base)))


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_the_scheduler_takes_the_same_words(place, row):
    if (cell := code(row[3])) is None:
        assert row[3].startswith("`pipe(") or row[3] in ("the pipeline's", "the two apart")
        return
    given = eval(f"dict({cell})", {})
    alphas = PFODEScheduler.from_config(CONFIG).alphas_cumprod
    process = pfode.VPDiscrete(alphas)
    if "safetensors" in cell:
        pfode.make_plan("heun", process, 3).save("six.safetensors")
    scheduler = PFODEScheduler.from_config(CONFIG, **{"grid": "karras", **given})
    scheduler.set_timesteps(6 if "safetensors" not in cell else 3)
    there = eval(f"dict({code(row[2])})", {})
    if "safetensors" in cell:
        assert scheduler.plan == pfode.Plan.load("six.safetensors")
    elif "seed" in given:
        assert scheduler.config["seed"] == there["seed"]
    else:
        sampler = there.get("sampler", "auto")
        wanted = pfode.make_plan(sampler, process, 6, grid="karras", guided=True)
        assert scheduler.plan.name == wanted.name
        assert torch.allclose(scheduler.plan.times, wanted.times, rtol=1e-4)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_k_diffusion_draws_what_python_draws(place, row):
    if (cell := code(row[4])) is None:
        assert row[4] in ("as many as `sigmas` has, less one", "the two apart")
        return
    names: dict[str, Any] = {"pfode": pfode, "torch": torch, "K": K, **place, "model": place["net"]}
    x = 80 * noise.normal([7, 8], noise.INITIAL, (1, 8, 8), torch.float32, torch.device("cpu"))
    names["x"], names["sigmas"] = x, K.get_sigmas_karras(6, 0.002, 80)
    function, extra = K.sample_dpmpp_2m, {"extra_args": {"label": torch.tensor([3, 3])}} if "guid" in row[0] else {}
    base = base_of(row) | {"sampler": "dpm++2m", "grid": "karras"}
    if row[0] == "seed":  # of the noise that is drawn on the way: the same again, another for another seed
        model = lambda x, sigma, seed: names["net"](x, sigma)  # noqa: E731
        again = [
            K.sample_euler_ancestral(model, x, names["sigmas"], disable=True, **eval(f"dict({cell})")) for _ in "ab"
        ]
        assert torch.equal(*again)
        other = K.sample_euler_ancestral(model, x, names["sigmas"], disable=True, extra_args={"seed": 8})
        assert not torch.equal(other, again[0])
        return
    if cell.startswith("pfode.run"):
        drawn = eval(cell, {**names, "plan": pfode.Plan.load("six.safetensors")})
    else:
        if " = " in cell:
            if "lambda" in cell:
                exec(str(code(row[2])), names)
            exec(cell, names)
        elif cell.startswith("K."):
            function = eval(cell, names)
        else:
            extra = eval(f"dict({cell})", names)
        drawn = function(names["model"], x, names["sigmas"], disable=True, **extra)
    wanted = python(str(code(row[2])), place, **base)
    assert torch.allclose(drawn, wanted, atol=2e-4), (drawn - wanted).abs().max()


def test_other_words_are_answered_with_ours(cli):  # noqa: F811
    assert "--steps" in cli("sample", "--num-inference-steps", 3).err
    assert "--guidance" in cli("sample", "--cfg-scale", 3).err
