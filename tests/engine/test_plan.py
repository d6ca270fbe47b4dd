"""The plan and its executor, against the defining recursion written out."""

import dataclasses

import pytest
import torch

import pfode
from pfode import Plan, iterate, noise, run
from pfode.denoiser import Preconditioned, Preconditioning
from pfode.errors import FileError, UsageError
from pfode.plans.executor import Failure, find_failures
from pfode.plans.rows import ahead, row_affine
from pfode.samplers import CATALOGUE, make_plan
from tests import problems

SEEDS = [3, 2**64 - 1, 0, 77]


def random_plan(prediction: str, rows: int = 6, window: int = 3, noises: int = 2, zeros: float = 0.3) -> Plan:
    """A plan with every number in use and some of them 0, as no recipe makes them."""
    u = torch.linspace(0.9, 0.1, rows + 2, dtype=torch.float64)
    g = torch.Generator().manual_seed(rows + window)

    def values(*shape):
        kept = torch.rand(*shape, generator=g) > zeros
        return torch.randn(*shape, generator=g, dtype=torch.float64) * 0.5 * kept

    time = torch.linspace(5, 0.5, rows + 1, dtype=torch.float64)
    return Plan(
        process=pfode.EDM(),
        prediction=prediction,
        t=time[:-1] * 1.01,
        time=time,
        alpha=torch.ones(rows + 1),
        sigma=time,
        r=1 + values(rows),
        r_prev=values(rows),
        b=values(rows, window),
        c=values(rows, noises),
        init=torch.tensor([0.9, 0.2]),
        step=torch.arange(rows),
        node=torch.ones(rows + 1),
        first=torch.tensor([4.0, 1.0, 4.0]),
        span=torch.stack([u[:-1], u[1:]], 1).roll(-1, 0),
    )


def by_definition(plan: Plan, denoiser, x: torch.Tensor, seeds, brownian=False) -> list[torch.Tensor]:
    """m_k and y_k, literally."""
    p, q = row_affine(plan.prediction, plan.alpha[:-1], plan.sigma[:-1])

    def draw(k: int) -> torch.Tensor:
        if brownian:
            start, stop = plan.span[k].tolist()
            return noise.brownian(seeds, start, stop, x.shape[1:], x.dtype)
        return noise.normal(seeds, k + 1, x.shape[1:], x.dtype)

    y = [plan.init[0] * x + plan.init[1] * draw(plan.nfe)]
    before, m = x, []
    for k in range(plan.nfe):
        m.append(p[k] * y[k] + q[k] * denoiser(y[k], plan.t[k]))
        new = plan.r[k] * y[k] + plan.r_prev[k] * (y[k - 1] if k else before)
        new = new + sum(plan.b[k, j] * m[k - j] for j in range(plan.b.shape[1]) if j <= k)
        new = new + sum(plan.c[k, j] * draw(k - j) for j in range(plan.c.shape[1]) if j <= k)
        y.append(new)
    return y


class Network(Preconditioned):
    """A preconditioned denoiser whose network is a smooth function."""

    def __init__(self, process, dtype=None):
        self.process, self.dtype = process, dtype

    def precondition(self, t):
        return Preconditioning(1 / (1 + t), t.log(), 0.3 / (1 + t), 1 + 0.1 * t)

    def network(self, x, c_noise, **cond):
        return torch.tanh(x + c_noise.reshape(-1, *[1] * (x.ndim - 1))).to(self.dtype or x.dtype)


