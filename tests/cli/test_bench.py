"""`pfode bench`: the folder it writes, going on, what it says; the figure and the report."""

import io
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image

import pfode
from pfode.cli import plot, report
from tests.held import held

SMALL = ("--n", 16, "--validation", 8, "--nfe", "3,5", "--out", "b")
TEXTS = ("--sampler", "auto", "--sampler", "dpm++2m?grid=karras/cosine")


@pytest.fixture
def made(cli):
    done = cli("bench", "--model", "mixture-4", *TEXTS, *SMALL, "--json")
    assert done.code == 0, done.err
    return done.json


def test_the_folder(cli, made, tmp_path):
    files = ["report.html", "table.md", "quality.svg", "quality.png", "results.json"]
    assert made["files"] == [f"b/{name}" for name in files]
    assert made["cells"] == 4
    assert set(made["best"]) == {"3", "5"}
    assert all((tmp_path / name).stat().st_size > 500 for name in made["files"])
    before = {name: (tmp_path / name).read_bytes() for name in made["files"]}
    assert cli("bench", "--model", "mixture-4", *TEXTS, *SMALL).out == "b/report.html\n"
    assert {name: (tmp_path / name).read_bytes() for name in made["files"]} == before
    refused = cli("bench", "--model", "mixture-4", *TEXTS, *SMALL, "--seed", 3)
    assert refused.code == 2
    assert "seed is 1000000000 there, 3 here" in refused.err
    assert cli("bench", "--model", "mixture-4", *TEXTS, *SMALL, "--seed", 3, "--overwrite").code == 0


def test_the_report_needs_nothing_beside_it_and_says_first_what_to_use(made, tmp_path):
    page = (tmp_path / "b/report.html").read_text()
    assert not re.findall(
        r"""(?:src|href)=["'](?!data:)|@import|url\(|<script|https?://(?!www\.w3\.org/2000/svg)""", page
    )
    assert "prefers-color-scheme:dark" in page
    body = re.sub(r"<[^>]+>", " ", page.split("<main>")[1])
    assert body.index("Which sampler to use") < 60
    best = report.label(made["best"]["5"])
    assert re.search(rf"<td>5</td><td><b>{re.escape(best)}</b>", page)
    assert "bootstrap bands" in page


def test_the_figure_is_svg_and_png_of_one_shape(made, tmp_path):
    root = ET.fromstring((tmp_path / "b/quality.svg").read_text())
    *_, width, height = map(float, root.attrib["viewBox"].split())
    with Image.open(io.BytesIO((tmp_path / "b/quality.png").read_bytes())) as picture:
        assert picture.size == (round(2 * width), round(2 * height))
    titles = [found.text for found in root.iter() if found.tag.endswith("title")]
    assert any(text and text.startswith("auto, 3 evaluations") for text in titles)


def test_the_table_marks_the_best(made, tmp_path):
    text = (tmp_path / "b/table.md").read_text()
    lines = text.split("RMS error by")[1].split("median")[0].splitlines()[2:]
    rows = [line.split("|")[2:-1] for line in lines if "|" in line]
    for column in list(zip(*rows[2:], strict=True)):
        values = [float(cell.strip(" *")) for cell in column]
        assert "**" in column[values.index(min(values))]


