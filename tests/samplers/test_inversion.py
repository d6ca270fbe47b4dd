"""Encoding and decoding: exactly invertible recipes against their papers' loops, the others against the exact flow."""

import dataclasses
from typing import Any

import pytest
import torch

import pfode
from pfode import Plan, iterate, run
from pfode.errors import NumericalError, UsageError
from pfode.samplers import make_plan
from pfode.samplers.inversion import Pair, decode, encode
from tests import problems

INVERTIBLE = ["o-belm", "bdia", "edict"]
MIX = problems.mixture(pfode.EDM())
DATA = MIX.sample(6, seed=1)


def pair(denoiser, x, *args: Any, **options: Any) -> Pair:
    z = encode(denoiser, x, *args, **options)
    assert isinstance(z, Pair)
    return z


def chart(process: pfode.Process) -> str | None:
    """One that holds at both ends."""
    return "flow" if process.alpha(process.t_max) == 0 else None


@pytest.mark.parametrize("name", INVERTIBLE)
@pytest.mark.parametrize("process", problems.ALL_PROCESSES)
def test_invertible_recipes_return_the_data(name, process):
    mix = problems.mixture(problems.ALL_PROCESSES[process])
    x = mix.sample(16, seed=1)
    z = pair(mix, x, 20, name, chart=chart(mix.process))
    assert z.x.shape == z.previous.shape == x.shape
    assert z.x.dtype == z.previous.dtype == torch.float64
    assert (decode(mix, z, 20, name, chart=chart(mix.process)) - x).abs().max() < 2e-12
    scale = mix.process.sigma(mix.process.t_max)
    # finite, though leapfrog magnifies its start, and BDIA by 1 / gamma in every step
    assert (z.previous / scale).abs().max() < (1e4 if name == "bdia" else 30)


@pytest.mark.parametrize("name", INVERTIBLE)
def test_invertible_recipes_return_a_picture(name):
    """1e-5 in float32, 1e-10 in float64, 20 steps of a real network (whose own precision is float32)."""
    net = pfode.load("avatars")
    x = pfode.sample(net, 1, steps=8, seed=3).x
    assert x.dtype == torch.float32
    z = pair(net, x, 20, name)
    again = decode(net, z, 20, name)
    assert again.dtype == torch.float64
    assert (again - x).abs().max() < 1e-10
    assert (again.float() - x).abs().max() < 1e-5


def eps(denoiser, x, t):
    alpha, sigma = denoiser.process.alpha(t), denoiser.process.sigma(t)
    return (x - alpha * denoiser(x, torch.tensor(t, dtype=torch.float64))) / sigma


def ddim(denoiser, x, n, t, s):
    """x moved from t to s along the noise n."""
    p = denoiser.process
    return p.alpha(s) / p.alpha(t) * x + (p.sigma(s) - p.alpha(s) / p.alpha(t) * p.sigma(t)) * n


def belm(denoiser, x, times):
    """O-BELM's inversion (Wang et al. 2024): x_i from x_{i-2}, x_{i-1}; its first step is DDIM's."""
    p, (*_, before, last) = denoiser.process, times
    ratio = [p.sigma(t) / p.alpha(t) for t in times]
    xs = [x, ddim(denoiser, x, eps(denoiser, x, last), last, before)]
    for i in range(len(times) - 3, -1, -1):
        h, h_before = ratio[i] - ratio[i + 1], ratio[i + 1] - ratio[i + 2]
        y, y_before = xs[-1] / p.alpha(times[i + 1]), xs[-2] / p.alpha(times[i + 2])
        q = (h / h_before) ** 2
        n = eps(denoiser, xs[-1], times[i + 1])
        xs.append(p.alpha(times[i]) * (q * y_before + (1 - q) * y + h * (h + h_before) / h_before * n))
    return Pair(xs[-2], xs[-1])


def bdia(denoiser, x, times, gamma=0.9):
    """BDIA's inversion (Zhang et al. 2024): z_{i+1} = DDIM(z_i, i + 1) + (z_{i-1} - DDIM(z_i, i - 1)) / gamma."""
    xs = [x, ddim(denoiser, x, eps(denoiser, x, times[-1]), times[-1], times[-2])]
    for i in range(len(times) - 2, 0, -1):
        n = eps(denoiser, xs[-1], times[i])
        back, on = (ddim(denoiser, xs[-1], n, times[i], s) for s in (times[i + 1], times[i - 1]))
        xs.append(on + (xs[-2] - back) / gamma)
    return Pair(xs[-2], xs[-1])


