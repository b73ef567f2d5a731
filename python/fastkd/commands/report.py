"""``python -m fastkd report``: measures what a training brought."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from torch.utils.data import DataLoader

from fastkd import extras, reports
from fastkd.commands import config
from fastkd.commands.factories import Factories

DESCRIPTION = """Compares students with their teacher: size, latency, accuracy, calibration.

  python -m fastkd report --config examples/digits.yaml --output report
  python -m fastkd report --config examples/digits.yaml \\
      --model alone=digits_parts:student@runs/alone/student.safetensors
  python -m fastkd report --teacher my_models:teacher@teacher.safetensors \\
      --model small=my_models:small@small.safetensors --data my_data:test_set

With a configuration of `distill`, the teacher, the validation data and the student that was written
to its output are taken from there; what flags told distill, such as --output runs/second, is given
here as --set output=runs/second.

Functions of a configuration come from modules beside it, and from those that --module, --teacher,
--model or --data name.
"""
MODEL = "MODULE:FACTORY[@FILE.safetensors]"


def add(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "report",
        help="compare students with their teacher, as a table, Markdown, JSON and a page",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=pathlib.Path, metavar="FILE", help="as for distill")
    config.add_set(parser)
    config.add_modules(parser)
    parser.add_argument("--teacher", metavar=MODEL)
    parser.add_argument("--data", metavar="MODULE:FACTORY", help="held-out data set")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar=f"NAME={MODEL}",
        help="a student; repeatable",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="of the answers; default 64")
    parser.add_argument("--title", default="Distillation report")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing each; default 1")
    parser.add_argument("--output", help="folder for report.html, .md, .json and pictures")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measures, shows and writes."""
    teacher, data, students = None, None, {}
    folder, named = pathlib.Path.cwd(), list[str]()
    batch_size = config.KEYS["batch_size"].read("--batch-size", arguments.batch_size)
    output = arguments.output and config.KEYS["output"].read("--output", arguments.output)
    if arguments.overrides and arguments.config is None:
        raise config.ConfigError("--set changes what a --config says, and there is none")
    if arguments.config is not None:
        chosen = config.read(arguments.config, arguments.overrides)
        folder = arguments.config.parent
        teacher, data = chosen["teacher"], chosen["validation"]
        trained = pathlib.Path(chosen["output"]) / "student.safetensors"
        students["distilled"] = chosen["student"]._replace(weights=str(trained))
    if arguments.teacher is not None:
        teacher = _model("--teacher", arguments.teacher)
        named.append(_module(teacher))
    if arguments.data is not None:
        data = config.KEYS["validation"].read("--data", arguments.data)
        named.append(_module(data))
    for text in arguments.model:
        name, equals, model = text.partition("=")
        if not equals or not name:
            raise config.ConfigError(f"--model must be NAME={MODEL}; got {text!r}")
        students[name] = _model("--model", model)
        named.append(_module(students[name]))
    if teacher is None or teacher.factory is None:
        raise config.ConfigError("--teacher is missing: a model, with --config or without it")
    if data is None:
        raise config.ConfigError("--data is missing, and there is no validation in a --config")
    if not students:
        raise config.ConfigError("--model is missing: at least one student")
    extras.check("report", "rich", *(["matplotlib"] if output is not None else []))
    factories = Factories(folder, [*arguments.modules, *named])
    samples = factories.make_data("data", data)
    loader = samples if isinstance(samples, DataLoader) else DataLoader(samples, batch_size)
    found = reports.report(
        factories.make_model("teacher", teacher),
        {name: factories.make_model(name, part) for name, part in students.items()},
        loader,
        title=arguments.title,
        seconds=arguments.seconds,
    )
    if output is not None:
        print(f"wrote {found.save(output) / 'report.html'}")


def _model(name: str, text: str) -> config.Part:
    """``MODULE:FACTORY``, and after an @ the file of its weights."""
    factory, _, weights = text.partition("@")
    part: config.Part = config.KEYS["student"].read(name, factory)
    return part._replace(weights=weights or None)


def _module(part: config.Part) -> str:
    """Return the module that a flag names, and thereby trusts."""
    return (part.factory or "").partition(":")[0]
