"""How a row of a plan is applied: `fold` works out what every row adds to the states to come, `add` adds it.

Rows run in transposed form. A row does not gather what it needs of earlier predictions; as soon as something is known
(the state y_k, the network's output F_k, the noise xi_k), its multiples are added to the sums that become y_{k+1},
y_{k+2}, ... So nothing that belongs to the network is kept: it may return one buffer again and again, or work in place
on what it is given, and the operations are as many as there are terms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pfode._torch import transformed, version
from pfode.denoiser import Preconditioned, Preconditioning
from pfode.plans.table import Plan, takes_part
from pfode.prediction import prediction

__all__ = [
    "Folded",
    "Row",
    "Rows",
    "Sums",
    "Terms",
    "add",
    "ahead",
    "combine",
    "fold",
    "folded",
    "row_affine",
    "used",
    "weighed",
    "with_noise",
]

Terms = Sequence[tuple[int, Tensor]]  # (j, factor): the state after the next j rows gets factor times the value
Sums = list[Tensor | None]  # entry j becomes the state after the next j + 1 rows; None: nothing added yet
KEPT = 8  # sets of folded rows that a plan keeps


def row_affine(name: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q) with m = p x + q D at these levels: the prediction's, or x0's where it is singular, at alpha = 0."""
    p, q = prediction(name).of_x0(alpha, sigma)
    if not prediction(name).singular:
        return p, q
    return torch.where(alpha == 0, 0.0, p), torch.where(alpha == 0, 1.0, q)


class Row(NamedTuple):
    """One row with the network's preconditioning in it; factors are 0-d tensors on the device, None where trivial.

    Attributes:
        c_in: the network is asked about c_in x; None: about x itself.
        g: what enters the sums is F + g x; None: the network's output F itself.
        state, output: what x and F + g x add to the sums, of which the first becomes the state that the row ends with.
        fresh: the factor of the row's noise in that state, added last. noise: what it adds to the sums of later rows.
        draws: whether the row's noise is used at all.
        c_skip, c_out: the denoiser's output is D = c_skip x + c_out F.
    """

    c_in: Tensor | None
    g: Tensor | None
    state: Terms
    output: Terms
    noise: Terms
    fresh: Tensor | None
    draws: bool
    c_skip: Tensor
    c_out: Tensor


class Rows(NamedTuple):
    """The rows of a plan for a network: `before` is the factor of x_T in y_1 (r' of row 0), `window` of the sums."""

    rows: list[Row]
    c_noise: Tensor
    before: Tensor | None
    window: int


def add(sums: Sums, value: Tensor, terms: Terms, in_place: bool = True) -> None:
    """Add the multiples of a value to the sums: the one place where the factors of a plan meet the states.

    Args:
        in_place: whether a sum may be written over, as it may but inside `torch.func.vmap`, where a value can have a
            dimension that the sum has not.
    """
    for j, factor in terms:
        begun = sums[j]
        if begun is None:
            sums[j] = value * factor
        elif in_place:
            sums[j] = begun.addcmul_(value, factor)
        else:
            sums[j] = torch.addcmul(begun, value, factor)


def combine(sums: Sums, row: Row, x: Tensor, out: Tensor, in_place: bool = True) -> Tensor:
    """The state that a row ends with, but for its own noise; the sums go on to the row after it.

    Args:
        sums: to which the row's state has been added.
        x, out: the state, needed where the row has a g, and the network's output for it.
    """
    add(sums, out if row.g is None else torch.addcmul(out, x, row.g), row.output, in_place)
    made = sums.pop(0)
    sums.append(None)
    return torch.zeros_like(x) if made is None else made


def with_noise(sums: Sums, row: Row, x: Tensor, noise: Tensor, in_place: bool = True) -> Tensor:
    """The state that a row ends with, from that of `combine` and the row's noise."""
    add(sums, noise, row.noise, in_place)
    return x if row.fresh is None else torch.addcmul(x, noise, row.fresh)


