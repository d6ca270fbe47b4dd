"""Grids."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pfode
from pfode import grids
from pfode.errors import UsageError
from pfode.grids import optimised
from pfode.process import Process
from tests import peers, problems

PROCESSES = {
    **problems.ALL_PROCESSES,
    "zero-SNR": problems.zero_terminal_snr(),
    "cosine from alpha 0": pfode.VPCosine(t_max=1.0),
    "shifted": pfode.Flow(shift=3.0),
}
SEARCHED = "dm-nonuniform"  # takes a second where the others take a millisecond
INDEXED = ("trailing", "leading", "linspace")
QUICK = [name for name in grids.GRIDS if name != SEARCHED]
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

of_diffusers = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy 2 says it
each = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def ratio(process: Process, times: list[float]) -> Tensor:
    return torch.exp(-0.5 * process.log_snr(torch.tensor(times, dtype=torch.float64)))


def make(name: str, **config: Any) -> Any:
    """A scheduler of diffusers, where it is installed."""
    return getattr(pytest.importorskip("diffusers.schedulers"), name)(**config)


def stable_diffusion(scheduler: Any) -> pfode.VPDiscrete:
    return pfode.VPDiscrete(scheduler.alphas_cumprod)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def falls(nodes: list[float]) -> bool:
    return all(a > b for a, b in itertools.pairwise(nodes))


@each
@pytest.mark.parametrize("steps", [1, 2, 5, 20, 1000])
@pytest.mark.parametrize("name", QUICK)
def test_every_grid_on_every_process(name, steps, process):
    denoise = grids.times(process, name, steps)
    stop = grids.times(process, name, min(steps, 990), final="stop")
    for nodes, end in ((denoise, process.t_data), (stop, process.t_min)):
        assert nodes[-1] == end
        assert nodes[0] == process.t_max or name == "leading"
        assert falls(nodes)
        assert process.t_min <= nodes[-2] < nodes[0] <= process.t_max or steps == 1
        levels = torch.tensor(nodes[:-1], dtype=torch.float64)
        assert torch.isfinite(process.alpha(levels)).all()
        assert (process.sigma(levels) > 0).all()
    assert len(denoise) == steps + 1


@each
@pytest.mark.parametrize("name", QUICK)
def test_parts_of_the_range(name, process):
    """Between two inner levels, from an inner level to data, and next to pure noise."""
    inner = process.time(-2 * torch.log(torch.tensor([5.0, 0.1], dtype=torch.float64))).tolist()
    near = process.time(-2 * torch.log(torch.tensor([100.0], dtype=torch.float64))).item()
    for start, stop in (inner, (inner[0], None), (None, inner[1]), (None, near)):
        high = process.t_max if start is None else start
        if high <= (stop or process.t_data) or (name in INDEXED and stop == near):
            continue
        nodes = grids.times(process, name, 4, start=start, stop=stop)
        assert len(nodes) == 5
        assert nodes[0] == high or (name == "leading" and start is None)
        assert nodes[-1] == (process.t_data if stop is None else stop)
        assert falls(nodes)


@each
@pytest.mark.parametrize("name", QUICK)
def test_rising(name, process):
    nodes = grids.rising(process, name, 6)
    assert nodes == grids.times(process, name, 6, final="stop")[::-1]
    assert nodes[0] == process.t_min
    part = grids.rising(process, name, 3, start=nodes[1], stop=nodes[5])
    assert falls(part[::-1])
    assert (part[0], part[-1]) == (nodes[1], nodes[5])


class Operations(TorchDispatchMode):
    """Counts tensor operations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", QUICK)
def test_all_nodes_are_placed_at_once(name):
    """The number of operations does not grow with that of steps: benchmarks/latency.py says what they take."""
    counts = []
    for steps in (20, 500):
        with Operations() as operations:
            grids.times(problems.PROCESSES["VP"], name, steps)
        counts.append(operations.count)
    assert max(counts) < 100


LINES: dict[str, Callable[[Process, Tensor, Tensor], Tensor]] = {
    "karras(5)": lambda p, t, r: r ** (1 / 5),
    "log-snr": lambda p, t, r: torch.log(r),
    "polyexponential(2)": lambda p, t, r: torch.sqrt(torch.log(r / r[-1])),
    "cosine": lambda p, t, r: torch.atan(r),
    "cosine(0.5)": lambda p, t, r: torch.atan(r / 0.5),
    "beta": lambda p, t, r: incomplete_beta(0.6, 0.6, p.uniform_clock(t)),
    "beta(0.5,0.7)": lambda p, t, r: incomplete_beta(0.5, 0.7, p.uniform_clock(t)),
    "beta-sigma(1,2)": lambda p, t, r: incomplete_beta(1, 2, r),
    "shifted(beta,0.5)": lambda p, t, r: incomplete_beta(0.6, 0.6, p.uniform_clock(p.time(2 * torch.log(0.5 / r)))),
}


