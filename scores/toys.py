"""Laws in the plane and in a few dimensions whose density and entropy are known: data for flows and for densities.

    8gaussians, checkerboard, moons, swissroll, rings, spirals      in the plane
    twonorm, ringnorm                                               in 20 dimensions (Breiman 1996)

`law(name)` makes one. The entropy is the negative log-likelihood, in nats, that no model falls below: the mean of
-log q(x) over samples of the law is the entropy plus the Kullback-Leibler divergence of q from it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from pfode.errors import UsageError, integer, number, unknown

__all__ = ["LAWS", "Checkerboard", "Law", "Smoothed", "TwoNormals", "keyed_uniforms", "law", "patches"]

STREAM = 0x1A5  # the key of Philox for laws: noise of samplers has others
NODES = 400  # of the Gauss-Legendre rule along a curve
GRID = 800  # of the quadrature for an entropy in the plane
PATCH = 8  # side of the patches of photographs


class Law(ABC):
    """A distribution with samples, density and entropy.

    Attributes:
        name: as in `LAWS`.
        shape: of one sample, (d,).
    """

    name: str
    shape: tuple[int, ...]
    numbers = 4  # uniform numbers that one sample takes

    @abstractmethod
    def place(self, uniforms: Tensor) -> Tensor:
        """Samples, (n, d) in float64, from uniform numbers in (0, 1), (n, numbers)."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (n,); -inf where there is no mass. x: (n, d)."""

    @abstractmethod
    def find_entropy(self) -> float:
        """-E log p(x), in nats."""

    @cached_property
    def entropy(self) -> float:
        """-E log p(x), in nats; found once."""
        return self.find_entropy()

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """n samples, (n, d) in float64; sample i depends on seed + i alone.

        Raises:
            UsageError: no number of samples, or a seed outside 0 to 2^62.
        """
        integer("n", n, 0)
        return self.place(keyed_uniforms(integer("seed", seed, 0, 2**62), n, self.numbers))

    def _checked(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or tuple(x.shape[1:]) != self.shape:
            raise UsageError(f"{self.name}: x: need shape (n, {self.shape[0]}), got {tuple(x.shape)}")
        return x


def keyed_uniforms(first: int, n: int, numbers: int) -> Tensor:
    """Uniform numbers in (0, 1), (n, numbers) in float64; row i depends on first + i alone.

    They are successive blocks of one Philox4x64 stream (Salmon et al. 2011), so that many rows are drawn at once.
    """
    blocks = -(-numbers // 4)  # the generator makes four 64-bit words at a time
    source = np.random.Philox(key=STREAM, counter=[(first * blocks) % 2**64, first * blocks >> 64, 0, 0])
    words = source.random_raw(n * blocks * 4).reshape(n, blocks * 4)[:, :numbers]
    return torch.from_numpy(((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)


class Smoothed(Law):
    """Points along curves, moved by isotropic Gaussian noise: p(x) = sum_k w_k int_0^1 N(x; c_k(u), std^2) du.

    The integral along a curve is a 400-point Gauss-Legendre rule, exact to rounding for curves whose length is at most
    some hundred standard deviations; the entropy is a trapezoidal rule on a grid of 800 x 800 that reaches 8 standard
    deviations beyond the curves.

    Args:
        name: of the law.
        curves: functions of u in (0, 1), (n,), to points (n, 2); all weigh the same. A constant one is a point.
        std: of the noise.
    """

    def __init__(self, name: str, curves: list[Callable[[Tensor], Tensor]], std: float):
        self.name, self.shape, self.curves, self.std = name, (2,), curves, number("std", std, 1e-3, 1e3)
        places, weights = (torch.from_numpy(part) for part in leggauss(NODES))
        nodes = [curve((places + 1) / 2) for curve in curves]
        if all((found == found[0]).all() for found in nodes):  # points: one node each
            nodes, weights = [found[:1] for found in nodes], weights.sum(0, keepdim=True)
        self.nodes = torch.cat(nodes)
        self.weights = (weights / 2 / len(curves)).repeat(len(curves))

    def place(self, uniforms: Tensor) -> Tensor:
        which = uniforms[:, 0] * len(self.curves)
        index = which.floor().clamp_max(len(self.curves) - 1)
        every = torch.stack([curve(uniforms[:, 1]) for curve in self.curves])
        chosen = every[index.long(), torch.arange(len(uniforms), device="cpu")]
        return chosen + self.std * torch.special.ndtri(uniforms[:, 2:4])

    def log_prob(self, x: Tensor) -> Tensor:
        flat = self._checked(x).double()
        nodes, logs = self.nodes.to(flat), self.weights.to(flat).log()
        return torch.cat([self._log_density(part, nodes, logs) for part in flat.split(4096)]).to(x.dtype)

    def _log_density(self, x: Tensor, nodes: Tensor, logs: Tensor) -> Tensor:
        far = x.square().sum(1)[:, None] + nodes.square().sum(1) - 2 * x @ nodes.T
        square = far.clamp_min_(0) / self.std**2
        return torch.logsumexp(logs - 0.5 * square, 1) - math.log(2 * math.pi * self.std**2)

    def find_entropy(self) -> float:
        low, high = self.nodes.amin(0) - 8 * self.std, self.nodes.amax(0) + 8 * self.std
        steps = torch.linspace(0, 1, GRID, dtype=torch.float64, device="cpu")
        rows, columns = (
            torch.exp(-0.5 * ((low[j] + (high[j] - low[j]) * steps)[:, None] - self.nodes[:, j]).square() / self.std**2)
            for j in range(2)
        )
        p = (rows * self.weights) @ columns.T / (2 * math.pi * self.std**2)
        return float(-torch.special.xlogy(p, p).sum() * ((high - low) / (GRID - 1)).prod())


class Checkerboard(Law):
    """Uniform on the dark squares of a board of side x side squares (FFJORD's: 4 x 4 squares of side 2).

    Args:
        squares: along a side, even.
        size: side of a square; the board is centred on 0.
    """

    name = "checkerboard"
    shape = (2,)

    def __init__(self, squares: int = 4, size: float = 2.0):
        self.squares, self.size = integer("squares", squares, 2), number("size", size, 1e-6, 1e6)
        if squares % 2:
            raise UsageError(f"squares: need an even number, got {squares}", "squares=4")

    def place(self, uniforms: Tensor) -> Tensor:
        column = (uniforms[:, 0] * self.squares).floor().clamp_max(self.squares - 1)
        row = 2 * (uniforms[:, 1] * self.squares / 2).floor().clamp_max(self.squares / 2 - 1) + column % 2
        corner = torch.stack([column, row], 1) - self.squares / 2
        return (corner + uniforms[:, 2:4]) * self.size

    def log_prob(self, x: Tensor) -> Tensor:
        cell = (self._checked(x) / self.size + self.squares / 2).floor()
        inside = ((cell >= 0) & (cell < self.squares)).all(1) & ((cell.sum(1) % 2) == 0)
        return torch.where(inside, x.new_tensor(-self.entropy), -math.inf)

    def find_entropy(self) -> float:
        return math.log(self.squares**2 / 2 * self.size**2)


class TwoNormals(Law):
    """Two isotropic normal distributions of the same weight, N(m1 a, s1^2) and N(m2 a, s2^2), a = (1, ..., 1)/sqrt(d).

    Its entropy needs two dimensions only, the place along a and the distance from that line, whatever d is.

    Args:
        name: of the law.
        d: dimensions.
        means: m1 and m2.
        stds: s1 and s2.
    """

    def __init__(self, name: str, d: int, means: tuple[float, float], stds: tuple[float, float]):
        self.name, self.shape, self.means, self.stds = name, (integer("d", d, 2),), means, stds
        self.numbers = d + 1

    def place(self, uniforms: Tensor) -> Tensor:
        second = (uniforms[:, :1] >= 0.5).double()
        (m1, m2), (s1, s2) = self.means, self.stds
        mean = (m1 + (m2 - m1) * second) / math.sqrt(self.shape[0])
        return mean + (s1 + (s2 - s1) * second) * torch.special.ndtri(uniforms[:, 1:])

    def log_prob(self, x: Tensor) -> Tensor:
        along = self._checked(x).sum(1) / math.sqrt(self.shape[0])
        return self._log_density(along, (x.square().sum(1) - along**2).clamp_min(0))

    def _log_density(self, along: Tensor, square: Tensor) -> Tensor:
        """log p where the place along a and the squared distance from its line are these."""
        logs = [
            -0.5 * ((along - m) ** 2 + square) / s**2 - self.shape[0] * math.log(s * math.sqrt(2 * math.pi))
            for m, s in zip(self.means, self.stds, strict=True)
        ]
        return torch.logaddexp(*logs) - math.log(2)

    def find_entropy(self) -> float:
        """By quadrature over 8 standard deviations to either side of each component's mass."""
        total, degrees = 0.0, self.shape[0] - 1
        places, weights = (torch.from_numpy(part) for part in leggauss(NODES))
        steps = torch.linspace(-8, 8, GRID, dtype=torch.float64, device="cpu")
        for m, s in zip(self.means, self.stds, strict=True):
            along = m + s * steps
            inner, outer = max(0.0, math.sqrt(degrees) - 8), math.sqrt(degrees) + 8
            radius = s * (inner + (outer - inner) * (places + 1) / 2)
            log_chi = (
                (degrees - 1) * radius.log() - 0.5 * radius**2 / s**2 - degrees * math.log(s)
                - math.lgamma(degrees / 2) - (degrees / 2 - 1) * math.log(2)
            )  # fmt: skip
            weight = torch.exp(-0.5 * steps**2)[:, None] * (weights * log_chi.exp())
            value = self._log_density(along[:, None], radius**2)
            total -= 0.5 * float((weight * value).sum() / weight.sum())
        return total


# ---- the laws by name


def eight_gaussians(radius: float = 4 / 1.414, std: float = 0.5 / 1.414) -> Smoothed:
    """Eight Gaussians on a circle: FFJORD's by default, torchcfm's with radius 5 and std 0.1^0.5."""
    angles = [k * math.pi / 4 for k in range(8)]
    centres = [radius * torch.tensor([[math.cos(a), math.sin(a)]], dtype=torch.float64, device="cpu") for a in angles]
    return Smoothed("8gaussians", [lambda u, c=c: c.expand(len(u), 2) for c in centres], std)


def moons(std: float = 0.1, scale: float = 2.0, shift: tuple[float, float] = (-1.0, -0.2)) -> Smoothed:
    """Two half circles (scikit-learn's make_moons), times `scale`, plus `shift`: FFJORD's by default.

    torchcfm's are std=0.2, scale=3, shift=(-1, -1).
    """
    move = torch.tensor(shift, dtype=torch.float64, device="cpu")

    def outer(u: Tensor) -> Tensor:
        return scale * torch.stack([torch.cos(math.pi * u), torch.sin(math.pi * u)], 1) + move

    def inner(u: Tensor) -> Tensor:
        return scale * torch.stack([1 - torch.cos(math.pi * u), 0.5 - torch.sin(math.pi * u)], 1) + move

    return Smoothed("moons", [outer, inner], std * scale)


def swissroll(std: float = 0.2, scale: float = 0.2) -> Smoothed:
    """A spiral of one and a half turns (scikit-learn's make_swiss_roll without its height), FFJORD's by default."""

    def curve(u: Tensor) -> Tensor:
        angle = 1.5 * math.pi * (1 + 2 * u)
        return scale * angle[:, None] * torch.stack([torch.cos(angle), torch.sin(angle)], 1)

    return Smoothed("swissroll", [curve], std)


def rings(std: float = 0.08, radii: tuple[float, ...] = (0.75, 1.5, 2.25, 3.0)) -> Smoothed:
    """Circles around 0 that weigh the same; radii and noise are FFJORD's."""

    def circle(radius: float) -> Callable[[Tensor], Tensor]:
        return lambda u: radius * torch.stack([torch.cos(2 * math.pi * u), torch.sin(2 * math.pi * u)], 1)

    return Smoothed("rings", [circle(radius) for radius in radii], std)


def spirals(std: float = 0.1) -> Smoothed:
    """Two arms of a spiral, opposite each other, of one and a half turns with points denser inside."""

    def arm(sign: float) -> Callable[[Tensor], Tensor]:
        def curve(u: Tensor) -> Tensor:
            angle = 3 * math.pi * u
            return sign / 3 * angle[:, None] * torch.stack([-torch.cos(angle), torch.sin(angle)], 1)

        return curve

    return Smoothed("spirals", [arm(1.0), arm(-1.0)], std)


LAWS: dict[str, Callable[[], Law]] = {
    "8gaussians": eight_gaussians,
    "checkerboard": Checkerboard,
    "moons": moons,
    "swissroll": swissroll,
    "rings": rings,
    "spirals": spirals,
    "twonorm": lambda: TwoNormals("twonorm", 20, (2.0, -2.0), (1.0, 1.0)),
    "ringnorm": lambda: TwoNormals("ringnorm", 20, (0.0, 1.0), (2.0, 1.0)),
}


def law(name: str) -> Law:
    """The law of a name.

    Raises:
        UsageError: an unknown name.
    """
    if name not in LAWS:
        raise unknown("law", name, LAWS)
    return LAWS[name]()


def patches(n: int, seed: int = 0) -> Tensor:
    """Patches of 8x8 pixels of scikit-learn's two photographs, as in BSDS300: grey, dequantised, without their mean.

    A patch minus its mean has 63 free pixels; the last is left out. Patch i depends on seed + i alone.

    Returns:
        (n, 63), float64, in units of the 256 grey levels divided by 256.

    Raises:
        MissingError: scikit-learn, which has the photographs, is not installed.
    """
    from pfode.optional import optional_module

    images = optional_module("sklearn.datasets", "data 'patches'").load_sample_images().images
    grey = [torch.from_numpy(image.astype(np.float64).mean(2)) for image in images]
    uniforms = keyed_uniforms(integer("seed", seed, 0, 2**62), integer("n", n, 0), 3 + PATCH * PATCH)
    taken = []
    for row in uniforms:
        image = grey[min(int(row[0] * len(grey)), len(grey) - 1)]
        top, left = (int(row[1 + j] * (image.shape[j] - PATCH)) for j in range(2))
        pixels = (image[top : top + PATCH, left : left + PATCH].flatten() + row[3:]) / 256
        taken.append((pixels - pixels.mean())[:-1])
    return torch.stack(taken) if taken else uniforms.new_zeros(0, PATCH * PATCH - 1)
