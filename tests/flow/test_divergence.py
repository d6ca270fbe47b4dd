"""The trace of a Jacobian: exact, estimated, of denoisers, with gradients, and what is refused."""

import math

import pytest
import torch
from torch import Tensor, nn

import pfode
from pfode import noise
from pfode.errors import UsageError
from pfode.flow import Exact, Hutchinson, denoiser_divergence, divergence, find_trace, signs
from pfode.scores import Denoiser, GaussianMixture, guide

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # by torch.func.jvp

f64 = torch.float64
WAYS = [
    Exact(), Exact(block=2), Exact(block=100), Exact(mode="forward"), Exact(3, "forward"),
    Hutchinson(3), Hutchinson(3, "forward"),
]  # fmt: skip


def points(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=f64, generator=torch.Generator().manual_seed(seed))


def mlp(d: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(d, 8), nn.Tanh(), nn.Linear(8, d)).double()


def jacobians(f, x: Tensor) -> Tensor:
    return torch.stack([torch.autograd.functional.jacobian(lambda one: f(one[None])[0], one) for one in x])


@pytest.mark.parametrize("how", WAYS)
def test_traces_and_squares_are_those_of_the_jacobian(how):
    f, x = mlp(5), points(4, 5)
    jac = jacobians(f, x)
    vectors = signs(x, 3) if isinstance(how, Hutchinson) else None
    found = divergence(f, x, how, vectors)
    assert torch.equal(found.value, f(x)) or torch.allclose(found.value, f(x), rtol=1e-14)
    if vectors is None:
        traces, squares = jac.diagonal(dim1=1, dim2=2).sum(1)[None], jac.square().sum((1, 2))[None]
    else:
        along = torch.einsum("bji,kbi->kbj" if how.mode == "forward" else "bij,kbi->kbj", jac, vectors)
        traces, squares = (along * vectors).sum(2), along.square().sum(2)
    assert torch.allclose(found.traces, traces, rtol=1e-13, atol=1e-14)
    assert torch.allclose(found.squares, squares, rtol=1e-13)
    assert torch.equal(found.trace, found.traces.mean(0))
    assert torch.equal(found.square, found.squares.mean(0))