def incomplete_beta(a: float, b: float, values: Tensor) -> Tensor:
    inside = ((values - values[-1]) / (values[0] - values[-1])).clamp(0, 1)
    return torch.from_numpy(scipy.special.betainc(a, b, inside.numpy()))


@pytest.mark.parametrize("process", problems.ALL_PROCESSES)
@pytest.mark.parametrize("name", LINES)
def test_what_is_uniform(name, process):
    """The rule's defining quantity, worked out from the nodes, is a line."""
    process = problems.ALL_PROCESSES[process]
    start = process.time(-2 * math.log(20.0))  # where all is finite
    t = torch.tensor(grids.times(process, name, 9, "stop", start=min(start, process.t_max)), dtype=torch.float64)
    line = LINES[name](process, t, torch.exp(-0.5 * process.log_snr(t)))
    assert torch.allclose(line, torch.linspace(line[0].item(), line[-1].item(), 10, dtype=torch.float64), rtol=1e-8)


def test_karras_is_equation_5():
    nodes = grids.times(pfode.EDM(), "karras", 18)
    for i in range(18):
        expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert nodes[i] == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize(
    ("name", "peer", "options"),
    [
        ("karras", "get_sigmas_karras", {}),
        ("karras(3)", "get_sigmas_karras", {"rho": 3.0}),
        ("log-snr", "get_sigmas_exponential", {}),
        ("polyexponential", "get_sigmas_polyexponential", {}),
        ("polyexponential(1.5)", "get_sigmas_polyexponential", {"rho": 1.5}),
    ],
)
def test_grids_of_k_diffusion(name, peer, options, double):
    sigmas = getattr(peers.k_diffusion_sampling(), peer)(20, 0.002, 80.0, **options)
    assert grids.times(pfode.EDM(), name, 20) == pytest.approx(sigmas.tolist(), rel=1e-12)


def test_the_vp_grid_of_k_diffusion(double):
    """get_sigmas_vp is uniform in the time of VP, to t_min and then to 0."""
    sigmas = peers.k_diffusion_sampling().get_sigmas_vp(20)
    process = pfode.VP()
    nodes = [*grids.times(process, "time", 19, final="stop"), process.t_data]
    assert ratio(process, nodes).tolist() == pytest.approx(sigmas.tolist(), rel=1e-10)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("trailing", {"timestep_spacing": "trailing"}),
        ("leading", {"timestep_spacing": "leading"}),
        ("leading(1)", {"timestep_spacing": "leading", "steps_offset": 1}),
        ("linspace", {"timestep_spacing": "linspace"}),
    ],
)
def test_index_spacings_of_diffusers(name, config):
    """Every number of steps, rounding included, but where it gives more steps than asked for or begins at 0."""
    scheduler = make("DDIMScheduler", **STABLE_DIFFUSION, **config)
    process = stable_diffusion(scheduler)
    compared = 0
    for steps in range(2, 1000):
        scheduler.set_timesteps(steps)
        if len(scheduler.timesteps) == steps:
            assert grids.times(process, name, steps) == [*scheduler.timesteps.tolist(), -1], steps
            compared += 1
    assert compared > 930


@of_diffusers
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("trailing", {"timestep_spacing": "trailing"}),
        ("leading(1,1)", {"timestep_spacing": "leading", "steps_offset": 1}),
        ("linspace(1)", {"timestep_spacing": "linspace"}),
    ],
)
def test_index_spacings_of_diffusers_multistep(name, config):
    scheduler = make("DPMSolverMultistepScheduler", **STABLE_DIFFUSION, **config)
    for steps in (1, 2, 3, 7, 10, 20, 48, 50, 96, 333, 997):
        scheduler.set_timesteps(steps)
        assert grids.times(stable_diffusion(scheduler), name, steps) == [*scheduler.timesteps.tolist(), -1]


@of_diffusers
@pytest.mark.parametrize(("name", "option"), [("karras", "karras"), ("log-snr", "exponential"), ("beta-sigma", "beta")])
def test_sigma_grids_of_diffusers(name, option):
    scheduler = make("EulerDiscreteScheduler", **STABLE_DIFFUSION, **{f"use_{option}_sigmas": True})
    process = stable_diffusion(scheduler)
    for steps in (2, 5, 20):
        scheduler.set_timesteps(steps)
        ours = ratio(process, grids.times(process, name, steps))
        assert torch.allclose(ours, scheduler.sigmas.double(), rtol=1e-6)


