"""The benchmark: problems x samplers x numbers of evaluations -> cells, in a folder that can be gone on with.

Every sampler draws from the same noise as a fine solution of the same ODE, the reference, and is measured by how far
from it it ends; where the truth can be sampled, also by how far its samples are from held-out true ones. How samplers
are written is in `spec`. What is chosen or searched for is chosen on the validation noise, never on the noise that is
measured on.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pfode import defaults, grids
from pfode.errors import UsageError, integer
from pfode.files import lock_folder, make_folder
from pfode.samplers.measure.measurement import Measurer
from pfode.samplers.measure.problem import Problem
from pfode.samplers.measure.results import Folder
from pfode.samplers.measure.spec import Spec

__all__ = ["EVALS", "bench"]

EVALS = defaults.Bench.EVALS


def bench(
    problems: Iterable[tuple[Problem, Sequence[str]]],
    out: str | Path,
    evals: Sequence[int] = EVALS,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Measure samplers on problems, as far as the folder does not have them, and write results.json.

    The folder is locked meanwhile. Stopped half-way and called again, it comes to the same bytes.

    Args:
        problems: each with the texts of its samplers.
        out: the folder, made where it is missing.
        evals: network evaluations per sample.
        overwrite: start anew instead of going on with what the folder has.
        progress: called with the cells done, those to do in all, and what comes next.

    Returns:
        what results.json holds, without its digest.

    Raises:
        UsageError: a text that cannot be read or has an unknown name, two problems of one name, a folder with cells
            of other settings, or in use by another process.
        FileError: what the folder has is damaged. WriteError: it cannot be written.
    """
    listed = [(problem, _specs(texts)) for problem, texts in problems]
    names = [problem.name for problem, _ in listed]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two problems are called {twice!r}", "another name for one of them")
    for _, specs in listed:
        for spec in specs:
            spec.check()
    if not isinstance(evals, Iterable) or isinstance(evals, str):
        raise UsageError(f"evals: need a list of whole numbers, got {evals!r:.60}", "evals=[4, 6, 8]")
    counts = list(dict.fromkeys(integer("evals", k, 1, grids.MAX_STEPS) for k in evals))
    make_folder(out)
    with lock_folder(out, "bench"):
        folder = Folder(out, [problem for problem, _ in listed], overwrite)
        folder.start()
        todo = [
            (problem, spec, k)
            for problem, specs in listed
            for spec in specs
            for k in counts
            if (problem.name, spec.text, k) not in folder.cells
        ]
        done, say = 0, progress or (lambda done, total, what: None)
        for problem, _ in listed:
            if problem.name not in folder.floors or any(one[0] is problem for one in todo):
                problem.probe()
            measurer = Measurer(problem, folder.cache)
            if problem.name not in folder.floors:
                say(done, len(todo), f"{problem.name}: converged solution")
                folder.add({"bed": problem.name, "floor": measurer.floor()})
            for _, spec, k in (one for one in todo if one[0] is problem):
                say(done, len(todo), f"{problem.name}: {spec.text} {k}")
                folder.add(measurer.cell(spec, k))
                done += 1
        say(done, len(todo), "")
        return folder.finish()


def _specs(texts: Sequence[str]) -> list[Spec]:
    """The samplers of these texts, each once."""
    if not isinstance(texts, Iterable) or isinstance(texts, str):
        raise UsageError(f"samplers: need a list of texts, got {texts!r:.60}", '["ddim", "ipndm3?grid=best"]')
    return [Spec.parse(text) for text in dict.fromkeys(texts)]
