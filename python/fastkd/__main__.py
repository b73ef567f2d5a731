"""``python -m fastkd info``: what a bug report needs."""

from __future__ import annotations

import argparse
import platform

import torch

import fastkd
from fastkd import _C


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


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="python -m fastkd", description=fastkd.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print versions, kernels and threads: what a bug report needs")
    parser.parse_args()
    facts = info()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
