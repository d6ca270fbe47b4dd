import pytest

FILES = {"pfode.toml": "[tool.pfode]\nsteps = 3\nn = 2\n[tool.pfode.sample]\nn = 3\n", "my.toml": "steps = 4\n"}


@pytest.fixture
def configured(cli, tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return cli


def value(run, name, command="sample"):
    found = run.json[command][name]
    return found["value"], found["source"]


def test_precedence_one_layer_at_a_time(configured, tmp_path, monkeypatch):
    assert value(configured("info", "config", "--json"), "steps") == (3, "pfode.toml")
    assert value(configured("info", "config", "--json", "--config", "my.toml"), "steps") == (4, "my.toml")
    monkeypatch.setenv("PFODE_STEPS", "5")
    assert value(configured("info", "config", "--json", "--config", "my.toml"), "steps") == (5, "PFODE_STEPS")
    run = configured("sample", "--config", "my.toml", "--steps", "6", "--json")
    assert run.json["steps"] == 6
    assert run.json["n"] == 3
    assert configured("sample", "--json").json["steps"] == 5
    (tmp_path / "pfode.toml").unlink()
    monkeypatch.delenv("PFODE_STEPS")
    assert value(configured("info", "config", "--json"), "steps") == (20, "default")


def test_a_table_of_the_command_is_stronger(configured):
    assert value(configured("info", "config", "--json"), "n") == (3, "pfode.toml")


def test_config_from_the_environment(configured, monkeypatch):
    monkeypatch.setenv("PFODE_CONFIG", "my.toml")
    monkeypatch.setenv("PFODE_JSON", "1")
    assert value(configured("info", "config"), "steps") == (4, "my.toml")


def test_config_as_text(configured):
    lines = configured("info", "config").out.splitlines()
    assert any(line.split() == ["steps", "3", "pfode.toml"] for line in lines)


def test_the_stronger_of_two_rivals_wins(configured, monkeypatch):
    assert configured("sample", "--nfe", 5, "--n", 1, "--json").json["nfe"] == 5
    monkeypatch.setenv("PFODE_NFE", "4")
    assert configured("sample", "--n", 1, "--json").json["nfe"] == 4
    assert configured("sample", "--n", 1, "--steps", 2, "--json").json["steps"] == 2


def test_options_that_are_lists_or_words(cli, tmp_path, monkeypatch):
    (tmp_path / "pfode.toml").write_text('[tool.pfode]\nset = ["tau=0.5", "between=1,2"]\nafs = "model"\nn = 1\n')
    assert value(cli("info", "config", "--json"), "set") == (["tau=0.5", "between=1,2"], "pfode.toml")
    assert any(
        line.split() == ["set", "tau=0.5", "between=1,2", "pfode.toml"]
        for line in cli("info", "config").out.splitlines()
    )
    options = cli("sample", "--sampler", "sa-solver", "--steps", 3, "--json").json["settings"]["options"]
    assert {"tau=0.5", "between=1,2"} <= set(options["set"])
    assert options["afs"] == 0.5
    monkeypatch.setenv("PFODE_SET", "tau=0.7 predictor=2")
    monkeypatch.setenv("PFODE_AFS", "0.3")
    options = cli("sample", "--sampler", "sa-solver", "--steps", 3, "--json").json["settings"]["options"]
    assert {"tau=0.7", "predictor=2"} <= set(options["set"])
    assert options["afs"] == 0.3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('set = "tau=1"', "set: expected a list of strings"),
        ("afs = true", "afs: expected a number or 'model'"),
        ("brownian = 1", "brownian: expected true or false"),
        ("stepz = 3", "unknown key 'stepz'"),
        ("[smaple]\nsteps = 3", "unknown table 'smaple'"),
        ("[sample]\nstep = 3", "[sample]: unknown key 'step'"),
        ("steps = 2.5", "steps: expected a whole number"),
        ("steps = true", "steps: expected a whole number"),
        ("steps = -1", "-1 is not in the range"),
        ('guidance = "x"', "guidance: expected a number"),
        ("guidance = nan", "not a finite number"),
        ("json = 1", "json: expected true or false"),
        ("model = [1]", "model: expected a string"),
        ('out = "a\\u0000.png"', "out: expected a string"),
        ("steps = ", "broken TOML"),
        ("steps = 1\nsteps = 2", "broken TOML"),
        ("a = " + "[" * 5000, "broken TOML"),
        ("tool = 3", "tool.pfode: expected a table"),
        ("#" * 1_000_001, "larger than"),
    ],
)
def test_bad_config(cli, tmp_path, text, message):
    (tmp_path / "bad.toml").write_text(text)
    run = cli("sample", "--config", "bad.toml")
    assert run.code == 3
    assert run.err.startswith("pfode: error: bad.toml")
    assert message in run.err
    assert not list(tmp_path.glob("*.png"))


def test_did_you_mean_in_a_config(cli, tmp_path):
    (tmp_path / "bad.toml").write_text("stepz = 3")
    assert "did you mean 'steps'" in cli("sample", "--config", "bad.toml").err


def test_keys_may_be_written_as_the_flags_are(cli, tmp_path):
    (tmp_path / "pfode.toml").write_text("[tool.pfode.train]\nsigma-data = 0.7\nsave_every = 9\n")
    run = cli("info", "config", "--json")
    assert value(run, "sigma_data", "train") == (0.7, "pfode.toml")
    assert value(run, "save_every", "train") == (9, "pfode.toml")


def test_keys_of_other_commands_are_no_error(cli, tmp_path):
    (tmp_path / "pfode.toml").write_text("[tool.pfode]\nverify = false\n")
    assert cli("info", "config").code == 0


def test_a_pfode_toml_without_our_table_is_ignored(cli, tmp_path):
    (tmp_path / "pfode.toml").write_text("[tool.other]\nx = 1\n")
    assert cli("info", "config").code == 0


def test_keys_outside_the_table_are_no_silent_miss(cli, tmp_path):
    (tmp_path / "pfode.toml").write_text("steps = 3\n")
    run = cli("sample")
    assert run.code == 3
    assert "[tool.pfode]" in run.err


def test_bad_environment_names_the_variable(cli, monkeypatch):
    monkeypatch.setenv("PFODE_STEPS", "many")
    run = cli("sample")
    assert run.code == 2
    assert "PFODE_STEPS" in run.err
