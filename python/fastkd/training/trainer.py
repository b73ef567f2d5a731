"""A training loop for distillation, on Hugging Face Accelerate: ``pip install fastkd[train]``."""

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
from fastkd._core import checks
from fastkd.losses import KDLoss
from fastkd.training import arguments as trainer_arguments
from fastkd.training import checkpoints, student_loss
from fastkd.training.hints import Features, Hint, HintLoss, widths
from fastkd.training.loader_state import Position
from fastkd.training.progress import Progress
from fastkd.training.watching import Watch

FORMAT = 5  # of a checkpoint


class Step(NamedTuple):
    """One optimizer step; its tensors are 0-d, over all processes, and waited for by nobody."""

    number: int
    """Counted from 1, over resumed runs too."""
    epoch: int
    """Counted from 0."""
    loss: Tensor
    hard: Tensor
    soft: Tensor
    agreement: Tensor
    hint: Tensor
    """The hints' part of the loss; 0 without hints."""


class Evaluation(NamedTuple):
    """Means over the rows of a whole data set, over all processes."""

    loss: float
    hard: float
    soft: float
    agreement: float
    accuracy: float
    """NaN without labels."""
    rows: int


class Trainer:
    """Trains a student on a teacher's outputs; the same script on a laptop and on many GPUs.

    Run it as ``python script.py``, ``accelerate launch script.py`` or ``torchrun ... script.py``. A
    loader's batches are those of :mod:`fastkd.batches`: ``(inputs, labels)``, or a mapping with
    ``"labels"`` whose other entries are keyword arguments of the models, and more; with several
    processes, each trains on batches of the loader's size. Every mean is over the rows that count,
    of all batches and processes that make an optimizer step together. ``docs/training.md`` says
    more.

    Args:
        student: is trained in place.
        teacher: a module, frozen and set to evaluation mode, asked without gradients in its own
            dtype; a list of modules, whose answers ``loss`` mixes; or a
            :class:`fastkd.teachers.TeacherCache`, asked by the batches' ids.
        optimizer: over the student's parameters. Hints' projections join its first group.
        loss: the distillation loss, with ``reduction="mean"`` and without ``normalizer``. Default
            ``KDLoss()``.
        hints: inner features to imitate.
        scheduler: a learning rate schedule, stepped after each optimizer step.
        accumulate: batches of each process that make one optimizer step; fewer at an epoch's end.
            Default 1.
        clip: the largest norm of the gradient of what ``optimizer`` updates; a greater one is
            scaled down to it.
        ema: decay in (0, 1) of an exponential moving average of the student, kept in
            ``trainer.ema`` (:class:`torch.optim.swa_utils.AveragedModel`) and evaluated instead.
        forward: ``forward(model, batch)`` gives logits, for batches or models of another form.
        labels: ``labels(batch)`` gives the labels, or None, likewise.
        teacher_device: where the teacher runs. Default: where the student does.
        accelerator: an ``accelerate.Accelerator``, for mixed precision, trackers, sharding, or how
            batches are split. Default: one made without arguments.
        checkpoints: a folder, to write checkpoints in: at the end of each epoch of :meth:`fit`, and
            every ``save_every`` steps. The newest two are kept.
        save_every: in optimizer steps; before :meth:`steps` gives the step.
        progress: show a bar with both terms on the main process. Default True.

    Attributes:
        step: optimizer steps done.
        epoch: passes over the loader done.
        ema: the averaged student, or None.
        accelerator: in use.

    Raises:
        ImportError: without Accelerate; names the extra to install.
        TypeError, ValueError: for arguments that are not as above.

    Example:
        >>> import torch, fastkd
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> data = TensorDataset(torch.randn(64, 8), torch.randint(3, (64,)))
        >>> teacher, student = torch.nn.Linear(8, 3), torch.nn.Linear(8, 3)
        >>> trainer = fastkd.Trainer(
        ...     student, teacher, torch.optim.Adam(student.parameters(), 0.1),
        ...     loss=fastkd.KDLoss(temperature=4.0, alpha=0.1), progress=False,
        ... )
        >>> loader = DataLoader(data, batch_size=16, shuffle=True)
        >>> history = trainer.fit(loader, epochs=5, validation=loader)
        >>> trainer.step, history[-1].soft < history[0].soft
        (20, True)
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Sequence[nn.Module] | student_loss.Cache,
        optimizer: torch.optim.Optimizer,
        *,
        loss: KDLoss | None = None,
        hints: Sequence[Hint] = (),
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        accumulate: int = 1,
        clip: float | None = None,
        ema: float | None = None,
        forward: student_loss.Forward = student_loss.forward,
        labels: student_loss.Labels = student_loss.labels,
        teacher_device: torch.device | str | None = None,
        accelerator: Any = None,
        checkpoints: str | pathlib.Path | None = None,
        save_every: int | None = None,
        progress: bool = True,
    ) -> None:
        """Checks the arguments, moves the models to their devices and wraps them."""
        loss = KDLoss() if loss is None else loss
        hints = trainer_arguments.check_hints(hints)
        trainer_arguments.check(loss, accumulate, clip, ema, checkpoints, save_every)
        trainer_arguments.check_functions(forward, labels)
        trainer_arguments.check_models(student, optimizer, scheduler)
        self.accelerator = trainer_arguments.accelerator() if accelerator is None else accelerator
        trainer_arguments.check_accelerator(self.accelerator, ema)
        self.student, self.scheduler = student, scheduler
        self.step = self.epoch = 0
        self._history: list[Evaluation] = []
        self.ema: swa_utils.AveragedModel | None = None
        self._optimizer, self._hints = optimizer, hints
        self._accumulate, self._clip, self._decay = accumulate, clip, ema
        self._folder = None if checkpoints is None else pathlib.Path(checkpoints)
        self._save_every = save_every
        self._loaders: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._position = Position()
        self._resumed = False
        self._watch = Watch(student_loss.Values._fields)
        told = [name for name in student_loss.Values._fields if hints or name != "hint"]
        self._progress = Progress(self.accelerator, progress, told)
        self._student_loss = student_loss.StudentLoss(student, loss, forward, labels)
        self._wrapped: nn.Module | None = None
        if hints:
            self._student_loss.features = Features(student, [h.student for h in hints], "student")
        home = self.accelerator.device
        self._teacher: student_loss.Teacher
        if isinstance(teacher, student_loss.Cache):
            if hints:
                raise ValueError("hints need a live teacher, which has features; got a cache")
            self._teacher = student_loss.Cached(teacher, loss, home)
        else:
            away = trainer_arguments.device(teacher_device or home)
            names = [hint.teacher for hint in hints]
            self._teacher = student_loss.Modules(teacher, student, forward, away, home, names)
        student.to(self.accelerator.device)
        if not hints:
            self._wrap([], [])

    # ---- training

    def fit(
        self, loader: Iterable[Any], epochs: int = 1, *, validation: Iterable[Any] | None = None
    ) -> list[Evaluation]:
        """Trains until ``epochs`` passes over ``loader`` are done, those before a resumption too.

        Args:
            loader: a ``DataLoader``, or any iterable of batches that can be iterated again.
            epochs: passes in all.
            validation: evaluated after each epoch.

        Returns:
            The evaluations of ``validation`` after each epoch, before a resumption too.

        Raises:
            FloatingPointError: if the loss is not finite.
        """
        checks.count("epochs", epochs)
        if validation is not None:
            trainer_arguments.check_loader("validation", validation)
            self._refuse_sharded()
        with self._progress_of(self._prepare(loader), 0, epochs):
            while self.epoch < epochs:
                for _ in self.steps(loader):
                    pass
                if validation is not None:
                    found = self.evaluate(validation)
                    self._history.append(found)
                    named = {f"validation/{k}": v for k, v in found._asdict().items()}
                    self._progress.log(named, self.step)
                if self._folder is not None:
                    self.save()
        return list(self._history)

    def steps(self, loader: Iterable[Any]) -> Iterator[Step]:
        """One pass over ``loader``, as a generator of optimizer steps that have been taken.

        After :meth:`resume` it is the rest of the pass that was interrupted.

        Raises:
            FloatingPointError: if the loss is not finite; the message names the step and the term.
            FileExistsError: if the folder of checkpoints has some that were not resumed from.
        """
        self._refuse_another_run()
        if not self._position.resumed:
            self._position.end()
        loader = self._prepare(loader)
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(self.epoch)
        self._student_loss.train()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._teacher.features)
            if self._student_loss.features is not None:
                stack.enter_context(self._student_loss.features)
            stack.enter_context(self._progress_of(loader, self.epoch, 1))
            self._progress.begin(self.epoch)
            for window in self._position.windows(loader, self._accumulate):
                yield self._advance(window)
            self._progress.show(self._watch.rest())
        if not self._position.batches:
            raise ValueError(batches.NO_BATCH)
        self.epoch += 1
        self._position.end()

    def _advance(self, window: list[Any]) -> Step:
        """One optimizer step."""
        window = [batches.to(batch, self.accelerator.device) for batch in window]
        model = self._wrapped or self._measure(window[0])
        self._optimizer.zero_grad()  # of others, or of a step that was interrupted
        values = self._backward(model, window)
        number = self.step + 1
        self._progress.show(self._watch.add(number, values))
        if self._clip is not None:
            groups = self._optimizer.param_groups
            updated = [parameter for group in groups for parameter in group["params"]]
            self.accelerator.clip_grad_norm_(updated, self._clip)
        self._optimizer.step()
        if self.scheduler is not None and not self.accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        if self.ema is not None:
            self.ema.update_parameters(self.student)
        self.step = number
        self._progress.advance()
        if self._save_every is not None and number % self._save_every == 0:
            self.save()
        return Step(number, self.epoch, *values.unbind())

    def _backward(self, model: nn.Module, window: list[Any]) -> Tensor:
        """Gradients of a step; its values, ``(5,)``, over all processes."""
        counts = self._denominators(window)
        total: Tensor | float = 0.0
        for index, batch in enumerate(window, start=1):
            last = index == len(window)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                with self.accelerator.autocast():
                    lesson = self._teacher(batch)
                values = model(batch, lesson, counts)
                self.accelerator.backward(values.loss)
            total = total + torch.stack([value.detach() for value in values])
        mean: Tensor = self.accelerator.reduce(total, "mean")
        return mean

    def _denominators(self, window: list[Any]) -> student_loss.Counts:
        """What a step's sums are divided by, for each process: gradients are averaged over them."""
        counts = torch.zeros(3, dtype=torch.float64, device=self.accelerator.device)
        for batch in window:
            targets = self._student_loss.labels_of(batch)
            samples = torch.tensor(batches.size(batch, targets))
            rows = weight = samples
            if targets is not None:
                rows, weight = self._student_loss.counted(targets)
            counts[0] += rows
            counts[1] += samples
            counts[2] += weight
        everywhere: Tensor = self.accelerator.reduce(counts, "sum")
        everywhere = everywhere.where(everywhere != 0, 1.0)
        return student_loss.Counts(*(everywhere / self.accelerator.num_processes).unbind())

    # ---- evaluation

    def evaluate(self, loader: Iterable[Any]) -> Evaluation:
        """The student's, or its average's, loss and accuracy, in evaluation mode.

        With several processes each takes its share of a ``DataLoader``, and no row counts twice.

        Raises:
            ValueError: if no row counts; and under FSDP, where no process has the whole student.
        """
        self._refuse_sharded()
        module = self.student if self.ema is None else self.ema.module
        sums = torch.zeros(
            len(student_loss.Sums._fields), dtype=torch.float64, device=self.accelerator.device
        )
        with batches.evaluating(module), self.accelerator.autocast():
            for batch in self._prepare(loader, even=False):
                batch = batches.to(batch, self.accelerator.device)
                found = self._student_loss.sums(module, batch, self._teacher.answer(batch))
                sums += torch.stack(found)
        everywhere = student_loss.Sums(*self.accelerator.reduce(sums, "sum").unbind())
        if not everywhere.rows:
            raise ValueError(f"nothing to evaluate: no label counts, or {batches.NO_BATCH}")
        loss, hard, soft, agreement, accuracy = self._student_loss.means(everywhere)
        return Evaluation(loss, hard, soft, agreement, accuracy, int(everywhere.rows))

    @property
    def _sharded(self) -> bool:
        return bool(self.accelerator.distributed_type == "FSDP")

    def _refuse_sharded(self) -> None:
        if self._sharded:
            raise ValueError(
                "evaluation needs the whole student, and FSDP has sharded it: gather it by "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict, as "
                "docs/training.md shows, and evaluate a copy"
            )

    # ---- checkpoints

    def save(self) -> pathlib.Path:
        """Writes a checkpoint into the folder given as ``checkpoints``, whole or not at all.

        Between the steps of :meth:`steps` or after them; every process has to call it.

        Returns:
            Its folder.

        Raises:
            FileExistsError: if the folder has checkpoints that were not resumed from.
        """
        if self._folder is None:
            raise ValueError("checkpoints: no folder was given")
        if self._wrapped is None:
            raise RuntimeError("nothing to save before the first step")
        self._refuse_another_run()
        self._progress.show(self._watch.rest())
        return checkpoints.write(
            self._folder,
            self.step,
            self._write,
            main=self.accelerator.is_main_process,
            barrier=self.accelerator.wait_for_everyone,
        )

    def _refuse_another_run(self) -> None:
        """All checkpoints in the folder have to be those resumed from, or this run's own."""
        if self._folder is not None and not self._resumed and checkpoints.all_of(self._folder):
            raise FileExistsError(
                f"checkpoints: {self._folder} holds those of another run; resume() it, or choose "
                "another folder"
            )
        self._resumed = True

    def _write(self, folder: pathlib.Path) -> None:
        self.accelerator.save_state(str(folder))
        checkpoints.refuse_code(folder)
        rank = self.accelerator.process_index
        checkpoints.put(self._position.state(), folder / f"position-{rank}.pt")
        if self.accelerator.is_main_process:
            for name, stateful in self._stateful.items():
                checkpoints.put(stateful.state_dict(), folder / f"{name}.pt")
            projected = self._student_loss.hints.widths if self._student_loss.hints else []
            about = {
                "format": FORMAT,
                "step": self.step,
                "epoch": self.epoch,
                "processes": self.accelerator.num_processes,
                "hints": len(self._hints),
                "widths": projected,
                "history": self._history,
            }
            (folder / "trainer.json").write_text(json.dumps(about, indent=1))

    def resume(self) -> bool:
        """Goes back to the newest checkpoint; False if there is none.

        Training then continues as if it had never been interrupted: the same batches, random
        numbers and losses. The loader has to be made as it was.

        Raises:
            ValueError: if the checkpoint is of another number of processes, of another version, of
                a trainer of other parts, or has files that could execute code; or if a file is
                missing or damaged, which is found before anything of the trainer changes.
            pickle.UnpicklingError: if a file holds code; none is executed.
        """
        if self._folder is None:
            raise ValueError("checkpoints: no folder was given")
        found = checkpoints.all_of(self._folder)
        if not found:
            return False
        newest = found[-1]
        checkpoints.refuse_code(newest)
        checkpoints.about(newest, format=FORMAT)
        checkpoints.check(newest)
        processes, hints = self.accelerator.num_processes, len(self._hints)
        about = checkpoints.about(newest, processes=processes, hints=hints)
        rank = self.accelerator.process_index
        position = checkpoints.get(newest / f"position-{rank}.pt")
        if self._wrapped is None:
            self._wrap(*about["widths"])
        for name in self._stateful:
            if not (newest / f"{name}.pt").exists():
                raise ValueError(f"{newest} was saved without {name}; make the trainer as it was")
        self.accelerator.load_state(str(newest))
        for name, stateful in self._stateful.items():
            stateful.load_state_dict(checkpoints.get(newest / f"{name}.pt"))
        self.step, self.epoch = about["step"], about["epoch"]
        self._history = [Evaluation(*values) for values in about["history"]]
        self._position.load(position)
        self._resumed = True
        return True

    @property
    def _stateful(self) -> dict[str, Any]:
        """What Accelerate has no files for that are safe to read."""
        own = {"scheduler": self.scheduler, "ema": self.ema}
        return {name: stateful for name, stateful in own.items() if stateful is not None}

    # ---- the parts of it

    def _measure(self, batch: Any) -> nn.Module:
        """Finds the widths of the hints' features by one forward pass, and wraps."""
        assert self._student_loss.features is not None
        with self.accelerator.autocast(), batches.evaluating(self.student):
            self._student_loss.forward_student(batch)
            ours, theirs = self._student_loss.features.take(), self._teacher(batch).features
        return self._wrap(widths(ours), widths(theirs))

    def _wrap(self, student_widths: Sequence[int], teacher_widths: Sequence[int]) -> nn.Module:
        """Gives the model and the optimizer to Accelerate, once the hints' widths are known."""
        if self._hints:
            learned = HintLoss(self._hints, student_widths, teacher_widths)
            dtype = batches.dtype_of(self.student) or torch.float32
            learned.to(self.accelerator.device, torch.promote_types(dtype, torch.float32))
            self._student_loss.hints = learned
            self._optimizer.param_groups[0]["params"].extend(learned.parameters())
        self._wrapped, self._optimizer = self.accelerator.prepare(
            self._student_loss, self._optimizer
        )
        if self._decay is not None:
            average = swa_utils.get_ema_multi_avg_fn(self._decay)  # type: ignore[no-untyped-call]
            self.ema = swa_utils.AveragedModel(self.student, multi_avg_fn=average, use_buffers=True)
        wrapped: nn.Module = self._wrapped
        return wrapped

    def _prepare(self, loader: Iterable[Any], *, even: bool = True) -> Any:
        """The loader with each process's share; ``even``: samples fill up the last batches."""
        trainer_arguments.check_loader("loader", loader)
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

    def _progress_of(
        self, loader: Any, first: int, passes: int
    ) -> contextlib.AbstractContextManager[None]:
        """A bar of the steps of some passes, the ``first`` of which may lie behind."""
        try:
            steps = math.ceil(len(loader) / self._accumulate)
        except TypeError:  # how long an iterable dataset or a generator is, nobody knows
            steps = 0
        resumed = self._position.batches if self._position.resumed else 0
        done = steps * (self.epoch - first) + resumed // self._accumulate
        return self._progress.over(steps * passes or None, done)
