"""Quality against evaluations: our samplers, diffusers' and k-diffusion's, fitted plans; one noise, one denoiser.

    python benchmarks/quality.py [--jobs 2] [--beds mixture-64 ...] [--pictures 32] [--transfer]

Fits plans to the beds that have none yet (the avatars beds: those that ship with the model), then measures. Writes
benchmarks/results/fitted/ and benchmarks/results/quality/ (report.html, table.md, quality.png and .svg, results.json),
goes on with what is there, and prints the geometric means that the project's targets are about. Every sampler, ours and
theirs, takes the best of the same five grids, chosen on validation noise; ours also of its charts, theirs of their
orders. Nothing was fitted or chosen on the noise that is measured on. Network beds have 256 samples, the avatars beds
`--pictures`. With `--transfer` instead: the plans that ship with avatars on digits and on guided avatars, beside auto.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import pfode
from pfode.cli import report
from pfode.cli.bench import find_problem
from pfode.files import lock_folder, make_folder
from pfode.samplers.measure import bench, results
from pfode.samplers.measure.bench import EVALS
from pfode.samplers.measure.problem import Problem
from pfode.samplers.measure.results import Folder, geometric_mean
from pfode.samplers.measure.spec import Spec
from pfode.scores.io.find import model_path

ROOT = Path(__file__).parents[1]  # where the command runs: results name the plans from there
OUT = Path(__file__).parent / "results" / "quality"
PLANS = OUT.parent / "fitted"
FITTED = (3, 4, 5, 6, 8, 10)
OURS = [
    "auto",
    "ddim?grid=best",
    "dpm++2m?grid=best",
    "unipc2?chart=dpm++/flow&grid=best",
    "unipc3?chart=dpm++/flow&grid=best",
    "ipndm2?chart=ddim/trig&grid=best",
    "ipndm3?chart=ddim/trig&grid=best",
    "ipndm4?chart=ddim/trig&grid=best",
    "exp-ab3?chart=dpm/trig&grid=best",
    "exp-ab3?chart=dpm&final=stop&lower_order_final=true&grid=best",
]
SEARCHED = ["ipndm3?grid=gits", "unipc2?chart=flow&grid=gits"]
PEERS = [
    "diffusers:EulerDiscreteScheduler?grid=best",
    "diffusers:DPMSolverMultistepScheduler?solver_order=2/3&grid=best",
    "diffusers:UniPCMultistepScheduler?solver_order=2/3&grid=best",
    "diffusers:DEISMultistepScheduler?solver_order=2/3&grid=best",
    "diffusers:IPNDMScheduler?grid=best",
    "k-diffusion:sample_dpmpp_2m?grid=best",
    "k-diffusion:sample_lms?grid=best",
    "k-diffusion:sample_heun?grid=best",
]
FEW = "karras/cosine/ays-svd"  # where a call takes its time
FEWER = [
    "auto",
    f"dpm++2m?grid={FEW}",
    f"unipc2?chart=flow&grid={FEW}",
    f"unipc3?chart=flow&grid={FEW}",
    f"ipndm2?chart=trig&grid={FEW}",
    f"ipndm3?chart=ddim&grid={FEW}",
    "ipndm3?grid=gits",
    f"diffusers:DPMSolverMultistepScheduler?grid={FEW}",
    f"diffusers:UniPCMultistepScheduler?grid={FEW}",
    f"diffusers:UniPCMultistepScheduler?solver_order=3&grid={FEW}",
    f"diffusers:IPNDMScheduler?grid={FEW}",
]
EXACT = [
    *["gaussian-16", "mixture-2", "mixture-64", "mixture-64-vp", "mixture-64-flow", "mixture-64~0.1"],
    *["mixture-64x15", "digits-ideal"],
]
SMALL = ["digits", "digits-vp", "digits-flow"]
LARGE = ["avatars", "avatars@2"]
SCALES = (1.5, 2, 3)
OF_AUTO = [*SMALL, *LARGE]  # beds that the table of `auto` was made from, or weighed against


def beds(pictures: int) -> dict[str, tuple[dict[str, Any], list[str]]]:
    """Every bed's sizes, and its samplers."""
    every = [*OURS, *SEARCHED, *PEERS]
    found = {name: ({"n": 1024, "validation": 128}, every) for name in EXACT}
    found |= {name: ({"n": 256, "validation": 32, "teacher": 256}, every) for name in SMALL}
    return found | {name: ({"n": pictures, "validation": 8, "teacher": 128}, FEWER) for name in LARGE}


