"""Brownian motions with torchsde's calls, each a `pfode.brownian.Brownian` keyed by one number."""

import abc
import warnings
from typing import Any

import torch
from torch import Tensor

from pfode.brownian import Brownian
from pfode.compat.torchsde.settings import LEVY_AREA_APPROXIMATIONS

__all__ = [
    "BaseBrownian",
    "BrownianInterval",
    "BrownianPath",
    "BrownianTree",
    "ReverseBrownian",
    "brownian_interval_like",
]


class BaseBrownian(abc.ABC):
    """What `sdeint` takes as `bm`."""

    __slots__ = ()

    @abc.abstractmethod
    def __call__(self, ta: Any, tb: Any = None, return_U: bool = False, return_A: bool = False) -> Any: ...

    @abc.abstractmethod
    def __repr__(self) -> str: ...

    @property
    @abc.abstractmethod
    def dtype(self) -> torch.dtype: ...

    @property
    @abc.abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abc.abstractmethod
    def shape(self) -> Any: ...

    @property
    @abc.abstractmethod
    def levy_area_approximation(self) -> str: ...

    def size(self) -> Any:
        """The shape."""
        return self.shape


def _entropy() -> int:
    """A key from torch's global random numbers: torch.manual_seed sets it."""
    return int(torch.randint(2**62, (), device="cpu"))


class BrownianInterval(BaseBrownian):
    """Increments of a Brownian motion on [t0, t1]: bm(ta, tb), or with U = int (W(s) - W(ta)) ds and the Levy area A.

    With one `entropy` the numbers are the same whatever was asked for before, in memory that does not grow.

    Args:
        t0, t1: the ends; queries beyond them are cut there, with a warning.
        size, dtype, device: of an increment; the last dimension are channels.
        entropy: the key; None: drawn from torch's global random numbers.
        dt: a size of steps for which walks are to be quick.
        levy_area_approximation: "none", "space-time" (for U), "davie" or "foster" (for A as well).
        W, H: the increment of the whole, and its space-time area, in place of drawn ones.
        tol, pool_size, cache_size, halfway_tree: checked as the original does, and of no effect.

    Raises:
        ValueError: what the original refuses.
    """

    def __init__(
        self, t0: Any = 0.0, t1: Any = 1.0, size: Any = None, dtype: Any = None, device: Any = None,
        entropy: int | None = None, dt: Any = None, tol: float = 0.0, pool_size: int = 8,
        cache_size: int | None = 45, halfway_tree: bool = False, levy_area_approximation: str = "none",
        W: Tensor | None = None, H: Tensor | None = None,
    ):  # fmt: skip
        t0, t1 = _scalar("t0", t0), _scalar("t1", t1)
        if t0 > t1:
            raise ValueError(f"Initial time {t0} should be less than terminal time {t1}.")
        if halfway_tree and (tol <= 0 or dt is not None):
            raise ValueError("halfway_tree needs a positive `tol`, and no `dt`.")
        if tol < 0:
            raise ValueError("`tol` should be non-negative.")
        if levy_area_approximation not in LEVY_AREA_APPROXIMATIONS:
            raise ValueError(
                f"`levy_area_approximation` must be one of {LEVY_AREA_APPROXIMATIONS}, got '{levy_area_approximation}'."
            )
        self._size, self._dtype, self._device = _like(W, H, size, dtype, device)
        self._start, self._end, self._levy = t0, t1, levy_area_approximation
        self._entropy = _entropy() if entropy is None else int(entropy)
        area, step = levy_area_approximation != "none", None if dt is None or W is not None else _scalar("dt", dt)
        whole = None if W is None and H is None else (W, H if area else None)
        self._path = Brownian.single(
            self._entropy % 2**64, self._size, t0, t1 if t1 > t0 else t0 + 1, area, step=step, whole=whole,
            dtype=self._dtype, device=self._device,
        )  # fmt: skip

    def __call__(self, ta: Any, tb: Any = None, return_U: bool = False, return_A: bool = False) -> Any:
        if tb is None:
            warnings.warn(
                "BrownianInterval is optimised for interval-based queries, not point evaluation.", stacklevel=2
            )
            ta, tb = self._start, ta
        a, b = self._inside("ta", ta), self._inside("tb", tb)
        if a > b:
            raise RuntimeError(f"Query times ta={a:.3f} and tb={b:.3f} must respect ta <= tb.")
        if self._levy == "none":
            if return_U or return_A:
                raise ValueError("levy_area_approximation='none' gives neither U nor A")
            return self._path.increment(a, b)
        w, h = self._path.increment(a, b)
        found = [w]
        if return_U:
            found.append((b - a) * (h + 0.5 * w))
        if return_A:
            if self._levy == "space-time":
                raise ValueError("levy_area_approximation='space-time' gives no A")
            found.append(self._path.levy_area(a, b, self._levy) if len(self._size) > 1 else torch.zeros_like(w))
        return tuple(found) if len(found) > 1 else w

    def _inside(self, name: str, t: Any) -> float:
        """A time, cut at the ends."""
        t = float(t)
        if self._start <= t <= self._end:
            return t
        warnings.warn(f"Should have {self._start}<={name}<={self._end} but got {name}={t}.", stacklevel=3)
        return min(max(t, self._start), self._end)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(t0={self._start:.3f}, t1={self._end:.3f}, size={self._size}, dtype={self._dtype}, "
            f"device={str(self._device)!r}, entropy={self._entropy}, levy_area_approximation={self._levy!r})"
        )

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def shape(self) -> Any:
        return self._size

    @property
    def levy_area_approximation(self) -> str:
        return self._levy


