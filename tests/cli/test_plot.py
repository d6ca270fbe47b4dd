"""Figures that every viewer draws in their colours."""

import re
from xml.etree import ElementTree

from pfode.cli.plot import LIGHT, SERIES, Curve, Drawing, Panel, draw, svg

CURVES = [
    Curve(f"sampler <{k}>", colour, [(4, 1.0 + k, 0.9, 1.5), (8, 0.5, 0.4, 0.7)]) for k, colour in enumerate(SERIES)
]


def figure() -> Drawing:
    panel = Panel("bed & more", "error", CURVES, [("floor", 0.3)])
    return draw([panel, panel], [(curve.label, curve.colour) for curve in CURVES])


def test_alone_every_mark_has_its_colour_in_an_attribute():
    text = svg(figure())
    assert "var(" not in text
    assert "style" not in text
    drawn = [e for e in ElementTree.fromstring(text).iter() if e.tag.rpartition("}")[2] not in ("svg", "title")]
    assert len(drawn) == len(figure().marks) + 1
    used = set()
    for element in drawn:
        colour = element.get("stroke") if element.get("fill") == "none" else element.get("fill")
        assert colour is not None
        assert re.fullmatch("#[0-9a-f]{6}", colour)
        used.add(colour)
    assert used <= set(LIGHT.values())
    assert {LIGHT[name] for name in SERIES} <= used


def test_in_a_page_the_colours_are_those_of_the_page():
    text = svg(figure(), alone=False)
    assert text.count("var(--") == len(figure().marks)
    assert not re.search("#[0-9a-f]{6}", text)
