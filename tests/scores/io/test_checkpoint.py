"""Model files: what is written is what is read; what was changed is refused."""

import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

import pfode
from pfode.errors import FileError, UsageError, WriteError
from pfode.header import content_digest, read_header
from pfode.scores import load, save
from pfode.scores.denoiser import Denoiser
from pfode.scores.io.shipped import WEIGHTS, shipped
from tests import problems
from tests.scores.small import CONFIG, NAMES, denoiser, network

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor(0.4)
CARD = {"data": {"name": "none"}, "licence": "Apache-2.0", "name": "small"}


@pytest.fixture
def model(tmp_path):
    return save(denoiser(), tmp_path / "model.safetensors", card=CARD)


def forge(path, metadata=None, tensors=None, config=None):
    """The file again, changed and with a digest that fits."""
    header = read_header(path)
    tensors = {**load_file(path), **(tensors or {})}
    tensors = {name: value for name, value in tensors.items() if value is not None}
    meta = {**header.metadata, **(metadata or {})}
    if config is not None:
        meta["pfode.config"] = (
            config if isinstance(config, str) else json.dumps({**header.config("pfode.config"), **config})
        )
    meta = {key: value for key, value in meta.items() if value is not None}
    save_file(tensors, path, metadata=meta)
    if "pfode.digest" in meta:
        save_file(tensors, path, metadata={**meta, "pfode.digest": read_header(path).digest()})
    return path


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_round_trip(tmp_path, dtype):
    den = denoiser()
    again = load(save(den, tmp_path / "m.safetensors", card={}, dtype=dtype), dtype=torch.float64)
    for name, value in den.net.state_dict().items():
        assert torch.equal(again.net.state_dict()[name], value.to(dtype).to(torch.float64))
    torch.testing.assert_close(again(X, T, label=1), den(X, T, label=1), rtol=0.05, atol=0.05)
    assert (again.labels, again.shape, again.process, again.prediction) == (NAMES, (1, 8, 8), den.process, "edm")
    assert not any(p.requires_grad for p in again.net.parameters())


@pytest.mark.parametrize("process", problems.ALL_PROCESSES.values(), ids=list(problems.ALL_PROCESSES))
@pytest.mark.parametrize("prediction", ["edm", "v"])
def test_process_and_preconditioning_come_back(tmp_path, process, prediction):
    den = Denoiser(network(), process, prediction, sigma_data=0.7, shape=(1, 8, 8), labels=NAMES, time_scale=3.0)
    again = load(save(den, tmp_path / "m.safetensors", card=CARD, dtype=torch.float32))
    t = torch.tensor((process.t_min + process.t_max) / 2, dtype=torch.float64)
    assert torch.equal(again(X, t, label=2), den(X, t, label=2))
    assert again.process.config() == process.config()


def test_the_file_describes_itself(model):
    header = read_header(model)
    config = header.config("pfode.config")
    assert header.metadata["format"] == "pt"
    assert header.metadata["pfode.kind"] == "model"
    assert header.metadata["pfode.version"] == pfode.__version__
    assert header.metadata["modelspec.resolution"] == "8x8"
    assert header.metadata["modelspec.license"] == config["licence"] == "Apache-2.0"
    assert config["architecture"] == {"name": "UNet", **CONFIG.to_json()}
    assert header.metadata["pfode.digest"] == header.digest()


def test_the_digest_is_reproducible_and_the_mode_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        a, b = (save(denoiser(), tmp_path / name, card=CARD) for name in ("a.safetensors", "b.safetensors"))
    finally:
        os.umask(before)
    assert read_header(a).metadata["pfode.digest"] == read_header(b).metadata["pfode.digest"]
    assert a.read_bytes() == b.read_bytes()
    plan = pfode.make_plan("er-sde", process=pfode.VP(), steps=3)
    assert plan.save(tmp_path / "p").read_bytes() == plan.save(tmp_path / "q").read_bytes()
    assert stat.S_IMODE(a.stat().st_mode) == 0o640


def test_other_networks_cards_and_folders_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(UsageError, match="only networks of pfode"):
        save(Denoiser(lambda x, t: x, pfode.VP()), path, card={})
    with pytest.raises(UsageError, match="not JSON"):
        save(denoiser(), path, card={"x": torch.zeros(1)})
    with pytest.raises(UsageError, match="'process' is a field"):
        save(denoiser(), path, card={"process": "EDM"})
    broken = denoiser()
    broken.net.last.bias.fill_(1e6)
    with pytest.raises(UsageError, match=r"last\.bias: not finite in torch\.float16"):
        save(broken, path, card={})
    with pytest.raises(WriteError):
        save(denoiser(), tmp_path / "none" / "m.safetensors", card={})
    assert not list(tmp_path.iterdir())


