"""Test replies of inference servers: log-probabilities of tokens, and bad replies.

tests/fixtures/vllm.json was recorded from vLLM, whose version the file names. sglang.json was
written by hand. Both files include the model's log-probabilities of every class.
"""
# ruff: noqa: E501 - one mistake per line

import copy
import dataclasses
import functools
import json
import math
import pathlib
import random
import re
import types
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from fastkd import Sampled, TopK
from fastkd.teachers import served

ROOT = pathlib.Path(__file__).parents[1]


@functools.cache
def load(name: str) -> Any:
    return json.loads((ROOT / "tests" / "fixtures" / name).read_text())


VLLM, SGLANG = load("vllm.json"), load("sglang.json")
PROMPT = VLLM["prompts"][0]
REPLIES = VLLM["replies"]


def choice(name: str, index: int = 0) -> dict[str, Any]:
    return REPLIES[name]["choices"][index]


def assert_scores(topk: TopK, reference: list[list[float]], k: int, first: int = 0) -> None:
    """Assert that row i has log-probabilities of ``reference[first + i - 1]``, the k largest first.

    ``reference[i - 1]`` is the distribution of token i. With ``first=0``, row 0 is padding.
    """
    assert topk.log_probs.dtype == torch.float32 and topk.indices.dtype == torch.int64
    truth = torch.tensor(reference, dtype=torch.float64)
    if first == 0:
        assert (topk.indices[0] == -1).all() and (topk.log_probs[0] == -math.inf).all()
    begin = 1 if first == 0 else 0
    rows = truth[max(first - 1, 0) :][: len(topk.indices) - begin]
    indices, log_probs = topk.indices[begin:], topk.log_probs[begin:].double()
    assert len(rows) == len(indices) > 0
    torch.testing.assert_close(indices[:, :k], rows.topk(k).indices)
    listed = indices >= 0
    expected = rows.gather(1, indices.clamp(min=0)).masked_fill(~listed, -math.inf)
    torch.testing.assert_close(log_probs, expected, atol=3e-5, rtol=0)
    assert not (log_probs.diff(dim=1) > 0).any()


# ---- vLLM


@pytest.mark.parametrize("index", [0, 1])
def test_a_prompt_is_scored(index):
    reply, tokens = choice("prompts, k = 3", index), VLLM["prompts"][index]
    topk = served.from_vllm(reply, tokens=tokens)
    # The longest list has the prompt's own token besides the 3 most probable tokens.
    assert topk.indices.shape == (len(tokens), 4) and topk.tail == "ghost"
    assert_scores(topk, VLLM["reference"][index], 3)
    assert tokens == reply["prompt_token_ids"]


@pytest.mark.parametrize("k", [1, 2, 3, 4, 9])
def test_k_cuts_and_pads(k):
    everything = served.from_vllm(choice("prompts, k = 3"))
    topk = served.from_vllm(choice("prompts, k = 3"), k=k, tail="ignore")
    assert topk.indices.shape == (len(PROMPT), k) and topk.tail == "ignore"
    both = min(k, 4)
    assert torch.equal(topk.indices[:, :both], everything.indices[:, :both])
    assert torch.equal(topk.log_probs[:, :both], everything.log_probs[:, :both])
    assert (topk.indices[:, both:] == -1).all() and (topk.log_probs[:, both:] == -math.inf).all()


def test_all_classes_may_be_listed():
    topk = served.from_vllm(choice("prompt, all"), tokens=PROMPT)
    assert_scores(topk, VLLM["reference"][0], topk.indices.shape[1])
    torch.testing.assert_close(topk.log_probs[1:].exp().sum(1), torch.ones(len(PROMPT) - 1))


def test_tokens_of_a_prompt_are_gathered():
    truth = torch.tensor(VLLM["reference"][0]).gather(1, torch.tensor(PROMPT)[1:, None])[:, 0]
    for name in ("prompt, k = 0", "prompts, k = 3"):
        topk = served.from_vllm(choice(name), tokens=torch.tensor(PROMPT))
        sampled = served.gather(topk, torch.tensor(PROMPT), "k3")
        assert sampled.estimator == "k3"
        assert sampled.tokens.tolist() == [-1, *PROMPT[1:]]
        assert sampled.log_probs[0] == -math.inf
        torch.testing.assert_close(sampled.log_probs[1:], truth, atol=3e-5, rtol=0)


