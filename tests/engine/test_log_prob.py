"""The log-probability of stochastic rows: `Point.log_prob` and `Point.log_prob_of`."""

import dataclasses
import itertools

import pytest
import torch
from torch.distributions import Normal

import pfode
from pfode import Plan, iterate, noise
from pfode.errors import UsageError
from pfode.plans.executor import Point
from pfode.samplers import make_plan

SEEDS = [3, 2**64 - 1, 0, 77]
X = 80 * noise.normal(SEEDS, 0, (2, 3), torch.float64)


class Learnt:
    """A denoiser with one parameter, whose calls are counted."""

    process = pfode.EDM()
    calls = 0

    def __init__(self, weight: float | torch.Tensor = 0.3):
        self.weight = torch.as_tensor(weight, dtype=torch.float64)

    def __call__(self, x, t, **cond):
        self.calls += 1
        return torch.tanh(self.weight * x / (1 + t)) + self.weight**2


def log_prob(point: Point, x: torch.Tensor | None = None) -> torch.Tensor:
    """Of a step that draws noise: where it landed, or had it landed at x."""
    found = point.log_prob if x is None else point.log_prob_of(x)
    assert found is not None
    return found


def staged(reuse: bool = False) -> Plan:
    """Two steps of two rows: the first draws noise in both, the second in its last; on request each is used again."""
    c = torch.tensor([[0.7, 0.0], [-0.5, 0.2], [0.0, 0.0], [0.3, 0.0]])
    return Plan(
        process=Learnt.process,
        prediction="x0",
        t=torch.tensor([5.0, 4.0, 3.0, 2.0]),
        time=torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]),
        alpha=torch.ones(5),
        sigma=torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]),
        r=torch.tensor([0.8, 0.7, 0.6, 0.5]),
        r_prev=torch.zeros(4),
        b=torch.tensor([[0.2, 0.0], [0.4, -0.1], [0.4, 0.0], [0.6, -0.1]]),
        c=c if reuse else c[:, :1],
        init=torch.tensor([1.0, 0.0]),
        step=torch.tensor([0, 0, 1, 1]),
        node=torch.tensor([1, 0, 1, 0, 1]),
    )


