"""Plans in files."""

import tempfile
from pathlib import Path

import pfode
from tests.fuzz.engine import Target
from tests.fuzz.formats.model import seal


def read(folder: Path) -> object:
    """A plan, as text of all its digits and metadata."""
    plan = pfode.Plan.load(folder / "plan.safetensors")
    numbers = tuple(value.double().sum().item() for value in (plan.t, plan.alpha, plan.sigma, plan.r, plan.b, plan.c))
    return str(plan), plan.meta, plan.process.config(), numbers


def target() -> Target:
    """See `Target`."""
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        for sampler, process in (("dpm++2m", pfode.EDM()), ("er-sde", pfode.VP()), ("heun", pfode.Flow())):
            file = pfode.make_plan(sampler, process=process, steps=4).save(Path(folder) / "x.safetensors")
            samples.append({"plan.safetensors": file.read_bytes()})
    return Target("plan", tuple(samples), read, digest=True, reseal=seal)
