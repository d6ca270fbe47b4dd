"""Configs of diffusers' schedulers as they lie in memory, without a name: taken for what they are, or refused."""

import importlib
import warnings
from typing import Any

import pytest
from diffusers.configuration_utils import register_to_config

from pfode.errors import UsageError
from pfode.process import EDM, Flow, VPDiscrete
from pfode.samplers import PFODEScheduler
from pfode.samplers.adapters import classes as module
from pfode.samplers.adapters.classes import KNOWN, LIKE_EDM, LIKE_FLOW, SINCE_0_31, _classes, _parameters

pytestmark = [pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")]  # diffusers under numpy 2
diffusers: Any = importlib.import_module("diffusers")


def made(name: str) -> Any:
    """A scheduler of this name, None where it needs something: a package, an argument."""
    kind = getattr(diffusers.schedulers, name, None) or getattr(diffusers, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return kind()
        except (ImportError, TypeError):
            return None


NAMES = sorted(name for name in dir(diffusers.schedulers) if name.endswith("Scheduler") and made(name) is not None)
TWINS = ("FlowMapEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")  # the same keys, models of two kinds
TWINS = TWINS if set(TWINS) <= set(NAMES) else ()  # an older diffusers has but one of them


def kind_of(name: str) -> type:
    short = name.removesuffix("Scheduler")
    return Flow if short in LIKE_FLOW else EDM if short in LIKE_EDM else VPDiscrete


@pytest.mark.parametrize("name", NAMES)
def test_every_scheduler_in_memory_is_taken_for_what_it_is_or_refused(name):
    config = made(name).config
    assert "_class_name" not in config
    for given in (config, dict(config), dict(sorted(config.items())), {**config, "_use_default_values": []}):
        if name in KNOWN and name not in TWINS:
            assert isinstance(PFODEScheduler.from_config(given)._kind.process, kind_of(name))
        else:
            with pytest.raises(UsageError, match=r"its models are no denoisers|its keys are those of "):
                PFODEScheduler.from_config(given)


@pytest.mark.parametrize("name", TWINS)
def test_twins_are_told_apart_by_their_name(name):
    config = {**made(name).config, "_class_name": name}
    if name in KNOWN:
        assert isinstance(PFODEScheduler.from_config(config)._kind.process, Flow)
    else:
        with pytest.raises(UsageError, match="its models are no denoisers"):
            PFODEScheduler.from_config(config)


class Shorter(diffusers.FlowMatchEulerDiscreteScheduler):
    """Its config holds its base's keys behind its own, with the values that they have."""

    @register_to_config
    def __init__(self, shift: float = 5.0, use_dynamic_shifting: bool = False):
        super().__init__(shift=shift, use_dynamic_shifting=use_dynamic_shifting)


class Other(diffusers.FlowMatchEulerDiscreteScheduler):
    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, power: float = 2.0):
        super().__init__(num_train_timesteps)


class Longer(diffusers.DDIMScheduler):
    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, prediction_type: str = "epsilon", strength: float = 1.0):
        super().__init__(num_train_timesteps, prediction_type=prediction_type)


class Apart(diffusers.SchedulerMixin, diffusers.ConfigMixin):
    """With keys that mean something to us, but what does it do?"""

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, shift: float = 5.0, prediction_type: str = "epsilon"):
        pass


@pytest.mark.parametrize("kind", [Other, Longer, Apart])
def test_a_class_with_other_keys_is_refused(kind):
    names = list(kind().config)
    explicit = kind(**{name: kind().config[name] for name in names[: names.index("_use_default_values")]})
    for config in (kind().config, explicit.config, dict(explicit.config)):
        with pytest.raises(UsageError, match="no scheduler of diffusers has its keys"):
            PFODEScheduler.from_config(config)


def test_a_class_whose_keys_are_those_of_its_base_is_taken_as_that():
    scheduler = PFODEScheduler.from_config(Shorter().config)
    assert isinstance(scheduler._kind.process, Flow)
    assert scheduler.config["shift"] == 5.0


def test_what_another_class_left_behind_does_not_count():
    """Euler made from DDIM's config in memory: Euler's keys, then those of DDIM that it keeps for later."""
    euler = diffusers.EulerDiscreteScheduler.from_config(diffusers.DDIMScheduler(beta_end=0.012, steps_offset=1).config)
    assert PFODEScheduler.from_config(euler.config).config["beta_end"] == 0.012
    inverse = diffusers.DDIMInverseScheduler.from_config(diffusers.DDIMScheduler(beta_end=0.012).config)
    with pytest.raises(UsageError, match="DDIMInverseScheduler: its models"):
        PFODEScheduler.from_config(inverse.config)


def test_ours_comes_back_from_another_class():
    ours = PFODEScheduler(sampler="unipc", beta_end=0.012, prediction_type="v_prediction")
    again = PFODEScheduler.from_config(diffusers.EulerDiscreteScheduler.from_config(ours.config).config)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in ours.config.items() if k[0] != "_"
    }
    flow = diffusers.FlowMatchEulerDiscreteScheduler.from_config(PFODEScheduler(sampler="unipc").config)
    assert isinstance(PFODEScheduler.from_config(flow.config)._kind.process, Flow)


def test_a_class_derived_from_ours_is_ours():
    class Mine(PFODEScheduler):
        pass

    again: Any = Mine.from_config({**Mine(sampler="ddim").config, "_class_name": "Mine"})
    assert isinstance(again, Mine)
    assert again.config["sampler"] == "ddim"


def test_the_table_of_classes_holds_all_that_are_known():
    with_keys = {name for names in _classes().values() for name in names}
    assert KNOWN & set(dir(diffusers.schedulers)) - with_keys <= {"DPMSolverSDEScheduler"}  # wants torchsde


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "time_shift_type": "linear"}),
    ],
)
def test_a_file_of_a_newer_version_means_the_same_with_an_older_one(name, keys, monkeypatch):
    """The older class does not know the keys: they were dropped, and a flow was sampled as a VP model."""
    known = {key: value for key, value in _parameters(name).items() if key not in SINCE_0_31[name[:-9]]}
    monkeypatch.setattr(module, "_parameters", lambda asked: known)
    scheduler = PFODEScheduler.from_config({"_class_name": name, **keys})
    assert isinstance(scheduler._kind.process, Flow)
    assert {key: scheduler.config[key] for key in keys} == keys
