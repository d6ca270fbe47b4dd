"""Sixty calls that cannot be carried out: each is one clear error, with what to write instead where that is known."""

import math
from typing import Any

import pytest
import torch

from pfode.brownian import Brownian
from pfode.errors import UsageError
from pfode.ode import PI, PID
from pfode.sde import SDE, Dyadic, sdesolve

Y = torch.ones(3, 2)
T = [0.0, 1.0]


def f(t, y):
    return -y


def g(t, y):
    return 0.5 * y


def matrix(t, y):
    return torch.ones(len(y), 2, 4)


def mixed(t, y):
    return y.flip(-1) * 1.0


def in_place(t, y):
    y *= 2
    return y


def bm(seeds=3, shape=(2,), t0=0.0, t1=1.0, area=False):
    return Brownian(range(seeds), shape, t0, t1, area)


def solve(drift=f, diffusion=g, y0: Any = Y, ts: Any = T, noise="diagonal", calculus="ito", **options):
    return sdesolve(SDE(drift, diffusion, noise, calculus), y0, ts, **options)


CALLS = {
    "unknown noise": (lambda: SDE(f, g, "diag"), "noise"),
    "unknown calculus": (lambda: SDE(f, g, calculus="itô"), "calculus"),
    "drift that is no function": (lambda: SDE(1.0, g), "f: need a function"),  # type: ignore[arg-type]
    "diffusion that is no function": (lambda: SDE(f, None), "g: need a function"),  # type: ignore[arg-type]
    "a class as drift": (lambda: SDE(torch.nn.Linear, g), "the class Linear"),
    "product without channels": (lambda: sdesolve(SDE(f, g, "general", product=f), Y, T), "channels"),
    "no channels": (lambda: SDE(f, g, channels=0), "channels"),
    "channels other than g's": (lambda: sdesolve(SDE(f, matrix, "general", channels=3), Y, T), "channels=4"),
    "no SDE": (lambda: sdesolve(f, Y, T), "need an SDE"),  # type: ignore[arg-type]
    "drift of one argument": (lambda: solve(drift=lambda t: t), "f: "),
    "diffusion of one argument": (lambda: solve(diffusion=lambda t: t), "g: "),
    "args that f does not take": (lambda: solve(args=(1.0,)), "args"),
    "y0 of numbers": (lambda: solve(y0=1.0), "y0"),
    "y0 of whole numbers": (lambda: solve(y0=torch.ones(3, 2, dtype=torch.int64)), "y0"),
    "y0 without samples": (lambda: solve(y0=torch.tensor(1.0)), "y0"),
    "complex y0": (lambda: solve(y0=torch.ones(3, 2, dtype=torch.complex64)), "real"),
    "y0 of several batches": (lambda: solve(y0=(torch.ones(2, 1), torch.ones(3, 1))), "batch"),
    "empty y0": (lambda: solve(y0=torch.ones(3, 0)), "empty"),
    "ts that turn": (lambda: solve(ts=[0.0, 1.0, 0.5]), "ts"),
    "ts of words": (lambda: solve(ts=["now"]), "ts"),
    "ts that are not finite": (lambda: solve(ts=[0.0, math.inf]), "ts"),
    "a time alone": (lambda: solve(ts=1.0), "ts"),
    "no times": (lambda: solve(ts=[]), "ts"),
    "rows of times": (lambda: solve(ts=torch.zeros(3, 2), batch="per-sample"), "ts"),
    "times with gradients": (lambda: solve(ts=torch.tensor(T, requires_grad=True)), "derivative in time"),
    "drift of another shape": (lambda: solve(drift=lambda t, y: y[:, :1]), "field's result"),
    "diffusion of another shape": (lambda: solve(diffusion=lambda t, y: y[:, :1]), "g: "),
    "a matrix as diagonal": (lambda: solve(diffusion=matrix), "general"),
    "a diagonal g that mixes": (lambda: solve(diffusion=mixed), "depends"),
    "scalar noise of four channels": (lambda: solve(diffusion=matrix, noise="scalar"), "one Brownian motion"),
    "drift in place": (lambda: solve(drift=in_place), "in place"),
    "diffusion in place": (lambda: solve(diffusion=in_place), "in place"),
    "unknown method": (lambda: solve(method="mylstein"), "milstein"),
    "a method that is none": (lambda: solve(method=3), "method"),
    "an ODE's method": (lambda: solve(method="dopri5"), "method"),
    "Ito by midpoint": (lambda: solve(method="midpoint"), "srid2"),
    "Stratonovich by euler": (lambda: solve(calculus="stratonovich", method="euler"), "heun"),
    "general noise by srid2": (lambda: solve(diffusion=matrix, noise="general", method="srid2"), "euler"),
    "multiplicative noise by shark": (lambda: solve(method="shark"), "srid2"),
    "milstein of products": (
        lambda: sdesolve(SDE(f, g, "scalar", product=f, channels=1), Y, T, method="milstein"), "needs g itself"),
    "a negative step": (lambda: solve(step_size=-0.1), "step_size"),
    "no step": (lambda: solve(step_size=0), "step_size"),
    "a step that is no number": (lambda: solve(step_size="small"), "step_size"),
    "too many steps": (lambda: solve(step_size=1e-9), "max_steps"),
    "no attempts": (lambda: solve(max_steps=0), "max_steps"),
    "tolerances of 0": (lambda: solve(rtol=0.0, atol=0.0), "atol"),
    "a negative tolerance": (lambda: solve(rtol=-1.0), "rtol"),
    "unknown batch": (lambda: solve(batch="each"), "batch"),
    "unknown controller": (lambda: solve(controller="PIDD"), "controller"),
    "steps that are not nested": (lambda: solve(diffusion=matrix, noise="general", controller=PI()), "wrong limit"),
    "a controller that is none": (lambda: solve(controller=0.1), "controller"),
    "a bad limit": (lambda: Dyadic(min_step=-1.0), "min_step"),
    "another bad limit": (lambda: PID(first_step=0.0), "first_step"),
    "unknown adjoint": (lambda: solve(adjoint="backsolve"), "checkpoint"),
    "an adjoint that cannot go back": (lambda: solve(adjoint="reversible", step_size=0.1), "backwards"),
    "a negative seed": (lambda: solve(seed=-1), "seed"),
    "too few seeds": (lambda: solve(seed=[1, 2]), "2 seeds for 3"),
    "a seed of words": (lambda: solve(seed="zero"), "seed"),
    "seed and brownian": (lambda: solve(seed=1, brownian=bm()), "both"),
    "a path that is none": (lambda: solve(brownian=torch.ones(3, 2)), "Brownian path"),
    "a path of other samples": (lambda: solve(brownian=bm(2), method="euler"), "shape"),
    "a path of other channels": (lambda: solve(brownian=bm(3, (5,)), method="euler"), "shape"),
    "a path that ends before": (lambda: solve(brownian=bm(t1=0.5), method="euler"), "known from"),
    "a path without areas": (lambda: solve(brownian=bm(), method="srid2"), "area=True"),
    "an option of another library": (lambda: solve(dt=0.1), "dt"),
    "t_eval": (lambda: solve(t_eval=[1.0]), "ts="),
    "a norm that is none": (lambda: solve(norm=3), "norm"),
    "params of words": (lambda: solve(params=["w"]), "params"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_malformed_call_is_one_clear_error(name):
    call, words = CALLS[name]
    with pytest.raises(UsageError, match=words):
        call()


def test_there_are_sixty():
    assert len(CALLS) >= 60