@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "flow", "score"])
@pytest.mark.parametrize("kind", ["bare", "preconditioned"])
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("brownian", [False, True])
def test_executor_is_the_recursion(prediction, kind, window, brownian):
    plan = random_plan(prediction, window=window)
    denoiser = problems.gaussian(plan.process) if kind == "bare" else Network(plan.process)
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = by_definition(plan, denoiser, x, SEEDS, brownian=brownian)
    assert torch.allclose(run(plan, denoiser, x, SEEDS, brownian=brownian), expected[-1], rtol=1e-11, atol=1e-12)
    points = list(iterate(plan, denoiser, x, SEEDS, brownian=brownian))
    assert [p.step for p in points] == list(range(1, plan.nfe + 1))
    for point, state, before, t in zip(points, expected[1:], expected, plan.t, strict=False):
        assert torch.allclose(point.x, state, rtol=1e-11, atol=1e-12)
        assert torch.allclose(point.x0, denoiser(before, t), rtol=1e-11)


@pytest.mark.parametrize("denoiser", [Network(pfode.EDM()), problems.gaussian(pfode.EDM()), Network(pfode.VP())])
def test_recipes_are_the_recursion_too(denoiser):
    """Whatever the executor does to save operations: preconditioning folded in, stages, rows that sum to one."""
    t = denoiser.process.t_max
    x = denoiser.process.sigma(t) * torch.randn(4, 3, dtype=torch.float64)
    for name in CATALOGUE:
        plan = make_plan(name, denoiser.process, 8, grid="log-snr", stop=denoiser.process.time(4.0))
        expected = by_definition(plan, denoiser, x, SEEDS)[-1]
        assert torch.allclose(
            run(plan, denoiser, x, SEEDS), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max())
        )


def test_float32_follows_float64():
    denoiser = problems.gaussian(pfode.EDM())
    x = 80 * torch.randn(64, 3, dtype=torch.float64)
    for name in ("heun", "dpm++2m", "exp-ab4", "ipndm4"):
        plan = make_plan(name, denoiser.process, 20)
        assert problems.rms(run(plan, denoiser, x.float()).double(), run(plan, denoiser, x)) < 2e-5


def test_state_stays_float32_with_a_half_precision_network():
    plan = make_plan("dpm++2m", pfode.EDM(), 10)
    x = 80 * torch.randn(4, 3)
    full = run(plan, Network(pfode.EDM()), x)
    for dtype in (torch.bfloat16, torch.float16):
        out = run(plan, Network(pfode.EDM(), dtype), x)
        assert out.dtype == torch.float32
        assert 0 < problems.rms(out, full) < 0.02
    assert run(plan, Network(pfode.EDM()), x.half()).dtype == torch.float32


def test_gradients_flow_through_the_numbers_and_the_state():
    plan = make_plan("exp-ab2", pfode.EDM(), grid=[5.0, 2.0, 1.0, 0.5])
    denoiser = Network(pfode.EDM())
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def end(t, b, r, x):
        return run(dataclasses.replace(plan, t=t, b=b, r=r), denoiser, x).sum()

    numbers = [plan.t.clone().requires_grad_(), plan.b.clone().requires_grad_(), plan.r.clone().requires_grad_(), x]
    assert torch.autograd.gradcheck(end, numbers)


def test_a_sent_state_replaces_the_node():
    plan, denoiser = make_plan("exp-ab2", pfode.EDM(), 5), problems.gaussian(pfode.EDM())
    x = 80 * torch.randn(2, 3, dtype=torch.float64)
    points = iterate(plan, denoiser, x)
    next(points)
    changed = points.send(torch.zeros_like(x))
    assert problems.rms(changed.x, torch.zeros_like(x)) < 3
    assert problems.rms(changed.x, list(iterate(plan, denoiser, x))[1].x) > 1


