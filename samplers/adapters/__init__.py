"""The faces of other libraries: diffusers' scheduler, k-diffusion's functions."""

from typing import TYPE_CHECKING

from pfode.lazy import lazy

__getattr__, __dir__ = lazy(__name__, {"": ["conventions", "kdiffusion", "scheduler"]})

if TYPE_CHECKING:  # the same names for type checkers
    from pfode.samplers.adapters import conventions as conventions
    from pfode.samplers.adapters import kdiffusion as kdiffusion
    from pfode.samplers.adapters import scheduler as scheduler
