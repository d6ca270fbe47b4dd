"""torchsde's names on pfode: its surface, and what is right here that is wrong there. Its own suite: tests/upstream."""

import pytest
import torch
from torch import nn

from pfode.compat import torchsde
from pfode.compat.torchsde import settings


class Field(nn.Module):
    noise_type, sde_type = "diagonal", "ito"

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.calls = {"f": 0, "g": 0}

    def f(self, t, y):
        self.calls["f"] += 1
        return -self.rate * y

    def g(self, t, y):
        self.calls["g"] += 1
        return 0.3 * torch.cos(y)

    def h(self, t, y):
        return -y


class Stratonovich(Field):
    sde_type = "stratonovich"


Y0 = torch.ones(4, 3, dtype=torch.float64)
TS = torch.tensor([0.0, 0.13, 0.5], dtype=torch.float64)


def interval(levy="none", **more):
    size = {"size": (4, 3), "dtype": torch.float64, "entropy": 3, **more}
    return torchsde.BrownianInterval(0.0, 0.5, levy_area_approximation=levy, **size)


METHODS = [("euler", Field), ("milstein", Field), ("srk", Field)]
METHODS += [(m, Stratonovich) for m in ("midpoint", "heun", "euler_heun", "milstein", "log_ode", "reversible_heun")]


@pytest.mark.parametrize(("method", "kind"), METHODS)
def test_the_adjoint_is_exact(method, kind):
    """Where torchsde's is off by 1e-2 to 1e-5; also at output times that are no steps."""
    sde, found = kind(), []
    levy = {"srk": "space-time", "log_ode": "foster"}.get(method, "none")
    for call in (torchsde.sdeint, torchsde.sdeint_adjoint):
        ys = call(sde, Y0, TS, bm=interval(levy), method=method, dt=0.04)
        found.append(torch.autograd.grad(ys.square().sum(), sde.rate)[0])
    assert torch.allclose(*found, rtol=1e-12)


def test_srk_calls_three_and_four_times_a_step():
    sde = Field()
    with torch.no_grad():
        torchsde.sdeint(sde, Y0, [0.0, 1.0], dt=0.1, method="srk")
    assert sde.calls["f"] == 3 * 10 + 1  # and once each where sizes are compared, g twice
    assert sde.calls["g"] == 4 * 10 + 2


def test_float32_times_make_no_extra_step():
    sde = Field().float()
    with torch.no_grad():
        torchsde.sdeint(sde, Y0.float(), torch.tensor([0.0, 1.0]), dt=0.01, method="euler")
    assert sde.calls["f"] == 101


def test_log_ratios_and_extra_state():
    sde = Field()
    ys, ratio = torchsde.sdeint(sde, Y0, TS, dt=0.05, logqp=True)
    assert ys.shape == (3, 4, 3)
    assert ratio.shape == (2, 4)
    assert (ratio > 0).all()
    plain, state = torchsde.sdeint(Stratonovich(), Y0, TS, dt=0.05, method="reversible_heun", extra=True, bm=interval())
    back = torchsde.sdeint(
        Stratonovich(), plain[1], TS[1:], dt=0.05, method="reversible_heun", bm=interval(), extra_solver_state=state
    )
    assert back.shape == (2, 4, 3)
    assert [tuple(part.shape) for part in state] == [(4, 3)] * 3


def test_a_brownian_motion_does_not_depend_on_what_was_asked_before():
    one, other = interval("space-time"), interval("space-time")
    other(0.1, 0.2)
    first, second = one(0.05, 0.3, return_U=True), other(0.05, 0.3, return_U=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    w = torch.randn(4, 3, dtype=torch.float64)
    assert torch.allclose(interval(W=w)(0.0, 0.5), w)
    tree = torchsde.BrownianTree(t0=0.0, w0=w, w1=2 * w, entropy=1)
    assert torch.allclose(tree(1.0), 2 * w)
    with pytest.warns(UserWarning, match="optimised"):
        one(0.3)
    with pytest.raises(RuntimeError, match="ta <= tb"):
        one(0.3, 0.2)


@pytest.mark.parametrize(
    "change",
    [
        {"method": "blah"},
        {"method": "midpoint"},
        {"ts": [0.0, 0.0]},
        {"ts": "now"},
        {"y0": torch.ones(3)},
        {"bm": interval(size=(4, 2))},
        {"bm": interval(), "method": "srk"},
    ],
)
def test_what_torchsde_refuses_is_a_value_error(change):
    call = {"sde": Field(), "y0": Y0, "ts": TS, **change}
    with pytest.raises(ValueError):  # noqa: PT011  (the kind is the contract)
        torchsde.sdeint(**call)


def test_settings_are_containers_of_words():
    assert "euler" in settings.METHODS
    assert settings.NOISE_TYPES.all() == ["additive", "diagonal", "general", "scalar"]
    assert str(settings.SDE_TYPES) == "['ito', 'stratonovich']"
