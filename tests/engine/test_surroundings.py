"""What the caller has set for torch (default device and dtype, autocast, inference mode) changes no number of ours."""

import ast
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pfode
from pfode.ode import SOLVERS, solve, steps
from pfode.samplers import CATALOGUE
from tests import problems

ROOT = Path(__file__).parents[2]
FACTORIES = {"tensor", "arange", "linspace", "logspace", "zeros", "ones", "eye", "full", "empty", "rand", "randn"}
FACTORIES |= {"randint", "randperm", "tril_indices", "triu_indices", "as_tensor"}
DATA = torch.tensor([[0.3, -0.4], [1.0, 0.2]])


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS = {
    "meta": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
}


def results(process: Any) -> Iterator[Any]:
    made = problems.mixture(process)
    for sampler in ("auto", "heun", "dpm++2m-sde", "rk45"):
        yield pfode.sample(made, n=2, seed=3, steps=None if sampler == "rk45" else 5, sampler=sampler).x
    yield pfode.sample(made, n=2, steps=5, sampler="dpm++2m-sde", brownian=True, dtype=torch.float64).x
    yield pfode.encode(made, DATA, steps=5)
    yield from pfode.encode(made, DATA, steps=5, sampler="o-belm")
    yield pfode.decode(made, DATA, sampler="rk45")
    yield from (point.x for point in pfode.iterate(pfode.make_plan("unipc3", process, 4), made, DATA))


@pytest.mark.parametrize("process", [pfode.EDM(), pfode.VP(), pfode.Flow()])
def test_samples_are_the_same_in_any_surroundings(process):
    expected = list(results(process))
    for name, surroundings in SURROUNDINGS.items():
        with surroundings():
            found = list(results(process))
        for ours, plain in zip(found, expected, strict=True):
            assert ours.dtype == plain.dtype, name
            assert torch.equal(ours, plain), name


@pytest.mark.parametrize("name", ["meta", "float64", "bfloat16", "inference"])
def test_plans_are_the_same_in_any_surroundings(name):
    grids = ["shifted(time,2)" if grid == "shifted" else grid for grid in pfode.grids.GRIDS]
    asked = [(sampler, pfode.VP(), None) for sampler in CATALOGUE]
    asked += [("dpm++2m", process, grid) for process in problems.PROCESSES.values() for grid in grids]
    for sampler, process, grid in asked:
        plain = pfode.make_plan(sampler, process, 4, grid=grid)
        with SURROUNDINGS[name]():
            assert pfode.make_plan(sampler, process, 4, grid=grid) == plain, (sampler, grid)


def test_a_plan_made_without_gradients_serves_with_them():
    with torch.inference_mode():
        plan = pfode.make_plan("dpm++2m", pfode.EDM(), 4)
        pfode.run(plan, problems.mixture(pfode.EDM()), DATA)
    x = DATA.clone().requires_grad_()
    pfode.run(plan, problems.mixture(pfode.EDM()), x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_a_fit_is_the_same_in_any_surroundings():
    made = problems.mixture(pfode.VP())
    options: dict[str, Any] = {"nfe": 3, "n": 16, "check": 8, "active": 8, "teacher": 20, "iterations": 2}
    plain = pfode.fit_plan(made, **options)
    for name in ("meta", "float64", "autocast"):
        with SURROUNDINGS[name]():
            assert pfode.fit_plan(made, **options) == plain, name


def solutions(method, batch):
    """States, states between, event times and gradients of a solve that needs no product of matrices of its own."""

    def field(t, y):
        return torch.stack([-y[..., 0] + 2 * y[..., 1], -2 * y[..., 0] - y[..., 1]], -1)

    fixed = {} if method.startswith("scipy:") or SOLVERS[method].error_order else {"step_size": 0.1}
    options = {"method": method, "batch": batch, "rtol": 1e-4, "atol": 1e-6, **fixed}
    y0 = DATA.flip(1)
    yield solve(field, y0, [0.0, 0.5, 1.0], **options).ys
    if not method.startswith("scipy:"):
        y = y0.clone().requires_grad_()
        with torch.inference_mode(False), torch.enable_grad():
            yield torch.autograd.grad(solve(field, y, [0.0, 1.0], **options).y.sum(), y)[0]
        yield solve(field, y0, [0.0, 2.0], events=lambda t, y: y.flatten(1)[:, 0] - 0.1, **options).events[0].t
        yield from (point.at(0.5 * (point.t0 + point.t1)) for point in steps(field, y0, [0.0, 1.0], **options))


@pytest.mark.parametrize("batch", ["joint", "per-sample"])
@pytest.mark.parametrize("method", ["dopri5", "rk4", "abm4", "kvaerno5", "radauIIA5", "reversible-heun", "scipy:RK45"])
def test_solutions_are_the_same_in_any_surroundings(method, batch):
    expected = list(solutions(method, batch))
    for name, surroundings in SURROUNDINGS.items():
        if name == "inference" and len(expected) > 1:  # gradients are asked for
            continue
        with surroundings():
            found = list(solutions(method, batch))
        for ours, plain in zip(found, expected, strict=True):
            assert ours.dtype == plain.dtype, name
            assert torch.equal(ours.nan_to_num(), plain.nan_to_num()), name


def test_what_the_caller_wrote_keeps_its_autocast():
    net, seen = torch.nn.Linear(2, 2), []

    def noted(t, y):
        seen.append(net(y).dtype)
        return -y

    with torch.autocast("cpu", torch.bfloat16):
        solve(noted, DATA, [0.0, 1.0], events=lambda t, y: noted(t, y)[0, 0] - 5)
        list(steps(noted, DATA, [0.0, 1.0]))
        assert torch.is_autocast_enabled("cpu")
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("name", ["unipc3", "ddim", "heun", "dpm++2m-sde"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pipeline_in_inference_mode(name, dtype):
    """There torch does not count changes in place: a state that was scaled in place is not taken for what it was."""
    pytest.importorskip("diffusers")
    made = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            scheduler, y = pfode.PFODEScheduler(sampler=name), DATA.to(dtype)
            scheduler.set_timesteps(6)
            for i, t in enumerate(scheduler.timesteps):
                y = scheduler.step(0.1 * y, t, y, torch.Generator().manual_seed(i)).prev_sample.mul_(1.5)
            made.append(y.float())
    assert torch.equal(*made)


@pytest.mark.parametrize("folder", ["pfode", "samplers"])
def test_every_new_tensor_says_where_it_lies(folder):
    """Without device= it would lie where torch.set_default_device says."""
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if ast.unparse(node.func.value) == "torch" and node.func.attr in FACTORIES:
                said = any(keyword.arg in ("device", None) for keyword in node.keywords)
                assert said, f"{file.relative_to(ROOT)}:{node.lineno}: torch.{node.func.attr} without device="
