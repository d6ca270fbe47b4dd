"""Malformed calls of `solve`: one error each, with cause, value and remedy, and never a hang.

A remedy is a hint, or a message that says what is needed. Every call is limited to 300 attempts.
"""

import functools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pfode.errors import NumericalError, PfodeError, UsageError
from pfode.ode import Backsolve, Checkpoint, I, Solver, solve, steps

Y = torch.ones(3, 2)
TREE = {"a": Y, "b": Y}
TS = [0.0, 1.0]
NAN, INF = math.nan, math.inf
f32 = torch.float32
Case = tuple[dict[str, Any], str]


def decay(t, y):
    return -y


def two(t, y):
    return {"a": -y["a"], "b": -y["b"]}


def late(t: Tensor, y: Tensor) -> Tensor:
    return torch.where(t.reshape(-1, 1) > 0.5, INF, y)


def cases(name: str, values: list[Any], message: str, **others: Any) -> list[Case]:
    """The same argument with several values; `{}` in the message is the value as the error shows it."""
    return [({name: value, **others}, message.replace("{}", re.escape(f"{value!r:.40}"))) for value in values]


def nested(depth: int) -> Any:
    tree: Any = Y
    for _ in range(depth):
        tree = [tree]
    return tree


ROWS = torch.tensor([[0.0, 1.0, 2.0]] * 3)
BENT = ROWS.clone()
BENT[2, 0] = 1.5

ARGUMENTS: list[Case] = [
    *cases("f", [None, 3.0, "decay", Y, [decay]], r"f: need a function \(t, y, \*args\), got \w+\nhint: f=lambda"),
    ({"f": torch.nn.Identity}, r"f: need a function \(t, y, \*args\), got the class Identity\nhint: f=lambda"),
    ({"f": lambda t: t}, r"f: cannot call <lambda>\(t\) as f\(t, y, \*args\) with 0 args: too many positional"),
    ({"f": lambda t, y, a: y}, r"f: cannot call <lambda>\(t, y, a\) .* 0 args: missing a required argument: 'a'"),
    *cases("args", [3, "abc", [1]], r"f: cannot call decay\(t, y\) .* with 1 args: too many positional"),
    *cases("y0", [None, 1.0, 3, "y", [1.0, 2.0], (Y, 1.0), np.ones(3)],
           r"y0: need floating-point or complex tensors, got \w+\nhint: y0=torch.tensor"),
    *cases("y0", [torch.ones(2, dtype=torch.int64), torch.ones(2) > 0, {"a": torch.ones(2, dtype=torch.int32)}],
           r"y0: need floating-point or complex tensors, got torch.(int64|bool|int32)\nhint: y0=y0.float\(\)"),
    *cases("y0", [torch.ones(2, device="meta"), Y.to_sparse(), Y.to(torch.float8_e4m3fn)],
           r"y0: need dense tensors of 16 bits or more, complex ones of 64, got .+\nhint: y0=y0.to_dense"),
    ({"y0": nested(2000)}, r"y0: its containers are nested too deep\nhint: y0="),
    *cases("y0", [[], {}, torch.ones(0)], "y0: an empty state cannot be integrated, got {}\nhint"),
    ({"y0": torch.tensor(1.0), "batch": "per-sample"}, r"y0: every tensor of it needs the batch first, got \(\)\nhint"),
    ({"y0": (Y, Y[:2]), "batch": "per-sample"}, r"tensor of it needs the batch first, got \(3, 2\), \(2, 2\)\nhint"),
    *cases("ts", [None, "01", [0.0, "a"], {"t": 1}, [[0.0], [0.0, 1.0]]], "ts: need real numbers, got {}\nhint: ts="),
    *cases("ts", [[0, 10**400], [10**400]], "ts: need real numbers, got .+\nhint: ts="),
    ({"ts": torch.empty(2, device="meta")}, "ts: need numbers in memory, got a meta tensor, .+\nhint: ts="),
    ({"ts": torch.tensor([0, 1j])}, "ts: need real numbers, got torch.complex64\nhint: ts=ts.real"),
    *cases("ts", [1.0, torch.tensor(1.0), [], torch.zeros(0), torch.zeros(2, 2, 2)],
           r"ts: need times of shape \(times,\), got shape \([\d, ]*\)\nhint: ts="),
    *cases("ts", [[[0.0, 1.0], [0.0, 1.0]], ROWS],
           r'ts: need times of shape \(times,\), got shape \(\d, \d\)\nhint: batch="per-sample"'),
    *cases("ts", [[1.0, 0.0, 0.5], [0.0, 2.0, 1.0], [0.0, NAN], [0.0, INF], [NAN, 1.0]],
           "ts: need finite times that rise or fall, got {}\nhint: sort"),
    *cases("ts", [BENT], r"ts: need finite times that rise or fall, got \[\[", batch="per-sample"),
    ({"ts": ROWS[:2], "batch": "per-sample"}, "ts: 2 rows of times for a batch of 3\nhint: one row per sample"),
    ({"ts": ROWS, "batch": "per-sample", "method": "rk4"}, r"ts of shape \(batch, times\) needs adaptive steps\nhint"),
    ({"ts": ROWS, "batch": "per-sample", "jump_t": [0.5], "step_t": [0.2]},
     r"step_t and jump_t: one of them where ts has shape \(batch, times\)\nhint: all of them as jump_t"),
    *cases("method", ["dopri", "RK45", "euler2"], "unknown method {}\nhint: (did you mean|known)"),
    *cases("method", [None, 5, decay, Solver, object()], "method: need a name or a Solver, got .+\nhint: method="),
]  # fmt: skip

