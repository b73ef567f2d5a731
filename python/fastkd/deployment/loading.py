"""Run programs of ONNX Runtime, ExecuTorch and ``torch.export`` as modules."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import batches, extras

ACCEPTED = (
    "a module, a torch.export.ExportedProgram, an onnxruntime.InferenceSession, an ExecuTorch "
    "program or method, or the path of an .onnx, .pte or .pt2 file"
)
COUNT = "fastkd_parameters"  # the key of the number of parameters in a file
NAMES = "fastkd_names"  # the key of the inputs' names, with spaces between them
_ONNX_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(uint8)": torch.uint8,
    "tensor(int8)": torch.int8,
    "tensor(bool)": torch.bool,
}
# Keys are the numbers of c10::ScalarType.
_EXECUTORCH_DTYPES = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
    15: torch.bfloat16,
}


class DeployedModel(nn.Module):
    """Call an exported program as a module; :func:`load` makes a ``DeployedModel``.

    The program runs on the CPU. The module has no parameters and no buffers.

    Attributes:
        name: the name of the file, or of the runtime.
        bytes: size of the file, with the files of external ONNX weights, or of the program in
            memory; None if unknown.
        parameter_count: number of the exported module's parameters; None if unknown.
        source: the path or the object from which the program was loaded.
    """

    def __init__(
        self,
        run: Callable[[Any], Tensor],
        source: Any,
        *,
        name: str,
        count_bytes: Callable[[], int | None],
        parameter_count: int | None = None,
        batch: int | None = None,
        is_fixed: bool = False,
    ) -> None:
        """Store ``run``, which maps a batch's inputs to logits, and ``count_bytes``.

        Each call of ``run`` gets at most ``batch`` samples, or exactly ``batch`` if ``is_fixed``.
        If ``batch`` is None, a call gets any number of samples. Metadata of ExecuTorch does not say
        if the batch size is fixed, so ``forward`` sets ``is_fixed`` when ``run`` refuses a smaller
        batch.
        """
        super().__init__()
        self.name, self.parameter_count, self.source = name, parameter_count, source
        self._count_bytes = count_bytes
        self._run, self._batch, self._is_fixed = run, batch, is_fixed

    def forward(self, *positional: Any, **keywords: Any) -> Tensor:
        """Return the logits of a batch, which is split or padded to the program's batch size."""
        inputs: Any = keywords or positional
        size = batches.size(inputs, None)
        if self._batch is None or size == self._batch:
            return self._run(inputs)
        if size > self._batch:
            parts = [
                take_samples(inputs, torch.arange(start, min(start + self._batch, size)))
                for start in range(0, size, self._batch)
            ]
            return torch.cat([self(**part) if keywords else self(*part) for part in parts])
        if not self._is_fixed:
            with contextlib.suppress(RuntimeError):
                return self._run(inputs)
            self._is_fixed = True
        padded = take_samples(inputs, torch.arange(self._batch).clamp(max=size - 1))
        return self._run(padded)[:size]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """Load the program again, because the objects of a runtime cannot be copied."""
        return load(self.source)

    @property
    def bytes(self) -> int | None:
        """Return the size of the file or of the program in memory; None if unknown."""
        return self._count_bytes()

    @property
    def is_file(self) -> bool:
        """Return True if the program was loaded from a file."""
        return isinstance(self.source, pathlib.Path)

    def extra_repr(self) -> str:
        """Return the name of the program."""
        return self.name


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Silence the warnings of exporters and runtimes, which a user of fastkd cannot act on."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def take_samples(inputs: Any, index: Tensor) -> Any:
    """Return the samples at ``index`` of a batch's inputs; 0-d tensors are returned unchanged."""
    return batches.map_tensors(lambda t: t[index.to(t.device)] if t.dim() else t, inputs)


def check_model(name: str, model: Any) -> None:
    """Raise TypeError unless :func:`load` takes the type of ``model``."""
    if not is_model(model):
        raise TypeError(f"{name} must be {ACCEPTED}; got {type(model).__name__}")


def is_model(model: Any) -> bool:
    """Return True if :func:`load` takes the type of ``model``."""
    kinds = (nn.Module, torch.export.ExportedProgram, str, os.PathLike)
    return isinstance(model, kinds) or _find_loader(model) is not None


def load(model: Any) -> nn.Module:
    """Return a module that runs ``model``; a module is returned unchanged.

    A program in a file is loaded with ``torch.get_num_threads()`` threads. A program for a fixed
    number of samples is called several times for a larger batch, and a smaller batch is padded.

    Args:
        model: a module, a ``torch.export.ExportedProgram``, an ``onnxruntime.InferenceSession``, an
            ``executorch.runtime`` ``Program`` or ``Method``, or the path of an ``.onnx``, ``.pte``
            or ``.pt2`` file. Load only a ``.pt2`` file that you trust: PyTorch may unpickle parts
            of the file, which can run code.

    Raises:
        ImportError: if the runtime's package is missing; the message names the extra.
        TypeError: if ``model`` has an unsupported type.
        ValueError: if the file does not exist, does not end in ``.onnx``, ``.pte`` or ``.pt2``, or
            cannot be loaded by its runtime.
        OSError: if the file cannot be read.
    """
    if isinstance(model, nn.Module):
        return model
    check_model("model", model)
    if isinstance(model, (str, os.PathLike)):
        path = pathlib.Path(model)
        loaders = {".onnx": _load_onnx, ".pte": _load_executorch, ".pt2": _load_torch}
        if path.suffix not in loaders or not path.is_file():
            raise ValueError(f"model must be an existing .onnx, .pte or .pt2 file; got {path}")
        try:
            return loaders[path.suffix](path)
        except (extras.MissingPackageError, OSError):
            raise
        except Exception as error:  # each runtime has errors of its own
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"model: {path} cannot be loaded, {reason}") from error
    return (_find_loader(model) or _load_torch)(model)


