"""Write the lock files beside this one: the versions installed in .venv, every file with its SHA-256.

    python3 -m venv .venv && .venv/bin/python -m pip install --editable '.[test,dev]' uv
    .venv/bin/python -m pip install --no-deps k-diffusion==0.1.1
    .venv/bin/python .ci/lock/renew.py

torch.txt has torch, torch-cpu.txt its build for processors alone, which make takes where an index has it; run.txt what
pfode needs besides, test.txt what the tests need besides, check.txt what `make check` does, sbom.txt what `make sbom`
does. The hashes are those of all files of a version, whatever the platform, but for torch-cpu.txt.
"""

import hashlib
import importlib.metadata
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

HERE = Path(__file__).parent
EXTRAS = {"run.txt": {""}, "test.txt": {"test"}, "check.txt": {"dev"}}
BESIDES = {"run.txt": ["setuptools"], "test.txt": ["k-diffusion"]}  # builds pfode; its sampling.py is compared with
SBOM = "cyclonedx-bom==7.5.0\n"
ALONE = {"k-diffusion"}  # asks for torchvision, which would replace the pinned torch; without what it asks for


def named(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needs(name: str, extras: set[str]) -> list[str]:
    """What a package asks for with these extras, here."""
    found = [Requirement(text) for text in importlib.metadata.requires(name) or []]
    wanted = [one for one in found if one.marker is None or any(one.marker.evaluate({"extra": e}) for e in extras)]
    own = [one for one in wanted if named(one.name) == named(name)]  # an extra made of others
    return [one.name for one in wanted if one not in own] + [other for one in own for other in needs(name, one.extras)]


def closure(names: list[str]) -> dict[str, str]:
    """These packages and what they need, with their versions."""
    ahead, found = [named(name) for name in names], {}
    while ahead:
        name = ahead.pop()
        if name in found or name == "pfode":
            continue
        found[name] = importlib.metadata.version(name)
        if name not in ALONE:
            ahead += [named(other) for other in needs(name, {""})]
    return found


def compiled(text: str, options: list[str]) -> str:
    """The lines of a lock file for these requirements."""
    fixed = ["--generate-hashes", "--no-annotate", "--no-header", "--python-version", "3.11", "--quiet"]
    command = [sys.executable, "-m", "uv", "pip", "compile", *fixed, *options, "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def hashed(pins: dict[str, str]) -> str:
    """The lines of a lock file."""
    text = "".join(f"{name}=={version.split('+')[0]}\n" for name, version in sorted(pins.items()))
    return compiled(text, ["--no-deps"])


def on_processors(version: str) -> str:
    """The line of torch's wheel for processors, which is on no index that has hashes, for this Python and system."""
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*download, f"torch=={version}+cpu"], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        return f"torch=={version}+cpu --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n"


def main() -> None:
    taken = {"torch"}
    files = {"sbom.txt": compiled(SBOM, []), "torch.txt": hashed({"torch": importlib.metadata.version("torch")})}
    files["torch-cpu.txt"] = on_processors(importlib.metadata.version("torch").split("+")[0])
    for file, extras in EXTRAS.items():
        pins = closure([*needs("pfode", extras), *BESIDES.get(file, [])])
        files[file] = hashed({name: version for name, version in pins.items() if name not in taken})
        taken |= set(pins)
    for file, text in files.items():
        (HERE / file).write_text(f"# {file}: written by renew.py; the Makefile says what it is for\n{text}")


if __name__ == "__main__":
    main()
