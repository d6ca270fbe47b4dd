"""Python code of others runs where the command line names it, and nowhere else."""

import os
import subprocess
import sys

import pytest

CODE = """
import pathlib, torch, pfode
pathlib.Path("ran").touch()
class x:
    process, shape = pfode.EDM(), (2,)
    def __call__(self, y, t, **cond):
        return y / (1 + t**2)
def features(x):
    return x.flatten(1)
"""
BENCH = ("bench", "--sampler", "ddim", "--n", 4, "--nfe", 3, "--validation", 2, "--teacher", 0, "--out", "b")


@pytest.fixture
def evil(tmp_path):
    """Whether the module `evil` of the working folder has run."""
    (tmp_path / "evil.py").write_text(CODE)
    sys.modules.pop("evil", None)
    yield lambda: (tmp_path / "ran").exists()
    sys.modules.pop("evil", None)


@pytest.mark.parametrize("file", ["pfode.toml", "other.toml"])
@pytest.mark.parametrize(
    "text",
    [
        '[tool.pfode.bench]\nmodel = ["evil:x"]',
        '[tool.pfode]\nmodel = "evil:x"',
        '[tool.pfode.bench]\nmodel = ["gaussian-2", "evil:x"]',
        '[tool.pfode.bench]\nmodel = ["gaussian-2"]\nfeatures = "evil:features"',
        '[tool.pfode.bench]\nmodel = ["gaussian-2"]\nfeatures = "script.pt"',
    ],
)
def test_a_configuration_file_runs_nothing(cli, evil, tmp_path, file, text):
    (tmp_path / file).write_text(text)
    done = cli(*BENCH, *(("--config", file) if file == "other.toml" else ()))
    assert (done.code, len(done.err.splitlines())) == (3, 2)
    assert f"{file}: " in done.err
    assert "would run Python code" in done.err
    assert "--trust-python" in done.err
    assert not evil()
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("name", "value"), [("PFODE_MODEL", "evil:x"), ("PFODE_FEATURES", "evil:features")])
def test_a_variable_runs_nothing(cli, evil, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("PFODE_TRUST_PYTHON", "1")
    done = cli(*BENCH, *(() if name == "PFODE_MODEL" else ("--model", "gaussian-2")))
    assert done.code == 2
    assert f"{name}: '{value}' would run Python code" in done.err
    assert not evil()


@pytest.mark.parametrize("key", ["trust_python", "trust-python"])
@pytest.mark.parametrize("table", ["[tool.pfode]", "[tool.pfode.bench]"])
def test_a_file_cannot_trust_itself(cli, evil, tmp_path, key, table):
    (tmp_path / "pfode.toml").write_text(f'{table}\n{key} = true\nmodel = ["evil:x"]')
    done = cli(*BENCH)
    assert done.code == 3
    assert "--trust-python on the command line" in done.err
    assert not evil()


def test_the_command_line_and_trust_run_it_and_the_path_is_as_before(cli, evil, tmp_path):
    before = list(sys.path)
    assert cli(*BENCH, "--model", "evil:x").code == 0
    assert evil()
    assert sys.path == before
    (tmp_path / "ran").unlink()
    (tmp_path / "pfode.toml").write_text('[tool.pfode.bench]\nmodel = ["evil:x"]')
    del sys.modules["evil"]
    assert cli(*BENCH, "--trust-python").code == 0
    assert evil()


def test_a_value_that_names_no_code_may_come_from_anywhere(cli, tmp_path):
    (tmp_path / "pfode.toml").write_text('[tool.pfode]\nmodel = "gaussian-2"')
    assert cli(*BENCH).code == 0


@pytest.mark.parametrize("module", ["pfode", "pfode.cli"])
@pytest.mark.parametrize("safe", [False, True])
def test_python_m_takes_no_module_from_the_working_folder(tmp_path, safe, module):
    """What `python -m` puts on the path is taken off before anything is imported; `-P` leaves nothing to take off."""
    for name in ("click", "tqdm", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('ran')")
    words = [sys.executable, *(["-P"] if safe else []), "-m", module, "--version"]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("pfode ")
