"""Run diffusers' own tests of schedulers on PFODEScheduler: python -m tests.upstream.schedulers CHECKOUT.

CHECKOUT is a checkout of huggingface/diffusers at a version near the installed one; its files are used as they lie
there: SchedulerCommonTest of tests/schedulers/test_schedulers.py, all its tests and its checks over configs and
forward calls, once for every recipe of RECIPES. They need requests, parameterized, torchsde and Pillow besides pytest.
"""

import argparse
import importlib
import importlib.util
import sys
import unittest
import warnings
from pathlib import Path
from typing import Any

from pfode.samplers import PFODEScheduler

RECIPES = ("ddim", "euler", "dpm++2m", "dpm++3m", "unipc", "ipndm4", "heun", "dpm++2s", "ddpm", "dpm++2m-sde")
CONFIGS: tuple[dict[str, Any], ...] = (
    {"num_train_timesteps": 100},
    {"beta_start": 0.001, "beta_end": 0.02},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "scaled_linear"},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "linspace"},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"clip_sample": True},
    {"thresholding": True, "sample_max_value": 2.0},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"final_sigmas_type": "sigma_min"},
    {"lower_order_final": True},
    {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    {"sigma_data": 0.5},
)


def common_test(checkout: Path) -> Any:
    """SchedulerCommonTest of a checkout, imported beside our own package `tests`."""
    folder = checkout / "tests"
    if not (folder / "schedulers" / "test_schedulers.py").is_file():
        raise SystemExit(f"{checkout}: no checkout of diffusers (tests/schedulers/test_schedulers.py is missing)")
    spec = importlib.util.spec_from_file_location(
        "upstream", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["upstream"] = package
    spec.loader.exec_module(package)
    return importlib.import_module("upstream.schedulers.test_schedulers").SchedulerCommonTest


def case(common: Any, recipe: str) -> type[unittest.TestCase]:
    """Its tests with one recipe, and one more that calls its two checks."""

    class Checks(common):
        scheduler_classes = (PFODEScheduler,)
        forward_default_kwargs = (("num_inference_steps", 25),)  # or the checks do not set timesteps

        def get_scheduler_config(self, **kwargs: Any) -> dict[str, Any]:
            return {"num_train_timesteps": 1000, "sampler": recipe, **kwargs}

        def test_over_configs(self) -> None:
            for config in CONFIGS:
                with self.subTest(**config):
                    self.check_over_configs(**config)

        def test_over_forward(self) -> None:
            for steps in (1, 2, 5, 10, 50):
                with self.subTest(steps=steps):
                    self.check_over_forward(num_inference_steps=steps, time_step=0)

    Checks.__name__ = Checks.__qualname__ = f"Test[{recipe}]"
    return Checks


def run(checkout: Path, recipes: tuple[str, ...] = RECIPES) -> unittest.TestResult:
    """The result of all tests of these recipes."""
    common = common_test(checkout)
    load = unittest.defaultTestLoader.loadTestsFromTestCase
    suite = unittest.TestSuite(load(case(common, recipe)) for recipe in recipes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return unittest.TextTestRunner(sys.stdout, verbosity=2, warnings="ignore").run(suite)  # type: ignore[arg-type]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    options = parser.parse_args()
    result = run(options.checkout, tuple(options.recipes))
    broken = {str(getattr(test, "test_case", test)) for test, _ in result.failures + result.errors}
    print(f"{result.testsRun - len(broken)} of {result.testsRun} tests pass with {len(options.recipes)} recipes")
    return min(len(broken), 1)


if __name__ == "__main__":
    sys.exit(main())
