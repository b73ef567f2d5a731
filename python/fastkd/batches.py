"""Split the batches of a data loader, move them to a device, and pass them to a model.

A batch is one of

- ``(inputs, labels)``, ``(inputs,)`` or a tensor of inputs;
- ``(inputs, labels, ids)``: a :class:`Labelled`, or any tuple or list of three. The ids number the
  samples of a :class:`fastkd.teachers.TeacherCache`;
- an :class:`Unlabelled`, ``(inputs, ids)``;
- a mapping with ``"labels"`` and ``"ids"``, both optional. All other entries of the mapping are
  keyword arguments of the models, as in Hugging Face's libraries.

:class:`WithIds` adds the ids to a dataset.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

NO_BATCH = (
    "loader gave no batch: it is empty, or an iterator that has been iterated before; give a "
    "DataLoader, or a list of batches"
)


class Labelled(NamedTuple):
    """Hold a sample of :class:`WithIds` with labels, or a batch of such samples."""

    inputs: Any
    labels: Any
    ids: Any


class Unlabelled(NamedTuple):
    """Hold a sample of :class:`WithIds` without labels, or a batch of such samples."""

    inputs: Any
    ids: Any


class Batch(NamedTuple):
    """Hold the parts of a batch that :func:`split` returns."""

    inputs: Any
    """A tensor, a tuple or list of positional arguments, or a mapping of keyword arguments."""
    labels: Tensor | None
    ids: Tensor | None
    """An int64 tensor with one id for each sample."""


class WithIds(Dataset[Any]):
    """Give each sample of a map-style dataset an id: the sample's index.

    ``(x, y)`` becomes ``Labelled(x, y, i)``; ``x`` or ``(x,)`` becomes ``Unlabelled(x, i)``; a
    mapping gets the key ``"ids"``. Wrap the complete dataset first and take subsets of the result,
    so that a sample has the same id in every subset.

    Raises:
        TypeError: for a dataset without ``__len__`` or ``__getitem__``, or for a sample that is a
            tuple or list of 0 or more than 2 values.

    Example:
        >>> import torch, fastkd
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> data = TensorDataset(torch.zeros(4, 2), torch.tensor([0, 1, 1, 0]))
        >>> batch = next(iter(DataLoader(fastkd.teachers.WithIds(data), batch_size=3)))
        >>> batch.labels, batch.ids
        (tensor([0, 1, 1]), tensor([0, 1, 2]))
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        """Wrap the map-style ``dataset``."""
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                "dataset must be map-style, with __len__ and __getitem__; got "
                f"{type(dataset).__name__}. Samples of an iterable dataset have no position: yield "
                "(inputs, labels, id) from it yourself"
            )
        self.dataset = dataset

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """Return a sample with its id."""
        index = range(len(self))[index]
        item = self.dataset[index]
        if isinstance(item, Mapping):
            return {**item, "ids": index}
        values = item if isinstance(item, (tuple, list)) else (item,)
        if len(values) == 1:
            return Unlabelled(values[0], index)
        if len(values) == 2:
            return Labelled(values[0], values[1], index)
        raise TypeError(
            "a sample must be x, (x,), (x, y) or a mapping, to be given an id; got "
            f"{len(values)} values. Make x a tuple, or the sample a mapping"
        )


def split(batch: Any) -> Batch:
    """Split a loader's batch into inputs, labels and ids; the module lists the accepted forms.

    Raises:
        TypeError: for a batch in no accepted form, or for ids that are not a 1-d integer tensor.

    Example:
        >>> import torch
        >>> from fastkd import batches
        >>> batches.split((torch.zeros(2, 3), torch.tensor([0, 1]))).labels
        tensor([0, 1])
    """
    labels = ids = None
    if isinstance(batch, Tensor):
        inputs: Any = batch
    elif isinstance(batch, Mapping):
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "ids")}
        labels, ids = batch.get("labels"), batch.get("ids")
    elif isinstance(batch, Unlabelled):
        inputs, ids = batch
    elif isinstance(batch, (tuple, list)) and 1 <= len(batch) <= 3:
        inputs, labels, ids = (*batch, None, None)[:3]
    else:
        size = f" of {len(batch)}" if isinstance(batch, Sequence) else ""
        raise TypeError(
            "a batch must be a tensor, (inputs, labels), (inputs, labels, ids) or a mapping; got "
            f"{type(batch).__name__}{size}"
        )
    return Batch(inputs, labels, None if ids is None else check_ids(ids))


def check_ids(ids: object) -> Tensor:
    """Return ids as int64; raise TypeError unless they are a 1-d integer tensor."""
    description = type(ids).__name__
    if isinstance(ids, Tensor):
        is_integer = not (ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool)
        if ids.dim() == 1 and is_integer:
            return ids.long()
        description = f"{ids.dtype} of shape {tuple(ids.shape)}"
    raise TypeError(f"ids must be an integer tensor of shape (B,); got {description}")