TOLERANCES: list[Case] = []
for name in ("rtol", "atol"):
    TOLERANCES += cases(name, [-1e-3, NAN, INF, True], f"{name}: need a number of at least 0, got {{}}")
    TOLERANCES += cases(name, ["1e-3", None, 1e-3j], f"{name}: need real numbers, got {{}}\nhint: {name}=1e-6")
    TOLERANCES += cases(
        name, [torch.tensor(-1.0), torch.tensor(NAN)], f"{name}: need finite numbers .*, got tensor.*\n"
    )
    TOLERANCES += cases(
        name, [torch.ones(5), torch.ones(1, 3, 2)], rf"{name}: shape .* does not fit y0, of shape \(3, 2\)\n"
    )
    TOLERANCES += cases(name, [(1e-3, 1e-3)], f"{name}: need a number or a tree like y0, got 2 leaves for 1\n")
TOLERANCES += [
    *cases("rtol", [1e300, 10**300], "rtol: .+ is beyond torch.float32, the state's dtype\nhint: rtol="),
    *cases("atol", [10**400], "atol: need a number of at least 0, got a number of about 400 digits"),
    ({"rtol": 0, "atol": 0}, r"rtol and atol: .* an error of at most 0 \(rtol=0, atol=0\)\nhint: atol="),
    ({"rtol": torch.zeros(2), "atol": torch.zeros(2)}, r"rtol and atol: .* an error of at most 0"),
    ({"rtol": torch.tensor(1e-3, requires_grad=True)}, r"rtol: cannot have a gradient\nhint: rtol=rtol.detach"),
]

