"""The tableaus. Each was implemented from its paper's formulas; tests/sde/test_orders.py measures their orders."""

import math

from pfode.sde.tableau import Row, Stage, Tableau

__all__ = ["TABLEAUS"]

_ITO, _STRATONOVICH, _EITHER = ("ito",), ("stratonovich",), ("ito", "stratonovich")
_ALL = ("diagonal", "scalar", "additive", "general")
_COMMUTATIVE = ("diagonal", "scalar", "additive")
_ONE = ("diagonal", "scalar")

EULER = Tableau(
    "euler",
    "Maruyama 1955",
    _ITO,
    _ALL,
    (Stage(0),),
    Row([1], {"W": [1]}),
    strong={"diagonal": 0.5, "scalar": 0.5, "additive": 1, "general": 0.5},
)

_MILSTEIN = {"diagonal": 1, "scalar": 1, "additive": 1}


MILSTEIN_ITO = Tableau(
    "milstein-grad-free",
    "Kloeden & Platen 1992, section 11.1",
    _ITO,
    _COMMUTATIVE,
    (Stage(0), Stage(0, Row([1], {"r": [1]}), "g")),
    Row([1], {"W": [1], "I2": [-1, 1]}),
    strong=_MILSTEIN,
)
MILSTEIN_STRATONOVICH = Tableau(  # W^2 has a mean, so the difference must be a central one
    "milstein-grad-free-stratonovich",
    "Kloeden & Platen 1992, section 11.1",
    _STRATONOVICH,
    _COMMUTATIVE,
    (Stage(0), Stage(0, Row([], {"r": [1]}), "g"), Stage(0, Row([], {"r": [-1]}), "g")),
    Row([1], {"W": [1], "J2": [0, 0.5, -0.5]}),
    strong=_MILSTEIN,
)

_SRI_STRONG = {"diagonal": 1.5, "scalar": 1.5}
_B3, _B4 = [2, -4 / 3, -2 / 3, 0], [-2, 5 / 3, -2 / 3, 1]
SRID2 = Tableau(
    "srid2",
    "Roessler 2010, table 6.2 (SRI1W2)",
    _ITO,
    _ONE,
    (
        Stage(0),
        Stage(0.25, Row([0.25], {"r": [-0.5]}), "g"),
        Stage(1, Row([1]), "f"),
        Stage(1, Row([1], {"r": [1]}), "g"),
        Stage(0.5, Row([0.25, 0.25], {"U": [1, 0.5]}), "f"),
        Stage(0.25, Row([0, 0, 0.25], {"r": [2, -1, 0.5]}), "g"),
    ),
    Row([1 / 6, 1 / 6, 2 / 3], {"W": [-1, 4 / 3, 2 / 3], "I2": [1, -4 / 3, 1 / 3], "U": _B3, "I3": _B4}),
    (Row([-1 / 12, -1 / 12, 1 / 6]), Row([], {"U": _B3, "I3": _B4})),
    1.5,
    _SRI_STRONG,
    1.5,
)


def _sri(
    name: str, source: str, a0: list[list[float]], a1: list[list[float]], b0: list[list[float]],
    b1: list[list[float]], alpha: list[float], beta: list[list[float]],
) -> Tableau:  # fmt: skip
    """A four-stage method for diagonal noise, from the matrices of Roessler's scheme (A0, A1, B0, B1)."""
    stages = [Stage(0)]
    for i in range(3):
        stages.append(Stage(sum(a1[i]), Row(a1[i], {"r": b1[i]}), "g"))
        stages.append(Stage(sum(a0[i]), Row(a0[i], {"U": b0[i]}), "f"))
    end = Row(alpha, dict(zip(("W", "I2", "U", "I3"), beta, strict=True)))
    error = (Row([x - 0.25 for x in alpha]), Row([], {"U": beta[2], "I3": beta[3]}))
    return Tableau(name, source, _ITO, _ONE, tuple(stages), end, error, 1.5, _SRI_STRONG, 1.5)


