"""The equation dy = f(t, y) dt + g(t, y) dW, and its two functions on flat states."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pfode._torch import transformed, version
from pfode.errors import UsageError, unknown
from pfode.ode.adjoints.sources import search_graph
from pfode.ode.state import Context, Field, Layout, Tree, changed, leaves, rebuild, unchanged

__all__ = ["CALCULI", "NOISES", "SDE", "Driver", "Form", "StochasticField", "find_form"]

NOISES = ("diagonal", "scalar", "additive", "general")
CALCULI = ("ito", "stratonovich")


class Driver(Protocol):
    """What drives a differential equation: a path that is asked for its increments, as `Brownian` is."""

    @property
    def area(self) -> bool: ...

    def increment(self, ta: Any, tb: Any) -> Any:
        """W(tb) - W(ta), or with `area` the pair (W, H), of shape (samples, ...)."""
        ...


@dataclass(frozen=True, eq=False)
class SDE:
    """A stochastic differential equation dy = f(t, y) dt + g(t, y) dW.

    Args:
        f, g: drift and diffusion, (t, y, *args) -> a tree like y, which has the samples first. t has shape (), or
            (samples,) where every sample has its own steps.
        noise: what g is.
            "diagonal": like y; component i has its own Brownian motion, and g_i depends on y_i alone (which is tested).
            "scalar": like y, or (..., 1); one Brownian motion for all components of a sample.
            "additive": it does not depend on y; like y (a Brownian motion per component), or with a further last
                dimension of m channels.
            "general": with a further last dimension of m channels; or like y, which is a diagonal matrix whose entries
                may depend on all components.
        calculus: "ito" or "stratonovich".
        product: (t, y, v, *args) -> g(t, y) v, v of shape (samples, m), a tree like y: used in place of g wherever a
            method needs no more, so that the matrix is never formed. Give `channels` with it.
        channels: m; None: read off g's result.
        check: hold a "diagonal" g to its word, at the start of the first solve.

    Raises:
        UsageError: what is no function, or unknown words.
    """

    f: Callable[..., Tree]
    g: Callable[..., Tree]
    noise: str = "diagonal"
    calculus: str = "ito"
    product: Callable[..., Tree] | None = None
    channels: int | None = None
    check: bool = True
    _forms: dict[Any, "Form"] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.noise not in NOISES:
            raise unknown("noise", self.noise, NOISES)
        if self.calculus not in CALCULI:
            raise unknown("calculus", self.calculus, CALCULI)
        for name, value in (("f", self.f), ("g", self.g), ("product", self.product)):
            if (value is not None or name != "product") and (not callable(value) or isinstance(value, type)):
                got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
                raise UsageError(f"SDE: {name}: need a function (t, y, *args), got {got}", "SDE(f, g), both functions")
        if self.channels is not None and (type(self.channels) is not int or self.channels < 1):
            raise UsageError(f"SDE: channels: need a positive whole number, got {self.channels!r:.40}", "channels=3")


@dataclass(frozen=True)
class Form:
    """How g's results lie: "diagonal", one number per component; "column", the same for one Brownian motion;
    "matrix", (samples, components, channels); "product", never formed. `channels`: Brownian motions of a sample."""

    kind: str
    channels: int


class StochasticField(Field):
    """Drift and diffusion on flat states (samples, d) for one solve, and what drives them.

    Args:
        sde, layout, args, context: the equation; the others as for Field.
        form: of the diffusion.
        driver: gives the increments.

    Attributes:
        diffusions, products: how many evaluations of g, and products with its Jacobian, were made; `calls` counts f.
    """

    def __init__(self, sde: SDE, layout: Layout, args: tuple[Any, ...], context: Context, form: Form, driver: Driver):
        super().__init__(sde.f, layout, args, context)
        self.sde, self.form, self.driver = sde, form, driver
        self.g, self.product_of = sde.g, sde.product
        self.others = (sde.product if form.kind == "product" and sde.product else sde.g,)
        if form.kind == "product":
            self.others = ()
        self.diffusions = self.products = 0

    def renewed(self, args: tuple[Any, ...], context: Context) -> "StochasticField":
        made = StochasticField(self.sde, self.layout, args, context, self.form, self.driver)
        made.f, made.g, made.product_of = self.f, self.g, self.product_of
        return made

    def map(self, wrap: Callable[[Callable[..., Tree]], Callable[..., Tree]]) -> None:
        super().map(wrap)
        self.g, self.product_of = wrap(self.g), self.product_of and wrap(self.product_of)

    def increment(self, t0: Any, t1: Any, area: bool) -> tuple[Tensor, Tensor | None]:
        """W and, with `area`, H of an interval, each of shape (samples, channels)."""
        made = self.driver.increment(t0, t1)
        w, h = made if self.driver.area else (made, None)
        return self._rows(w), self._rows(h) if area and h is not None else None

    def levy_area(self, t0: Any, t1: Any, how: str) -> Tensor:
        """The Levy areas of an interval, shape (samples, channels, channels).

        Raises:
            UsageError: the driver has none.
        """
        ask = getattr(self.driver, "levy_area", None)
        if ask is None:
            problem = f"{type(self.driver).__name__} gives no Levy areas"
            raise UsageError(problem, 'pfode.brownian.Brownian(..., area=True), or method="spark", which needs none')
        made = ask(t0, t1, how)
        return made.reshape(self.layout.batch, self.form.channels, -1).to(self.layout.device, self.layout.dtype)

    def _rows(self, w: Tensor) -> Tensor:
        return w.reshape(self.layout.batch, -1).to(self.layout.device, self.layout.dtype)

    def diffusion(self, t: Tensor, y: Tensor) -> Tensor:
        """g(t, y): (samples, d), or (samples, d, channels)."""
        self.diffusions += 1
        before = version(y) if not y.is_inference() else 0
        value = self.g(t, self.layout.tree(y), *self.args)
        if not y.is_inference() and version(y) != before:
            raise changed("the diffusion")
        return self._flat(value)

    def _flat(self, value: Tree) -> Tensor:
        """g's result as a flat tensor of its form."""
        return flat_diffusion(self.layout, value, self.form)

    def times_noise(self, t: Tensor, y: Tensor, g: Tensor | None, v: Tensor) -> Tensor:
        """g v, shape (samples, d).

        Args:
            g: the diffusion at (t, y); None: that is not formed.
            v: (samples, channels).
        """
        if g is None:
            assert self.product_of is not None
            self.diffusions += 1
            made = self.product_of(t, self.layout.tree(y), v, *self.args)
            return self.layout.flat(made, "the product's result")
        return g * v if g.ndim == 2 else torch.matmul(g, v[..., None])[..., 0]

    @property
    def forms_diffusion(self) -> bool:
        """Whether g is evaluated for itself, and not only its products."""
        return self.form.kind != "product"

    def along(self, t: Tensor, y: Tensor, direction: Tensor, elementwise: bool = False) -> tuple[Tensor, Tensor]:
        """g(t, y) and its derivative in y along a direction (samples, d), both flat.

        Backwards twice, which every operation allows that gradients flow through, or once where g is elementwise, its
        Jacobian symmetric; by forward mode inside torch.func's transforms.
        """
        self.diffusions += 1
        self.products += 1
        if transformed():
            value, slope, *_ = torch.func.jvp(lambda z: self._value(t, z), (y,), (direction,))
            return value, slope
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            z = y if keep and y.requires_grad else y.detach().requires_grad_()
            value = self._value(t, z)
            slope = _pushed(value, z, direction, elementwise, keep)
        if keep and z is not y:  # whether anything but z needs a gradient
            keep = any(leaf is not z for leaf in search_graph([value, slope]).leaves)
        return (value, slope) if keep else (value.detach(), slope.detach())

    def _value(self, t: Tensor, y: Tensor) -> Tensor:
        return self._flat(self.g(t, self.layout.tree(y), *self.args))


