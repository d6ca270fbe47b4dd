"""The numbers of a plan meet states in one file: `pfode/plans/rows.py`; every loop over rows goes through it."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("pfode", "samplers", "scores", "cli")
FACTORS = {"r", "r_prev", "b", "c"}
LOOPS = {  # the loops over rows, by what they call
    "pfode/plans/executor.py": {"add", "combine", "with_noise"},
    "samplers/adapters/run.py": {"add", "combine", "with_noise"},
    "samplers/inversion.py": {"add", "combine"},
    "samplers/fit/tangents.py": {"add"},
}


def files():
    return [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]


def multiplied(tree: ast.AST) -> set[str]:
    """The factors of a plan that are multiplied with something, as `plan.r[k] * y`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.MatMult):
            for side in (node.left, node.right):
                inner = side.value if isinstance(side, ast.Subscript) else side
                if isinstance(inner, ast.Attribute) and ast.unparse(inner.value) == "plan" and inner.attr in FACTORS:
                    found.add(inner.attr)
    return found


def test_factors_are_applied_in_one_place():
    places = {str(f.relative_to(ROOT)) for f in files() if multiplied(ast.parse(f.read_text()))}
    # guidance weighs the coefficients of a plan with each other, never with a state
    assert places <= {"pfode/plans/rows.py", "scores/guidance.py"}
    fused = {str(f.relative_to(ROOT)) for f in files() if ".addcmul_(" in f.read_text()}
    assert fused == {"pfode/plans/rows.py"}


def test_every_loop_over_rows_goes_through_it():
    users = {}
    for file in files():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "pfode.plans.rows":
                names = {alias.name for alias in node.names} & {"add", "combine", "with_noise"}
                users |= {str(file.relative_to(ROOT)): names} if names else {}
    assert users == LOOPS
