"""The help pages: every option once and in a group, examples that are right, colours, completion in the shells."""

import io
import re
import shlex
import sys

import click
import pytest

from pfode.chart import CHARTS
from pfode.cli import complete
from pfode.cli.options import COMMANDS, find_command
from pfode.cli.pages import COMPLETION, EXAMPLES, GROUPS, colour_of
from pfode.grids import GRIDS
from pfode.samplers import ADAPTIVE, CATALOGUE


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_stands_on_its_page_once_and_has_a_text(cli, command):
    text = cli(command, "--help").out
    options = text[: text.index("\nExamples:\n")]
    for param in find_command(command).params:
        if isinstance(param, click.Option):
            assert param.help, param.name
            assert len(re.findall(rf"^  (?:-\w, )?{param.opts[0]}\b(?!-)", options, re.M)) == 1, param.opts
    grouped = [key for keys in GROUPS.get(command, {}).values() for key in keys]
    assert len(set(grouped)) == len(grouped)
    if command in GROUPS:
        assert all(f"\n{heading}:\n" in text for heading in GROUPS[command])
    assert "Every command:" in text
    assert "`pfode --help` has the exit codes" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_examples_are_commands_that_parse(cli, command):
    text = cli(*([command] if command else []), "--help").out
    assert len(EXAMPLES[command]) >= 2
    for line, what in EXAMPLES[command]:
        assert f"  {line}\n      {what}\n" in text
        program, name, *words = shlex.split(line)
        assert program == "pfode"
        if words != ["--help"]:
            find_command(name).make_context(name, words)


def test_colour_is_for_terminals_that_want_it(cli, monkeypatch):
    assert "\x1b" not in cli("sample", "--help").out
    for environment, coloured in (
        ({}, True),
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": ""}, True),
        ({"TERM": "dumb"}, False),
    ):
        screen = {"stdout": Terminal(), "stderr": Terminal()}
        with monkeypatch.context() as patched:
            patched.delenv("NO_COLOR", raising=False)
            patched.setenv("TERM", "xterm")
            for name, value in environment.items():
                patched.setenv(name, value)
            for name, stream in screen.items():
                patched.setattr(sys, name, stream)
            from pfode.cli.__main__ import main

            for words in (["sample", "--help"], [], ["sample", "--stepz", "3"]):
                with pytest.raises(SystemExit):
                    main(words)
        assert ("\x1b[1mGuidance\x1b[0m:" in screen["stdout"].getvalue()) is coloured
        assert ("\x1b[1mCommands\x1b[0m:" in screen["stdout"].getvalue()) is coloured
        assert screen["stderr"].getvalue().startswith("\x1b[" if coloured else "pfode: error: ")
        assert colour_of(environment) is (None if coloured else False)


def completed(monkeypatch, capsys, shell: str, words: str) -> list[str]:
    from pfode.cli.__main__ import main

    with monkeypatch.context() as patched:
        patched.setenv("_PFODE_COMPLETE", f"{shell}_complete")
        patched.setenv("COMP_WORDS", words)
        patched.setenv("COMP_CWORD", str(len(words.split(" ")) - 1) if shell != "fish" else words.split(" ")[-1])
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main([])
    lines = capsys.readouterr().out.splitlines()
    return [line.partition(",")[2] for line in lines] if shell == "bash" else lines


@pytest.mark.parametrize(
    ("words", "some"),
    [
        ("pfode sa", ["sample", "samplers"]),
        ("pfode sample --guid", ["--guidance", "--guidance-interval", "--guidance-rescale"]),
        ("pfode sample --sampler unipc3", ["unipc3", "unipc3-bh1"]),
        ("pfode sample --sampler rk4", ["rk4", "rk45"]),
        ("pfode fit --start dpm++3m", ["dpm++3m", "dpm++3m-exact", "dpm++3m-sde"]),
        ("pfode bench --model digi", ["digits"]),
        ("pfode sample --grid ay", ["ays-sd", "ays-sdxl", "ays-svd"]),
        ("pfode sample --chart d", ["ddim", "deis", "dpm", "dpm++", "dpm3"]),
        ("pfode sample --device c", ["cpu", "cuda"]),
        ("pfode sample --preview s", ["sixel"]),
        ("pfode sample --dtype f", ["fp32", "fp16", "fp64"]),
        ("pfode info mod", ["models"]),
        ("pfode samplers sa-", ["sa-solver", "sa-solver2"]),
        ("pfode train --data d", ["digits"]),
    ],
)
def test_a_shell_completes_commands_options_and_values(cli, monkeypatch, capsys, words, some):
    found = completed(monkeypatch, capsys, "bash", words)
    assert set(some) <= set(found), found
    begun = words.split(" ")[-1]
    assert all(one.startswith(begun) for one in found)


def test_files_complete_where_they_stand(cli, monkeypatch, capsys):
    for words in ("pfode sample --out a", "pfode sample --like a", "pfode sample --model a", "pfode convert a"):
        assert "a" in completed(monkeypatch, capsys, "bash", words)  # the shell is asked for files that begin so
    assert "file,unipc,\n" not in completed(monkeypatch, capsys, "bash", "pfode sample --grid unipc")


@pytest.mark.parametrize("shell", COMPLETION)
def test_the_lines_for_the_shells_are_those_that_work(cli, monkeypatch, capsys, shell):
    assert COMPLETION[shell] in cli("--help").out
    name, value = re.search(r"(_PFODE_COMPLETE)=(\w+)", COMPLETION[shell]).groups()  # type: ignore[union-attr]
    from pfode.cli.__main__ import main

    monkeypatch.setenv(name, value)
    if shell == "bash":
        monkeypatch.setattr("click.shell_completion.BashComplete._check_version", lambda *_: None)
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        main([])
    assert done.value.code == 0
    assert f"{shell}_complete" in capsys.readouterr().out


def test_what_is_completed_is_what_there_is():
    assert set(complete.samplers()) == {"auto", *CATALOGUE, *ADAPTIVE}
    assert set(complete.GRIDS) == set(GRIDS)
    assert set(complete.CHARTS) == set(CHARTS)
    assert tuple(ADAPTIVE) == complete.ADAPTIVE


def test_suggestions_are_near_or_not_made(cli):
    for words, near in (
        (("sample", "--sampler", "hoen"), "heun"),
        (("sample", "--sampler", "frobnicate"), None),
        (("sample", "--model", "avatar"), "avatars"),
        (("sample", "--model", "qwerty"), None),
        (("sample", "--model", "avatars", "--label", "robo"), "robot"),
        (("sample", "--model", "avatars", "--label", "xyzzy"), None),
        (("smaple",), "sample"),
        (("frobnicate",), None),
        (("sample", "--guidence", "2"), "--guidance"),
        (("sample", "--zzzz", "2"), None),
    ):
        run = cli(*words)
        assert run.code == 2
        assert (f"'{near}'" in run.err) if near else "did you mean" not in run.err, run.err


def test_a_fit_says_what_its_ratios_are_of(cli):
    run = cli(
        "fit", "--model", "digits", "--nfe", 2, "--n", 8, "--check", 8, "--active", 8, "--iterations", 1, "--teacher", 8
    )
    head, row = run.out.splitlines()
    assert re.split(r"  +", head) == ["NFE", "rms", "rms / start", "median", "median / start", "file"]
    assert row.split()[0] == "2"