@pytest.mark.parametrize(("name", "option"), [("time(7)", "karras"), ("beta", "beta")])
def test_sigma_grids_of_diffusers_on_flows(name, option):
    scheduler = make("FlowMatchEulerDiscreteScheduler", **{f"use_{option}_sigmas": True})
    for steps in (5, 20):
        scheduler.set_timesteps(steps)
        assert grids.times(pfode.Flow(), name, steps) == pytest.approx(scheduler.sigmas.tolist(), rel=1e-6)


@pytest.mark.parametrize("kind", ["static", "exponential", "linear"])
def test_shifts_of_diffusers(kind):
    """As the pipelines of SD3 and Flux lay them: evenly from 1 to 0, then shifted."""
    even = np.linspace(1, 1 / 10, 10)
    if kind == "static":
        shift = 3.0
        scheduler = make("FlowMatchEulerDiscreteScheduler", shift=shift)
        scheduler.set_timesteps(sigmas=even.tolist())
    else:
        shift = grids.flow_shift(1024, kind)
        scheduler = make("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True, time_shift_type=kind)
        scheduler.set_timesteps(sigmas=even.tolist(), mu=math.log(shift) if kind == "exponential" else shift)
    expected = pytest.approx(scheduler.sigmas.tolist(), rel=1e-6)
    assert grids.times(pfode.Flow(), grids.shifted("time", shift), 10) == expected
    assert grids.times(pfode.Flow(shift=shift), "time", 10) == expected


def test_the_shift_of_a_resolution():
    """mu as Flux interpolates it: 0.5 at 256 tokens, 1.15 at 4096."""
    assert grids.flow_shift(256) == pytest.approx(math.exp(0.5))
    assert grids.flow_shift(4096) == pytest.approx(math.exp(1.15))
    assert grids.flow_shift(2176) == pytest.approx(math.exp(0.825))
    assert grids.flow_shift(4096, "linear", max_shift=3.0) == pytest.approx(3.0)
    for bad in (lambda: grids.flow_shift(0), lambda: grids.flow_shift(256, "square")):
        with pytest.raises(UsageError):
            bad()
    with pytest.raises(UsageError, match="mu = "):
        grids.flow_shift(1, "linear", base_shift=-0.5)


@each
def test_shifts_keep_their_ends_and_compose(process):
    start, stop = process.time(2 * math.log(0.2)), process.time(2 * math.log(5.0))
    once = grids.times(process, "shifted(time,6)", 5, start=start, stop=stop)
    twice = grids.times(process, "shifted(shifted(time,2),3)", 5, start=start, stop=stop)
    assert twice == pytest.approx(once, rel=1e-9)
    scaled = ratio(process, grids.times(process, "shifted(karras,4)", 5, start=start, stop=stop))
    assert torch.allclose(scaled, ratio(process, grids.times(process, "karras", 5, start=start, stop=stop)), rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "key"), [("ays-sd", "StableDiffusion"), ("ays-sdxl", "StableDiffusionXL"), ("ays-svd", "")]
)
def test_ays_tables_of_diffusers(name, key):
    AysSchedules = pytest.importorskip("diffusers.schedulers.scheduling_utils").AysSchedules
    sigmas = AysSchedules[f"{key or 'StableDiffusionVideo'}Sigmas"]
    process = stable_diffusion(make("DDIMScheduler", **STABLE_DIFFUSION)) if key else pfode.EDM(0.002, 700.0)
    nodes = grids.times(process, name, 10)
    assert ratio(process, nodes)[1:].tolist() == pytest.approx(sigmas[1:], rel=1e-9)
    if key:
        assert nodes[:-1] == pytest.approx(AysSchedules[f"{key}Timesteps"], abs=0.7)
    finer = ratio(process, grids.times(process, name, 20))[1:-2:2].log()
    coarse = ratio(process, nodes)[:-1].log()
    assert torch.allclose(finer[:9], (coarse[:-1] + coarse[1:]) / 2, atol=1e-5)  # log-linear between the entries


def test_ays_on_other_ranges():
    """A part of the range is a part of the table; a wider range goes on with its outermost slopes."""
    whole = grids.times(pfode.EDM(0.029, 14.615), "ays-sd", 10, final="stop")
    assert grids.times(pfode.EDM(), "ays-sd", 4, start=whole[2], stop=whole[6]) == pytest.approx(whole[2:7])
    above = [14.615 * (14.615 / 6.475) ** 2, *whole[1:]]
    assert grids.times(pfode.EDM(0.029, above[0]), "ays-sd", 12, final="stop")[3:] == pytest.approx(whole[1:])