def edict(denoiser, x, times, p=0.8):
    """EDICT's inversion (Wallace et al. 2023): two copies; state 0 is y_T, state 1 the inner x of the first step.

    As in the catalogue, the inner x is evaluated at its own level s.
    """
    y = inner = x
    for i in range(len(times) - 1, 0, -1):
        t, s = times[i - 1], times[i]
        y_inner = (y - (1 - p) * x) / p
        inner = (x - (1 - p) * y_inner) / p
        y = undone(denoiser, y_inner, eps(denoiser, inner, s), t, s)
        x = undone(denoiser, inner, eps(denoiser, y, t), t, s)
    return Pair(inner, y)


def undone(denoiser, x, n, t, s):
    """What DDIM moves from t to s, to x."""
    zero = torch.zeros_like(x)
    return (x - ddim(denoiser, zero, n, t, s)) * denoiser.process.alpha(t) / denoiser.process.alpha(s)


@pytest.mark.parametrize(
    ("name", "by_hand", "options"),
    [("o-belm", belm, {}), ("bdia", bdia, {"gamma": 0.9}), ("edict", edict, {"p": 0.8, "chart": "ddim"})],
)
@pytest.mark.parametrize("process", ["EDM", "VP", "VPCosine"])
def test_the_pair_is_that_of_the_papers(name, by_hand, options, process):
    mix = problems.mixture(problems.ALL_PROCESSES[process])
    times = make_plan(name, mix.process, 12, final="stop").times.tolist()
    z, expected = pair(mix, DATA, 12, name, **options), by_hand(mix, DATA, times)
    for state, by_the_loop in zip(z, expected, strict=True):
        assert torch.allclose(state, by_the_loop, rtol=0, atol=1e-6 * by_the_loop.abs().max().item())


@pytest.mark.parametrize("name", INVERTIBLE)
def test_decode_is_the_plan_itself(name):
    """From its first two states on, to the lattice; and encode takes the same way back."""
    plan = make_plan(name, MIX.process, 12, final="stop")
    every = dataclasses.replace(plan, step=torch.arange(plan.nfe), node=torch.ones(plan.nfe + 1))
    start = 80 * pfode.noise.normal(range(6), 0, (2,), torch.float64)
    points = [point.x for point in iterate(every, MIX, start)]
    found = decode(MIX, (points[0], start), plan=plan)
    assert torch.allclose(found, run(plan, MIX, start), rtol=0, atol=1e-8)


@pytest.mark.parametrize("factor", [0.3, 0.9, 1.0, 1.7])
@pytest.mark.parametrize("prediction", ["x0", "v", "flow"])
def test_any_recursion_with_r_prev_is_undone(factor, prediction):
    """To the lattice of the data (2^-39 off at most), whatever its numbers, though the walk magnifies."""
    g = torch.Generator().manual_seed(0)
    n, t = 8, torch.linspace(5, 0.5, 9, dtype=torch.float64)
    plan = Plan(
        process=MIX.process, prediction=prediction, t=t[:-1], time=t, alpha=torch.ones(n + 1), sigma=t,
        r=torch.randn(n, dtype=torch.float64, generator=g), r_prev=torch.full((n,), factor),
        b=torch.randn(n, 1, dtype=torch.float64, generator=g), c=torch.zeros(n, 0), init=torch.tensor([1.0, 0.0]),
        step=torch.arange(n), node=torch.ones(n + 1),
    )  # fmt: skip
    assert (decode(MIX, encode(MIX, DATA, plan=plan), plan=plan) - DATA).abs().max() < 2e-12


def test_a_float32_network_is_inverted_too():
    """Where rounding of the state would show in what the network sees."""

    class Coarse:
        process, shape = MIX.process, (2,)

        def __call__(self, x, t, **cond):
            return MIX(x.float(), t.float()).to(x.dtype)

    for name in INVERTIBLE:
        for seed in range(5):
            x = MIX.sample(64, seed=seed)
            assert (decode(Coarse(), encode(Coarse(), x, 20, name), 20, name) - x).abs().max() < 2e-12


