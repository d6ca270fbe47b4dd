"""Paths: values, derivatives, missing values, times of each series."""

import math

import pytest
import torch

from pfode import cde
from pfode.errors import UsageError

KINDS = (cde.linear, cde.hermite, cde.natural)


def series(batch=(4,), length=12, channels=3, missing=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, length, channels, dtype=torch.float64, generator=generator)
    t = torch.rand(*batch, length, dtype=torch.float64, generator=generator).cumsum(-1)
    gone = torch.rand(x.shape, generator=generator) < missing
    return torch.where(gone, math.nan, x), t


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_paths_go_through_what_was_observed(kind, missing):
    x, t = series((2, 3), missing=missing)
    path = kind(x, t)
    seen = ~torch.isnan(x)
    torch.testing.assert_close(path.evaluate(t)[seen], x[seen], rtol=1e-12, atol=1e-12)
    shared = kind(x, t[0, 0])
    torch.testing.assert_close(shared.evaluate(t[0, 0])[seen], x[seen], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_series_is_the_same_alone_in_a_batch_and_padded(kind):
    x, t = series(missing=0.3)
    x[1, 7:], t[1, 7:] = 123.0, math.nan  # what stands in padding is not looked at
    together, alone = kind(x, t), kind(x[1, :7], t[1, :7])
    at = torch.linspace(float(t[1, 0]), float(t[1, 6]), 40, dtype=torch.float64)
    for method in ("evaluate", "derivative"):
        found = getattr(together, method)(at.expand(4, -1))[1]
        torch.testing.assert_close(found, getattr(alone, method)(at), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own_times", [False, True])
def test_derivative_and_increment_are_those_of_the_values(kind, own_times):
    x, t = series()
    t = t if own_times else t[0]
    path = kind(x, t)
    at = (0.3 * t[..., :-1] + 0.7 * t[..., 1:]).requires_grad_()
    values = path.evaluate(at)
    each = [torch.autograd.grad(values[..., c].sum(), at, retain_graph=True)[0] for c in range(3)]
    found = path.derivative(at)
    if own_times:
        torch.testing.assert_close(found, torch.stack(each, -1))
    else:
        torch.testing.assert_close(found.sum(0), torch.stack(each, -1))
    change = path.increment(t[..., 2], t[..., 5])
    torch.testing.assert_close(change, path.evaluate(t[..., 5]) - path.evaluate(t[..., 2]))


def test_natural_splines_have_no_curvature_at_the_ends_and_none_that_jumps():
    x, t = series(missing=0.0)
    path = cde.natural(x, t[0])
    b, two_c, three_d = path.rate
    torch.testing.assert_close(two_c[..., 0, :], torch.zeros_like(two_c[..., 0, :]))
    h = t[0].diff()[:, None]
    end = two_c + 2 * three_d * h
    torch.testing.assert_close(end[..., -1, :], torch.zeros_like(end[..., -1, :]), atol=1e-10, rtol=0)
    torch.testing.assert_close(end[..., :-1, :], two_c[..., 1:, :])
    torch.testing.assert_close((b + two_c * h + three_d * h**2)[..., :-1, :], b[..., 1:, :])


@pytest.mark.parametrize("flat_ends", [True, False])
def test_a_natural_spline_with_gaps_is_that_of_each_channel_by_itself(flat_ends):
    x, t = series((), 15, 4, 0.4, seed=3)
    x[[0, -1], 0], x[[0, 1, 2, -2, -1], 1], x[:, 2], x[3:-3, 3] = 1.0, math.nan, math.nan, math.nan
    path = cde.natural(x, t, flat_ends=flat_ends)
    at = torch.linspace(float(t[0]), float(t[-1]), 50, dtype=torch.float64)
    one = ~torch.isnan(x[:, 0])
    alone = cde.natural(x[one, :1], t[one])
    torch.testing.assert_close(path.evaluate(at)[:, :1], alone.evaluate(at), rtol=1e-10, atol=1e-10)
    assert bool((path.evaluate(at)[:, 2] == 0).all())
    first = int((~torch.isnan(x[:, 1])).nonzero()[0])
    before = path.evaluate(t[: first + 1])[:, 1]
    assert before[0] == x[first, 1]
    assert bool((before - x[first, 1]).abs().max() < 1e-12) == flat_ends


def test_hermite_paths_know_nothing_of_what_comes_after():
    x, t = series(missing=0.0)
    changed = x.clone()
    changed[:, 6:] += 1.0
    at = t[0][t[0] <= t[0, 5]]
    for kind in (cde.hermite, cde.linear):
        assert torch.equal(kind(x, t[0]).evaluate(at), kind(changed, t[0]).evaluate(at))
    changed[:, 6:] = math.nan
    path, other = cde.rectilinear(x, t[0]), cde.rectilinear(changed, t[0])
    assert torch.equal(path.rate[0][:, :10], other.rate[0][:, :10])


def test_rectilinear_paths_move_time_first():
    nan = math.nan
    x = torch.tensor([[0.1, 0.4], [0.2, nan], [0.9, 1.1]])
    path = cde.rectilinear(x, x[:, 0], time=0)
    corners = torch.cat([path.start, (path.start[-1] + path.rate[0][-1])[None]])
    torch.testing.assert_close(corners, torch.tensor([[0.1, 0.4], [0.2, 0.4], [0.2, 0.4], [0.9, 0.4], [0.9, 1.1]]))
    assert path.observations.tolist() == [0, 2, 4]
    torch.testing.assert_close(path.evaluate(0.9), torch.tensor([0.9, 1.1]))
    torch.testing.assert_close(path.evaluate(0.55), torch.tensor([0.55, 0.4]))
    with pytest.raises(UsageError, match="no derivative in time"):
        path.derivative(0.3)


@pytest.mark.parametrize("kind", [*KINDS, cde.rectilinear])
def test_gradients_to_what_a_path_is_made_of(kind):
    x, t = series((2,), 5, 2, 0.25, seed=1)
    x.requires_grad_()
    t.requires_grad_()

    def solved(x, t):
        path = kind(x, t)
        ends = path.knots[[0, -1]].detach()
        return cde.cdesolve(field, path, x.new_full((2, 2), 0.1), None, method="rk4").ys[-1] + ends.sum()

    def field(t, z):
        return torch.stack([z.sin(), z.cos() * 0.5], -1)

    seen = ~torch.isnan(x.detach())
    numbers = x.detach()[seen].requires_grad_()

    def of_numbers(numbers, t):
        return solved(torch.full(x.shape, math.nan, dtype=x.dtype).masked_scatter(seen, numbers), t)

    assert torch.autograd.gradcheck(of_numbers, (numbers, t))


def test_missing_values_have_gradients_that_are_numbers():
    x, t = series(missing=0.5)
    x[0, :, 1] = math.nan
    for kind in (*KINDS, cde.rectilinear):
        leaf = x.clone().requires_grad_()
        path = kind(leaf, t)
        sum(part.square().sum() for part in (path.start, *path.rate)).backward()  # type: ignore[union-attr]
        assert leaf.grad is not None
        assert bool(torch.isfinite(leaf.grad).all())
        assert bool((leaf.grad[torch.isnan(x)] == 0).all())


def test_slopes_are_the_same_numbers_from_a_time_with_a_gradient():
    x, t = series(missing=0.2)
    path = cde.natural(x.float(), t[0].float())
    for s in t[0].float()[:-1] + 0.1:
        assert torch.equal(path.slope(s), path.slope(s.clone().requires_grad_()))
        assert torch.equal(path.slope(s.expand(4)), path.slope(s))


@pytest.mark.parametrize(
    ("x", "t", "words"),
    [
        ([[1.0]], None, "x: need a tensor of real numbers, got list"),
        (torch.ones(3, 2, dtype=torch.int64), None, "got torch.int64"),
        (torch.ones(3), None, r"x: need shape \(\*batch, length, channels\), got \(3,\)"),
        (torch.ones(1, 2), None, "two observations or more"),
        (torch.ones(4, 0), None, "two observations or more"),
        (torch.tensor([[1.0], [math.inf], [2.0]]), None, "x: infinite at series 1, entry 0"),
        (torch.ones(2, 3, 1), [0.0, 1.0], r"t: need shape \(3,\) or \(2, 3\) for x of shape \(2, 3, 1\), got \(2,\)"),
        (torch.ones(3, 1), [0.0, 1.0, 1.0], "t: need times that rise, got 1 and then 1 at entry 1"),
        (torch.ones(3, 1), [0.0, math.nan, 1.0], "t: not finite at entry 1"),
        (torch.ones(2, 3, 1), [[0.0, 1, 2], [0, 3, 2]], "got 3 and then 2 at series 1, entry 1"),
        (torch.ones(2, 3, 1), [[0.0, 1, 2], [0, math.nan, 2]], "t: NaN between times, at series 1, entry 1"),
        (torch.ones(2, 3, 1), [[0.0, 1, 2], [math.nan] * 3], "t: no times at all of series entry 1"),
        (torch.ones(2, 3, 1), [[0.0, 1, math.inf], [0, 1, 2]], "t: not finite at series 0, entry 2"),
    ],
)
def test_malformed_series_are_one_clear_error(x, t, words):
    t = torch.tensor(t) if isinstance(t, list) else t
    for kind in (*KINDS, cde.rectilinear):
        with pytest.raises(UsageError, match=words):
            kind(x, t)


def test_paths_refuse_times_that_do_not_go_with_the_batch():
    x, t = series()
    with pytest.raises(UsageError, match=r"every series has its own times: \(3,\)"):
        cde.linear(x, t).evaluate(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(UsageError, match="time: need an integer from -3 to 2, got 3"):
        cde.rectilinear(x, t, time=3)
    path = cde.hermite(x, t).to(torch.float32)
    assert path.start.dtype == path.knots.dtype == torch.float32
    assert (path.channels, path.batch, path.interval.shape) == (3, (4,), (4, 2))
