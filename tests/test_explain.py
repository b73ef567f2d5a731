"""Test fastkd.explain, and the page that docs/objectives.py generates."""

import importlib.util
import pathlib
import re

import pytest
import torch

import fastkd
from fastkd import reference
from fastkd._core.objective import Options

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "objectives.py"


def explain_on_one_line(**options) -> str:
    return " ".join(fastkd.explain(show=False, **options).split())


def test_explain_prints_its_result(capsys):
    text = fastkd.explain()
    assert capsys.readouterr().out == text + "\n"
    assert fastkd.explain(show=False) == text
    assert capsys.readouterr().out == ""
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["loss = 0.5 CE(softmax(z), y) + 0.5 T^2 D", "alpha, 0.5 by default"]),
        ({"alpha": 0.1}, ["loss = 0.1 CE(softmax(z), y) + 0.9 T^2 D"]),
        ({"hard_weight": 1.0, "soft_weight": 3.0}, ["loss = 1 CE(softmax(z), y) + 3 T^2 D"]),
        ({"hard_weight": torch.ones(4)}, ["(one number for each row) CE"]),
        ({"temperature": 4.0}, ["T = 4 softens the student and the teacher."]),
        ({"teacher_temperature": 1.0}, ["T = 2 softens the student, T_t = 1 the teacher."]),
        (
            {"temperature": torch.nn.Parameter(torch.tensor(3.0))},
            ["T = (3, learned) softens the student and the teacher."],
        ),
        (
            {"teacher_form": "probs"},
            ["p = w / sum w;", "w the teacher's probabilities", "softened already. The cross"],
        ),
        (
            {"teacher_form": "probs", "teacher_temperature": 3.0},
            ["p = softmax(log(w) / T_t);", "again at T_t = 3."],
        ),
        ({"teacher_form": "log_probs"}, ["p = softmax(w);", "softened already. The cross"]),
        (
            {"teacher_form": "log_probs", "teacher_temperature": torch.tensor([1.0, 2.0])},
            ["p = softmax(w / T_t);", "again at T_t = (one number for each row)."],
        ),
        ({"teacher_form": "log_probs", "teacher_temperature": 2.0}, ["again at T_t = 2"]),
        ({"ignore_index": 7}, ["whose label is not 7", "Rows labeled 7 count nothing"]),
        ({"reduction": "sum"}, ["sum over the rows, divided by nothing"]),
        ({"reduction": "none"}, ["One loss for each row"]),
        ({"normalizer": 12}, ["divided by the normalizer, 12."]),
        (
            {"class_weight": torch.ones(3)},
            ["the hard term by the sum of those rows' class"],
        ),
        ({"label_smoothing": 0.1}, ["smoothed by 0.1"]),
        ({"teacher_weights": [1, 3]}, ["mixed with weights 0.25, 0.75, in probabilities"]),
        ({"ensemble": "logits"}, ["mixed with equal weights, in logits"]),
        ({"standardize": True}, ["divided by its standard deviation + 1e-7"]),
        ({"divergence": "dkd", "mix": 2}, ["mix 2, the weight of the other classes' KL."]),
        ({"divergence": "dkd"}, ["Labels are class indices, which D needs, as in torch's"]),
        ({"divergence": "cosine"}, ["temperature T = 2; the cosine has none. The cross entropy"]),
        ({"divergence": "mse"}, ["T = T_t = 2 softens", "label is not -100. masked rows"]),
        ({"normalizer": torch.tensor([3.0])}, ["divided by the normalizer, 3."]),
    ],
    ids=str,
)
def test_the_text_names_the_options(options, words):
    for expected in words:
        assert expected in explain_on_one_line(**options)


@pytest.mark.parametrize(
    ("divergence", "words"),
    [
        ("dkd", ["Without labels", "probabilities, as in torch", "Probabilities mask"]),
        ("cosine", ["softens", "softmax(z / T)"]),
        ("mse", ["never by the classes", "softmax(z / T)"]),
    ],
)
def test_the_text_omits_other_options(divergence, words):
    # The explanation omits options that the divergence lacks or refuses.
    text = explain_on_one_line(divergence=divergence)
    assert not any(unexpected in text for unexpected in words)