def _pushed(value: Tensor, z: Tensor, direction: Tensor, elementwise: bool, keep: bool) -> Tensor:
    """The derivative of a value along a direction of z."""
    if not value.requires_grad:
        return torch.zeros_like(value)
    if elementwise:
        (slope,) = torch.autograd.grad(value, z, direction, create_graph=keep, retain_graph=True, allow_unused=True)
        return torch.zeros_like(value) if slope is None else slope
    weights = torch.zeros_like(value, requires_grad=True)
    (pulled,) = torch.autograd.grad(value, z, weights, create_graph=True, allow_unused=True)
    if pulled is None or not pulled.requires_grad:
        return torch.zeros_like(value)
    (slope,) = torch.autograd.grad(pulled, weights, direction, create_graph=keep, retain_graph=True, allow_unused=True)
    return torch.zeros_like(value) if slope is None else slope


def flat_diffusion(layout: Layout, value: Tree, form: Form) -> Tensor:
    """A result of g as a flat tensor.

    Raises:
        UsageError: another form than at the start.
    """
    if form.kind != "matrix" and not (form.kind == "column" and _has_channel(layout, value)):
        return layout.flat(value, "the diffusion's result")
    parts = list(leaves(value))
    wanted = [(*shape, form.channels) for shape in layout.shapes]
    if [tuple(getattr(part, "shape", ())) for part in parts] != wanted:
        got = [tuple(getattr(part, "shape", ())) for part in parts]
        raise UsageError(f"the diffusion's result: need shapes {wanted}, got {got}", "the same shape at every call")
    flat = [
        part.reshape(layout.batch, n, form.channels).to(layout.dtype)
        for part, n in zip(parts, layout.sizes, strict=True)
    ]
    made = flat[0] if len(flat) == 1 else torch.cat(flat, 1)
    return made[..., 0] if form.kind == "column" else made