def test_strips_of_a_network_with_its_classes(cli, tmp_path):
    done = cli("bench", "--model", "digits", "--sampler", "ddim", "--n", 7, "--nfe", 4, "--teacher", 32, "--out", "b")
    assert done.code == 0, done.err
    page = (tmp_path / "b/report.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 2  # converged, ddim


MODULE = """
import torch, pfode
class Mine:
    process, shape = pfode.EDM(), (2,)
    def __call__(self, x, t, **cond):
        return x / (1 + t**2)
def make():
    return Mine()
def halves(x):
    return x.flatten(1)[:, :1]
number = 3
"""


def test_a_denoiser_and_features_of_your_own(cli, tmp_path):
    (tmp_path / "my_bed.py").write_text(MODULE)
    words = ("--sampler", "ddim", "--n", 4, "--nfe", 3, "--out", "b")
    done = cli("bench", "--model", "my_bed:make", "--features", "my_bed:halves", *words)
    assert done.code == 0, done.err
    assert cli("bench", "--model", "my_bed:Mine", *words, "--overwrite").code == 0
    for name, match in (("my_bed:number", "no denoiser"), ("my_bed:none", "none"), ("no_such:x", "no module")):
        wrong = cli("bench", "--model", name, *words)
        assert (wrong.code, match in wrong.err) == (2, True), wrong.err


def test_true_pictures_give_distances_of_a_network(cli, tmp_path):
    words = ("--sampler", "ddim", "--n", 8, "--nfe", 3, "--teacher", 0, "--out", "b")
    done = cli("bench", "--model", "digits", "--truth", "digits", *words, "--json")
    assert done.code == 0, done.err
    text = (tmp_path / "b/table.md").read_text()
    assert "energy distance by" in text
    assert "RMS error by" not in text


@pytest.mark.parametrize(
    ("words", "code", "match"),
    [
        (("--model", "no-such"), 2, "unknown test bed"),
        (("--model", "x.safetensors"), 3, "no such file"),
        (("--sampler", "dpm++9m"), 2, "unknown sampler"),
        (("--sampler", "ddim?grid"), 2, "cannot read"),
        (("--sampler", "ddim?grid=kerras"), 2, "unknown grid 'kerras'"),
        (("--sampler", "ddim?grid=best/kerras"), 2, "unknown grid 'kerras'"),
        (("--sampler", "ddim?tau=1"), 2, "unknown option of ddim 'tau'"),
        (("--sampler", "auto?taw=1"), 2, "unknown option of auto 'taw'"),
        (("--sampler", "ddim?chart=trigg"), 2, "unknown chart 'trigg'"),
        (("--sampler", "diffusers:Nope"), 2, "unknown scheduler of diffusers 'Nope'"),
        (("--sampler", "k-diffusion:nope"), 2, "unknown sampler of k-diffusion 'nope'"),
        (("--nfe", "3,x"), 2, "whole numbers"),
        (("--nfe", "0"), 2, "evals"),
        (("--truth", "nothing"), 2, "no such file or data set"),
        (("--features", "nothing.pt"), 3, "TorchScript"),
        (("--out", "/proc/none"), 7, "cannot be made"),
        (("--out", "file"), 7, "cannot be made"),
        (("--model", "broken_syntax:x"), 2, "broken_syntax:x: SyntaxError: "),
        (("--model", "broken_maker:x"), 2, "broken_maker:x: RuntimeError: boom"),
    ],
)
def test_errors(cli, tmp_path, words, code, match):
    (tmp_path / "file").touch()
    (tmp_path / "broken_syntax.py").write_text("def (")
    (tmp_path / "broken_maker.py").write_text("def x():\n    raise RuntimeError('boom')\n")
    given = ("--model", "gaussian-2") if "--model" not in words else ()
    done = cli("bench", *given, "--n", 4, "--sampler", "ddim", *words)
    assert (done.code, match in done.err) == (code, True), done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "bench" / "results.jsonl").exists()


def test_what_cannot_be_is_left_out_and_said(cli):
    pfode.make_plan("ddim", pfode.EDM(), 4).save("four.safetensors")
    done = cli(
        "bench", "--model", "gaussian-2", "--sampler", "four.safetensors", "--n", 4, "--nfe", "4,5", "--out", "b"
    )
    assert done.code == 0
    assert "left out: four.safetensors at 5 on gaussian-2" in done.err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("auto", "auto"),
        ("unipc2?chart=dpm++/flow&grid=best", "unipc2 (dpm++/flow)"),
        ("plans/six.safetensors", "six.safetensors"),
        ("diffusers:UniPCMultistepScheduler?solver_order=2/3&grid=best", "diffusers UniPC (order=2/3)"),
        ("k-diffusion:sample_lms", "k-diffusion lms"),
    ],
)
def test_labels(text, shown):
    assert report.label(text) == shown


def test_ticks_are_round_and_few():
    for low, high in ((-3.2, 0.1), (-0.9, -0.6), (-8.0, 2.0)):
        found = plot._ticks(low, high)
        assert 2 <= len(found) <= 11
        assert all(low <= torch.tensor(value).log10().item() + 1e-6 and value <= 10**high for value in found)


def test_one_name_in_the_configuration_is_for_all_commands(cli, tmp_path):
    """`sample` takes one model and one sampler, `bench` several."""
    (tmp_path / "pfode.toml").write_text('[tool.pfode]\nmodel = "digits"\nsampler = "ddim"\nnfe = 3\n')
    done = cli("bench", "--n", 2, "--validation", 2, "--teacher", 2, "--json")
    assert (done.code, done.json["cells"], done.json["best"]) == (0, 1, {"3": "ddim"}), done.err
    found = cli("info", "config", "--json").json["bench"]
    assert found["model"] == {"value": ["digits"], "source": "pfode.toml"}
    assert found["teacher"] == {"value": 512, "source": "default"}