@pytest.mark.parametrize(
    ("name", "calls"), [("o-belm", (8, 7)), ("bdia", (8, 7)), ("edict", (15, 15)), ("heun", (16, 16))]
)
def test_calls(name, calls):
    class Counting:
        process, shape, calls = MIX.process, (2,), 0

        def __call__(self, x, t, **cond):
            self.calls += 1
            return MIX(x, t)

    net = Counting()
    z = encode(net, DATA, 8, name)
    there = net.calls
    decode(net, z, 8, name)
    assert (there, net.calls - there) == calls


@pytest.mark.parametrize("process", problems.PROCESSES)
@pytest.mark.parametrize("name", ["heun", "exp-ab2", "dpm++2m", "ipndm2"])
def test_ordinary_recipes_encode_with_their_order(name, process):
    """To the exact flow of a Gaussian, between two times of the process."""
    bed = problems.gaussian(problems.PROCESSES[process])
    high, low = (bed.process.time(-2 * torch.tensor(s, dtype=torch.float64).log()).item() for s in (2.0, 0.25))
    x = problems.start(problems.gaussian(bed.process), low)
    errors = []
    for n in (40, 80):
        z = encode(bed, x, n, name, start=high, stop=low)
        assert isinstance(z, torch.Tensor)
        back = decode(bed, z, n, name, start=high, stop=low)
        errors.append((problems.rms(z, bed.flow(x, low, high)), problems.rms(back, x)))
    (there, around), (finer, finer_around) = errors
    assert 3.2 < there / finer < 5
    assert there < 2e-2
    assert finer_around < 0.4 * around < 2e-2


def test_a_process_with_its_usual_ends():
    for name, process in problems.PROCESSES.items():
        bed = problems.gaussian(process)
        x = bed.sample(8, seed=1)
        z = encode(bed, x, 100, "heun", chart=chart(process))
        assert isinstance(z, torch.Tensor)
        exact = bed.flow(x, process.t_min, process.t_max)
        assert problems.rms(z, exact) < 2e-2 * exact.square().mean().sqrt(), name
        assert problems.rms(decode(bed, z, 100, "heun", chart=chart(process)), x) < 2e-2, name


def test_plans_and_grids_of_ones_own():
    plan = make_plan("heun", MIX.process, 10, final="stop")
    rising = make_plan("heun", MIX.process, grid=plan.times.flip(0))
    z = encode(MIX, DATA, 10, "heun")
    assert isinstance(z, torch.Tensor)
    for other in (
        encode(MIX, DATA, plan=rising),
        encode(MIX, DATA, sampler="heun", grid=plan.times),
        encode(MIX, DATA, sampler="heun", grid=plan.times.flip(0)),
        encode(MIX, DATA, nfe=20, sampler="heun"),
        run(rising, MIX, DATA),
    ):
        assert isinstance(other, torch.Tensor)
        assert torch.equal(other, z)
    assert torch.equal(decode(MIX, z, plan=plan), decode(MIX, z, 10, "heun"))
    denoised = make_plan("heun", MIX.process, 10)
    assert torch.allclose(decode(MIX, z, plan=denoised), run(denoised, MIX, z))
    belm = make_plan("o-belm", MIX.process, 10, final="stop")
    assert torch.equal(encode(MIX, DATA, plan=belm)[0], pair(MIX, DATA, 10, "o-belm").x)
    assert torch.allclose(decode(MIX, encode(MIX, DATA, plan=belm), plan=belm), DATA)
    for one, other in ((encode(MIX, DATA), encode(MIX, DATA, 20)),):
        assert isinstance(one, torch.Tensor)
        assert isinstance(other, torch.Tensor)
        assert torch.equal(one, other)


