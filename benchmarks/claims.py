"""List the claims about fastkd's speed, memory and accuracy, and check results against the claims.

A claim has a required bound (``must``), a desired bound (``aim``), or both bounds. The worst value
of all cases that a claim covers decides the verdict. In the text of a claim, "against A" is the
time of A divided by fastkd's time, and "A / B" is the time or error of A divided by that of B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Results = dict[str, Any]
Values = dict[str, float]
"""Measured values that a claim covers, by the titles of the measurements."""

# Peaks include a few pages, so a peak this close to a whole number of tensors is rounded.
MEMORY_SLACK = 0.03


@dataclass(frozen=True)
class Claim:
    """Define a claim about a measured value."""

    what: str
    must: float | None
    aim: float | None
    more: bool
    """True if a larger value is better."""
    values: Callable[[Results], Values]
    unit: str = "x"

    def evaluate(self, results: Results) -> dict[str, Any]:
        """Return the claim's row of the table: bounds, worst value and its case, and verdict."""
        values = {title: value for title, value in self.values(results).items() if value == value}
        row = {
            "what": self.what,
            "must": self.must,
            "aim": self.aim,
            "more": self.more,
            "unit": self.unit,
        }
        if not values:
            return {**row, "measured": None, "where": "", "verdict": "not measured", "values": {}}
        where = (min if self.more else max)(values, key=values.__getitem__)
        worst = values[where]
        verdict = "missed"
        if self.must is None or self._meets(worst, self.must):
            verdict = "reached"
        if self.aim is not None and self._meets(worst, self.aim):
            verdict = "aim reached"
        elif self.must is None:
            verdict = "short of the aim"
        return {**row, "measured": worst, "where": where, "verdict": verdict, "values": values}

    def _meets(self, value: float, bound: float) -> bool:
        return value >= bound if self.more else value <= bound


def _select_cases(results: Results, **wanted: Any) -> Iterable[Results]:
    wanted.setdefault("gradient", True)
    for case in results["cases"]:
        if all(
            case[key] in value if isinstance(value, (tuple, set)) else case[key] == value
            for key, value in wanted.items()
        ):
            yield case


def _get_seconds(case: Results, name: str) -> float | None:
    times = case["lanes"].get(name, {}).get("times")
    return times["median"] if times else None


def _get_speedup(baseline: str, **wanted: Any) -> Callable[[Results], Values]:
    def values(results: Results) -> Values:
        by_case = {}
        for case in _select_cases(results, **wanted):
            ours, theirs = _get_seconds(case, "fastkd"), _get_seconds(case, baseline)
            if ours and theirs:
                by_case[case["title"]] = theirs / ours
        return by_case

    return values


def _compare_with_sum(**wanted: Any) -> Callable[[Results], Values]:
    inverse = _get_speedup("s.sum()", **wanted)
    return lambda results: {title: 1 / value for title, value in inverse(results).items()}


def _get_field(name: str, field: str, **wanted: Any) -> Callable[[Results], Values]:
    def values(results: Results) -> Values:
        by_case = {}
        for case in _select_cases(results, **wanted):
            value = case["lanes"].get(name, {}).get(field)
            if value is not None:
                by_case[case["title"]] = value
        return by_case

    return values


def _get_peak(name: str, **wanted: Any) -> Callable[[Results], Values]:
    inner = _get_field(name, "peak_tensors", **wanted)

    def values(results: Results) -> Values:
        return {
            title: round(value) if abs(value - round(value)) < MEMORY_SLACK else value
            for title, value in inner(results).items()
        }

    return values


def _get_duels(start: str) -> Callable[[Results], Values]:
    def values(results: Results) -> Values:
        return {
            duel["name"]: duel["ratio"]
            for duel in results["duels"]
            if duel["name"].startswith(start) and "ratio" in duel
        }

    return values


def _get_sparse(results: Results) -> Values:
    return {case["title"]: case["of the dense loss"] for case in results.get("sparse", [])}


def _compare_sparse_with_pytorch(results: Results) -> Values:
    return {case["title"]: 1 / case["of PyTorch"] for case in results.get("sparse", [])}


def _get_sampled(results: Results) -> Values:
    return {case["title"]: case["of the cross entropy"] for case in results.get("sampled", [])}


def _get_parsing(results: Results) -> Values:
    seconds = results.get("parsing")
    return {} if seconds is None else {"a reply of vLLM": 1000 * seconds}