def logits(model: nn.Module, inputs: Any) -> Tensor:
    """Call ``model`` on a batch's inputs, and return the logits of the model's output."""
    return logits_of(outputs(model, inputs), model)


def outputs(model: nn.Module, inputs: Any) -> Any:
    """Call ``model`` with the arguments that :func:`arguments` makes of a batch's inputs.

    Raises:
        TypeError: if ``inputs`` is a mapping that does not fit the model's ``forward``; the message
            names the model and the keys.
    """
    positional, keywords = arguments(model, inputs)
    try:
        return model(*positional, **keywords)
    except TypeError as error:
        try:
            inspect.signature(model.forward).bind(*positional, **keywords)
        except TypeError as reason:
            if isinstance(inputs, Mapping):
                raise TypeError(
                    f"a batch that is a mapping gives the model keyword arguments, here "
                    f"{sorted(inputs)}, and {type(model).__name__} does not take them: {reason}. "
                    "Only 'labels' and 'ids' are removed from the batch first; rename its keys, or "
                    "yield tuples"
                ) from error
        raise


def arguments(model: nn.Module, inputs: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Make the positional and the keyword arguments of ``model`` from a batch's inputs.

    A mapping becomes keyword arguments, a tuple or list becomes positional arguments, and any other
    value becomes one positional argument. A model that takes ``use_cache`` gets ``use_cache=False``
    unless the inputs have this key. With a key-value cache, models of transformers ignore where
    ``position_ids`` restart, so the sequences of a packed batch would attend to one another.
    """
    positional: Sequence[Any] = ()
    keywords: Mapping[str, Any] = {}
    if isinstance(inputs, Mapping):
        keywords = inputs
    else:
        positional = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    if _has_keyword(model, "use_cache", len(positional)):
        keywords = {"use_cache": False, **keywords}
    return positional, keywords


def logits_of(output: Any, model: nn.Module) -> Tensor:
    """Return a model's logits: the output itself, or its entry or attribute ``logits``.

    Raises:
        TypeError: if the logits are not a tensor; the message names the class of ``model``.
    """
    logits = output["logits"] if isinstance(output, Mapping) and "logits" in output else output
    logits = getattr(logits, "logits", logits)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{type(model).__name__} must return logits as a tensor, or an output with .logits; "
            f"got {type(output).__name__}"
        )
    return logits


def _has_keyword(model: nn.Module, keyword: str, positional: int) -> bool:
    """Return True if ``model`` takes ``keyword`` after ``positional`` positional arguments.

    A wrapper whose forward has ``**keywords`` takes the keywords of the wrapped model.
    """
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):  # forward is not a Python function
        return False
    if keyword in parameters:
        return list(parameters).index(keyword) >= positional
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
        return False
    # The wrapped model is "module" in DistributedDataParallel and AveragedModel, "_orig_mod" in a
    # compiled module, and "base_model" in models of transformers and PEFT.
    for name in ("module", "_orig_mod", "base_model"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module) and inner is not model:
            return _has_keyword(inner, keyword, positional)
    return False


def size(batch: Any, labels: Tensor | None) -> int:
    """Return the number of samples: the length of the first tensor that has dimensions.

    The tensors are those in ``batch``, then ``labels``.

    Raises:
        TypeError: if ``batch`` and ``labels`` contain no tensor of at least 1 dimension.
    """
    for tensor in tensors((batch, labels)):
        if tensor.dim():
            return len(tensor)
    raise TypeError(
        "a batch must have labels, or a tensor in its tuples, mappings and dataclasses, by which "
        f"its samples are counted; got {type(batch).__name__}"
    )


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists, mappings and dataclasses, in order."""
    items: Iterable[Any] = ()
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, (tuple, list)):
        items = value
    elif dataclasses.is_dataclass(value):
        items = (getattr(value, field.name) for field in dataclasses.fields(value))
    for item in items:
        yield from tensors(item)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Replace each tensor in nested tuples, lists and mappings by ``function(tensor)``."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def to(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Move a batch's tensors to ``device``, and floating-point tensors to ``dtype`` if given."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=True)

    return map_tensors(move, value)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set ``model`` to evaluation mode without gradients; restore each submodule's mode afterwards.

    Modules of exported programs, whose mode cannot be set, are left unchanged.
    """
    # Frozen modules of torch.jit have no mode.
    modes = [(each, each.training) for each in model.modules() if hasattr(each, "training")]
    try:
        for module, _ in modes:
            with contextlib.suppress(NotImplementedError):
                module.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer, or the CPU if it has none."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """Return the dtype of a model's first floating-point parameter, or None if it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