SOSRI = _sri(
    "sosri",
    "Rackauckas & Nie 2018, SOSRI",
    [[-0.04199224421316468], [2.842612915017106, -2.0527723684000727],
     [4.338237071435815, -2.8895936137439793, 2.3017575594644466]],
    [[0.26204282091330466], [0.20903646383505375, -0.1502377115150361],
     [0.05836595312746999, 0.6149440396332373, 0.08535117634046772]],
    [[-0.21641093549612528], [1.5336352863679572, 0.26066223492647056],
     [-1.0536037558179159, 1.7015284721089472, -0.20725685784180017]],
    [[-0.5119011827621657], [2.67767339866713, -4.9395031322250995],
     [0.15580956238299215, 3.2361551006624674, -1.4223118283355949]],
    [1.140099274172029, -0.6401334255743456, 0.4736296532772559, 0.026404498125060714],
    [[-1.8453464565104432, 2.688764531100726, -0.2523866501071323, 0.40896857551684956],
     [0.4969658141589478, -0.5771202869753592, -0.12919702470322217, 0.2093514975196336],
     [2.8453464565104425, -2.688764531100725, 0.2523866501071322, -0.40896857551684945],
     [0.11522663875443433, -0.57877086147738, 0.2857851028163886, 0.17775911990655704]],
)  # fmt: skip
SOSRI2 = _sri(
    "sosri2",
    "Rackauckas & Nie 2018, SOSRI2",
    [[0.13804532298278663], [0.5818361298250374, 0.4181638701749618],
     [0.4670018408674211, 0.8046204792187386, -0.27162232008616016]],
    [[0.45605532163856893], [0.7555807846451692, 0.24441921535482677],
     [0.6981181143266059, 0.3453277086024727, -0.04344582292908241]],
    [[0.08852381537667678], [1.0317752458971061, 0.4563552922077882],
     [1.73078280444124, -0.46089678470929774, -0.9637509618944188]],
    [[0.6753186815412179], [-0.07452812525785148, -0.49783736486149366],
     [-0.5591906709928903, 0.022696571806569924, -0.8984927888368557]],
    [-0.15036858140642623, 0.7545275856696072, 0.686995463807979, -0.2911544680711602],
    [[-0.45315689727309133, 0.8330937231303951, 0.3792843195533544, 0.24077885458934192],
     [-0.4994383733810986, 0.9181786186154077, -0.25613778661003145, -0.16260245862427797],
     [1.4531568972730915, -0.8330937231303933, -0.3792843195533583, -0.24077885458934023],
     [-0.4976090683622265, 0.9148155835648892, -1.4102107084476505, 0.9930041932449877]],
)  # fmt: skip

_ADDITIVE = {"additive": 1.5}


def _additive(
    name: str, source: str, c: float, weights: tuple[float, float], area: tuple[float, float], error: float
) -> Tableau:
    """Two drifts at 0 and c, the diffusion at both ends: y1 has g(t) (W/2 + H) + g(t + h) (W/2 - H).

    Args:
        area: weights of H in the two drift stages.
    """
    b1, b2 = weights
    first = Stage(0, Row(), "g") if area[0] else Stage(0)
    stages = [first] + ([Stage(0, Row([], {"H": [area[0]]}), "f")] if area[0] else [])
    stages += [Stage(c, Row([c], {"W": [c], "H": [area[1]]}), "f"), Stage(1, Row(), "g")]
    end = Row([b1, b2], {"W": [0.5, 0.5], "H": [1, -1]})
    return Tableau(name, source, _EITHER, ("additive",), tuple(stages), end, (Row([-error, error]),), 1.5, _ADDITIVE, 2)


SRA1 = _additive("sra1", "Roessler 2010, table 6.3 (SRA1)", 0.75, (1 / 3, 2 / 3), (0, 1.5), 2 / 3)
SHARK = _additive("shark", "Foster, dos Reis & Strange 2023, 6.1", 5 / 6, (0.4, 0.6), (1, 1), 0.6)
SEA = Tableau(
    "sea",
    "Foster, dos Reis & Strange 2023, 5.8",
    _EITHER,
    ("additive",),
    (Stage(0, Row(), "g"), Stage(0, Row([], {"W": [0.5], "H": [1]}), "f")),
    Row([1], {"W": [1]}),
    strong={"additive": 1},
    weak=1,
)
SOSRA = Tableau(
    "sosra",
    "Rackauckas & Nie 2018, SOSRA",
    _EITHER,
    ("additive",),
    (
        Stage(0),
        Stage(0.6923962376159507, Row([0.6923962376159507], {"U": [1.3371632704399763]}), "f"),
        Stage(0.041248171110700504, Row(), "g"),
        Stage(1, Row([-3.1609142252828395, 4.1609142252828395], {"U": [1.442371048468624, 1.8632741501139225]}), "f"),
        Stage(1, Row(), "g"),
    ),
    Row(
        [0.2889874966892885, 0.6859880440839937, 0.025024459226717772],
        {
            "W": [-16.792534242221663, 17.514995785380226, 0.27753845684143835],
            "U": [0.4237535769069274, 0.6010381474428539, -1.0247917243497813],
        },
    ),
    (Row([0.2889874966892885 - 1 / 3, 0.6859880440839937 - 1 / 3, 0.025024459226717772 - 1 / 3]),),
    1.5,
    _ADDITIVE,
    2,
)

