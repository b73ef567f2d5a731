"""``python -m fastkd``: what a bug report needs, and training and reports without a script."""

from __future__ import annotations

import argparse
import platform
import traceback

import torch

import fastkd
from fastkd import _C
from fastkd.commands import distill, report

# Who calls what in a training; all else is the user's code.
CALLERS = {"fastkd", "torch", "accelerate", "contextlib"}


def info() -> dict[str, str]:
    """Versions, the instruction set in use, what was built, and the threads at hand."""
    facts = {
        "fastkd": fastkd.__version__,
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'not in this build'})",
        "Python": platform.python_version(),
        "platform": platform.platform(),
        "compiler": _C.compiler,
        "CPU kernels": f"{_C.isa()} in use; available: {', '.join(_C.available_isas())}",
        "CUDA kernels": _C.cuda_architectures or "not built (needs nvcc and a CUDA build of torch)",
        "threads": str(torch.get_num_threads()),
        "divergences": ", ".join(fastkd.divergences()),
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            facts[f"GPU {index}"] = (
                f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
            )
    return facts


def _print_info(_: argparse.Namespace) -> None:
    facts = info()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def main() -> None:
    """Parses the command line, and runs what it names."""
    parser = argparse.ArgumentParser(prog="python -m fastkd", description="Knowledge distillation.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "info", help="print versions, kernels and threads: what a bug report needs"
    )
    command.set_defaults(run=_print_info)
    distill.add(commands)
    report.add(commands)
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except (ValueError, ImportError) as error:
        if not _says_what_does_not_fit(error):
            raise
        parser.exit(2, f"fastkd {arguments.command}: {error}\n")


def _says_what_does_not_fit(error: Exception) -> bool:
    """Whether fastkd raised it, and no code of the user's led there: that keeps its traceback."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][1:]
    packages = [frame.f_globals["__name__"].partition(".")[0] for frame in frames]
    return packages[-1] == "fastkd" and set(packages) <= CALLERS


if __name__ == "__main__":
    main()
