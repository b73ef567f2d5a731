"""Test the loss of a Head in training: derivatives, torch.compile, checkpointing, DDP, FSDP."""

import pathlib
import subprocess
import sys
import textwrap

import pytest
import torch
from support import BF16, FP16, FP32, FP64, loss_in_chunks, name_of
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import Head
from fastkd.linear.call import Inputs, LinearCall

compiles = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)

CALLS = {
    "mean": {},
    "no plan": {"planned": False},
    "none": {"reduction": "none"},
    "soft cap, row temperatures": {"softcap": 5.0, "temperature": torch.linspace(1, 3, 21)},
    "classes": {"chunk_by": "classes"},
    "classes, none": {"chunk_by": "classes", "reduction": "none", "softcap": 5.0},
    "no kernel": {"divergence": "total_variation", "standardize": True},
}


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    """Compute the loss of a model with a body and a head."""

    def __init__(
        self,
        dtype=FP32,
        rows=21,
        classes=50,
        softcap=None,
        chunk_by="auto",
        planned=True,
        **options,
    ):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(8, 12), nn.Linear(12, classes)
        self.teacher_weight = nn.Buffer(torch.randn(classes, 20))
        self.softcap = softcap
        self.to(dtype)
        self.inputs = (
            torch.randn(rows, 8, dtype=dtype),
            torch.randn(rows, 20, dtype=dtype),
            torch.randint(classes, (rows,)).masked_fill(torch.arange(rows) % 4 == 1, -100),
        )
        plan = fastkd.chunks.plan(
            *self.heads(*self.inputs[:2]), self.inputs[2], chunk_by=chunk_by, chunk_size=8,
            **options,
        )  # fmt: skip
        self.criterion = fastkd.KDLoss(chunks=plan if planned else "auto", **options)

    def heads(self, x, teacher_hidden):
        hidden, teacher = self.body(x).tanh(), self.teacher_weight
        student = Head(hidden, self.head.weight, self.head.bias, softcap=self.softcap)
        return student, Head(teacher_hidden, teacher, softcap=self.softcap)

    def forward(self, x, teacher_hidden, labels):
        return self.criterion(*self.heads(x, teacher_hidden), labels)


def step(model, function=None):
    """Return the loss and, for three times the loss, the gradient of each parameter."""
    model.zero_grad()
    value = (model if function is None else function)(*model.inputs)
    (value.sum() * 3).backward()
    return [value.detach(), *(p.grad for p in model.parameters())]


def assert_same_step(ours, theirs):
    for ours_grad, theirs_grad in zip(ours, theirs, strict=True):
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_derivatives_equal_finite_differences(options):
    torch.manual_seed(0)
    options = {k: v[:5] if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    cap, chunk_by = options.pop("softcap", None), options.pop("chunk_by", "auto")
    chunks = {"chunk_size": 2, "chunk_by": chunk_by} if options.pop("planned", True) else None
    leaves = [torch.randn(s, dtype=FP64, requires_grad=True) for s in ((5, 3), (4, 3), (4,))]
    teacher = Head(*(torch.randn(s, dtype=FP64) for s in ((5, 2), (4, 2))), None, cap, 0.5)
    labels = torch.tensor([0, -100, 3, 1, 2])

    def loss(x, w, b):
        return loss_in_chunks(Head(x, w, b, cap, 0.5), teacher, labels, chunks=chunks, **options)

    assert gradcheck(loss, leaves)
    assert gradgradcheck(loss, leaves)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=name_of)
def test_a_second_backward_pass_is_right(dtype):
    model = Model(dtype)
    value = model(*model.inputs)
    first = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    copies = [grad.clone() for grad in first]
    second = torch.autograd.grad(value, list(model.parameters()))
    for before, copy, repeated in zip(first, copies, second, strict=True):
        assert torch.equal(before, copy) and torch.equal(before, repeated)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_checkpointing_gives_the_same_gradients(options, reentrant):
    model = Model(**options)
    model.inputs[0].requires_grad_()

    def again(*inputs):
        return checkpoint(model, *inputs, use_reentrant=reentrant)

    assert_same_step(step(model, again), step(model))


