"""Convergence orders of every method and of its dense output, measured on a nonlinear, non-autonomous problem."""

import pytest
import torch

from pfode import ode
from pfode.ode import solve
from pfode.ode.methods.implicit import implicit_solvers
from tests.ode import problems

SOLVERS = {name: s for name, s in ode.SOLVERS.items() if name not in implicit_solvers()}  # those: test_implicit.py

FLOOR = 2e-13


def errors(name, span, counts, dense):
    """Largest error at the end, or between steps, for rising numbers of steps."""
    start, end = span
    found = []
    for n in counts:
        between = start + (end - start) * (torch.arange(n * 5 + 1, dtype=torch.float64) / (n * 5))
        between[-1] = end
        ts = between if dense else torch.tensor([start, end], dtype=torch.float64)
        grid = [start + (end - start) * k / n for k in range(n)] + [end]
        out = solve(problems.swing, problems.swung(ts[0]), ts, method=name, grid=grid)
        found.append(float((out.ys - problems.swung(ts))[1:].abs().max()))
    return found


@pytest.mark.parametrize("dense", [False, True], ids=["end", "dense"])
@pytest.mark.parametrize("span", [(0.3, 2.3), (2.3, 0.3)], ids=["forwards", "backwards"])
@pytest.mark.parametrize("name", SOLVERS)
def test_order(name, span, dense):
    order = SOLVERS[name].order
    counts = {1: (256, 512, 1024), 2: (128, 256, 512), 3: (64, 128, 256), 4: (32, 64, 128), 5: (48, 96, 192)}
    found = errors(name, span, counts.get(order, (6, 12, 24)), dense)
    falls = [fall for fall, error in zip(problems.falls(found), found[1:], strict=True) if error > FLOOR]
    assert falls, found
    assert falls[-1] > order - 0.6, (found, falls)
    assert dense or falls[-1] < order + 1.2, (found, falls)