def _get_ratio(name: str, baseline: str = "", **wanted: Any) -> Callable[[Results], Values]:
    """Return a function that reads time ratios: divergence / forward KL, or baseline / fastkd."""

    def values(results: Results) -> Values:
        by_case = {}
        for case in results.get("divergences", []):
            if case["divergence"] != name or any(case[key] != wanted[key] for key in wanted):
                continue
            value = case["baselines"].get(baseline) if baseline else case["of the forward KL"]
            if value is not None:
                by_case[case["title"]] = value
        return by_case

    return values


def _compare_divergences(results: Results) -> Values:
    return {case["title"]: case["of the forward KL"] for case in results.get("divergences", [])}


def _get_error(name: str, statistic: str) -> Callable[[Results], Values]:
    def values(results: Results) -> Values:
        near = results.get("close_to_the_teacher") or {}
        return {near["what"]: near[name][statistic]} if name in near else {}

    return values


def _compare_with_rounding(results: Results) -> Values:
    by_case = {}
    for case in _select_cases(results, dtype=("bf16", "fp16")):
        error, rounding = case["lanes"].get("fastkd", {}).get("gradient_error"), case["rounding"]
        if error is not None and rounding:
            by_case[case["title"]] = error / rounding
    return by_case


def _compare_with_eager(results: Results) -> Values:
    by_case = {}
    for case in _select_cases(results, dtype="fp32"):
        records = case["lanes"]
        ours = records.get("fastkd", {}).get("gradient_error")
        eager = records.get("eager", {}).get("gradient_error")
        if ours is not None and eager:
            by_case[case["title"]] = ours / eager
    return by_case


def _list_common() -> list[Claim]:
    return [
        # The bound allows the gradient and, on a CPU, 8 bytes of exponentials per class and thread.
        Claim(
            "extra peak memory, student tensors",
            1.15,
            None,
            False,
            _get_peak("fastkd", memory=True),
            "",
        ),
        Claim(
            "extra peak memory in place",
            0.15,
            None,
            False,
            _get_peak("fastkd in place", memory=True),
            "",
        ),
        Claim(
            "relative error at KL = 5e-7, fp32, worst row",
            2e-6,
            2e-7,
            False,
            _get_error("fastkd", "worst"),
            "",
        ),
        Claim(
            "relative error of F.kl_div at KL = 5e-7, median row",
            0.1,
            None,
            True,
            _get_error("F.kl_div", "median"),
            "",
        ),
        Claim(
            "gradient error in bf16 and fp16 / error of the rounded gradient",
            1.5,
            None,
            False,
            _compare_with_rounding,
        ),
        Claim("gradient error in fp32 / error of eager", 1.0, None, False, _compare_with_eager),
        Claim(
            "top 64 of 128256 classes, any divergence / dense forward KL",
            0.85,
            0.7,
            False,
            _get_sparse,
        ),
        Claim(
            "top 64 of 128256 classes, any divergence, against eager",
            8,
            12,
            True,
            _compare_sparse_with_pytorch,
        ),
        Claim("a sampled token / labels alone", 1.1, 1.0, False, _get_sampled),
        Claim("4,096 tokens parsed, 20 log-probabilities each", 50, 20, False, _get_parsing, " ms"),
    ]


