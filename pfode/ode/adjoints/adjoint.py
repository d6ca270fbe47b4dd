"""Adjoints: how the gradient of a solution is made, as values passed to `solve`.

    Direct        record every operation. Exact; can be differentiated again; memory grows with every evaluation.
    Checkpoint    (default) keep the accepted steps and some states; go back step by step, taking each again with its
                  graph, but for the first ones, whose graphs are kept. Exact: the gradient of the numbers that were
                  computed (replay.py).
    Reversible    the same, the states computed backwards by a solver that can; memory does not grow (replay.py).
    Interpolated  keep the dense output; solve the adjoint equation along it (continuous.py).
    Backsolve     keep the output states only; solve state and adjoint backwards (Chen et al. 2018; continuous.py).
    Implicit      the solution is a fixed point; apply the implicit-function theorem there (fixed.py).

Every one but Direct solves first, in place and without gradients, with a `Tape` that looks on; then `attach` makes the
numbers depend on what they came from. A gradient goes to the state, to the times, to the tensors in args, and to
parameters. These are, unless params= names them,

* those of modules, and leaf tensors, that the field is or holds: as the owner of a bound method, in a closure, a
  functools.partial, a container, as an attribute, or under a global name that the function uses;
* leaf tensors in the graph of the first evaluation of the field, wherever it has them from.

The evaluations of the first chunk that the backward pass takes again are searched too: a leaf that was not found
before is an error, never a missing gradient. Gradients of parameters are ordinary outputs of one autograd node, so that
what listens to their accumulation (DistributedDataParallel) hears one; `Tensor.register_hook` on a parameter itself
hears every step.

Inside torch.func transforms and forward-mode differentiation every operation is seen anyway: `direct` is used.
"""

import functools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pfode._torch import keeps_graph, transformed
from pfode.errors import UsageError
from pfode.ode.control import PID
from pfode.ode.loop import Course, End, Lanes, Move
from pfode.ode.solver import Solver
from pfode.ode.state import Field, Tree, leaves, rebuild, without_graph

PLAIN = nullcontext()
_DEPTH = 4  # containers, closures and attributes are searched for parameters this deep


class Problem(NamedTuple):
    """A solve, checked: what `advance` takes, and the output times."""

    field: Field
    solver: Solver
    control: PID
    course: Course
    lanes: Lanes
    y: Tensor
    ts: Tensor


@dataclass
class Work:
    """What backward passes did so far. `nfe`: evaluations of the field; `steps`: steps taken back."""

    nfe: int = 0
    steps: int = 0


class Inputs(NamedTuple):
    """What a solution depends on, all detached or leaves; `tensors`: those in args, then parameters.

    `searched`: whether parameters were looked for; `shared`: whether the field uses tensors that have graphs of their
    own, through which every evaluation leads.
    """

    y: Tensor
    ts: Tensor
    tensors: tuple[Tensor, ...]
    args: tuple[Any, ...]
    searched: bool
    shared: bool


class Cotangents(NamedTuple):
    """Gradients of the loss with respect to the states at the output times and at the end."""

    ys: Tensor
    end: Tensor


class Tape:
    """What an adjoint keeps of one solve.

    `recording`: whether the next step is to be made with its graph; `seen`: what was found in that of the first one.
    """

    recording = False
    seen: "Behind | None" = None

    def making(self) -> AbstractContextManager[Any]:
        """The surroundings to make the next step in."""
        return PLAIN

    def add(self, move: Move, passed: int) -> None:
        """Look at an attempted step; `passed`: output times that it passed (at most, over samples)."""

    def finish(self, ys: Tensor, end: End) -> None:
        """See the states at the output times, and how it ended."""

    def pull(self, problem: Problem, inputs: Inputs, given: Cotangents, work: Work) -> list[Tensor | None]:
        """Gradients with respect to the state, the times and `inputs.tensors`; those not required may be None."""
        raise NotImplementedError


class Adjoint(Protocol):
    """A way to make gradients. `pure`: steps must stay valid, so the solve makes them without in-place operations."""

    @property
    def pure(self) -> bool: ...

    def tape(self, problem: Problem) -> Tape: ...


@dataclass(frozen=True)
class Direct:
    """Record every operation."""


# ------------------------------------------------------------------------------------------------ finding parameters