def _find_loader(model: Any) -> Callable[[Any], DeployedModel] | None:
    """Return the loader of an object of ONNX Runtime or ExecuTorch, or None for other objects.

    The loader is found by the name of the object's type; the runtime is not imported.
    """
    for kind in type(model).__mro__:
        package = kind.__module__.partition(".")[0]
        if (package, kind.__name__) == ("onnxruntime", "InferenceSession"):
            return _load_onnx
        if package == "executorch" and kind.__name__ in ("Program", "Method"):
            return _load_executorch
    return None


def _order(inputs: Any, names: list[str]) -> Any:
    """Return the inputs of a mapping in the order of ``names``, and other inputs unchanged.

    Without names, a mapping is returned unchanged.
    """
    if not isinstance(inputs, Mapping) or not names:
        return inputs
    if set(inputs) != set(names):
        raise TypeError(f"the program has the inputs {names}; got {list(inputs)}")
    return [inputs[name] for name in names]


def _load_onnx(source: Any) -> DeployedModel:
    runtime = extras.load("onnxruntime", "deploy")
    if isinstance(source, pathlib.Path):
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = runtime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    else:
        session = source
    arguments, outputs = session.get_inputs(), [each.name for each in session.get_outputs()]
    names = [each.name for each in arguments]
    dtypes = [_ONNX_DTYPES.get(each.type) for each in arguments]
    output = "logits" if "logits" in outputs else outputs[0]

    def run(inputs: Any) -> Tensor:
        tensors = batches.tensors(_order(inputs, names))
        feed = {
            name: tensor.to("cpu", dtype).numpy()
            for name, dtype, tensor in zip(names, dtypes, tensors, strict=True)
        }
        return torch.from_numpy(session.run([output], feed)[0])

    # The model is parsed only when its size is asked for, so that its peak memory stays that of the
    # session.
    def count_bytes() -> int | None:
        path, data = getattr(session, "_model_path", None), getattr(session, "_model_bytes", None)
        if path is None:
            return len(data) if data else None
        file = pathlib.Path(path)
        # Weights may be in other files, which torch.onnx.export writes unless told otherwise.
        model = extras.load("onnx", "deploy").load(file, load_external_data=False)
        entries = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
        files = {file} | {file.parent / each.value for each in entries if each.key == "location"}
        return sum(each.stat().st_size for each in files)

    first = arguments[0].shape[0] if arguments and arguments[0].shape else None
    count = session.get_modelmeta().custom_metadata_map.get(COUNT)
    return DeployedModel(
        run,
        source,
        name=source.name if isinstance(source, pathlib.Path) else "ONNX Runtime",
        count_bytes=count_bytes,
        parameter_count=None if count is None else int(count),
        batch=first if isinstance(first, int) else None,
        is_fixed=True,
    )


def _load_executorch(source: Any) -> DeployedModel:
    with silence():
        runtime = extras.load("executorch.runtime", "deploy")
        bindings = extras.load("executorch.extension.pybindings.portable_lib", "deploy")
    program, threads = source, torch.get_num_threads()
    if isinstance(source, pathlib.Path):
        if bindings._threadpool_get_thread_count() != threads:
            bindings._unsafe_reset_threadpool(threads)  # unsafe only while a program runs
        program = runtime.Runtime.get().load_program(source)
    count, names, method = None, "", program
    if isinstance(program, runtime.Program):
        if COUNT in program.method_names:
            count = int(program.load_method(COUNT).execute([])[0])
        if NAMES in program.method_names:
            names = program.load_method(NAMES).execute([])[0]
        method = program.load_method("forward")
    arguments = [
        method.metadata.input_tensor_meta(index) for index in range(method.metadata.num_inputs())
    ]
    dtypes = [_EXECUTORCH_DTYPES.get(each.dtype()) for each in arguments]

    def run(inputs: Any) -> Tensor:
        tensors = zip(batches.tensors(_order(inputs, names.split())), dtypes, strict=True)
        logits: Tensor = method.execute([t.to("cpu", d).contiguous() for t, d in tensors])[0]
        return logits

    return DeployedModel(
        run,
        source,
        name=source.name if isinstance(source, pathlib.Path) else "ExecuTorch",
        count_bytes=lambda: source.stat().st_size if isinstance(source, pathlib.Path) else None,
        parameter_count=count,
        batch=arguments[0].sizes()[0] if arguments and arguments[0].sizes() else None,
    )


def _load_torch(source: Any) -> DeployedModel:
    is_file, extra = isinstance(source, pathlib.Path), {COUNT: "", NAMES: ""}
    with silence():
        program = torch.export.load(source, extra_files=extra) if is_file else source
    count = int(extra[COUNT] or sum(parameter.numel() for parameter in program.parameters()))
    state = batches.tensors((program.state_dict, program.constants))
    size = source.stat().st_size if is_file else sum(tensor.nbytes for tensor in state)
    module = program.module()
    takes_keywords = program.call_spec.in_spec.child(1).num_children > 0

    names = str(extra[NAMES] or "").split()

    def run(inputs: Any) -> Tensor:
        inputs = _order(inputs, names)
        if isinstance(inputs, Mapping) and not takes_keywords:
            inputs = tuple(batches.tensors(inputs))
        return batches.logits(module, inputs)

    shapes = [
        node.meta["val"].shape
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    ]
    first = shapes[0][0] if shapes and shapes[0] else None
    return DeployedModel(
        run,
        source,
        name=source.name if is_file else "torch.export",
        count_bytes=lambda: size,
        parameter_count=count or None,  # a program may hold its weights as constants
        batch=first if type(first) is int else None,
        is_fixed=True,
    )