def test_every_truncation_is_refused(model):
    raw = model.read_bytes()
    for size in [0, 1, 7, 8, 9, 100, *range(500, len(raw), len(raw) // 40), len(raw) - 1]:
        model.write_bytes(raw[:size])
        with pytest.raises(FileError, match=model.name):
            load(model)


def test_every_flipped_bit_is_refused(model):
    raw = model.read_bytes()
    generator = torch.Generator().manual_seed(0)
    header = 8 + int.from_bytes(raw[:8], "little")
    places = torch.cat(
        [
            torch.randint(0, header, (100,), generator=generator),
            torch.randint(header, len(raw), (100,), generator=generator),
        ]
    )
    for place, bit in zip(places.tolist(), torch.randint(0, 8, (200,), generator=generator).tolist(), strict=True):
        changed = bytearray(raw)
        changed[place] ^= 1 << bit
        model.write_bytes(changed)
        with pytest.raises(FileError, match=model.name):
            load(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": {"last.bias": None}}, r"'last\.bias' is missing"),
        ({"tensors": {"evil": torch.zeros(1)}}, "'evil' is unknown"),
        ({"tensors": {"last.bias": torch.zeros(2)}}, r"'last\.bias': shape \[2\], expected \[1\]"),
        ({"tensors": {"last.bias": torch.zeros(1, dtype=torch.int32)}}, "dtype I32"),
        ({"tensors": {"last.bias": torch.tensor([float("nan")])}}, "not finite"),
        ({"tensors": {"last.bias": torch.tensor([float("inf")])}}, "not finite"),
        ({"metadata": {"pfode.kind": "plan"}}, "this is a pfode plan"),
        ({"metadata": {"pfode.kind": None}}, "not a pfode model"),
        ({"metadata": {"pfode.digest": None}}, "no 'pfode.digest'"),
        ({"metadata": {"pfode.config": None}}, "no 'pfode.config'"),
        ({"config": "{"}, "broken JSON"),
        ({"config": "[]"}, "expected a JSON object"),
        ({"config": "[" * 100_000}, "broken JSON"),
        ({"config": {"architecture": None}}, "architecture"),
        ({"config": {"architecture": {"name": "os.system"}}}, "unknown network"),
        ({"config": {"architecture": {"name": "UNet", **CONFIG.to_json(), "widths": [8, 10**9]}}}, "widths"),
        ({"config": {"architecture": {"name": "UNet", **CONFIG.to_json(), "extra": 1}}}, "extra"),
        ({"config": {"process": {"name": "Brown"}}}, "Brown"),
        ({"config": {"process": {"name": "EDM", "sigma_min": "0.1"}}}, "sigma_min"),
        ({"config": {"process": {"name": "EDM", "sigma": 1.0}}}, "sigma"),
        ({"config": {"process": {"name": "EDM", "sigma_min": 3.0, "sigma_max": 1.0}}}, "sigma_min < sigma_max"),
        ({"config": {"process": []}}, "process"),
        ({"config": {"prediction": "noise"}}, "prediction"),
        ({"config": {"prediction": ["edm"]}}, "prediction"),
        ({"config": {"sigma_data": 0}}, "sigma_data"),
        ({"config": {"sigma_data": True}}, "sigma_data"),
        ({"config": {"sigma_data": 1e308}}, "sigma_data"),
        ({"config": {"time_scale": "1"}}, "time_scale"),
        ({"config": {"shape": [3, 8, 8]}}, "shape"),
        ({"config": {"labels": ["a", "b"]}}, "labels"),
        ({"config": {"labels": [1, 2, 3]}}, "labels"),
        ({"config": {"labels": "abc"}}, "labels"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_forged_files_are_refused_by_field(model, change, message):
    with pytest.raises(FileError, match=message) as error:
        load(forge(model, **change))
    assert model.name in error.value.message


def test_a_forged_digest_is_refused(model):
    header = read_header(model)
    save_file(load_file(model), model, metadata={**header.metadata, "pfode.digest": content_digest({}, {})})
    with pytest.raises(FileError, match="digest"):
        load(model)


def test_names():
    with pytest.raises(UsageError, match="did you mean 'digits'"):
        load("digit")
    with pytest.raises(UsageError, match="unknown model 'resnet'"):
        load("resnet")
    with pytest.raises(FileError, match="no such file"):
        load("nowhere.safetensors")


def test_folders_are_no_models(tmp_path):
    with pytest.raises(FileError, match="is a folder"):
        load(tmp_path)


@pytest.mark.parametrize("name", shipped())
def test_shipped_models(name):
    den = load(name)
    assert den.shape is not None
    x = torch.randn(2, *den.shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor((den.process.t_min + den.process.t_max) / 2)
    assert den(x, t, label=1).isfinite().all()
    assert not torch.equal(den(x, t, label=1), den(x, t))
    header = read_header(WEIGHTS / f"{name}.safetensors")
    limit = 1_000_000 if name.startswith("digits") else 16_000_000
    assert (WEIGHTS / f"{name}.safetensors").stat().st_size < limit
    assert (WEIGHTS / f"{name}.md").is_file()
    config = header.config("pfode.config")
    assert config["licence"]
    assert config["data"]["sha256"]


def test_bins_and_moments_of_the_data_are_kept(tmp_path):
    den = denoiser()
    assert (den.bins, den.moments) == (None, None)
    den.bins, den.moments = 17, (torch.rand(1, 8, 8), torch.rand(1, 8, 8))
    back = pfode.load(save(den, tmp_path / "m.safetensors", card={}))
    assert back.bins == 17
    assert back.moments is not None
    for ours, theirs in zip(back.moments, den.moments, strict=True):
        assert torch.allclose(ours.float(), theirs, atol=1e-6)
    assert (pfode.load("digits").bins, pfode.load("avatars").bins) == (17, 256)
