"""Recipes: chart x method x grid -> Plan; the catalogue, `make_plan` and `sample`."""

from typing import TYPE_CHECKING

from pfode.lazy import lazy

if __name__ != "pfode.samplers":
    raise ImportError("import pfode.samplers: the folder is a part of the package pfode, not a package of its own")

__getattr__, __dir__ = lazy(
    __name__,
    {
        "catalogue": ["CATALOGUE", "Recipe", "make_plan", "usual"],
        "sampling": ["Samples", "sample"],
    },
)

if TYPE_CHECKING:  # the same names for type checkers
    from pfode.samplers.catalogue import CATALOGUE as CATALOGUE
    from pfode.samplers.catalogue import Recipe as Recipe
    from pfode.samplers.catalogue import make_plan as make_plan
    from pfode.samplers.catalogue import usual as usual
    from pfode.samplers.sampling import Samples as Samples
    from pfode.samplers.sampling import sample as sample