OPTIONS: list[Case] = [
    *cases("batch", ["sample", "joints", None, True, 2], "unknown batch {}\nhint"),
    *cases("adjoint", ["checkpoints", "auto", None, 1], r"unknown adjoint (.checkpoints.|.auto.|.?None|1|.int)"),
    *cases("adjoint", [Checkpoint, Backsolve], "unknown adjoint 'type'\nhint: known"),
    *cases("params", [3, "w", [None], {"w": Y}], r"params: need tensors, got \w+\nhint: params=tuple"),
    ({"step_size": 1e-12, "max_steps": 10**30}, "step_size: 1e-12 makes 999999999000 steps, more than 10000000\nhint"),
    *cases("step_size", [10**400, 0.1j], "step_size: need a number of at least 0, got "),
    *cases("step_t", [[10**400], [None]], "step_t: need real numbers, got .+\nhint: step_t="),
    *cases("max_steps", [0, -1, 2.5, "many", None, INF, True],
           "max_steps: need an integer of at least 1, got {}\nhint: max_steps=1"),
    ({"step_size": 0}, "step_size: need a positive number, got 0\nhint: step_size=0.01"),
    *cases("step_size", [-0.1, NAN, INF, "a", True, [0.1]], "step_size: need a number of at least 0, got {}"),
    ({"step_size": 1e-9}, "step_size: 1e-09 makes 999999999 steps, more than max_steps = 300\nhint: step_size=0.003"),
    ({"step_size": 5e-324}, "step_size: 4.94066e-324 makes 1000000000000000000 steps"),
    ({"step_size": 0.1, "grid": TS}, r"step_size = 0.1 and grid = \[0.0, 1.0\]: both say the steps\nhint: give one"),
    *cases("grid", [[0.0, 0.5], [0.5, 1.0], [0.0, 0.5, 0.5, 1.0], [1.0, 0.0], [], [0.0], [0.0, 0.7, 0.3, 1.0]],
           r"grid: need times from ts\[0\] = 0 on to ts\[-1\] = 1, got {}\nhint: in that order"),
    *cases("grid", [[0.0, NAN, 1.0], [TS]], "grid: need a list of finite times, got {}\nhint"),
    *cases("grid", ["abc", {"a": 1}], "grid: need real numbers, got {}\nhint"),
    *cases("step_t", [[NAN], [INF], [[0.5]]], "step_t: need a list of finite times, got {}\nhint: step_t="),
    *cases("jump_t", [[NAN], [-INF, 0.5]], "jump_t: need a list of finite times, got {}\nhint: jump_t="),
    *cases("jump_t", ["abc", {"a": 1}], "jump_t: need real numbers, got {}\nhint"),
    *cases("controller", ["pid"], r"unknown controller 'pid'\nhint: did you mean 'PID'"),
    *cases("controller", [I, 0.9, object()], r"controller: need a PID, got .+\nhint: controller=PI\(\)"),
    *cases("norm", [3, "rms"], "norm: need a function of the error, got {}\nhint: norm="),
    *cases("norm", [lambda e: e, lambda e: 1.0, lambda e: None, lambda e: (0j + e).sum()],
           r"norm: need a real tensor of shape \(\) from it, got (shape \([\d, ]*\)|float|NoneType)\nhint: norm="),
    ({"norm": lambda e: e.square().mean(), "batch": "per-sample"}, r"norm: .* shape \(3,\) from it, got shape \(\)\n"),
    ({"first_step": 0.1}, r"unknown option 'first_step' \(0.1\)\nhint: controller=PID\(first_step=...\)"),
    ({"tol": 0.1}, r"unknown option 'tol' \(0.1\)\nhint: rtol=..., atol=..."),
    ({"max_num_steps": 10}, r"unknown option 'max_num_steps' \(10\)\nhint: max_steps="),
    ({"rtoll": 0.1}, r"unknown option 'rtoll' \(0.1\)\nhint: did you mean 'rtol'"),
    ({"options": {"norm": 1}}, r"unknown option 'options' \(\{'norm': 1\}\)\nhint"),
]  # fmt: skip

NEED = r"the field's result: need a tensor of shape \(3, 2\) as y0, got "
TYPES = r"the field's result: need torch.float32 as y0, got torch.(complex64|int64)\nhint: give both the same dtype"
PAIR = r"the field's result: need tensors of shapes \[\(3, 2\), \(3, 2\)\] as y0, got "
FIELDS: list[Case] = [
    *cases("f", [lambda t, y: y[:2], lambda t, y: y.sum(), lambda t, y: y[..., None], lambda t, y: y.T],
           NEED + r"a tensor of shape \([\d, ]*\)\nhint: it returns dy/dt"),
    *cases("f", [lambda t, y: (y,), lambda t, y: None, lambda t, y: 1.0, lambda t, y: [y], lambda t, y: {"a": y}],
           NEED + r"(tuple|NoneType|float|list|dict)\nhint: it returns dy/dt"),
    ({"f": lambda t, y: y.numpy()}, NEED + "ndarray"),
    *cases("f", [lambda t, y: y.to(torch.complex64), lambda t, y: y.long()], TYPES),
    *cases("f", [lambda t, y: (y["a"], y["b"]), lambda t, y: {"a": y["a"], "c": y["b"]}, lambda t, y: y["a"]],
           PAIR + r"(tuple|dict|a tensor of shape \(3, 2\))\nhint", y0=TREE),
]  # fmt: skip

FAILURES: list[Case] = [
    ({"f": lambda t, y: y * NAN}, "dopri5 stopped at t = 0: the field or the state is not finite\nhint: check"),
    ({"f": late}, r"dopri5 stopped at t = 0.\d+: the field or the state is not finite\nhint: check"),
    ({"f": late, "batch": "per-sample"}, r"dopri5 stopped at t = 0.\d+, sample 0 and 2 more: the field or the state"),
    (
        {"f": late, "method": "rk4", "step_size": 0.1},
        r"rk4 stopped at t = [\d.]+: the field or the state is not finite",
    ),
    ({"f": late, "method": "euler", "step_size": 0.2, "batch": "per-sample"}, "euler stopped at t = 1, sample 0 and 2"),
    *cases("y0", [torch.tensor([1.0, NAN]), torch.tensor([INF, 1.0])], "stopped at t = 0: .* the state is not finite"),
    ({"f": lambda t, y: y * y, "ts": [0.0, 2.0]}, r"dopri5 stopped at t = [\d.]+: .*\nhint"),
    ({"rtol": 1e-12, "atol": 1e-12}, r"dopri5 stopped at t = 0.\d+: max_steps = 300 attempts were not enough\nhint"),
    ({"norm": lambda e: torch.tensor(NAN)}, "dopri5 stopped at t = 0: .* not finite\nhint"),
    ({"f": lambda t, y: torch.cos(t) + 0 * y, "y0": torch.zeros(2), "atol": 0.0}, "stopped at t = 0: .*\nhint: atol="),
]
CALLS = [(call, message, UsageError) for call, message in (*ARGUMENTS, *TOLERANCES, *OPTIONS, *FIELDS)]
CALLS += [(call, message, NumericalError) for call, message in FAILURES]


