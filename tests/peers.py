"""The peers, under the name that the tests know them by."""

from pfode.samplers.measure.peers import Counted, Draw, Scheduler, k_diffusion_sampling, keyed

__all__ = ["Counted", "Draw", "Scheduler", "k_diffusion_sampling", "keyed"]
