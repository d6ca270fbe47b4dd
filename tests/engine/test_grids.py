"""Grids."""

import itertools
import math

import pytest
import torch

import pfode
from pfode import grids
from pfode.errors import UsageError
from tests import problems

PROCESSES = {**problems.ALL_PROCESSES, "zero-SNR": problems.zero_terminal_snr(), "shifted": pfode.Flow(shift=3.0)}
each = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


@each
@pytest.mark.parametrize("name", grids.GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_every_grid_on_every_process(name, process, steps):
    denoise = grids.times(process, name, steps)
    stop = grids.times(process, name, steps, final="stop")
    for nodes in (denoise, stop):
        assert len(nodes) == steps + 1
        assert nodes[0] == process.t_max
        assert all(a > b for a, b in itertools.pairwise(nodes))
        assert all(t >= process.t_min for t in nodes[:-1])
    assert denoise[-1] == process.t_data
    assert stop[-1] == process.t_min


def test_karras_is_equation_5():
    nodes = grids.times(pfode.EDM(), "karras", 18)
    for i in range(18):
        expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert nodes[i] == pytest.approx(expected, rel=1e-13)
    rho3 = grids.times(pfode.EDM(), grids.karras(3.0), 4, final="stop")
    assert rho3[2] == pytest.approx(((80 ** (1 / 3) + 0.002 ** (1 / 3)) / 2) ** 3, rel=1e-13)


def test_log_snr_is_uniform():
    process = pfode.VP()
    t = torch.tensor(grids.times(process, "log-snr", 9, final="stop"), dtype=torch.float64)
    gaps = process.log_snr(t).diff()
    assert torch.allclose(gaps, gaps[0].expand(9), rtol=1e-10)


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
        {"rule": [5.0, 5.0, 1.0], "steps": 2},
        {"rule": [1.0, 2.0], "steps": 1},
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
    for make in (lambda: grids.karras(0.0), lambda: grids.time(-1.0)):
        with pytest.raises(UsageError):
            make()
