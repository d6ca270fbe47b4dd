"""The names that people know recipes by: those of the catalogue, of families, and as k-diffusion writes them."""

import re

from pfode.errors import unknown
from pfode.samplers.catalogue import CATALOGUE, Recipe, recipe

FAMILIES = {  # a family's name -> the member that it means
    "unipc": "unipc2",
    "unip": "unip2",
    "dpm": "dpm-2m",
    "dpm-solver": "dpm-2m",
    "dpm++": "dpm++2m",
    "dpm-solver++": "dpm++2m",
    "deis": "deis-tab3",
    "ipndm": "ipndm4",
    "ipndm-v": "ipndm-v4",
    "exp-ab": "exp-ab2",
    "res": "res-2m",
    "res-multistep": "res-2m",
    "er-sde": "er-sde-3",
    "rk": "rk4",
}


def squeezed(name: str) -> str:
    """A name without what its spellings differ in: "dpm++2s-a" and "dpmpp_2s_ancestral" are both "dpmpp2sa"."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp").replace("ancestral", "a"))


_SPELT = {squeezed(name): found for name, found in ({name: name for name in CATALOGUE} | FAMILIES).items()}


def find(name: str) -> Recipe:
    """The recipe of a name: "dpm++2m", "dpmpp_2m", "unipc".

    Raises:
        UsageError: unknown name, or an adaptive sampler.
    """
    found = CATALOGUE.get(name) or CATALOGUE.get(_SPELT.get(squeezed(name), ""))
    if found is None:
        from pfode.samplers.adaptive import ADAPTIVE

        if name in ADAPTIVE:
            return recipe(name)  # raises
        raise unknown("sampler", name, (*CATALOGUE, *FAMILIES, "auto"))
    return found