class _Around(BaseBrownian):
    """A Brownian motion made of another one."""

    _inner: BaseBrownian

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._inner})"

    @property
    def dtype(self) -> torch.dtype:
        return self._inner.dtype

    @property
    def device(self) -> torch.device:
        return self._inner.device

    @property
    def shape(self) -> Any:
        return self._inner.shape

    @property
    def levy_area_approximation(self) -> str:
        return self._inner.levy_area_approximation


class ReverseBrownian(_Around):
    """The same motion, asked for by negative times."""

    def __init__(self, base_brownian: BaseBrownian):
        self._inner = self.base_brownian = base_brownian

    def __call__(self, ta: Any, tb: Any = None, return_U: bool = False, return_A: bool = False) -> Any:
        return self._inner(-tb, -ta, return_U=return_U, return_A=return_A)


class BrownianPath(_Around):
    """A motion on [t0, t0 + 1] that starts at w0; bm(t) is its place. `window_size` is of no effect."""

    def __init__(self, t0: Any, w0: Tensor, window_size: int = 8):
        self._w0 = w0
        self._inner = BrownianInterval(t0, t0 + 1, w0.shape, w0.dtype, w0.device)

    def __call__(self, t: Any, tb: Any = None, return_U: bool = False, return_A: bool = False) -> Any:
        if tb is None and not (return_U or return_A):
            return self._inner(self._inner._start, t) + self._w0  # type: ignore[attr-defined]
        return self._inner(t, tb, return_U=return_U, return_A=return_A)


class BrownianTree(BrownianPath):
    """A motion on [t0, t1] that starts at w0, and ends at w1 if that is given. The last four are of no effect."""

    def __init__(
        self, t0: Any, w0: Tensor, t1: Any = None, w1: Tensor | None = None, entropy: int | None = None,
        tol: float = 1e-6, pool_size: int = 24, cache_depth: int = 9, safety: float | None = None,
    ):  # fmt: skip
        self._w0 = w0
        end, rise = t0 + 1 if t1 is None else t1, None if w1 is None else w1 - w0
        self._inner = BrownianInterval(t0, end, w0.shape, w0.dtype, w0.device, entropy, W=rise)


def brownian_interval_like(
    y: Tensor, t0: Any = 0.0, t1: Any = 1.0, size: Any = None, dtype: Any = None, device: Any = None, **kwargs: Any
) -> BrownianInterval:
    """A BrownianInterval of the shape, dtype and device of a tensor, where these are not given."""
    size, dtype, device = size or y.shape, dtype or y.dtype, device or y.device
    return BrownianInterval(t0=t0, t1=t1, size=size, dtype=dtype, device=device, **kwargs)


def _scalar(name: str, t: Any) -> float:
    if not isinstance(t, int | float) and not (isinstance(t, Tensor) and t.ndim == 0):
        raise ValueError(f"{name} should be a float or 0-d torch.Tensor.")
    return float(t)


def _like(w: Tensor | None, h: Tensor | None, size: Any, dtype: Any, device: Any) -> tuple[Any, Any, torch.device]:
    """Shape, dtype and device, as given or as those of W and H."""
    given = [x for x in (w, h) if x is not None]
    for x in given:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise ValueError("W and H should be floating point torch.Tensors.")
        wrong = size is not None and tuple(size) != tuple(x.shape)
        if wrong or dtype not in (None, x.dtype) or (device is not None and torch.device(device) != x.device):
            raise ValueError("W and H should have the given size, dtype and device.")
        size, dtype, device = x.shape, x.dtype, x.device
    if size is None:
        raise ValueError("Must either specify `size` or pass in `W` or `H`.")
    return tuple(size), dtype or torch.get_default_dtype(), torch.device("cpu" if device is None else device)