SLOW_RK = Tableau(
    "slow-rk",
    "Foster, dos Reis & Strange 2023, 6.2",
    _STRATONOVICH,
    _ALL,
    (
        Stage(0, Row(), "f"),
        Stage(0.5, Row([0.5]), "g"),
        Stage(0.5, Row([0.5], {"W": [0.5]}), "g"),
        Stage(0.5, Row([0.5], {"W": [0, 0.5]}), "g"),
        Stage(0.5, Row([0.5], {"W": [0, 0, 1]}), "g"),
        Stage(0.75, Row([0.75], {"W": [0, 0, 0.75], "H": [0, 0, 1.5]}), "f"),
        Stage(1, Row([1], {"W": [0, 0.5]}), "g"),
    ),
    Row([1 / 3, 2 / 3], {"W": [1 / 6, 1 / 3, 1 / 3, 1 / 6, 0], "H": [0, 0, 2, 0, -2]}),
    strong={"diagonal": 1.5, "scalar": 1.5, "additive": 1.5, "general": 0.5},
    weak=1.5,
)
_STRONG = {"diagonal": 1, "scalar": 1, "additive": 1.5, "general": 0.5}
GENERAL_SHARK = Tableau(
    "general-shark",
    "Foster, dos Reis & Strange 2023, 6.1 (general noise)",
    _STRATONOVICH,
    _ALL,
    (
        Stage(0, Row(), "g"),
        Stage(0, Row([], {"H": [1]})),
        Stage(5 / 6, Row([5 / 6], {"W": [0, 5 / 6], "H": [1]})),
    ),
    Row([0.4, 0.6], {"W": [0, 0.4, 0.6], "H": [0, 1.2, -1.2]}),
    strong=_STRONG,
)
_X1, _X2 = (3 - math.sqrt(3)) / 6, math.sqrt(3) / 3
SPARK = Tableau(
    "spark",
    "Foster & Jelincic 2023, definition 1.6",
    _STRATONOVICH,
    _ALL,
    (
        Stage(0),
        Stage(0.5, Row([0.5], {"W": [0.5], "H": [math.sqrt(3)]})),
        Stage(1, Row([0, 1], {"W": [0, 1]})),
    ),
    Row([_X1, _X2, _X1], {"W": [_X1, _X2, _X1], "H": [1, 0, -1]}),
    (Row([_X1 - 0.5, _X2, _X1 - 0.5], {"W": [_X1 - 0.5, _X2, _X1 - 0.5], "H": [1, 0, -1]}),),
    1,
    _STRONG,
)
_HEUN = {"diagonal": 1, "scalar": 1, "additive": 1, "general": 0.5}
HEUN = Tableau(
    "heun",
    "Burrage, Burrage & Tian 2004",
    _STRATONOVICH,
    _ALL,
    (Stage(0), Stage(1, Row([1], {"W": [1]}))),
    Row([0.5, 0.5], {"W": [0.5, 0.5]}),
    (Row([-0.5, 0.5], {"W": [-0.5, 0.5]}),),
    1,
    _HEUN,
)
MIDPOINT = Tableau(
    "midpoint",
    "Burrage, Burrage & Tian 2004",
    _STRATONOVICH,
    _ALL,
    (Stage(0), Stage(0.5, Row([0.5], {"W": [0.5]}))),
    Row([0, 1], {"W": [0, 1]}),
    strong=_HEUN,
)
EULER_HEUN = Tableau(
    "euler-heun",
    "Burrage, Burrage & Tian 2004",
    _STRATONOVICH,
    _ALL,
    (Stage(0), Stage(1, Row([], {"W": [1]}), "g")),
    Row([1], {"W": [0.5, 0.5]}),
    strong=_HEUN,
)

TABLEAUS = (
    EULER,
    MILSTEIN_ITO,
    MILSTEIN_STRATONOVICH,
    SRID2,
    SOSRI,
    SOSRI2,
    SRA1,
    SOSRA,
    SEA,
    SHARK,
    SLOW_RK,
    GENERAL_SHARK,
    SPARK,
    HEUN,
    MIDPOINT,
    EULER_HEUN,
)