@pytest.mark.parametrize("how", WAYS)
def test_gradients_to_x_and_to_parameters(how):
    f, x = mlp(3), points(2, 3).requires_grad_()
    vectors = points(3, 2, 3).sign() if isinstance(how, Hutchinson) else None

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        found = divergence(lambda x: nn.functional.linear(f(x) ** 2, weight), x, how, vectors)
        return found.trace + found.square + found.value.sum(1)

    weight = points(3, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(loss, (x, weight))


def test_nothing_is_kept_where_no_gradients_are_wanted():
    f, x = mlp(3), points(2, 3)
    with torch.no_grad():
        found = divergence(f, x, Exact())
    assert not any(one.requires_grad for one in found)
    assert all(p.grad is None for p in f.parameters())
    with torch.inference_mode():
        inside = divergence(f, x.clone(), Hutchinson(2), points(2, 2, 3).sign())
    assert torch.allclose(divergence(f, x, Exact()).trace, found.trace)
    assert inside.traces.shape == (2, 2)


@pytest.mark.parametrize("how", [Exact(), Exact(block=2), Hutchinson(), Exact(mode="forward")])
def test_inside_transforms(how):
    f, x = mlp(3), points(4, 3)
    vectors = torch.ones(1, 1, 3, dtype=f64) if isinstance(how, Hutchinson) else None
    each = torch.func.vmap(lambda x: divergence(f, x[None], how, vectors).trace[0])(x)
    whole = divergence(f, x, how, None if vectors is None else vectors.expand(1, 4, 3)).trace
    assert torch.allclose(each, whole)
    slope = torch.func.grad(lambda x: divergence(f, x[None], how, vectors).trace[0])(x[0])
    leaf = x[:1].clone().requires_grad_()
    (other,) = torch.autograd.grad(divergence(f, leaf, how, vectors).trace.sum(), leaf)
    assert torch.allclose(slope, other[0])


def test_the_estimate_is_unbiased_and_its_variance_is_that_of_the_formula():
    """Var = 2 (|S|_F^2 - sum S_ii^2) for signs: none for a diagonal matrix."""
    matrix = points(6, 6)
    n = 20_000
    x = torch.zeros(1, 6, dtype=f64)
    found = divergence(lambda x: x @ matrix.T, x.expand(n, 6), Hutchinson(), signs(x.expand(n, 6), 1, range(n)))
    sym = 0.5 * (matrix + matrix.T)
    variance = 2 * (sym.square().sum() - sym.diagonal().square().sum())
    assert abs(found.trace.mean() - matrix.trace()) < 4 * (variance / n).sqrt()
    assert found.trace.var() == pytest.approx(variance.item(), rel=0.05)
    assert found.square.mean() == pytest.approx(matrix.square().sum().item(), rel=0.05)
    diagonal = divergence(lambda x: x * matrix[0], points(3, 6), Hutchinson())
    assert torch.allclose(diagonal.trace, matrix[0].sum().expand(3))


def test_signs_are_keyed_by_seed_node_and_probe():
    x = torch.zeros(3, 70)
    all_of_them = signs(x, 4, [5, 6, 7], [0, 1, 2])
    assert all_of_them.shape == (4, 3, 70)
    assert torch.equal(all_of_them.abs(), torch.ones(4, 3, 70))
    assert torch.equal(signs(x[:2], 2, [7, 5], [2, 0]), all_of_them[:2, [2, 0]])
    rows = [signs(x[:1], 3, [s], n)[k] for s in (5, 2**63) for n in (0, 9) for k in range(3)]
    assert all(not torch.equal(a, b) for i, a in enumerate(rows) for b in rows[:i])
    assert not torch.equal(signs(x[:1], 1, [5]), noise.normal([5], 0, (70,)).sign()[None])
    many = noise.signs(range(200), [3] * 200, 2, (64,), f64)
    assert abs(many.mean()) < 4 / many.numel() ** 0.5
    assert abs((many[0] * many[1]).mean()) < 4 / many[0].numel() ** 0.5
    assert abs((many[:, 1:] * many[:, :-1]).mean()) < 4 / many.numel() ** 0.5
    torch.manual_seed(4)
    assert torch.equal(signs(x, 2), torch.empty(2, 3, 70).bernoulli_(generator=torch.manual_seed(4)) * 2 - 1)


def test_the_signs_are_pinned():
    """The same on every machine and version: a change here changes everybody's likelihoods."""
    pinned = [1, 1, 1, -1, -1, -1, 1, 1, 1, -1, 1, 1, -1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, 1]
    assert noise.signs([2**40 + 1], [3], 2, (12,)).flatten().int().tolist() == pinned


class Counting(nn.Module):
    """A network that counts the derivatives taken through it."""

    def __init__(self):
        super().__init__()
        self.net, self.calls = mlp(4), 0

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x) * c_noise.reshape(-1, 1).cos()


@pytest.mark.parametrize("prediction", ["edm", "eps", "flow", "v", "x0", "score", "ve"])
def test_of_a_denoiser_only_the_network_is_differentiated(prediction):
    """dD/dx by autograd through the whole denoiser; with a zero network no probe has an error."""
    network = Counting()
    denoiser = Denoiser(network, pfode.VP(), prediction, shape=(4,))
    x, t = points(3, 4), torch.tensor([0.1, 0.5, 0.9], dtype=f64)
    want = torch.stack(
        [torch.autograd.functional.jacobian(lambda z, k=k: denoiser(z[None], t[k])[0], x[k]).trace() for k in range(3)]
    )
    network.calls = 0
    found = denoiser_divergence(denoiser, x, t, Exact())
    assert network.calls == 1
    assert torch.allclose(found.trace, want, rtol=1e-12)
    assert torch.allclose(found.value, denoiser(x, t), rtol=1e-12)
    assert torch.allclose(denoiser_divergence(denoiser, x[:1], t[0], Exact()).trace, want[:1], rtol=1e-12)
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
    c_skip = denoiser.precondition(t).c_skip
    assert torch.allclose(denoiser_divergence(denoiser, x, t, Hutchinson()).trace, 4 * c_skip, rtol=1e-14)


