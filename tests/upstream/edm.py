"""Parity with the original code of EDM and EDM2, which is non-commercial and not part of this repository.

    python -m tests.upstream.edm CHECKOUT [--golden]

CHECKOUT is one of https://github.com/NVlabs/edm or https://github.com/NVlabs/edm2. Its classes make networks with
random weights, small ones of every kind, and pickle them; here the pickles are loaded, and what the two compute is
compared at five noise levels with and without classes: the largest difference, relative to the largest value. With
--golden: the outputs for the weights of `pickled.by_formula` that tests/scores/networks/test_edm.py knows.
"""

import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import pfode
from tests.scores import pickled

TOLERANCE = 1e-5


def main() -> None:
    checkout = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(checkout))
    second = (checkout / "training" / "networks_edm2.py").exists()
    if second:
        from training import networks_edm2 as theirs  # type: ignore[import-not-found]
    else:
        from training import networks as theirs  # type: ignore[import-not-found]
    if "--golden" in sys.argv:
        return golden(theirs, second)
    torch.manual_seed(0)
    worst = 0.0
    for name, (cls, config) in pickled.NETWORKS.items():
        if (cls == "EDM2UNet") != second:
            continue
        for precond in ["Precond"] if second else [key for key in pickled.ATTRIBUTES if key != "Precond"]:
            net = randomised(build(theirs, precond, cls, config))
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "network.pkl"
                file.write_bytes(pickle.dumps({"ema": net, "dataset_kwargs": {}}))
                found = difference(net, pfode.load(file))
            ok = found <= TOLERANCE
            # c_noise up to 999 in float32 times random frequencies up to 300: the original's own rounding
            known = precond == "VPPrecond" and config.get("embedding_type") == "fourier"
            print(f"{precond:13} {name:7} {found:.2e} {'' if ok else 'float32 phases' if known else 'DIFFERS'}")
            worst = max(worst, 0.0 if known else found)
    print(f"worst {worst:.2e}")
    sys.exit(0 if worst <= TOLERANCE else 1)


def build(theirs: Any, precond: str, cls: str, config: dict[str, Any]) -> Any:
    kwargs = {key: value for key, value in config.items() if key not in ("in_channels", "out_channels")}
    kwargs["img_channels"] = 2
    if precond == "Precond":
        return theirs.Precond(**kwargs, use_fp16=False)
    return getattr(theirs, precond)(**kwargs, model_type=cls)


def randomised(net: Any) -> Any:
    for p in net.parameters():
        p.data = torch.randn_like(p) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.3)
    return net.eval().requires_grad_(False)


def difference(net: Any, den: Any) -> float:
    """Largest difference of D at five levels, relative to its largest value."""
    process, worst = den.process, 0.0
    for t in torch.linspace(process.t_min, process.t_max, 5, dtype=torch.float64).tolist():
        t = round(t) if isinstance(process, pfode.VPDiscrete) else t  # iDDPM rounds to its levels
        alpha, sigma = process.alpha(float(t)), process.sigma(float(t)) / process.alpha(float(t))
        x = torch.randn(4, 2, 8, 8) * max(1.0, sigma)
        label = torch.tensor([0, 1, 2, 3])
        hot = torch.nn.functional.one_hot(label, 4)[:, :3].float()
        for classes, cond in ((hot, {"label": label}), (None, {})):
            wanted = net(x, torch.full((4,), sigma), classes)
            got = den(x * alpha, torch.tensor(t), **cond)
            worst = max(worst, float((got - wanted).abs().max() / wanted.abs().max()))
    return worst


def golden(theirs: Any, second: bool) -> None:
    for name, (cls, config) in pickled.NETWORKS.items():
        if (cls == "EDM2UNet") == second:
            net = build(theirs, "Precond" if second else "EDMPrecond", cls, config)
            out = pickled.by_formula(net.unet if second else net.model)(*inputs(), torch.eye(3)[:2])
            print(f'    "{name}": {[float(f"{value:.6g}") for value in out[:, :, 3, 5].flatten().tolist()]},')


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """x (2, 2, 8, 8) and c_noise (2,)."""
    x = torch.cos(1.3 * torch.arange(256, dtype=torch.float64)).reshape(2, 2, 8, 8).float()
    return x, torch.tensor([0.3, -1.1])


if __name__ == "__main__":
    main()
