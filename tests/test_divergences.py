"""Test derivatives, properties and masked classes of the divergences."""

import itertools
import typing

import oracle
import pytest
import torch
from support import FP64, make, name_of
from torch import Tensor
from torch.nn import functional as F

import fastkd
from fastkd import reference

NAMES = fastkd.divergences()
OF_LOGITS = [name for name, kind in reference.DIVERGENCES.items() if kind.compares == "logits"]
ROWS, CLASSES = 5, 6


def test_the_literal_type_lists_every_divergence():
    assert typing.get_args(reference.DivergenceName) == NAMES


# ---- derivatives


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_finite_differences(device, name, standardize):
    student, teacher, labels = make((3, 4), FP64, device=device, ignored=0.0, spread=1.0)
    labels[1] = -100
    t = torch.tensor(1.7, dtype=FP64, device=device, requires_grad=True)

    def function(logits, temperature):
        return fastkd.loss(
            logits,
            teacher,
            labels,
            temperature=temperature,
            divergence=name,
            standardize=standardize,
        )

    leaf = student.requires_grad_()
    assert torch.autograd.gradcheck(function, (leaf, t))
    assert torch.autograd.gradgradcheck(function, (leaf, t))


# Each function is q times the divergence's derivative for q (docs/maths.md, section 10), from d =
# log p - log q, p, q and the mix b.
SLOPES = {
    "forward_kl": lambda d, p, q, b: -p,
    "reverse_kl": lambda d, p, q, b: q * (1 - d),
    "symmetric_kl": lambda d, p, q, b: -b * p + (1 - b) * q * (1 - d),
    "jsd": lambda d, p, q, b: (1 - b) * q * (q / (b * p + (1 - b) * q)).log(),
    "skewed_forward_kl": lambda d, p, q, b: -(1 - b) * p * q / (b * p + (1 - b) * q),
    "skewed_reverse_kl": lambda d, p, q, b: (
        q * (q / (b * q + (1 - b) * p)).log() + (1 - b) * p * q / (b * q + (1 - b) * p)
    ),
    "total_variation": lambda d, p, q, b: q * (q - p).sign() / 2,
    "soft_cross_entropy": lambda d, p, q, b: -p,
}


@pytest.mark.parametrize("name", SLOPES)
def test_gradient_follows_from_the_slopes(device, name):
    student, teacher, _ = make((ROWS, CLASSES), FP64, device=device, labels=False)
    leaf, t = student.requires_grad_(), 1.7
    mix = None if reference.DIVERGENCES[name].mix is None else 0.3
    fastkd.loss(leaf, teacher, divergence=name, mix=mix, temperature=t, reduction="sum").backward()
    log_p, log_q = (teacher / t).log_softmax(-1), (student.detach() / t).log_softmax(-1)
    slope = SLOPES[name](log_p - log_q, log_p.exp(), log_q.exp(), mix)
    expected = t * (slope - log_q.exp() * slope.sum(-1, keepdim=True))
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-9, atol=1e-13)


def test_the_gradient_of_dkd_is_its_formula(device):
    # The formula is in docs/maths.md, section 10.
    student, teacher, labels = make((ROWS, CLASSES), FP64, device=device, ignored=0.0)
    leaf, t, mix = student.requires_grad_(), 1.7, 3.0
    weights = {"hard_weight": 0.0, "soft_weight": 1.0}
    options = {"divergence": "dkd", "mix": mix, "temperature": t, "reduction": "sum"}
    fastkd.loss(leaf, teacher, labels, **options, **weights).backward()
    is_label = F.one_hot(labels, CLASSES).bool()
    p, q = (teacher / t).softmax(-1), (student.detach() / t).softmax(-1)
    p_y, q_y = p[is_label].unsqueeze(-1), q[is_label].unsqueeze(-1)
    p_rest, q_rest = p / (1 - p_y), q / (1 - q_y)
    others = -(q_y - p_y) * q_rest + mix * (q_rest - p_rest)
    torch.testing.assert_close(leaf.grad, t * torch.where(is_label, q_y - p_y, others))


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_learned_temperatures_get_their_gradient(device, name, per_row):
    # The temperatures also determine the factor temperature**2 and the teacher's probabilities.
    student, teacher, labels = make((ROWS, CLASSES), FP64, device=device, seed=3)
    shape = (ROWS,) if per_row else ()
    t = torch.full(shape, 2.0, dtype=FP64, device=device, requires_grad=True)
    teacher_t = torch.full(shape, 1.5, dtype=FP64, device=device, requires_grad=True)
    options = {"divergence": name, "reduction": "sum"}
    fastkd.loss(
        student, teacher, labels, temperature=t, teacher_temperature=teacher_t, **options
    ).backward()
    step = 1e-5
    for leaf, key in ((t, "temperature"), (teacher_t, "teacher_temperature")):
        for row in range(ROWS if per_row else 1):
            moved = []
            for sign in (1, -1):
                numbers = {"temperature": t.detach(), "teacher_temperature": teacher_t.detach()}
                bump = torch.zeros(shape, dtype=FP64)
                bump[row if per_row else ...] = sign * step
                numbers[key] = numbers[key].cpu() + bump
                host = {k: v.cpu() for k, v in numbers.items()}
                problem = (student.cpu(), [teacher.cpu()], labels.cpu())
                moved.append(oracle.terms(*problem, **host, **options).loss)
            slope = (moved[0] - moved[1]) / (2 * step)
            ours = leaf.grad[row] if per_row else leaf.grad
            assert float(ours) == pytest.approx(float(slope), rel=1e-5, abs=1e-8)


