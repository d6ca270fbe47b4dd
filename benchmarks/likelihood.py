"""Errors of likelihoods on exact mixtures, beside k-diffusion's; honest errors; classes of held-out digits.

    python benchmarks/likelihood.py                     errors and probes: 3 minutes on one core
    python benchmarks/likelihood.py --classes MODEL     accuracy by p(class | x): 2 minutes

MODEL is trained without the held-out digits, in 4 minutes:

    pfode train --data digits-train --steps 4000 --lr 0.003 --dropout 0.1 --amp --out runs/held-out
"""

import importlib
import math
import time
from typing import Any

import harness
import pytest
import torch
from torch import Tensor

import pfode
from pfode.process import Process
from pfode.scores import Gaussian, GaussianMixture
from pfode.scores.training.data import load_data

f64 = torch.float64


def beds(process: Process) -> dict[str, GaussianMixture]:
    """Eight Gaussians, a correlated Gaussian in 8 dimensions, ten full covariances in 64."""
    k = torch.arange(8, dtype=f64) * (math.pi / 4)
    draw = torch.Generator().manual_seed(0)
    a, mean = torch.randn(8, 8, generator=draw, dtype=f64), torch.randn(10, 64, generator=draw, dtype=f64)
    b = torch.randn(10, 64, 64, generator=draw, dtype=f64) / 8
    full = 0.1 * (b @ b.mT) + 0.01 * torch.eye(64, dtype=f64)
    return {
        "2-D": GaussianMixture(2 * torch.stack([k.cos(), k.sin()], 1), 0.2, process=process),
        "8-D": Gaussian(mean[0, :8], a @ a.T / 8 + 0.05 * torch.eye(8, dtype=f64), process=process),
        "64-D": GaussianMixture(mean, cov=full, process=process),
    }


def exact(net: GaussianMixture, x: Tensor) -> Tensor:
    """log p of data with the noise of t_min."""
    alpha = net.process.alpha(net.process.t_min)
    return net.log_prob(alpha * x, net.process.t_min) + x[0].numel() * math.log(alpha)


def errors() -> list[dict[str, Any]]:
    """The root mean square error of every bed, process and tolerance."""
    rows = []
    for process in (pfode.Flow(), pfode.EDM(), pfode.VP()):
        for name, net in beds(process).items():
            x = net.sample(16 if name == "64-D" else 64, seed=5)
            for rtol in (1e-5, 1e-8):
                found = pfode.log_likelihood(net, x, rtol=rtol)
                rms = (found.nats - exact(net, x)).square().mean().sqrt().item()
                traces = found.products.double().mean().item() / x.shape[1]
                calls = found.nfe.double().mean().item() - traces
                rows.append({"process": type(process).__name__, "bed": name, "rtol": rtol, "rms": rms})
                rows[-1] |= {"traces": traces, "calls": calls}
                print(
                    "{process:5} {bed:5} rtol {rtol:g}: rms {rms:.1e}, {traces:.0f} traces, {calls:.0f} calls".format(
                        **rows[-1]
                    )
                )
    return rows


def peers() -> list[dict[str, Any]]:
    """k-diffusion's log_likelihood on the same points, where it is installed."""
    try:
        odeint = importlib.import_module("torchdiffeq").odeint
        from tests.peers import k_diffusion_sampling

        module: Any = k_diffusion_sampling()
    except (ImportError, pytest.skip.Exception):
        print("k-diffusion: not installed")
        return []
    module.odeint = odeint
    rows, process = [], pfode.EDM()
    for name, net in beds(process).items():
        x = net.sample(16 if name == "64-D" else 64, seed=5)

        def model(x: Tensor, sigma: Tensor, net: GaussianMixture = net, **_: Any) -> Tensor:
            return net(x.flatten(1), sigma).view_as(x)

        for tolerance in (1e-4, 1e-7):
            torch.manual_seed(0)
            nats, info = module.log_likelihood(model, x[:, :, None, None], 0.002, 80.0, atol=tolerance, rtol=tolerance)
            rms = (nats - exact(net, x)).square().mean().sqrt().item()
            rows.append({"peer": "k-diffusion", "bed": name, "rtol": tolerance, "rms": rms, "calls": info["fevals"]})
            print("k-diffusion {bed:5} tol {rtol:g}: rms {rms:.2f} nats, {calls} calls".format(**rows[-1]))
    return rows


def probes() -> dict[str, float]:
    """Of 1,000 runs with other seeds in 64 dimensions: the spread of a probe new at every node, and |z| <= 2."""
    net = beds(pfode.Flow())["64-D"]
    x = net.sample(1)
    true = pfode.log_likelihood(net, x, rtol=1e-4).nats
    found = pfode.log_likelihood(
        net, x.expand(1000, 64), divergence="hutchinson", probes=4, rtol=1e-4, seeds=range(1000)
    )
    z = (found.nats - true) / found.stderr
    rows = {"std of 4 probes": found.nats.std().item(), "|z| <= 2": (z.abs() <= 2).double().mean().item()}
    rows["mean error"] = (found.nats.mean() - true).item()
    print(rows)
    return rows


def classes(model: str) -> dict[str, float]:
    """The share of held-out digits whose class is the likeliest."""
    net, data = pfode.load(model), load_data("digits-test")
    x, began = data.images.float() / 127.5 - 1, time.process_time()
    how: dict[str, Any] = {"rtol": 0.1, "divergence": "hutchinson", "probes": 2, "end": "uniform", "bins": 17}
    nats = torch.stack([pfode.log_likelihood(net, x, label=label, **how).nats for label in range(10)], 1)
    assert data.labels is not None
    right = (nats.argmax(1) == data.labels).double().mean().item()
    mixture = torch.logsumexp(nats, 1) - math.log(10)
    rows = {"accuracy": right, "bits_per_dim": (-mixture.mean() / 64 / math.log(2)).item()}
    rows["cpu_seconds"] = time.process_time() - began
    print(rows)
    return rows


def main() -> None:
    arguments = harness.parser(__doc__)
    arguments.add_argument("--classes", metavar="MODEL", help="measure the accuracy of this model's classes instead")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    if options.classes:
        harness.record(options, {"classes": classes(options.classes)})
    else:
        harness.record(options, {"errors": errors(), "peers": peers(), "probes": probes()})


if __name__ == "__main__":
    main()
