"""Another vLLM than the installed one, on the installed one's CPU binaries: runs tests there.

    python tests/next_vllm.py 0.33            # or a wheel's file; then what pytest is told
    python tests/next_vllm.py 0.33 tests/engine/test_server.py -k stream
    python tests/next_vllm.py installed       # the installed one, as it is

A new vLLM has no CPU package at first. Its Python is taken from its CUDA wheel, the compiled parts
from the vLLM for CPUs that is installed. That is how far it can be tried here: a compiled function
that only the new one has fails when it is called. pytest's summary is the list of what broke.
Packages that it requires and nobody installed are named; those of NEEDED are put beside it.

A file of TESTS that ran whole, and nothing beside it, is put on record with the numbers of its
tests: fusedstep/vllm_plugin/tried.json, from which the supported versions follow.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from packaging.requirements import Requirement

from fusedstep.vllm_plugin.compat import TRIED, WHOLE

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "vllm"
ENGINE = ROOT / "tests" / "engine"
TESTS = [str(ENGINE / f"test_{name}.py") for name in WHOLE]
RAN = (0, 1)  # pytest's exit codes: all tests ran
QUIET = ("-q", "-v")
# Packages that a vLLM for CPUs needs, too: not in the installed one's, and not for GPUs only.
NEEDED = ("orjson",)
PLATFORM = "manylinux_2_28_x86_64"  # what vLLM's CUDA wheels are built for


def main(words: list[str]) -> int:
    if not words or words[0].startswith("-"):
        print("next_vllm: give a version (0.33) or a wheel's file", file=sys.stderr)
        return 2
    given, *told = words
    try:
        folder = None
        if given != "installed":
            folder = unpack(Path(given) if given.endswith(".whl") else download(given), FOLDER)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        print(f"next_vllm: {error}", file=sys.stderr)
        return 2
    paths = [str(path) for path in (folder, os.environ.get("PYTHONPATH")) if path]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    code = "from fusedstep.vllm_plugin.compat import vllm_version; print(vllm_version())"
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if not (version := found.stdout.strip()):
        print(f"next_vllm: no version of vLLM: {found.stderr}", file=sys.stderr)
        return 2
    print(f"next_vllm: vLLM {version}, from {folder or 'here'}", flush=True)
    if folder and (without := bring(folder)):
        print(f"next_vllm: it requires and does not get {', '.join(without)}", flush=True)
    worst, known = 0, json.loads(TRIED.read_text())
    write(known | {version: {}})  # else a vLLM that is out of range is refused
    try:
        for group in [told] if told else [[test] for test in TESTS]:
            with tempfile.TemporaryDirectory() as scratch:
                report = Path(scratch, "report.xml")
                pytest = [sys.executable, "-m", "pytest", "-rfE", f"--junitxml={report}", *group]
                code_of = subprocess.run(pytest, env=env, cwd=ROOT).returncode
                worst = worst or code_of
                if code_of in RAN and (names := whole(group)):
                    known[version] = known.get(version, {}) | numbers(names, report)
    finally:
        write(known)
    return worst


def whole(told: list[str]) -> list[str]:
    """The names of WHOLE whose files pytest is told to run, all of each; [] if it is told more."""
    names = {str(Path(test)): name for name, test in zip(WHOLE, TESTS, strict=True)}
    found = [names.get(str(ROOT / word)) for word in told if word not in QUIET]
    return [] if None in found else [name for name in found if name]


def numbers(names: list[str], report: Path) -> dict[str, dict[str, Any]]:
    """What a run of these files gave, by file."""
    today = datetime.date.today().isoformat()
    counts = {name: {"passed": 0, "failed": 0, "skipped": 0} for name in names}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("classname", "").rpartition("test_")[2].partition(".")[0]
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "passed"
        counts[name]["skipped" if "skipped" in kinds else kind] += 1
    return {name: {"date": today} | count for name, count in counts.items()}


def write(known: dict[str, Any]) -> None:
    TRIED.write_text(json.dumps(dict(sorted(known.items())), indent=2) + "\n")


def download(version: str) -> Path:
    """The CUDA wheel of the newest release of this version, once. Raises ValueError."""
    wheels = FOLDER / "wheels"
    known = sorted(wheels.glob(f"vllm-{version}.*.whl")) + sorted(wheels.glob(f"vllm-{version}-*"))
    if known:
        return known[-1]
    release = version if version.count(".") > 1 else f"{version}.*"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    pip += ["--platform", PLATFORM, "--dest", str(wheels), f"vllm=={release}"]
    done = subprocess.run(pip, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise ValueError(f"no wheel of vLLM {version}: {done.stderr.strip().splitlines()[-1]}")
    return next(wheels.glob(f"vllm-{version}*.whl"))


def unpack(wheel: Path, where: Path) -> Path:
    """A folder to put first on PYTHONPATH: the wheel without what is compiled, and ours of that.

    Its distribution is ``vllm VERSION+cpu``: by that name vLLM takes itself for a CPU build.
    """
    if not wheel.name.startswith("vllm-"):
        raise ValueError(f"{wheel.name} is no wheel of vLLM")
    version = wheel.name.split("-")[1].partition("+")[0]
    folder = where / version
    shutil.rmtree(folder, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith((".so", "/RECORD"))]
        archive.extractall(folder, names)
    (metadata,) = folder.glob("vllm-*.dist-info")
    renamed = metadata.rename(folder / f"vllm-{version}+cpu.dist-info")
    text = (renamed / "METADATA").read_text("utf-8")
    lines = [
        f"Version: {version}+cpu" if line.startswith("Version: ") else line
        for line in text.split("\n")
    ]
    (renamed / "METADATA").write_text("\n".join(lines), "utf-8")
    installed = installed_vllm()
    for binary in installed.rglob("*.so"):
        shutil.copy(binary, folder / "vllm" / binary.relative_to(installed))
    return folder


def bring(folder: Path) -> list[str]:
    """What a laid-out vLLM requires and has not: NEEDED is put beside it, the rest is returned."""
    without = []
    (metadata,) = folder.glob("vllm-*.dist-info")
    for line in Distribution.at(metadata).requires or ():
        required = Requirement(line)
        if required.marker and not required.marker.evaluate({"extra": ""}):
            continue
        try:
            distribution(required.name)
        except PackageNotFoundError:
            if required.name not in NEEDED:
                without.append(required.name)
                continue
            words = f"{required.name}{required.specifier}"
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            subprocess.run([*pip, "--target", str(folder), words], check=True)
    return without


def installed_vllm() -> Path:
    """The folder of the installed vLLM, which must be one for CPUs."""
    spec = importlib.util.find_spec("vllm")
    for place in (spec and spec.submodule_search_locations) or ():
        if (Path(place) / "_C.abi3.so").exists():
            return Path(place)
    raise ValueError("install vLLM for CPUs first: make install VARIANT=cpu")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
