"""What a field uses that needs gradients: parameters it holds, and leaf tensors in the graph of what it returns."""

import functools
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pfode._torch import transformed
from pfode.errors import UsageError
from pfode.ode.state import Tree, leaves, without_graph

__all__ = [
    "FirstCall",
    "GraphContents",
    "Sources",
    "graph_bytes",
    "parameters",
    "refuse_unknown",
    "search_graph",
    "sequence_number",
    "sources",
]

_DEPTH = 4  # containers, closures and attributes are searched for parameters this deep


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
        found = search_graph([p])
        if any(id(leaf) in ids for leaf in found.leaves) or any(node in nodes for node in found.nodes[1:]):
            raise UsageError(
                f"params: a tensor of shape {tuple(p.shape)} is computed from another one of them",
                "name one of the two, or only leaf tensors",
            )


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


class GraphContents(NamedTuple):
    """What lies in the graphs of tensors: nodes, leaf tensors, and whether a node is older than a `mark`."""

    nodes: list[Any]
    leaves: list[Tensor]
    older: bool


def search_graph(values: Iterable[Any], until: Iterable[Any] = (), since: int = 0) -> GraphContents:
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
    return GraphContents(nodes, found, older)


_PLAIN_KINDS = (int, float, complex, str, torch.Size, torch.dtype, torch.device, torch.layout)
_saving: dict[type, list[str]] = {}  # attributes of a kind of node that may hold tensors which it saved


def graph_bytes(found: GraphContents) -> int:
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
def sequence_number() -> int:
    """A number that only later nodes of graphs, of this thread, have reached."""
    node: Any = torch.zeros((), requires_grad=True, device="cpu").neg().grad_fn
    return node._sequence_nr()


class FirstCall:
    """The first evaluation of a field, made with its graph to see what it uses: a Witness.

    Attributes:
        due: whether it is still to be made.
        others: functions of the same arguments that are called once too, only for what they use.
        found: what its graph contains.
    """

    def __init__(self, f: Callable[..., Tree], due: bool = True, others: Sequence[Callable[..., Tree]] = ()):
        self.f, self.due, self.others, self.found = f, due, others, GraphContents([], [], False)

    def __call__(self, t: Tensor, y: Tree, *args: Any) -> Tree:
        if not self.due or transformed():
            return self.f(t, y, *args)
        self.due, since = False, sequence_number()
        with torch.enable_grad():
            slope = self.f(t, y, *args)
            parts = list(leaves((slope, [other(t, y, *args) for other in self.others])))
        if not any(isinstance(part, Tensor) and part.requires_grad for part in parts):
            return slope
        self.found = search_graph(parts, since=since)._replace(nodes=[])
        return without_graph(slope)


def refuse_unknown(outputs: Iterable[Any], known: Iterable[Tensor], until: Iterable[Any] = ()) -> None:
    """Raise where graphs, as far as some other tensors, have leaves that gradients would not reach.

    Raises:
        UsageError: the field uses tensors that were not found.
    """
    ids = {id(t) for t in known}
    for leaf in search_graph(outputs, until).leaves:
        if id(leaf) not in ids:
            raise UsageError(
                f"the field uses a tensor of shape {tuple(leaf.shape)} that needs a gradient and was not found at its "
                "first evaluation",
                'name it in params= or args=, or take adjoint="direct"',
            )
