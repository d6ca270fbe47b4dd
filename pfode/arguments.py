"""What is written of denoisers and samples, checked once: for sampling, for likelihoods."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pfode import defaults
from pfode._torch import transformed
from pfode.denoiser import Denoiser
from pfode.errors import UsageError, number, shortened
from pfode.plans.executor import as_state
from pfode.process import Process

__all__ = ["guided", "method_of", "need_denoiser", "sample_states"]


def need_denoiser(denoiser: Any, what: str = "sampling", instead: str = "") -> None:
    """Raise UsageError for what is no denoiser, or where `what` cannot be: inside a transform of torch.func.

    Args:
        instead: the hint for that.
    """
    if transformed() is not None:
        problem = f"{what} takes no gradients and reads values back: it cannot run inside torch.func (grad, jvp, vmap)"
        raise UsageError(problem, instead or "pfode.run(plan, denoiser, x) can, with plan = pfode.make_plan(...)")
    if not isinstance(denoiser, Denoiser) or not isinstance(denoiser.process, Process):
        raise UsageError(
            f"denoiser: need a callable (x, t) -> x0 with a process, got {type(denoiser).__name__}",
            "pfode.load(...), or wrap a network: pfode.scores.Denoiser(network, process, prediction)",
        )


def guided(denoiser: Denoiser, guidance: float | None) -> Denoiser:
    """The denoiser with classifier-free guidance of this scale; itself where that is None.

    Raises:
        UsageError: no such number, or a denoiser that cannot be guided.
    """
    if guidance is None:
        return denoiser
    scale = number("guidance", guidance, -defaults.MAX_GUIDANCE, defaults.MAX_GUIDANCE)
    if scale == 1 and not hasattr(denoiser, "guided"):
        return denoiser
    return method_of(denoiser, "guided", "wrap it yourself: pfode.scores.guide")(scale)


def method_of(denoiser: Denoiser, name: str, hint: str) -> Callable[..., Denoiser]:
    """A method of a denoiser that not every one has.

    Raises:
        UsageError: this one has it not.
    """
    found = getattr(denoiser, name, None)
    if found is None:
        raise UsageError(f"{type(denoiser).__name__} has no .{name}(...)", hint)
    return found


def sample_states(name: str, x: Any) -> Tensor:
    """States or data that the caller gave: shape (n, ...), float32 or better.

    Raises:
        UsageError: no such tensor, or one without numbers.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or not x.numel():
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else shortened(x)
        raise UsageError(f"{name}: need a floating-point tensor of shape (n, ...), got {got}")
    if x.device.type == "meta":
        raise UsageError(f"{name}: a tensor on the meta device holds no numbers", 'torch.device("cpu")')
    return as_state(x, 2)