@compiles
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=pytest.mark.slow if i else ())
        for i, (name, options) in enumerate(CALLS.items())
    ],
)
def test_a_compiled_model_equals_the_eager_one(options, fresh_compiler):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    model = Model(**options)
    compiled = torch.compile(
        model, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
    )
    assert_same_step(step(model, compiled), step(model))
    forward, backward = graphs
    assert "fastkd.linear_loss.default" in forward
    assert ("fastkd.linear_loss.default" in backward) == (options.get("reduction") == "none")


@pytest.mark.slow
@compiles
def test_inductor_gives_the_eager_gradients(fresh_compiler):
    dtype = FP16
    model = Model(dtype)
    for compiled_grad, eager_grad in zip(
        step(model, torch.compile(model, fullgraph=True)), step(model), strict=True
    ):
        bound = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            compiled_grad, eager_grad, rtol=bound, atol=bound * float(eager_grad.abs().max())
        )


@pytest.mark.slow
@compiles
def test_dynamic_rows_need_one_graph(fresh_compiler):
    model = Model()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9, 21):
        inputs = [value[:rows] for value in model.inputs]
        torch.testing.assert_close(compiled(*inputs), model(*inputs))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("by_classes", [False, True], ids=["rows", "classes"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck_passes_for_heads(reduction, by_classes):
    x, t, labels = Model().inputs
    weight, teacher_weight = torch.randn(50, 8), torch.randn(50, 20)
    inputs = Inputs(x, weight, None, t, teacher_weight, *(None,) * 4, labels, *(None,) * 7)
    inputs = inputs._replace(denominator=torch.tensor(11.0))
    grads = reduction == "mean"
    call = LinearCall(
        temperature=2.0, teacher_temperature=None, hard_weight=0.5, soft_weight=0.5,
        ignore_index=-100, reduction=reduction, label_smoothing=0.0, divergence="forward_kl",
        mix=None, standardize=False, tail="ghost", estimator=None, student_softcap=None,
        teacher_softcap=None,
        student_scale=1.0, teacher_scale=1.0, dtype=FP32, teacher_dtype=FP32, accumulate=FP32,
        chunk=8, by_classes=by_classes, hidden_grad=grads, weight_grad=grads, bias_grad=False,
        with_terms=False,
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.fastkd.linear_loss.default,
        (list(inputs), *call),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
    )


def test_function_transforms_give_the_gradients():
    model = Model(FP64)
    x, t, labels = model.inputs
    weight = model.head.weight.detach()[:, :8]

    def loss(x, t, labels):
        return fastkd.loss(Head(x, weight), Head(t, model.teacher_weight), labels)

    right = torch.autograd.grad(loss(x.requires_grad_(), t, labels), x)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x.detach(), t, labels), right)
    batch = [value[:20].unflatten(0, (4, 5)) for value in (x.detach(), t, labels)]
    each = torch.stack([loss(*row) for row in zip(*batch, strict=True)])
    torch.testing.assert_close(torch.func.vmap(loss)(*batch), each)


DISTRIBUTED = """
    import os, sys, torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    sys.path.insert(0, {tests!r})
    from test_linear_training import Model

    rank, folder = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    store = "file://" + folder + "/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    for name, wrap in (("ddp", torch.nn.parallel.DistributedDataParallel), ("fsdp", fully_shard)):
        model = Model(rows=20, normalizer=15 / 2)  # the mean over the valid rows of both processes
        inputs = [value[rank * 10 : rank * 10 + 10] for value in model.inputs]
        wrapped = wrap(model)
        wrapped(*inputs).backward()
        grads = [p.grad.full_tensor() if name == "fsdp" else p.grad for p in model.parameters()]
        if rank == 0:
            torch.save(grads, folder + "/" + name + ".pt")
    dist.destroy_process_group()
    os._exit(0)  # threads of the process group may abort the process at exit
"""


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path):
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    model = Model(rows=20)
    assert int((model.inputs[2] != -100).sum()) == 15
    script = textwrap.dedent(DISTRIBUTED).format(tests=str(pathlib.Path(__file__).parent))
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [child.communicate(timeout=120)[1] for child in children]
    assert not any(child.returncode for child in children), errors
    model(*model.inputs).backward()
    for name in ("ddp", "fsdp"):
        for parameter, grad in zip(
            model.parameters(), torch.load(tmp_path / f"{name}.pt"), strict=True
        ):
            torch.testing.assert_close(grad, parameter.grad)