def test_a_part_of_a_prompt_is_scored():
    full = served.from_vllm(choice("prompts, k = 3"), k=3)
    part = served.from_vllm(choice("prompts, k = 3")["prompt_logprobs"][4:], k=3, tokens=PROMPT[4:])
    assert torch.equal(part.indices, full.indices[4:])
    assert torch.equal(part.log_probs, full.log_probs[4:])


def test_a_prompt_of_a_chat_is_scored():
    topk = served.from_vllm(REPLIES["chat"], k=2, tokens=REPLIES["chat"]["prompt_token_ids"])
    reference = REPLIES["chat"]["reference"][: len(topk.indices) - 1]
    assert_scores(topk, reference, 2)


@dataclasses.dataclass
class Logprob:
    """Imitate vllm.Logprob."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


def objects(rows: list[Any]) -> list[Any]:
    """Rebuild LLM.generate's objects from the fixture's numbers."""
    return [row and {token: Logprob(lp, rank) for token, lp, rank in row} for row in rows]


@pytest.mark.parametrize("name", ["T = 1", "chosen ids"])
def test_python_objects_are_read(name):
    recorded = VLLM["objects"]["raw_logprobs"][name]
    output = types.SimpleNamespace(
        prompt_logprobs=objects(recorded["prompt_logprobs"]),
        prompt_token_ids=recorded["prompt_token_ids"],
    )
    topk = served.from_vllm(output, tokens=output.prompt_token_ids)
    assert_scores(topk, recorded["reference"][: len(PROMPT) - 1], 3 if name == "T = 1" else 0)
    topk = served.from_vllm(objects(recorded["logprobs"]), tokens=recorded["token_ids"])
    assert_scores(topk, recorded["reference"], 3 if name == "T = 1" else 0, first=len(PROMPT))
    if name == "chosen ids":
        assert all({9, 2, 30} <= set(row) for row in topk.indices.tolist())


def test_objects_of_vllm_are_read():
    vllm = pytest.importorskip("vllm.logprobs")
    rows = VLLM["objects"]["raw_logprobs"]["T = 1"]["prompt_logprobs"]
    listed = [row and {token: vllm.Logprob(lp, rank) for token, lp, rank in row} for row in rows]
    flat = vllm.FlatLogprobs()
    flat.extend(listed)
    expected = served.from_vllm(listed)
    assert_scores(expected, VLLM["reference"][0], 3)
    assert torch.equal(served.from_vllm(flat).indices, expected.indices)
    assert torch.equal(served.from_vllm(flat).log_probs, expected.log_probs)


def test_the_temperature_of_prompts_is_1():
    # vLLM scores prompts at temperature 1 in both modes.
    for mode in ("raw_logprobs", "processed_logprobs"):
        recorded = VLLM["objects"][mode]["T = 2"]
        topk = served.from_vllm(objects(recorded["prompt_logprobs"]))
        assert_scores(topk, VLLM["reference"][0], 3)
    topk = served.from_vllm(choice("warm"))
    assert_scores(topk, VLLM["reference"][0], 3)


def test_the_temperature_of_generated_tokens_is_that_of_the_call():
    for mode, temperature in {"raw_logprobs": 1.0, "processed_logprobs": 2.0}.items():
        recorded = VLLM["objects"][mode]["T = 2"]
        reference = torch.tensor(recorded["reference"], dtype=torch.float64)
        reference = (reference / temperature).log_softmax(-1).tolist()
        topk = served.from_vllm(objects(recorded["logprobs"]), tokens=recorded["token_ids"])
        assert_scores(topk, reference, 3, first=len(PROMPT))


def test_logits_are_refused():
    recorded = VLLM["objects"]["raw_logits"]["T = 1"]
    with pytest.raises(ValueError, match=r"prompt_logprobs\[1\].*raw_logits"):
        served.from_vllm(objects(recorded["prompt_logprobs"]))


def test_a_probability_of_0_is_minus_infinity():
    # With top_k = 2, all but 2 tokens have the log-probability -inf, or -9999 in JSON.
    recorded = VLLM["objects"]["processed_logprobs"]["top_k = 2"]["logprobs"]
    in_json = [
        row and {str(token): {"logprob": max(lp, -9999.0)} for token, lp, _ in row}
        for row in recorded
    ]
    for rows in (objects(recorded), in_json):
        topk = served.from_vllm(rows)
        assert (topk.log_probs[:, :2] > -math.inf).all() and (topk.indices >= 0).all()
        assert (topk.log_probs[:, 2:] == -math.inf).all()
        torch.testing.assert_close(topk.log_probs.exp().sum(1), torch.ones(len(rows)))


# ---- the OpenAI API


@pytest.mark.parametrize("name", ["completion", "chat", "warm"])
@pytest.mark.parametrize("full", [True, False])
def test_generated_tokens_are_scored(name, full):
    reply = choice(name)
    topk = served.from_openai(reply if full else reply["logprobs"], tokens=reply["token_ids"])
    # A chat reply lists 3 tokens: the generated token and the most probable tokens, at least 2.
    is_chat = name == "chat"
    reference = (REPLIES["chat"] if is_chat else reply)["reference"]
    first = len(reference) + 1 - len(reply["token_ids"])
    assert_scores(topk, reference, 2 if is_chat else 3, first=first)
    sampled = served.gather(topk, torch.tensor(reply["token_ids"]))
    rows = torch.tensor(reference)[first - 1 :]
    truth = rows.gather(1, torch.tensor(reply["token_ids"])[:, None])[:, 0]
    torch.testing.assert_close(sampled.log_probs, truth, atol=3e-5, rtol=0)


@pytest.mark.parametrize("name", ["completion, 0", "chat, 0"])
def test_generated_tokens_may_come_alone(name):
    reply = choice(name)
    topk = served.from_openai(reply, tokens=reply["token_ids"])
    assert topk.indices[:, 0].tolist() == reply["token_ids"] and topk.indices.shape[1] == 1


def test_an_echo_has_the_prompt_first():
    reply = choice("completion, echo")
    tokens = PROMPT + reply["token_ids"]
    topk = served.from_openai(reply, tokens=tokens)
    assert_scores(
        TopK(topk.log_probs[: len(PROMPT)], topk.indices[: len(PROMPT)]), VLLM["reference"][0], 3
    )
    assert len(topk.indices) == len(tokens)


def test_chosen_ids_are_scored():
    topk = served.from_openai(choice("completion, chosen ids"))
    assert all({9, 2, 30} <= set(row) for row in topk.indices.tolist())


def test_ids_in_place_of_tokens_are_read():
    # vLLM's /inference/v1/generate returns ids in place of tokens.
    content = copy.deepcopy(choice("chat")["logprobs"]["content"])
    for entry in [*content, *(top for each in content for top in each["top_logprobs"])]:
        entry["token_id"] = int(entry.pop("token").removeprefix("token_id:"))
    topk, expected = served.from_openai({"content": content}), served.from_openai(choice("chat"))
    assert torch.equal(topk.indices, expected.indices)
    assert torch.equal(topk.log_probs, expected.log_probs)


def test_text_is_refused():
    with pytest.raises(ValueError, match=r"logprobs\[0\].*return_tokens_as_token_ids=True"):
        served.from_openai(choice("completion, text"))


# ---- SGLang

PART = len(SGLANG["prompt"])


@pytest.mark.parametrize("full", [True, False])
def test_replies_of_sglang_are_read(full):
    reply = SGLANG["reply"] if full else SGLANG["reply"]["meta_info"]
    tokens, generated = SGLANG["prompt"], SGLANG["reply"]["output_ids"]
    topk = served.from_sglang(reply, tokens=tokens)
    assert topk.indices.shape == (PART, 3)
    assert_scores(topk, SGLANG["reference"][: PART - 1], 3)
    topk = served.from_sglang(reply, "input_token_ids_logprobs", tokens=tokens)
    assert_scores(topk, SGLANG["reference"][: PART - 1], 0)
    assert {tuple(sorted(row)) for row in topk.indices[1:].tolist()} == {(2, 9, 30)}
    topk = served.from_sglang(reply, "output_top_logprobs", tokens=generated, k=2)
    assert_scores(topk, SGLANG["reference"], 2, first=PART)
    for field, ids in {"input": tokens, "output": generated}.items():
        topk = served.from_sglang(reply, f"{field}_token_logprobs", tokens=ids)
        assert_scores(
            topk,
            SGLANG["reference"][: PART - 1 + len(generated)],
            0,
            first=PART * (field == "output"),
        )
        sampled = served.gather(topk, torch.tensor(ids))
        assert sampled.tokens[1:].tolist() == ids[1:]


def test_the_fixture_has_the_form_of_sglang():
    # SGLang's own types must decode the hand-written fixture.
    types = pytest.importorskip("sglang.api.v1.api_types")
    decoded = types.GenerateResponse.from_json_value(SGLANG["reply"])
    assert len(decoded.meta_info.input_top_logprobs) == PART
    assert json.loads(json.dumps(decoded.meta_info.to_json_value())) == SGLANG["reply"]["meta_info"]


# ---- batches


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("length", [None, 10])
def test_lists_are_collated(side, length):
    parts = [served.from_vllm(each) for each in REPLIES["prompts, k = 3"]["choices"]]
    parts[1] = TopK(parts[1].log_probs[:, :2], parts[1].indices[:, :2])
    batch = served.collate(parts, length, padding_side=side)
    rows = length or len(PROMPT)
    assert batch.indices.shape == batch.log_probs.shape == (2, rows, 4)
    for number, part in enumerate(parts):
        n, k = part.indices.shape
        begin = rows - n if side == "left" else 0
        for got, field, fill in ((batch[0], part[0], -math.inf), (batch[1], part[1], -1)):
            expected = torch.full((rows, 4), fill, dtype=field.dtype)
            expected[begin : begin + n, :k] = field
            assert torch.equal(got[number], expected)


def test_sampled_tokens_are_collated():
    parts = [
        served.gather(served.from_vllm(each), torch.tensor(tokens), "k2")
        for each, tokens in zip(REPLIES["prompts, k = 3"]["choices"], VLLM["prompts"], strict=True)
    ]
    batch = served.collate(parts, padding_side="left")
    assert isinstance(batch, Sampled) and batch.estimator == "k2"
    missing = len(PROMPT) - len(VLLM["prompts"][1])
    assert batch.tokens.tolist() == [
        [-1, *PROMPT[1:]],
        [-1] * (missing + 1) + VLLM["prompts"][1][1:],
    ]
    assert (batch.log_probs == -math.inf).tolist() == (batch.tokens == -1).tolist()
    # Collating before gather() gives equal results. In the labels, -100 is padding.
    labels = torch.tensor([PROMPT, [-100] * missing + VLLM["prompts"][1]])
    lists = [served.from_vllm(each) for each in REPLIES["prompts, k = 3"]["choices"]]
    again = served.gather(served.collate(lists, padding_side="left"), labels, "k2")
    assert torch.equal(again.tokens, batch.tokens)
    assert torch.equal(again.log_probs, batch.log_probs)


# ---- refused replies

GOOD = [None, {"5": {"logprob": -2.5, "rank": 3}, "7": {"logprob": -0.5, "rank": 1}}]
TOP = [None, [[-0.5, 7, None], [-2.5, 5, "x"]]]
CHAT = {
    "content": [
        {
            "token": "token_id:5",
            "logprob": -2.5,
            "top_logprobs": [{"token": "token_id:7", "logprob": -0.5}],
        }
    ]
}
COMPLETION = {
    "tokens": ["token_id:5"],
    "token_logprobs": [-2.5],
    "top_logprobs": [{"token_id:7": -0.5}],
}


def vllm(entry: Any, **options: Any) -> TopK:
    return served.from_vllm({"prompt_logprobs": [*GOOD, entry]}, **options)


def sglang(entry: Any, **options: Any) -> TopK:
    return served.from_sglang({"input_top_logprobs": [*TOP, entry]}, **options)


def chat(**changes: Any) -> TopK:
    return served.from_openai({"content": [{**CHAT["content"][0], **changes}]})


def number(value: Any) -> Any:
    return {"5": {"logprob": value}}


def token(value: Any) -> Any:
    return [[-0.5, value, None]]


LIST = TopK(torch.tensor([[-1.0, -2.0]]), torch.tensor([[3, 4]]))
ONE = Sampled(torch.tensor([-1.0]), torch.tensor([3]))
# Each value is (a call, the error, a part of the error's message).
MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # the reply
    "no reply": (lambda: served.from_vllm(None), ValueError, "prompt_logprobs must be a list with an entry for each token; got None"),
    "text": (lambda: served.from_vllm("[None]"), ValueError, "prompt_logprobs must be a list with an entry for each token; got '[None]'"),
    "no field": (lambda: served.from_vllm({"text": ""}), ValueError, "reply must have 'prompt_logprobs', which the request has to ask for; got the fields ['text']"),
    "field None": (lambda: served.from_vllm({"prompt_logprobs": None}), ValueError, "reply must have 'prompt_logprobs', which the request has to ask for; got None"),
    "whole reply": (lambda: served.from_vllm(REPLIES["prompt, k = 0"]), ValueError, "pass reply['choices'][0] for prompt_logprobs"),
    "empty": (lambda: served.from_vllm([]), ValueError, "prompt_logprobs must have an entry for each token; got an empty list"),
    "SGLang's list": (lambda: served.from_sglang(TOP), TypeError, "reply must be a dictionary, decoded from JSON; got [None, [[-0.5, 7, None]"),
    "SGLang's meta_info": (lambda: served.from_sglang({"meta_info": 3}), TypeError, "meta_info must be a dictionary, decoded from JSON; got 3"),
    "SGLang's field": (lambda: served.from_sglang({}, "top_logprobs"), ValueError, "field must be one of 'input_top_logprobs', "),
    "SGLang without": (lambda: served.from_sglang({"meta_info": {}}), ValueError, "reply must have 'input_top_logprobs', which the request has to ask for; got the fields []"),
    "OpenAI's list": (lambda: served.from_openai([]), TypeError, "reply must be a dictionary, decoded from JSON; got []"),
    "OpenAI without": (lambda: served.from_openai({"logprobs": None}), ValueError, "reply must have 'logprobs'"),
    "OpenAI's content None": (lambda: served.from_openai({"content": None}), ValueError, "reply must have 'content', which the request has to ask for; got None"),
    "OpenAI's reply": (lambda: served.from_openai(REPLIES["chat"]), ValueError, "pass reply['choices'][0] for logprobs"),
    "lengths differ": (lambda: served.from_openai({**COMPLETION, "token_logprobs": []}), ValueError, "lists 'tokens', 'token_logprobs' and 'top_logprobs' of one length; got 'token_logprobs': []"),
    "no column": (lambda: served.from_openai({"tokens": ["token_id:5"]}), ValueError, "reply must have 'token_logprobs'"),
    "column text": (lambda: served.from_openai({**COMPLETION, "tokens": "a"}), ValueError, "of one length; got 'tokens': 'a'"),
    "column number": (lambda: served.from_openai({**COMPLETION, "tokens": 7}), ValueError, "of one length; got 'tokens': 7"),
    # a position
    "position None": (lambda: vllm(None), ValueError, "prompt_logprobs[2] must be a dictionary from token ids to log-probabilities, {id: {'logprob': number}}; got None, which is accepted before the first scored token only"),
    "position empty": (lambda: vllm({}), ValueError, "prompt_logprobs[2] must be a dictionary from token ids"),
    "position a list": (lambda: vllm([5]), ValueError, "prompt_logprobs[2] must be a dictionary from token ids to log-probabilities, {id: {'logprob': number}}; got [5]"),
    "position a number": (lambda: vllm(5), ValueError, "prompt_logprobs[2] must be a dictionary"),
    "position a tensor": (lambda: vllm(torch.zeros(3)), ValueError, "prompt_logprobs[2] must be a dictionary"),
    "number alone": (lambda: vllm({"5": -0.5}), ValueError, "prompt_logprobs[2] must be a dictionary from token ids"),
    "no logprob": (lambda: vllm({"5": {"rank": 1}}), ValueError, "prompt_logprobs[2] must be a dictionary from token ids"),
    "object in JSON": (lambda: vllm({"5": Logprob(-1.0)}), ValueError, "prompt_logprobs[2] must be a dictionary from token ids"),
    "SGLang: position None": (lambda: sglang(None), ValueError, "input_top_logprobs[2] must be a list of [log-probability, token id, text]; got None"),
    "SGLang: short entry": (lambda: sglang([[-0.5, 7]]), ValueError, "input_top_logprobs[2] must be a list of [log-probability, token id, text]; got [[-0.5, 7]]"),
    "SGLang: long entry": (lambda: sglang([[-0.5, 7, None, 1]]), ValueError, "input_top_logprobs[2] must be"),
    "SGLang: no list": (lambda: sglang(7), ValueError, "input_top_logprobs[2] must be"),
    "SGLang: late None": (lambda: served.from_sglang({"input_token_logprobs": [[-1.0, 3, None], [None, 5, None]]}, "input_token_logprobs"), ValueError, "input_token_logprobs[1] must be [log-probability, token id, text]; got [None, 5, None], which"),
    "chat: no list": (lambda: chat(top_logprobs=5), ValueError, "content[0] must be {'token': token, 'logprob': number"),
    "chat: twice": (lambda: chat(top_logprobs=CHAT["content"][0]["top_logprobs"] * 2), ValueError, "content[0] must be"),
    "chat: two numbers": (lambda: chat(top_logprobs=[{"token": "token_id:5", "logprob": -2.0}]), ValueError, "content[0] must be"),
    "chat: no token": (lambda: served.from_openai({"content": [{"logprob": -1.0}]}), ValueError, "content[0] must be"),
    "completion: top a list": (lambda: served.from_openai({**COMPLETION, "top_logprobs": [["token_id:5"]]}), ValueError, "logprobs[0] must be a token, its log-probability, and a dictionary"),
    # log-probabilities
    "number as text": (lambda: vllm(number("-0.5")), ValueError, "prompt_logprobs[2]: a log-probability must be a number; got '-0.5'"),
    "None": (lambda: vllm(number(None)), ValueError, "prompt_logprobs[2]: a log-probability must be a number; got None"),
    "boolean": (lambda: vllm(number(False)), ValueError, "prompt_logprobs[2]: a log-probability must be a number; got False"),
    "list": (lambda: sglang([[[], 7, None]]), ValueError, "input_top_logprobs[2]: a log-probability must be a number; got []"),
    "huge": (lambda: vllm(number(-(10**400))), ValueError, "prompt_logprobs[2]: a log-probability must be a number; got -1000"),
    "more digits than are shown": (lambda: vllm(number(-(10**9000))), ValueError, "prompt_logprobs[2]: a log-probability must be a number; got int"),
    "NaN": (lambda: vllm(number(math.nan)), ValueError, "prompt_logprobs[2]: a log-probability must be at most 0; got nan"),
    "infinite": (lambda: vllm(number(math.inf)), ValueError, "prompt_logprobs[2]: a log-probability must be at most 0; got inf"),
    "above 0": (lambda: vllm(number(0.01)), ValueError, "prompt_logprobs[2]: a log-probability must be at most 0; got 0.01. vLLM returns logits if its logprobs_mode is raw_logits"),
    "mass": (lambda: vllm({"5": {"logprob": -0.5}, "6": {"logprob": -0.6}}), ValueError, "prompt_logprobs[2] must have logarithms of probabilities, which add up to at most 1; they add up to 1.155"),
    # token ids
    "no id": (lambda: vllm({"a": {"logprob": -1.0}}), ValueError, "prompt_logprobs[2]: a token id must be an integer from 0 to 2147483647, and all ids numbers, or all strings; got 'a'"),
    "code": (lambda: vllm({"__import__('os').abort()": {"logprob": -1.0}}), ValueError, "prompt_logprobs[2]: a token id must be"),
    "empty id": (lambda: vllm({"": {"logprob": -1.0}}), ValueError, "prompt_logprobs[2]: a token id must be"),
    "spaces": (lambda: vllm({" 9 ": {"logprob": -1.0}}), ValueError, "prompt_logprobs[2]: a token id must be"),
    "underscore": (lambda: vllm({"1_000": {"logprob": -1.0}}), ValueError, "prompt_logprobs[2]: a token id must be"),
    "other digits": (lambda: vllm({"٣": {"logprob": -1.0}}), ValueError, "prompt_logprobs[2]: a token id must be"),
    "surrogate": (lambda: vllm({"\ud800": {"logprob": -1.0}}), ValueError, "prompt_logprobs[2]: a token id must be"),
    "negative text": (lambda: vllm({"-1": {"logprob": -1.0}}), ValueError, "prompt_logprobs[2]: a token id must be"),
    "huge text": (lambda: vllm({"9" * 5000: {"logprob": -1.0}}), ValueError, "prompt_logprobs[2]: a token id must be"),
    "number and text": (lambda: vllm({5: {"logprob": -1.0}}), ValueError, "prompt_logprobs[2]: a token id must be an integer from 0 to 2147483647, and all ids numbers, or all strings; got 5"),
    "negative": (lambda: sglang(token(-1)), ValueError, "input_top_logprobs[2]: a token id must be an integer from 0 to 2147483647, and all ids numbers, or all strings; got -1"),
    "too large": (lambda: sglang(token(2**31)), ValueError, "input_top_logprobs[2]: a token id must be"),
    "huge id": (lambda: sglang(token(10**30)), ValueError, "input_top_logprobs[2]: a token id must be"),
    "fraction": (lambda: sglang(token(7.0)), ValueError, "input_top_logprobs[2]: a token id must be"),
    "boolean id": (lambda: sglang(token(True)), ValueError, "input_top_logprobs[2]: a token id must be"),
    "text id": (lambda: sglang(token("7")), ValueError, "input_top_logprobs[2]: a token id must be"),
    "None id": (lambda: sglang(token(None)), ValueError, "input_top_logprobs[2]: a token id must be"),
    "twice": (lambda: sglang([[-1.0, 7, None], [-2.0, 7, None]]), ValueError, "input_top_logprobs[2] must list a token once; it lists 7 twice"),
    "twice, other text": (lambda: vllm({"7": {"logprob": -1.0}, "07": {"logprob": -2.0}}), ValueError, "prompt_logprobs[2] must list a token once; it lists 7 twice"),
    "no prefix": (lambda: chat(token="5"), ValueError, "content[0]: tokens must be ids, such as 'token_id:5'; got '5'. Request return_tokens_as_token_ids=True"),
    "prefix alone": (lambda: chat(token="token_id:"), ValueError, "content[0]: a token id must be"),
    # sizes
    "one long list": (lambda: served.from_sglang({"input_top_logprobs": [token(1)] * 10000 + [[[-99.0, n, None] for n in range(10000)]]}), ValueError, "input_top_logprobs must have lists of similar lengths; got 20000 entries in 10001 positions, of which input_top_logprobs[10000] has 10000"),
    # arguments
    "k": (lambda: served.from_vllm(GOOD, k=0), ValueError, "k must be an int of at least 1; got 0"),
    "k's type": (lambda: served.from_vllm(GOOD, k=2.0), TypeError, "k must be an int of at least 1; got 2.0"),
    "tail": (lambda: served.from_vllm(GOOD, tail="all"), ValueError, "TopK.tail must be one of"),
    "tokens: too few": (lambda: served.from_vllm(GOOD, tokens=[5]), ValueError, "prompt_logprobs must have an entry for each of the 1 tokens; it has 2"),
    "tokens: others": (lambda: served.from_vllm(GOOD, tokens=[5, 6]), ValueError, "prompt_logprobs[1] must list token 1 of the sequence, 6, and does not: the reply is about other tokens"),
    "tokens: huge": (lambda: served.from_vllm(GOOD, tokens=[5, 2**70]), TypeError, "tokens must be integers of 64 bits; got [5, 1180591620717411303424]"),
    "tokens: text": (lambda: served.from_vllm(GOOD, tokens=["5", "5"]), TypeError, "tokens must be integers of 64 bits; got ['5', '5']"),
    "tokens: floats": (lambda: served.from_vllm(GOOD, tokens=torch.zeros(2)), TypeError, "tokens must be integers of shape (n,); got torch.float32 of shape (2,)"),
    # gather
    "gather: no TopK": (lambda: served.gather(ONE, torch.tensor([3])), TypeError, "topk must be a fastkd.TopK; got Sampled"),
    "gather: no tensor": (lambda: served.gather(LIST, [3]), TypeError, "tokens must be a tensor of an integer dtype; got list"),
    "gather: floats": (lambda: served.gather(LIST, torch.zeros(1)), TypeError, "tokens must be a tensor of an integer dtype; got torch.float32"),
    "gather: shapes": (lambda: served.gather(LIST, torch.tensor([3, 4])), ValueError, "tokens must have shape (1,), one for each row of topk; got (2,)"),
    "gather: another": (lambda: served.gather(LIST, torch.tensor([5])), ValueError, "topk must list the token of each row; row (0,) lacks token 5. Read the reply with k=None"),
    "gather: estimator": (lambda: served.gather(LIST, torch.tensor([3]), "k4"), ValueError, "Sampled.estimator must be one of"),
    # collate
    "collate: none": (lambda: served.collate([]), TypeError, "values must all be fastkd.TopK, or all fastkd.Sampled; got []"),
    "collate: both": (lambda: served.collate([LIST, ONE]), TypeError, "values must all be fastkd.TopK, or all fastkd.Sampled; got ['Sampled', 'TopK']"),
    "collate: others": (lambda: served.collate([LIST, 3]), TypeError, "got ['TopK', 'int']"),
    "collate: tails": (lambda: served.collate([LIST, LIST._replace(tail="ignore")]), ValueError, "values must have one tail; got ['ghost', 'ignore']"),
    "collate: length": (lambda: served.collate([LIST, served.collate([ONE])]), TypeError, "got ['Sampled', 'TopK']"),
    "collate: batches": (lambda: served.collate([served.collate([LIST])]), ValueError, "values must have shape (n, k); got [(1, 1, 2)]"),
    "collate: too long": (lambda: served.collate([served.from_vllm(GOOD)], 1), ValueError, "length must be at least 2, as the longest value; got 1"),
    "collate: side": (lambda: served.collate([LIST], padding_side="both"), ValueError, "padding_side must be one of 'right', 'left'"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name):
    call, error, message = MISTAKES[name]
    with pytest.raises(error, match=re.escape(message)) as raised:
        call()
    assert type(raised.value) is error


def test_a_number_of_json_may_be_an_int():
    # JavaScript writes 0.0 as 0, so a log-probability may be an int.
    assert served.from_vllm([{"5": {"logprob": 0}}]).log_probs.tolist() == [[0.0]]


def test_a_bfloat16_server_is_not_refused():
    # 16-bit log-probabilities add up to 1 only up to rounding.
    torch.manual_seed(0)
    log_probs = torch.randn(50, 400).log_softmax(-1).bfloat16().topk(200)
    rows = [
        [[lp, token, None] for lp, token in zip(*row, strict=True)]
        for row in zip(log_probs.values.tolist(), log_probs.indices.tolist(), strict=True)
    ]
    assert served.from_sglang({"input_top_logprobs": rows}).indices.shape == (50, 200)


# ---- arbitrary replies give a valid value, a ValueError or a TypeError

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([2**31, 2**63, -1, 10**400, -(10**400), -9999, -1e39, math.nan, "token_id:3",
                       "-1", "logprob", "__class__", "007"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.text(max_size=4) | st.sampled_from(["logprob", "token", "5", "content"]), inner,
        max_size=4,
    ),
    max_leaves=8,
)  # fmt: skip
READERS: dict[str, tuple[Callable[..., TopK], Any]] = {
    "vllm": (served.from_vllm, choice("prompts, k = 3", 1)),
    "completion": (served.from_openai, choice("completion, echo")),
    "chat": (served.from_openai, choice("chat")),
    "sglang": (served.from_sglang, SGLANG["reply"]),
    "sglang, tokens": (
        functools.partial(served.from_sglang, field="output_token_logprobs"), SGLANG["reply"],
    ),
    "sglang, ids": (
        functools.partial(served.from_sglang, field="input_token_ids_logprobs"), SGLANG["reply"],
    ),
}  # fmt: skip


def mutate(value: Any, chooser: random.Random, junk: Any) -> Any:
    """Return the value with one change at a random depth: junk, a deletion, a copy, or a new key."""
    if isinstance(value, (dict, list)) and value and chooser.random() < 0.9:
        value = copy.copy(value)
        key = chooser.choice(list(value) if isinstance(value, dict) else range(len(value)))
        action = chooser.random()
        if action < 0.8:
            value[key] = mutate(value[key], chooser, junk)
        elif action < 0.87:
            del value[key]
        elif isinstance(value, list):
            value.insert(chooser.randrange(len(value) + 1), chooser.choice(value))
        else:
            value[str(junk)[:20]] = value[key]
        return value
    return junk


def assert_valid(topk: TopK) -> None:
    assert topk.indices.shape == topk.log_probs.shape and topk.indices.dim() == 2
    assert not topk.log_probs.isnan().any() and (topk.log_probs <= 1e-3).all()
    assert (topk.log_probs.diff(dim=1).nan_to_num(0) <= 0).all()
    assert (topk.log_probs[topk.indices < 0] == -math.inf).all()
    assert topk.indices.min() >= -1 and topk.indices.max() < 2**31
    assert (topk.log_probs.double().exp().sum(1) <= 1.1 + 1e-6).all()
    for row in topk.indices.tolist():
        listed = [index for index in row if index >= 0]
        assert len(set(listed)) == len(listed)


@pytest.mark.parametrize("name", READERS)
@hypothesis.given(
    seed=st.integers(0, 2**32),
    junk=st.lists(JUNK, min_size=1, max_size=3),
    k=st.none() | st.integers(1, 5),
)
@hypothesis.settings(max_examples=100)
def test_any_reply_is_read_or_refused(name, seed, junk, k):
    reader, reply = READERS[name]
    chooser = random.Random(seed)
    for each in junk:
        reply = mutate(reply, chooser, each)
    try:
        topk = reader(reply, k=k)
    except (TypeError, ValueError) as error:
        assert len(str(error)) < 600, "an excerpt of a reply is short"
    else:
        assert_valid(topk)


def test_every_good_reply_is_valid():
    # The fuzzer mutates these replies; mutations of valid replies reach later checks.
    for reader, reply in READERS.values():
        assert_valid(reader(reply))
