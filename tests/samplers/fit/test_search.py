"""Searched grids: GITS."""

import itertools

import pytest
import torch

import pfode
from pfode import grids, noise, run
from pfode.errors import UsageError
from pfode.process import Process
from pfode.samplers.catalogue import make_plan
from pfode.samplers.fit.search import Jumps, gits, measure_jumps
from pfode.scores.exact import Gaussian, GaussianMixture
from tests import problems

PROCESSES = {**problems.ALL_PROCESSES, "zero-SNR": problems.zero_terminal_snr()}


def bed(process: Process) -> GaussianMixture:
    """Eight clusters in 16 dimensions, their variances from 1 to 1/1000 of 0.1."""
    draw = torch.Generator().manual_seed(0)
    means = 0.5 * torch.randn(8, 16, generator=draw, dtype=torch.float64)
    return GaussianMixture(
        means, std=(0.1 * torch.logspace(0, -3, 16, dtype=torch.float64)).sqrt().expand(8, -1), process=process
    )


@pytest.mark.parametrize("process", [pfode.EDM(), pfode.VP()], ids=["EDM", "VP"])
def test_gits_beats_hand_made_grids(process):
    """The median error of 64 samples it was not fitted to; a few land in another cluster with any grid."""
    denoiser = bed(process)
    jumps = measure_jumps(denoiser)
    x = process.sigma(process.t_max) * noise.normal(range(1000, 1064), 0, (16,), torch.float64)
    exact = run(make_plan("exp-ab3", process, 300, grid="log-snr"), denoiser, x)

    def error(sampler: str, steps: int, grid: str | torch.Tensor) -> float:
        plan = make_plan(sampler, process, steps, grid=grid)
        return (run(plan, denoiser, x) - exact).pow(2).mean(1).sqrt().median().item()

    for steps in (5, 6):
        ours = jumps.grid(steps)
        for sampler in ("ddim", "ipndm3"):
            theirs = {grid: error(sampler, steps, grid) for grid in ("karras", "time")}
            assert error(sampler, steps, ours) < 0.8 * min(theirs.values()), (sampler, steps, theirs)


def test_the_path_is_the_cheapest():
    """Against all paths; coefficient c weighs the m-th jump by c^(m-1)."""
    cost = torch.rand(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    times = torch.linspace(7, 0, 8, dtype=torch.float64)
    jumps = Jumps(times, cost.masked_fill(torch.ones(8, 8, dtype=torch.bool).tril(), torch.inf))
    for steps in range(1, 8):
        for coefficient in (0.8, 1.0, 1.15):
            paths = [(0, *inner, 7) for inner in itertools.combinations(range(1, 7), steps - 1)]

            def total(path: tuple[int, ...], c: float = coefficient) -> float:
                return sum(c**k * cost[i, j].item() for k, (i, j) in enumerate(itertools.pairwise(path)))

            assert jumps.grid(steps, coefficient).tolist() == times[list(min(paths, key=total))].tolist()


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("metric", ["l2", "dev"])
def test_every_process(process, metric):
    """Grids of the process, from pure noise to clean data, whatever the coordinates of the process."""
    times = gits(problems.mixture(process), 5, n=16, nodes=31, metric=metric)
    assert times.shape == (6,)
    assert (times[0].item(), times[-1].item()) == (process.t_max, process.t_data)
    plan = make_plan("ddim", process, grid=times)
    assert torch.equal(plan.times, times)
    ended = gits(problems.mixture(process), 5, n=4, nodes=31, metric=metric, final="stop")
    assert ended[-1].item() == process.t_min


def test_costs_are_those_of_the_jumps():
    """On a Gaussian, where trajectories are known: DDIM's jump from the exact state, measured in x/alpha."""
    process = pfode.VP()
    denoiser = Gaussian([0.3, -0.5], torch.tensor([0.25, 0.04], dtype=torch.float64), process=process)
    jumps = measure_jumps(denoiser, 5, seed=3, nodes=401, teacher="exp-ab3", dtype=torch.float64, batch=2)
    x = process.sigma(1.0) * noise.normal(range(3, 8), 0, (2,), torch.float64)
    assert torch.isinf(jumps.cost.tril()[jumps.cost.tril() != 0]).all()
    last = denoiser.flow(x, 1.0, 0.0)
    chord = x / process.alpha(1.0) - last
    dev = measure_jumps(denoiser, 5, seed=3, nodes=401, teacher="exp-ab3", metric="dev", dtype=torch.float64)

    def off_chord(z: torch.Tensor) -> torch.Tensor:
        area = (z - last)[:, 0] * chord[:, 1] - (z - last)[:, 1] * chord[:, 0]
        return area.abs() / chord.norm(dim=1)

    for i, j in ((0, 100), (100, 250), (250, 400)):
        t, s = jumps.times[i].item(), jumps.times[j].item()
        here, there = (denoiser.flow(x, 1.0, time) for time in (t, s))
        x0 = denoiser(here, torch.tensor(t, dtype=torch.float64))
        eps = (here - process.alpha(t) * x0) / process.sigma(t)
        jumped = x0 + process.sigma(s) / process.alpha(s) * eps
        reached = there / process.alpha(s)
        assert jumps.cost[i, j].item() == pytest.approx((jumped - reached).norm(dim=1).mean().item(), rel=1e-3)
        assert dev.cost[i, j].item() == pytest.approx((off_chord(jumped) - off_chord(reached)).mean().item(), rel=1e-2)


def test_one_pass_serves_every_number_of_steps():
    denoiser = problems.mixture(pfode.EDM())
    calls = []

    class Counting:
        process, shape = denoiser.process, denoiser.shape

        def __call__(self, x, t, **cond):
            calls.append(len(x))
            return denoiser(x, t)

    jumps = measure_jumps(Counting(), 10, batch=4)
    assert len(calls) == 60 * 3
    assert [len(jumps.grid(steps)) for steps in (1, 4, 9, 60)] == [2, 5, 10, 61]
    assert torch.equal(jumps.grid(60), jumps.times)
    assert torch.equal(jumps.grid(5), gits(denoiser, 5, n=10))
    assert len(calls) == 60 * 3


@pytest.mark.parametrize("grid", ["karras(5)", "shifted(time,3)", "dm-nonuniform"])
def test_plans_take_grids_by_their_text(grid):
    process = pfode.VP()
    plan = make_plan("ddim", process, 4, grid=grid)
    assert plan.times.tolist() == grids.times(process, grids.grid(grid), 4)


@pytest.mark.parametrize(
    "options",
    [{"metric": "l3"}, {"teacher": "heun"}, {"teacher": "ddpm"}, {"n": 0}, {"nodes": 2}, {"steps": 61}, {"steps": 0}]
    + [{"coefficient": 0.0}, {"grid": "karas"}],
    ids=str,
)
def test_what_cannot_be_searched(options):
    with pytest.raises(UsageError):
        gits(problems.mixture(pfode.EDM()), **{"steps": 5, **options})
