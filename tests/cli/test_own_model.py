"""A network of the user's own by MODULE:NAME, in every command; guidance as NAME@2; what pictures may not do."""

import sys

import numpy as np
import pytest
import torch

import pfode
from pfode.cli.images import read_settings
from pfode.errors import UsageError
from pfode.scores.io.find import guided_name

CODE = """
import pathlib, torch, pfode
pathlib.Path("ran").touch()
class Exact:
    process, shape = pfode.EDM(), (1, 8, 8)
    def __call__(self, x, t, **cond):
        return x / (1 + t.reshape(-1, 1, 1, 1) ** 2)
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.linspace(-1, 1, 64).reshape(1, 8, 8))
    def forward(self, x, t, label=None):
        return 0.5 * x - self.bias * (1 if label is None else label.reshape(-1, 1, 1, 1))
bare = Net()
net = pfode.Denoiser(Net(), pfode.Flow(), "flow", shape=(1, 8, 8), labels=["a", "b"])
shapeless = pfode.Denoiser(Net(), pfode.Flow(), "flow")
points = pfode.Denoiser(Net(), pfode.Flow(), "flow", shape=(2,))
shipped = pfode.load("digits")
def make():
    return Exact()
def broken():
    raise RuntimeError("no weights")
def function(x, t):
    return x
number = 3
"""
FIT = ("--nfe", 3, "--n", 8, "--check", 8, "--active", 8, "--iterations", 2, "--teacher", 16)


@pytest.fixture
def mine(cli, tmp_path):
    """The module `mine` in the working folder."""
    (tmp_path / "mine.py").write_text(CODE)
    sys.modules.pop("mine", None)  # of another test
    yield cli
    sys.modules.pop("mine", None)


def test_an_own_network_is_sampled_fitted_benched_and_shown_from_the_shell_alone(mine, tmp_path):
    drawn = mine("sample", "--model", "mine:net", "--steps", 3, "--n", 2, "--label", "b", "--json")
    assert drawn.code == 0, drawn.err
    net = sys.modules["mine"].net
    assert drawn.json["settings"]["model"] == {"name": "mine:net", "digest": net.fingerprint}
    fitted = mine("fit", "--model", "mine:net", *FIT, "--json")
    assert fitted.code == 0, fitted.err
    plan = fitted.json["plans"][0]["file"]
    assert plan == "plans/mine-net.plan-3.safetensors"
    assert mine("fit", "--model", "mine:net", *FIT, "--json").json["plans"][0]["kept"]
    words = ("--sampler", "ddim", "--sampler", plan, "--n", 4, "--nfe", 3, "--teacher", 16)
    done = mine("bench", "--model", "mine:net", *words, "--json")
    assert (done.code, done.json["cells"]) == (0, 2), done.err
    assert mine("sample", "--model", "mine:net", "--sampler", plan, "--n", 2, "--out", "fitted.png").code == 0
    shown = mine("info", "mine:net", "--json").json
    assert shown["process"]["name"] == "Flow"
    assert shown["labels"] == ["a", "b"]
    assert shown["parameters"] == 64
    assert shown["digest"] == net.fingerprint


def test_what_is_drawn_is_what_python_draws(mine, tmp_path):
    run = mine("sample", "--model", "mine:make", "--steps", 4, "--n", 3, "--separate", "each", "--json")
    assert run.code == 0, run.err
    x = pfode.sample(sys.modules["mine"].Exact(), 3, 4).x
    from pfode.cli.images import to_pixels
    from pfode.scores.io.pictures import opened

    for i, pixels in enumerate(to_pixels(x)):
        with opened("", tmp_path / f"each/{i:06d}.png", ("PNG",)) as found:
            assert (np.asarray(found) == pixels).all()


def test_a_fit_of_what_cannot_be_told_apart_is_made_without_a_cache(mine, tmp_path):
    run = mine("fit", "--model", "mine:Exact", *FIT)
    assert run.code == 0, run.err
    assert "no fingerprint" in run.err
    assert not (tmp_path / "plans/cache").exists()


def test_a_network_of_pfode_under_an_own_name_becomes_a_file(mine):
    run = mine("convert", "mine:shipped", "own.safetensors")
    assert run.code == 0, run.err
    assert pfode.load("own.safetensors").fingerprint is not None
    refused = mine("convert", "mine:make", "own.safetensors")
    assert (refused.code, "pfode.Denoiser" in refused.err) == (2, True)


