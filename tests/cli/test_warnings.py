"""pfode's own warnings on the command line: one line, no place in the code."""

import warnings

import pfode
from pfode.scores import save
from pfode.scores.denoiser import Denoiser
from tests.scores.small import NAMES, network


def test_warnings_of_the_command_line_are_one_line(cli, tmp_path):
    den = Denoiser(network(), pfode.EDM(), "edm", shape=(1, 8, 8), labels=NAMES, unseen=[3])
    save(den, tmp_path / "m.safetensors", card={})
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        done = cli("sample", "--model", "m.safetensors", "--steps", 2, "--label", "ant", "--guidance", 2, "--n", 1)
    assert done.code == 0, done.err
    assert "warning: no label was ever hidden" in done.err
    assert "UnseenLabelWarning" not in done.err