def test_learned_weights_get_their_gradient(device):
    student, teacher, labels = make((ROWS, CLASSES), device=device, ignored=0.0)
    hard = torch.full((ROWS,), 0.4, device=device, requires_grad=True)
    soft = torch.tensor(0.6, device=device, requires_grad=True)
    fastkd.loss(student, teacher, labels, hard_weight=hard, soft_weight=soft).backward()
    rows = fastkd.terms(student, teacher, labels, reduction="none")
    torch.testing.assert_close(hard.grad, rows.hard / ROWS)
    torch.testing.assert_close(soft.grad, 4 * rows.soft.mean())


def test_module_learns_its_temperature(device):
    student, teacher, labels = make((ROWS, CLASSES), device=device)
    criterion = fastkd.KDLoss(
        temperature=torch.nn.Parameter(torch.tensor(3.0)), class_weight=torch.ones(CLASSES)
    ).to(device)
    assert dict(criterion.named_parameters()).keys() == {"temperature"}
    assert criterion.class_weight.device.type == device.type
    criterion(student, teacher, labels).backward()
    assert criterion.temperature.grad.isfinite() and criterion.temperature.grad != 0
    before = float(criterion(student, teacher, labels).detach())
    with torch.no_grad():
        criterion.temperature -= 1e-2 * criterion.temperature.grad.sign()
    assert float(criterion(student, teacher, labels).detach()) < before


# ---- properties


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("soft_cross_entropy", "mse")])
def test_a_perfect_student_up_to_a_constant_has_no_loss(device, name):
    # Softmax and centering remove an added constant.
    student, _, labels = make((ROWS, CLASSES), FP64, device=device, ignored=0.0)
    # The cosine depends on the constant; the total variation's gradient jumps where p and q differ
    # by rounding alone.
    constant = 0.0 if name in ("cosine", "total_variation") else 3.0
    leaf = (student + constant).requires_grad_()
    options = {"divergence": name, "reduction": "none", "hard_weight": 0.0, "soft_weight": 1.0}
    got = fastkd.loss(leaf, student, labels, **options)
    torch.testing.assert_close(got, torch.zeros_like(got), rtol=0, atol=1e-12)
    got.sum().backward()
    torch.testing.assert_close(leaf.grad, torch.zeros_like(leaf), rtol=0, atol=1e-12)


