"""Where denoisers come from: exact ones, networks and their preconditioning, guidance, training, the shipped models."""

from typing import TYPE_CHECKING

from pfode.lazy import lazy

if __name__ != "pfode.scores":
    raise ImportError("import pfode.scores: the folder is a part of the package pfode, not a package of its own")

__getattr__, __dir__ = lazy(
    __name__,
    {
        "denoiser": ["Denoiser"],
        "energy": ["EnergyDenoiser", "EnergySum", "energy_denoiser"],
        "guidance": ["cfg_plus_plus", "guide"],
        "io.pipelines": ["from_pipeline"],
        "wrapping": ["clip", "threshold"],
        "io.load": ["load"],
        "io.save": ["save"],
        "exact": ["Empirical", "Gaussian", "GaussianMixture"],
    },
)

if TYPE_CHECKING:  # the same names for type checkers
    from pfode.scores.denoiser import Denoiser as Denoiser
    from pfode.scores.energy import EnergyDenoiser as EnergyDenoiser
    from pfode.scores.energy import EnergySum as EnergySum
    from pfode.scores.energy import energy_denoiser as energy_denoiser
    from pfode.scores.exact import Empirical as Empirical
    from pfode.scores.exact import Gaussian as Gaussian
    from pfode.scores.exact import GaussianMixture as GaussianMixture
    from pfode.scores.guidance import cfg_plus_plus as cfg_plus_plus
    from pfode.scores.guidance import guide as guide
    from pfode.scores.io.load import load as load
    from pfode.scores.io.pipelines import from_pipeline as from_pipeline
    from pfode.scores.io.save import save as save
    from pfode.scores.wrapping import clip as clip
    from pfode.scores.wrapping import threshold as threshold