def replay(plan: Plan, denoiser, start: torch.Tensor, states: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """log p of recorded states, sent back one by one to a run with other noise."""
    points, sent, found = iterate(plan, denoiser, start, [99] * len(start)), None, []
    for state in states:
        point = points.send(sent)
        found.append(point.log_prob_of(state))
        sent = state
    return found


@pytest.mark.parametrize("name", ["euler-a", "ddpm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_gaussian_density(name, dtype):
    plan, denoiser = make_plan(name, Learnt.process, 6), Learnt()
    x = X.to(dtype)
    points = list(iterate(plan, denoiser, x, SEEDS))
    assert denoiser.calls == 6
    for k, (before, point) in enumerate(itertools.pairwise([Point(0, 6, 80.0, x, x, 0), *points])):
        if k == 5:  # onto clean data: no noise
            assert point.log_prob is None
            assert point.log_prob_of(x) is None
            continue
        eps = (before.x - denoiser(before.x, plan.t[k])) / plan.sigma[k]
        mean = plan.r[k] * before.x + plan.b[k, 0] * eps
        expected = Normal(mean.double(), plan.c[k, 0]).log_prob(point.x.double()).flatten(1).sum(1)
        assert log_prob(point).dtype == dtype
        assert log_prob(point).shape == (4,)
        assert torch.allclose(log_prob(point).double(), expected, rtol=1e-12 if dtype == torch.float64 else 1e-4)


def test_deterministic_steps_have_none():
    for point in iterate(make_plan("heun", Learnt.process, 3), Learnt(), X):
        assert point.log_prob is None
        assert point.log_prob_of(point.x) is None


def test_rows_of_a_step_add_up_and_earlier_noise_is_given():
    for reuse in (False, True):
        plan, denoiser = staged(reuse), Learnt()
        xi = [noise.normal(SEEDS, k + 1, (2, 3), torch.float64) for k in range(4)]
        first, second = iterate(plan, denoiser, X / 16, SEEDS)
        densities = [Normal(0, abs(plan.c[k, 0])).log_prob(plan.c[k, 0] * xi[k]).flatten(1).sum(1) for k in (0, 1, 3)]
        assert torch.allclose(log_prob(first), densities[0] + densities[1], rtol=1e-12)
        assert torch.allclose(log_prob(second), densities[2], rtol=1e-12)
        assert torch.allclose(log_prob(second, second.x), densities[2], rtol=1e-12)
        with pytest.raises(UsageError, match="step 1 draws noise in an inner stage"):
            first.log_prob_of(first.x)


def test_the_density_falls_away_from_the_mean():
    (point, *_) = iterate(make_plan("euler-a", Learnt.process, 6), Learnt(), X, SEEDS)
    (transition,) = point.transitions
    assert transition is not None
    top = log_prob(point, transition.mean)
    for shift in (1.0, -2.0):
        away = log_prob(point, transition.mean + shift * transition.std)
        assert torch.allclose(top - away, torch.full((4,), 6 * shift**2 / 2, dtype=torch.float64))


def test_another_shape_is_refused():
    (point, *_) = iterate(make_plan("euler-a", Learnt.process, 6), Learnt(), X, SEEDS)
    with pytest.raises(UsageError, match="shape of x"):
        point.log_prob_of(X[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_replay_finds_what_was_recorded(dtype):
    plan, x = make_plan("euler-a", Learnt.process, 6), X.to(dtype)
    record = list(iterate(plan, Learnt(), x, SEEDS))
    states = [point.x for point in record]
    again = replay(plan, Learnt(), x, states)
    other = replay(plan, Learnt(0.31), x, states)
    for point, same, changed in zip(record[:-1], again, other, strict=False):
        assert same is not None
        assert changed is not None
        assert torch.equal(log_prob(point), same)
        assert (changed - same).abs().max() > 1e-3
    assert again[-1] is None


def test_gradients_are_those_of_finite_differences():
    """Of a replay, in the network's parameter and in the size of the noise: the states are data."""
    plan = make_plan("euler-a", Learnt.process, grid=[5.0, 2.0, 1.0, 0.5])
    states = [point.x for point in iterate(plan, Learnt(), X / 16, SEEDS)]

    def total(weight, c):
        found = replay(dataclasses.replace(plan, c=c), Learnt(weight), X / 16, states)
        return torch.stack([part for part in found if part is not None]).sum(0)

    numbers = [torch.tensor(0.3, dtype=torch.float64, requires_grad=True), plan.c.clone().requires_grad_()]
    assert torch.autograd.gradcheck(total, numbers)


def test_the_gradient_while_sampling_is_that_of_the_replay():
    """With the states sent back as data; without, it would flow through the states as well."""
    plan = make_plan("euler-a", Learnt.process, grid=[5.0, 2.0, 1.0, 0.5])

    def gradient(weight, parts):
        return torch.autograd.grad(torch.stack([p for p in parts if p is not None]).sum(), weight)[0]

    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    points, sent, live, states = iterate(plan, Learnt(weight), X / 16, SEEDS), None, [], []
    for _ in range(plan.steps):
        point = points.send(sent)
        live.append(point.log_prob)
        states.append(point.x.detach())
        sent = states[-1]
    expected = gradient(weight, replay(plan, Learnt(weight), X / 16, states))
    assert torch.allclose(gradient(weight, live), expected, rtol=1e-12)
    through = gradient(weight, [point.log_prob for point in iterate(plan, Learnt(weight), X / 16, SEEDS)])
    assert not torch.allclose(through, expected, rtol=1e-3)


def test_the_score_has_mean_zero():
    """E d log p / d weight = 0 under the step's own distribution: what makes it a policy gradient."""
    n = 4000
    plan = make_plan("euler-a", Learnt.process, grid=[5.0, 2.0, 1.0])
    weight = torch.full((n, 1), 0.3, dtype=torch.float64, requires_grad=True)
    x = 5 * noise.normal(range(n), 0, (3,), torch.float64)
    point = next(iterate(plan, Learnt(weight), x, range(n)))
    (score,) = torch.autograd.grad(log_prob(point).sum(), weight)
    assert abs(score.mean()) < 4 * score.std() / n**0.5
    assert score.std() > 0.1


def test_nothing_is_computed_or_called_unless_asked():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        logarithms = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.logarithms += func.overloadpacket.__name__ == "log"
            return func(*args, **(kwargs or {}))

    denoiser = Learnt()
    points = iterate(make_plan("euler-a", Learnt.process, 6), denoiser, X, SEEDS)
    next(points)
    with Count() as count:
        point = next(points)
        assert count.logarithms == 0
        log_prob(point)
        assert count.logarithms == 1
    assert denoiser.calls == 2