def test_soft_cross_entropy_of_a_perfect_student_is_the_entropy(device):
    student = make((ROWS, CLASSES), FP64, labels=False, device=device).student
    got = fastkd.terms(student, student, divergence="soft_cross_entropy", reduction="none")
    torch.testing.assert_close(got.soft, got.teacher_entropy, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_divergences_are_at_least_0_and_ignore_a_constant(device, name):
    student, teacher, labels = make((50, CLASSES), FP64, device=device, ignored=0.0, seed=5)
    options = {"divergence": name, "reduction": "none", "hard_weight": 0.0, "soft_weight": 1.0}
    got = fastkd.loss(student, teacher, labels, **options)
    assert (got >= 0).all() and (got > 0).any()
    moved = fastkd.loss(student + 5.0, teacher - 2.0, labels, **options)
    if name in ("mse", "cosine"):
        assert not torch.allclose(moved, got)
    else:
        torch.testing.assert_close(moved, got, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_standardized_logits_ignore_their_scale(device, name):
    student, teacher, labels = make((ROWS, CLASSES), FP64, device=device)
    options = {"divergence": name, "standardize": True, "hard_weight": 0.0, "soft_weight": 1.0}
    got = fastkd.loss(student, teacher, labels, **options)
    scaled = fastkd.loss(7.0 * student - 3.0, 0.2 * teacher + 1.0, labels, **options)
    # Standardizing divides by the standard deviation plus 1e-7, so the scale matters slightly.
    torch.testing.assert_close(scaled, got, rtol=1e-5, atol=0)


def test_the_kl_has_its_high_temperature_limit(device):
    # temperature**2 * KL approaches half the centered squared error (Hinton et al. 2015, 2.1).
    student, teacher, _ = make((ROWS, CLASSES), FP64, device=device, labels=False)
    limit = fastkd.terms(student, teacher, divergence="centered_mse", temperature=1.0).soft / 2
    distances = [
        abs(float(fastkd.loss(student, teacher, temperature=t) - limit)) for t in (1e2, 1e3, 1e4)
    ]
    for before, after in itertools.pairwise(distances):
        assert after < before / 8  # the distance is of order 1 / t
    assert distances[-1] < 1e-3 * float(limit)
    at_its_own = fastkd.loss(student, teacher, temperature=37.0, divergence="centered_mse")
    torch.testing.assert_close(at_its_own / 2, limit)  # the loss has the factor 37.0**2


def test_divergences_keep_their_relations(device):
    student, teacher, _ = make((ROWS, CLASSES), FP64, device=device, labels=False)

    def value(name: str, mix: float | None = None, swapped: bool = False) -> Tensor:
        z, w = (teacher, student) if swapped else (student, teacher)
        return fastkd.loss(z, w, divergence=name, mix=mix, reduction="none")

    def assert_close(a: Tensor, b: Tensor, rtol: float = 1e-10) -> None:
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-13)

    forward, reverse = value("forward_kl"), value("reverse_kl")
    assert_close(value("symmetric_kl", 1.0), forward)
    assert_close(value("symmetric_kl", 0.0), reverse)
    assert_close(value("symmetric_kl"), (forward + reverse) / 2)
    assert_close(value("forward_kl", swapped=True), reverse)
    assert_close(value("jsd", 0.3), value("jsd", 0.7, swapped=True))
    assert_close(value("skewed_forward_kl", 0.2), value("skewed_reverse_kl", 0.2, swapped=True))
    assert_close(value("skewed_forward_kl", 1e-9), forward, 1e-6)
    assert_close(value("skewed_reverse_kl", 1e-9), reverse, 1e-6)
    # JSD / mix tends to the forward KL as mix nears 0, and JSD / (1 - mix) to the reverse KL as mix
    # nears 1.
    assert_close(value("jsd", 1e-7) / 1e-7, forward, 1e-4)
    assert_close(value("jsd", 1 - 1e-7) / 1e-7, reverse, 1e-4)
    assert (value("jsd") <= 4 * torch.tensor(2.0).log()).all()
    assert (value("total_variation") <= 4).all()
    assert (2 * (value("total_variation") / 4) ** 2 <= forward / 4).all()  # Pinsker's inequality


def test_jsd_without_a_common_class_is_log_2(device):
    inf = float("inf")
    student = torch.tensor([[0.0, 1.0, -inf, -inf]], dtype=FP64, device=device)
    teacher = torch.tensor([[-inf, -inf, 2.0, 0.0]], dtype=FP64, device=device)
    got = fastkd.terms(student, teacher, divergence="jsd")
    assert float(got.soft) == pytest.approx(torch.tensor(2.0).log().item())
    assert float(fastkd.terms(student, teacher, divergence="total_variation").soft) == 1


@pytest.mark.parametrize(
    ("name", "standardize", "form"),
    [
        *((name, standardize, "logits") for name in NAMES for standardize in (False, True)),
        *(
            (name, False, form)
            for name in NAMES
            if name not in OF_LOGITS
            for form in ("log_probs", "probs")
        ),
    ],
)
def test_a_class_that_both_mask_has_no_effect(device, name, standardize, form):
    student, teacher, labels = make((ROWS, CLASSES), FP64, device=device)
    t = torch.tensor(1.5, dtype=FP64, device=device, requires_grad=True)
    unmasked = torch.tensor([0, 1, 2, 3, 5], device=device)
    labels = labels.masked_fill(labels == 4, 0)
    narrow = torch.searchsorted(unmasked, labels.clamp(min=0)).where(labels >= 0, labels)
    student[:, 4] = teacher[:, 4] = -float("inf")
    if form != "logits":
        teacher = teacher.log_softmax(-1) if form == "log_probs" else teacher.softmax(-1)
    options = {"divergence": name, "standardize": standardize, "teacher_form": form}
    for temperature in (t, 1.5):  # no kernel computes a gradient for t
        wide, slim = student.clone().requires_grad_(), student[:, unmasked].clone().requires_grad_()
        got = fastkd.loss(wide, teacher, labels, temperature=temperature, **options)
        expected = fastkd.loss(slim, teacher[:, unmasked], narrow, temperature=1.5, **options)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
        got.backward()
        expected.backward()
        torch.testing.assert_close(wide.grad[:, unmasked], slim.grad, rtol=1e-10, atol=1e-13)
        assert (wide.grad[:, 4] == 0).all()
    assert t.grad.isfinite()


INF = float("inf")
# Each pair is the divergence if the teacher alone masks a class, and if the student alone masks a
# class. None stands for a finite divergence.
PRICES = {
    "forward_kl": (None, INF),
    "reverse_kl": (INF, None),
    "symmetric_kl": (INF, INF),
    "jsd": (None, None),
    "skewed_forward_kl": (None, None),
    "skewed_reverse_kl": (None, None),
    "total_variation": (None, None),
    "soft_cross_entropy": (None, INF),
    "mse": (INF, INF),
    "centered_mse": (INF, INF),
    "dkd": (None, INF),
}


@pytest.mark.parametrize("name", PRICES)
def test_a_class_that_one_side_masks_has_its_value(device, name):
    # A finite loss equals the loss with a logit of -600 instead of -inf.
    student, teacher, labels = make((ROWS, CLASSES), FP64, device=device, ignored=0.0)
    labels = labels.masked_fill(labels == 2, 3)
    options = {"divergence": name, "hard_weight": 0.0, "soft_weight": 1.0, "reduction": "none"}
    for masked, price in enumerate(PRICES[name]):
        pair = [teacher.clone(), student.clone()]
        pair[masked][:, 2] = -INF
        leaf = pair[1].requires_grad_()
        got = fastkd.loss(leaf, pair[0], labels, **options)
        if price is not None:
            assert (got == price).all()
            continue
        nearly = [x.detach().clamp(min=-600.0) for x in pair]
        expected = fastkd.loss(nearly[1], nearly[0], labels, **options)
        torch.testing.assert_close(got, expected)
        got.sum().backward()
        assert leaf.grad.isfinite().all()


def shift_part(part, offset, classes=3000):
    def change(student, teacher):
        student[:, part] += offset
        teacher[:, part] += offset

    return classes, change


def mask_in_fp32(student, teacher):
    student[:, 5], teacher[:, 5] = torch.finfo(torch.float32).min, -200.0


def set_one_great_difference(student, teacher):
    student[:] = teacher + 1e-4 * student
    teacher[:, 5], student[:, 5] = teacher.amax(-1) - 5, -1e4


JSD_ROWS = {
    "padded": shift_part(slice(32768, None), -INF, 33024),
    "padded by numbers": shift_part(slice(32768, None), -1e4, 33024),
    "a block out of reach": shift_part(slice(0, 1024), -100.0),
    "a block further out of reach": shift_part(slice(1024, 2048), -500.0),
    "masked in fp32": (3000, mask_in_fp32),
    "one class with a great gap": (3000, set_one_great_difference),
}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", JSD_ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_jsd_is_right_if_parts_of_a_row_are_far_below_others(isa, name, temperature, dtype):
    classes, change = JSD_ROWS[name]
    torch.manual_seed(0)
    teacher, student = 2 * torch.randn(3, classes), 2 * torch.randn(3, classes)
    change(student, teacher)
    student, teacher = student.to(dtype), teacher.to(dtype)

    def run(dtype: torch.dtype, reduction: str) -> tuple[Tensor, Tensor]:
        leaf = student.to(dtype, copy=True).requires_grad_()
        options = {"divergence": "jsd", "temperature": temperature, "reduction": reduction}
        value = fastkd.loss(leaf, teacher.to(dtype), **options)
        value.sum().backward()
        return value.detach(), leaf.grad

    exact, exact_grad = run(torch.float64, "none")
    value, grad = run(dtype, "none")
    torch.testing.assert_close(value.double(), exact, rtol=2e-5, atol=0)
    error = (grad.double() - exact_grad).norm() / exact_grad.norm()
    assert error < (3e-6 if dtype == torch.float32 else 3e-3)
    assert torch.equal(run(dtype, "sum")[1], grad)


def test_forward_kl_has_a_finite_gradient_where_the_student_alone_masks(device):
    student = torch.tensor([[0.0, 1.0, -INF]], device=device, requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0, 0.0]], device=device)
    for name in ("forward_kl", "soft_cross_entropy"):
        student.grad = None
        fastkd.loss(student, teacher, divergence=name, temperature=1.0).backward()
        expected = student.detach().softmax(-1) - teacher.softmax(-1)
        torch.testing.assert_close(student.grad, expected)