def parameters(f: Any, depth: int = _DEPTH) -> list[Tensor]:
    """Leaf tensors that require gradients and that a field is or holds (see the module's text)."""
    found: dict[int, Tensor] = {}
    _search(f, depth, found, set())
    return list(found.values())


def _search(value: Any, depth: int, found: dict[int, Tensor], seen: set[int]) -> None:
    if id(value) in seen or depth < 0:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if value.requires_grad and value.is_leaf:
            found[id(value)] = value
        return
    if isinstance(value, torch.nn.Module):
        found.update({id(p): p for p in value.parameters() if p.requires_grad})
    for held in _held(value):
        _search(held, depth - 1, found, seen)


def _held(value: Any) -> Iterator[Any]:
    if isinstance(value, types.ModuleType | type | str | bytes | int | float):
        return
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple | set):
        yield from value
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # a name not bound yet
                continue
        yield from value.__defaults__ or ()
        yield from vars(value).values()
        for name in value.__code__.co_names:
            held = value.__globals__.get(name)
            if isinstance(held, Tensor | torch.nn.Module | types.FunctionType):
                yield held
    elif hasattr(value, "__dict__"):
        yield from (held for name, held in vars(value).items() if name not in ("_parameters", "_modules", "_buffers"))


class Behind(NamedTuple):
    """What lies in the graphs of tensors: nodes, leaf tensors, and whether a node is older than a `mark`."""

    nodes: list[Any]
    leaves: list[Tensor]
    older: bool


def behind(values: Iterable[Any], until: Iterable[Any] = (), since: int = 0) -> Behind:
    """Search the graphs of tensors, not beyond some others, for leaves and for nodes older than a mark."""
    values = [value for value in values if isinstance(value, Tensor)]
    nodes: list[Any] = [value.grad_fn for value in values if value.grad_fn is not None]
    found = [value for value in values if value.grad_fn is None and value.requires_grad]
    seen, older = {*nodes, *(value.grad_fn for value in until if isinstance(value, Tensor))}, False
    for node in nodes:  # it grows
        if hasattr(node, "variable"):
            found.append(node.variable)
        elif node._sequence_nr() < since:
            older = True
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                nodes.append(after)
    return Behind(nodes, found, older)


_PLAIN_KINDS = (int, float, complex, str, torch.Size, torch.dtype, torch.device, torch.layout)
_saving: dict[type, list[str]] = {}  # attributes of a kind of node that may hold tensors which it saved


def weight(found: Behind) -> int:
    """Bytes that graphs keep alive, without those of their leaves."""
    kept: dict[int, int] = {}
    for node in found.nodes:
        names = _saving.get(type(node))
        if names is None:
            names = [name for name in dir(node) if name.startswith("_saved_") or name == "saved_tensors"]
        holding = []
        for name in names:
            try:
                saved = getattr(node, name)
            except RuntimeError:  # changed in place meanwhile
                continue
            parts = saved if isinstance(saved, tuple | list) else (saved,)
            if not parts or not all(isinstance(part, _PLAIN_KINDS) for part in parts):
                holding.append(name)
            for part in parts:
                if isinstance(part, Tensor):
                    at, size = _memory(part)
                    kept[at] = size
        _saving.setdefault(type(node), holding)
    own = {_memory(leaf)[0] for leaf in found.leaves}
    return sum(size for at, size in kept.items() if at not in own)


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor's memory is and how many bytes it has; of tensors without storage (torch.func's, sparse ones) the
    tensor's own identity and elements."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except RuntimeError:
        return id(tensor), tensor.numel() * tensor.element_size()


@torch.enable_grad()
def mark() -> int:
    """A number that only later nodes of graphs, of this thread, have reached."""
    node: Any = torch.zeros((), requires_grad=True, device="cpu").neg().grad_fn
    return node._sequence_nr()


class Sighting:
    """A field whose first evaluation is made with its graph, to see what it uses."""

    def __init__(self, f: Callable[..., Tree]):
        self.f, self.due, self.seen = f, True, Behind([], [], False)

    def __call__(self, t: Tensor, y: Tree, *args: Any) -> Tree:
        if not self.due or transformed():
            return self.f(t, y, *args)
        self.due, since = False, mark()
        with torch.enable_grad():
            slope = self.f(t, y, *args)
        parts = list(leaves(slope))
        if not any(isinstance(part, Tensor) and part.requires_grad for part in parts):
            return slope
        self.seen = behind(parts, since=since)._replace(nodes=[])
        return without_graph(slope)


