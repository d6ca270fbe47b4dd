"""`PFODEScheduler`: any plan inside a diffusers pipeline, which hands its rows out one per call of `step`.

What a pipeline asks of a scheduler is in `conventions` beside this file; here are the class and a run in progress.
"""

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from pfode import noise
from pfode.errors import UsageError, unknown
from pfode.plan import Plan, row_affine, used, weighed
from pfode.process import Process
from pfode.samplers import auto
from pfode.samplers.adapters import conventions
from pfode.samplers.catalogue import Recipe, make_plan, recipe

Generators = torch.Generator | list[torch.Generator] | None


class Line(NamedTuple):
    """A row with the network's preconditioning in it: factors are 0-d tensors on the device, None where 0."""

    g: Tensor | None  # m = F + g x, up to a factor that is part of b
    r: Tensor | None
    back: Tensor | None  # of the state before
    b: tuple[tuple[int, Tensor], ...]  # (age, factor) of the predictions
    c: tuple[tuple[int, Tensor], ...]  # the same of the noises
    draws: bool  # whether its noise is used, here or later
    skip: Tensor  # D = skip x + out F
    out: Tensor


class Table:
    """The rows of a plan for a kind of network, in float64 on the host.

    Columns: g, r, r', skip, out, b, c of `Line`, for states at the network's scale (`Convention.scale`). Noise that a
    plan adds before its first call is taken to be in the state already: pipelines begin at the level of that call.

    Raises:
        UsageError: a plan that is not of the convention's process, or begins with a row that calls no network.
    """

    def __init__(self, plan: Plan, kind: conventions.Convention):
        if plan.init[1] == 0 and plan.init[0] != 1:
            raise UsageError(f"plan {plan.name!r}: its first step is made without a call", "afs=None")
        alpha, sigma = plan.alpha[:-1], plan.sigma[:-1]
        asked = _asked(plan)
        skip, out = kind.to_x0(*asked)
        if not torch.isfinite(torch.stack([skip, out])).all():
            at = plan.t[~torch.isfinite(skip + out)][0].item()
            problem = f"a network that predicts the noise says nothing about the data where alpha = 0 (t = {at:g})"
            raise UsageError(problem, "a network of another prediction_type, or nodes that start below that time")
        p, q = row_affine(plan.prediction, alpha, sigma)
        scale = torch.as_tensor(kind.scale(torch.cat([asked[1], plan.sigma[-1:]])), dtype=torch.float64).clone()
        if plan.sigma[-1] == 0:
            scale[-1] = 1
        here, after = scale[:-1], scale[1:]
        self.ages, self.noise_ages = plan.b.shape[1] - 1, plan.c.shape[1] - 1
        b = weighed(plan.b, q * out) * after[:, None]
        back = plan.r_prev * after / torch.cat([here[:1], here[:-1]])
        g, r = (p + q * skip) / (q * out) / here, plan.r * after / here
        lone = ~used(plan.b, 1)
        r, g = torch.where(lone, r + b[:, 0] * g, r), torch.where(lone, 0.0, g)
        r = torch.where(r.abs() < 1e-13 * (plan.r * after / here).abs(), 0.0, r)
        columns = torch.stack([g, r, back, skip / here, out], 1)
        self.columns = torch.cat([columns, b, plan.c * after[:, None]], 1)
        self.alive = self.columns != 0
        self.draws = used(plan.c).tolist()
        self.pair = bool(self.alive[:, 2].any())

    def begins_at(self, i: int) -> bool:
        """Whether the rows from i on look back on nothing before it."""
        past = self.columns[i:, 5:]
        ages = torch.cat([torch.arange(self.ages + 1), torch.arange(self.noise_ages + 1)])
        early = torch.arange(len(past))[:, None] < ages
        return not (past[early] != 0).any() and (i == 0 or not self.alive[i, 2])

    def line(self, k: int, factors: Sequence[Tensor], full: bool = False) -> Line:
        """Row k of these factors; full: as if none were 0, the same for every row."""
        alive = [True] * len(factors) if full else self.alive[k].tolist()
        g, r, back, skip, out, *rest = factors
        split = 6 + self.ages
        window = range(5, split)
        return Line(
            g if alive[0] else None,
            r if alive[1] else None,
            back if (self.pair if full else alive[2]) else None,
            tuple((j - 5, rest[j - 5]) for j in window if alive[j]),
            tuple((j - split, rest[j - 5]) for j in range(split, len(factors)) if alive[j]),
            bool(self.noise_ages >= 0) if full else self.draws[k],
            skip,
            out,
        )