def test_dtypes_and_batches():
    x = DATA.float()
    z = encode(MIX, x, 5, "heun")
    assert isinstance(z, torch.Tensor)
    assert z.dtype == torch.float32
    assert encode(MIX, x, 5, "heun", dtype=torch.float64)[0].dtype == torch.float64
    exact = pair(MIX, x, 5, "o-belm", dtype=torch.float32)
    assert exact.x.dtype == torch.float64
    assert decode(MIX, exact, 5, "o-belm", dtype=torch.float32).dtype == torch.float32
    assert decode(MIX, (exact.x.float(), exact.previous.float()), 5, "o-belm").dtype == torch.float32
    for batch in (1, 4):
        some = pair(MIX, x, 5, "o-belm", batch=batch)
        assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(some, exact, strict=True))
        assert torch.allclose(decode(MIX, some, 5, "o-belm", batch=batch), x.double(), rtol=0, atol=2e-12)


def test_classes_and_guidance():
    net = pfode.load("digits")
    x = pfode.sample(net, 3, steps=3, label=[1, 2, 3]).x
    how: dict[str, Any] = {"label": [1, 2, 3], "guidance": 2.0, "batch": 2}
    z = encode(net, x, 6, "o-belm", **how)
    assert (decode(net, z, 6, "o-belm", **how) - x).abs().max() < 1e-11
    changes: list[dict[str, Any]] = [{"label": [4, 5, 6]}, {"guidance": None}]
    for change in changes:
        assert (decode(net, z, 6, "o-belm", **how | change) - x).abs().max() > 0.1
    plain = encode(net, x, 6, "heun", **how)
    for change in changes:
        other = encode(net, x, 6, "heun", **how | change)
        assert isinstance(plain, torch.Tensor)
        assert isinstance(other, torch.Tensor)
        assert (other - plain).abs().max() > 0.1


def test_nan_is_never_silent():
    class Sick:
        process, shape = MIX.process, (2,)

        def __call__(self, x, t, **cond):
            d = MIX(x, t)
            d[-1] = torch.nan if t > 5 else d[-1]
            return d

    for name in ("o-belm", "heun"):
        with pytest.raises(NumericalError, match=r"sample 5 is not finite after step \d+ of"):
            encode(Sick(), DATA, 8, name, batch=6)
    with pytest.raises(NumericalError, match="sample 2 is not finite"):
        encode(Sick(), DATA, 8, "bdia", batch=3)


PLAN = make_plan("heun", MIX.process, 4, final="stop")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "euler-a"}, "draws noise"),
        ({"sampler": "dpm++2m-sde"}, "draws noise"),
        ({"plan": make_plan("ddpm", MIX.process, 4)}, "draws noise"),
        ({"sampler": "ipndm2", "afs": 0.5}, "leave afs out"),
        ({"sampler": "o-belm", "afs": 0.5}, "leave afs out"),
        ({"plan": PLAN}, "needs? one whose times rise"),
        ({"plan": PLAN, "steps": 4}, "settles"),
        ({"plan": PLAN, "chart": "flow"}, "settles"),
        ({"plan": PLAN, "p": 0.5}, "settles"),
        ({"plan": "heun"}, "need a Plan"),
        ({"final": "denoise", "sampler": "heun"}, "ends at clean data"),
        ({"final": "denoise", "sampler": "o-belm"}, "ends at clean data"),
        ({"grid": [80.0, 1.0, 0.0]}, "ends at clean data"),
        ({"sampler": "o-belm", "grid": [80.0, 1.0, 0.1], "steps": 5}, "make 2 steps"),
        ({"sampler": "o-belm", "grid": [0.1, 0.5, 1.0, 80.0]}, "leads from data to noise"),
        ({"grid": [80.0, 1.0, 0.1], "start": 5.0}, "its own ends"),
        ({"sampler": "o-bellm"}, "did you mean 'o-belm'"),
        ({"x": torch.zeros(3, 2).long(), "sampler": "edict"}, "floating-point"),
        ({"x": torch.zeros(3), "sampler": "edict"}, "floating-point"),
        ({"x": torch.zeros(0, 2), "sampler": "edict"}, "floating-point"),
        ({"x": [[0.0, 1.0]], "sampler": "edict"}, "floating-point"),
        ({"x": torch.zeros(3, 2).long()}, "floating-point"),
        ({"batch": 0, "sampler": "edict"}, "batch"),
        ({"denoiser": None}, "denoiser"),
    ],
)
def test_bad_calls_of_encode(options, message):
    with pytest.raises(UsageError, match=message):
        encode(**{"denoiser": MIX, "x": DATA, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "o-belm"}, "decodes the pair of its first two states"),
        ({"z": (DATA, DATA), "sampler": "heun"}, "decodes one state"),
        ({"z": (DATA,), "sampler": "o-belm"}, "decodes the pair"),
        ({"z": (DATA, DATA[:2]), "sampler": "o-belm"}, "tensors of one shape"),
        ({"plan": make_plan("heun", MIX.process, grid=[0.1, 1.0, 80.0])}, "needs one whose times fall"),
        ({"sampler": "euler-a"}, "draws noise"),
        ({"z": (DATA, DATA), "sampler": "bdia", "gamma": 0.0}, "decodes one state"),
        ({"z": (DATA, DATA), "sampler": "edict", "batch": 0}, "batch"),
    ],
)
def test_bad_calls_of_decode(options, message):
    with pytest.raises(UsageError, match=message):
        decode(**{"denoiser": MIX, "z": DATA, **options})


