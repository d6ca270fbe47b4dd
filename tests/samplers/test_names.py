"""Names that people know recipes by."""

import inspect
from typing import Any

import diffusers
import pytest
import torch

import pfode
from pfode.errors import FileError, UsageError
from pfode.samplers import CATALOGUE
from pfode.samplers.catalogue import recipe
from pfode.samplers.names import ARGUMENTS, CLASSES, FAMILIES, squeezed


def test_every_recipe_is_found_by_every_spelling_of_its_name():
    assert len({squeezed(name) for name in CATALOGUE}) == len(CATALOGUE)
    for name in CATALOGUE:
        for spelt in (name, name.upper(), name.replace("++", "pp"), name.replace("-", "_")):
            assert recipe(spelt).name == name


def test_families_stand_for_a_member():
    assert not set(FAMILIES) & set(CATALOGUE)
    for name, member in FAMILIES.items():
        assert recipe(name) is CATALOGUE[member]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("euler_ancestral", "euler-a"), ("dpm_2_ancestral", "dpm2-a"), ("dpmpp_2s_ancestral", "dpm++2s-a")]
    + [("dpmpp_2m_sde", "dpm++2m-sde"), ("uni_pc", "unipc2"), ("DPM++ 2M", "dpm++2m"), ("res_multistep", "res-2m")],
)
def test_k_diffusions_spelling(theirs, ours):
    assert recipe(theirs).name == ours


def test_an_unknown_name_is_answered_with_the_next():
    with pytest.raises(UsageError, match="'unipc'"):
        recipe("unpc")


@pytest.mark.parametrize("name", CLASSES)
def test_classes_of_diffusers_are_there_and_have_a_recipe(name):
    assert hasattr(diffusers, name)
    assert recipe(name).name in CATALOGUE


@pytest.mark.parametrize(
    ("name", "sampler", "grid"),
    [
        ("DPM++ 2M Karras", "dpm++2m", "karras"),
        ("DPM++ 2M SDE Karras", "dpm++2m-sde", "karras"),
        ("dpmpp_2m_karras", "dpm++2m", "karras"),
        ("DPM2 a Karras", "dpm2-a", "karras"),
        ("Euler a", "euler-a", None),
        ("LMS Exponential", "lms", "log-snr"),
        ("sample_euler_ancestral", "euler-a", None),
        ("dpmpp_2m_sde_gpu", "dpm++2m-sde", None),
    ],
)
def test_names_of_web_interfaces(name, sampler, grid):
    net = pfode.load("digits")
    plan = pfode.make_plan(name, net.process, 4)
    assert plan == pfode.make_plan(sampler, net.process, 4, grid=grid)
    drawn = pfode.sample(net, 2, 16, name).x
    assert torch.equal(drawn, pfode.sample(net, 2, 16, sampler, grid=grid).x)
    if grid is not None:
        assert pfode.make_plan(name, net.process, 4, grid=grid) == plan
        with pytest.raises(UsageError, match="two grids"):
            pfode.make_plan(name, net.process, 4, grid="cosine")
        with pytest.raises(UsageError, match=f'grid="{grid}"'):
            recipe(name)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_others_are_answered_with_ours(name):
    assert ARGUMENTS[name] in inspect.signature(pfode.sample).parameters
    if name not in inspect.signature(pfode.sample).parameters:
        given: dict[str, Any] = {name: 20}
        with pytest.raises(UsageError, match=f"here it is called {ARGUMENTS[name]}"):
            pfode.sample(pfode.load("digits"), 1, **given)


def test_a_plan_or_its_file_stands_where_a_sampler_does(tmp_path):
    net = pfode.load("digits")
    plan = pfode.make_plan("heun", net.process, 3)
    file = plan.save(tmp_path / "heun.safetensors")
    wanted = pfode.sample(net, 2, plan=plan).x
    given: dict[str, Any]
    for given in ({"sampler": plan}, {"sampler": file}, {"sampler": str(file)}, {"plan": file}, {"plan": str(file)}):
        assert torch.equal(pfode.sample(net, 2, **given).x, wanted)
    back = pfode.make_plan("heun", net.process, grid=plan.times[:-1]).save(tmp_path / "down.safetensors")
    up = pfode.make_plan("heun", net.process, grid=plan.times[:-1].flip(0)).save(tmp_path / "up.safetensors")
    z = pfode.encode(net, wanted, plan=up)
    assert isinstance(z, torch.Tensor)
    again = pfode.encode(net, wanted, sampler=str(up))
    assert isinstance(again, torch.Tensor)
    assert torch.equal(z, again)
    assert torch.equal(pfode.decode(net, z, plan=pfode.Plan.load(back)), pfode.decode(net, z, sampler=back))
    with pytest.raises(UsageError, match="leads from noise to data"):
        pfode.encode(net, wanted, sampler=back)
    for given in ({"sampler": file, "steps": 3}, {"sampler": "heun", "plan": file}, {"plan": plan, "grid": "karras"}):
        with pytest.raises(UsageError, match="together"):
            pfode.sample(net, 2, **given)
    with pytest.raises(FileError, match="cannot be read"):
        pfode.sample(net, 2, sampler="missing.safetensors")
    with pytest.raises(UsageError, match=r"Plan\.load"):
        pfode.make_plan("heun.safetensors", net.process, 3)
