"""The words that torchsde's functions take: classes whose strings are found by `in` and listed by `all()`."""

__all__ = ["LEVY_AREA_APPROXIMATIONS", "METHODS", "METHOD_OPTIONS", "NOISE_TYPES", "SDE_TYPES"]


class _Words(type):
    def all(cls) -> list[str]:
        """Every word, sorted."""
        return sorted(value for name, value in vars(cls).items() if not name.startswith("__"))

    def __contains__(cls, word: object) -> bool:
        return word in cls.all()

    def __str__(cls) -> str:
        return str(cls.all())


class METHODS(metaclass=_Words):
    """Methods."""

    euler = "euler"
    milstein = "milstein"
    srk = "srk"
    midpoint = "midpoint"
    reversible_heun = "reversible_heun"
    adjoint_reversible_heun = "adjoint_reversible_heun"
    heun = "heun"
    log_ode_midpoint = "log_ode"
    euler_heun = "euler_heun"


class NOISE_TYPES(metaclass=_Words):
    """Kinds of noise."""

    general = "general"
    diagonal = "diagonal"
    scalar = "scalar"
    additive = "additive"


class SDE_TYPES(metaclass=_Words):
    """Calculi."""

    ito = "ito"
    stratonovich = "stratonovich"


class LEVY_AREA_APPROXIMATIONS(metaclass=_Words):
    """What a Brownian motion gives beside its increments."""

    none = "none"
    space_time = "space-time"
    davie = "davie"
    foster = "foster"


class METHOD_OPTIONS(metaclass=_Words):
    """Keys of `options`."""

    grad_free = "grad_free"