class Sources(NamedTuple):
    """Where gradients may have to go; `declared`: how many of `tensors` get zeros rather than None; `searched`,
    `shared`: as in Inputs."""

    tensors: list[Tensor]
    places: list[int]
    declared: int
    searched: bool
    shared: bool = False


def sources(f: Any, args: tuple[Any, ...], params: Iterable[Tensor] | None) -> Sources:
    """Tensors in args that require gradients, by their places among the leaves of args, and parameters.

    Raises:
        UsageError: params that are no tensors.
    """
    parts = list(leaves(args))
    places = [i for i, part in enumerate(parts) if isinstance(part, Tensor) and part.requires_grad]
    tensors = [parts[i] for i in places]
    if params is not None:
        params = [params] if isinstance(params, Tensor) or not isinstance(params, Iterable) else list(params)
        for p in params:
            if not isinstance(p, Tensor):
                raise UsageError(f"params: need tensors, got {type(p).__name__}", "params=tuple(module.parameters())")
        named = list({id(p): p for p in params if p.requires_grad}.values())
        _refuse_dependent(named)
        return Sources([*tensors, *named], places, len(tensors) + len(named), False)
    # a tensor in args may be a parameter too: the field sees two of it, and the gradient is the sum of both
    own = [p for p in f.parameters() if p.requires_grad] if isinstance(f, torch.nn.Module) else []
    held = [*parameters(f), *parameters([p for p in parts if not isinstance(p, Tensor)])]
    found = list({id(p): p for p in [*own, *held]}.values())
    return Sources([*tensors, *found], places, len(tensors) + len(own), True)


def _refuse_dependent(params: list[Tensor]) -> None:
    """Raise UsageError where one of some parameters is computed from another: its gradient would count twice."""
    made = [p for p in params if p.grad_fn is not None]
    ids = {id(p) for p in params}
    nodes = {p.grad_fn for p in made}
    for p in made:
        found = behind([p])
        if any(id(leaf) in ids for leaf in found.leaves) or any(node in nodes for node in found.nodes[1:]):
            raise UsageError(
                f"params: a tensor of shape {tuple(p.shape)} is computed from another one of them",
                "name one of the two, or only leaf tensors",
            )


def again(problem: Problem, args: tuple[Any, ...], pure: bool) -> Field:
    """The field of a solve with other arguments, that counts from 0."""
    made = Field(problem.field.f, problem.field.layout, args, pure)
    problem.course.inform(made)
    made.way = problem.field.way
    return made


def detached(args: tuple[Any, ...], places: Sequence[int], values: Sequence[Tensor] | None = None) -> tuple[Any, ...]:
    """args with the tensors at some places as leaves of their own, or replaced by values."""
    if not places:
        return args
    parts = list(leaves(args))
    for i, place in enumerate(places):
        parts[place] = parts[place].detach().requires_grad_() if values is None else values[i]
    return rebuild(args, iter(parts))


# ------------------------------------------------------------------------------------------------- one autograd node