@dataclass(frozen=True, eq=False)
class Folded:
    """The factors of a plan's rows for a network, float64 on the host, row k for row k.

    Attributes:
        c_in, g, c_skip, c_out: of `Row`, shape (n,); a g of 0 is none.
        state, output, noise: what row k adds to the state after the next j rows, shape (n, window); the first of
            noise is the fresh one.
        before: of `Rows`, 0-d.
        draws: of `Row`.
    """

    c_in: Tensor
    g: Tensor
    c_skip: Tensor
    c_out: Tensor
    state: Tensor
    output: Tensor
    noise: Tensor
    before: Tensor
    draws: list[bool]

    @property
    def window(self) -> int:
        """How many states a row adds to."""
        return self.state.shape[1]

    @property
    def columns(self) -> Tensor:
        """All factors side by side, as `row` takes them apart, shape (n, 4 + 3 window)."""
        single = torch.stack([self.c_in, self.g, self.c_skip, self.c_out], 1)
        return torch.cat([single, self.state, self.output, self.noise], 1)

    @property
    def parts(self) -> list[list[bool]]:
        """Which factors take part, for every row."""
        parts = takes_part(self.columns)
        parts[:, 0] = takes_part(self.c_in - 1) & ((self.c_in - 1).detach().abs() >= 1e-12)
        return parts.tolist()

    def row(self, factors: Sequence[Tensor], parts: Sequence[bool], draws: bool) -> Row:
        """A row of these factors, a line of `columns` on the device, of which only the `parts` enter."""
        w = self.window
        c_in, g, c_skip, c_out = factors[:4]
        state, output, noise = (
            tuple((j, factors[i + j]) for j in range(w) if parts[i + j]) for i in (4, 4 + w, 4 + 2 * w)
        )
        fresh = factors[4 + 2 * w] if parts[4 + 2 * w] else None
        later = tuple((j - 1, factor) for j, factor in noise if j)
        return Row(
            c_in if parts[0] else None, g if parts[1] else None, state, output, later, fresh, draws, c_skip, c_out
        )


def fold(plan: Plan, pre: Preconditioning, scale: Tensor | None = None, stages: bool = True) -> Folded:
    """The rows with the network's preconditioning folded in: m = q c_out (F + g x), the factor q c_out moved into b.

    m is not formed where that can be avoided: what it has of x joins the factors of the states. Where no later row
    needs m, that is r_k; where an inner stage is needed by the next row alone, r_{k+1}, as y_k = (y_{k+1} - b_k0 F_k) /
    r_k; and in plans of which no row looks back further than to the row before it, r'_{k+1}.

    Args:
        pre: of the network at the plan's query times, each of shape (n,).
        scale: the register holds scale_k y_k at state k, shape (n + 1,), and c_in, c_skip are for that; None: y_k.
        stages: whether an inner stage's state goes into the next row as it came out of this one.
    """
    p, q = row_affine(plan.prediction, plan.alpha[:-1], plan.sigma[:-1])
    r, r_prev, b, c = plan.r, plan.r_prev, plan.b, plan.c
    if scale is not None:
        here, after = scale[:-1], scale[1:]
        r, p = r * after / here, p / here
        r_prev = r_prev * after / torch.cat([here[:1], here[:-1]])
        b, c = b * after[:, None], c * after[:, None]
    exact = r
    unit = q * pre.c_out
    g = (p + q * pre.c_skip) / unit
    b = weighed(b, unit)
    own = r + b[:, 0] * g
    kept = takes_part(g) & used(b, 1)
    learnt = own.requires_grad
    if b.shape[1] > 1:
        if stages and not learnt:
            only = ~(b[:, 1:].any(1) | r_prev.bool() | c.any(1) | used(b, 2) | plan.node[1:]) & (own.abs() > 0.2)
            back = torch.where(kept & only, b.roll(-1, 0)[:, 1] * g / own, 0.0).roll(1)  # what y_{k+1} gets for it
            kept &= ~only
            own = own + back
            b = torch.cat([b[:, :1], (b[:, 1] - back * b[:, 0].roll(1))[:, None], b[:, 2:]], 1)
        next_alone = kept & ~used(b, 2).any()
        r_prev = r_prev + b[:, 1] * torch.where(next_alone, g, 0.0).roll(1)
        kept &= ~next_alone
    r = torch.where(kept, own - b[:, 0] * g, own)
    if not learnt:
        r = torch.where(r.abs() < 1e-13 * exact.abs(), 0.0, r)
    window = max(2, b.shape[1], c.shape[1])
    state = torch.cat([r[:, None], torch.cat([r_prev[1:], r_prev.new_zeros(1)])[:, None]], 1)
    return Folded(
        c_in=pre.c_in,
        g=torch.where(kept, g, 0.0),
        c_skip=pre.c_skip,
        c_out=pre.c_out,
        state=torch.nn.functional.pad(state, (0, window - 2)),
        output=ahead(b, window),
        noise=ahead(c, window),
        before=r_prev[0],
        draws=used(plan.c).tolist(),
    )


