"""What nothing can be measured with: a typed error at once, never a silent figure."""

import math

import pytest
import torch

import pfode
from pfode.errors import DenoiserError, PfodeError, UsageError
from pfode.samplers.measure import metrics
from pfode.samplers.measure.bench import bench
from pfode.samplers.measure.problem import Problem
from pfode.samplers.measure.spec import Spec
from pfode.scores.beds import bed

BIG, NAN = 10**30, math.nan
MIXTURE = bed("mixture-4")
X, Y = torch.linspace(0, 1, 60).reshape(20, 3), torch.linspace(0, 2, 60).reshape(20, 3)
TWO_SETS = (
    metrics.energy_distance,
    metrics.sliced_wasserstein,
    metrics.frechet_distance,
    metrics.kernel_distance,
    metrics.precision_recall,
    metrics.end_point,
)


@pytest.mark.parametrize("metric", TWO_SETS)
@pytest.mark.parametrize(
    "x",
    [
        NAN * X,
        math.inf * X,
        1e150 * X.double(),
        X[:0],
        X[:1],
        X[:, :0],
        X[:, :2],
        X[:, 0],
        X[0, 0],
        X + 0j,
        None,
        [1.0],
    ],
    ids=["nan", "inf", "huge", "empty", "one", "no-d", "other-d", "flat", "0-d", "complex", "none", "list"],
)
def test_metrics_of_what_are_no_samples(metric, x):
    with pytest.raises(UsageError):
        metric(x, Y)


@pytest.mark.parametrize("metric", [metrics.energy_distance, metrics.kernel_distance, metrics.precision_recall])
def test_all_pairs_of_too_many(metric):
    many = torch.zeros(8193, 1)
    with pytest.raises(UsageError, match="at most 8192"):
        metric(many, many)


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.sliced_wasserstein(X, Y, p=0),
        lambda: metrics.sliced_wasserstein(X, Y, p=NAN),
        lambda: metrics.sliced_wasserstein(X, Y, projections=BIG),
        lambda: metrics.sliced_wasserstein(X, Y, seed=-1),
        lambda: metrics.precision_recall(X, Y, k=20),
        lambda: metrics.end_point(X, Y, peak=0),
        lambda: metrics.end_point(X, Y, seed=BIG),
        lambda: metrics.energy_distance(X, Y, seed=NAN),  # type: ignore[arg-type]
        lambda: metrics.typical_distance(X[:1]),
        lambda: metrics.mode_distance(X, Y[0, :2]),
        lambda: metrics.mode_distance(X[:0], Y[0]),
    ],
)
def test_options_of_metrics(call):
    with pytest.raises(UsageError):
        call()


def test_end_points_that_do_not_vary_have_no_psnr():
    assert metrics.end_point(X, torch.ones_like(X)).psnr == math.inf


@pytest.mark.parametrize("key", ["n", "validation", "teacher", "seed", "batch"])
@pytest.mark.parametrize("value", [-1, BIG, NAN, "x", None, 2.5, True])
def test_sizes_of_a_problem(key, value):
    if (key, value) == ("batch", BIG):
        value = 0  # so many at a time are all at once
    with pytest.raises(UsageError, match=f"{key}: need an integer"):
        Problem(**{"name": "m", "denoiser": MIXTURE, key: value})


@pytest.mark.parametrize(
    "options",
    [
        {"n": 1},
        {"name": ""},
        {"name": "two\nlines"},
        {"name": 3},
        {"truth": torch.zeros(3, 3)},
        {"truth": torch.zeros(1, 4)},
        {"truth": torch.full((9, 4), NAN)},
        {"truth": torch.zeros(9, 4).long()},
        {"truth": 3},
        {"features": 3},
    ],
)
def test_what_is_no_problem(options):
    with pytest.raises(UsageError):
        Problem(**{"name": "m", "denoiser": MIXTURE, **options})


class Net:
    """A denoiser of two dimensions around any function."""

    process = pfode.EDM()

    def __init__(self, function, shape=(2,)):
        self.function, self.shape = function, shape

    def __call__(self, x, t, **cond):
        return self.function(x)


@pytest.mark.parametrize("shape", [(), None, (0,), (-1,), "x", (BIG,), (2.5,), 4])
def test_shapes_that_no_sample_has(shape):
    with pytest.raises(UsageError, match=r"shape|n: need"):
        Problem("m", Net(lambda x: x, shape))