def make_masked_by_the_student(divergence, reduction, classes, device):
    """Return logits with a gradient; in the first row, the student alone masks a class."""
    student = torch.linspace(-1, 1, classes, device=device).repeat(2, 1)
    student[0, 1] = -INF
    student.requires_grad_()
    options = {"divergence": divergence, "temperature": 1.0, "reduction": reduction}
    value = fastkd.loss(student, torch.zeros_like(student), **options)
    value.sum().backward()
    assert value.flatten()[0] == INF
    return student


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("classes", [3, 200])
def test_squared_error_is_infinite_where_the_student_alone_masks(device, classes, reduction):
    student = make_masked_by_the_student("mse", reduction, classes, device)
    torch.testing.assert_close(student.grad, student.detach() * 2 / classes)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("classes", [3, 200])
def test_centered_squared_error_is_infinite_where_the_student_alone_masks(
    device, classes, reduction
):
    # The first row's centered differences are infinite or NaN, and so is the row's gradient.
    student = make_masked_by_the_student("centered_mse", reduction, classes, device)
    assert student.grad[0, 1].isnan()
    assert student.grad[0, 2:].isinf().all()
    torch.testing.assert_close(student.grad[1], student.detach()[1] * 2 / classes)


def test_dkd_of_a_one_hot_teacher_is_cross_entropy(device):
    # The teacher gives probability 0 to all classes but the label, so dkd omits the KL among these
    # classes.
    teacher = torch.tensor([[2.0, -INF, -INF]], device=device)
    student = torch.tensor([[1.0, 0.0, 0.5]], device=device, requires_grad=True)
    label = torch.tensor([0], device=device)
    options = {"divergence": "dkd", "hard_weight": 0.0, "soft_weight": 1.0, "temperature": 1.0}
    got = fastkd.loss(student, teacher, label, **options)
    torch.testing.assert_close(got, F.cross_entropy(student, label))
    got.backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("classes", [6, 100])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("nothing", [0.0, 1e-40])
