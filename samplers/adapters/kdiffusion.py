"""k-diffusion's functions: `sample_<name>(model, x, sigmas, extra_args=None, callback=None, disable=None, ...)`.

With `from pfode.samplers import kdiffusion as sampling` in place of `from k_diffusion import sampling`, code written
for k-diffusion runs as it is: `sample_euler`, `sample_dpmpp_2m`, ... have its signatures and callbacks, and every other
recipe of the catalogue is there too, `sample_unipc3` or `sample_dpmpp2m_sde_heun`. model(x, sigma, **extra_args) gives
the denoised x; sigma has shape (batch,) and, as x, the dtype that x came in. Between its calls the state is float32 or
better.

Noise is drawn only where it is used: by noise_sampler(sigma, sigma_next) where that is given, else from a Brownian path
for the samplers of SDEs, and by `torch.randn_like` for the others, as k-diffusion does. `extra_args["seed"]` makes both
repeatable, whatever the batch: one of the first sample, or one per sample. Sigmas that come twice in a row count once.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pfode import noise
from pfode.errors import UsageError, integer
from pfode.plans.executor import run
from pfode.plans.table import Plan
from pfode.process import EDM, float64
from pfode.samplers.adapters.sigmas import (
    append_zero,
    get_ancestral_step,
    get_sigmas_exponential,
    get_sigmas_karras,
    get_sigmas_polyexponential,
    get_sigmas_vp,
    to_d,
)
from pfode.samplers.adaptive import ADAPTIVE, Adaptive, make_adaptive
from pfode.samplers.catalogue import CATALOGUE, Recipe, make_plan, recipe
from pfode.samplers.methods import Integrator, Method, Trail
from pfode.samplers.stochastic import Ancestral, AncestralMidpoint, Reverse
from pfode.samplers.tape import Linear

__all__ = [  # and sample_<name> of every sampler: see dir()
    "BrownianTreeNoiseSampler",
    "append_zero",
    "default_noise_sampler",
    "get_ancestral_step",
    "get_sigmas_exponential",
    "get_sigmas_karras",
    "get_sigmas_polyexponential",
    "get_sigmas_vp",
    "sample_dpm_adaptive",
    "sample_dpm_fast",
    "to_d",
]

NoiseSampler = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[dict[str, Any]], object]
Seed = int | Sequence[int] | Tensor | np.ndarray | None

# ---- noise


def default_noise_sampler(x: Tensor, seed: Seed = None) -> NoiseSampler:
    """Fresh noise at every call: from torch's generator, or keyed by a seed and the number of the call.

    Args:
        x: of the shape, dtype and device to be drawn.
        seed: of the first sample, the others following, or one per sample.

    Raises:
        UsageError: seeds that are no integers from 0 to 2^64 - 1, or not one per sample.
    """
    if seed is None:
        return lambda sigma, sigma_next: torch.randn_like(x)
    seeds, draw = _seeds(seed, len(x)), itertools.count(1)
    return lambda sigma, sigma_next: noise.normal(seeds, next(draw), x.shape[1:], x.dtype, x.device)


def _seeds(seed: Any, n: int) -> list[int]:
    """One seed per sample: as they are given, or counted up from a single one."""
    given = seed.tolist() if isinstance(seed, Tensor | np.ndarray | np.generic) else seed
    if isinstance(given, list | tuple | range):
        seeds = noise.check_seeds(given)
        if len(seeds) != n:
            raise UsageError(f"seed: {len(seeds)} of them for {n} samples", "seed=0, or one per sample")
        return seeds
    first = noise.check_seeds([given])[0]
    return noise.check_seeds(range(first, first + n))


class BrownianTreeNoiseSampler:
    """Noise from one Brownian path per sample, the same for any steps: pfode's `noise.brownian`.

    Args:
        x: of the shape, dtype and device to be drawn. sigma_min, sigma_max: the ends of the path.
        seed: of the first sample, the others following, or one per sample; None draws it from torch's generator.
        transform: the time of the path as a function of sigma.
    """

    def __init__(
        self,
        x: Tensor,
        sigma_min: Any,
        sigma_max: Any,
        seed: Seed = None,
        transform: Callable[[Tensor], Tensor] = lambda sigma: 1 / (1 + sigma**-0.25),
    ):
        seed = int(torch.randint(0, 2**63 - 1, (), device="cpu")) if seed is None else seed
        self.seeds, self.x, self.transform = _seeds(seed, len(x)), x, transform
        self.low, self.high = sorted(self._clock(end) for end in (sigma_min, sigma_max))
        self.ends: dict[int, Any] = {}

    def _clock(self, sigma: Any) -> float:
        return float(self.transform(float64(sigma)))

    def __call__(self, sigma: Any, sigma_next: Any) -> Tensor:
        start, stop = ((self._clock(s) - self.low) / (self.high - self.low) for s in (sigma, sigma_next))
        start, stop = (min(max(u, 0.0), 1.0) for u in (start, stop))
        x = self.x
        return noise.brownian(self.seeds, start, stop, x.shape[1:], x.dtype, x.device, self.ends)


# ---- samplers


@dataclass(frozen=True)
class _Mixed(Method):
    """Another method for every step."""

    methods: tuple[Method, ...]
    calls: int = 3

    @property
    def stochastic(self) -> bool:
        return any(method.stochastic for method in self.methods)

    def step(self, trail: Trail, target: Any) -> Linear:
        return self.methods[trail.index].step(trail, target)


class _Model:
    """A model of k-diffusion as a denoiser that knows its rows, with callback and progress."""

    def __init__(
        self,
        model: Any,
        extra_args: dict[str, Any] | None,
        dtype: torch.dtype,
        plan: Plan | Adaptive,
        shows: bool,
    ):
        self.model, self.extra_args, self.dtype = model, extra_args or {}, dtype
        self.process, self.row, self.shows = plan.process, 0, shows
        self.entered: Callable[[int, Tensor, Tensor, Tensor], None] | None = None

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        k, x = self.row, x.to(self.dtype)
        self.row += 1
        sigma = t.to(self.dtype).expand(len(x)).contiguous()
        seen = x.clone() if self.shows else x  # the model may work on its input in place
        denoised = self.model(x, sigma, **self.extra_args)
        if self.entered is not None:
            self.entered(k, seen, t, denoised)
        return denoised


def _sample(
    found: Recipe,
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None,
    callback: Callback | None,
    disable: bool | None,
    noise_sampler: NoiseSampler | None = None,
    s_noise: float = 1.0,
    timed: bool = False,
    **options: Any,
) -> Tensor:
    """Run a recipe over sigmas; `timed`: the callback gets t and t_up as well."""
    given = sigmas.detach().double().tolist()
    kept = [i for i, s in enumerate(given) if i == 0 or s != given[i - 1]]
    nodes = [given[i] for i in kept]
    if len(nodes) < 2:
        return x
    positive = [s for s in nodes if s > 0]
    low, high = min(positive), max(positive)
    room = 1.5 if options.get("churn") else 1.0  # noise may be added above the first sigma, too
    process = EDM(low if low < high else low / 2, room * high)
    plan = make_plan(found, process, grid=nodes, **options)
    denoiser = _Model(model, extra_args, x.dtype, plan, callback is not None)
    step, first = plan.step.tolist(), plan.node.tolist()

    def report(k: int, x: Tensor, t: Tensor, denoised: Tensor) -> None:
        bar.update(first[k])
        if callback is not None and first[k]:
            i = kept[step[k]]
            info = {"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": t.to(sigmas), "denoised": denoised}
            extra = {"t": -sigmas[i].log(), "t_up": -t.to(sigmas).log()} if timed else {}
            callback(info | extra)

    with torch.no_grad(), tqdm(total=len(given) - 1, disable=disable) as bar:
        denoiser.entered = report
        draw = _drawing(found, plan, x, noise_sampler, s_noise, denoiser.extra_args.get("seed"), (low, high))
        return run(plan, denoiser, x, draw).to(x.dtype)


def _drawing(
    found: Recipe,
    plan: Plan,
    x: Tensor,
    noise_sampler: NoiseSampler | None,
    s_noise: float,
    seed: Any,
    ends: tuple[float, float],
) -> Callable[[int], Tensor] | None:
    """The noise of the plan's rows."""
    if not plan.stochastic:
        return None
    if noise_sampler is None:
        path = isinstance(found.method, AncestralMidpoint | Reverse)
        noise_sampler = BrownianTreeNoiseSampler(x, *ends, seed) if path else default_noise_sampler(x, seed)
    levels = (1 / plan.span - 1) ** -4  # sigma of the Brownian clock
    state = torch.promote_types(x.dtype, torch.float32)

    def draw(k: int) -> Tensor:
        return s_noise * noise_sampler(*levels[k].to(x).unbind()).to(state)

    return draw