@pytest.mark.parametrize("name", ["ddim", "heun", "dpm++2m", "euler-a"])
def test_gradients_by_checkpoints_are_the_same_and_keep_less(name):
    """Gradients w.r.t. the state, the network's parameters and the plan's numbers."""

    class Deep(Network):
        calls = 0

        def __init__(self, process):
            super().__init__(process)
            self.weight = torch.linspace(-0.5, 0.5, 9, dtype=torch.float64).reshape(3, 3).requires_grad_()

        def network(self, x, c_noise, **cond):
            self.calls += 1
            for _ in range(10):
                x = torch.tanh(x @ self.weight + c_noise[:, None])
            return x

    made, x = make_plan(name, pfode.EDM(), grid=[5.0, 2.0, 1.0, 0.5]), torch.randn(4, 3, dtype=torch.float64)
    found = []
    for checkpoint in (False, True):
        kept = []
        denoiser, b, state = Deep(made.process), made.b.clone().requires_grad_(), x.clone().requires_grad_()
        plan = dataclasses.replace(made, b=b)
        with torch.autograd.graph.saved_tensors_hooks(lambda v, kept=kept: (kept.append(v.numel()), v)[1], lambda v: v):
            end = run(plan, denoiser, state, SEEDS, checkpoint=checkpoint)
            last = list(iterate(plan, denoiser, state, SEEDS, checkpoint=checkpoint))[-1].x
        assert torch.equal(end, last)
        calls = denoiser.calls
        gradients = torch.autograd.grad(end.square().sum(), [state, denoiser.weight, b])
        found.append((end, gradients, sum(kept), denoiser.calls - calls))
    (end, gradients, kept, again), (end_2, gradients_2, kept_2, again_2) = found
    assert torch.equal(end, end_2)
    for gradient, other in zip(gradients, gradients_2, strict=True):
        assert torch.allclose(gradient, other, rtol=1e-12)
        assert gradient.abs().sum() > 0
    assert (again, again_2) == (0, made.nfe)
    assert kept_2 < kept / 3
    with torch.no_grad():
        assert torch.allclose(run(made, Deep(made.process), x, SEEDS, checkpoint=True), end, rtol=1e-12)