def _has_channel(layout: Layout, value: Tree) -> bool:
    """Whether g's result of scalar noise has a last dimension of 1 for the only Brownian motion."""
    shapes = [getattr(part, "shape", None) for part in leaves(value)]
    return shapes != layout.shapes and shapes == [torch.Size((*shape, 1)) for shape in layout.shapes]


def find_form(sde: SDE, layout: Layout, t: Tensor, y: Tensor, args: tuple[Any, ...]) -> Form:
    """The form of g's results, of one evaluation at the start of the first solve with states of this form.

    There a "diagonal" g is held to its word.

    Raises:
        UsageError: results that fit neither y nor the noise that was named; a "diagonal" g that mixes components.
    """
    key = (tuple(layout.shapes), tuple(layout.dtypes), layout.per_sample)
    if key not in sde._forms:
        sde._forms[key] = _form(sde, layout, t, y, args)
    return sde._forms[key]


def _form(sde: SDE, layout: Layout, t: Tensor, y: Tensor, args: tuple[Any, ...]) -> Form:
    if sde.product is not None:
        if sde.channels is None:
            raise UsageError("SDE: product= needs channels=, how many Brownian motions v has", "channels=3")
        return Form("product", sde.channels)
    state = layout.tree(y)
    alone = sde.noise == "diagonal" and sde.check and not transformed()
    with torch.enable_grad() if alone else torch.no_grad():
        asked = [x.detach().clone().requires_grad_(alone and x.is_floating_point()) for x in leaves(state)]
        shown = [x.clone() for x in asked]
        with unchanged("the diffusion", shown):
            value = sde.g(t, rebuild(state, iter(shown)), *args)
        parts = list(leaves(value))
        shapes = [tuple(part.shape) if isinstance(part, Tensor) else None for part in parts]
        like = [tuple(shape) for shape in layout.shapes]
        if shapes == like:
            if alone:
                _refuse_mixing(asked, parts)
            size = sum(layout.sizes)
            return Form("column", 1) if sde.noise == "scalar" else Form("diagonal", size)
    channels = {shape[-1] if shape else None for shape in shapes}
    m = channels.pop() if len(channels) == 1 else None
    if sde.noise == "diagonal" or m is None or shapes != [(*shape, m) for shape in like]:
        wanted = (
            "a tree like y0" if sde.noise in ("diagonal", "scalar") else "y0's shape and a last dimension of channels"
        )
        raise UsageError(
            f'g: noise="{sde.noise}" needs {wanted}, of shape {like[0] if len(like) == 1 else like}, '
            f"got {shapes[0] if len(shapes) == 1 else shapes}",
            'noise="general" where g is a matrix (..., channels)' if sde.noise == "diagonal" else "",
        )
    if sde.noise == "scalar" and m != 1:
        raise UsageError(f'g: noise="scalar" is one Brownian motion, got {m} channels', 'noise="general"')
    if sde.channels not in (None, m):
        raise UsageError(f"SDE: channels={sde.channels}, but g has {m}", f"channels={m}")
    return Form("column", 1) if sde.noise == "scalar" else Form("matrix", m)


def _refuse_mixing(asked: list[Tensor], parts: list[Tensor]) -> None:
    """Raise UsageError unless every component of g depends on its own component of y alone, at this y.

    The Jacobian J of such a g is diagonal, so that J^T (s v) = s J^T v for random signs s and weights v.
    """
    inside = [i for i, part in enumerate(parts) if part.requires_grad]
    if not inside:
        return
    source = torch.Generator().manual_seed(0)

    def like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=source, dtype=torch.float64, device="cpu").to(x)

    values, weights, flips = (
        [parts[i] for i in inside],
        [like(parts[i]) for i in inside],
        [like(x).sign() for x in asked],
    )
    plain = torch.autograd.grad(values, asked, weights, retain_graph=True, allow_unused=True)
    turned = [w * flips[i].to(w) for w, i in zip(weights, inside, strict=True)]
    flipped = torch.autograd.grad(values, asked, turned, allow_unused=True)
    for one, other, sign in zip(plain, flipped, flips, strict=True):
        if one is None or other is None:
            continue
        wrong = (one * sign - other).abs().amax()
        if bool(wrong > 1e-3 * one.abs().amax()):
            raise UsageError(
                'g: noise="diagonal" says that component i of g depends on component i of y alone, but here it depends '
                "on others too: corrections and gradients would be wrong",
                'noise="general": g may keep its shape, and methods that need no such promise are taken',
            )