def test_what_the_configuration_has_for_others_is_shown_though_bench_refuses_it(cli, tmp_path):
    (tmp_path / "pfode.toml").write_text("[tool.pfode]\nn = 1\n")
    found = cli("info", "config", "--json").json
    assert found["sample"]["n"] == {"value": 1, "source": "pfode.toml"}
    assert found["bench"] == {"error": "pfode.toml: Invalid value for '--n': 1 is not in the range x>=2."}
    assert "[bench]  pfode.toml: Invalid value" in cli("info", "config").out


def test_a_damaged_picture_is_said_by_its_file(cli, tmp_path):
    words = ("bench", "--model", "digits", "--sampler", "ddim", "--n", 4, "--nfe", 3, "--teacher", 8, "--out", "b")
    assert cli(*words).code == 0
    (file,) = (tmp_path / "b/cache").rglob("ddim*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 4
    file.write_bytes(raw)
    done = cli(*words)
    assert (done.code, file.name in done.err) == (3, True), done.err


def test_a_second_run_in_the_folder_is_told_so(cli, tmp_path):
    (tmp_path / "b").mkdir()
    words = ("bench", "--model", "gaussian-2", "--sampler", "ddim", "--n", 4, "--nfe", 3, "--out", "b")
    with held(tmp_path / "b"):
        done = cli(*words)
    assert (done.code, "another bench is working in it" in done.err) == (2, True), done.err
    assert not list((tmp_path / "b").iterdir())
    assert cli(*words).code == 0


BROKEN = """
import torch, pfode

class Raising(torch.nn.Module):
    def forward(self, x, c_noise, **cond):
        raise ValueError("no such layer")

class Picky:
    process, shape = pfode.EDM(), (2,)
    def __call__(self, x, t, **cond):
        if t < 1:
            raise KeyError("below")
        return 0 * x

class Single:
    process, shape = pfode.EDM(), (3,)
    def __init__(self):
        self.layer = torch.nn.Linear(3, 3)
    def __call__(self, x, t, **cond):
        return 0.1 * self.layer(x)  # float32 alone

def raising():
    return pfode.scores.Denoiser(Raising(), pfode.EDM(), "edm", shape=(2,))

def features(x):
    return x.no_such_method()

def flat(x):
    return 3
"""


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--model", "mine:raising"), "model 'mine:raising' raised ValueError: no such layer"),
        (("--model", "mine:Picky"), "model 'mine:Picky' raised KeyError: 'below'"),
        (("--model", "mine:Picky", "--teacher", 0), "model 'mine:Picky' raised KeyError: 'below'"),
        (
            ("--model", "mine:Picky", "--teacher", 0, "--sampler", "k-diffusion:sample_heun"),
            "model 'mine:Picky' raised KeyError: 'below'",
        ),
        (("--model", "gaussian-2", "--features", "mine:features"), "the function of features raised AttributeError"),
        (("--model", "gaussian-2", "--features", "mine:flat"), "features: need a tensor of shape (6, d), got int"),
    ],
)
def test_what_raises_inside_a_network_of_your_own(cli, tmp_path, words, match):
    """It is neither our bug nor a cell left out."""
    (tmp_path / "mine.py").write_text(BROKEN)
    sampler = () if "--sampler" in words else ("--sampler", "ddim")
    done = cli("bench", *words, *sampler, "--n", 6, "--nfe", 4, "--out", "b")
    assert (done.code, match in done.err) == (2, True), done.err
    assert "this is a bug" not in done.err
    assert "hint" in done.err


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
def test_peers_on_a_float32_network_of_your_own(cli, tmp_path):
    (tmp_path / "mine.py").write_text(BROKEN)
    texts = ("ipndm2", "diffusers:UniPCMultistepScheduler", "k-diffusion:sample_dpmpp_2m", "k-diffusion:sample_heun")
    samplers = [word for text in texts for word in ("--sampler", text)]
    done = cli("bench", "--model", "mine:Single", *samplers, "--n", 6, "--nfe", 5, "--out", "b", "--json")
    assert (done.code, done.json["cells"]) == (0, 4), done.err
    assert "left out" not in done.err


def test_what_is_left_out_of_the_truth_is_counted(cli, tmp_path):
    (tmp_path / "d").mkdir()
    for name in ("1.png", "2.png", ".hidden.png"):
        Image.fromarray(np.full((8, 8), 60000, np.uint16)).save(tmp_path / "d" / name)
    (tmp_path / "d" / "notes.txt").write_text("")
    done = cli("bench", "--model", "digits", "--truth", "d", "--n", 2, "--nfe", "1", "--sampler", "nothing")
    assert "left out: 1 hidden files" in done.err
    assert "left out: 1 files that are no pictures" in done.err
