"""The peers, under the names that the tests know them by; a test that needs one that is not installed is skipped."""

from types import ModuleType

import pytest

from pfode.errors import MissingError
from pfode.samplers.measure import peers
from pfode.samplers.measure.peers import Counted, Draw, Scheduler, keyed

__all__ = ["Counted", "Draw", "Scheduler", "k_diffusion_sampling", "keyed"]


def k_diffusion_sampling() -> ModuleType:
    """k-diffusion's module of samplers."""
    try:
        return peers.k_diffusion_sampling()
    except MissingError as error:
        pytest.skip(str(error))