def folded(plan: Plan, net: Preconditioned, x: Tensor) -> Rows:
    """The rows of a plan for a network, in the dtype and on the device of x.

    They are kept with the plan, by the values of the preconditioning, so that only the first run of a plan folds them.
    """
    pre = net.precondition(plan.t)
    if transformed() is not None or any(
        value.requires_grad for value in (*pre, plan.t, plan.r, plan.r_prev, plan.b, plan.c)
    ):
        return _rows(plan, fold(plan, pre), pre.c_noise, x.dtype, x.device)
    changes = [version(getattr(plan, name)) for name in ("r", "r_prev", "b", "c")]
    key = (torch.stack(pre).numpy().tobytes(), x.dtype, x.device, *changes)
    kept: dict[object, Rows] = plan.__dict__.setdefault("_folded", {})
    found = kept.get(key)
    if found is None:
        with torch.inference_mode(False):
            found = _rows(plan, fold(plan, pre), pre.c_noise, x.dtype, x.device)
        while len(kept) >= KEPT:
            kept.pop(next(iter(kept)), None)
        kept[key] = found
    return found


def _rows(plan: Plan, made: Folded, c_noise: Tensor, dtype: torch.dtype, device: torch.device) -> Rows:
    table = torch.cat([made.columns, c_noise[:, None]], 1).to(dtype).to(device)
    before = made.before.to(dtype).to(device) if takes_part(made.before) else None
    lines = [line.unbind() for line in table[:, :-1].unbind()]
    rows = [made.row(*row) for row in zip(lines, made.parts, made.draws, strict=True)]
    return Rows(rows, table[:, -1], before, made.window)


def ahead(factors: Tensor, window: int) -> Tensor:
    """factors[k, j], which weigh what row k - j made, by the row that made it: entry [k, j] is factors[k + j, j]."""
    n, ages = factors.shape
    row = torch.arange(n, device="cpu")[:, None] + torch.arange(ages, device="cpu")
    moved = torch.where(row < n, factors.gather(0, row.clamp_max(n - 1)), 0.0)
    return torch.nn.functional.pad(moved, (0, window - ages))


def _made(factors: Tensor) -> Tensor:
    """The row whose value factors[k, j] weighs: k - j."""
    n, window = factors.shape
    return torch.arange(n, device="cpu")[:, None] - torch.arange(window, device="cpu")


def weighed(factors: Tensor, scale: Tensor) -> Tensor:
    """factors[k, j] scale[k - j]: of what is `scale` times smaller; 0 before the first row."""
    made = _made(factors)
    return factors * torch.where(made >= 0, scale[made.clamp_min(0)], 0.0)


def used(factors: Tensor, age: int = 0) -> Tensor:
    """For every row, whether a factor of this age or more weighs what it made."""
    made, found = _made(factors)[:, age:], torch.zeros(len(factors), dtype=torch.bool, device="cpu")
    found[made[takes_part(factors[:, age:]) & (made >= 0)]] = True
    return found