def test_time_runs_on_to_clean_data():
    assert grids.times(pfode.Flow(), "time", 4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert grids.times(pfode.Flow(), "time-quadratic", 4) == pytest.approx([1.0, 9 / 16, 0.25, 1 / 16, 0.0])
    assert grids.times(problems.zero_terminal_snr(), "time", 4) == [999.0, 749.0, 499.0, 249.0, -1.0]
    many = grids.times(pfode.Flow(), "time", 2000)
    assert many[-2:] == [pfode.Flow().t_min, 0.0]


def test_the_shift_of_a_flow():
    nodes = grids.times(pfode.Flow(shift=3.0), "time", 4)
    assert nodes == pytest.approx([3 * u / (1 + 2 * u) for u in (1.0, 0.75, 0.5, 0.25, 0.0)])
    part = grids.times(pfode.Flow(shift=3.0), "time", 2, start=nodes[1], stop=nodes[3])
    assert part == pytest.approx([nodes[1], nodes[2], nodes[3]])


def test_start_and_stop():
    nodes = grids.times(pfode.EDM(), "karras", 5, start=10.0, stop=0.5)
    assert (nodes[0], nodes[-1]) == (10.0, 0.5)
    assert grids.times(pfode.VE(), "log-snr", 3, start=0.5)[-1] == -math.inf


def bound(lambdas: list[float], power: float, truncated: int) -> float:
    """DM-NonUniform's objective by adaptive quadrature of Lagrange's polynomials."""
    n = len(lambdas) - 1
    signed, alone = [0.0] * n, 0.0
    for k in range(n):
        known = lambdas[k - min(k + 1, n - k, 3) + 1 : k + 1][::-1]
        terms = []
        for j, node in enumerate(known):
            others = known[:j] + known[j + 1 :]

            def basis(x: float, node: float = node, others: list[float] = others) -> float:
                return math.exp(x) * math.prod((x - o) / (node - o) for o in others)

            alpha, sigma = 1 / math.sqrt(1 + math.exp(-2 * node)), 1 / math.sqrt(1 + math.exp(2 * node))
            weight = scipy.integrate.quad(basis, lambdas[k], lambdas[k + 1], epsrel=1e-12)[0]
            terms.append(sigma**power / alpha * weight)
        if k < max(truncated, 1):
            alone += math.hypot(*terms)
        else:
            for j, term in enumerate(terms):
                signed[k - j] += term
    return alone + sum(map(abs, signed))


@pytest.mark.parametrize(("n", "truncated"), [(1, 3), (2, 3), (5, 3), (7, 3), (8, 0), (12, 0)])
def test_the_objective_of_dm_nonuniform(n, truncated):
    lambdas = sorted(
        torch.randn(n + 1, generator=torch.Generator().manual_seed(n), dtype=torch.float64).mul(2).tolist()
    )
    for power in (1.0, 2.0):
        ours = grids.dm_objective(torch.tensor(lambdas, dtype=torch.float64), power).item()
        assert ours == pytest.approx(bound(lambdas, power, truncated), rel=1e-9)


@pytest.mark.parametrize("process", ["EDM", "Flow", "zero-SNR"])
@pytest.mark.parametrize(("name", "start"), [("dm-nonuniform", "log-snr"), ("dm-nonuniform(2)", "time")])
def test_dm_nonuniform_beats_its_start(name, start, process):
    process, power = PROCESSES[process], 2.0 if "2" in name else 1.0
    for steps in (1, 2, 6):
        nodes = grids.times(process, name, steps, final="stop")
        assert len(nodes) == steps + 1
        assert (nodes[0], nodes[-1]) == (process.t_max, process.t_min)
        assert falls(nodes)
    before, after = (
        torch.clamp_min(-torch.log(ratio(process, times)), -math.log(80))
        for times in (grids.times(process, start, 6, final="stop"), nodes)
    )
    assert grids.dm_objective(after, power) < 0.7 * grids.dm_objective(before, power)
    assert grids.times(process, name, 7)[:-1] == nodes


def test_dm_nonuniform_with_many_steps():
    """Beyond 20 intervals the log-SNR of the optimum is interpolated; a range is optimised once."""
    process = pfode.VP()
    with torch.inference_mode():  # it works out gradients of its own
        optimum = grids.times(process, SEARCHED, 20, final="stop")
    before = optimised._optimised.cache_info().misses
    many = grids.times(process, SEARCHED, 1000, final="stop")
    assert optimised._optimised.cache_info().misses == before
    assert many[::50] == pytest.approx(optimum, rel=1e-9)
    assert falls(many)
    assert grids.rising(process, SEARCHED, 20) == optimum[::-1]


@pytest.mark.parametrize(
    "name",
    [
        *grids.GRIDS,
        "karras(5)",
        "beta(0.5,0.7)",
        "time(3)",
        "leading(1,1)",
        "shifted(karras(5),2.5)",
        "shifted(shifted(beta(0.5,0.7),2),0.1)",
        "dm-nonuniform(2)",
    ],
)
def test_names_are_read_and_written(name):
    made = grids.grid(name)
    again = grids.grid(made.name)
    assert again.name == made.name
    assert made.name == {"shifted": "shifted(time,3)"}.get(name, name)
    assert grids.grid(f" {name} ".replace(",", " , ").replace("(", " ( ", 1)).name == made.name
    if SEARCHED not in name:
        assert grids.times(pfode.VP(), again, 5) == grids.times(pfode.VP(), made, 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("karas", "did you mean 'karras'"),
        ("shifted(karas,3)", "did you mean 'karras'"),
        ("karras(1,2)", "got 2 parameters, takes rho"),
        ("log-snr(1)", "got 1 parameters, takes none"),
        ("ays-sd(1)", "takes none"),
        ("karras()", "need a number, got ''"),
        ("karras(five)", "need a number, got 'five'"),
        ("karras(0)", "rho"),
        ("beta(nan)", "beta: a"),
        ("leading(0.5)", "leading: offset"),
        ("linspace(2)", "drop"),
        ("shifted(3)", "need a grid first"),
        ("shifted(time,-1)", "shift"),
        ("karras(5", "cannot read"),
        ("karras 5", "cannot read"),
        ("", "cannot read"),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        grids.grid(name)


def test_given_times():
    given = torch.tensor([70.0, 11.0, 3.0, 0.0], dtype=torch.float64)
    assert grids.times(pfode.EDM(), given, 3) == given.tolist()
    assert grids.times(pfode.EDM(), [0.002, 3.0, 80.0], 2) == [0.002, 3.0, 80.0]
    assert grids.rising(pfode.EDM(), [0.002, 3.0, 80.0], 2) == [0.002, 3.0, 80.0]
    assert grids.rising(pfode.EDM(), given[:-1], 2) == [3.0, 11.0, 70.0]
    for bad in (given, given.flip(0)):
        with pytest.raises(UsageError, match="time 0 lies outside"):
            grids.rising(pfode.EDM(), bad, 3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"rule": "karas", "steps": 5},
        {"rule": "karras", "steps": 0},
        {"rule": "karras", "steps": -3},
        {"rule": "karras", "steps": 2.5},
        {"rule": "karras", "steps": True},
        {"rule": "karras", "steps": 5, "final": "zero"},
        {"rule": "karras", "steps": 5, "start": 100.0},
        {"rule": "karras", "steps": 5, "start": 1.0, "stop": 2.0},
        {"rule": "trailing", "steps": 1001},
        {"rule": "linspace(1)", "steps": 1000},
        {"rule": "leading(900)", "steps": 500},
        {"rule": [5.0, 5.0, 1.0], "steps": 2},
        {"rule": [1.0, 2.0, 1.5], "steps": 2},
        {"rule": [2.0, 1.0, 1.5], "steps": 2},
        {"rule": [0.0, 1.0, 2.0], "steps": 2},
        {"rule": [1.0, 100.0], "steps": 1},
        {"rule": [3.0], "steps": 1},
        {"rule": [[3.0, 1.0]], "steps": 1},
        {"rule": [100.0, 1.0], "steps": 1},
        {"rule": [1.0, 1e-4, 0.0], "steps": 2},
        {"rule": [1.0, float("nan"), 0.1], "steps": 2},
        {"rule": [1.0, -1.0], "steps": 1},
    ],
)
def test_bad_grids_are_refused(arguments):
    with pytest.raises(UsageError):
        grids.times(pfode.EDM(), **arguments)


def test_bad_parameters_are_refused():
    bad: list[Callable[[], object]] = [
        lambda: grids.karras(0.0),
        lambda: grids.time(-1.0),
        lambda: grids.shifted(3.0),  # type: ignore[arg-type]
        lambda: grids.flow_shift(256, base_seq_len=4096),
    ]
    for call in bad:
        with pytest.raises(UsageError):
            call()
