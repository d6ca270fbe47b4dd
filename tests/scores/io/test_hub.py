"""The Hugging Face hub, without a network: saving, pushing, fetching, the cache, and what can go wrong."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub.errors as errors
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

import pfode
from pfode.errors import FileError, MissingError, UsageError, WriteError
from pfode.scores import Denoiser
from tests.scores import tiny
from tests.scores.small import denoiser
from tests.scores.tiny import diffusers

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor(0.4)
CARD = {"name": "Small", "licence": "Apache-2.0"}


@pytest.fixture
def pushed(monkeypatch, tmp_path):
    """The folder that a push uploads, and its arguments."""
    found: dict[str, Any] = {}

    class Api:
        def __init__(self, **options: Any):
            found["api"] = options

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            found["repo"] = (repo_id, options)
            return mock.Mock(repo_id=f"me/{repo_id}" if "/" not in repo_id else repo_id)

        def upload_folder(self, folder_path: Path, **options: Any) -> str:
            found["upload"] = options
            shutil.copytree(folder_path, tmp_path / "hub")
            return "https://hub/commit/1"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    return found


def test_save_and_load_a_folder(tmp_path):
    den = denoiser()
    den.save_pretrained(tmp_path / "small", card=CARD)
    assert {file.name for file in (tmp_path / "small").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    for again in (Denoiser.from_pretrained(tmp_path / "small"), pfode.load(tmp_path / "small")):
        assert torch.equal(again(X, T, label=1), den(X, T, label=1))
        assert again.labels == den.labels
    readme = (tmp_path / "small" / "README.md").read_text()
    assert "license: apache-2.0" in readme
    assert "library_name: pfode" in readme
    assert "# Small" in readme
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["architecture"]["name"] == "UNet"


def test_the_dtype_of_the_file(tmp_path):
    denoiser().save_pretrained(tmp_path / "half", dtype=torch.float16)
    assert pfode.load(tmp_path / "half", dtype=None).dtype == torch.float16
    denoiser().save_pretrained(tmp_path / "own")
    assert pfode.load(tmp_path / "own", dtype=None).dtype == torch.float32


def test_push(pushed, tmp_path):
    den = denoiser()
    assert den.push_to_hub("me/small", card=CARD, private=True, token="secret", branch="next") == "https://hub/commit/1"
    assert pushed["api"] == {"token": "secret"}
    assert pushed["repo"] == ("me/small", {"private": True, "exist_ok": True})
    assert pushed["upload"]["revision"] == "next"
    assert torch.equal(pfode.load(tmp_path / "hub")(X, T), den(X, T))
    assert "secret" not in "".join(file.read_text(errors="ignore") for file in (tmp_path / "hub").iterdir())
    shutil.rmtree(tmp_path / "hub")
    den.save_pretrained(tmp_path / "here", push_to_hub=True, repo_id="me/other")
    assert pushed["repo"][0] == "me/other"


def test_what_cannot_be_saved_or_loaded(tmp_path):
    with pytest.raises(UsageError, match="only networks of pfode"):
        Denoiser(lambda x, t: x, pfode.VP()).save_pretrained(tmp_path / "m")
    (tmp_path / "file").write_text("x")
    with pytest.raises(WriteError, match="file/m: cannot be written"):
        denoiser().save_pretrained(tmp_path / "file" / "m")
    with pytest.raises(FileError, match=r"no model\.safetensors"):
        Denoiser.from_pretrained(tmp_path)
    denoiser().save_pretrained(tmp_path / "m")
    raw = (tmp_path / "m" / "model.safetensors").read_bytes()
    (tmp_path / "m" / "model.safetensors").write_bytes(raw[:-1])
    with pytest.raises(FileError, match=r"model\.safetensors: tensor .* points outside the file"):
        Denoiser.from_pretrained(tmp_path / "m")


# ---- fetching


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of one model, "me/model", whose files are those of a folder; `fetched` are those that were asked for."""
    remote, local = tmp_path / "remote", tmp_path / "local"
    remote.mkdir()
    calls: list[dict[str, Any]] = []

    def download(name: str, allow_patterns: list[str], **options: Any) -> str:
        calls.append({"name": name, **options})
        names = [str(file.relative_to(remote)) for file in remote.rglob("*") if file.is_file()]
        for one in filter_repo_objects(names, allow_patterns=allow_patterns):
            (local / one).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(remote / one, local / one)
        return str(local)

    monkeypatch.setattr("pfode.scores.io.fetch.snapshot_download", download)
    return remote, local, calls


