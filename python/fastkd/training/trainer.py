"""Train a student by distillation with Hugging Face Accelerate.

``pip install fastkd[train]`` installs the required packages.
"""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils.data import DataLoader

from fastkd import batches
from fastkd.losses import KDLoss
from fastkd.teachers import TeacherCache
from fastkd.training import arguments, checkpoints, student_loss
from fastkd.training import teacher as teachers
from fastkd.training.hints import Hint
from fastkd.training.loader_state import LoaderState
from fastkd.training.progress import Progress
from fastkd.validation import check_count, check_folder, check_number

FORMAT = 7  # version of the checkpoint format


class Step(NamedTuple):
    """Hold means over the rows of an optimizer step that are not ignored, in all processes.

    The tensors are 0-d. On a GPU, reading a tensor waits for the step to complete.
    """

    number: int
    """Number of the step, counted from 1. A resumed run continues the count."""
    epoch: int
    """Number of the epoch, counted from 0."""
    loss: Tensor
    hard: Tensor
    soft: Tensor
    agreement: Tensor
    hint: Tensor
    """The part of the loss that hints add; 0 without hints."""


class Evaluation(NamedTuple):
    """Hold means over the rows of a dataset that are not ignored, in all processes."""

    loss: float
    hard: float
    soft: float
    agreement: float
    accuracy: float
    """NaN without labels."""
    rows: int
    """Number of the rows."""