@pytest.mark.parametrize("form", ["logits", "log_probs", "probs"])
@pytest.mark.parametrize("teacher_t", [None, 1.0, 3.0])
def test_the_printed_teacher_distribution_is_that_of_the_loss(form, teacher_t):
    # p is the teacher's distribution in the printed formula.
    student, w = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).double()
    w = {"logits": w, "log_probs": w.log_softmax(-1), "probs": w.softmax(-1)}[form]
    formula = re.search(
        r", p = (.*?);", explain_on_one_line(teacher_form=form, teacher_temperature=teacher_t)
    )[1]
    names = {
        "softmax": lambda x: x.softmax(-1),
        "log": torch.log,
        "w": w,
        "T": 2.0,
        "T_t": teacher_t,
    }
    p = eval(formula.replace("sum w", "w.sum(-1, keepdim=True)"), names)
    log_q = (student / 2.0).log_softmax(-1)
    torch.testing.assert_close(
        fastkd.loss(student, w, teacher_form=form, teacher_temperature=teacher_t),
        4 * (p * (p.log() - log_q)).sum(-1).mean(),
    )


@pytest.mark.parametrize("name", fastkd.divergences())
def test_the_text_has_formula_and_source(name):
    kind = reference.DIVERGENCES[name]
    text = explain_on_one_line(divergence=name)
    assert kind.formula in text and kind.source in text
    assert ("mix " in text.split("weights ")[1]) == (kind.mix is not None)


def test_explain_refuses_what_the_loss_refuses():
    with pytest.raises(ValueError, match="mix belongs to"):
        fastkd.explain(mix=0.5)
    with pytest.raises(TypeError, match=r"^teacher_weights must be a sequence .*; got int"):
        fastkd.explain(teacher_weights=5)
    with pytest.raises(ValueError, match="normalizer must be a positive number or a real tensor"):
        fastkd.explain(normalizer=torch.ones(3))
    with pytest.raises(TypeError, match="unexpected keyword argument 'tau'"):
        fastkd.explain(tau=2.0)
    with pytest.raises(TypeError, match=r"teacher must be a fastkd\.TopK, .* or None for"):
        fastkd.explain(teacher=torch.zeros(2, 3))


def test_the_page_is_generated_by_the_code():
    spec = importlib.util.spec_from_file_location("objectives", PAGE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = PAGE.with_suffix(".md").read_text(encoding="utf-8")
    assert written == module.write_page(), "run python docs/objectives.py"
    table = written.partition("## Options")[2].partition("##")[0]
    assert set(Options._fields) <= set(re.findall(r"`(\w+)`", table))


@pytest.mark.parametrize("tail", ["ghost", "renormalize", "ignore"])
def test_the_text_describes_a_list(tail):
    top = fastkd.TopK(torch.zeros(2, 3) - 2, torch.arange(6).view(2, 3), tail)
    text = explain_on_one_line(teacher=top, temperature=2.0)
    words = {"ghost": "k + 1 classes", "renormalize": "alone", "ignore": "may be negative"}
    assert words[tail] in text
    check_that_the_text_is_about_log_probabilities(text)
    assert "temperature T = 1 softens" in explain_on_one_line(teacher=top)


def check_that_the_text_is_about_log_probabilities(text):
    """Assert that the text describes log-probabilities that no temperature softens, and indices."""
    assert "p = exp(w); z are the student's logits, w the teacher's log-probabilities" in text
    assert "softens the student;" in text and "at temperature T." in text
    assert "Labels are class indices, as" in text and "abels that are probabilities" not in text


@pytest.mark.parametrize(("estimator", "gradient"), [("k1", "q || p"), ("k3", "p || q")])
def test_the_text_describes_a_sampled_class(estimator, gradient):
    sampled = fastkd.Sampled(torch.zeros(2), torch.zeros(2, dtype=torch.int64), estimator)
    text = " ".join(fastkd.explain(teacher=sampled, shift=1, show=False).split())
    assert f"is the gradient of KL({gradient})" in text and f"[{estimator}: Schulman 2020]" in text
    assert "sampled class i + 1" in text
    check_that_the_text_is_about_log_probabilities(text)


def test_a_list_refuses_what_the_loss_refuses():
    top = fastkd.TopK(torch.zeros(2, 3) - 2, torch.arange(6).view(2, 3))
    with pytest.raises(ValueError, match="divergence must be one of"):
        fastkd.explain(teacher=top, divergence="mse")
