"""Log-signatures: by their definition, by what they are invariant to, and the log-ODE method's windows."""

import itertools
import math

import pytest
import torch

from pfode import cde
from pfode.cde.logsig import lyndon_words
from pfode.errors import UsageError

X = torch.randn(2, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def iterated(x, word):
    """The iterated integral of a piecewise linear path along a word, from exact sums over its pieces."""
    steps = x.diff(dim=-2)
    total = 0.0
    for places in itertools.combinations_with_replacement(range(steps.shape[-2]), len(word)):
        weight = math.prod(1 / math.factorial(places.count(p)) for p in set(places))
        total = total + weight * math.prod(steps[..., p, letter] for p, letter in zip(places, word, strict=True))
    return total


def test_against_iterated_integrals():
    """The logarithm of the signature, word by word: log S = S - S S / 2 + S S S / 3 with shorter words."""
    found = cde.logsignature(X, 3)
    for i, word in enumerate(lyndon_words(3, 3)):
        value = iterated(X, word)
        if len(word) == 2:
            value = value - iterated(X, word[:1]) * iterated(X, word[1:]) / 2
        if len(word) == 3:
            a, b, c = ((letter,) for letter in word)
            pairs = iterated(X, a) * iterated(X, b + c) + iterated(X, a + b) * iterated(X, c)
            value = value - pairs / 2 + iterated(X, a) * iterated(X, b) * iterated(X, c) / 3
        torch.testing.assert_close(found[:, i], torch.as_tensor(value))


def test_invariances():
    found = cde.logsignature(X, 4)
    middle = torch.stack([X[:, :-1], 0.3 * X[:, :-1] + 0.7 * X[:, 1:]], 2).flatten(1, 2)
    torch.testing.assert_close(cde.logsignature(torch.cat([middle, X[:, -1:]], 1), 4), found)  # points on the lines
    torch.testing.assert_close(cde.logsignature(X.flip(1), 4), -found)  # the way back
    torch.testing.assert_close(cde.logsignature(X + 5.0, 4), found)
    straight = cde.logsignature(X[:, [0, -1]], 4)
    torch.testing.assert_close(straight[:, :3], found[:, :3])
    assert float(straight[:, 3:].abs().max()) < 1e-14


def test_lyndon_words_are_as_many_as_witt_says():
    for channels, depth in ((2, 4), (3, 4), (5, 3), (1, 4)):
        divisors = {1: [1], 2: [1, -1], 3: [1, 0, -1], 4: [1, -1, 0, 0]}  # Moebius function of n's divisors, by d - 1
        count = sum(
            sum(divisors[n][d - 1] * channels ** (n // d) for d in range(1, n + 1) if n % d == 0) // n
            for n in range(1, depth + 1)
        )
        assert cde.logsignature_channels(channels, depth) == count


def test_windows_are_log_signatures_of_their_pieces():
    t = torch.tensor([0.0, 0.4, 1.0, 1.5, 2.0, 3.5, 4.2], dtype=torch.float64)
    path = cde.logsig_windows(X, 2, 1.0, t)
    assert path.shape == (2, 6, 6)
    line = cde.linear(X, t)
    torch.testing.assert_close(path[..., :3], line.evaluate(torch.tensor([0.0, 1, 2, 3, 4, 4.2], dtype=torch.float64)))
    window = torch.cat([X[:, 4:5], line.evaluate(torch.tensor([3.0], dtype=torch.float64))], 1)
    torch.testing.assert_close(path[:, 3] - path[:, 2], cde.logsignature(window, 2))
    window = torch.cat([X[:, 2:5]], 1)
    torch.testing.assert_close(path[:, 2] - path[:, 1], cde.logsignature(window, 2))
    whole = cde.logsig_windows(X, 2, 100.0, t)
    torch.testing.assert_close(whole[:, 1] - whole[:, 0], cde.logsignature(X, 2))


def test_the_log_ode_method_is_better_with_depth():
    """A linear equation with brackets: on windows of 8, the field with brackets is nearer to the fine solution."""
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(1, 65, 2, dtype=torch.float64, generator=generator) * 0.15).cumsum(1)
    a, b = torch.randn(2, 3, 3, dtype=torch.float64, generator=generator) * 0.5
    bracket = b @ a - a @ b  # of the fields z -> a z and z -> b z
    z0 = torch.ones(1, 3, dtype=torch.float64)
    exact = cde.cdesolve(lambda t, z: torch.stack([z @ a.T, z @ b.T], -1), cde.linear(x), z0, None, rtol=1e-10).ys[-1]
    fields = [a, b, bracket]
    errors = []
    for depth in (1, 2):
        path = cde.linear(cde.logsig_windows(x, depth, 8.0))
        used = fields[: path.channels]
        f = lambda t, z: torch.stack([z @ m.T for m in used], -1)  # noqa: B023, E731
        errors.append(float((cde.cdesolve(f, path, z0, None, rtol=1e-10).ys[-1] - exact).abs().max()))
    assert errors[1] < 0.3 * errors[0]


def test_windows_have_gradients_and_take_missing_values():
    x = X.clone()
    x[0, 2, 1] = x[1, 0, 0] = math.nan
    x.requires_grad_()
    cde.logsig_windows(x, 3, 2.0).square().sum().backward()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())


@pytest.mark.parametrize(
    ("x", "depth", "window", "words"),
    [
        (X, 5, 1.0, "depth: need an integer from 1 to 4, got 5"),
        (X, 0, 1.0, "depth: need an integer from 1 to 4, got 0"),
        (X.repeat(1, 1, 10), 4, 1.0, "depth: 30 channels to depth 4 make 810000 numbers"),
        (X, 2, 0.0, "window_length: need a positive number"),
        (X, 2, math.nan, "window_length: need a number"),
        (X, 2, 1e-9, r"window_length: 1e-09 makes \d+ windows of 7 observations"),
        (X[:, :1], 2, 1.0, "x: need two observations or more"),
    ],
)
def test_malformed_windows_are_one_clear_error(x, depth, window, words):
    with pytest.raises(UsageError, match=words):
        cde.logsig_windows(x, depth, window)