def _asked(plan: Plan) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) of the times that the network is told, which need not be the register's in a fitted plan."""
    apart, process = plan.t != plan.time[:-1], plan.process
    alpha = torch.where(apart, process.alpha(plan.t), plan.alpha[:-1])
    return alpha, torch.where(apart, process.sigma(plan.t), plan.sigma[:-1])


class Run:
    """A pipeline's run in progress: where it is, and what its rows look back on.

    Args:
        plan, kind: what is run, and for which kind of network.
        restart: makes the plan that begins at a node, None where there is no way.
        unusual: the network's output is not used as it is.
    """

    def __init__(
        self,
        plan: Plan,
        kind: conventions.Convention,
        restart: Callable[[list[float]], Plan] | None,
        device: torch.device | str | None,
        unusual: bool,
    ):
        self.plan, self.kind, self.restart = plan, kind, restart
        self.whole = Table(plan, kind)
        self.timesteps = kind.timestep(plan.t).to(torch.float32).to(device)
        self.sigmas = kind.sigma(plan.alpha, plan.sigma).to(torch.float32)
        self.begin: int | None = None
        self.begun = False
        self.unusual = unusual
        self.seeds: list[int] | None = None
        self.go(0)

    def go(self, i: int) -> None:
        """Begin at row i, with nothing to look back on.

        Raises:
            UsageError: an inner stage, or a plan whose later rows cannot do without the earlier ones.
        """
        table, offset = self.whole, 0
        if i < self.plan.nfe and not table.begins_at(i):
            table, offset = self._from(i), i
        self.position, self.table, self.offset = i, table, offset
        self.dense: Tensor | None = None
        self.forget()
        self.fit(torch.empty((), dtype=torch.float32, device=self.timesteps.device))

    def forget(self) -> None:
        self.past: list[Tensor] = []
        self.noises: list[Tensor] = []
        self.previous: Tensor | None = None
        self.given: Tensor | None = None
        self.state: Tensor | None = None
        self.version = 0

    def _from(self, i: int) -> Table:
        """The rows from i on, of a plan made to begin there."""
        plan, step = self.plan, int(self.plan.step[i])
        if not plan.node[i]:
            problem = f"{plan.name}: call {i} is an inner stage of step {step}, a run cannot begin there"
            raise UsageError(problem, 'a recipe of one call per step, or on flows one with chart="flow"')
        if self.restart is not None:
            made = self.restart(plan.times[step:].tolist())
            if made.nfe == plan.nfe - i and torch.allclose(made.t, plan.t[i:], rtol=1e-9, atol=1e-9):
                return Table(made, self.kind)
        problem = f"{plan.name}: a run cannot begin with call {i}: what later rows look back on is missing"
        raise UsageError(problem, "begin with the first timestep, or choose another recipe")

    def fit(self, x: Tensor) -> None:
        """The rows in the dtype and on the device of a state."""
        if self.dense is not None and self.dense.dtype is x.dtype and self.dense.device == x.device:
            return
        self.dense = self.table.columns.to(x.dtype).to(x.device)
        rows = [row.unbind() for row in self.dense.unbind()]
        self.lines = [self.table.line(k, row) for k, row in enumerate(rows)]

    def index(self, timestep: Any) -> int | None:
        """The position of one of our own timesteps, known by its place in memory: nothing is read from the device."""
        if isinstance(timestep, Tensor) and timestep.dtype is torch.float32:
            away = timestep.data_ptr() - self.timesteps.data_ptr()
            if 0 <= away < 4 * self.plan.nfe:
                return away // 4
        return None

    def nearest(self, timestep: Any) -> int:
        """The position of the timestep next to this one at which a run can begin."""
        value = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        away = (self.timesteps.cpu() - value).abs()
        begins = self.plan.node[:-1].clone()
        if self.restart is None:
            begins &= torch.tensor([self.whole.begins_at(i) for i in range(self.plan.nfe)])
        return int(torch.where(begins, away, torch.inf).argmin())

    def place(self, timestep: Any) -> None:
        """Go where this timestep says, where that is not where we are."""
        index, n = self.index(timestep), self.plan.nfe
        if index is None:
            if self.begun and self.position < n:
                return
            index = self.begin if self.begin is not None and not self.begun else self.nearest(timestep)
        if index != self.position:
            self.go(index)
        self.begun = True

    def advance(self, line: Line, x: Tensor, out: Tensor, noise: Tensor) -> Tensor:
        """The state after a row, from that before it and the network's output."""
        made = out if line.g is None else torch.addcmul(out, x, line.g)
        table = self.table
        past = [made, *self.past[: table.ages]] if table.ages else [made]
        y = None if line.r is None else x * line.r
        for j, factor in line.b:
            y = past[j] * factor if y is None else y.addcmul_(past[j], factor)
        if line.back is not None:
            y = torch.addcmul(y, self.previous, line.back)  # type: ignore[arg-type]
        if table.noise_ages >= 0:
            self.noises = [noise, *self.noises[: table.noise_ages]]
            for j, factor in line.c:
                y = self.noises[j] * factor if y is None else torch.addcmul(y, self.noises[j], factor)
        if table.ages:
            self.past = past
        if table.pair:
            self.previous = x
        return torch.zeros_like(x) if y is None else y