def test_of_exact_and_of_guided_denoisers():
    mixture = GaussianMixture(points(3, 4), 0.3, process=pfode.Flow())
    x, t = points(2, 4), torch.tensor([0.3, 0.8], dtype=f64)
    found = denoiser_divergence(mixture, x, t, Exact()).trace
    jac = torch.stack(
        [torch.autograd.functional.jacobian(lambda z, k=k: mixture(z[None], t[k])[0], x[k]) for k in (0, 1)]
    )
    assert torch.allclose(found, jac.diagonal(dim1=1, dim2=2).sum(1))

    class Labelled(nn.Module):
        def forward(self, x, c_noise, label):
            return x**2 * (1 + label[:, None])

    plain = Denoiser(Labelled(), pfode.EDM(), "x0", shape=(4,), labels=["a", "b"])
    away = guide(plain, 3.0, interval=(0.1, 1.0))
    label = torch.tensor([0, 1])
    for time, scale in ((0.5, 3.0), (10.0, 1.0)):
        at = torch.full((2,), time, dtype=f64)
        guided, none, some = (
            denoiser_divergence(one, x, at, Exact(), label=what).trace
            for one, what in ((away, label), (plain, torch.tensor([2, 2])), (plain, label))
        )
        assert torch.allclose(guided, none + scale * (some - none))


def test_a_constant_function_has_no_divergence_and_a_hidden_one_is_refused():
    x, a = points(3, 4), torch.ones((), dtype=f64, requires_grad=True)
    for f in (torch.zeros_like, lambda x: torch.ones_like(x) * a):
        assert torch.equal(divergence(f, x, Exact()).trace, torch.zeros(3, dtype=f64))
    for f in (lambda x: x.detach() ** 2, lambda x: x.detach() * a, torch.no_grad()(torch.sin)):
        with pytest.raises(UsageError, match="does not see"):
            divergence(f, x, Hutchinson())


def test_words_and_what_is_refused():
    assert (find_trace("auto", 64), find_trace("auto", 65, 7)) == (Exact(), Hutchinson(7))
    assert (find_trace("exact", 3072), find_trace("hutchinson", 2)) == (Exact(), Hutchinson(4))
    assert find_trace(Exact(block=3), 1000).products(1000) == 1000
    assert find_trace(Hutchinson(3), 2).products(1000) == 3
    x = points(2, 3)
    for call, says in (
        (lambda: find_trace("exactly", 3), "unknown divergence 'exactly'\nhint: did you mean 'exact'"),
        (lambda: find_trace("auto", 3, 0), "probes: need an integer of at least 1, got 0"),
        (lambda: Hutchinson(1.5), "probes"),  # type: ignore[arg-type]
        (lambda: Exact(0), "block: need an integer of at least 1, got 0"),
        (lambda: Exact(mode="backward"), "unknown mode 'backward'"),
        (lambda: divergence(lambda x: x[:, :2], x, Exact()), r"need f\(x\) of the shape of x, \(2, 3\), got \(2, 2\)"),
        (lambda: divergence(lambda x: None, x, Exact()), "got NoneType"),  # type: ignore[arg-type,return-value]
        (lambda: divergence(mlp(3), x, Exact(), x[None]), "the exact trace takes none"),
        (lambda: divergence(mlp(3), x, Hutchinson(), x), r"need shape \(probes, 2, 3\), got \(2, 3\)"),
        (lambda: signs(x, 1, [0]), "need one for each of 2 samples, got 1"),
        (lambda: signs(x, 1, [0, -1]), "signs: seeds"),
        (lambda: signs(x, 1, [0, 1], [0]), "signs: seeds"),
    ):
        with pytest.raises(UsageError, match=says):
            call()


def test_no_samples_and_one_element():
    f = torch.sin
    for how in (Exact(), Hutchinson(2), Exact(mode="forward")):
        none = divergence(f, torch.zeros(0, 3), how)
        assert none.trace.shape == (0,)
        assert none.value.shape == (0, 3)
    one = points(4, 1)
    assert torch.allclose(divergence(f, one, Hutchinson()).trace, one[:, 0].cos())
    scalar = points(4)
    assert torch.allclose(divergence(f, scalar, Exact()).trace, scalar.cos())
    nan = divergence(f, torch.tensor([[math.nan, 0.0], [0.0, 0.0]]), Exact()).trace
    assert nan.isnan().tolist() == [True, False]