_CHURN = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}
_ETA = {"eta": 1.0, "s_noise": 1.0, "noise_sampler": None}
_THEIRS: dict[str, tuple[str, dict[str, Any]]] = {  # k-diffusion's samplers: the recipe, and options after `disable`
    "euler": ("euler", _CHURN),
    "euler_ancestral": ("euler-a", _ETA),
    "heun": ("heun", _CHURN),
    "dpm_2": ("dpm2", _CHURN),
    "dpm_2_ancestral": ("dpm2-a", _ETA),
    "lms": ("lms", {"order": 4}),
    "dpmpp_2s_ancestral": ("dpm++2s-a", _ETA),
    "dpmpp_sde": ("dpm++sde", {**_ETA, "r": 0.5}),
    "dpmpp_2m": ("dpm++2m", {}),
    "dpmpp_2m_sde": ("dpm++2m-sde", {**_ETA, "solver_type": "midpoint"}),
    "dpmpp_3m_sde": ("dpm++3m-sde", _ETA),
}
_BASE = ("model", "x", "sigmas")
_LATER = ("extra_args", "callback", "disable")


def _options(found: Recipe) -> dict[str, Any]:
    """What a recipe takes, named and ordered as k-diffusion would."""
    method = found.method
    own = {"s_churn" if name == "churn" else name: getattr(method, name) for name in method.options}
    own.pop("s_noise", None)
    noisy = method.stochastic or {"eta", "s_churn", "tau"} & set(own)
    return (
        own | ({"s_noise": 1.0} if noisy else {}) | ({"noise_sampler": None} if noisy and "s_churn" not in own else {})
    )


