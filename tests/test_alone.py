"""What runs where a package is not installed: a pipeline can take pfode with --no-deps.

An import of the packages that are left out fails in the interpreters that these tests start, as it would if they were
not there. `make test-alone` runs the same in an environment without them.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HUBS = ("diffusers", "accelerate", "huggingface_hub", "transformers")
UNET = {
    "_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 3, "out_channels": 3, "attention_head_dim": 8,
    "center_input_sample": False, "time_embedding_type": "positional", "freq_shift": 0, "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8],
    "layers_per_block": 1, "mid_block_scale_factor": 1, "downsample_padding": 1, "act_fn": "silu",
    "norm_num_groups": 4, "norm_eps": 1e-5,
}  # fmt: skip
EXTRAS = ("scipy", "matplotlib", "jinja2", "sklearn", "requests", "torchdiffeq", "k_diffusion")
GONE = """
import sys

for name in {names}:
    sys.modules[name] = None
import warnings
warnings.simplefilter("error")
import torch
import pfode
from pfode.errors import MissingError

def missing(call, *words):
    try:
        call()
    except MissingError as error:
        assert error.code == 4
        assert all(word in str(error) for word in words), str(error)
    else:
        raise AssertionError("no MissingError")

"""


def without(names: tuple[str, ...], code: str, folder: Path) -> None:
    """Run code in an interpreter in which these packages are not there."""
    script = GONE.format(names=names) + code
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_engine_solve_load_and_sample_without_hubs(tmp_path):
    without(
        HUBS + EXTRAS,
        """
from pfode.cli.__main__ import main

net = pfode.load("digits")
for sampler in ("auto", "unipc", "dpm++2m-sde", "heun"):
    out = pfode.sample(net, n=2, steps=3, sampler=sampler, seed=0)
assert out.x.shape[0] == 2
flow = pfode.scores.Gaussian([0.0], torch.ones(1), process=pfode.Flow())
plan = pfode.make_plan("unipc3", process=flow.process, steps=6, grid="beta")
assert torch.isfinite(pfode.run(plan, flow, torch.ones(2, 1))).all()
pfode.solve(lambda t, y: -y, torch.ones(2, requires_grad=True), [0.0, 1.0]).ys.sum().backward()
for words in ("sample --model digits --n 2 --steps 3 --out x.png --quiet", "info x.png"):
    try:
        main(words.split())
    except SystemExit as end:
        assert end.code in (0, None), (words, end.code)
for package in ("pfode", "pfode.samplers", "pfode.scores"):
    module = __import__(package, fromlist=["x"])
    for name in dir(module):
        try:
            getattr(module, name)
        except MissingError as error:
            assert name in ("PFODEScheduler", "Trainer", "train"), (name, str(error))
""",
        tmp_path,
    )


@pytest.mark.parametrize(
    ("gone", "call", "words"),
    [
        ("scipy", 'pfode.make_plan("ddim", pfode.VP(), 5, grid="dm-nonuniform")', "[ode]'"),
        ("scipy", 'pfode.solve(lambda t, y: -y, torch.ones(2), [0.0, 1.0], method="scipy:LSODA")', "[ode]'"),
        ("diffusers", "pfode.samplers.PFODEScheduler()", "PFODEScheduler needs diffusers"),
        ("huggingface_hub", 'pfode.load("owner/name")', "a model of a hub needs huggingface_hub"),
        ("huggingface_hub", 'pfode.load("digits").save_pretrained("x")', "a model of a hub needs huggingface_hub"),
        ("diffusers", 'pfode.load("folder", process=pfode.VP())', "a UNet2DModel needs diffusers"),
        ("accelerate", 'pfode.load("folder", process=pfode.VP())', "a UNet2DModel needs accelerate"),
    ],
)
def test_what_is_missing_is_named_with_the_command_that_installs_it(gone, call, words, tmp_path):
    if gone == "accelerate":  # it is missed after diffusers
        pytest.importorskip("diffusers")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text(json.dumps(UNET))
    without((gone,), f'missing(lambda: {call}, {words!r}, "pip install")\n', tmp_path)