@pytest.mark.parametrize(
    ("name", "problem", "hint"),
    [
        ("mine:bare", "Net is no denoiser", "pfode.Denoiser(network, process, prediction"),
        ("mine:function", "function takes x, t", "pfode.Denoiser(network, process, prediction"),
        ("mine:Net", "does not say|Net is no denoiser", "pfode.Denoiser("),
        ("mine:number", "int is no denoiser", "pfode.Denoiser("),
        ("mine:broken", "RuntimeError: no weights", "--debug"),
        ("mine:shapeless", "does not say the shape", "shape=(3, 32, 32)"),
        ("mine:points", "are no pictures", "in Python"),
        ("mine:nothing", "no attribute 'nothing'", "mine:NAME"),
        ("mine.py:net", "without .py", "--model mine:net"),
        ("./sub/mine.py:net", "without .py", "--model sub.mine:net"),
        ("no_such:x", "no module 'no_such'", "working folder"),
        ("mine:make@2", "no labels", "leave the guidance out"),
    ],
)
def test_what_is_no_denoiser_says_what_to_write(mine, tmp_path, name, problem, hint):
    run = mine("sample", "--model", name, "--steps", 2, "--n", 1)
    assert run.code == 2, run.err
    assert any(words in run.err for words in problem.split("|")), run.err
    assert hint in run.err
    assert len(run.err.splitlines()) == 2
    assert not list(tmp_path.glob("*.png"))


def test_a_picture_cannot_name_code_to_run(mine, tmp_path):
    assert mine("sample", "--model", "mine:make", "--steps", 2, "--n", 1, "--out", "a.png").code == 0
    for place in (tmp_path / "ran",):
        place.unlink()
    del sys.modules["mine"]
    run = mine("sample", "--like", "a.png", "--out", "b.png")
    assert run.code == 3
    assert "would run Python code" in run.err
    assert not (tmp_path / "ran").exists()
    for words in (("--model", "mine:make"), ("--trust-python",)):
        assert mine("sample", "--like", "a.png", "--out", "b.png", *words).code == 0
        assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()


def test_guidance_stands_behind_the_name_everywhere(mine, tmp_path, monkeypatch):
    plain = ("--steps", 3, "--n", 2, "--label", "all")
    assert mine("sample", "--model", "digits", "--guidance", 2, *plain, "--out", "a.png").code == 0
    assert mine("sample", "--model", "digits@2", *plain, "--out", "b.png").code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert read_settings(tmp_path / "b.png")["options"]["guidance"] == 2
    again = mine("sample", "--like", "b.png", "--model", "digits@3", "--out", "c.png", "--json")
    assert again.json["settings"]["options"]["guidance"] == 3
    monkeypatch.setenv("PFODE_MODEL", "digits@5")
    assert mine("sample", *plain, "--guidance", 1.5, "--json").json["settings"]["options"]["guidance"] == 1.5
    monkeypatch.delenv("PFODE_MODEL")
    both = mine("sample", "--model", "digits@2", "--guidance", 2, *plain)
    assert (both.code, "give one of them" in both.err) == (2, True)
    assert mine("info", "digits@2", "--json").json["guidance"] == 2
    assert "digits.safetensors" in mine("info", "digits@2").out
    fitted = mine("fit", "--model", "digits@2", *FIT, "--json")
    assert pfode.Plan.load(fitted.json["plans"][0]["file"]).meta["fitted"]["settings"]["guidance"] == 2
    assert mine("fit", "--model", "digits@2", "--guidance", 2, *FIT).code == 2
    assert "out.safetensors@2" in mine("convert", "digits@2", "out.safetensors").err
    for command in (("sample", "--model", "digits@x"), ("info", "digits@x"), ("bench", "--model", "digits@x")):
        run = mine(*command)
        assert (run.code, "digits@2" in run.err) == (2, True), run.err


def test_guidance_behind_a_name_in_python():
    net = pfode.load("digits@2")
    assert net.evals == 2
    wanted = pfode.sample(pfode.load("digits"), 2, 3, label=3, guidance=2).x
    assert torch.equal(pfode.sample(net, 2, 3, label=3).x, wanted)
    assert type(pfode.load("digits@1")) is pfode.Denoiser
    with pytest.raises(UsageError, match="after @ stands the scale"):
        pfode.load("digits@two")


def test_a_revision_of_a_hub_is_no_guidance(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert guided_name("owner/name@2") == ("owner/name", 2.0)
    assert guided_name("owner/name@main@-0.5") == ("owner/name@main", -0.5)
    for name in ("owner/name@main", "owner/name@1234567", "owner/name@refs/tags/2", "owner/name@1e5f", "@2", "plain"):
        assert guided_name(name) == (name, None)
    (tmp_path / "file@2").touch()
    assert guided_name("file@2") == ("file@2", None)
