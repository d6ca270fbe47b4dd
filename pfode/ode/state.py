"""State: any pytree of tensors as one flat tensor, and the user's field on it.

A tree is a tensor, or tuples, lists, dicts, named tuples and dataclasses of trees. In joint mode it is flattened to
shape (n,); in per-sample mode every leaf has the batch first and the flat state has shape (batch, d). The flat dtype is
float32 or better, complex if a leaf is; the field sees every leaf in its own dtype.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from pfode._torch import in_place_changes, storage_uses, transformed, version
from pfode.errors import UsageError

__all__ = [
    "Context",
    "Field",
    "Layout",
    "Loan",
    "Tree",
    "Witness",
    "changed",
    "leaves",
    "rebuild",
    "unchanged",
    "versions",
    "without_graph",
]

Tree = Any
T = TypeVar("T")


def leaves(tree: Tree) -> Iterator[Any]:
    """The leaves of a tree, in order: whatever is no container."""
    for child in _children(tree) or ():
        yield from leaves(child)
    if _children(tree) is None:
        yield tree


def _aligned(example: Tree, tree: Tree) -> Iterator[Any]:
    """The leaves of a tree in the order of an example of its form, dicts by their keys; where it has another, it."""
    children, found = _children(example), _children(tree)
    if isinstance(example, dict) and isinstance(tree, dict) and example.keys() == tree.keys():
        found = [tree[key] for key in example]
    elif isinstance(example, dict) or isinstance(tree, dict):
        found = None
    if children is None or found is None or len(children) != len(found):
        yield tree
        return
    for child, other in zip(children, found, strict=True):
        yield from _aligned(child, other)


def rebuild(tree: Tree, values: Iterator[Any]) -> Tree:
    """A tree of the same form with other leaves."""
    children = _children(tree)
    if children is None:
        return next(values)
    new = [rebuild(child, values) for child in children]
    if isinstance(tree, dict):
        return dict(zip(tree, new, strict=True))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return dataclasses.replace(tree, **{f.name: v for f, v in zip(dataclasses.fields(tree), new, strict=True)})
    kind: Any = type(tree)
    return kind(*new) if hasattr(tree, "_fields") else kind(new)


def without_graph(tree: Tree) -> Tree:
    """The same without graphs; leaves that are no tensors stay."""
    return rebuild(tree, iter([part.detach() if isinstance(part, Tensor) else part for part in leaves(tree)]))


def _children(tree: Tree) -> list[Any] | None:
    if isinstance(tree, tuple | list):
        return list(tree)
    if isinstance(tree, dict):
        return list(tree.values())
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [getattr(tree, f.name) for f in dataclasses.fields(tree)]
    return None


class Layout:
    """How a tree lies in the flat state.

    Args:
        y0: the initial state, a tree of floating-point or complex tensors on one device.
        per_sample: keep the leaves' first dimension, the batch, and let every sample have its own times.
        samples: keep it, where one time serves all samples.

    Raises:
        UsageError: no tensors, tensors of whole numbers, several devices, or no common batch.
    """

    def __init__(self, y0: Tree, per_sample: bool = False, samples: bool = False):
        try:
            parts = list(leaves(y0))
        except RecursionError as error:
            raise UsageError("y0: its containers are nested too deep", "y0=torch.tensor([1.0])") from error
        for part in parts:
            if not isinstance(part, Tensor) or not (part.is_floating_point() or part.is_complex()):
                got = part.dtype if isinstance(part, Tensor) else type(part).__name__
                hint = "y0=y0.float()" if isinstance(part, Tensor) else "y0=torch.tensor([1.0])"
                raise UsageError(f"y0: need floating-point or complex tensors, got {got}", hint)
            if part.is_meta or part.layout != torch.strided or part.dtype.itemsize < 2 or part.dtype == torch.complex32:
                kind = "a tensor without memory" if part.is_meta else f"{part.dtype}, {part.layout}"
                problem = f"y0: need dense tensors of 16 bits or more, complex ones of 64, got {kind}"
                raise UsageError(problem, "y0=y0.to_dense().float()")
        no_samples = all(part.ndim > 1 - per_sample and not part.shape[0] for part in parts)
        if not parts or not (no_samples or sum(part.numel() for part in parts)):
            raise UsageError(f"y0: an empty state cannot be integrated, got {y0!r:.40}", "y0=torch.tensor([1.0])")
        if len({part.device for part in parts}) > 1:
            raise UsageError(f"y0: its tensors lie on several devices: {sorted({str(p.device) for p in parts})}")
        batches, rows = {part.shape[:1] for part in parts}, per_sample or samples
        if rows and (len(batches) > 1 or () in batches):
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            hint = "y0 of shape (samples, ...)" if samples else 'batch="joint"'
            raise UsageError(f"y0: every tensor of it needs the batch first, got {shapes}", hint)
        self.example, self.per_sample = y0, per_sample
        self.shapes, self.dtypes = [part.shape for part in parts], [part.dtype for part in parts]
        self.device = parts[0].device
        self.dtype = torch.float32
        for dtype in self.dtypes:
            self.dtype = torch.promote_types(self.dtype, dtype)
        self.lead = 1 if rows else 0
        self.batch = parts[0].shape[0] if rows else 1
        self.sizes = [math.prod(shape[self.lead :]) for shape in self.shapes]
        self.plain = y0 is parts[0] and self.dtypes[0] == self.dtype  # the flat state is a view of the only tensor

    @property
    def real(self) -> torch.dtype:
        """The real dtype of the flat state: the times that the field sees."""
        return self.dtype.to_real() if self.dtype.is_complex else self.dtype

    def flat(self, tree: Tree, name: str = "y0") -> Tensor:
        """The flat state of a tree of this form.

        Raises:
            UsageError: another structure or other shapes; `name` says whose.
        """
        parts = self.leaves(tree, name)
        flat = [part.reshape(*part.shape[: self.lead], n) for part, n in zip(parts, self.sizes, strict=True)]
        if len(flat) == 1:
            return flat[0] if flat[0].dtype == self.dtype else flat[0].to(self.dtype)
        return torch.cat([part.to(self.dtype) for part in flat], self.lead)

    def pair(self) -> list[int] | None:
        """The sizes of the two parts of a state that is a pair of trees; None for any other."""
        parts = _children(self.example)
        if parts is None or len(parts) != 2:
            return None
        first = sum(self.sizes[: len(list(leaves(parts[0])))])
        return [first, sum(self.sizes) - first]

    def leaves(self, tree: Tree, name: str = "y0") -> list[Tensor]:
        """The leaves of a tree of this form, checked as in `flat`."""
        parts = list(_aligned(self.example, tree))
        if [part.shape if isinstance(part, Tensor) else None for part in parts] != self.shapes:
            hint = "it returns dy/dt, a tree like y0" if name != "y0" else ""
            raise UsageError(f"{name}: need {_form(self.shapes)} as y0, got {_form(parts)}", hint)
        for part, dtype in zip(parts, self.dtypes, strict=True):
            if part.is_complex() > dtype.is_complex or not (part.is_complex() or part.is_floating_point()):
                raise UsageError(f"{name}: need {dtype} as y0, got {part.dtype}", "give both the same dtype")
        return parts

    def parts(self, stack: Tensor) -> list[tuple[Tensor, ...]]:
        """Of each of a stack of flat states the leaves, as views of it and of its dtype."""
        pieces = stack.split(self.sizes, -1) if len(self.sizes) > 1 else [stack]
        views = [piece.view(-1, *shape).unbind() for piece, shape in zip(pieces, self.shapes, strict=True)]
        return list(zip(*views, strict=True))

    def tree(self, flat: Tensor, cast: bool = True) -> Tree:
        """The tree of a flat state of shape (..., n) or (..., batch, d).

        Args:
            cast: give every leaf the dtype it has in y0; otherwise half precision stays in the state's.
        """
        ahead = flat.shape[: flat.ndim - 1 - self.lead]
        parts = flat.split(self.sizes, -1) if len(self.sizes) > 1 else [flat]
        made = [self._leaf(*a, ahead, cast) for a in zip(parts, self.shapes, self.dtypes, strict=True)]
        return rebuild(self.example, iter(made))

    def _leaf(self, part: Tensor, shape: torch.Size, dtype: torch.dtype, ahead: torch.Size, cast: bool) -> Tensor:
        if part.is_complex() and not dtype.is_complex:
            part = part.real
        if cast and part.dtype != dtype:
            part = part.to(dtype)
        return part.reshape((*ahead, *shape))


def _form(parts: Any) -> str:
    shapes = [tuple(getattr(p, "shape", p)) if isinstance(p, Tensor | torch.Size) else type(p).__name__ for p in parts]
    if len(shapes) == 1:
        return shapes[0] if isinstance(shapes[0], str) else f"a tensor of shape {shapes[0]}"
    return f"tensors of shapes {shapes}"


class Loan:
    """Tensors that are lent to a field step after step: made anew once one of them, or a view of one, was kept.

    Whether one was kept is read off reference counts. `Loan.reuse = False` makes them anew at every step, which takes
    27 % longer (88 us a step in place of 69) on a field that costs next to nothing (a 2x2 matrix, 256 samples, dopri5,
    one CPU thread), 3 % on an MLP of 64 units.

    Args:
        make: makes a stack of them, on fresh memory.
    """

    reuse = True

    def __init__(self, make: Callable[[], Tensor]):
        self.make = make
        self._renew()

    def _renew(self) -> None:
        self.stack = self.make()
        self.tensors = self.stack.unbind()
        self.flat = self.stack.view(len(self.stack), -1).unbind()
        self.array: Any = self.stack.numpy() if self.stack.ndim == 1 and self.stack.device.type == "cpu" else None
        self.uses = storage_uses(self.stack)
        self.idle = max(map(sys.getrefcount, self.tensors)), self.uses()

    def take(self) -> "Loan":
        """Itself, with memory that nobody else has."""
        references, uses = self.idle
        if not self.reuse or max(map(sys.getrefcount, self.tensors)) > references or not self.uses() <= uses < math.inf:
            self._renew()
        return self


def changed(whose: str) -> UsageError:
    """The error of a function that wrote into the state it was given."""
    problem = f"{whose} changes its state in place, which the solver still needs"
    return UsageError(problem, "y = -y instead of y *= -1 or y.neg_(), or begin with y = y.clone()")


def versions(tensors: Iterable[Tensor]) -> list[int] | None:
    """How often each tensor was changed in place; None in inference mode, where torch does not count."""
    found = [in_place_changes(x) for x in tensors]
    counts = [count for count in found if count is not None]
    return counts if len(counts) == len(found) else None


@contextmanager
def unchanged(whose: str, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Hold a function to leaving tensors as they are: by torch's counts, and by their values wherever something can
    write past these (NumPy and `.data` on a CPU, inference mode).

    Raises:
        UsageError: one of the tensors is not what it was; `whose` fault it is.
    """
    tensors = list(tensors)
    before, hidden = versions(tensors), transformed()
    kept = [] if hidden else [x.detach().clone() for x in tensors if before is None or x.device.type == "cpu"]
    try:
        yield
    except RuntimeError as error:
        if any(words in str(error) for words in ("in-place operation", "modified inplace", "written-to tensor")):
            # torch forbids some of these by itself
            raise changed(whose) from error
        raise
    if versions(tensors) != before:
        raise changed(whose)
    if kept:
        now = [x.detach() for x in tensors if before is None or x.device.type == "cpu"]
        if not all(_same(a, b) for a, b in zip(kept, now, strict=True)):
            raise changed(whose)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether all values are equal, NaN to NaN."""
    return torch.equal(a, b) or bool(((a == b) | (a != a) & (b != b)).all())


@functools.lru_cache(256)
def _shares(at: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(at, dtype=dtype, device="cpu").to(device)


@dataclasses.dataclass(frozen=True)
class Context:
    """What a solver may know of the solve that a step belongs to, fixed before the step: `Field.context`.

    Attributes:
        pure: no operation in place and no scratch memory, for gradients, transforms and steps that are kept.
        lasting: whether what a step returns is used after the next one.
        rtol, atol: the tolerances as asked for, floats or shaped like the flat state.
        norm: in which errors are measured, None on fixed grids.
        edges: times beyond which nothing is evaluated, a list of floats or shape (edges,) or (edges, batch).
    """

    pure: bool = True
    lasting: bool = True
    rtol: float | Tensor = 0.0
    atol: float | Tensor = 0.0
    norm: Callable[[Tensor], Tensor] | None = None
    edges: list[float] | Tensor = dataclasses.field(default_factory=list)

    @property
    def tolerance(self) -> tuple[float | Tensor, float | Tensor] | None:
        """How exactly the equations of a step are to be solved: (rtol, atol), or None on fixed grids: to rounding."""
        return None if self.norm is None else (self.rtol, self.atol)


class Witness(Protocol):
    """A function to be called in a field's place as long as it is `due`: to see what the field uses."""

    @property
    def due(self) -> bool:
        """Whether the next evaluation is still to be seen."""
        ...

    def __call__(self, t: Tensor, y: Tree, *args: Any) -> Tree: ...