def test_plans_that_cannot_be_walked_back():
    with pytest.raises(UsageError, match=r"row 1 has r' = 0.*\n.*chart=\"flow\""):
        encode(problems.mixture(pfode.Flow()), DATA, 8, "o-belm", chart="ddim")
    plan = make_plan("o-belm", MIX.process, 4, final="stop")
    wide = dataclasses.replace(plan, b=torch.cat([plan.b, torch.ones(4, 1)], 1))
    with pytest.raises(UsageError, match="row 1 uses an earlier prediction"):
        encode(MIX, DATA, plan=wide)
    broken = dataclasses.replace(plan, r_prev=torch.tensor([0.0, 1.0, 0.0, 1.0]))
    with pytest.raises(UsageError, match="row 2 has r' = 0"):
        decode(MIX, (DATA, DATA), plan=broken)


@pytest.mark.parametrize("process", [pfode.Flow(), pfode.VPCosine(t_max=1.0), problems.zero_terminal_snr()])
@pytest.mark.parametrize("name", ["o-belm", "bdia", "edict", "auto", "ddim", "dpm++2m", "rk45"])
def test_encoding_from_pure_noise_needs_no_chart(process, name):
    """Where alpha = 0 at the first time, the default chart is one that holds there."""
    denoiser = problems.mixture(process)
    x = denoiser.sample(2, seed=3).double()
    steps = None if name == "rk45" else 20
    z = encode(denoiser, x, steps, name, dtype=torch.float64)
    back = decode(denoiser, z, steps, name, dtype=torch.float64)
    assert problems.rms(back, x) < (1e-11 if name in ("o-belm", "bdia", "edict") else 0.2)


@pytest.mark.parametrize("process", [pfode.EDM(), pfode.VP(), pfode.Flow()])
@pytest.mark.parametrize(
    ("name", "steps", "options"),
    [("bdia", 50, {}), ("edict", 200, {}), ("o-belm", 300, {}), ("bdia", 300, {"gamma": 1.0}), ("bdia", 90, {})],
)
def test_long_encodings_are_exact_or_an_error(process, name, steps, options):
    denoiser = problems.mixture(process)
    x = denoiser.sample(2, seed=4).double()
    if (name, steps) == ("bdia", 90):
        with pytest.raises(NumericalError, match=r"bdia: sample 0 grows at t = (.|\n)*o-belm"):
            encode(denoiser, x, steps, name)
        return
    back = decode(denoiser, encode(denoiser, x, steps, name, **options), steps, name, **options)
    assert (back - x).abs().max() <= 2.0**-41


def test_steps_that_grow_towards_the_data_are_exact():
    """Where r' > 1 the spacing of the states falls towards the noise."""
    denoiser = problems.mixture(pfode.Flow())
    x = denoiser.sample(2, seed=4).double()
    times = 1 - torch.linspace(0, 0.97**0.5, 60, dtype=torch.float64) ** 2
    plan = make_plan("o-belm", denoiser.process, grid=times, chart="flow")
    assert plan.r_prev.max() > 1.1
    assert (decode(denoiser, encode(denoiser, x, plan=plan), plan=plan) - x).abs().max() <= 2.0**-39
