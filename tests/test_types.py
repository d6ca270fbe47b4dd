"""A canary for the type checker: if it stops seeing the package, the ignores below are unnecessary: an error.

Nothing here is called; `pyright` is the test.
"""
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true, reportUnusedFunction=false

from typing import assert_type

from pfode.plans.table import Plan
from pfode.process import EDM
from pfode.samplers.catalogue import make_plan


def _canary() -> None:
    plan = make_plan("ddim", process=EDM(), steps=4)
    assert_type(plan, Plan)
    assert_type(plan.nfe, int)
    wrong: str = plan.nfe  # pyright: ignore[reportAssignmentType]
    make_plan("ddim", proces=EDM())  # pyright: ignore[reportCallIssue]
    del wrong
