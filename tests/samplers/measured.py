"""The record of measured orders: compared with, or, with PFODE_MEASURE=1, written."""

import json
import os
from pathlib import Path

import pytest

RECORD = Path(__file__).parent.parent.parent / "samplers" / "measured.json"


def agree(name: str, start: str, order: float) -> None:
    """The order of a recipe measured now is the recorded one, to 0.05."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if os.environ.get("PFODE_MEASURE"):
        record.setdefault(name, {})[start] = round(order, 2)
        RECORD.write_text(json.dumps(dict(sorted(record.items())), indent=0) + "\n")
    assert record.get(name, {}).get(start) == pytest.approx(order, abs=0.05), f"{name}: PFODE_MEASURE=1 writes {RECORD}"