@pytest.mark.parametrize("name", ["ddim", "heun", "dpm++2m", "euler-a"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_are_those_of_finite_differences(name, checkpoint):
    plan = make_plan(name, pfode.EDM(), grid=[5.0, 2.0, 1.0, 0.5])

    def end(x, weight, b, c):
        class Weighted(Network):
            def network(self, x, c_noise, **cond):
                return torch.tanh(x @ weight + c_noise[:, None])

        return run(dataclasses.replace(plan, b=b, c=c), Weighted(plan.process), x, SEEDS[:2], checkpoint=checkpoint)

    g = torch.Generator().manual_seed(1)
    numbers = [torch.randn(2, 3, dtype=torch.float64, generator=g), torch.randn(3, 3, dtype=torch.float64, generator=g)]
    assert torch.autograd.gradcheck(end, [v.clone().requires_grad_() for v in (*numbers, plan.b, plan.c)])


def test_the_state_of_x_T_is_state_0_unless_the_init_row_moves_it():
    plan = make_plan("ddim", pfode.EDM(), 3)
    assert plan.first.tolist() == [80.0, 1.0, 80.0]
    assert torch.isnan(plan.span).all()
    with pytest.raises(UsageError, match="x_T is state 0"):
        dataclasses.replace(plan, first=torch.tensor([79.0, 1.0, 79.0]))
    moved = dataclasses.replace(plan, first=torch.tensor([79.0, 1.0, 79.0]), init=torch.tensor([1.01, 0.0]))
    assert moved.first.tolist() == [79.0, 1.0, 79.0]
    assert moved.span.shape == (4, 2)


def test_brownian_noise_follows_one_path():
    """The strong error against the finest run falls with the steps; with fresh noise it stays where it was."""
    denoiser = problems.mixture(pfode.EDM())
    seeds = range(40)
    x = 80 * noise.normal(seeds, 0, (2,), torch.float64)

    def ends(brownian):
        for steps in (16, 64, 256):
            v = torch.linspace(torch.tensor(80.0).log(), torch.tensor(0.05).log(), steps + 1, dtype=torch.float64)
            plan = make_plan("euler-a", pfode.EDM(), grid=v.exp())
            u = torch.sigmoid(v / 4)
            span = torch.cat([torch.stack([u[:-1], u[1:]], 1), torch.full((1, 2), torch.nan)])
            yield run(dataclasses.replace(plan, span=span), denoiser, x, seeds, brownian=brownian)

    errors = {}
    for brownian in (True, False):
        *coarse, fine = ends(brownian)
        errors[brownian] = [problems.rms(y, fine) for y in coarse]
    assert errors[True][1] < 0.5 * errors[True][0] < 0.15
    assert min(errors[False]) > 0.5


def test_brownian_noise_needs_intervals():
    denoiser, x = problems.gaussian(pfode.EDM()), torch.randn(4, 3)
    plan = random_plan("x0", zeros=0.0)
    for row in (2, 6):
        span = plan.span.clone()
        span[row] = torch.nan
        broken = dataclasses.replace(plan, span=span)
        with pytest.raises(UsageError, match=f"noise of row {row} belongs to no interval"):
            run(broken, denoiser, x, SEEDS, brownian=True)
        with pytest.raises(UsageError, match=f"noise of row {row} belongs to no interval"):
            find_failures(broken, denoiser, x, SEEDS, brownian=True)
        run(broken, denoiser, x, SEEDS)
    unused = dataclasses.replace(broken, init=torch.tensor([0.9, 0.0]))
    run(unused, denoiser, x, SEEDS, brownian=True)


def test_save_and_load(tmp_path, monkeypatch):
    for plan in (random_plan("eps"), make_plan("heun", problems.zero_terminal_snr(), 5)):
        again = Plan.load(plan.save(tmp_path / "plan.safetensors"))
        assert again == plan
        assert (again.name, again.meta, again.process) == (plan.name, plan.meta, plan.process)
        assert str(again) == str(plan)
    assert plan != make_plan("heun", problems.zero_terminal_snr(), 6)
    assert plan != make_plan("ddim", problems.zero_terminal_snr(), 5)
    other = random_plan("eps")
    assert other != dataclasses.replace(other, first=torch.tensor([4.5, 1.0, 4.5]))
    assert other != dataclasses.replace(other, span=other.span.flip(1))
    assert other != dataclasses.replace(other, span=None)
    with monkeypatch.context() as patch:  # what was saved before there were first and span
        patch.setattr("pfode.plans.table._TENSORS", pfode.plans.table._TENSORS[:-2])
        path = plan.save(tmp_path / "plan.safetensors")
    assert Plan.load(path) == plan


def test_a_damaged_file_is_refused(tmp_path):
    path = make_plan("heun", pfode.EDM(), 5).save(tmp_path / "plan.safetensors")
    data = path.read_bytes()
    for i in range(0, len(data), 7):
        flipped = bytearray(data)
        flipped[i] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(FileError, match=r"plan\.safetensors"):
            Plan.load(path)
        path.write_bytes(data[:i])
        with pytest.raises(FileError, match=r"plan\.safetensors"):
            Plan.load(path)
    with pytest.raises(FileError, match="cannot be read"):
        Plan.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"t": torch.full((6,), 1e9)},
        {"sigma": torch.zeros(7)},
        {"b": torch.full((6, 3), torch.nan)},
        {"b": torch.zeros(5, 3)},
        {"r": torch.zeros(6, 1)},
        {"prediction": "noise"},
        {"alpha": -torch.ones(7)},
        {"time": torch.full((7,), torch.nan)},
        {"node": torch.zeros(7)},
        {"node": torch.tensor([1, 1, 1, 1, 1, 1, 0])},
        {"step": torch.zeros(6)},
        {"step": torch.arange(6) + 1},
        {"first": torch.tensor([4.0, 1.0, 0.0])},
        {"first": torch.tensor([4.0, -1.0, 4.0])},
        {"first": torch.tensor([4.0, 1.0])},
        {"first": torch.tensor([torch.inf, 1.0, 4.0])},
        {"span": torch.full((6, 2), torch.nan)},
        {"span": torch.full((7, 3), torch.nan)},
        {"span": torch.full((7, 2), 0.5)},
        {"span": torch.tensor([[torch.nan, 0.5]] * 7)},
        {"span": torch.tensor([[0.5, 1.5]] * 7)},
        {"span": torch.tensor([[-0.5, 0.5]] * 7)},
        {"meta": [1]},
        {"name": "a\x1b[31m"},
    ],
)
def test_plans_that_cannot_be_are_refused(change):
    with pytest.raises(UsageError):
        dataclasses.replace(random_plan("x0"), **change)