class Field:
    """dy/dt on flat states for one solve: calls the user's f, counts the calls, lends out scratch memory.

    Args:
        f: `f(t, y, *args)`; t has shape () in joint mode, (batch,) in per-sample mode, and the state's real dtype.
        layout: of the state.
        args: further arguments of f.
        context: what the steps may know of the solve.

    Attributes:
        calls, jacobians: how many evaluations and Jacobians were made.
        others: further functions (t, y, *args) that gradients may lead into.
        witness: what makes evaluations in f's place for as long as it is `due`.
        jacobian_mode: how Jacobians are made of this field, the first of newton.py's ways that it allows, an index.
        counted: whether torch counts the changes in place of its states (not in inference mode).
    """

    witness: "Witness | None" = None
    counted: bool = False
    others: tuple[Callable[..., Tree], ...] = ()

    def __init__(
        self, f: Callable[..., Tree], layout: Layout, args: tuple[Any, ...] = (), context: Context = Context()
    ):
        self.f, self.layout, self.args, self.context = f, layout, args, context
        self.calls = self.jacobians = self.jacobian_mode = 0
        self._new = True  # whether an evaluation is still to be looked at closely
        self._plain_shape = layout.shapes[0] if layout.plain else None
        self._real, self._dtype, self._device = layout.real, layout.dtype, layout.device
        self._lent: dict[Any, Any] = {}
        self._lends_times = layout.device.type == "cpu" and not layout.per_sample

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        slope = self._slope(t, y)
        if not isinstance(slope, Tensor) or slope.shape != self._plain_shape or slope.dtype is not self._dtype:
            return self.layout.flat(slope, "the field's result")
        return slope.reshape(y.shape)

    def fill(self, parts: Sequence[Tensor], t: Tensor, y: Tensor) -> None:
        """Write dy/dt into the leaves of a flat tensor, `Layout.parts`."""
        self.put(parts, self._slope(t, y))

    def _slope(self, t: Tensor, y: Tensor) -> Tree:
        """What f returns.

        Raises:
            UsageError: f changed its state (or, in the first call, its time) in place.
        """
        self.calls += 1
        state = self.layout.tree(y) if self._plain_shape is None else y.view(self._plain_shape)
        if self._new:
            return self._first(t, y, state)
        if not self.counted or y.is_inference():
            return self.f(t, state, *self.args)
        before = version(y)
        slope = self.f(t, state, *self.args)
        if version(y) != before:
            raise changed("the field")
        return slope

    def _first(self, t: Tensor, y: Tensor, state: Tree) -> Tree:
        """The first evaluation compares the values of its arguments before and after, later ones only torch's counts of
        changes in place: those are free, but NumPy's and `.data`'s changes and inference mode escape them.
        """
        with unchanged("the field", (t, *leaves(state))):
            self.counted = versions((y,)) is not None
            slope = (self.witness or self.f)(t, state, *self.args)
        self._new = self.witness is not None and self.witness.due
        return slope

    def put(self, parts: Sequence[Tensor], slope: Any) -> None:
        """Write what f returned into the leaves of a flat tensor."""
        if isinstance(slope, Tensor) and slope.shape == self._plain_shape and slope.dtype is self._dtype:
            parts[0].copy_(slope)
            return
        for part, leaf in zip(parts, self.layout.leaves(slope, "the field's result"), strict=True):
            part.copy_(leaf)

    def times(self, t0: float | Tensor, t1: float | Tensor, at: Tensor | tuple[float, ...]) -> Sequence[Tensor]:
        """Times between t0 and t1 as the field wants them, at shares `at` of the way: 0 is exactly t0, 1 exactly t1."""
        if not (isinstance(at, Tensor) or isinstance(t0, Tensor) or isinstance(t1, Tensor)):
            times, last, h = list[Tensor](), math.nan, t1 - t0
            if self._lends_times and at and not self.context.pure:
                count, real, device = len(at), self._real, self._device
                loan = self.lend(
                    ("times", count), lambda: Loan(lambda: torch.empty(count, dtype=real, device=device))
                ).take()
                loan.array[:] = [t1 if share == 1 else t0 + share * h for share in at]
                return loan.tensors
            for share in at:  # neighbours that are equal share a tensor
                times.append(times[-1] if share == last else self.time(t1 if share == 1 else t0 + share * h))
                last = share
            return times
        if not isinstance(at, Tensor):
            at = _shares(at, next(t.dtype for t in (t0, t1) if isinstance(t, Tensor)), self.layout.device)
        if not isinstance(t0, Tensor):
            t0 = torch.full((), t0, dtype=at.dtype, device=at.device)
        if not isinstance(t1, Tensor):
            t1 = torch.full((), t1, dtype=at.dtype, device=at.device)
        times = torch.lerp(t0, t1, at if not t0.ndim else at[:, None]).to(self.layout.real)
        return (times[:, None].expand(-1, self.layout.batch) if self._expands(t0) else times).unbind()

    def time(self, t: float | Tensor) -> Tensor:
        """One time as the field wants it."""
        if not isinstance(t, Tensor):
            time = torch.scalar_tensor(t, dtype=self._real, device=self._device)
            return time.expand(self.layout.batch) if self.layout.per_sample else time
        return t.expand(self.layout.batch) if self._expands(t) else t.to(self.layout.device, self.layout.real)

    def _expands(self, t: Tensor) -> bool:
        return self.layout.per_sample and not t.ndim

    def within(self, **changes: Any) -> "Field":
        """The same field in a context with some changes, its counts at 0."""
        return self.renewed(self.args, dataclasses.replace(self.context, **changes))

    def renewed(self, args: tuple[Any, ...], context: Context) -> "Field":
        """The same field with other arguments in another context, its counts at 0."""
        return Field(self.f, self.layout, args, context)

    def map(self, wrap: Callable[[Callable[..., Tree]], Callable[..., Tree]]) -> None:
        """Put something around every function of the caller's."""
        self.f = wrap(self.f)

    def lend(self, key: Any, make: Callable[[], T]) -> T:
        """Memory that solvers of this solve write over, made once."""
        if key not in self._lent:
            self._lent[key] = make()
        return self._lent[key]