@pytest.mark.parametrize(
    ("call", "message", "kind"), CALLS, ids=[f"{i}-{next(iter(c[0]))}" for i, c in enumerate(CALLS)]
)
def test_a_malformed_call_is_one_clear_error(call, message, kind):
    f = two if call.get("y0") is TREE else decay
    call = {"f": f, "y0": Y, "ts": TS, "max_steps": 300} | call
    field, calls = call["f"], 0

    @functools.wraps(field if callable(field) else f)
    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return field(*args)

    with pytest.raises(PfodeError) as caught:
        solve(**(call | {"f": counted} if callable(field) and not isinstance(field, torch.nn.Module | type) else call))
    assert calls <= 300 * 20  # it ends by itself soon
    text = str(caught.value)
    assert isinstance(caught.value, kind), text
    assert re.search(message, text), text
    assert caught.value.hint or "need" in text


def test_there_are_a_hundred():
    assert len(CALLS) >= 100


def test_fields_are_checked_in_every_way_of_stepping():
    for case, message in FIELDS:
        options: dict[str, Any]
        for options in ({"method": "rk4"}, {"batch": "per-sample"}, {"method": "euler", "batch": "per-sample"}):
            call: dict[str, Any] = {"y0": Y, "ts": TS, **options, **case}
            with torch.set_grad_enabled(options.get("method") == "rk4"), pytest.raises(UsageError, match=message):
                solve(**call)


def test_what_is_well_formed_is_taken():
    """Neighbours of the mistakes above."""
    assert solve(decay, Y, [0.0]).ys.shape == (1, 3, 2)
    assert solve(lambda t, y, *rest: -y, Y, TS, args=(1, 2)).status == 0
    swapped = solve(lambda t, y: {"b": -2 * y["b"], "a": -y["a"]}, TREE, TS).ys
    assert torch.allclose(swapped["b"][-1], torch.tensor(math.exp(-2)).expand(3, 2), rtol=1e-4)
    assert solve(lambda t, y: [-y[0], -y[1]], (Y, Y), TS).status == 0
    assert solve(lambda t, y: -y.double(), Y, TS).ys.dtype == f32
    assert solve(decay, Y, TS, jump_t=[-3.0, 0.5, 7.0]).status == 0
    zero = solve(lambda t, y: 0 * y, torch.zeros(2), TS, atol=0.0)
    assert torch.equal(zero.ys[-1], torch.zeros(2))
    assert solve(decay, Y, TS, rtol=torch.full((2,), 1e-3), atol=[1e-4]).status == 0
    assert solve(decay, TREE["a"], TS, norm=lambda e: e.abs().max()).status == 0


def test_steps_refuses_as_solve_does():
    with pytest.raises(UsageError, match=r"unknown option 'step' \(0.1\)\nhint: did you mean 'step_t'"):
        next(steps(decay, Y, TS, step=0.1))


@pytest.mark.parametrize(
    "options",
    [{"rtol": -1.0}, {"rtol": "a"}, {"atol": NAN}, {"solver": 3}, {"solver": "dopri5"}, {"controller": "PI"}],
)
def test_adjoints_check_their_arguments(options):
    with pytest.raises(UsageError, match=rf"^{next(iter(options))}: need "):
        Backsolve(**options)


def test_numbers_of_any_size_and_kind_are_taken_where_they_can_be():
    for options in (
        {"max_steps": 10**30},
        {"max_steps": np.int64(300)},
        {"rtol": 0},
        {"atol": 1e30},
        {"ts": np.linspace(0, 1, 3)},
        {"ts": torch.tensor([0, 1], dtype=torch.float16)},
        {"ts": range(2)},
        {"step_size": 1e308},
        {"step_size": torch.tensor(0.1)},
        {"y0": Y.bfloat16()},
        {"y0": Y.half()},
        {"y0": Y.T},
        {"y0": Y[:1].expand(3, 2)},
    ):
        call: dict[str, Any] = {"y0": Y, "ts": TS, "max_steps": 300, "method": "dopri5"} | options
        assert solve(decay, **call).status == 0, options
