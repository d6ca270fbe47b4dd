"""Guidance: one denoiser made of two, a conditional and an unconditional one, or a network and a weaker one.

Guidance that changes with the time is asked for by `at(t)`, which returns the denoiser that stands in at time t. A plan
knows its times beforehand and asks on the host, so that no call has to read a time back from the device.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pfode.denoiser import Denoiser, Preconditioned, Preconditioning, at, preconditioned, tuned
from pfode.errors import UsageError, integer, number
from pfode.labels import class_index, class_indices, warn_unseen
from pfode.plans.rows import row_affine
from pfode.plans.table import Plan
from pfode.process import float64
from pfode.scores.mixing import Rule, Schedule, column
from pfode.scores.wrapping import Wrapper, as_time

Class = int | str | Sequence[int | str] | Tensor

__all__ = ["Autoguided", "Guided", "cfg_plus_plus", "guide"]


class Guided(Wrapper, Preconditioned):
    """Classifier-free guidance (Ho & Salimans 2022): F_0 + scale (F - F_0), both in one forward of twice the batch.

    As D is affine in F, guiding the network F guides the denoiser D.

    Args:
        denoiser: the wrapped one.
        rule: the scale and its refinements.
        label: the class where a call gives none: a number or (batch,); None where every call gives one.
        negative: the conditions of F_0 that differ from those of F, by their names.
        level: (c_skip / c_in, c_out) at the time of this stand-in, which projected guidance needs; None before `at`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        rule: Rule,
        label: Tensor | int | None,
        negative: Mapping[str, Any],
        level: tuple[Any, Any] | None = None,
    ):
        super().__init__(denoiser)
        self.inner = preconditioned(denoiser)
        self.rule, self.label, self.negative = rule, label, negative
        if "label" in negative:
            self.unseen -= {len(self.labels or ())}  # known to `guide`, and not what a call without a label draws
        self.level = level
        self.time_dependent |= rule.varies or (rule.projects and level is None)
        self.evals *= sum(rule.needs)

    @property
    def scale(self) -> float | Tensor | Schedule:
        """The scale of the guidance: a number, one per sample, or a function of the time."""
        return self.rule.scale

    def rewrap(self, change: Callable[[Any], Any]) -> "Guided":
        """See `Wrapper.rewrap`."""
        return Guided(change(self.denoiser), self.rule, self.label, self.negative, self.level)

    def at(self, t: float | Tensor) -> "Guided":
        """See `Wrapper.at`."""
        rule, level = self.rule.at(t, self.process), self.level
        if rule.projects:
            c = self.inner.precondition(float64(t))
            skip, size = c.c_skip / c.c_in, c.c_out
            level = (skip, size) if isinstance(t, Tensor) else (skip.item(), size.item())
        inner = torch.cat([t, t]) if isinstance(t, Tensor) and t.ndim and all(rule.needs) else t  # as its batch
        return Guided(at(self.denoiser, inner), rule, self.label, self.negative, level)

    def precondition(self, t: Tensor) -> Preconditioning:
        """The preconditioning of the wrapped denoiser."""
        return self.inner.precondition(t)

    def network(self, x: Tensor, c_noise: Tensor, *, label: Tensor | int | None = None, **cond: Any) -> Tensor:
        """The guided F(x, c_noise), of the shape of x.

        Args:
            x: (batch, ...), scaled by c_in. c_noise: 0-d or (batch,).
            label: a class or (batch,) of them; the one given to `guide` where None.
            cond: the other conditions of the call.

        Raises:
            UsageError: a condition to guide towards is missing, or the two do not fit together; or guidance that
                depends on the time, which only `at` knows.
        """
        if self.rule.varies or (self.rule.projects and self.level is None):
            raise UsageError(
                "this guidance depends on the time, which its network does not get", "guided.at(t).network"
            )
        label = self.label if label is None else label
        given = cond if label is None else {"label": label, **cond}
        other = {**given, **self.negative}
        away, towards = self.rule.needs
        if not towards:
            return self.inner.network(x, c_noise, **other)
        for key in self.negative:
            if given.get(key) is None:
                hint = "give label= (or --label NAME, --label all)" if key == "label" else f"give {key}="
                raise UsageError(f"guidance needs a {'class' if key == 'label' else key} to guide towards", hint)
        if not away:
            return self.inner.network(x, c_noise, **given)
        both = {key: _joined(key, other[key], value, x) for key, value in given.items()}
        noise = torch.cat([c_noise, c_noise]) if c_noise.ndim else c_noise
        out = self.inner.network(torch.cat([x, x]), noise, **both)
        first, second = out.to(x.dtype).chunk(2)  # before the scale magnifies the rounding of a half-precision network
        if self.level is None:
            return self.rule.mix(first, second)
        skip, size = (column(value, x) for value in self.level)
        return self.rule.mix(first, second, x0=skip * x + size * second, unit=abs(size))

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The guided D(x, t), in the dtype of x; conditions as for `network`."""
        return Preconditioned.__call__(self.at(as_time(t)) if self.time_dependent else self, x, t, **cond)

    def guided(self, scale: float) -> Denoiser:
        """The wrapped denoiser under the same guidance with another scale."""
        rule = dataclasses.replace(self.rule, scale=scale)
        if scale == 1 and self.label is None:
            return self.denoiser
        return Guided(self.denoiser, rule, self.label, self.negative)


class Autoguided(Wrapper):
    """Autoguidance (Karras et al. 2024, "Guiding a diffusion model with a bad version of itself"):
    D_weak + scale (D - D_weak), with or without classes.

    Args:
        denoiser: the wrapped one. weak: a smaller or less trained one of the same process, shape and classes.
        rule: the scale and its refinements.

    Raises:
        UsageError: the two differ in process, shape or number of classes.
    """

    def __init__(self, denoiser: Denoiser, weak: Denoiser, rule: Rule):
        super().__init__(denoiser)
        if denoiser.process != weak.process:
            raise UsageError(f"the weak denoiser has {weak.process}, the other {denoiser.process}", "take its sibling")
        shapes = [getattr(d, "shape", None) for d in (denoiser, weak)]
        classes = [len(getattr(d, "labels", None) or ()) for d in (denoiser, weak)]
        if shapes[0] != shapes[1] or classes[0] != classes[1]:
            raise UsageError(f"the weak denoiser differs in shape or classes: {shapes}, {classes}", "take its sibling")
        self.weak, self.rule = weak, rule
        self.unseen |= frozenset(getattr(weak, "unseen", ()))
        self.time_dependent |= rule.varies or getattr(weak, "time_dependent", False)
        away, towards = rule.needs
        self.evals = away * getattr(weak, "evals", 1) + towards * self.evals

    def rewrap(self, change: Callable[[Any], Any]) -> "Autoguided":
        """See `Wrapper.rewrap`."""
        return Autoguided(change(self.denoiser), change(self.weak), self.rule)

    def at(self, t: float | Tensor) -> "Autoguided":
        """See `Wrapper.at`."""
        return Autoguided(at(self.denoiser, t), at(self.weak, t), self.rule.at(t, self.process))

    def tuned(self, offsets: Mapping[str, Tensor]) -> "Autoguided":
        """With these offsets in the denoiser; the weak one stays as it is."""
        return Autoguided(tuned(self.denoiser, offsets), self.weak, self.rule)

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The guided D(x, t), in the dtype of x; both denoisers get the same x, t and conditions."""
        rule = self.rule.at(as_time(t), self.process)
        away, towards = rule.needs
        if not towards:
            return self.weak(x, t, **cond)
        if not away:
            return self.denoiser(x, t, **cond).to(x.dtype)
        # either may work in place on what it is given, and both may return one buffer
        own = t.clone() if isinstance(t, Tensor) else t
        x0 = self.denoiser(x.clone(), own, **cond).to(x.dtype, copy=True)
        return rule.mix(self.weak(x, t, **cond).to(x.dtype), x0, x0=x0 if rule.projects else None)