def test_misuse_is_refused():
    denoiser = problems.gaussian(pfode.EDM())
    x = torch.randn(2, 3)
    with pytest.raises(UsageError, match="was made for"):
        run(make_plan("ddim", pfode.VP(), 3), denoiser, x)
    with pytest.raises(UsageError, match="one seed per sample"):
        run(make_plan("ddpm", pfode.EDM(), 3), denoiser, x)
    with pytest.raises(UsageError, match="one seed per sample"):
        run(make_plan("ddpm", pfode.EDM(), 3), denoiser, x, seeds=[1])
    with pytest.raises(UsageError, match="floating-point"):
        run(make_plan("ddim", pfode.EDM(), 3), denoiser, x.long())

    class Wrong(Network):
        def network(self, x, c_noise, **cond):
            return x[:, :2]

    with pytest.raises(UsageError, match="returned shape"):
        run(make_plan("ddim", pfode.EDM(), 3), Wrong(pfode.EDM()), x)


@pytest.mark.parametrize("name", ["ddim", "heun", "dpm++2m", "euler-a"])
def test_nan_is_traced_to_sample_step_and_time(name):
    plan = make_plan(name, pfode.EDM(), 6)

    class Sick(Network):
        calls = 0

        def network(self, x, c_noise, **cond):
            self.calls += 1
            out = super().network(x, c_noise)
            out[2] = torch.nan if self.calls == 4 else out[2]
            return out

    x = torch.randn(4, 3)
    assert torch.isfinite(run(plan, Sick(plan.process), x, SEEDS)).all(1).tolist() == [True, True, False, True]
    step = int(plan.step[3]) + 1
    assert find_failures(plan, Sick(plan.process), x, SEEDS) == {2: Failure(2, step, float(plan.t[3]))}


@pytest.mark.parametrize("process", [pfode.EDM(), pfode.VP(), pfode.Flow()])
def test_the_loop_reads_nothing_back_and_makes_few_operations(process):
    """Between two network calls one tensor operation per term and three more, none of which waits for a value.

    The three: the network here wants its input scaled (c_in), its output is not yet the prediction, and r y is formed.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Log(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.gaps, self.on = [], False

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if self.on:
                self.gaps[-1].append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    log = Log()

    class Watched(Network):
        def network(self, x, c_noise, **cond):
            log.on = False
            out = super().network(x, c_noise)
            log.on = True
            log.gaps.append([])
            return out

    for name, recipe in CATALOGUE.items():
        for chart in recipe.charts:
            log.gaps.clear()
            plan = make_plan(name, process, 12, chart=chart)
            with log:
                run(plan, Watched(process), torch.randn(2, 3), [0, 1])
            log.on = False
            gaps = log.gaps[:-1]  # the last leads to the end
            assert not {"_local_scalar_dense", "item", "nonzero", "equal"} & {op for gap in gaps for op in gap}, name
            terms = (plan.b != 0).sum(1) + (plan.c != 0).sum(1) + (plan.r_prev != 0)  # that a row takes
            given = (ahead(plan.b, plan.b.shape[1]) != 0).sum(1)  # and that its prediction enters
            allowed = int(max(terms.max(), given.max())) + 3
            copies = {"_to_copy", "lift_fresh"} if recipe.stochastic else set()  # of the noise, drawn on the host
            assert max(len([op for op in gap if op not in copies]) for gap in gaps) <= allowed, (name, chart)
