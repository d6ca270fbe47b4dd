"""Step-size controllers: values that turn an error into a factor of the step size.

With e the error in units of the tolerance and k the order of its estimate, a PID controller multiplies the step by

    safety * e_n^(-(p + i + d) / k) * e_(n-1)^((p + 2 d) / k) * e_(n-2)^(-d / k)

clipped to [shrink, grow] (Söderlind 2003, "Digital filters in adaptive time-stepping"; diffrax's are the same). Errors
of rejected steps are not remembered. After a rejected step the factor is the integral one, and the step after it does
not grow (Hairer, Nørsett & Wanner 1993, II.4).
"""

import math
from dataclasses import dataclass
from typing import Any

from pfode.errors import UsageError, number

__all__ = ["CONTROLLERS", "PI", "PID", "STRETCH", "I"]

STRETCH = 1.01  # a step that ends this near to a stop goes to the stop
_TINY = 1e-10  # errors below count as this


@dataclass(frozen=True)
class PID:
    """Coefficients and limits of a controller.

    Args:
        p, i, d: proportional, integral and derivative coefficients.
        safety, shrink, grow: see above; shrink is also the factor after a step that is not finite or not solved.
        first_step: size of the first step; None: chosen from the field (Hairer, Norsett & Wanner 1993, II.4).
        min_step, max_step: limits of the step size. A step that fails at min_step ends the solve, unless `force`.
        force: accept steps of size min_step whatever their error.

    Raises:
        UsageError: numbers that are no limits.
    """

    p: float = 0.0
    i: float = 1.0
    d: float = 0.0
    safety: float = 0.9
    shrink: float = 0.2
    grow: float = 10.0
    first_step: float | None = None
    min_step: float = 0.0
    max_step: float = math.inf
    force: bool = False

    def __post_init__(self) -> None:
        number("safety", self.safety, 1e-3, 1.0)
        number("shrink", self.shrink, 1e-3, 1.0)
        number("grow", self.grow, 1.0)
        number("min_step", self.min_step, 0.0)
        if self.first_step is not None and number("first_step", self.first_step, 0.0) == 0:
            raise UsageError("first_step: need a positive number, got 0", "first_step=None")
        if not self.max_step > 0 or self.max_step < self.min_step:
            raise UsageError(f"max_step: need at least min_step = {self.min_step:g} and more than 0: {self.max_step}")

    @property
    def stretch(self) -> float:
        """How much longer than wanted a step may be that ends at a stop."""
        return STRETCH

    def fit(self, batching: Any, t: Any, h: Any) -> Any:
        """The size of the step to take from t where one of size h is wanted: no larger."""
        return h

    def factor(self, batching: Any, error: Any, accepted: Any, memory: tuple[Any, Any, Any], order: float) -> Any:
        """The factor of the step size and the memory after the step.

        Args:
            batching: arithmetic on floats or on shape (batch,).
            error: e_n, infinite where the step failed.
            memory: (e_(n-1), e_(n-2), whether the step before was rejected).
        """
        e = batching.high(error, _TINY)
        previous, earlier, rejected = memory
        plain = e ** (-1.0 / order)
        if self.p or self.d:
            tuned = e ** (-(self.p + self.i + self.d) / order)
            tuned = tuned * previous ** ((self.p + 2 * self.d) / order) * earlier ** (-self.d / order)
            plain = batching.where(accepted, tuned, plain)
        factor = batching.low(batching.high(self.safety * plain, self.shrink), self.grow)
        factor = batching.where(accepted & batching.no(rejected), factor, batching.low(factor, 1.0))
        memory = (
            batching.where(accepted, e, previous),
            batching.where(accepted, previous, earlier),
            batching.no(accepted),
        )
        return factor, memory


def I(**limits: Any) -> PID:  # noqa: E743  (the controller's name)
    """The integral controller, the default."""
    return PID(**limits)


def PI(**limits: Any) -> PID:
    """The proportional-integral controller of Gustafsson (1991): smoother where stability limits the step.

    The exponents are 0.7 / k of the last error and 0.4 / k of the one before (Hairer & Wanner 1996, IV.2).
    """
    return PID(**{"p": 0.4, "i": 0.3, **limits})


CONTROLLERS = {
    "I": I(),
    "PI": PI(),
    "PID": PID(p=0.14, i=0.25, d=0.10),  # exponents 0.49, 0.34 and 0.10 over k (Kennedy & Carpenter 2003)
}