def guide(
    denoiser: Denoiser,
    scale: float | Schedule,
    label: Class | None = None,
    weak: Denoiser | None = None,
    *,
    negative: Class | Mapping[str, Any] | None = None,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
    eta: float = 1.0,
    norm: float | None = None,
) -> Denoiser:
    """Guidance: D_0 + scale (D - D_0), where D_0 is the denoiser at another condition, or a weaker denoiser.

    What it costs is in `evals`: at a scale of 1 one of the two is not called, nor, without refinements, at 0.

    Args:
        denoiser: class-conditional, its label len(labels) meaning none; with `weak` or conditions in `negative`, any.
        scale: 0 is D_0, 1 the denoiser itself, above 1 exaggerates the difference; or a function of the time, from a
            float64 tensor, 0-d or (batch,), to the same shape, such as `cfg_plus_plus` makes.
        label: the class, where calls do not give one: an index, a name, or (batch,) of either.
        weak: a smaller or less trained sibling, for autoguidance (Karras et al. 2024).
        negative: the condition of D_0: a class, as for label, instead of none; or a dict of the conditions that differ
            from those of the call, each a number or a tensor with a batch dimension.
        interval: guide only where low < sigma/alpha <= high, and call the denoiser alone elsewhere
            (Kynkaanniemi et al. 2024). There the PF-ODE has a kink: multistep histories see it.
        rescale: phi, from 0 to 1: brings the standard deviation of what the network returns (of D with `weak`) that
            far back to the unguided one (Lin et al. 2024, who use 0.7).
        eta: factor of the part of D - D_0 that is parallel to D; norm: largest length of D - D_0. Adaptive projected
            guidance (Sadat et al. 2025, who use eta = 0 and norm 2.5 to 15), without its momentum: `mixing.projected`.

    Raises:
        UsageError: an unconditional denoiser, a value out of range, an unknown class, or no sibling.
    """
    rule = Rule(scale, interval, rescale, eta, norm)
    if weak is not None:
        if label is not None or negative is not None:
            given = "label" if label is not None else "negative"
            raise UsageError(f"autoguidance takes no {given} of its own", "give label= to sample")
        return denoiser if rule.scale == 1 else Autoguided(denoiser, weak, rule)
    if rule.scale == 1 and label is None:
        return denoiser
    away: Mapping[str, Any]
    if isinstance(negative, Mapping):
        away = {key: _class(denoiser, value, away=True) if key == "label" else value for key, value in negative.items()}
        if not away:
            raise UsageError("negative: got no condition", 'negative={"label": 3}')
    else:
        none = len(_names(denoiser))
        if negative is None and rule.needs[0]:
            warn_unseen(denoiser, [none])
        away = {"label": none if negative is None else _class(denoiser, negative, away=True)}
    return Guided(denoiser, rule, None if label is None else _class(denoiser, label), away)


