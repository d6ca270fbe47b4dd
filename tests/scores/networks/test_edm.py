"""EDM networks: what the original code computes, from pickles in which nothing is executed."""

import copy
from typing import Any

import pytest
import torch

import pfode
from pfode.errors import FileError, UsageError
from pfode.scores.networks import edm
from tests.scores import pickled
from tests.scores.pickled import NETWORKS, network, snapshot
from tests.upstream.edm import inputs

X = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))
LABEL = torch.tensor([0, 2, 3])  # 3: no class
GOLDEN = {  # python -m tests.upstream.edm CHECKOUT --golden
    "ddpm++": [-0.207231, 0.061296, -0.204949, 0.064339],
    "ncsn++": [-0.209062, 0.060106, -0.207792, 0.061582],
    "skip": [-0.124545, -0.082244, -0.111761, -0.071539],
    "adm": [-0.240768, -0.381646, -0.244688, -0.372833],
    "edm2": [-21.0277, -41.1547, -0.628037, -29.7612],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_compute_what_the_originals_compute(name):
    out = network(name)(*inputs(), torch.tensor([0, 1]))
    wanted = torch.tensor(GOLDEN[name])
    torch.testing.assert_close(out[:, :, 3, 5].flatten(), wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", NETWORKS)
def test_inputs_of_the_networks(name):
    net = network(name)
    c = torch.tensor([0.3, -1.0, 0.7])
    torch.testing.assert_close(net(X, c, LABEL)[2], net(X, c)[2])
    assert (net(X, c, LABEL)[:2] - net(X, c)[:2]).abs().max() > 1e-5
    unconditional = network(name, label_dim=0)
    with pytest.raises(UsageError, match="takes no label"):
        unconditional(X, c, LABEL)
    assert unconditional(X, c).isfinite().all()
    if name != "edm2":
        augment = torch.randn(3, 5)
        torch.testing.assert_close(net(X, c, LABEL, 0 * augment), net(X, c, LABEL))
        assert (net(X, c, LABEL, augment) - net(X, c, LABEL)).abs().max() > 1e-5
        with pytest.raises(UsageError, match="takes no augment"):
            network(name, augment_dim=0)(X, c, LABEL, augment)


@pytest.mark.parametrize("precond", [key for key in pickled.ATTRIBUTES if key != "Precond"])
@pytest.mark.parametrize("name", ["ddpm++", "adm"])
def test_preconditioning_is_a_column_of_table_1(tmp_path, precond, name):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) of Karras et al. 2022, for data that are not scaled."""
    net = network(name, out_channels=4) if precond == "iDDPMPrecond" else network(name)
    den = pfode.load(snapshot(tmp_path / "net.pkl", net, precond))
    process = den.process
    assert (den.shape, den.labels) == ((2, 8, 8), ("0", "1", "2"))
    for share in (0.1, 0.5, 0.9):
        t = process.t_min + share * (process.t_max - process.t_min)
        t = float(round(t)) if precond == "iDDPMPrecond" else t
        alpha, sigma = process.alpha(t), process.sigma(t) / process.alpha(t)
        x = X * sigma
        normal = (sigma**2 + 1) ** 0.5
        c_skip, c_out, c_in, c_noise = {
            "VPPrecond": (1, -sigma, 1 / normal, 999 * t),
            "VEPrecond": (1, sigma, 1, torch.log(torch.tensor(0.5 * sigma))),
            "iDDPMPrecond": (1, -sigma, 1 / normal, t),
            "EDMPrecond": (
                0.25 / (sigma**2 + 0.25), 0.5 * sigma / (sigma**2 + 0.25) ** 0.5, (sigma**2 + 0.25) ** -0.5,
                torch.log(torch.tensor(sigma)) / 4,
            ),
        }[precond]  # fmt: skip
        wanted = c_skip * x + c_out * net(c_in * x, torch.as_tensor(c_noise).float().expand(3), LABEL)
        got = den(alpha * x, torch.tensor(t, dtype=torch.float64), label=LABEL)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_processes_are_those_of_the_preconditioning(tmp_path):
    net = network("ddpm++")
    vp: Any = pfode.load(snapshot(tmp_path / "a.pkl", net, "VPPrecond", beta_d=9.9)).process
    assert (vp, vp.t_min) == (pfode.VP(0.1, 10.0), 1e-5)
    ve: Any = pfode.load(snapshot(tmp_path / "b.pkl", net, "VEPrecond", sigma_max=50)).process
    assert (ve.sigma_min, ve.sigma_max) == (0.02, 50.0)
    den: Any = pfode.load(snapshot(tmp_path / "c.pkl", net, "EDMPrecond", sigma_data=0.7))
    assert (den.process.sigma_min, den.process.sigma_max, den.sigma_data) == (0.002, 80.0, 0.7)
    level = pickled.iddpm_levels()
    discrete = pfode.load(snapshot(tmp_path / "d.pkl", net, "iDDPMPrecond")).process
    ratio = discrete.sigma(100.0) / discrete.alpha(100.0)
    assert ratio == pytest.approx(float(level[1000 - 1 - 100]), rel=1e-6)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", NETWORKS)
def test_pickles_of_every_protocol(tmp_path, name, protocol):
    net = network(name)
    precond = "Precond" if name == "edm2" else "EDMPrecond"
    den = pfode.load(snapshot(tmp_path / "net.pkl", net, precond, protocol))
    for key, value in net.state_dict().items():
        assert torch.equal(den.net.state_dict()[key], value)
    assert not (tmp_path / "canary").exists()
    assert den.net.architecture() == net.architecture()
    t = torch.tensor(0.5)
    c = t.log() / 4
    wanted = 0.25 / 0.5 * X + 0.25 / 0.5**0.5 * net(X / 0.5**0.5, c.expand(3), LABEL)
    torch.testing.assert_close(den(X, t, label=LABEL), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_half_precision_and_bare_networks(tmp_path):
    net = copy.deepcopy(network("edm2")).half()
    (tmp_path / "net.pkl").write_bytes(pickled.dump(pickled.preconditioned(net, "Precond")))
    den = pfode.load(tmp_path / "net.pkl")
    assert den.dtype == torch.float32
    assert torch.equal(den.net.out_conv.weight, net.out_conv.weight.float())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_channels": 10**6}, "model_channels"),
        ({"num_blocks": 10**9}, "num_blocks"),
        ({"channel_mult": [1, 2, 3, 4, 5]}, "img_resolution: 8 cannot be halved"),
        ({"embedding_type": "os.system"}, "embedding_type"),
        ({"resample_filter": [1, 2, 1]}, "resample_filter"),
        ({"extra": 1}, "unknown field 'extra'"),
        ({"model_channels": 132}, "model_channels: a width of 132"),
        ({"augment_dim": None}, "augment_dim"),
        ({"model_channels": 16}, "tensor"),
        ({"label_dim": 4}, "preconditioning"),
    ],
    ids=str,
)
def test_networks_that_do_not_fit(tmp_path, config, message):
    net = network("ddpm++")
    whole = pickled.preconditioned(net, "EDMPrecond")
    whole.contents["_modules"]["model"].contents["_init_kwargs"].update(config)
    (tmp_path / "net.pkl").write_bytes(pickled.dump({"ema": whole}))
    with pytest.raises(FileError, match=message) as error:
        pfode.load(tmp_path / "net.pkl")
    assert "net.pkl" in error.value.message


def spoil(tensor: torch.Tensor, how: str) -> torch.Tensor | None:
    if how == "missing":
        return None
    if how == "nan":
        tensor = tensor.clone()
        tensor.flatten()[0] = float("nan")
        return tensor
    return {"longer": torch.cat([tensor, tensor]), "integer": tensor.int(), "double": tensor.double()}[how]


@pytest.mark.parametrize("how", ["missing", "nan", "longer", "integer", "double"])
@pytest.mark.parametrize("place", [("map_layer0", "bias"), ("enc", "8x8_conv", "weight"), ("map_label", "weight")])
def test_damaged_tensors(tmp_path, place, how):
    whole = pickled.preconditioned(network("ddpm++"), "EDMPrecond")
    module = whole.contents["_modules"]["model"]
    for key in place[:-1]:
        module = module._modules[key] if hasattr(module, "_modules") else module.contents["_modules"][key]
    parameters = module.contents["_parameters"]
    parameters[place[-1]] = spoil(parameters[place[-1]].detach(), how)
    (tmp_path / "net.pkl").write_bytes(pickled.dump({"ema": whole}))
    with pytest.raises(FileError, match=rf"net\.pkl: tensor '{'.'.join(place)}'"):
        pfode.load(tmp_path / "net.pkl")


def test_unknown_networks(tmp_path):
    for value, message in (
        (5, "expected a network"),
        ({}, "no network under 'ema'"),
        ({"ema": pickled.Persistent("Generator", {})}, "'Generator'"),
        ({"ema": [1, 2]}, "'list'"),
    ):
        (tmp_path / "net.pkl").write_bytes(pickled.dump(value))
        with pytest.raises(FileError, match=message):
            pfode.load(tmp_path / "net.pkl")
    with pytest.raises(UsageError, match="channel_mult"):
        edm.SongUNet(**{**NETWORKS["ddpm++"][1], "channel_mult": []})
