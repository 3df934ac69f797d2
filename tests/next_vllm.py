"""Another vLLM than the installed one, on the installed one's CPU binaries: runs tests there.

    python tests/next_vllm.py 0.33            # or a wheel's file; then what pytest is told
    python tests/next_vllm.py 0.33 tests/engine/test_server.py -k stream

A new vLLM has no CPU package at first. Its Python is taken from its CUDA wheel, the compiled parts
from the vLLM for CPUs that is installed. That is how far it can be tried here: a compiled function
that only the new one has fails when it is called. pytest's summary is the list of what broke.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "vllm"
ENGINE = ROOT / "tests" / "engine"
TESTS = [str(ENGINE / f"test_{name}.py") for name in ("equality", "features", "server")]
PLATFORM = "manylinux_2_28_x86_64"  # what vLLM's CUDA wheels are built for


def main(words: list[str]) -> int:
    if not words or words[0].startswith("-"):
        print("next_vllm: give a version (0.33) or a wheel's file", file=sys.stderr)
        return 2
    given, *told = words
    try:
        folder = unpack(Path(given) if given.endswith(".whl") else download(given), FOLDER)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        print(f"next_vllm: {error}", file=sys.stderr)
        return 2
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    code = "from fusedstep.vllm_plugin.compat import vllm_version; print(vllm_version())"
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    print(f"next_vllm: vLLM {found.stdout.strip() or found.stderr}, from {folder}", flush=True)
    pytest = [sys.executable, "-m", "pytest", "-rfE", *(told or TESTS)]
    return subprocess.run(pytest, env=env, cwd=ROOT).returncode


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


def installed_vllm() -> Path:
    """The folder of the installed vLLM, which must be one for CPUs."""
    spec = importlib.util.find_spec("vllm")
    for place in (spec and spec.submodule_search_locations) or ():
        if (Path(place) / "_C.abi3.so").exists():
            return Path(place)
    raise ValueError("install vLLM for CPUs first: make install VARIANT=cpu")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
