"""The names that people know recipes by, beside those of the catalogue: of families, and as k-diffusion writes them."""

import re

__all__ = [
    "FAMILIES",
    "squeezed",
]

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
    return re.sub(r"[\s_-]", "", name.lower().replace("++", "pp").replace("ancestral", "a"))