@pytest.mark.parametrize("teacher", [0, 16])
@pytest.mark.parametrize(
    "function", [lambda x: x[:, :1], lambda x: torch.cat([x, x], 1), lambda x: None, lambda x: x[:1], lambda x: 1 / 0]
)
@pytest.mark.parametrize("sampler", ["ddim", "k-diffusion:sample_heun"])
def test_a_network_of_another_kind_ends_the_run(tmp_path, teacher, function, sampler):
    with pytest.raises(UsageError, match=r"denoiser|model 'm'"):
        bench([(Problem("m", Net(function), n=6, teacher=teacher), [sampler])], tmp_path, [4])


@pytest.mark.parametrize("features", [lambda x: NAN * x, lambda x: x[:1], lambda x: x[:, :0], lambda x: x.sum(1)])
def test_features_of_another_kind(tmp_path, features):
    with pytest.raises(DenoiserError, match="features"):
        bench([(Problem("m", MIXTURE, n=6, teacher=8, features=features), ["ddim"])], tmp_path, [4])


def cells(tmp_path, samplers, evals=(3,), **options):
    sizes = {"n": 8, "validation": 4, "teacher": 16}
    return bench([(Problem("m", MIXTURE, **{**sizes, **options}), samplers)], tmp_path, evals)["cells"]


@pytest.mark.parametrize("evals", [[0], [BIG], [NAN], ["x"], None, 3, "34", [2.5], [True]])
def test_evaluations(tmp_path, evals):
    with pytest.raises(UsageError, match="evals"):
        cells(tmp_path / "out", ["ddim"], evals)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "samplers",
    [
        None,
        "ddim",
        [3],
        [None],
        [""],
        ["ddim\n"],
        ["rk45"],
        ["ddim?steps=3"],
        ["ddim?process=1"],
        ["ddim?grid=time(nan)"],
        [f"ddim?chart={'/'.join(map(str, range(300)))}"],
        ["ddim?" + "&".join(f"a{i}=1/2/3" for i in range(20))],
        ["diffusers:"],
        [":"],
    ],
)
def test_samplers(tmp_path, samplers):
    with pytest.raises(UsageError):
        cells(tmp_path / "out", samplers)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
@pytest.mark.parametrize(
    "sampler",
    [
        "ddim?eta=nan",
        "ddim?eta=-1",
        "ddim?start=1e9",
        "ddim?grid=gits&coefficient=0",
        "diffusers:DPMSolverMultistepScheduler?num_train_timesteps=1000000000000",
        "diffusers:DPMSolverMultistepScheduler?solver_order=nan",
        "k-diffusion:sample_heun?s_churn=nan",
        "k-diffusion:sample_heun?model=1",
    ],
)
def test_options_that_cannot_be_are_left_out_and_said(tmp_path, sampler):
    (cell,) = cells(tmp_path, [sampler])
    assert cell["skipped"]


def test_what_repeats_is_measured_once(tmp_path):
    found = cells(tmp_path, ["ddim", "unipc2", "ddim", "unipc"], [3, 4, 3])
    assert len(found) == 6  # an alias is another text, of the same figures
    figures = {(c["sampler"], c["evals"]): c["rms"] for c in found}
    assert all(figures["unipc", k] == figures["unipc2", k] for k in (3, 4))
    with pytest.raises(UsageError, match="two problems are called 'm'"):
        bench([(Problem("m", MIXTURE), ["ddim"])] * 2, tmp_path / "two", [3])
    assert len(Spec.parse("ddim?grid=karras/karras&chart=ddim/trig").alternatives(pfode.EDM())) == 2


def test_neither_the_batch_nor_the_order_of_samplers_matters(tmp_path):
    texts = ["dpm++2m?grid=karras/cosine", "k-diffusion:sample_dpmpp_2m_sde", "ipndm2?grid=gits", "euler-a"]
    orders = [texts, texts[::-1], [*texts[2:], *texts[:2]]]
    batches = [{"batch": 256}, {"batch": 3}, {"batch": 1}]
    found = [cells(tmp_path / str(i), order, **batches[i]) for i, order in enumerate(orders)]
    assert found[0] == found[1] == found[2]
    assert not any("skipped" in cell for cell in found[0])


@pytest.mark.parametrize("n", [2, 3, 5])
def test_few_samples(tmp_path, n):
    (cell,) = cells(tmp_path, ["ddim"], n=n)
    assert ("precision" in cell) == (n > 3)
    assert math.isfinite(cell["energy"][0])


def test_a_folder_of_plans_is_looked_through_only_so_far(tmp_path, monkeypatch):
    from pfode.samplers.measure import spec

    monkeypatch.setattr(spec, "MOST_FILES", 3)
    for i in range(4):
        (tmp_path / f"{i}.safetensors").touch()
    with pytest.raises(PfodeError, match="more than 3 files"):
        spec.load_plans(str(tmp_path))
