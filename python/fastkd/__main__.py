"""Run the command line of fastkd: ``fastkd`` and ``python -m fastkd``."""

from __future__ import annotations

import argparse
import platform

import torch

import fastkd
from fastkd import _C
from fastkd._core import native
from fastkd.commands import config
from fastkd.commands.distill import distill
from fastkd.commands.export import export
from fastkd.commands.factories import ConfigError
from fastkd.commands.report import report
from fastkd.commands.sweep import sweep
from fastkd.extras import MissingPackageError

_COMMANDS = (distill, sweep, report, export)


def info() -> dict[str, str]:
    """Return the names and values that ``fastkd info`` prints."""
    facts = {
        "fastkd": fastkd.__version__,
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'not in this build'})",
        "Python": platform.python_version(),
        "platform": platform.platform(),
        "compiler": _C.compiler,
        "CPU kernels": f"{_C.isa()} in use; available: {', '.join(_C.available_isas())}",
        "CUDA kernels": _C.cuda_architectures or "not built (needs nvcc and a CUDA build of torch)",
        "fast path": native.FAST_PATH,
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


def main() -> None:
    """Parse the command line, and run the command that it names."""
    parser = argparse.ArgumentParser(prog="fastkd", description="Knowledge distillation.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print versions, kernels and threads for a bug report")
    # config.run parses the options of these commands, and prints the help.
    commands.add_parser("distill", add_help=False, help="train a student on a teacher's outputs")
    commands.add_parser("sweep", add_help=False, help="compare losses with training alone")
    commands.add_parser("report", add_help=False, help="compare students with their teacher")
    commands.add_parser("export", add_help=False, help="write a student as a program for a device")
    arguments, options = parser.parse_known_args()
    if arguments.command == "info":
        if options:
            parser.error(f"info has no options; got {' '.join(options)}")
        for name, value in info().items():
            print(f"{name:<13}  {value}")
        return
    try:
        config.run({each.__name__: each for each in _COMMANDS}[arguments.command], options)
    except (ConfigError, MissingPackageError) as error:
        parser.exit(2, f"fastkd {arguments.command}: {error}\n")


if __name__ == "__main__":
    main()
