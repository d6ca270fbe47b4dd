"""Nonsense in any argument is one typed error at once: no traceback of others, no unbounded work or memory."""

import itertools
from typing import Any

import pytest
import torch

import pfode
from pfode import grids, noise
from pfode.errors import PfodeError, UsageError
from pfode.samplers import make_adaptive, make_plan
from tests import problems

EDM = pfode.EDM()
MIX = problems.mixture(EDM)
X = torch.ones(2, 2)
NAN = float("nan")
HUGE = [10**30, 10**400, 1e300, -(10**30), 2**63, 2**64]
NONSENSE = [*HUGE, NAN, float("inf"), -1, "", "x", [], {}, object(), 1 + 2j, True, torch.tensor([1, 2]), b"a"]
META, EIGHT_BITS = torch.zeros(2, 2, device="meta"), torch.zeros(2, 2).to(torch.float8_e4m3fn)
NO_STATES = [META, EIGHT_BITS, X.long(), X.bool(), X[:0], X[:, :0], X.to(torch.complex64), X[0, 0], X.to_sparse()]
WRONG: Any = None  # where something else is wanted, as are the next two
NUMBER: Any = 3
ENDLESS: Any = itertools.count()
STEPPING = ["steps", "nfe", "grid", "chart", "start", "stop", "afs"]


def quiet(call):
    """Whether a call gives a result; a typed error is as good, anything else is raised."""
    try:
        call()
    except PfodeError:
        return False
    return True


def described(value):
    return f"{type(value).__name__}"


@pytest.mark.parametrize("value", NONSENSE, ids=described)
@pytest.mark.filterwarnings("ignore::pfode.errors.UnsoundWarning")
def test_nonsense_is_refused_at_once(value):
    common = [
        "seed",
        "batch",
        "guidance",
        "label",
        "device",
        "dtype",
        "shape",
        "sampler",
        "final",
        "nan",
        "plan",
        "strength",
    ]
    for name in [*STEPPING, *common, "eta", "init", "n", "seeds"]:
        rest = {"n": 2, "steps": 3} | ({"sampler": "euler-a"} if name == "eta" else {})
        rest = {key: kept for key, kept in rest.items() if key not in (("steps",) if name in ("nfe", "plan") else ())}
        rest = {key: kept for key, kept in rest.items() if key != "n" or name != "seeds"}
        quiet(lambda name=name, rest=rest: pfode.sample(MIX, **{**rest, name: value}))
    for name in [*STEPPING, "lower_order_final", "guided", "final"]:
        rest = {} if name in ("steps", "nfe") else {"steps": 3}
        quiet(lambda name=name, rest=rest: make_plan("dpm++2m", EDM, **{**rest, name: value}))
        quiet(lambda name=name, rest=rest: pfode.encode(MIX, X, **{**rest, name: value}))
    for name, sampler in (("gamma", "bdia"), ("p", "edict"), ("tau", "sa-solver"), ("churn", "edm"), ("eta", "ddim")):
        quiet(lambda name=name, sampler=sampler: make_plan(sampler, EDM, 3, **{name: value}))
    for name in ("rtol", "atol", "chart", "start", "stop", "max_steps"):
        quiet(lambda name=name: make_adaptive("rk45", EDM, **{name: value}))
    for grid in ("karras", "time", "beta", "cosine", "leading", "linspace", "shifted", "dm_nonuniform", "flow_shift"):
        quiet(lambda grid=grid: getattr(grids, grid)(value))
    quiet(lambda: make_plan(value, EDM, 3))
    quiet(lambda: make_plan("ddim", value, 3))
    quiet(lambda: pfode.run(make_plan("euler-a", EDM, 3), MIX, X, value))
    quiet(lambda: noise.normal([value], 0, [2]))
    quiet(lambda: noise.normal([1], value, [2]))
    for process in (pfode.EDM, pfode.VP, pfode.Flow, pfode.VE, pfode.VPDiscrete):
        quiet(lambda process=process: process(value))


