"""Rules moved towards noise or data: the shift of a resolution, as models of flows have it."""

import math

from torch import Tensor

from pfode.errors import UsageError, integer, number, unknown
from pfode.grids.rule import Grid, grid, named, spelt
from pfode.process import Process, float64

__all__ = ["flow_shift", "shifted"]


@named("shifted")
def shifted(rule: str | Grid = "time", shift: float = 3.0) -> Grid:
    """A rule whose sigma/alpha are multiplied by `shift`, its ends kept: t' = shift t / (1 + (shift - 1) t) in flows.

    Esser et al. 2024, eq. 23; for the shift of a resolution see `flow_shift`. It multiplies that of `Flow(shift=)`.
    Rules even in a power or the logarithm of sigma/alpha are unchanged by it.
    """
    inner = grid(rule) if isinstance(rule, str) else rule
    if not isinstance(inner, Grid):
        raise UsageError(f"shifted: need a grid first, got {rule!r:.60}", '"shifted(time,3)"')
    shift = number("shifted: shift", shift, 1e-3, 1e3)

    def move(process: Process, t: Tensor, by: float) -> Tensor:
        return process.time(process.log_snr(t) - 2 * math.log(by))

    def place(process: Process, high: float, low: float, n: int) -> Tensor:
        first, last = move(process, float64([high, low]), 1 / shift).tolist()
        return move(process, inner.place(process, first, last, n), shift)

    return Grid(spelt("shifted", [inner.name, shift]), place, inner.to_data, inner.late)


def flow_shift(
    seq_len: int,
    kind: str = "exponential",
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_seq_len: int = 256,
    max_seq_len: int = 4096,
) -> float:
    """The `shift` of a resolution, as Flux and SD3 have it: mu is linear in the length of the image's sequence.

    Args:
        seq_len: number of the image's tokens.
        kind: "exponential", shift = e^mu, or "linear", shift = mu (diffusers' time_shift_type).
        base_shift, max_shift: mu at base_seq_len and max_seq_len; the line goes on beyond them.

    Raises:
        UsageError: an unknown kind, or no positive shift.
    """
    if kind not in ("exponential", "linear"):
        raise unknown("time shift", kind, ("exponential", "linear"))
    short = integer("flow_shift: base_seq_len", base_seq_len, 1, 2**31)
    longer = integer("flow_shift: max_seq_len", max_seq_len, short + 1, 2**32)
    low, high = (number("flow_shift: shift", shift, -100, 100) for shift in (base_shift, max_shift))
    mu = low + (high - low) / (longer - short) * (integer("flow_shift: seq_len", seq_len, 1, 2**31) - short)
    if abs(mu) > 100:
        raise UsageError(f"flow_shift: mu = {mu:g} at {seq_len} tokens is no shift", "a shorter sequence")
    if kind == "linear" and mu <= 0:
        raise UsageError(f"flow_shift: mu = {mu:g} at {seq_len} tokens is no shift", 'kind="exponential"')
    return math.exp(mu) if kind == "exponential" else mu