def _list_cpu() -> list[Claim]:
    def shape(rows: int, classes: int, *dtypes: str) -> dict[str, Any]:
        return {"rows": rows, "classes": classes, "dtype": dtypes, "temperature": 4.0}

    llama3, llama2 = (64, 128256), (128, 32000)
    imagenet = shape(1024, 1000, "fp32", "bf16")
    few = shape(37, 1000, "fp32", "bf16")
    compiled = "torch.compile"
    return [
        Claim(
            "fp32 64 x 128256 against eager",
            10,
            16,
            True,
            _get_speedup("eager", **shape(*llama3, "fp32")),
        ),
        Claim(
            "fp32 128 x 32000 against eager",
            9,
            15,
            True,
            _get_speedup("eager", **shape(*llama2, "fp32")),
        ),
        Claim(
            "fp32, both shapes, share of the stream",
            None,
            0.6,
            True,
            _get_field("fastkd", "share", classes=(128256, 32000), dtype="fp32", temperature=4.0),
            "",
        ),
        Claim(
            "fp32 64 x 128256 against torch.compile",
            4,
            7,
            True,
            _get_speedup(compiled, **shape(*llama3, "fp32")),
        ),
        Claim(
            "fp32 128 x 32000 against torch.compile",
            4,
            6,
            True,
            _get_speedup(compiled, **shape(*llama2, "fp32")),
        ),
        Claim(
            "bf16 64 x 128256 against eager",
            8,
            14,
            True,
            _get_speedup("eager", **shape(*llama3, "bf16")),
        ),
        Claim(
            "bf16 128 x 32000 against eager",
            8,
            14,
            True,
            _get_speedup("eager", **shape(*llama2, "bf16")),
        ),
        Claim(
            "1024 x 1000 against eager, fp32 and bf16",
            7,
            12,
            True,
            _get_speedup("eager", **imagenet),
        ),
        Claim("37 x 1000 against eager, fp32 and bf16", 5, 8, True, _get_speedup("eager", **few)),
        Claim(
            "8 x 10 and 128 x 10 / s.sum().backward()",
            2.1,
            1.3,
            False,
            _compare_with_sum(classes=10, rows=(8, 128)),
        ),
        Claim("jsd / forward_kl", 1.6, None, False, _get_ratio("jsd")),
        Claim("reverse_kl / forward_kl", 1.3, None, False, _get_ratio("reverse_kl")),
        Claim("any divergence / forward_kl", 2.5, None, False, _compare_divergences),
        Claim(
            "jsd, 128256 classes, against eager",
            10,
            None,
            True,
            _get_ratio("jsd", "PyTorch", classes=128256),
        ),
        *_list_common(),
    ]


def _list_cuda() -> list[Claim]:
    wide = (32000, 50257, 65536, 128256, 151936, 262144)
    bf16 = {"dtype": "bf16", "temperature": 2.0}
    llm: dict[str, Any] = {**bf16, "classes": wide}

    def share(classes: int | tuple[int, ...], **more: Any) -> Callable[[Results], Values]:
        return _get_field("fastkd", "share", **{**bf16, "classes": classes, **more})

    return [
        Claim("share of a copy, bf16, 32000 to 262144 classes", 0.85, 0.93, True, share(wide), ""),
        Claim("share of a copy, bf16, 8192 classes", 0.80, 0.90, True, share(8192), ""),
        Claim("share of a copy, bf16, 8192 x 1000", 0.60, 0.75, True, share(1000, rows=8192), ""),
        Claim(
            "share of a copy, fp32, 32000 and 128256 classes",
            0.85,
            0.93,
            True,
            share((32000, 128256), dtype="fp32"),
            "",
        ),
        Claim("T = 3 / T = 2", 1.10, 1.03, False, _get_duels("T = 3")),
        Claim("against torch.compile, bf16", 3.8, 4.6, True, _get_speedup("torch.compile", **llm)),
        Claim(
            "against torch.compile's best mode, bf16",
            3.0,
            3.8,
            True,
            _get_speedup("torch.compile best", **llm),
        ),
        Claim("against eager, bf16", 12, 14, True, _get_speedup("eager", **llm)),
        Claim(
            "against eager with fp32 upcast, bf16",
            26,
            30,
            True,
            _get_speedup("eager fp32", **llm),
        ),
        Claim("against Liger KL + CE, bf16", 12, 14, True, _get_speedup("Liger KL + CE", **llm)),
        Claim(
            "128257 classes / 128256 classes, per logit",
            1.08,
            1.02,
            False,
            _get_duels("128257"),
        ),
        Claim(
            "16 x 131072 against eager",
            8,
            12,
            True,
            _get_speedup("eager", **bf16, classes=131072, rows=16),
        ),
        Claim(
            "128 x 16 and 128 x 1000 / s.sum().backward()",
            1.5,
            1.15,
            False,
            _compare_with_sum(**bf16, rows=128, classes=(16, 1000)),
        ),
        Claim("half of the rows ignored / no row ignored", 0.75, 0.6, False, _get_duels("half")),
        Claim("jsd / forward_kl", 1.25, None, False, _get_ratio("jsd")),
        Claim("reverse_kl / forward_kl", 1.1, None, False, _get_ratio("reverse_kl")),
        Claim(
            "jsd, 128256 classes, against Liger's",
            10,
            None,
            True,
            _get_ratio("jsd", "Liger", classes=128256),
        ),
        *_list_common(),
    ]


def evaluate(results: Results) -> list[dict[str, Any]]:
    """Return the table rows of all claims about the results' device."""
    claims = _list_cuda() if results["environment"]["kind"] == "cuda" else _list_cpu()
    return [claim.evaluate(results) for claim in claims]
