"""`PFODEScheduler`: any plan inside a diffusers pipeline, which hands its rows out one per call of `step`."""

import copy
import functools
import threading
from typing import Any

import torch
from torch import Tensor, nn

from pfode import noise
from pfode._torch import in_place_changes
from pfode.bounds import clipped, thresholded
from pfode.errors import UsageError, number, unknown
from pfode.optional import optional_module
from pfode.plans.rows import Row
from pfode.plans.table import Plan
from pfode.process import Process
from pfode.samplers import auto
from pfode.samplers.adapters import conventions, nodes
from pfode.samplers.adapters.attached import Attachment
from pfode.samplers.adapters.classes import LEARNED, translated
from pfode.samplers.adapters.rows import asked_levels
from pfode.samplers.adapters.run import Adjust, Run
from pfode.samplers.catalogue import Recipe, make_plan, recipe

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
    from diffusers.utils.torch_utils import randn_tensor
except ModuleNotFoundError:
    optional_module("diffusers", "PFODEScheduler")  # says what installs it
    raise

__all__ = ["PFODEScheduler"]

Generators = torch.Generator | list[torch.Generator] | None


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
        if options is not None and not isinstance(options, dict):
            raise UsageError(f"options: need a dict, got {options!r:.60}", 'options={"eta": 0.5}')
        if seed is not None:
            noise.check_seeds(seed if isinstance(seed, list | tuple) else [seed])
        self.seed = seed
        self.betas = conventions.betas(self.config)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, 0)
        self._kind = conventions.convention(self.config)
        self._plan = Plan.load(sampler) if sampler.endswith(".safetensors") else None
        if self._plan is not None:
            _check_same(self._plan, self._kind.process)
        nodes.check(self.config, self._kind)
        if self._plan is None:
            self._make(self._kind.process, nodes.trial(self._kind.process), None)
        self._runs, self._last = _Runs(), None
        self._attached: Attachment | None = None

    def attach(self, network: nn.Module) -> Attachment:
        """Let a tuned plan reach into the network that the pipeline calls: `scheduler.attach(pipe.unet)`.

        Returns:
            what takes it back: `.detach()`, or the end of a `with`.

        Raises:
            UsageError: no tuned plan, or another network than the one it was tuned to.
        """
        if self._plan is None or not self._plan.tune:
            raise UsageError("attach: only tuned plans reach into the network", 'sampler="MODEL.tuned-6.safetensors"')
        if self._attached is not None:
            self._attached.detach()
        self._attached = Attachment(self._plan, network, self._next_row)
        return self._attached

    def _next_row(self) -> int:
        """The row that the network is asked for next: the first one where a run is at its end."""
        run = self._running()
        return run.position if run.position < run.plan.nfe else 0

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
            config = translated(config, own, cls.__name__)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    # ---- what pipelines read

    @property
    def order(self) -> int:
        """Calls per step."""
        run = self._run()
        plan = self._plan if run is None else run.plan
        if plan is not None:
            return -(-plan.nfe // plan.steps)
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
        level = asked_levels(run.plan)[1][0].item()
        return run.plan.sigma[0].item() * self._kind.scale(level)

    @property
    def timesteps(self) -> Tensor:
        """The times that the network is to get, one per call of `step`; before `set_timesteps` those of training."""
        run = self._run()
        if run is not None:
            return run.timesteps
        return torch.arange(self.config["num_train_timesteps"] - 1, -1, -1, dtype=torch.float32, device="cpu")

    @property
    def sigmas(self) -> Tensor:
        """The levels of the states as diffusers states them, one more than timesteps, on the host."""
        run = self._run()
        if run is not None:
            return run.sigmas
        bar = self.alphas_cumprod.flip(0)
        return torch.cat([((1 - bar) / bar).sqrt(), torch.zeros(1, device="cpu")])

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
        return None if run is None else run.begin_index

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
            if plan.tune and (self._attached is None or not self._attached.handles):
                problem = f"plan {plan.name!r} is tuned: it reaches into the network, which a pipeline calls itself"
                raise UsageError(problem, "scheduler.attach(pipe.unet), or pipe.transformer")
            if num_inference_steps not in (None, plan.steps, plan.nfe):
                problem = f"the plan {plan.name!r} has {plan.steps} steps, not {num_inference_steps}"
                raise UsageError(problem, f"num_inference_steps={plan.steps}")
            if given is not None and not nodes.unasked(sigmas):
                raise UsageError("a plan has its own nodes", "leave timesteps and sigmas out")
        else:
            process, times = nodes.nodes(config, self._kind, num_inference_steps, timesteps, sigmas, mu)
            few = config["lower_order_final"]
            low = few is True or len(times) - 1 < few
            restart = functools.partial(self._make, process, low=low)
            plan = restart(times, None)
        self._last = (plan, self._kind, restart, device, _adjustment(config))
        self._runs.run = Run(*self._last)

    def _make(self, process: Process, times: list[float], eta: float | None, low: bool = False) -> Plan:
        """The plan of the config's recipe over nodes.

        Args:
            eta: of the noise, instead of the config's. low: whether the orders fall at the end, where there are any.
        """
        name, options = self.config["sampler"], dict(self.config["options"] or {})
        steps = len(times) - 1
        found: str | Recipe = name if name == "auto" else recipe(name)
        if low and recipe(auto.choose(process, steps, True).sampler if name == "auto" else name).method.memory > 1:
            options["lower_order_final"] = True
        if eta is not None:
            options["eta"] = eta
        return make_plan(found, process, steps, grid=times, chart=self.config["chart"], guided=True, **options)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where the run will begin, as pipelines say that start from a picture.

        Raises:
            UsageError: where it cannot begin.
        """
        run = self._running()
        run.begin_index = begin_index
        if begin_index != run.position:
            run.begin_at(begin_index)
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
        *,
        eta: float = 0.0,
    ) -> Any:
        """The state after the next row, as a SchedulerOutput or a tuple.

        The timestep says which row. One of `timesteps` itself is known by its place in memory; a copy of any kind is
        looked up by its value, which reads it from the device. One out of turn begins anew there, with nothing to look
        back on: twice the same, one further on, one further back, or, as the first of a run, one between two others.

        Args:
            model_output: of the network for `sample`; not kept, so that it may be written over afterwards.
            timestep: the one that the network was given, the same for every sample.
            sample: the state, (batch, ...). generator: of the batch, or one per sample.
            eta: of the noise, for recipes that have one. 0, which pipelines pass by default, means the config's.

        Raises:
            UsageError: no timesteps set; in the midst of a run a timestep that is none of them; samples at different
                timesteps; an eta that the recipe does not take; seeds that do not fit the batch.
        """
        run = self._runs.run or self._running()
        if eta and eta != run.eta:
            run.with_eta(number("eta", eta, 0.0))
        compiling = torch.compiler.is_compiling()
        if compiling:
            row = run.table.row(0, run.dense[run.position - run.offset].unbind(), full=True)  # type: ignore[index]
            x = sample.to(run.dense.dtype)  # type: ignore[union-attr]
            run.sums = [torch.zeros_like(x) if begun is None else begun for begun in run.sums]
        else:
            run.place(timestep)
            if run.plan.tune and (self._attached is None or self._attached.asked != run.position):
                problem = f"timestep: this is row {run.position} of a tuned plan, the network was asked as for another"
                raise UsageError(problem, "the timesteps in turn, and scheduler.attach(pipe.unet) before")
            x = self._state(run, sample)
            row = run.rows[run.position - run.offset]
        out = model_output if model_output.dtype is x.dtype else model_output.to(x.dtype)
        if run.adjust:
            out = run.adjust(row, x, out)
        noise = self._noise(run, x, generator) if row.draws else x  # type: ignore[attr-defined]
        x = run.advance(row, x, out, noise)
        run.position += 1
        made = x if model_output.dtype is x.dtype else x.to(model_output.dtype)
        if not compiling:
            run.given, run.state, run.version = made, x, in_place_changes(made)
            if run.position == run.plan.nfe:
                run.forget()
        return SchedulerOutput(prev_sample=made) if return_dict else (made,)

    def _state(self, run: Run, sample: Tensor) -> Tensor:
        """The sample in float32 or better: where it is what we returned, what it was before it was rounded."""
        if sample is run.given and run.version is not None and in_place_changes(sample) == run.version:
            return run.state  # type: ignore[return-value]
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        run.fit(x)
        return x

    @torch.compiler.disable
    def _noise(self, run: Run, x: Tensor, generator: Generators) -> Tensor:
        """The noise of the row that the run is at."""
        if generator is not None:
            return randn_tensor(x.shape, generator, x.device, x.dtype)
        if run.seeds is None or len(run.seeds) != len(x):
            seed = self.seed
            if seed is None:
                seed = torch.randint(2**63 - 1, (len(x),), device="cpu").tolist()
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
        found = run.schedule.alias(timestep)
        return run.nearest(timestep) if found is None else found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None, "_attached": None}

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]


def _adjustment(config: dict[str, Any]) -> Adjust | None:
    """What is done to the network's output before it is used: its variance channels are left out, its denoiser D is
    bounded, by dynamic thresholding to [-1, 1] or by clipping. None where the config asks for neither.
    """
    learned, bound = config["variance_type"] in LEARNED, None
    if config["thresholding"]:
        most = config["sample_max_value"]
        bound = functools.partial(thresholded, quantile=config["dynamic_thresholding_ratio"], most=most)
    elif config["clip_sample"]:
        bound = functools.partial(clipped, low=-config["clip_sample_range"], high=config["clip_sample_range"])
    if not learned and bound is None:
        return None

    def adjust(row: Row, x: Tensor, out: Tensor) -> Tensor:
        out = out.chunk(2, 1)[0] if learned and out.shape[1] == 2 * x.shape[1] else out
        if bound is None:
            return out
        return (bound(row.c_skip * x + row.c_out * out) - row.c_skip * x) / row.c_out

    return adjust


def _check_same(plan: Plan, process: Process) -> None:
    """Raise UsageError if a plan was made for other levels than a process has at the plan's times."""
    if type(plan.process) is type(process):
        inside = plan.time.clamp(max=process.t_max)
        levels = torch.stack([process.alpha(inside), process.sigma(inside)])
        if torch.allclose(levels, torch.stack([plan.alpha, plan.sigma]), rtol=1e-4, atol=1e-6):
            return
    problem = f"plan {plan.name!r} was made for {plan.process}, the scheduler's config says {process}"
    raise UsageError(problem, "a plan fitted to this pipeline's model")