class Trainer:
    """Train a student on the outputs of a teacher, on one device or many.

    Run the script as ``python script.py``, ``accelerate launch script.py`` or ``torchrun ...
    script.py``. A batch is ``(inputs, labels)``, a mapping with ``"labels"`` whose other entries
    are keyword arguments of the models, or another form of :mod:`fastkd.batches`. Each process
    trains on batches of the loader's size. Means are over the rows that are not ignored, in all
    batches and processes of an optimizer step. ``docs/training.md`` has the details.

    Args:
        student: module to train in place.
        teacher: a module, a list of modules, whose outputs ``loss`` mixes, or a
            :class:`fastkd.teachers.TeacherCache`, read by the sample ids of the batches. Modules
            are frozen, set to evaluation mode, and run without gradients in their own dtypes.
        optimizer: an optimizer of the student's parameters. The optimizer's first parameter group
            also gets the parameters of the hints' projections, unless the optimizer has them.
        loss: the distillation loss, with ``reduction="mean"``, without ``normalizer`` and
            ``class_weight``. Default ``KDLoss()``. Batches without labels need ``alpha=0.0`` or
            ``hard_weight=0.0``.
        hints: a sequence of :class:`fastkd.Hint`, pairs of features to match. Default: none.
        scheduler: a learning rate schedule, stepped after each optimizer step. Default None.
        accumulate: number of batches of each process in an optimizer step; fewer at the end of an
            epoch. Default 1.
        clip: maximum norm of the gradient of the optimizer's parameters. Default None.
        ema: decay in [0, 1] of an exponential moving average of the student, ``trainer.ema``
            (:class:`torch.optim.swa_utils.AveragedModel`). :meth:`evaluate` then evaluates the
            average in place of the student. Default None.
        forward: ``forward(model, batch)`` returns logits. Needed for batches and models
            that :mod:`fastkd.batches` does not support.
        labels: ``labels(batch)`` returns the labels, or None. Needed for batches that
            :mod:`fastkd.batches` does not support.
        teacher_device: device of the teacher. Default: the student's device.
        accelerator: an ``accelerate.Accelerator``, for mixed precision, trackers, sharding, or the
            splitting of batches. Default: an ``Accelerator``, with ``cpu=True`` on a machine
            without an accelerator device.
        checkpoints: a folder for checkpoints. :meth:`fit` writes a checkpoint at the end of each
            epoch. The newest two checkpoints are kept. Default None: no checkpoints.
        save_every: number of optimizer steps after which :meth:`steps` writes a checkpoint, before
            it yields the step. Default None.
        progress: show a progress bar with the loss and its terms on the main process. Default True.

    Attributes:
        step: number of completed optimizer steps.
        epoch: number of completed passes over the loader.
        ema: the averaged student, or None.
        accelerator: the accelerator in use.

    Raises:
        ImportError: if Accelerate or tqdm is missing; the message names the extra to install.
        TypeError, ValueError: for invalid arguments.

    Example:
        >>> import torch, fastkd
        >>> _ = torch.manual_seed(0)
        >>> data = [(torch.randn(16, 8), torch.randint(3, (16,))) for _ in range(4)]
        >>> teacher, student = torch.nn.Linear(8, 3), torch.nn.Linear(8, 3)
        >>> trainer = fastkd.Trainer(
        ...     student, teacher, torch.optim.Adam(student.parameters(), 0.1),
        ...     loss=fastkd.KDLoss(temperature=4.0, alpha=0.1), progress=False,
        ... )
        >>> history = trainer.fit(data, epochs=5, validation=data)
        >>> trainer.step, history[-1].soft < history[0].soft
        (20, True)
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Sequence[nn.Module] | TeacherCache,
        optimizer: torch.optim.Optimizer,
        *,
        loss: KDLoss | None = None,
        hints: Sequence[Hint] = (),
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        accumulate: int = 1,
        clip: float | None = None,
        ema: float | None = None,
        forward: teachers.Forward = teachers.compute_logits,
        labels: student_loss.Labels = student_loss.get_labels,
        teacher_device: torch.device | str | None = None,
        accelerator: Any = None,
        checkpoints: str | pathlib.Path | None = None,
        save_every: int | None = None,
        progress: bool = True,
    ) -> None:
        """Check the arguments, move the models to their devices and wrap them."""
        loss = KDLoss() if loss is None else loss
        is_list = isinstance(teacher, (list, tuple, nn.ModuleList))
        modules: Any = teacher if is_list else [teacher]
        arguments.check_loss(loss, len(modules))
        check_count("accumulate", accumulate)
        if clip is not None:
            check_number("clip", clip, 0.0, math.inf, open_low=True)
        if save_every is not None:
            check_count("save_every", save_every)
            if checkpoints is None:
                raise ValueError("save_every needs checkpoints, the folder to write to; got None")
        folder = checkpoints
        self._folder = None if folder is None else check_folder("checkpoints", folder, " or None")
        arguments.check_optimizer(optimizer, student)
        optimized = set(arguments.list_parameters(optimizer))
        self.accelerator = arguments.make_accelerator() if accelerator is None else accelerator
        arguments.check_accelerator(self.accelerator, ema)
        self.student, self.scheduler = student, scheduler
        self.step = self.epoch = 0
        self._accumulate, self._clip, self._save_every = accumulate, clip, save_every
        self._owns_folder = False
        self._history: list[Evaluation] = []
        self._loaders: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._loader_state = LoaderState()
        names = student_loss.StepTerms._fields
        logged = names if hints else names[:-1]
        self._progress = Progress(self.accelerator, show=progress, names=names, logged=logged)
        device = self.accelerator.device
        self._student_loss = student_loss.StudentLoss(student, loss, hints, forward, labels)
        self._student_loss.to(device)
        self.ema: swa_utils.AveragedModel | None = None
        if ema is not None:
            average = swa_utils.get_ema_multi_avg_fn(ema)  # type: ignore[no-untyped-call]
            self.ema = swa_utils.AveragedModel(student, multi_avg_fn=average, use_buffers=True)
        self._teacher: teachers.ModuleTeacher | teachers.CachedTeacher
        if isinstance(teacher, TeacherCache):
            if hints:
                raise ValueError("hints need features, and a TeacherCache has none; use a module")
            self._teacher = teachers.CachedTeacher(teacher, loss, device)
        else:
            devices = (teacher_device or device, device)
            features = [hint.teacher for hint in hints]
            self._teacher = teachers.ModuleTeacher(modules, student, features, forward, devices)
        projections = self._student_loss.hint_loss.parameters()
        optimizer.param_groups[0]["params"].extend(p for p in projections if p not in optimized)
        self._model, self._optimizer = self.accelerator.prepare(self._student_loss, optimizer)

    # ---- training

    def fit(
        self, loader: Iterable[Any], epochs: int = 1, *, validation: Iterable[Any] | None = None
    ) -> list[Evaluation]:
        """Train until ``epochs`` passes over ``loader`` are done, including resumed passes.

        Args:
            loader: a ``DataLoader``, or any iterable of batches that can be iterated again.
            epochs: number of passes. Default 1.
            validation: batches to evaluate after each epoch. Default None.

        Returns:
            The evaluation after each epoch, including epochs before :meth:`resume`; an empty list
            if no epoch had ``validation``.

        Raises:
            FloatingPointError, FileExistsError: as in :meth:`steps`.
        """
        check_count("epochs", epochs)
        if validation is not None:
            arguments.check_loader("validation", validation)
            self._check_not_sharded()
        with self._show_bar(self._prepare(loader), 0, epochs):
            while self.epoch < epochs:
                for _ in self.steps(loader):
                    pass
                if validation is not None:
                    evaluation = self.evaluate(validation)
                    self._history.append(evaluation)
                    named = {f"validation/{k}": v for k, v in evaluation._asdict().items()}
                    self._progress.log(named, self.step)
                if self._folder is not None:
                    self.save()
        return list(self._history)

    def steps(self, loader: Iterable[Any]) -> Iterator[Step]:
        """Train for one pass over ``loader``, and yield each optimizer step after it is taken.

        After :meth:`resume`, train on the remaining batches of the interrupted pass.

        Raises:
            FloatingPointError: if the loss is not finite; the message names the step and the term.
            FileExistsError: if the folder has checkpoints from which this trainer did not resume.
        """
        self._check_folder()
        if not self._loader_state.restored:
            self._loader_state.reset()
        loader = self._prepare(loader)
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(self.epoch)
        self._student_loss.train()
        features = self._teacher.features, self._student_loss.features
        with features[0], features[1], self._show_bar(loader, self.epoch, 1) as bar:
            bar.set_description(f"epoch {self.epoch + 1}")
            for window in self._loader_state.iterate(loader, self._accumulate):
                step = self._take_step(window)
                bar.update()
                if self._save_every is not None and self.step % self._save_every == 0:
                    self.save()
                yield step
            self._progress.flush()
        if not self._loader_state.batches:
            raise ValueError(batches.NO_BATCH)
        self.epoch += 1
        self._loader_state.reset()

    def _take_step(self, window: list[Any]) -> Step:
        window = [batches.to(batch, self.accelerator.device) for batch in window]
        self._optimizer.zero_grad()  # an interrupted step may have left gradients
        denominators = self._count_rows_and_samples(window)
        total: Tensor | float = 0.0
        for index, batch in enumerate(window, start=1):
            is_last = index == len(window)
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self._model):
                with self.accelerator.autocast():
                    outputs = self._teacher(batch)
                terms = self._model(batch, outputs, denominators)
                self.accelerator.backward(terms.loss)
            total = total + torch.stack([term.detach() for term in terms])
        values: Tensor = self.accelerator.reduce(total, "mean")
        number = self.step + 1
        self._progress.add(number, values)
        if self._clip is not None:
            self.accelerator.clip_grad_norm_(arguments.list_parameters(self._optimizer), self._clip)
        self._optimizer.step()
        if self.scheduler is not None and not self.accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        if self.ema is not None:
            self.ema.update_parameters(self.student)
        self.step = number
        return Step(number, self.epoch, *values.unbind())

    def _count_rows_and_samples(self, window: list[Any]) -> student_loss.Denominators:
        """Count the rows and samples of all processes, and divide by the number of processes.

        The division compensates for Accelerate's mean of the gradients over processes.
        """
        counts = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        for batch in window:
            targets = self._student_loss.get_targets(batch)
            samples = batches.size(batch, targets)
            counts[0] += samples if targets is None else self._student_loss.count_rows(targets)
            counts[1] += samples
        total: Tensor = self.accelerator.reduce(counts, "sum")
        total = total.where(total != 0, 1.0) / self.accelerator.num_processes
        return student_loss.Denominators(*total.unbind())

    # ---- evaluation

    def evaluate(self, loader: Iterable[Any]) -> Evaluation:
        """Evaluate the student, or the moving average if ``ema`` is set, in evaluation mode.

        Each of several processes takes a share of a ``DataLoader``, and no row counts twice.

        Raises:
            ValueError: if every row is ignored, or under FSDP, where no process has the full
                student.
        """
        self._check_not_sharded()
        module = self.student if self.ema is None else self.ema.module
        fields = len(Evaluation._fields)
        sums = torch.zeros(fields, dtype=torch.float64, device=self.accelerator.device)
        with batches.evaluating(module), self.accelerator.autocast():
            for batch in self._prepare(loader, even=False):
                batch = batches.to(batch, self.accelerator.device)
                teacher_logits = self._teacher.compute_logits(batch)
                sums += self._student_loss.sum_terms(module, batch, teacher_logits)
        *totals, rows = self.accelerator.reduce(sums, "sum").tolist()
        if not rows:
            raise ValueError(f"nothing to evaluate: no label counts, or {batches.NO_BATCH}")
        loss, hard, soft, agreement, accuracy = (total / rows for total in totals)
        return Evaluation(loss, hard, soft, agreement, accuracy, int(rows))

    def _check_not_sharded(self) -> None:
        if self.accelerator.distributed_type == "FSDP":
            raise ValueError(
                "evaluation needs the full student, and FSDP has sharded it: gather it by "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict, as "
                "docs/training.md shows, and evaluate a copy"
            )

    # ---- checkpoints

    def save(self) -> pathlib.Path:
        """Write a checkpoint into the folder ``checkpoints``, and return its path.

        Call this method on every process, between or after the steps of :meth:`steps`.

        Raises:
            FileExistsError: if the folder has checkpoints from which this trainer did not resume.
        """
        self._check_folder()
        if self._folder is None:
            raise ValueError("checkpoints must be a folder in order to save; got None")
        self._progress.flush()
        return checkpoints.write(self._folder, self.step, self._write, self.accelerator)

    def _check_folder(self) -> None:
        """Raise if the folder has checkpoints of another run."""
        folder = self._folder
        if folder is not None and not self._owns_folder and checkpoints.list_complete(folder):
            raise FileExistsError(
                f"checkpoints: {folder} has checkpoints of another run; call resume(), or choose "
                "another folder"
            )
        self._owns_folder = True

    def _write(self, folder: pathlib.Path) -> None:
        """Write the files of this process."""
        self.accelerator.save_state(str(folder))
        checkpoints.check_no_code(folder)
        rank = self.accelerator.process_index
        checkpoints.save(self._loader_state.state_dict(), folder / f"position-{rank}.pt")
        if self.accelerator.is_main_process:
            for name, stateful in self._find_stateful().items():
                checkpoints.save(stateful.state_dict(), folder / f"{name}.pt")
            progress = {"step": self.step, "epoch": self.epoch, "history": self._history}
            metadata = json.dumps({**self._describe(), **progress}, indent=1)
            (folder / checkpoints.METADATA).write_text(metadata)

    def resume(self) -> bool:
        """Restore the newest checkpoint; return False if there is none.

        Training then continues with the batches, random numbers and losses of a run that was never
        interrupted. The loader must be made with the same arguments as before.

        Raises:
            ValueError: if the checkpoint has another format, number of processes or kind of
                trainer, or if a file is missing, damaged or able to execute code. All files are
                checked before the trainer changes.
            pickle.UnpicklingError: if a file holds code; the code is not executed.
        """
        if self._folder is None:
            raise ValueError("checkpoints must be a folder in order to resume; got None")
        complete = checkpoints.list_complete(self._folder)
        if not complete:
            return False
        newest = complete[-1]
        metadata = checkpoints.read_metadata(newest, self._describe())
        rank = self.accelerator.process_index
        position = checkpoints.load(newest / f"position-{rank}.pt")
        self.accelerator.load_state(str(newest))
        for name, stateful in self._find_stateful().items():
            stateful.load_state_dict(checkpoints.load(newest / f"{name}.pt"))
        self.step, self.epoch = metadata["step"], metadata["epoch"]
        self._history = [Evaluation(*values) for values in metadata["history"]]
        self._loader_state.load_state_dict(position)
        self._owns_folder = True
        return True

    def _describe(self) -> dict[str, int]:
        """Return the properties that a checkpoint and the resuming trainer must share."""
        return {
            "format": FORMAT,
            "processes": self.accelerator.num_processes,
            "hints": len(self._student_loss.hint_loss.hints),
            "scheduler": int(self.scheduler is not None),
            "ema": int(self.ema is not None),
        }

    def _find_stateful(self) -> dict[str, Any]:
        """Return scheduler and average, whose state Accelerate would write as unsafe pickles."""
        parts = {"scheduler": self.scheduler, "ema": self.ema}
        return {name: part for name, part in parts.items() if part is not None}

    # ---- loaders

    def _prepare(self, loader: Iterable[Any], *, even: bool = True) -> Any:
        """Return this process's loader; if ``even``, samples are repeated to fill last batches."""
        arguments.check_loader("loader", loader)
        if not isinstance(loader, DataLoader):
            return loader
        prepared = self._loaders.setdefault(loader, {})
        if even not in prepared:
            config = self.accelerator.dataloader_config
            before, config.even_batches = config.even_batches, even and config.even_batches
            try:
                prepared[even] = self.accelerator.prepare_data_loader(loader)
            finally:
                config.even_batches = before
        return prepared[even]

    def _show_bar(self, loader: Any, first: int, epochs: int) -> Any:
        """Show a bar for the steps of ``epochs`` epochs, beginning with the epoch ``first``."""
        try:
            steps = math.ceil(len(loader) / self._accumulate)
        except TypeError:  # an iterable dataset or a generator has no length
            steps = 0
        resumed = self._loader_state.batches if self._loader_state.restored else 0
        done = steps * (self.epoch - first) + resumed // self._accumulate
        return self._progress.show_bar(steps * epochs or None, done)
