"""Run core tests on an extension built with AddressSanitizer and UndefinedBehaviorSanitizer.

The extension is installed in a new environment, which also imports the packages of the current
environment. The interpreter is built without sanitizers, so LD_PRELOAD loads the library of
AddressSanitizer. Leaks are not detected, because an interpreter does not free all memory at exit;
``make soak`` checks that memory does not grow.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "sanitize-python"
CORE = [
    "loss",
    "terms",
    "bad_input",
    "determinism",
    "concurrency",
    "fuzz",
    "topk",
    "fuzz_topk",
    "fuzz_ops",
    "mixture",
]


def find_library(name: str) -> str:
    """Return the path of a library of g++."""
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    """Build the extension and run the tests; return pytest's exit status."""
    subprocess.run([sys.executable, "-m", "venv", FOLDER], check=True)
    python = FOLDER / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = FOLDER / "lib" / version / "site-packages"
    folders = {str(Path(torch.__file__).parents[1]), sysconfig.get_path("purelib")}
    (site / "packages.pth").write_text("\n".join(folders) + "\n")
    options = ["FASTKD_SANITIZE=address,undefined", "FASTKD_CUDA=OFF"]
    install = [python, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps"]
    install += ["--force-reinstall", f"--config-settings=build-dir={FOLDER / 'build'}"]
    install += [f"--config-settings=cmake.define.{option}" for option in options]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run([*install, ROOT], check=True, env={**os.environ, "PATH": path})
    environment = {
        **os.environ,
        # AddressSanitizer intercepts C++ exceptions, for which libstdc++ must be loaded.
        "LD_PRELOAD": f"{find_library('libasan.so')} {find_library('libstdc++.so.6')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    tests = [f"tests/test_{name}.py" for name in CORE]
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
