"""Names of torch that are not public: each does what pfode wants of it, and its fallback serves where it is missing."""

import ast
import math
import re
from pathlib import Path

import pytest
import torch

from pfode import _torch

ROOT = Path(__file__).parents[2]
PRIVATE = re.compile(r"torch\._|torch\.cpu\._|\._version\b|forward_ad\._|_functorch|_foreach")


def test_no_other_file_uses_private_names_of_torch():
    found = []
    for room in ("pfode", "samplers", "scores", "cli"):
        for file in (ROOT / room).rglob("*.py"):
            code = ast.parse(file.read_text())
            for node in ast.walk(code):
                if isinstance(node, ast.Attribute | ast.ImportFrom | ast.Import):
                    text = ast.unparse(node)
                    if PRIVATE.search(text):
                        found.append(f"{file.relative_to(ROOT)}: {text}")
    assert {text.partition(":")[0] for text in found} == {"pfode/_torch.py"}, found


def test_changes_in_place_are_counted():
    x = torch.ones(2)
    before = _torch.in_place_changes(x)
    assert before is not None
    x.add_(1)
    assert _torch.in_place_changes(x) == _torch.version(x) == before + 1
    with torch.inference_mode():
        assert _torch.in_place_changes(torch.ones(2)) is None


def test_uses_of_a_storage(monkeypatch):
    x = torch.ones(4)
    uses = _torch.storage_uses(x)
    alone = uses()
    view = x[:2]
    assert uses() == alone + 1
    del view
    assert uses() == alone
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    assert _torch.storage_uses(x)() == math.inf


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # torch's own, where forward mode begins
@pytest.mark.parametrize("without", [False, True])
def test_transforms_are_seen(without, monkeypatch):
    if without:
        monkeypatch.delattr(_torch._C._functorch, "is_functorch_wrapped_tensor")
    seen = []

    def f(x):
        seen.append((_torch.is_transformed(x), _torch.transformed()))
        return x.sum()

    x = torch.ones(3)
    f(x)
    torch.func.vmap(f)(x)
    torch.func.grad(f)(x)
    torch.func.jvp(f, (x,), (x,))
    assert seen == [(False, None), (True, "vmap"), (True, "other"), (True, "other")]


def test_transforms_unseen_by_an_older_torch(monkeypatch):
    monkeypatch.delattr(_torch._C._functorch, "get_interpreter_stack")
    with torch.autograd.forward_ad.dual_level():
        assert _torch.transformed() == "other"
    assert _torch.transformed() is None


@pytest.mark.parametrize("keep", [False, True])
def test_a_backward_pass_says_whether_it_keeps_the_graph(keep, monkeypatch):
    seen = []

    class Ask(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):  # type: ignore[override]
            seen.append(_torch.keeps_graph())
            return g

    Ask.apply(torch.ones(2, requires_grad=True)).sum().backward(retain_graph=keep)
    assert seen == [keep]
    monkeypatch.delattr(_torch._C._autograd, "_get_current_graph_task_keep_graph")
    Ask.apply(torch.ones(2, requires_grad=True)).sum().backward(retain_graph=keep)
    assert seen == [keep, True]


def test_tiles(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert _torch.has_tiles() is True
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert _torch.has_tiles() is False


def test_averages_of_lists(monkeypatch):
    def averaged():
        targets = [torch.zeros(3), torch.ones(2)]
        _torch.lerp_all_(targets, [torch.ones(3), torch.full((2,), 3.0)], 0.25)
        return targets

    ours = averaged()
    assert ours[0].tolist() == [0.25] * 3
    assert ours[1].tolist() == [1.5] * 2
    monkeypatch.delattr(torch, "_foreach_lerp_")
    assert all(torch.equal(a, b) for a, b in zip(ours, averaged(), strict=True))


def test_compiler_and_its_errors(monkeypatch):
    from torch._dynamo import exc as dynamo
    from torch._inductor import cpp_builder, exc

    assert issubclass(_torch.dynamo_error(), RuntimeError)
    monkeypatch.delattr(dynamo, "TorchDynamoException")
    assert _torch.dynamo_error() is RuntimeError

    def missing():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "g++")
    assert _torch.cpp_compiler() == "g++"
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    assert _torch.cpp_compiler() is None
    monkeypatch.delattr(cpp_builder, "get_cpp_compiler")
    assert _torch.cpp_compiler() == "c++"


def test_a_loop_for_compiled_functions():
    loop = _torch.while_loop()
    (n,) = loop(lambda n: n < 5, lambda n: (n + 1,), (torch.tensor(0),))
    assert n.item() == 5
