"""Test the source distribution and the wheel in new environments.

- The source distribution installs into a new environment that has torch and no ``git``, and works
  there.
- auditwheel repairs the wheel, which contains no library of torch.
- cibuildwheel reads the settings in pyproject.toml, and builds a wheel if docker or podman runs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "package"
TORCH = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libtorch_python.so", "libc10.so")
SMOKE_TEST = (
    "import torch, fastkd; x = torch.randn(3, 5, requires_grad=True);"
    "fastkd.loss(x, torch.randn(3, 5)).backward(); print(fastkd.__file__)"
)


def run(*command: str | Path, **environment: str) -> str:
    """Run a command in ``FOLDER``; return its output, or raise RuntimeError after a failure.

    The command finds the tools of this Python environment, which need not be activated.
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        list(map(str, command)), cwd=FOLDER, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, "PATH": path, **environment},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{command[0]} gave {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def main() -> int:
    """Run all checks, and stop at the first failure."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    figures: dict[str, str] = {}
    run(sys.executable, "-m", "build", "--sdist", "--outdir", FOLDER, ROOT)
    (tarball,) = FOLDER.glob("*.tar.gz")
    figures["sdist"] = f"{tarball.name}, {tarball.stat().st_size // 1024} KiB"

    # The new environment imports the current environment's torch, and finds a git that fails.
    run(sys.executable, "-m", "venv", FOLDER / "env")
    python = FOLDER / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    import torch

    folders = {str(Path(torch.__file__).parents[1]), sysconfig.get_path("purelib")}
    (site / "torch.pth").write_text("\n".join(folders) + "\n")
    (FOLDER / "bin").mkdir()
    git = FOLDER / "bin" / "git"
    git.write_text("#!/bin/sh\necho 'git is not to be used' >&2\nexit 127\n")
    git.chmod(0o755)
    path = f"{FOLDER / 'bin'}:{python.parent}:{os.environ['PATH']}"
    wheel_command = (python, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", FOLDER, tarball)
    run(*wheel_command, PATH=path)
    (wheel,) = FOLDER.glob("*.whl")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel, PATH=path)
    imported = run(python, "-c", SMOKE_TEST).strip().splitlines()[-1]
    if not imported.startswith(str(site)):
        raise RuntimeError(f"{imported} was imported in place of the installed package")
    figures["installed"] = "from the tarball, under build isolation, without git: works"

    platform = re.findall(r'"(manylinux_\d+_\d+_\w+)"', run("auditwheel", "show", wheel))
    repair = ["auditwheel", "repair", "--plat", platform[0] if platform else "auto"]
    for name in TORCH:
        repair += ["--exclude", name]
    run(*repair, "-w", FOLDER / "repaired", wheel)
    (repaired,) = (FOLDER / "repaired").glob("*.whl")
    libraries = [name for name in zipfile.ZipFile(repaired).namelist() if ".so" in name]
    foreign = [name for name in libraries if not name.startswith("fastkd/_")]
    if foreign:
        raise RuntimeError(f"the repaired wheel holds {foreign}")
    figures["auditwheel"] = f"{repaired.name}: {len(libraries)} libraries, none of torch's"

    environments = run("cibuildwheel", "--print-build-identifiers", "--platform", "linux", ROOT)
    figures["cibuildwheel"] = f"settings read: {', '.join(environments.split())}"
    has_engine = any(
        subprocess.run([name, "info"], capture_output=True).returncode == 0
        for name in ("docker", "podman")
        if shutil.which(name)
    )
    if has_engine:
        identifier = environments.split()[0]
        run("cibuildwheel", "--only", identifier, "--output-dir", FOLDER / "cibuildwheel", ROOT)
        figures["cibuildwheel"] += f"; {identifier} built and tested"
    else:
        figures["cibuildwheel"] += "; not built: no container engine is running"
    print("figures: " + json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
