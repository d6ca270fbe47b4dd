"""Names of files: bytes of any kind, pipes, devices, links, `~`; and what is suggested for a wrong one."""

import os
import sys
import threading

import pytest
from PIL import Image

from pfode.scores.io.shipped import shipped

DRAW = ("sample", "--steps", 1, "--n", 1, "--quiet")
ODD = ["a\nb", "c\x1b[2J", "d\udcff\udcfe", "e\tf g", "ü"]


def one_line(run, code: int) -> None:
    assert run.code == code, run.err
    lines = run.err.splitlines()
    assert len(lines) <= 2
    assert all(line.isprintable() for line in lines)
    assert "Traceback" not in run.err


@pytest.mark.skipif(sys.platform != "linux", reason="file systems elsewhere refuse some of them")
@pytest.mark.parametrize("name", ODD)
def test_odd_names_of_what_is_written_are_found_again(cli, tmp_path, name):
    json = ("--json",) if "\udcff" in name else ()  # whose bytes pytest's own capture cannot take
    for words in (("--out", f"{name}.png"), ("--out", f"{name}.png", "--json"), ("--separate", name)):
        assert cli(*DRAW, *words, *json).code == 0
    for file in (f"{name}.png", f"{name}/000000.png"):
        run = cli("info", file)
        one_line(run, 0)
        assert run.out.startswith("file ")
        assert all(line.isprintable() for line in run.out.splitlines())
    assert cli(*DRAW, "--like", f"{name}.png").code == 0
    assert (tmp_path / f"{name}.png").is_file()


@pytest.mark.skipif(sys.platform != "linux", reason="file systems elsewhere refuse some of them")
@pytest.mark.parametrize("name", ODD[:3])
def test_odd_names_of_what_is_read_are_read_or_refused(cli, tmp_path, name):
    (tmp_path / f"{name}.safetensors").write_bytes(shipped()["digits"].read_bytes())
    Image.new("L", (4, 4)).save(tmp_path / f"{name}.png")
    one_line(cli("info", f"{name}.safetensors"), 0)
    one_line(cli(*DRAW, "--model", f"{name}.safetensors"), 2)
    one_line(cli(*DRAW, "--init", f"{name}.png"), 2)
    one_line(cli("info", f"{name}.png"), 3)
    one_line(cli("convert", f"{name}.safetensors", f"out{name}.safetensors", "--json"), 0)
    one_line(cli("info", f"out{name}.safetensors", "--verify"), 0)
    one_line(cli(*DRAW, "--model", f"missing{name}"), 2)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("info", "p.safetensors"), 3),
        (("info", "p.png"), 3),
        ((*DRAW, "--model", "p.safetensors"), 3),
        (("sample", "--sampler", "p.safetensors"), 3),
        ((*DRAW, "--like", "p.png"), 3),
        ((*DRAW, "--init", "p.png"), 3),
        ((*DRAW, "--config", "p.png"), 3),
        ((*DRAW, "--out", "p.png"), 7),
        ((*DRAW, "--trajectory", "p.png", "--out", "x.png"), 7),
        ((*DRAW, "--separate", "p.png"), 7),
        (("convert", "digits", "p.safetensors"), 7),
        (("train", "--data", "p.safetensors"), 3),
        (("train", "--font", "p.png", "--data", "emoji"), (3, 4)),
        (("bench", "--model", "gaussian-2", "--truth", "p.png"), 3),
        (("bench", "--model", "gaussian-2", "--features", "p.png"), 3),
        (("fit", "--model", "digits", "--start", "p.safetensors"), 3),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_pipes_are_neither_waited_for_nor_replaced(cli, tmp_path, words, code):
    for name in ("p.png", "p.safetensors"):
        os.mkfifo(tmp_path / name)
    late = threading.Timer(20, lambda: [os.close(os.open(tmp_path / n, os.O_RDWR)) for n in ("p.png", "p.safetensors")])
    late.start()  # a command that waits would wait for ever
    try:
        run = cli(*words)
    finally:
        waited = not late.is_alive()
        late.cancel()
    assert not waited
    one_line(run, run.code)
    assert run.code in (code if isinstance(code, tuple) else (code,)), run.err
    assert (tmp_path / "p.png").is_fifo()
    assert (tmp_path / "p.safetensors").is_fifo()