@dataclass(eq=False)
class _Solve:
    """What the node needs: a solve that was made, its tape, and the surroundings it was made in.

    It holds the field, which may be a module that keeps the solution: a circle. Python's garbage collector sees one
    that leads from a tensor to the node that made it, but not from one node to another. So the node itself refers to
    the solve weakly; it is the last node of every output (`_Held`) that keeps it alive.
    """

    problem: Problem
    tape: Tape
    sources: Sources
    ys: Tensor
    end: Tensor
    work: Work
    autocast: Any = field(default_factory=lambda: None)

    def __post_init__(self) -> None:
        kind = self.ys.device.type
        self.autocast = functools.partial(
            torch.autocast, kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        )

    def release(self) -> None:
        """Let go of the field and of what the tape kept: the graph was freed."""
        del self.problem, self.tape


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, solve: _Solve, y: Tensor, ts: Tensor, *tensors: Tensor) -> Any:  # type: ignore[override]
        ctx.solve = weakref.ref(solve)
        ctx.save_for_backward(y, ts, *tensors)  # refuses tensors that were changed in place meanwhile
        ctx.set_materialize_grads(False)
        ctx.shape, (ys, end) = solve.ys.shape, (solve.ys, solve.end)
        del solve.ys, solve.end
        return ys.detach(), end.clone()  # the tape keeps these, which must not hold the node, nor be changed in place

    @staticmethod
    def backward(ctx: Any, ys: Tensor | None, end: Tensor | None) -> Any:  # type: ignore[override]
        y, ts, *tensors = ctx.saved_tensors
        solve: _Solve = ctx.solve()
        twice = torch.is_grad_enabled()
        given = Cotangents(
            y.new_zeros(ctx.shape) if ys is None else ys.detach(),
            y.new_zeros(y.shape) if end is None else end.detach(),
        )
        need = ctx.needs_input_grad[1:]
        count = len(solve.sources.places)
        used = [t.detach().requires_grad_(t.requires_grad) for t in tensors[:count]] + tensors[count:]
        args = detached(solve.problem.field.args, solve.sources.places, used[:count])
        inputs = Inputs(
            y.detach().requires_grad_(need[0]),
            ts.detach().requires_grad_(need[1]),
            tuple(used),
            args,
            solve.sources.searched,
            solve.sources.shared,
        )
        with torch.no_grad(), solve.autocast():
            made = solve.tape.pull(solve.problem, inputs, given, solve.work)
        if not keeps_graph():
            solve.release()
        made = [g if n else None for g, n in zip(made, need, strict=True)]
        for i in range(2, 2 + solve.sources.declared):
            made[i] = torch.zeros_like(tensors[i - 2]) if made[i] is None and need[i] else made[i]
        if twice:
            made = [None if g is None else _Once.apply(g, *given, y, ts, *tensors) for g in made]
        return None, *made


class _Held(torch.autograd.Function):
    """An output as it is, whose node keeps what the backward pass needs until that was there."""

    @staticmethod
    def forward(ctx: Any, solve: _Solve, value: Tensor) -> Tensor:  # type: ignore[override]
        ctx.solve = solve
        return value.detach()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:  # type: ignore[override]
        return None, slope


class _Once(torch.autograd.Function):
    """A gradient that cannot be differentiated, and says so."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *_: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:  # type: ignore[override]
        raise UsageError("this adjoint makes gradients that cannot be differentiated again", 'adjoint="direct"')


class Attached(NamedTuple):
    """States that depend on what they came from.

    Fields:
        ys, end: flat, at the output times and at the end.
        work: what backward passes will have done.
        held: what to do with every tensor made of these before it is handed out.
    """

    ys: Tensor
    end: Tensor
    work: Work
    held: Callable[[Tensor], Tensor]


def attach(
    problem: Problem, tape: Tape, found: Sources, seen: Behind, y: Tensor, ts: Tensor, ys: Tensor, end: Tensor
) -> Attached:
    """The states ys at the output times and at the end, depending on what they came from.

    Args:
        problem, tape: the solve, made without gradients, and what was kept of it.
        found, seen: sources of gradients, and what a Sighting, or the tape, met.
        y, ts: the initial state and the output times, with their graphs.
    """
    if found.searched:
        named = found.tensors[len(found.places) :]
        known = {id(t) for t in (problem.y, *leaves(problem.field.args), *named)}
        found.tensors.extend(t for t in {id(t): t for t in seen.leaves}.values() if id(t) not in known)
        found = found._replace(shared=seen.older)
    work = Work()
    if not any(t.requires_grad for t in (y, ts, *found.tensors)):
        return Attached(ys, end, work, lambda value: value)
    solve = _Solve(problem, tape, found, ys, end, work)
    ys, end = _Node.apply(solve, y, ts, *found.tensors)  # type: ignore[misc]
    return Attached(ys, end, work, lambda value: _Held.apply(solve, value))  # type: ignore[return-value]


def refuse_unknown(outputs: Iterable[Any], known: Iterable[Tensor], until: Iterable[Any] = ()) -> None:
    """Raise where graphs, as far as some other tensors, have leaves that gradients would not reach.

    Raises:
        UsageError: the field uses tensors that were not found.
    """
    ids = {id(t) for t in known}
    for leaf in behind(outputs, until).leaves:
        if id(leaf) not in ids:
            raise UsageError(
                f"the field uses a tensor of shape {tuple(leaf.shape)} that needs a gradient and was not found at its "
                "first evaluation",
                'name it in params= or args=, or take adjoint="direct"',
            )