def names(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_a_pipeline_of_the_hub(hub):
    remote, local, calls = hub
    tiny.dit_pipeline().save_pretrained(remote)
    for more in ("transformer/diffusion_pytorch_model.bin", "samples.png", "safety/model.safetensors", "vae/x.msgpack"):
        (remote / more).parent.mkdir(exist_ok=True)
        (remote / more).write_bytes(b"large")
    den: Any = pfode.load("me/model@v2")
    assert den.shape == (4, 4, 4)
    assert den.decode(torch.zeros(1, 4, 4, 4)).shape == (1, 3, 8, 8)
    weights = "diffusion_pytorch_model.safetensors"
    assert names(local) == {
        "model_index.json", "scheduler/scheduler_config.json", "transformer/config.json", f"transformer/{weights}",
        "vae/config.json", f"vae/{weights}",
    }  # fmt: skip
    assert {(call["name"], call["revision"]) for call in calls} == {("me/model", "v2")}


def test_a_shared_model_of_ours(hub):
    remote, local, calls = hub
    denoiser().save_pretrained(remote)
    assert torch.equal(pfode.load("hf:me/model")(X, T), denoiser()(X, T))
    assert torch.equal(Denoiser.from_pretrained("me/model", token="t")(X, T), denoiser()(X, T))
    assert calls[-1] == {"name": "me/model", "revision": None, "token": "t"}
    assert names(local) == {"model.safetensors", "config.json"}


def test_shards_of_the_hub(hub):
    remote, local, _ = hub
    tiny.unet().save_pretrained(remote / "unet", max_shard_size="20KB")
    tiny.scheduler("DDPMScheduler").save_pretrained(remote / "scheduler")
    assert pfode.load("me/model").shape == (3, 8, 8)
    assert len(list(local.glob("unet/*-of-*.safetensors"))) > 1


def test_large_models_of_another_kind_are_not_fetched(hub):
    remote, local, _ = hub
    (remote / "unet").mkdir()
    (remote / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (remote / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"large")
    with pytest.raises(FileError, match="StableDiffusionPipeline"):
        pfode.load("me/model")
    assert names(local) == {"model_index.json"}


def failing(error: BaseException) -> Any:
    def download(name: str, **options: Any) -> str:
        raise error

    return download


RESPONSE = mock.Mock(status_code=404, headers={}, request=mock.Mock(url="https://hub"))
FAILURES = [
    (errors.RepositoryNotFoundError("no", response=RESPONSE), MissingError, "no public model of this name"),
    (errors.GatedRepoError("no", response=RESPONSE), MissingError, "gives it to those who ask"),
    (errors.RevisionNotFoundError("no", response=RESPONSE), MissingError, "has no revision 'v9'"),
    (
        errors.HfHubHTTPError("server\nbusy", response=RESPONSE),
        MissingError,
        "cannot be fetched from the hub: server busy",
    ),
    (errors.LocalEntryNotFoundError("no"), MissingError, "the hub cannot be reached"),
    (errors.OfflineModeIsEnabled("no"), MissingError, "cannot be fetched"),
    (errors.HFValidationError("no"), UsageError, "no name of a model on the hub"),
    (OSError(28, "No space left on device"), MissingError, "No space left"),
]


@pytest.mark.parametrize(("error", "kind", "message"), FAILURES, ids=lambda value: type(value).__name__)
def test_failures(monkeypatch, error, kind, message):
    monkeypatch.setattr("pfode.scores.io.fetch.snapshot_download", failing(error))
    with pytest.raises(kind, match=message) as found:
        pfode.load("me/model@v9")
    assert "'me/model'" in found.value.message
    assert found.value.hint


def test_the_cache_serves_without_a_network(monkeypatch, tmp_path):
    """The layout of huggingface_hub's cache, with no connection allowed."""
    repo = tmp_path / "models--me--model"
    (repo / "refs").mkdir(parents=True)
    commit = "0" * 40
    (repo / "refs" / "main").write_text(commit)
    diffusers.DDPMPipeline(tiny.unet(), tiny.scheduler("DDPMScheduler")).save_pretrained(repo / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert pfode.load("me/model").shape == (3, 8, 8)
    with pytest.raises(MissingError, match="not in the cache of the hub, and the hub cannot be reached"):
        pfode.load("me/other")
    with pytest.raises(MissingError):
        pfode.load("me/model@other")


@pytest.mark.parametrize(
    "name", ["/nowhere/x", "./a/b", "a/b/c", "../a", "a/b.safetensors", "a/b.pkl", "a//b", "a/b\n"]
)
def test_paths_are_no_names_of_the_hub(monkeypatch, name):
    monkeypatch.setattr("pfode.scores.io.fetch.snapshot_download", failing(AssertionError("asked the hub")))
    with pytest.raises((UsageError, FileError)):
        pfode.load(name)


@pytest.mark.skipif(not tiny.NEWER, reason="this version's pipelines take less")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_pipeline_under_prompts(hub, tmp_path, variant):
    """Of the weights one variant is fetched, of each part, and in the other form where there is but that."""
    pytest.importorskip("transformers")
    remote, local, _ = hub
    tiny.saved_pipeline("sd", tmp_path, tiny.scheduler("DDIMScheduler", beta_schedule="scaled_linear"))
    shutil.copytree(tmp_path / "pipe", remote, dirs_exist_ok=True)
    unet, words = remote / "unet", remote / "text_encoder"
    shutil.copy(unet / "diffusion_pytorch_model.safetensors", unet / "diffusion_pytorch_model.fp16.safetensors")
    (words / "model.safetensors").rename(words / "model.fp16.safetensors")
    (remote / "whole.safetensors").write_bytes(b"large")
    (unet / "diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"large")
    den: Any = pfode.load("me/model", prompt="a cat", variant=variant)
    assert den.shape == (4, 8, 8)
    middle = ".fp16" if variant else ""
    assert {name for name in names(local) if name.endswith(".safetensors")} == {
        f"unet/diffusion_pytorch_model{middle}.safetensors", "text_encoder/model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
