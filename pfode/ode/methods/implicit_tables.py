"""The implicit tableaus, by name, checked like the explicit ones when this module is imported.

Every one begins with an explicit stage, the derivative at the start of the step: with it error estimates and dense
output need no evaluation of their own, and where the last stage ends the step it is handed on. After it come either
stages that are solved one by one (singly diagonally implicit) or all at once (collocation).
"""

import math

import numpy as np

from pfode.tableau import Tableau

__all__ = [
    "GAUSS4",
    "GAUSS6",
    "IMPLICIT",
    "IMPLICIT_EULER",
    "IMPLICIT_MIDPOINT",
    "KVAERNO3",
    "KVAERNO4",
    "KVAERNO5",
    "RADAU3",
    "RADAU5",
    "SDIRK2",
    "TRAPEZOID",
    "TRBDF2",
]


def _collocation(name: str, order: int, nodes: list[float], explicit: float = 0.0) -> Tableau:
    """The collocation method at these nodes, its explicit stage first (Hairer & Wanner 1996, IV.5).

    Args:
        explicit: weight of the explicit stage in an embedded method of the order of the number of nodes
            (Hairer & Wanner 1996, IV.8.19); 0: no embedded method. Its error is multiplied by 1.75: with the loop's
            safety of 0.9 steps are then of the size that Hairer's factor 0.9 (2 m + 1) / (2 m + n) gives them, m = 6
            being the most and n = 3 the usual number of iterations.
    """
    s = len(nodes)
    powers = np.array(nodes)[:, None] ** np.arange(s)  # the nodes' Vandermonde matrix
    degree = np.arange(1, s + 1)
    a = np.array(nodes)[:, None] ** degree / degree @ np.linalg.inv(powers)
    b = np.linalg.solve(powers.T, 1 / degree)
    if nodes[-1] == 1:
        b = a[-1]
    embedded = np.linalg.solve(powers.T, 1 / degree - explicit * (degree == 1))
    error = (1.75 * np.array([-explicit, *(b - embedded)])).tolist() if explicit else []
    rows = [[0.0] * (s + 1), *([0.0, *row] for row in a.tolist())]
    return Tableau(name, order, rows, [0.0, *b.tolist()], error, s if explicit else 0)


IMPLICIT_EULER = Tableau("implicit_euler", 1, [[], [0, 1]], [0, 1], error=[-1 / 2, 1 / 2], embedded=2)
IMPLICIT_MIDPOINT = Tableau("implicit_midpoint", 2, [[], [0, 1 / 2]], [0, 1])
TRAPEZOID = Tableau("trapezoid", 2, [[], [1 / 2, 1 / 2]], [1 / 2, 1 / 2])

# Alexander 1977; the embedded method, with the explicit stage, is of order 3 on linear problems: b^ A c = 1/6
_G = 1 - math.sqrt(1 / 2)
_MU = ((1 - _G) * _G**2 + _G / 2 - 1 / 6) / (_G / 2 - _G**2)
SDIRK2 = Tableau(
    "sdirk2",
    2,
    [[], [0, _G], [0, 1 - _G, _G]],
    [0, 1 - _G, _G],
    error=[_MU * (1 - _G), -_MU, _MU * _G],
    embedded=2,
)
# Bank et al. 1985; the embedded method of Hosea & Shampine 1996
_W = math.sqrt(2) / 4
TRBDF2 = Tableau(
    "trbdf2",
    2,
    [[], [_G, _G], [_W, _W, _G]],
    [_W, _W, _G],
    error=[_W - (1 - _W) / 3, _W - (3 * _W + 1) / 3, _G - _G / 3],
    embedded=3,
)
# Kvaerno 2004, "Singly diagonally implicit Runge-Kutta methods with an explicit first stage": 3/2, 4/3a and 5/4a. The
# embedded methods are the last stage but one. For 3/2 the digits follow from the order conditions and from
# 6 g^3 - 18 g^2 + 9 g - 1 = 0.
_K3 = 0.43586652150845899941601945
_K32 = (1 / 2 - _K3) / (2 * _K3)
_B32 = 1 / (12 * _K3 * (1 - 2 * _K3))
_B33 = 1 / 2 - _K3 - 2 * _K3 * _B32
_B3 = [1 - _B32 - _B33 - _K3, _B32, _B33, _K3]
KVAERNO3 = Tableau(
    "kvaerno3",
    3,
    [[], [_K3, _K3], [1 - _K3 - _K32, _K32, _K3], _B3],
    _B3,
    error=[_B3[0] - (1 - _K3 - _K32), _B3[1] - _K32, _B3[2] - _K3, _K3],
    embedded=2,
)
_A4 = [0.10239940061991099768, -0.3768784522555561061, 0.83861253012718610911, _K3]
_B4 = [0.15702489786032493710, 0.11733044137043884870, 0.61667803039212146434, -0.32689989113134424957, _K3]
KVAERNO4 = Tableau(
    "kvaerno4",
    4,
    [[], [_K3, _K3], [0.14073777472470619619, -0.1083655513813208, _K3], _A4, _B4],
    _B4,
    error=[p - q for p, q in zip(_B4, [*_A4, 0], strict=True)],
    embedded=3,
)
_A5 = [0.13855640231268224, 0, -0.04245337201752043, 0.02446657898003141, 0.61943039072480676, 0.26]
_B5 = [0.13659751177640291, 0, -0.05496908796538376, -0.04118626728321046, 0.62993304899016403, 0.06962479448202728]
_B5 = [*_B5, 0.26]
KVAERNO5 = Tableau(
    "kvaerno5",
    5,
    [
        [],
        [0.26, 0.26],
        [0.13, 0.84033320996790809, 0.26],
        [0.22371961478320505, 0.47675532319799699, -0.06470895363112615, 0.26],
        [0.16648564323248321, 0.10450018841591720, 0.03631482272098715, -0.13090704451073998, 0.26],
        _A5,
        _B5,
    ],
    _B5,
    error=[p - q for p, q in zip(_B5, [*_A5, 0], strict=True)],
    embedded=4,
)
_R6, _R15 = math.sqrt(6), math.sqrt(15)
_MU5 = 3 + 3 ** (2 / 3) - 3 ** (1 / 3)  # the real eigenvalue of A^-1 of Radau IIA 5
RADAU3 = _collocation("radauIIA3", 3, [1 / 3, 1], 1 / _R6)
RADAU5 = _collocation("radauIIA5", 5, [(4 - _R6) / 10, (4 + _R6) / 10, 1], 1 / _MU5)
GAUSS4 = _collocation("gl4", 4, [1 / 2 - math.sqrt(3) / 6, 1 / 2 + math.sqrt(3) / 6])
GAUSS6 = _collocation("gl6", 6, [1 / 2 - _R15 / 10, 1 / 2, 1 / 2 + _R15 / 10])

IMPLICIT = (
    IMPLICIT_EULER,
    IMPLICIT_MIDPOINT,
    TRAPEZOID,
    SDIRK2,
    TRBDF2,
    KVAERNO3,
    KVAERNO4,
    KVAERNO5,
    RADAU3,
    RADAU5,
    GAUSS4,
    GAUSS6,
)
