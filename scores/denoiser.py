"""A network and its preconditioning, seen as a denoiser: D(x, t) = c_skip x + c_out F(c_in x, c_noise)."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from pfode._torch import in_place_changes, transformed
from pfode.denoiser import Denoiser as DenoiserProtocol
from pfode.denoiser import Preconditioned, Preconditioning
from pfode.denoiser import digest as digest_of
from pfode.errors import UsageError, did_you_mean, integer, number
from pfode.introspection import Stamp, compute_dtype, stamp
from pfode.labels import class_index, label_tensor
from pfode.plans.table import Plan
from pfode.prediction import PREDICTIONS, Coefficient, Pair
from pfode.process import VP, Process, VPCosine, VPDiscrete, need_process
from pfode.scores.conditioning import Offset, Tunable, check_offsets, find_layers, plain
from pfode.scores.guidance import guide
from pfode.scores.io.published import Published
from pfode.scores.styles import mixed
from pfode.tensors import readable

__all__ = ["KNOWN", "Denoiser"]

VARIANCE_PRESERVING = (VP, VPCosine, VPDiscrete)
KNOWN = ("edm", "ve", *PREDICTIONS)


class Denoiser(Preconditioned, Published):
    """Any torch callable `(x, c_noise, **cond)` as a denoiser.

    Prediction "edm" is the preconditioning of Karras et al. 2022 (table 1) for any process: with s = sigma_data and
    r = sqrt(sigma^2 + alpha^2 s^2): c_in = 1/r, c_skip = alpha s^2/r^2, c_out = sigma s/r and
    c_noise = log(sigma/alpha)/4.
    "ve" is that of the NCSN++ networks of Song et al. 2021 (the VE column of the same table), whose output is minus the
    noise: c_in = 1/alpha, c_skip = 1/alpha, c_out = sigma/alpha and c_noise = log(sigma/alpha / 2).
    The others are rows of `pfode.prediction`, with c_noise = time_scale t and, where the process does not keep the
    variance at one, an input scaled by 1/hypot(alpha, sigma); "flow" networks see x itself.

    Args:
        network: a torch module or any function, called with x and c_noise of shape (batch,), and label= where there is
            one. Its dtype is found where that is possible (`compute_dtype`): x is then cast to it, and c_noise to
            float32, or to float64 for a network in that.
        process: the noise process it was trained for.
        prediction: "edm", "ve", "x0", "eps", "score", "v" or "flow".
        sigma_data: standard deviation of the data ("edm" only), which the denoiser then declares as its `data_std`.
        shape: of one sample, without the batch.
        labels: names of the classes; the network then takes label= of shape (batch,), where len(labels) means none.
        time_scale: factor from t to what the network is given (1000 for networks trained on a thousand steps).
        digest: of the weights as they are now, where it is known; the `fingerprint` until they change.
        plans: fitted to these weights, by their number of calls.
        unseen: classes that never came up in training, by number; len(labels) among them where no label was ever
            hidden: to draw or to guide with these warns.
        bins: how many values an element of the data has, evenly from -1 to 1 (256 for most pictures), so that
            likelihoods are probabilities; None for data that have densities.
        moments: mean of the data, of their shape, and variances, of the same, or covariance (d, d); for likelihoods.

    Raises:
        UsageError: what is no network or no process (a class or a name instead of an instance), an unknown prediction,
            values out of range, or weights of 8 bits, in which nothing is computed.
    """

    evals = 1

    def __init__(
        self,
        network: Callable[..., Tensor],
        process: Process,
        prediction: str = "eps",
        *,
        sigma_data: float = 0.5,
        shape: Sequence[int] | None = None,
        labels: Sequence[str] | None = None,
        time_scale: float = 1.0,
        digest: str | None = None,
        plans: Mapping[int, Plan] | None = None,
        unseen: Iterable[int] = (),
        bins: int | None = None,
        moments: tuple[Tensor, Tensor] | None = None,
    ):
        if isinstance(network, type) or not callable(network):
            kind = network.__name__ if isinstance(network, type) else ""
            got = f"the class {kind}" if kind else f"{network!r:.60}"
            hint = f"an instance: {kind}(...)" if kind else "a torch module, or any function of (x, t)"
            raise UsageError(f"network: expected what can be called with (x, t), got {got}", hint)
        if not isinstance(prediction, str) or prediction not in KNOWN:
            raise UsageError(f"unknown prediction {prediction!r:.60}", did_you_mean(prediction, KNOWN))
        if isinstance(labels, str) or any(not isinstance(name, str) for name in labels or ()):
            raise UsageError(f"labels: expected the names of the classes, got {labels!r:.60}", "labels=['cat', 'dog']")
        self.process = need_process(process)
        self.prediction = prediction
        self.sigma_data, self.time_scale = positive("sigma_data", sigma_data), positive("time_scale", time_scale)
        self.shape = None if shape is None else tuple(integer("shape", side, 1) for side in sides(shape))
        self.labels = None if labels is None else tuple(labels)
        self.style: Tensor | None = None
        self.unseen = frozenset(unseen)
        if any(type(one) is not int or not 0 <= one <= len(self.labels or ()) for one in self.unseen):
            got = sorted(map(str, self.unseen))
            raise UsageError(f"unseen: need numbers of classes, or {len(self.labels or ())} for none, got {got}")
        self.data_std = self.sigma_data if prediction == "edm" else None
        self.bins = None if bins is None else integer("bins", bins, 2, 2**16)
        self.moments = moments
        self._kept: tuple[Tensor, tuple[object, ...], Preconditioning] | None = None
        self._take(network, digest, plans)

    def _take(self, network: Callable[..., Tensor], digest: str | None, plans: Mapping[int, Plan] | None) -> None:
        self.net: Any = network
        self.digest = digest
        self.plans: Mapping[int, Plan] = {} if plans is None else plans
        self._hashed: tuple[Stamp | None, str] | None = None
        self._layers: dict[str, int] | None = None
        self._tunable: tuple[object, Any] | None = None  # for which weights it was made, and the network with offsets
        weights = network.parameters() if isinstance(network, nn.Module) else ()
        weight = next((p for p in weights if p.is_floating_point()), None)
        self.device = None if weight is None else weight.device
        self.dtype = compute_dtype(network)
        self._time_dtype = torch.promote_types(self.dtype or torch.float32, torch.float32)
        if digest is not None and isinstance(network, nn.Module):
            self._hashed = stamp(network), digest

    def precondition(self, t: Tensor) -> Preconditioning:
        """c_in, c_noise, c_skip and c_out at times t, each of the shape and dtype of t.

        Those of the last times are kept: a plan asks for the same ones at every run.

        Raises:
            UsageError: alpha = 0 at one of them (pure noise), where the network's output says nothing about the data.
        """
        if torch.compiler.is_compiling() or t.ndim == 0 or t.requires_grad or transformed() is not None:
            return self._precondition(t)
        changes = in_place_changes(t)
        if changes is None:
            return self._precondition(t)
        asked = (changes, self.process, self.prediction, self.sigma_data, self.time_scale)
        kept = self._kept
        if kept is None or kept[0] is not t or kept[1] != asked:
            kept = self._kept = t, asked, self._precondition(t)
        return kept[2]

    def _precondition(self, t: Tensor) -> Preconditioning:
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        undefined = self.prediction in ("edm", "ve") or PREDICTIONS[self.prediction].singular
        if undefined and readable(t) and bool((alpha == 0).any()):
            raise UsageError(
                f"prediction {self.prediction!r} says nothing about the data where alpha = 0 (t = {float(t.max()):g})",
                "use a network with prediction 'flow', 'v' or 'x0', or a grid that starts at alpha > 0",
            )
        c_skip, c_out = self._to_x0(alpha, sigma)
        if self.prediction == "edm":
            c_in = torch.rsqrt(sigma**2 + (alpha * self.sigma_data) ** 2)
            return Preconditioning(c_in, torch.log(sigma / alpha) / 4, c_skip, c_out)
        if self.prediction == "ve":
            return Preconditioning(1 / alpha, torch.log(0.5 * sigma / alpha), c_skip, c_out)
        plain = self.prediction == "flow" or isinstance(self.process, VARIANCE_PRESERVING)
        c_in = torch.ones_like(t) if plain else 1 / torch.hypot(alpha, sigma)
        return Preconditioning(c_in, self.time_scale * t, c_skip, c_out)

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What F should return for x = alpha x0 + sigma noise: (x0 - c_skip x) / c_out, without cancellation."""
        c_skip, c_out = self._to_x0(alpha, sigma)
        return (1 - c_skip * alpha) / c_out * x0 - c_skip * sigma / c_out * noise

    def _to_x0(self, alpha: Coefficient, sigma: Coefficient) -> Pair:
        if self.prediction == "ve":
            return 1 / alpha, sigma / alpha
        if self.prediction != "edm":
            return PREDICTIONS[self.prediction].to_x0(alpha, sigma)
        s = self.sigma_data
        square = sigma**2 + alpha**2 * s**2
        return alpha * s**2 / square, sigma * s / square**0.5

    def network(self, x: Tensor, c_noise: Tensor, *, label: Tensor | int | None = None, **cond: Any) -> Tensor:
        """F(x, c_noise) in the dtype of the network, where that is known.

        Args:
            x: (batch, ...), already scaled by c_in.
            c_noise: 0-d or (batch,); the network gets it in float32, or in float64 where it computes in that.
            label: (batch,) of integers, one integer for all, or None.

        Raises:
            UsageError: a label out of range or of the wrong shape.
        """
        if x.device.type != "meta":
            self._need_numbers()
        if c_noise.ndim == 0:
            c_noise = c_noise.expand(x.shape[0])
        if self.dtype is not None:
            x, c_noise = x.to(self.dtype), c_noise.to(self._time_dtype)
        if label is not None:
            cond["label"] = label_tensor(label, self.labels, x)
        return self.net(x, c_noise, **cond)

    def conditions(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        """What calls for samples of these seeds are given besides the class: {"style": (len(seeds), numbers)}, or {}.

        A network that keeps styles gets a new one per seed, see `pfode.scores.styles.mixed`; after `styled`, that one.
        """
        if self.style is not None:
            return {"style": self.style.expand(len(seeds), -1)}
        bank = getattr(self.net, "style_bank", None)
        return {} if bank is None else {"style": mixed(bank, seeds)}

    def styled(self, style: Tensor) -> Self:
        """The same denoiser with one style for all samples, instead of one by each seed.

        Args:
            style: (numbers,), such as `mixed(...)[0]`, or a mean of two of them.

        Raises:
            UsageError: a network without styles, or a style of another shape.
        """
        numbers = getattr(self.net, "styles", 0)
        if not numbers or not isinstance(style, Tensor) or style.shape != (numbers,):
            wanted = f"({numbers},)" if numbers else "no style: this network takes none"
            raise UsageError(f"style: expected {wanted}, got {tuple(getattr(style, 'shape', ()))}")
        made = copy.copy(self)
        made.style = style
        return made

    @property
    def classes(self) -> int | None:
        """How many classes there are, 0 for none; None for a network that does not say."""
        return getattr(self.net, "classes", None) if self.labels is None else len(self.labels)

    def label_index(self, name: str | int) -> int:
        """The number of a class, given by its name or its number.

        Raises:
            UsageError: an unknown class, or a network without classes.
        """
        return class_index(self.labels, name)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """A copy on another device or in another dtype; this one stays as it is. A plain function moves nowhere."""
        self._need_numbers()
        same_device = device is None or torch.device(device) == self.device
        if not isinstance(self.net, nn.Module) or (same_device and dtype in (None, self.dtype)):
            return self
        return self.with_network(copy.deepcopy(self.net).to(device=device, dtype=dtype), self.fingerprint, self.plans)

    def _need_numbers(self) -> None:
        if self.device is not None and self.device.type == "meta":
            raise UsageError("the network is on the meta device: its weights hold no numbers", "load them first")

    @property
    def fingerprint(self) -> str | None:
        """The digest of the weights as they are now; None for a function without parameters.

        They are hashed once, and again only after they changed.
        """
        if not isinstance(self.net, nn.Module):
            return self.digest
        now = stamp(self.net)
        if now is None or self._hashed is None or self._hashed[0] != now:
            self._hashed = now, digest_of(f"{self.process} {self.prediction}", self.net.state_dict())
        return self._hashed[1]

    def with_network(
        self, network: Callable[..., Tensor], digest: str | None = None, plans: Mapping[int, Plan] | None = None
    ) -> Self:
        """The same in all else around another network, of which digest and plans may be known."""
        made = copy.copy(self)
        made._take(network, digest, plans)
        return made

    def compiled(self) -> Self:
        """The same denoiser with its network through torch.compile."""
        return self.with_network(torch.compile(self.net), self.fingerprint, self.plans)

    @property
    def conditioning(self) -> dict[str, int]:
        """The layers that tell the network how noisy x is, and their widths; see `find_layers`.

        Raises:
            UsageError: a function instead of a torch module, or a network whose `shape` is not known.
        """
        if self._layers is None:
            if not isinstance(self.net, nn.Module) or self.shape is None:
                lacks = "a torch module as its network" if self.shape else "the shape of a sample: shape=(3, 32, 32)"
                raise UsageError(f"conditioning: {type(self).__name__} needs {lacks}", "Denoiser(network, ..., shape=)")
            network = plain(self.net)
            self._layers = find_layers(network, self.with_network(network).network, self.shape)
        return self._layers

    def tuned(self, offsets: Mapping[str, Tensor]) -> Self:
        """The denoiser whose network adds these offsets to the outputs of its conditioning layers.

        Args:
            offsets: by the name of a layer, shape (width,) or (batch, width).

        Raises:
            UsageError: layers that are none of `conditioning`, or offsets of another width.
        """
        layers = self.conditioning
        check_offsets(offsets, layers)
        if self._tunable is None or self._tunable[0] is not self._hashed:
            network = Tunable(plain(self.net), layers)
            self._tunable = self._hashed, network if plain(self.net) is self.net else torch.compile(network)
        made = copy.copy(self)
        made.net = Offset(self._tunable[1], self.net, offsets)
        return made

    def guided(self, scale: float) -> DenoiserProtocol:
        """Classifier-free guidance: see `guide`."""
        return guide(self, scale)

    def __repr__(self) -> str:
        return f"Denoiser({type(self.net).__name__}, {self.process}, {self.prediction!r}, shape={self.shape})"


def positive(name: str, value: object) -> float:
    """A number from 1e-30 to 1e30, whose square is a number as well.

    Raises:
        UsageError: it is none.
    """
    try:
        return number(name, value, 1e-30, 1e30)
    except UsageError as error:
        raise UsageError(f"{name}: need a positive number up to 1e30, got {value!r:.60}", f"{name}=0.5") from error


def sides(shape: object) -> tuple[Any, ...]:
    """The sides of a shape.

    Raises:
        UsageError: it is no list, tuple or torch.Size.
    """
    if not isinstance(shape, list | tuple):
        raise UsageError(f"shape: expected the sides of one sample, got {shape!r:.60}", "shape=(3, 32, 32)")
    return tuple(shape)