def cfg_plus_plus(lam: float, plan: Plan) -> Schedule:
    """The scale of CFG++ (Chung et al. 2025, algorithm 2) in every row of a first-order plan such as ddim or euler-a.

    CFG++ goes to D_0 + lam (D - D_0) and adds noise along D_0: x' = alpha' (D_0 + lam (D - D_0)) + sigma' eps_0. That
    is the row's own update with the scale lam alpha'/f, where f is its factor of D: lam / (1 - s'/s) for ddim, with
    s = sigma/alpha. It grows with the number of steps: CFG++ belongs to its plan, no ODE is behind it.

    Args:
        lam: 0 is unconditional, 1 the most the authors use. plan: the one to be run with the guided denoiser.

    Returns:
        a scale for `guide`.

    Raises:
        UsageError: a plan with stages or a history, or one that leads away from the data.
    """
    lam = number("lam", lam, 0)
    factor = plan.b[:, 0] * row_affine(plan.prediction, plan.alpha[:-1], plan.sigma[:-1])[1]
    plain = plan.steps == plan.nfe and not plan.b[:, 1:].any() and not plan.r_prev.any()
    if not plain or not (factor > 0).all():
        raise UsageError(
            f"CFG++ needs a first-order plan towards the data; {plan.name!r} is none", 'make_plan("ddim", ...)'
        )
    return functools.partial(_looked_up, plan.t.detach(), (lam * plan.alpha[1:] / factor).detach())


def _looked_up(times: Tensor, values: Tensor, t: Tensor) -> Tensor:
    """The value of the table at the time nearest to t, shape of t.

    Raises:
        UsageError: on the CPU, t is not a time of the table.
    """
    times, values = times.to(t), values.to(t)
    distance, index = (times - t[..., None]).abs().min(-1)
    if t.device.type == "cpu" and not torch.compiler.is_compiling() and (distance > 1e-5 * t.abs()).any():
        raise UsageError(
            f"this scale belongs to a plan without the time {t.flatten()[distance.argmax()]:g}",
            "run the plan it was made for: sample(guided, plan=plan)",
        )
    return values[index]


def _names(denoiser: Denoiser) -> Sequence[str]:
    """The names of a denoiser's classes.

    Raises:
        UsageError: it has none.
    """
    names = getattr(denoiser, "labels", None)
    if not names:
        raise UsageError(
            "guidance needs a class-conditional denoiser; this one has no labels", "leave the guidance out"
        )
    return names


def _class(denoiser: Denoiser, label: Any, away: bool = False) -> Tensor | int:
    """A class by number, or those of a list or a tensor; of what is led away from, len(labels) may say none."""
    names = _names(denoiser)
    if isinstance(label, list | tuple | range) or (hasattr(label, "tolist") and getattr(label, "ndim", 0)):
        found = class_indices(denoiser, label, len(label))
        assert found is not None
        return found
    label = label.item() if isinstance(label, Tensor) else label
    index = integer("label", label, 0, len(names)) if away and not isinstance(label, str) else class_index(names, label)
    warn_unseen(denoiser, [index])
    return index


def _joined(key: str, away: Any, towards: Any, x: Tensor) -> Any:
    """One condition of both halves of the batch; one that is the same for every sample stays as it is."""
    if away is towards and not (isinstance(away, Tensor) and away.ndim and len(away) == len(x)):
        return away
    halves = [_batched(key, value, x) for value in (away, towards)]
    if halves[0].shape != halves[1].shape:
        got = " and ".join(str(tuple(half.shape)) for half in halves)
        raise UsageError(f"{key}: guidance away from and towards it needs one shape, got {got}", "pad the shorter one")
    return torch.cat(halves)


def _batched(key: str, value: Any, x: Tensor) -> Tensor:
    """A condition as a tensor (batch, ...) on the device of x."""
    if isinstance(value, int | float):
        return torch.full((len(x),), value, device=x.device)
    if not isinstance(value, Tensor):
        raise UsageError(f"{key}: guidance joins numbers and tensors, got {value!r:.60}", "give a tensor")
    if value.ndim == 0 or len(value) == 1:
        value = value.expand(len(x), *value.shape[1:])
    if len(value) != len(x):
        raise UsageError(
            f"{key}: got {len(value)} for {len(x)} samples", "one for all, or in sample(label=...) one each"
        )
    return value.to(x.device)