def _signature(options: dict[str, Any]) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    first = [inspect.Parameter(name, kind) for name in _BASE]
    later = [inspect.Parameter(name, kind, default=None) for name in _LATER]
    return inspect.Signature(first + later + [inspect.Parameter(n, kind, default=v) for n, v in options.items()])


def _settled(
    found: Recipe, order: int | None, solver_type: str | None, r: float | None
) -> tuple[Recipe, dict[str, Any]]:
    """The recipe that k-diffusion's own options make of one, and its chart."""
    if order is not None:
        return recipe(f"exp-ab{integer('order', order, 1, 4)}"), {"chart": "ddim"}
    if solver_type is not None:
        if solver_type not in ("midpoint", "heun"):
            raise UsageError(f"solver_type: got {solver_type!r}", "solver_type='midpoint' or 'heun'")
        return recipe(found.name + ("-heun" if solver_type == "heun" else "")), {}
    return (found if r is None else replace(found, method=replace(found.method, r=r))), {}  # type: ignore[type-var]


def _function(name: str, found: Recipe, taken: dict[str, Any]) -> Callable[..., Tensor]:
    signature = _signature(taken)

    def sampler(*args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        chosen, options = _settled(found, *(given.pop(key, None) for key in ("order", "solver_type", "r")))
        if "s_churn" in given:
            options["churn"] = given.pop("s_churn")
            given["s_tmax"] = min(given["s_tmax"], 1e9)
        return _sample(chosen, **given, **options)

    sampler.__name__ = sampler.__qualname__ = name
    sampler.__signature__ = signature  # type: ignore[attr-defined]
    sampler.__doc__ = f"{found.name}: {found.summary} ({found.source})."
    return sampler


def sample_dpm_fast(
    model: Any,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    n: int,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DPM-Solver-fast (Lu et al. 2022, section 3.4): n calls, steps of dpm-3s and a last one of what is left."""
    low, high = _two(sigma_min, sigma_max)
    n = integer("n", n, 1)
    orders = [3] * (n // 3 - 1) + [2, 1] if n % 3 == 0 else [3] * (n // 3) + [n % 3]
    made = [recipe({1: "dpm-1", 2: "dpm-2s", 3: "dpm-3s"}[order]).method for order in orders]
    sigmas = torch.linspace(math.log(high), math.log(low), len(orders) + 1, dtype=torch.float64, device="cpu").exp()
    sigmas[0], sigmas[-1] = high, low
    rho2 = (sigmas[1] / sigmas[0]).item() ** 2
    most = ((1 - (low / sigmas[1:]) ** 2) / (1 - rho2)).sqrt().tolist()  # or the steps would go below sigma_min
    methods = tuple(
        Ancestral(one, min(eta, m)) for one, m in zip(made, most, strict=True) if isinstance(one, Integrator)
    )
    found = Recipe("dpm-fast", _Mixed(methods), ("dpm",), 3, 3, "Lu et al. 2022 (DPM-Solver)", "singlestep")
    sigmas = sigmas.to(x.device)
    return _sample(found, model, x, sigmas, extra_args, callback, disable, noise_sampler, s_noise, timed=True)


def sample_dpm_adaptive(
    model: Any,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    return_info: bool = False,
) -> Any:
    """DPM-Solver-12 and -23 with adaptive steps (Lu et al. 2022, appendix C): pfode's dpm-adaptive.

    Every sample has its own steps, which do not depend on its batch mates; info counts those of the slowest. The
    callback is called at every call of the model, with sigma of shape (batch,).

    Raises:
        UsageError: noise, or another controller: there are none here.
    """
    low, high = _two(sigma_min, sigma_max)
    fixed = {"h_init": (h_init, 0.05), "pcoeff": (pcoeff, 0.0), "icoeff": (icoeff, 1.0), "dcoeff": (dcoeff, 0.0)}
    fixed |= {"accept_safety": (accept_safety, 0.81), "eta": (eta, 0.0)}
    for name, (value, usual) in fixed.items():
        if value != usual:
            raise UsageError(f"sample_dpm_adaptive: {name} = {value!r} is not supported", f"{name}={usual}")
    rows = {row.solver: name for name, row in ADAPTIVE.items() if isinstance(row.solver, int)}
    if order not in rows:
        raise UsageError(f"order: got {order!r}", "order=2 or 3")
    made = make_adaptive(rows[order], EDM(low, high), rtol=rtol, atol=atol, final="stop")

    denoiser = _Model(model, extra_args, x.dtype, made, callback is not None)

    def report(k: int, x: Tensor, sigma: Tensor, denoised: Tensor) -> None:
        bar.update(1)
        if callback is not None:
            t = -sigma.log()
            info = {"x": x, "i": k, "sigma": sigma, "sigma_hat": sigma, "t": t, "t_up": t, "denoised": denoised}
            callback(info)

    with torch.no_grad(), tqdm(disable=disable) as bar:
        denoiser.entered = report
        found = made.run(denoiser, x)
    counts = {
        "steps": found.steps + found.rejected,
        "nfe": found.nfe,
        "n_accept": found.steps,
        "n_reject": found.rejected,
    }
    info = {name: int(count.max()) for name, count in counts.items()}
    return (found.x.to(x.dtype), info) if return_info else found.x.to(x.dtype)


def _two(sigma_min: Any, sigma_max: Any) -> tuple[float, float]:
    low, high = float(sigma_min), float(sigma_max)
    if not 0 < low < high:
        raise UsageError(f"need 0 < sigma_min < sigma_max, got {low} and {high}", "sigma_min=0.03, sigma_max=14.6")
    return low, high


def _name(found: str) -> str:
    return "sample_" + found.replace("++", "pp").replace("-", "_")


def __getattr__(name: str) -> Any:
    if not name.startswith("sample_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    short = name.removeprefix("sample_")
    if short in _THEIRS:
        found, taken = _THEIRS[short]
        function = _function(name, CATALOGUE[found], taken)
    else:
        try:
            found = recipe(short)
        except UsageError as error:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}\nhint: {error.hint}") from error
        function = _function(name, found, _options(found))
    globals()[name] = function
    return function


def __dir__() -> list[str]:
    return sorted({*globals(), *(f"sample_{name}" for name in _THEIRS), *map(_name, CATALOGUE)})