@pytest.mark.parametrize("x", NO_STATES, ids=lambda x: f"{getattr(x, 'dtype', x)}")
def test_what_is_no_state_is_refused(x):
    plan = make_plan("dpm++2m", EDM, 3)
    for call in (
        lambda: pfode.sample(MIX, x=x, steps=3),
        lambda: pfode.sample(MIX, n=2, init=x, steps=3),
        lambda: pfode.encode(MIX, x, steps=3),
        lambda: pfode.decode(MIX, x, steps=3),
        lambda: pfode.encode(MIX, x, steps=3, sampler="o-belm"),
        lambda: pfode.decode(MIX, (x, x), steps=3, sampler="o-belm"),
        lambda: pfode.encode(MIX, x, sampler="rk45"),
    ):
        with pytest.raises(UsageError):
            call()
    if x is not META:  # a plan runs on the meta device: shapes alone
        with pytest.raises(UsageError):
            pfode.run(plan, MIX, x)
        with pytest.raises(UsageError):  # before the first point is asked for
            pfode.iterate(plan, MIX, x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pfode.sample(MIX, n=10**30), r"n: need an integer from 1 to 10000000"),
        (lambda: pfode.sample(MIX, n=10**7, shape=(10**4, 10**4)), "samples of shape|the denoiser makes samples"),
        (lambda: pfode.sample(MIX, steps=10**40), "steps: need an integer from 1 to 100000"),
        (lambda: pfode.sample(MIX, sampler=WRONG), "sampler: need a name or a recipe, got None"),
        (
            lambda: pfode.sample(MIX, n=2, sampler="euler-a", eta=1e300),
            "eta: need a number of at least 0 and at most 1e\\+09",
        ),
        (
            lambda: pfode.sample(MIX, n=2, sampler="dpm++2m-sde", eta=1e6),
            "eta: need a number of at least 0 and at most 100",
        ),
        (lambda: pfode.sample(MIX, n=2, sampler="euler-a", eta=NAN), "eta: need a number"),
        (lambda: pfode.sample(MIX, seeds=ENDLESS), "seeds: need integers"),
        (lambda: pfode.sample(MIX, seed=2**64 - 1, n=2), "seed of the last sample"),
        (lambda: pfode.run(WRONG, MIX, X), "plan: need a Plan"),
        (lambda: pfode.run(make_plan("ddim", EDM, 3), NUMBER, X), "denoiser: need a callable"),
        (lambda: pfode.sample(MIX, n=2, strength=0.5), "strength: says how much noise"),
        (lambda: pfode.sample(MIX, n=2, label="all"), 'label "all": this network has no classes'),
    ],
)
def test_errors_say_what_and_how(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_strength_is_the_share_of_noise():
    made = pfode.sample(MIX, n=2, init=torch.zeros(2), strength=0.5, steps=3)
    assert isinstance(made.plan, pfode.Plan)
    assert made.plan.sigma[0] / (made.plan.sigma[0] + made.plan.alpha[0]) == pytest.approx(0.5)
    assert torch.equal(made.x, pfode.sample(MIX, n=2, init=torch.zeros(2), start=1.0, steps=3).x)


def test_all_labels_are_taken_in_turn():
    class Classes:
        process, shape, labels, seen = EDM, (2,), ("a", "b", "c"), []

        def __call__(self, x, t, **cond):
            self.seen.append(cond["label"].tolist())
            return 0 * x

    net = Classes()
    assert len(pfode.sample(net, steps=1, sampler="ddim", label="all").x) == 3
    pfode.sample(net, n=5, steps=1, sampler="ddim", label="all", batch=3)
    assert net.seen == [[0, 1, 2], [0, 1, 2], [0, 1]]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch.func.jvp
def test_plans_run_inside_transforms_of_torch_func_and_sampling_says_that_it_cannot():
    plan, x = make_plan("dpm++3m", EDM, 4), torch.randn(3, 2, dtype=torch.float64)

    def end(x):
        return pfode.run(plan, MIX, x)

    expected = torch.autograd.functional.jacobian(lambda x: end(x).sum(0), x)
    gradient = torch.func.grad(lambda x: end(x).sum())(x)
    assert torch.allclose(gradient, expected.sum(0))
    tangent = torch.randn_like(x)
    moved = torch.func.jvp(end, (x,), (tangent,))[1]
    assert torch.allclose(moved.sum(0), torch.einsum("ijk,jk->i", expected, tangent))
    each = torch.func.vmap(lambda x: end(x[None])[0])(x)
    assert torch.allclose(each, end(x))
    for name in ("grad", "vmap"):
        transform = getattr(torch.func, name)
        for call in (
            lambda x: pfode.sample(MIX, x=x, steps=3).x.sum(),
            lambda x: torch.stack(list(pfode.encode(MIX, x, steps=3))).sum(),
        ):
            with pytest.raises(UsageError, match=r"pfode.run\(plan"):
                transform(call)(x)
