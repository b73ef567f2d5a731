"""Test derivatives of the loss, its memory, torch's modes, and KDLoss as a module."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from support import (
    BF16,
    DTYPES,
    FP16,
    FP32,
    FP64,
    assert_grad,
    compute_dtype,
    make,
    name_of,
    pairwise,
    truth,
    weights,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import _C, reference
from fastkd._core import native

EXACT = {"rtol": 1e-10, "atol": 1e-12}
REDUCTIONS = ["mean", "sum", "none"]


def expected(student: Tensor, teacher: Tensor, labels: Tensor | None, **options) -> Tensor:
    return reference.loss(student, teacher, labels, **weights(options, labels is not None))


# ---- first and second derivatives by finite differences


@pytest.mark.usefixtures("each_autograd")
@pytest.mark.parametrize(
    ("options", "reduction"),
    [
        *itertools.product([{}, {"temperature": 3.0, "label_smoothing": 0.2}], REDUCTIONS),
        ({"normalizer": 3.0}, "mean"),
    ],
    ids=str,
)
def test_gradients_equal_finite_differences(device, options, reduction):
    student, teacher, labels = make((3, 3), FP64, device=device, spread=1.0, ignored=0.0)
    labels[1] = -100

    def f(x: Tensor) -> Tensor:
        return fastkd.loss(x, teacher, labels, reduction=reduction, **options)

    student.requires_grad_()
    assert torch.autograd.gradcheck(f, student)
    assert torch.autograd.gradgradcheck(f, student)


def test_gradients_of_row_temperatures_equal_finite_differences(device):
    student, teacher, _ = make((3, 3), FP64, device=device, labels=False, spread=1.0)
    t = torch.tensor([0.7, 2.0, 4.0], dtype=FP64, device=device)
    for reduction in REDUCTIONS:
        leaf = student.clone().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, r=reduction: fastkd.loss(x, teacher, temperature=t, reduction=r), leaf
        )
        assert torch.autograd.gradgradcheck(
            lambda x, r=reduction: fastkd.loss(x, teacher, temperature=t, reduction=r), leaf
        )


@pytest.mark.usefixtures("each_autograd")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("with_labels", [True, False])
def test_second_derivatives_are_the_references(device, with_labels, reduction):
    student, teacher, labels = make((4, 7), FP64, device=device)
    labels = labels if with_labels else None
    options = {"temperature": 3.0, "reduction": reduction}
    results = []
    for function in (fastkd.loss, expected):
        leaf = student.clone().requires_grad_()
        value = function(leaf, teacher, labels, **options)
        weight = torch.linspace(1, 2, value.numel(), dtype=FP64, device=device).view(value.shape)
        (grad,) = torch.autograd.grad(value, leaf, weight, create_graph=True)
        penalty = grad.square().sum() + value.sum()
        results.append((grad.detach(), *torch.autograd.grad(penalty, leaf)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    assert results[0][1].abs().max() > 0


@pytest.mark.usefixtures("each_autograd")
def test_third_derivatives_of_terms_are_the_references(device):
    student, teacher, labels = make((4, 7), FP64, device=device)
    results = []
    for function in (lambda *a: fastkd.terms(*a).loss, expected):
        leaf = student.clone().requires_grad_()
        value = function(leaf, teacher, labels)
        for _ in range(2):
            (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
            value = grad.pow(2).sum()
        results.append(torch.autograd.grad(value, leaf)[0])
    torch.testing.assert_close(*results, **EXACT)


@pytest.mark.usefixtures("each_autograd")
def test_a_gradient_penalty_trains_a_model(device):
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 7, dtype=FP64, device=device)
    x = torch.randn(4, 6, dtype=FP64, device=device, requires_grad=True)
    _, teacher, labels = make((4, 7), FP64, device=device)
    results = []
    for function in (fastkd.loss, expected):
        value = function(model(x), teacher, labels)
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        model.zero_grad()
        (value + grad.norm()).backward()
        results.append(model.weight.grad.clone())
    torch.testing.assert_close(*results, **EXACT)


# ---- grad_output, repeated backward passes, changed inputs


@pytest.mark.usefixtures("each_autograd")
@pytest.mark.parametrize(
    ("dtype", "reduction", "scale"), pairwise(DTYPES, REDUCTIONS, [1.0, -0.3, 1024.0, 0.0]), ids=str
)
def test_grad_output_scales_the_gradient(device, scale, reduction, dtype):
    student, teacher, labels = make((6, 203), dtype, device=device)
    acc = compute_dtype(student, teacher)
    shape = (6,) if reduction == "none" else ()
    generator = torch.Generator().manual_seed(0)
    outgoing = (
        torch.randn(shape, generator=generator, dtype=acc) if shape else torch.ones((), dtype=acc)
    ).to(device) * scale
    exact = truth(student, teacher, labels, reduction=reduction, grad_output=outgoing)
    leaf = student.requires_grad_()
    fastkd.loss(leaf, teacher, labels, reduction=reduction).backward(outgoing)
    assert_grad(leaf.grad, exact.grad, acc)


@pytest.mark.usefixtures("each_autograd")
@pytest.mark.parametrize(
    ("dtype", "reduction", "terms"), pairwise(DTYPES, REDUCTIONS, [False, True]), ids=str
)
def test_a_second_backward_pass_is_right(device, terms, reduction, dtype):
    student, teacher, labels = make((6, 203), dtype, device=device)
    acc = compute_dtype(student, teacher)
    leaf = student.requires_grad_()
    value = (
        fastkd.terms(leaf, teacher, labels, reduction=reduction).loss
        if terms
        else fastkd.loss(leaf, teacher, labels, reduction=reduction)
    )
    results, copies = [], []
    for scale in (3.0, 3.0, 1.0, -0.5):
        outgoing = torch.full_like(value, scale)
        (grad,) = torch.autograd.grad(value, leaf, outgoing, retain_graph=True)
        results.append((scale, grad))
        copies.append(grad.clone())
    for (scale, grad), clone in zip(results, copies, strict=True):
        assert torch.equal(grad, clone)
        exact = truth(
            student,
            teacher,
            labels,
            reduction=reduction,
            grad_output=torch.full(value.shape, scale, device=device),
        )
        assert_grad(grad, exact.grad, acc)
    assert len({grad.data_ptr() for _, grad in results}) == len(results)


@pytest.mark.usefixtures("each_autograd")
def test_changes_of_the_gradient_in_place_do_not_reach_a_second_pass(device):
    # Functions such as clip_grad_norm_ change .grad in place.
    student, teacher, labels = make((6, 20), device=device)
    leaf = student.requires_grad_()
    value = fastkd.loss(leaf, teacher, labels)
    value.backward(retain_graph=True)
    first = leaf.grad.clone()
    leaf.grad.zero_()
    value.backward()
    assert torch.equal(leaf.grad, first)


@pytest.mark.usefixtures("each_autograd")
def test_backward_after_the_graph_is_freed_raises(device):
    student, teacher, labels = make((6, 20), device=device)
    for reduction in REDUCTIONS:
        value = fastkd.loss(
            student.clone().requires_grad_(), teacher, labels, reduction=reduction
        ).sum()
        value.backward()
        with pytest.raises(RuntimeError, match="second time"):
            value.backward()


@pytest.mark.usefixtures("each_autograd")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_logits_changed_before_backward_raise(device, reduction):
    student, teacher, labels = make((6, 20), device=device)
    hidden = student.requires_grad_() * 1.0
    value = fastkd.loss(hidden, teacher, labels, reduction=reduction).sum()
    hidden.detach().add_(1)
    if reduction == "none":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()
    else:
        # The forward pass has computed the gradient, so backward may return it without an error.
        try:
            value.backward()
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            assert_grad(
                student.grad, truth(student, teacher, labels, reduction=reduction).grad, FP32
            )


@pytest.mark.usefixtures("each_autograd")
def test_gradients_are_right_in_a_larger_graph(device):
    torch.manual_seed(0)
    model = (
        torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 7))
        .to(device)
        .double()
    )
    x = torch.randn(4, 6, dtype=FP64, device=device)
    _, teacher, labels = make((4, 7), FP64, device=device)
    grads = []
    for function in (fastkd.loss, expected):
        model.zero_grad()
        logits = model(x)
        value = 0.3 * function(logits, teacher, labels) + 0.1 * logits.square().mean()
        value = value + 2.0 * function(logits, logits.detach().flip(0), None, temperature=1.0)
        value.backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


# ---- the teacher


@pytest.mark.usefixtures("each_autograd")
def test_teacher_gets_no_gradient(device):
    student, teacher, labels = make((4, 7), device=device)
    student.requires_grad_()
    teacher.requires_grad_()
    with pytest.raises(ValueError, match=r"teacher requires grad.*\.detach\(\)"):
        fastkd.loss(student, teacher, labels)
    with pytest.raises(ValueError, match=r"teacher requires grad.*\.detach\(\)"):
        fastkd.terms(student, teacher, labels)
    with torch.no_grad(), pytest.raises(ValueError, match="teacher requires grad"):
        fastkd.loss(student, teacher, labels)
    for reduction in REDUCTIONS:
        value = fastkd.loss(student, teacher.detach(), labels, reduction=reduction)
        value.sum().backward()
        assert teacher.grad is None


# ---- memory


@pytest.mark.usefixtures("each_autograd")
@pytest.mark.parametrize(("inplace", "tensors"), [(False, 1.0), (True, 0.0)])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name_of)
def test_memory_on_the_cpu_is_one_student_tensor(inplace, tensors, dtype):
    student, teacher, labels = make((16, 20000), dtype, ignored=0.0)
    leaf = student.requires_grad_()
    hidden = leaf * 1 if inplace else leaf
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        value = fastkd.loss(hidden, teacher, labels, inplace=inplace)
        value.backward()
    events = profile.profiler.kineto_results.events()
    taken = sum(max(e.nbytes(), 0) for e in events if e.name() == "[memory]")
    if inplace:
        tensors += 1.0  # memory of the product `leaf * 1`
    assert taken <= tensors * student.nbytes + 8192
    assert taken >= tensors * student.nbytes  # fails if the profiler recorded no allocations


def test_a_gradient_in_use_is_not_written_over():
    # The next call recycles a gradient's memory only after the gradient is freed.
    def gradient(seed: int) -> Tensor:
        student, teacher, labels = make((32, 20000), seed=seed)
        leaf = student.requires_grad_()
        fastkd.loss(leaf, teacher, labels).backward()
        return leaf.grad

    alone = [gradient(seed).clone() for seed in range(3)]
    held = [gradient(seed) for seed in range(3)]
    for expected, grad in zip(alone, held, strict=True):
        assert torch.equal(grad, expected)
    addresses = {grad.data_ptr() for grad in held}
    assert len(addresses) == 3
    del grad, held
    again = gradient(1)
    assert torch.equal(again, alone[1])
    if native.EAGER is not None:
        assert again.data_ptr() in addresses
    again.resize_(40, 20000)  # the gradient may be a view of a larger buffer
    assert torch.equal(again[:32], alone[1])


@pytest.mark.parametrize("shape", [(40, 10), (6, 1000), (3, _C.segment + 5)], ids=str)
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=name_of)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_gradients_do_not_depend_on_the_scales_of_other_calls(dtype, shape, divergence):
    student, teacher, labels = make(shape, dtype)

    def gradients(factor: float) -> list[Tensor]:
        leaf = student.clone().requires_grad_()
        value = fastkd.loss(leaf, teacher, labels, divergence=divergence)
        factors = [torch.tensor(g) for g in (factor, factor, 3.0)]
        return [torch.autograd.grad(value, leaf, g, retain_graph=True)[0] for g in factors]

    for factor in (1.0, 1024.0, 0.25):
        first, second = gradients(factor), gradients(factor)
        assert torch.equal(first[0], first[1]) and torch.equal(first[0], second[0])
        assert torch.equal(first[2], second[2])


# ---- modes of torch


def test_inference_mode_and_no_grad_give_the_same_loss(device):
    student, teacher, labels = make((6, 20), device=device)
    value = fastkd.loss(student, teacher, labels)
    leaf = student.clone().requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            inside = fastkd.loss(leaf, teacher, labels)
        assert torch.equal(inside, value) and not inside.requires_grad
    with torch.inference_mode():
        frozen = teacher.clone()  # an inference tensor, like many teachers' outputs
    fastkd.loss(leaf, frozen.clone(), labels).backward()
    assert_grad(leaf.grad, truth(student, teacher, labels).grad, FP32)


OPTIONS = {
    "usual": {},
    "each row": {"reduction": "none"},
    "inplace": {"inplace": True},
    "numbers": {"class_weight": torch.ones(20), "normalizer": torch.tensor(3.0)},
    "rows": {"temperature": torch.ones(6), "hard_weight": torch.ones(6)},
    "rows, by the reference": {"temperature": torch.ones(6), "standardize": True},
    "several teachers": {"teacher_weights": [2.0, 1.0]},
}


@pytest.mark.usefixtures("each_autograd")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("labels", ["indices", "probabilities"])
def test_inference_tensors_are_accepted(device, options, labels):
    # Torch refuses to save inference tensors for backward, so fastkd copies them.
    student, teacher, indices = make((6, 20), device=device)
    inputs = indices if labels == "indices" else teacher.softmax(-1)
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    if labels == "probabilities":
        options.pop("inplace", None)  # inplace needs class indices
    with torch.inference_mode():
        frozen, frozen_labels = teacher.clone(), inputs.clone()
        made = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    several = "teacher_weights" in options
    grads = []
    for t, y, o in ((teacher, inputs, options), (frozen, frozen_labels, made)):
        leaf = student.clone().requires_grad_()
        fastkd.loss(leaf * 1, [t, -t] if several else t, y, **o).sum().backward()
        grads.append(leaf.grad)
    assert frozen.is_inference() and torch.equal(*grads)


def test_heads_and_lists_of_inference_tensors_are_accepted(device):
    student, teacher, labels = make((6, 20), device=device)
    eye = torch.eye(20, device=device)
    log_probs, indices = teacher.log_softmax(-1).topk(5)
    with torch.inference_mode():
        made = [x.clone() for x in (eye, teacher, eye, labels, indices, log_probs)]
    for call in (
        lambda x, w, t, v, y, *_: fastkd.loss(fastkd.Head(x, w), fastkd.Head(t, v), y),
        lambda x, w, t, v, y, *_: fastkd.loss(fastkd.Head(x, w), t, y),
        lambda x, w, t, v, y, i, p: fastkd.loss(fastkd.Head(x, w), fastkd.TopK(p, i), y),
        lambda x, w, t, v, y, i, p: fastkd.loss(x, fastkd.TopK(p, i), y, normalizer=w[0, :1]),
    ):
        grads = []
        for tensors in ((eye, teacher, eye, labels, indices, log_probs), made):
            leaf = student.clone().requires_grad_()
            call(leaf, *tensors).backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradient(device, reentrant):
    student, teacher, labels = make((6, 20), device=device)
    leaf = student.clone().requires_grad_()
    checkpoint(
        lambda x: fastkd.loss(x * 1, teacher, labels), leaf, use_reentrant=reentrant
    ).backward()
    expected = student.clone().requires_grad_()
    fastkd.loss(expected, teacher, labels).backward()
    assert torch.equal(leaf.grad, expected.grad)


@pytest.mark.parametrize("half", [BF16, FP16], ids=name_of)
def test_autocast_leaves_the_loss_in_float32(device, half):
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 20, device=device)
    x = torch.randn(5, 6, device=device)
    _, teacher, labels = make((5, 20), half, device=device)
    with torch.autocast(device.type, dtype=half):
        logits = model(x)
        assert logits.dtype == half
        value = fastkd.loss(logits, teacher, labels)
    assert value.dtype == FP32
    assert torch.equal(value, fastkd.loss(logits, teacher, labels))
    value.backward()
    assert model.weight.grad.dtype == FP32 and model.weight.grad.isfinite().all()


def test_saved_tensors_may_be_offloaded(device):
    student, teacher, labels = make((6, 20), device=device)
    results = []
    for _ in range(2):
        leaf = student.clone().requires_grad_()
        fastkd.loss(leaf, teacher, labels, reduction="none").sum().backward()
        results.append(leaf.grad)
    leaf = student.clone().requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        value = fastkd.loss(leaf, teacher, labels, reduction="none").sum()
    value.backward()
    assert torch.equal(leaf.grad, results[0])


def test_anomaly_mode_works(device):
    student, teacher, labels = make((6, 20), device=device)
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        fastkd.loss(student.requires_grad_(), teacher, labels).backward()


# ---- KDLoss


def test_module_survives_deepcopy_pickle_and_torch_save(device):
    student, teacher, labels = make((6, 20), device=device)
    criterion = fastkd.KDLoss(temperature=3.0, alpha=0.2, reduction="sum")
    value = criterion(student, teacher, labels)
    buffer = io.BytesIO()
    torch.save(criterion, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(criterion),
        pickle.loads(pickle.dumps(criterion)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(twin(student, teacher, labels), value)
        assert repr(twin) == repr(criterion)
    assert not list(criterion.parameters()) and not criterion.state_dict()


def test_repr_of_a_module_has_the_options():
    text = repr(fastkd.KDLoss(temperature=3.0, alpha=0.2))
    assert "temperature=3.0" in text and "alpha=0.2" in text


def test_options_of_a_module_are_attributes(device):
    student, teacher, labels = make((6, 20), device=device)
    criterion = fastkd.KDLoss(temperature=3.0, alpha=0.2)
    assert criterion.temperature == 3.0 and criterion.reduction == "mean"

    def check(**options: object) -> None:
        want = fastkd.loss(student, teacher, labels, alpha=0.2, **options)
        assert torch.equal(criterion(student, teacher, labels), want)

    criterion.temperature = 1.0
    check(temperature=1.0)
    criterion.temperature = torch.full((6,), 2.0, device=device)
    assert "temperature" in dict(criterion.named_buffers())
    check(temperature=torch.full((6,), 2.0, device=device))
    criterion.temperature = torch.nn.Parameter(torch.tensor(4.0, device=device))
    assert [name for name, _ in criterion.named_parameters()] == ["temperature"]
    assert not list(criterion.buffers())
    criterion.temperature, criterion.divergence = 5.0, "jsd"
    assert not list(criterion.parameters())
    check(temperature=5.0, divergence="jsd")
    with pytest.raises(ValueError, match="temperature must be positive"):
        criterion.temperature = -1.0
    with pytest.raises(ValueError, match="divergence"):
        criterion.divergence = "kl"
    check(temperature=5.0, divergence="jsd")


def test_module_without_labels_refuses_alpha(device):
    student, teacher, _ = make((6, 20), device=device)
    with pytest.raises(ValueError, match="alpha weighs the hard term, which needs labels"):
        fastkd.KDLoss(alpha=0.2)(student, teacher)
    criterion = fastkd.KDLoss(alpha=0.0)
    assert torch.equal(criterion(student, teacher), fastkd.loss(student, teacher))