def test_the_cosine_of_a_zero_row_is_finite(device, classes, reduction, nothing):
    # A row of zeros or subnormal numbers has the cosine distance 1.
    student, teacher, _ = make((4, classes), device=device, labels=False)
    student[:2], teacher[1:3] = 0, 0
    near_student, near_teacher = (x.masked_fill(x == 0, nothing) for x in (student, teacher))
    options = {"divergence": "cosine", "temperature": 3.0, "reduction": reduction}
    leaf, exact_leaf = near_student.requires_grad_(), student.double().requires_grad_()
    got = fastkd.loss(leaf, near_teacher, **options)
    weigh = {"hard_weight": 0.0, "soft_weight": 1.0}
    expected = reference.loss(exact_leaf, teacher.double(), **options, **weigh)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
    got.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(leaf.grad.double(), exact_leaf.grad, rtol=1e-5, atol=1e-6)


def test_total_variation_has_slope_0_at_ties(device):
    student = torch.zeros(2, 4, device=device, requires_grad=True)
    fastkd.loss(student, torch.zeros(2, 4, device=device), divergence="total_variation").backward()
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("standardize", [False, True])
def test_rows_without_spread_are_finite(device, name, standardize):
    student = torch.zeros(2, 4, device=device, requires_grad=True)
    labels = torch.tensor([1, 2], device=device)
    teacher = torch.tensor([[3.0, 3.0, 3.0, 3.0], [1.0, 0.0, 0.0, 0.0]], device=device)
    got = fastkd.loss(student, teacher, labels, divergence=name, standardize=standardize)
    got.backward()
    assert got.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_ignored_rows_may_hold_anything(device, name):
    student, teacher, labels = make((ROWS, CLASSES), FP64, device=device, ignored=0.0)
    keep = torch.tensor([0, 1, 3, 4], device=device)
    labels[2] = -100
    expected = fastkd.loss(student[keep], teacher[keep], labels[keep], divergence=name)
    student[2], teacher[2] = float("nan"), INF
    leaf = student.requires_grad_()
    for standardize in (False, True):
        got = fastkd.loss(leaf, teacher, labels, divergence=name, standardize=standardize)
        got.backward()
        assert got.isfinite() and leaf.grad.isfinite().all() and (leaf.grad[2] == 0).all()
    got = fastkd.loss(leaf, teacher, labels, divergence=name)
    torch.testing.assert_close(got.detach(), expected, rtol=1e-12, atol=1e-14)
