"""cdesolve: exact solutions, invariance to batches, padding and how a path is given, gradients, what it refuses."""

import math
from typing import Any

import pytest
import torch

import pfode
from pfode import cde
from pfode.cde.online import PATHS
from pfode.cde.solve import product
from pfode.errors import UsageError

DOUBLE = torch.float64
KINDS = (cde.linear, cde.hermite, cde.natural, cde.rectilinear)


class Field(torch.nn.Module):
    """A small network of the state and the time, bounded."""

    def __init__(self, hidden=4, channels=2, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network = torch.nn.Linear(hidden + 1, hidden * channels, dtype=DOUBLE)
        self.channels = channels

    def forward(self, t, z):
        at = t.reshape(-1, *[1] * (z.ndim - 1)).expand(*z.shape[:-1], 1) if t.ndim < z.ndim - 1 else t[..., None]
        out = self.network(torch.cat([z, at], -1)).tanh()
        return out.view(*z.shape, self.channels)


def data(batch=3, length=9, channels=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, channels, dtype=DOUBLE, generator=generator).cumsum(1) * 0.3
    t = (torch.rand(batch, length, dtype=DOUBLE, generator=generator) + 0.1).cumsum(1)
    z0 = torch.randn(batch, 4, dtype=DOUBLE, generator=generator)
    return x, t, z0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own_times", [False, True])
def test_commuting_linear_fields_have_the_exponential_of_the_increment(kind, own_times):
    x, t, z0 = data()
    t = t if own_times else t[0]
    a = torch.randn(4, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    one, two = 0.3 * a, 0.1 * a @ a  # they commute

    def f(t, z):
        return torch.stack([z @ one.T, z @ two.T], -1)

    solution = pfode.cdesolve(f, kind(x, t), z0, None, rtol=1e-9, atol=1e-11)
    change = x - x[:, :1]
    exact = (
        torch.linalg.matrix_exp(change[..., 0, None, None] * one + change[..., 1, None, None] * two)
        @ z0[:, None, :, None]
    )
    torch.testing.assert_close(solution.ys.movedim(0, 1), exact[..., 0], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_series_alone_is_the_series_in_a_batch_of_any_padding(kind):
    f, (x, t, z0) = Field(), data()
    x[1, 5:], t[1, 5:] = math.nan, math.nan
    each: tuple[dict[str, Any], ...] = ({"method": "rk4"}, {"batch": "per-sample", "rtol": 1e-7, "atol": 1e-9})
    for options in each:
        together = cde.cdesolve(f, kind(x, t), z0, None, **options).ys
        alone = cde.cdesolve(f, kind(x[1:2, :5], t[1:2, :5]), z0[1:2], None, **options).ys
        torch.testing.assert_close(together[:5, 1], alone[:, 0], rtol=1e-12, atol=1e-12)
        assert torch.equal(together[5:, 1], together[4, 1].expand(4, -1))


def test_how_a_path_is_given_does_not_matter():
    """Own times that are all the same are shared times; a line with a point on it is the line; time may run faster."""
    f, (x, t, z0) = Field(), data()
    options: Any = {"rtol": 1e-10, "atol": 1e-12}
    shared = cde.cdesolve(f, cde.hermite(x, t[0]), z0, t[0], **options).ys
    own = cde.cdesolve(f, cde.hermite(x, t[:1].expand(3, -1)), z0, None, **options).ys
    torch.testing.assert_close(shared, own, rtol=1e-7, atol=1e-8)
    autonomous = lambda _, z: f(torch.zeros((), dtype=DOUBLE), z)  # noqa: E731
    slow = cde.cdesolve(autonomous, cde.linear(x, t[0]), z0, t[0], **options).ys
    fast = cde.cdesolve(autonomous, cde.linear(x, t[0] ** 3), z0, t[0] ** 3, **options).ys
    torch.testing.assert_close(slow, fast, rtol=1e-7, atol=1e-8)
    middle = torch.cat([x[:, :4], (x[:, 3:4] + x[:, 4:5]) / 2, x[:, 4:]], 1)
    times = torch.cat([t[0, :4], (t[0, 3:4] + t[0, 4:5]) / 2, t[0, 4:]])
    finer = cde.cdesolve(autonomous, cde.linear(middle, times), z0, t[0], **options).ys
    torch.testing.assert_close(slow, finer, rtol=1e-7, atol=1e-8)


def test_times_of_each_series_and_backwards():
    f, (x, t, z0) = Field(), data()
    ts = torch.stack([t[:, 0], 0.7 * t[:, 3] + 0.3 * t[:, 4], t[:, -1]], 1)
    options: Any = {"batch": "per-sample", "rtol": 1e-9, "atol": 1e-11}
    for kind in (cde.linear, cde.natural):
        path = kind(x, t)
        found = cde.cdesolve(f, path, z0, ts, **options)
        for i in range(3):
            alone = cde.cdesolve(f, kind(x[i : i + 1], t[i]), z0[i : i + 1], ts[i], rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(found.ys[:, i], alone.ys[:, 0], rtol=1e-7, atol=1e-8)
        back = cde.cdesolve(f, path, found.ys[-1], ts.flip(1), **options)
        torch.testing.assert_close(back.ys[-1], z0, rtol=1e-6, atol=1e-7)
        assert found.ts is ts


def test_a_solve_may_begin_at_any_knot():
    f, (x, t, z0) = Field(), data()
    for kind in KINDS:
        for path in (kind(x, t[0]), kind(x, t[:1].expand(3, -1))):
            for options in ({"method": "rk4"}, {"batch": "per-sample"}, {}):
                options: Any = {**options, "rtol": 1e-7, "atol": 1e-9}
                whole = cde.cdesolve(f, path, z0, t[0], **options).ys
                part = cde.cdesolve(f, path, whole[3], t[0, 3:6], **options).ys
                torch.testing.assert_close(part, whole[3:6], rtol=1e-5, atol=1e-6)
                back = cde.cdesolve(f, path, whole[5], t[0, 3:6].flip(0), **options).ys
                if options.get("method") != "rk4":
                    torch.testing.assert_close(back[-1], whole[3], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_steps_end_at_the_knots():
    """A path with kinks costs about a step for each piece, where a solver that does not know of them rejects many."""
    f, (x, t, z0) = Field(), data(length=40)
    path = cde.linear(x, t[0])
    known = cde.cdesolve(f, path, z0, t[0, [0, -1]])
    driven = lambda s, z: product(f(s, z), path.slope(s), z)  # noqa: E731
    unknown = pfode.solve(driven, z0, t[0, [0, -1]], rtol=1e-4, atol=1e-6)
    assert known.stats.rejected == 0
    assert known.stats.nfe < 0.4 * unknown.stats.nfe
    exact = cde.cdesolve(f, path, z0, t[0, [0, -1]], rtol=1e-11, atol=1e-13).ys[-1]
    assert float((known.ys[-1] - exact).abs().max()) < 0.2 * float((unknown.ys[-1] - exact).abs().max())


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
@torch.no_grad()
def test_fixed_methods_keep_their_order_over_the_knots(method, order):
    f, (x, _, z0) = Field(), data(length=4)
    path = cde.hermite(x, torch.arange(4.0, dtype=DOUBLE))
    exact = cde.cdesolve(f, path, z0, [0.0, 3.0], rtol=1e-12, atol=1e-13).ys[-1]
    errors = [
        float((cde.cdesolve(f, path, z0, [0.0, 3.0], method=method, step_size=h).ys[-1] - exact).abs().max())
        for h in (1 / 16, 1 / 32)
    ]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.3


def test_the_product_needs_no_matrix_and_makes_the_same_numbers():
    f, (x, t, z0) = Field(), data()

    class Product(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.f = f

        def prod(self, t, z, dx):
            assert dx.shape == (3, 2)
            return (self.f(t, z) * dx[..., None, :]).sum(-1)

    path = cde.natural(x, t)
    one = cde.cdesolve(f, path, z0, None, method="rk4").ys
    two = cde.cdesolve(Product(), path, z0, None, method="rk4").ys
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(*(torch.autograd.grad(ys.sum(), f.network.weight) for ys in (one, two)))


def test_a_tree_of_states_has_a_matrix_for_each():
    f, (x, t, z0) = Field(), data()
    path = cde.hermite(x, t[0])
    both = cde.cdesolve(
        lambda t, z: {"a": f(t, z["a"]), "b": -f(t, z["b"])}, path, {"a": z0, "b": z0}, None, method="rk4"
    )
    torch.testing.assert_close(both.ys["a"], cde.cdesolve(f, path, z0, None, method="rk4").ys)
    torch.testing.assert_close(both.ys["b"], cde.cdesolve(lambda t, z: -f(t, z), path, z0, None, method="rk4").ys)


@pytest.mark.parametrize("options", [{}, {"batch": "per-sample"}, {"method": "rk4"}, {"adjoint": "direct"}])
def test_gradients_are_those_of_the_numbers_computed(options):
    x, t, z0 = data(2, 4)
    f = Field()
    weights = list(f.parameters())

    def end(z0, x, *weights):
        names = [name for name, _ in f.named_parameters()]
        apply = lambda t, z: torch.func.functional_call(f, dict(zip(names, weights, strict=True)), (t, z))  # noqa: E731
        return cde.cdesolve(apply, cde.hermite(x, t), z0, None, params=weights, **options).ys[1:]

    inputs = [z0.requires_grad_(), x.requires_grad_(), *weights]
    if options.get("adjoint") != "direct":
        fine = end(z0, x, *weights)
        direct = cde.cdesolve(f, cde.hermite(x, t), z0, None, **{**options, "adjoint": "direct"}).ys[1:]
        cotangent = torch.randn_like(fine)
        for a, b in zip(
            torch.autograd.grad(fine, inputs, cotangent), torch.autograd.grad(direct, inputs, cotangent), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    else:
        tight = lambda *inputs: cde.cdesolve(f, cde.hermite(inputs[1], t), inputs[0], None, method="rk4").ys[-1]  # noqa: E731
        assert torch.autograd.gradcheck(tight, (z0, x))


@pytest.mark.parametrize("path", ["rectilinear", "linear", "hermite"])
@pytest.mark.parametrize("method", ["rk4", "euler", "rk4-38"])
def test_online_is_the_batch_bit_for_bit(path, method):
    f, (x, t, z0) = Field().float(), data()
    x, t, z0 = x.float(), t[0].float(), z0.float()
    f = f.float()
    if path == "rectilinear":
        x[0, 2:5, 0] = x[:, 4, 1] = x[2, 0, 1] = math.nan
        x[..., 0] = t + 3.0
    named: Any = {"time": 0} if path == "rectilinear" else {}
    made = PATHS[path](x, t, **named)
    with torch.no_grad():
        whole = cde.cdesolve(f, made, z0, None, method=method).ys
        stream = cde.Online(f, path=path, method=method, **named)
        each = [stream.observe(t[k], x[:, k], z0) for k in range(len(t))]
    assert torch.equal(torch.stack(each), whole)
    assert stream.count == len(t)


def test_the_future_never_changes_an_online_prediction():
    f, (x, t, z0) = Field(), data()
    x[0, 2, 0] = x[1, 5, 1] = math.nan
    changed = x.clone()
    changed[:, 6:] = 5.0
    each: tuple[Any, ...] = ({"method": "rk4"}, {"batch": "per-sample"})
    for options in each:
        one, two = (cde.cdesolve(f, cde.rectilinear(values, t), z0, None, **options).ys for values in (x, changed))
        assert torch.equal(one[:6], two[:6])
        assert not torch.equal(one[6], two[6])


def test_a_stream_has_gradients():
    f, (x, t, z0) = Field(), data()
    stream = cde.Online(f, path="linear")
    for k in range(4):
        stream.observe(float(t[0, k]), x[:, k], z0)
    online = torch.autograd.grad(stream.z.sum(), f.network.weight)
    whole = cde.cdesolve(f, cde.linear(x[:, :4], t[0, :4]), z0, None, method="rk4").ys[-1]
    torch.testing.assert_close(online, torch.autograd.grad(whole.sum(), f.network.weight), rtol=1e-12, atol=1e-14)


X, T, Z0 = data()
PATH, OWN = cde.hermite(X, T[0]), cde.hermite(X, T)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"path": X}, "path: need a pfode.cde.Path, got Tensor"),
        ({"path": None}, "path: need a pfode.cde.Path, got NoneType"),
        ({"z0": Z0[0]}, r"z0: need shape \(3, hidden\) for a path of \(3,\) series, got \(4,\)"),
        ({"z0": Z0[:2]}, r"z0: need shape \(3, hidden\).*got \(2, 4\)"),
        ({"z0": Z0.float()}, "z0: torch.float32 on cpu, and a path in torch.float64 on cpu"),
        ({"z0": 1.0}, "y0: need floating-point"),
        (
            {"f": lambda t, z: z},
            r"f: need shape \(3, 4, 2\) of it, the state's and the path's 2 channels, got shape \(3, 4\)",
        ),
        ({"f": lambda t, z: z[..., None]}, r"f: need shape \(3, 4, 2\).*got shape \(3, 4, 1\)"),
        ({"f": lambda t, z: None}, "f: need shape .* got NoneType"),
        ({"ts": "now"}, "ts: need times, got 'now'"),
        ({"ts": [0.3, 0.1, 0.2]}, "ts: need finite times that rise or fall"),
        ({"path": OWN, "ts": T[:2]}, r"ts: need shape \(times,\) or \(3, times\), got \(2, 9\)"),
        ({"path": OWN, "ts": 0.9 * T}, "ts: these times lie at different places in the series"),
        (
            {"path": OWN, "ts": 0.9 * T, "batch": "per-sample", "method": "rk4"},
            "ts: these times lie at different places",
        ),
        ({"path": OWN, "events": lambda t, z: z.sum()}, "events: the path's series have their own times"),
        ({"method": "rk45"}, "unknown method 'rk45'"),
        ({"tol": 1e-3}, "unknown option 'tol'"),
        ({"step_size": 0.0, "method": "rk4"}, "step_size: need a positive number"),
        ({"max_steps": 3}, "max_steps = 3 attempts were not enough"),
    ],
)
def test_malformed_calls_are_one_clear_error(change, words):
    call = {"f": Field(), "path": PATH, "z0": Z0, "ts": None, **change}
    f, path, z0, ts = (call.pop(name) for name in ("f", "path", "z0", "ts"))
    with pytest.raises(pfode.PfodeError, match=words):
        cde.cdesolve(f, path, z0, ts, **call)


@pytest.mark.parametrize(
    ("options", "feed", "words"),
    [
        ({"path": "natural"}, [], "unknown path 'natural'"),
        ({"method": "dopri5"}, [], "method: dopri5 chooses its steps"),
        ({"method": "ab4"}, [], "method: ab4 looks back over several steps"),
        ({"path": "linear", "time": 0}, [], "time: a channel of a rectilinear path"),
        ({}, [(0.0, X[:, 0], None)], "z0: the first observation needs the state there"),
        ({}, [(0.0, X[:, 0], Z0), (0.0, X[:, 1], None)], "t: need a time after 0, got 0"),
        ({}, [(0.0, X[:, 0], Z0), (math.nan, X[:, 1], None)], "t: need a time after 0, got nan"),
        ({}, [(0.0, X[:, 0], Z0), (1.0, X[:2, 1], None)], r"x: need shape \(3, 2\) as before, got \(2, 2\)"),
        ({}, [(0.0, 1.0, Z0)], "x: need real numbers of shape"),
        ({"path": "linear"}, [(0.0, X[:, 0] * math.nan, Z0)], "x: values are missing, which a linear path cannot know"),
    ],
)
def test_malformed_streams_are_one_clear_error(options, feed, words):
    def run():
        stream = cde.Online(Field(), **options)
        for t, x, z0 in feed:
            stream.observe(t, x, z0)

    with pytest.raises(UsageError, match=words):
        run()
