"""Recipes: chart x method x grid -> Plan; the catalogue, `make_plan` and `sample`; adaptive sampling."""

from typing import TYPE_CHECKING

from pfode.lazy import lazy

if __name__ != "pfode.samplers":
    raise ImportError("import pfode.samplers: the folder is a part of the package pfode, not a package of its own")

__getattr__, __dir__ = lazy(
    __name__,
    {
        "adaptive": ["ADAPTIVE", "Adaptive", "AdaptiveRecipe", "make_adaptive"],
        "calibration": ["calibrate", "calibration_calls"],
        "catalogue": ["CATALOGUE", "Recipe", "make_plan"],
        "fit.fitting": ["Progress", "fit_plan"],
        "adapters": ["kdiffusion"],
        "inversion": ["Pair", "decode", "encode"],
        "mala": ["Chain", "mala"],
        "sampling": ["Samples", "sample"],
        "adapters.scheduler": ["PFODEScheduler"],
        "fit.search": ["Jumps", "gits", "measure_jumps"],
    },
)

if TYPE_CHECKING:  # the same names for type checkers
    from pfode.samplers.adapters import kdiffusion as kdiffusion
    from pfode.samplers.adapters.scheduler import PFODEScheduler as PFODEScheduler
    from pfode.samplers.adaptive import ADAPTIVE as ADAPTIVE
    from pfode.samplers.adaptive import Adaptive as Adaptive
    from pfode.samplers.adaptive import AdaptiveRecipe as AdaptiveRecipe
    from pfode.samplers.adaptive import make_adaptive as make_adaptive
    from pfode.samplers.calibration import calibrate as calibrate
    from pfode.samplers.calibration import calibration_calls as calibration_calls
    from pfode.samplers.catalogue import CATALOGUE as CATALOGUE
    from pfode.samplers.catalogue import Recipe as Recipe
    from pfode.samplers.catalogue import make_plan as make_plan
    from pfode.samplers.fit.fitting import Progress as Progress
    from pfode.samplers.fit.fitting import fit_plan as fit_plan
    from pfode.samplers.fit.search import Jumps as Jumps
    from pfode.samplers.fit.search import gits as gits
    from pfode.samplers.fit.search import measure_jumps as measure_jumps
    from pfode.samplers.inversion import Pair as Pair
    from pfode.samplers.inversion import decode as decode
    from pfode.samplers.inversion import encode as encode
    from pfode.samplers.mala import Chain as Chain
    from pfode.samplers.mala import mala as mala
    from pfode.samplers.sampling import Samples as Samples
    from pfode.samplers.sampling import sample as sample
