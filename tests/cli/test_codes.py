"""The exit codes are stated once, and README says the same."""

import re
from pathlib import Path

from pfode import errors
from pfode.cli.codes import CODES


def test_readme_and_help_say_what_the_table_says(cli):
    text = (Path(__file__).parents[2] / "README.md").read_text()
    assert dict(re.findall(r"^\| (\d+) \| (.*) \|$", text, re.M)) == {str(c): what for c, (_, what) in CODES.items()}
    for words in ((), ("--help",)):
        shown = cli(*words).out
        assert all(f"  {code:<4} {meaning}" in shown for code, (_, meaning) in CODES.items())


def test_every_error_of_pfode_has_a_code_of_the_table():
    kinds = (kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.PfodeError))
    assert {kind.code for kind in kinds} <= set(CODES)