def test_a_link_is_written_through_and_a_device_is_left(cli, tmp_path):
    (tmp_path / "real.png").touch(mode=0o600)
    os.symlink("real.png", tmp_path / "link.png")
    os.symlink("/dev/null", tmp_path / "null.png")
    assert cli(*DRAW, "--out", "link.png").code == 0
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "real.png").stat().st_mode & 0o777 == 0o600
    assert cli("info", "real.png").code == 0
    one_line(cli(*DRAW, "--out", "null.png"), 7)
    assert (tmp_path / "null.png").is_symlink()


def test_the_home_folder_in_files_variables_and_words(cli, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    (tmp_path / "pfode.toml").write_text('[tool.pfode]\nout = "~/a.png"\n')
    assert cli(*DRAW).code == 0
    monkeypatch.setenv("PFODE_OUT", "~/b.png")
    assert cli(*DRAW).code == 0
    assert cli(*DRAW, "--out=~/c.png").code == 0
    assert {path.name for path in home.iterdir()} == {"a.png", "b.png", "c.png"}
    assert cli("info", "~/c.png").code == 0


@pytest.mark.parametrize("option", ["--out", "--model", "--like", "--init", "--separate", "--config", "--sampler"])
def test_an_empty_name(cli, tmp_path, option):
    one_line(cli("sample", option, ""), 2)
    assert not list(tmp_path.iterdir())


def test_a_misspelt_variable_is_said(cli, monkeypatch):
    monkeypatch.setenv("PFODE_STEPZ", "3")
    monkeypatch.setenv("PFODE_SIGMA_DATA", "0.4")  # of another command
    run = cli("sample", "--n", 1, "--steps", 1)
    assert run.code == 0
    assert run.err.splitlines()[0] == "PFODE_STEPZ belongs to no option: did you mean 'steps'?"
    assert "PFODE_SIGMA_DATA" not in run.err
    assert "PFODE_STEPZ" in cli("info", "config").err
    assert "PFODE_STEPZ" not in cli("sample", "--n", 1, "--steps", 1, "--quiet").err


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("sample", "--stepz", 3), "did you mean '--steps'?"),
        (("sample", "--lable", 3), "did you mean '--label'?"),
        (("sample", "--qwertyuiop", 3), "`pfode sample --help` lists the options"),
        (("sample", "--sampler", "DPM++2M-SDE-x"), "did you mean 'dpm++2m-sde'"),
        (("xyz",), "known: bench, convert, fit, info, likelihood, reflow, sample, samplers, train"),
    ],
)
def test_near_names_are_suggested_and_no_others(cli, words, hint):
    run = cli(*words)
    assert run.code == 2
    assert hint in run.err.splitlines()[1]


def test_no_walls_of_names(cli):
    for words in (("sample", "--sampler", "zzzz"), ("samplers", "zzzz"), ("sample", "--grid", "q"), ("info", "z.png")):
        run = cli(*words)
        one_line(run, 3 if "z.png" in words else 2)
        assert max(map(len, run.err.splitlines())) < 200
        assert "did you mean" not in run.err
    assert len(cli("sample", "--sampler", "x" * 5000).err) < 300


def test_guidance_alone_takes_every_class(cli, monkeypatch):
    from pfode.cli.sample import command

    monkeypatch.setattr(next(p for p in command.params if p.name == "label"), "default", None)
    run = cli("sample", "--guidance", 2, "--steps", 1, "--json")
    assert run.code == 0, run.err
    assert (run.json["n"], run.json["evals"], run.json["settings"]["options"]["label"]) == (40, 2, "all")
