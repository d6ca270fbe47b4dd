"""Networks under torch.func: derivatives forwards and backwards, one call mapped over samples and times."""

from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import jacfwd, jacrev, jvp, vjp, vmap

import pfode
from pfode.scores.denoiser import Denoiser
from pfode.scores.networks.diffusers import Adapter
from tests.scores import pickled, small, tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array_:DeprecationWarning",
    "ignore:There is a performance drop",
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning",  # torch's own, at its first jvp
)
T = torch.tensor(0.4, dtype=torch.float64)


def theirs(net: Any) -> Denoiser:
    name = type(net).__name__
    return Denoiser(Adapter(net, name, dict(net.config)), pfode.VP(), "eps", time_scale=1000.0)


def denoiser(name: str) -> tuple[Denoiser, tuple[int, ...]]:
    """A denoiser in float64 and the shape of a sample."""
    if name in pickled.NETWORKS:
        den, shape = Denoiser(pickled.network(name), pfode.EDM(), "edm", labels=["0", "1", "2"]), (2, 8, 8)
    elif name == "unet of diffusers":
        den, shape = theirs(tiny.unet()), (3, 8, 8)
    elif name == "dit of diffusers":
        den, shape = theirs(tiny.dit()), (4, 4, 4)
    elif name == "small":
        den, shape = small.denoiser(), (1, 8, 8)
    else:
        den = pfode.load(name)
        assert den.shape is not None
        shape = den.shape
    return den.to(dtype=torch.float64), shape


NAMES = ["small", "digits", *pickled.NETWORKS, "unet of diffusers", "dit of diffusers"]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_derivatives_agree_with_differences(name, batch):
    den, shape = denoiser(name)
    label = None if name == "unet of diffusers" else torch.arange(batch)
    cond = {} if label is None else {"label": label}
    torch.manual_seed(0)
    x, v, w = torch.randn(3, batch, *shape, dtype=torch.float64)

    def f(x: torch.Tensor) -> torch.Tensor:
        return den(x, T, **cond)

    near = (f(x + 1e-5 * v) - f(x - 1e-5 * v)) / 2e-5
    value, forwards = jvp(f, (x,), (v,))[:2]
    pull: Any = vjp(f, x)[1]
    torch.testing.assert_close(value, f(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(forwards, near, rtol=1e-4, atol=1e-5 * float(near.abs().max()))
    torch.testing.assert_close((pull(w)[0] * v).sum(), (forwards * w).sum(), rtol=1e-7, atol=1e-7)
    with forward_ad.dual_level():  # without torch.func
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent
    torch.testing.assert_close(tangent, forwards, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_mapped_over_samples_and_times(name):
    den, shape = denoiser(name)
    x, t = torch.randn(3, *shape, dtype=torch.float64), torch.tensor([0.2, 0.4, 0.6], dtype=torch.float64)
    torch.testing.assert_close(vmap(lambda x: den(x[None], T)[0])(x), den(x, T), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(vmap(lambda x, t: den(x[None], t)[0])(x, t), den(x, t), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["small", "ddpm++", "dit of diffusers", "unet of diffusers"])
def test_whole_jacobians(name):
    den, shape = denoiser(name)
    x = torch.randn(1, *shape, dtype=torch.float64)

    def f(x: torch.Tensor) -> torch.Tensor:
        return den(x, T).flatten()[:12]

    torch.testing.assert_close(jacfwd(f)(x), jacrev(f)(x), rtol=1e-7, atol=1e-9)


def test_the_derivative_in_time():
    den, shape = denoiser("small")
    x = torch.randn(2, *shape, dtype=torch.float64)
    slope = jvp(lambda t: den(x, t), (T,), (torch.ones_like(T),))[1]
    near = (den(x, T + 1e-3) - den(x, T - 1e-3)) / 2e-3
    torch.testing.assert_close(slope, near, rtol=0.02, atol=0.02 * float(near.abs().max()))  # waves are in float32