def fit(names: Sequence[str], folder: Path) -> None:
    """The plans that the folder does not have, and in fits.jsonl what each of them cost and gained."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name in LARGE:
            continue
        bed = made(name, {"n": 1, "validation": 1})
        sizes: dict[str, Any] = {"n": 1024, "active": 256, "check": 512} if bed.exact else {}
        for nfe in FITTED:
            path = folder / f"{name}.plan-{nfe}.safetensors"
            if path.exists():
                continue
            began = time.process_time()
            plan = pfode.fit_plan(bed.denoiser, nfe, dtype=bed.dtype, **sizes)
            plan.save(path)
            said = plan.meta["fitted"]
            line: dict[str, Any] = {"bed": name, "nfe": nfe, "seconds": round(time.process_time() - began, 1)}
            line |= {"iterations": said["iterations"], "start": said["start"]["name"], **said["validation"]}
            with (folder / "fits.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            gain = line["rms"] / line["start rms"]
            print(f"{name} {nfe}: {gain:.3f} of the start's RMS, {line['seconds']} s", flush=True)


def made(name: str, sizes: dict[str, Any]) -> Problem:
    options = {"device": "cpu", "seed": None, "truth": None, "features": None, "batch": 256, "teacher": 512}
    return find_problem(name, options | sizes)


def measure(names: Sequence[str], pictures: int, plans: Path, out: Path, evals: Sequence[int]) -> None:
    """The cells of these beds that the folder does not have."""
    table, listed = beds(pictures), []
    for name in names:
        sizes, samplers = table[name]
        bed = made(name, sizes)
        fitted = [] if name in LARGE else [os.path.join(os.path.relpath(plans, ROOT), "")]
        fitted += ["fitted"] if getattr(bed.denoiser, "plans", None) else []
        listed.append((bed, [*samplers, *fitted]))
    run(listed, out, evals)


def transfer(pictures: int, out: Path) -> dict[str, Any]:
    """Plans fitted to avatars where they were not fitted."""
    plans = os.path.relpath(model_path("avatars").with_suffix(""), ROOT)
    samplers = ["auto", *(f"{plans}.plan-{k}.safetensors" for k in FITTED)]
    sizes = beds(pictures)
    run([(made("digits", sizes["digits"][0]), samplers)], out, FITTED)
    guided = [(made(f"avatars@{scale}", sizes["avatars@2"][0]), samplers) for scale in SCALES]
    run(guided, out, [2 * k for k in FITTED])
    return bench.bench([], out)


def run(listed: list[tuple[Problem, list[str]]], out: Path, evals: Sequence[int]) -> None:
    """The bench, with a bar."""
    with tqdm(unit=" cells", ncols=110, mininterval=5) as bar:

        def progress(done: int, total: int, what: str) -> None:
            bar.total = total
            bar.set_postfix_str(what[:60], refresh=False)
            bar.update(done - bar.n)

        bench.bench(listed, out, evals, progress=progress)


def gather(out: Path, parts: Sequence[Path]) -> None:
    """Take over what the processes measured, each in a folder of its own."""
    make_folder(out)
    with lock_folder(out):
        folder = Folder(out, [])
        for part in parts:
            folder.adopt(part)


def finish(out: Path, result: dict[str, Any], title: str) -> None:
    """The report; results.json says what the lines said, and a later run goes on from it."""
    report.write(out, result, title)
    (out / results.LINES).unlink(missing_ok=True)


# ---- the targets


def means(
    result: dict[str, Any],
    key: str,
    ours: Callable[[str], bool],
    theirs: Callable[[str], bool],
    skip: Sequence[str] = (),
    floor: float = 0.0,
) -> dict[int, float]:
    """By evaluations: the geometric mean over beds of the best of ours over the best of theirs.

    Distribution distances below that of the converged solution, which are luck, count as that.
    """
    values, found = results.table(result, key), {}
    least = {name: results.figure(bed["floor"]["teacher"], key) or 0.0 for name, bed in result["beds"].items()}
    for k in EVALS:
        ratios = []
        for bed in result["beds"]:
            here = {s: max(v, least[b]) for (b, s, at), v in values.items() if b == bed and at == k and b not in skip}
            a, b = [v for s, v in here.items() if ours(s)], [v for s, v in here.items() if theirs(s)]
            if a and b:
                ratios.append(max(min(a) / min(b), floor))
        if ratios:
            found[k] = geometric_mean(ratios)
    return found


def kind(text: str) -> str:
    """What a sampler is: "peer", "fitted", "searched", "auto" or "hand-made"."""
    parsed = Spec.parse(text)
    if parsed.kind in ("plan", "plans", "fitted"):
        return "fitted"
    if parsed.kind == "peer":
        return "peer"
    return "searched" if "gits" in parsed.options.get("grid", ()) else "auto" if text == "auto" else "hand-made"


def targets(result: dict[str, Any]) -> str:
    """The geometric means, beside what they should be."""
    ours, peer = (lambda s: kind(s) in ("auto", "hand-made")), (lambda s: kind(s) == "peer")
    known, fitted = (lambda s: kind(s) in ("auto", "hand-made", "peer")), (lambda s: kind(s) == "fitted")
    gaussian = [bed for bed in result["beds"] if bed.startswith("gaussian")]
    rows: list[tuple[str, dict[int, float], str]] = [
        ("catalogue's best / best peer, RMS", means(result, "rms", ours, peer), "<= 1.01, < 0.9 at two"),
        ("the same, median", means(result, "median", ours, peer), ""),
        ("auto / best hand-made, other beds", means(result, "rms", lambda s: s == "auto", known, OF_AUTO), "<= 1.15"),
        ("auto / best hand-made, every bed", means(result, "rms", lambda s: s == "auto", known), ""),
        ("searched grid (GITS) / best peer", means(result, "rms", lambda s: kind(s) == "searched", peer), ""),
        ("fitted / best peer, RMS", means(result, "rms", fitted, peer, gaussian, 0.1), "0.35 at 4-6, 0.55 at 8-10"),
        ("fitted / best peer, median", means(result, "median", fitted, peer, gaussian, 0.1), "0.15, 0.30"),
        ("fitted / best peer, energy", means(result, "energy", fitted, peer, gaussian), ""),
    ]
    lines = [f"{'geometric means over beds':36s}" + "".join(f"{k:>7d}" for k in EVALS) + "  target"]
    for name, found, target in rows:
        if found:
            figures = "".join(f"{found[k]:7.3f}" if k in found else " " * 7 for k in EVALS)
            lines.append(f"{name:36s}{figures}  {target}")
    return "\n".join(lines)


def shares(names: Iterable[str], jobs: int) -> list[list[str]]:
    """The beds dealt to processes: the slow ones apart."""
    hands: list[list[str]] = [[] for _ in range(jobs)]
    for i, name in enumerate(sorted(names, key=lambda name: (name not in LARGE, name not in SMALL, name))):
        hands[i % jobs].append(name)
    return [hand for hand in hands if hand]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*EXACT, *SMALL, *LARGE]
    parser.add_argument("--beds", nargs="+", default=every, choices=every)
    parser.add_argument("--nfe", nargs="+", type=int, default=list(EVALS))
    parser.add_argument("--plans", type=Path, default=PLANS, help="the folder of the plans")
    parser.add_argument("--transfer", action="store_true", help="instead: avatars's plans on other models")
    parser.add_argument("--pictures", type=int, default=32, help="samples of the avatars beds")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    began = time.perf_counter()
    options.out, options.plans = options.out.resolve(), options.plans.resolve()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    if options.transfer:
        out = OUT.parent / "transfer"
        finish(out, transfer(options.pictures, out), "Plans fitted to avatars, on other models")
        return
    if options.jobs > 1:
        words = ["--pictures", str(options.pictures), "--nfe", *map(str, options.nfe)]
        words += ["--plans", str(options.plans)]
        parts = [(options.out / f"part-{i}", hand) for i, hand in enumerate(shares(options.beds, options.jobs))]
        for part, _ in parts:  # begins with what is known
            part.mkdir(parents=True, exist_ok=True)
            if (options.out / results.RESULTS).exists() and not (part / results.LINES).exists():
                shutil.copy(options.out / results.RESULTS, part)
        runs = [
            subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), *words, "--out", str(part), "--beds", *hand],
                env={**os.environ, "QUALITY": "part"},
            )
            for part, hand in parts
        ]
        codes = [run.wait() for run in runs]
        if any(codes):
            sys.exit("a process failed; the same command goes on with what is there")
        gather(options.out, [part for part, _ in parts])
    fit(options.beds, options.plans)
    measure(options.beds, options.pictures, options.plans, options.out, options.nfe)
    if os.environ.get("QUALITY") == "part":
        return
    result = bench.bench([], options.out)
    finish(options.out, result, "Quality against evaluations, beside diffusers and k-diffusion")
    print(targets(result))
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