class _Runs(threading.local):
    """The run of each thread; a copy takes the current one along."""

    run: Run | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Runs":
        made = _Runs()
        made.run = copy.deepcopy(self.run, memo)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Runs, ())


class PFODEScheduler(SchedulerMixin, ConfigMixin):
    """A scheduler of diffusers that runs any recipe of the catalogue or a saved plan.

    `pipe.scheduler = PFODEScheduler.from_config(pipe.scheduler.config, sampler="unipc", grid="karras")`

    States are float32 or better whatever the network's dtype, at the scale at which the network takes them, so that
    `scale_model_input` has nothing to do; timesteps are floats; a step reads nothing from the device. What a run
    remembers is its position and, for multistep recipes, the last predictions; every thread has a run of its own, and a
    run begins wherever a timestep out of turn says. Noise comes from the generators that a pipeline passes, else it is
    keyed by `seed` and the row's number, as in `pfode.sample`.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: the process of
            a VP model; use_flow_sigmas: a flow instead; sigma_data (sigma_min, sigma_max, rho, sigma_schedule) or
            timestep_type "continuous": an EDM model.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction". variance_type: "learned" or
            "learned_range": the second half of the network's channels is left aside.
        timestep_spacing, steps_offset, spacing_drop, set_alpha_to_one, use_..._sigmas, use_lu_lambdas, sigma_min,
            sigma_max, lambda_min_clipped, final_sigmas_type: where the nodes lie unless `grid` says. spacing_drop: one
            place more than steps is spaced and the lowest left out, as DPM-Solver, UniPC and DEIS of diffusers do.
        shift or flow_shift, use_dynamic_shifting, time_shift_type, shift_terminal, invert_sigmas: of flows;
            base_shift, max_shift, base_image_seq_len and max_image_seq_len are read by the pipelines.
        clip_sample, clip_sample_range, thresholding, dynamic_thresholding_ratio, sample_max_value: of the denoiser.
        lower_order_final: orders fall at the end: always, or of fewer steps than this.
        sampler: a name of the catalogue or of a family ("unipc", "dpm++"), "auto", which is that of guided models, or
            the path of a saved plan.
        grid: one of pfode's ("karras", "beta(0.5,0.7)", "auto"), or the config's own where it is None.
        chart: of the recipe. options: of the recipe, {"eta": 0.5}.
        seed: sample i of a batch has seed + i, or the i-th of a list, where a pipeline passes no generator.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers if e.name != "EDMEulerScheduler"]  # says not all it means

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        variance_type: str | None = None,
        timestep_spacing: str = "trailing",
        steps_offset: int = 1,
        spacing_drop: int = 0,
        set_alpha_to_one: bool = True,
        final_sigmas_type: str = "zero",
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        sigma_data: float | None = None,
        rho: float = 7.0,
        sigma_schedule: str = "karras",
        timestep_type: str = "discrete",
        lambda_min_clipped: float | None = None,
        shift: float = 1.0,
        flow_shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        shift_terminal: float | None = None,
        invert_sigmas: bool = False,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        lower_order_final: bool | int = False,
        sampler: str = "auto",
        grid: str | None = None,
        chart: str | None = None,
        options: dict[str, Any] | None = None,
        seed: int | list[int] | None = None,
    ):
        if not isinstance(sampler, str):
            problem = f"sampler: need a name or the path of a saved plan, as text, got {sampler!r:.60}"
            raise UsageError(problem, 'sampler="unipc", or sampler=str(plan.save("six.safetensors"))')
        self.seed = seed
        self.betas = conventions.betas(self.config)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, 0)
        self._kind = conventions.convention(self.config)
        self._plan = Plan.load(sampler) if sampler.endswith(".safetensors") else None
        if self._plan is not None:
            _check_same(self._plan, self._kind.process)
        elif sampler != "auto":
            recipe(sampler)
        self._runs, self._last = _Runs(), None

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler for the models of another one's config; kwargs are keys of our own.

        Raises:
            UsageError: a scheduler or a key that has no counterpart here.
        """
        own = set(cls._get_init_keys(cls)) - {"self"}
        for key in kwargs:
            if key not in own and not key.startswith("_") and not return_unused_kwargs:
                raise unknown("key of the scheduler's config", key, own)
        if isinstance(config, dict):
            config = conventions.translated(config, own)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    # ---- what pipelines read

    @property
    def order(self) -> int:
        """Calls per step."""
        run = self._run()
        if run is not None:
            return 1 if run.plan.nfe == run.plan.steps else -(-run.plan.nfe // run.plan.steps)
        if self._plan is not None:
            return -(-self._plan.nfe // self._plan.steps)
        return 1 if self.config["sampler"] == "auto" else recipe(self.config["sampler"]).nfe_per_step

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the first state."""
        run = self._run()
        if not isinstance(self._kind, conventions.Scaled):
            return 1.0
        if run is None:
            sigma = self._kind.process.sigma_max
            return sigma * self._kind.scale(sigma)
        asked = _asked(run.plan)[1][0].item()
        return run.plan.sigma[0].item() * self._kind.scale(asked)

    @property
    def timesteps(self) -> Tensor:
        """What the network is to be told, one per call of `step`; before `set_timesteps` those of training."""
        run = self._run()
        if run is not None:
            return run.timesteps
        return torch.arange(self.config["num_train_timesteps"] - 1, -1, -1, dtype=torch.float32)

    @property
    def sigmas(self) -> Tensor:
        """The levels of the states as diffusers states them, one more than timesteps, on the host."""
        run = self._run()
        if run is not None:
            return run.sigmas
        bar = self.alphas_cumprod.flip(0)
        return torch.cat([((1 - bar) / bar).sqrt(), torch.zeros(1)])

    @property
    def num_inference_steps(self) -> int | None:
        run = self._run()
        return None if run is None else run.plan.steps

    @property
    def step_index(self) -> int | None:
        """The next row; None before the first step."""
        run = self._run()
        return run.position if run is not None and run.begun else None

    @property
    def begin_index(self) -> int | None:
        run = self._run()
        return None if run is None else run.begin

    @property
    def plan(self) -> Plan | None:
        """The plan of this thread's run."""
        run = self._run()
        return None if run is None else run.plan

    def _run(self) -> Run | None:
        """This thread's run; where it has none, one of its own of the plan that another set last."""
        if self._runs.run is None and self._last is not None:
            self._runs.run = Run(*self._last)
        return self._runs.run

    def _running(self) -> Run:
        run = self._run()
        if run is None:
            raise UsageError("the scheduler has no timesteps", "scheduler.set_timesteps(20)")
        return run

    # ---- what pipelines call

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: conventions.Levels | None = None,
        sigmas: conventions.Levels | None = None,
        mu: float | None = None,
    ) -> None:
        """Make the plan of a run and begin it.

        Args:
            num_inference_steps: steps from node to node.
            timesteps, sigmas: the nodes instead, noise first; of flows the sigmas before their shift, and those evenly
                spaced ones that pipelines pass by themselves give way to `grid`. The 0 at the end may be left out.
            mu: of this run's dynamic shift.

        Raises:
            UsageError: a config or nodes of which no plan can be made.
        """
        given = timesteps if timesteps is not None else sigmas
        if given is None and num_inference_steps is None and self._plan is None:
            raise UsageError("set_timesteps: neither a number of steps nor nodes", "set_timesteps(20)")
        if given is not None and num_inference_steps is not None and len(given) - num_inference_steps not in (0, 1):
            problem = f"num_inference_steps = {num_inference_steps}, but {len(given)} nodes are given"
            raise UsageError(problem, "leave num_inference_steps out")
        config = dict(self.config)
        restart = None
        if self._plan is not None:
            plan = self._plan
            if num_inference_steps not in (None, plan.steps, plan.nfe):
                problem = f"the plan {plan.name!r} has {plan.steps} steps, not {num_inference_steps}"
                raise UsageError(problem, f"num_inference_steps={plan.steps}")
            if given is not None and not conventions.unasked(sigmas):
                raise UsageError("a plan has its own nodes", "leave timesteps and sigmas out")
        else:
            process, times = conventions.nodes(config, self._kind, num_inference_steps, timesteps, sigmas, mu)

            def make(nodes: list[float]) -> Plan:
                name = config["sampler"]
                found: str | Recipe = name if name == "auto" else recipe(name)
                options = dict(config["options"] or {})
                few = config["lower_order_final"]
                low = few is True or (len(times) - 1 < few)
                if low and self._orders(found, process, times) > 1:
                    options["lower_order_final"] = True
                return make_plan(
                    found, process, len(nodes) - 1, grid=nodes, chart=config["chart"], guided=True, **options
                )

            plan, restart = make(times), make
        unusual = config["variance_type"] in conventions.LEARNED or config["clip_sample"] or config["thresholding"]
        self._last = (plan, self._kind, restart, device, bool(unusual))
        self._runs.run = Run(*self._last)

    def _orders(self, found: str | Recipe, process: Process, times: list[float]) -> int:
        """How many predictions a recipe looks back on."""
        if isinstance(found, str):
            found = recipe(auto.choose(process, len(times) - 1, True).sampler)
        return found.method.memory

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where the run will begin, as pipelines say that start from a picture.

        Raises:
            UsageError: where it cannot begin.
        """
        run = self._running()
        run.begin = begin_index
        if begin_index != run.position:
            run.go(begin_index)
        run.begun = False

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample: it is at the network's scale."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        """The state after the next row, as a SchedulerOutput or a tuple.

        Args:
            model_output: of the network for `sample`. timestep: the one that the network was told.
            sample: the state, (batch, ...). generator: of the batch, or one per sample.

        Raises:
            UsageError: no timesteps set; seeds that do not fit the batch.
        """
        run = self._runs.run or self._running()
        compiling = torch.compiler.is_compiling()
        if compiling:
            line = run.table.line(0, run.dense[run.position - run.offset].unbind(), full=True)  # type: ignore[index]
            x = sample.to(run.dense.dtype)  # type: ignore[union-attr]
            while len(run.past) < run.table.ages:
                run.past.append(torch.zeros_like(x))
            while len(run.noises) < run.table.noise_ages:
                run.noises.append(torch.zeros_like(x))
            if run.table.pair and run.previous is None:
                run.previous = torch.zeros_like(x)
        else:
            run.place(timestep)
            x = self._state(run, sample)
            line = run.lines[run.position - run.offset]
        out = model_output if model_output.dtype is x.dtype else model_output.to(x.dtype)
        if run.unusual:
            out = self._denoised_again(line, x, out)
        noise = self._noise(run, x, generator) if line.draws else x  # type: ignore[attr-defined]
        x = run.advance(line, x, out, noise)
        run.position += 1
        made = x if model_output.dtype is x.dtype else x.to(model_output.dtype)
        if not compiling:
            run.given, run.state, run.version = made, x, made._version
            if run.position == run.plan.nfe:
                run.forget()
        return SchedulerOutput(prev_sample=made) if return_dict else (made,)

    def _state(self, run: Run, sample: Tensor) -> Tensor:
        """The sample in float32 or better: where it is what we returned, what it was before it was rounded."""
        if sample is run.given and sample._version == run.version:
            return run.state  # type: ignore[return-value]
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        run.fit(x)
        return x

    def _denoised_again(self, line: Line, x: Tensor, out: Tensor) -> Tensor:
        """The network's output: its mean alone, and as if its denoiser were clipped."""
        if self.config["variance_type"] in conventions.LEARNED and out.shape[1] == 2 * x.shape[1]:
            out = out.chunk(2, 1)[0]
        if not (self.config["clip_sample"] or self.config["thresholding"]):
            return out
        return (self._bounded(line.skip * x + line.out * out) - line.skip * x) / line.out

    def _bounded(self, x0: Tensor) -> Tensor:
        """Dynamic thresholding (Saharia et al. 2022, section 2.3), or clipping."""
        config = self.config
        if not config["thresholding"]:
            return x0.clamp(-config["clip_sample_range"], config["clip_sample_range"])
        largest = torch.quantile(x0.abs().flatten(1).float(), config["dynamic_thresholding_ratio"], dim=1)
        limit = largest.clamp(1, config["sample_max_value"]).to(x0.dtype).view(-1, *[1] * (x0.ndim - 1))
        return torch.clamp(x0, -limit, limit) / limit

    @torch.compiler.disable
    def _noise(self, run: Run, x: Tensor, generator: Generators) -> Tensor:
        """The noise of the row that the run is at."""
        if generator is not None:
            return randn_tensor(x.shape, generator, x.device, x.dtype)
        if run.seeds is None or len(run.seeds) != len(x):
            seed = self.seed
            if seed is None:
                seed = torch.randint(2**63 - 1, (len(x),)).tolist()
            run.seeds = noise.check_seeds(seed if isinstance(seed, list) else range(seed, seed + len(x)))
            if len(run.seeds) != len(x):
                raise UsageError(f"seed: {len(run.seeds)} of them for {len(x)} samples", "seed=0, or one per sample")
        return noise.normal(run.seeds, run.position - run.offset + 1, x.shape[1:], x.dtype, x.device)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Data noised to the level of timesteps, (batch,) or 0-d, whether a run is in progress or not."""
        return self._mixed(original_samples, noise, timesteps, *self._kind.levels(timesteps))

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` as pipelines of flows call it."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target of v_prediction: alpha noise - sigma sample."""
        alpha, sigma = self._kind.levels(timesteps)
        return self._mixed(sample, noise, timesteps, -sigma, alpha)

    def _mixed(self, data: Tensor, noise: Tensor, timesteps: Tensor, a: Tensor, b: Tensor) -> Tensor:
        shape = (-1, *[1] * (data.ndim - 1)) if timesteps.ndim else ()
        a, b = (factor.to(data.device, torch.promote_types(data.dtype, torch.float32)).view(shape) for factor in (a, b))
        return (a * data + b * noise).to(data.dtype)

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Tensor | None = None) -> int:
        """The position of a timestep, or of the one next to it."""
        run = self._running()
        found = run.index(timestep)
        return run.nearest(timestep) if found is None else found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]


def _check_same(plan: Plan, process: Process) -> None:
    """Raise UsageError if a plan was made for other levels than a process has at the plan's times."""
    if type(plan.process) is type(process):
        inside = plan.time.clamp(max=process.t_max)
        levels = torch.stack([process.alpha(inside), process.sigma(inside)])
        if torch.allclose(levels, torch.stack([plan.alpha, plan.sigma]), rtol=1e-4, atol=1e-6):
            return
    problem = f"plan {plan.name!r} was made for {plan.process}, the scheduler's config says {process}"
    raise UsageError(problem, "a plan fitted to this pipeline's model")
