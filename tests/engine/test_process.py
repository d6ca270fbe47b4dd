"""Processes: the definition, the inverse, the ends."""

import math
from typing import Any

import pytest
import torch

import pfode
from pfode.errors import UsageError
from pfode.process import from_config
from tests import problems

WRONG: Any = "a"
PROCESSES = {
    **problems.ALL_PROCESSES,
    "VPCosine to 1": pfode.VPCosine(t_max=1.0),
    "zero-SNR": problems.zero_terminal_snr(),
    "Flow shifted": pfode.Flow(shift=3.0),
}
each = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def times(process: pfode.Process) -> torch.Tensor:
    return process.t_min + (process.t_max - process.t_min) * torch.linspace(0, 1, 4001, dtype=torch.float64) ** 2


@each
def test_log_snr_is_what_it_says(process):
    t = times(process)[:-1]
    assert torch.allclose(process.log_snr(t), 2 * torch.log(process.alpha(t) / process.sigma(t)), rtol=0, atol=1e-11)
    assert (process.log_snr(t).diff() < 0).all()


@each
def test_time_inverts_log_snr_to_float64(process):
    t = times(process)
    span = process.t_max - process.t_min
    error = (process.time(process.log_snr(t)) - t).abs()
    assert (error / span).max() < 4e-15
    if not isinstance(process, pfode.VE | pfode.VPDiscrete):  # their times are affine in the log-SNR: no relative scale
        assert (error / t).max() < 1e-14
    value = torch.linspace(process.log_snr(t[-2]).item(), process.log_snr(t[1]).item(), 501, dtype=torch.float64)
    assert torch.allclose(process.log_snr(process.time(value)), value, rtol=1e-12, atol=1e-12)


@each
def test_ends(process):
    assert process.sigma(process.t_data) == 0
    assert process.alpha(process.t_data) == 1
    assert process.time(math.inf) == process.t_data
    low = process.alpha(process.t_max)
    assert low >= 0
    if low == 0:
        assert process.time(-math.inf) == pytest.approx(process.t_max, rel=1e-15)


@each
def test_floats_and_tensors_agree(process):
    t = 0.5 * (process.t_min + process.t_max)
    for function in (process.alpha, process.sigma, process.log_snr):
        assert isinstance(function(t), float)
        assert function(torch.tensor([t, t], dtype=torch.float64)).tolist() == [function(t)] * 2
        assert function(torch.tensor(t)).dtype == torch.float32


@each
def test_config_round_trip(process):
    again = from_config(process.config())
    assert again == process
    assert again.config() == process.config()


def test_discrete_schedule_is_exact_at_its_indices():
    process = problems.ALL_PROCESSES["VPDiscrete"]
    index = torch.arange(1000, dtype=torch.float64)
    values = torch.tensor(process.alphas_cumprod, dtype=torch.float64)
    assert torch.allclose(process.alpha(index) ** 2, values, rtol=1e-13)


def test_equality_is_of_alpha_and_sigma():
    assert pfode.EDM(0.01, 50) == pfode.EDM()
    assert pfode.Flow(shift=3) == pfode.Flow()
    assert pfode.VP(beta_max=10.0) != pfode.VP()
    assert pfode.VP() != pfode.SubVP()


@pytest.mark.parametrize(
    "make",
    [
        lambda: pfode.VP(beta_min=-1),
        lambda: pfode.VP(beta_max=WRONG),
        lambda: pfode.EDM(sigma_max=WRONG),
        lambda: pfode.VE(0.1, float("inf")),
        lambda: pfode.VPDiscrete(WRONG),
        lambda: pfode.VP(t_min=0.0),
        lambda: pfode.EDM(0, 80),
        lambda: pfode.EDM(2, 1),
        lambda: pfode.VE(1, 1),
        lambda: pfode.Flow(shift=0),
        lambda: pfode.VPCosine(s=-1),
        lambda: pfode.VPDiscrete([0.5, 0.9]),
        lambda: pfode.VPDiscrete([0.5]),
        lambda: from_config({"name": "EMD"}),
        lambda: from_config({"name": "EDM", "sigma": 1}),
        lambda: from_config({"name": "EDM", "sigma_min": "x"}),
    ],
)
def test_bad_parameters_are_refused(make):
    with pytest.raises(UsageError):
        make()


@each
def test_integer_times_are_numbers(process):
    one = torch.tensor(1)
    assert process.alpha(one).item() == process.alpha(1.0)
