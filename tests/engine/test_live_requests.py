from __future__ import annotations

import pytest

from engine.live_requests import LiveRequests
from engine.scheduling import BeamCandidate, BeamCandidates, SampledToken
from tests.engine.doubles import make_engine, make_request


def live_after_one_step(**params: object) -> LiveRequests:
    """The requests of an engine with one, "a", whose prompt is computed and whose first tokens are drawn."""
    engine, _ = make_engine()
    engine.add_request(make_request("a", [1, 2, 3, 4, 5], **params))
    engine.step()
    return engine._live


def token(seq_id: int) -> SampledToken:
    return SampledToken(seq_id, 7, -0.5, ())


def test_a_drawn_token_is_put_out_and_the_last_one_ends_the_request() -> None:
    live = live_after_one_step(max_tokens=2)
    (seq,) = live["a"].live_seqs
    (output,) = live.append(token(seq.seq_id))
    assert (output.token_ids, output.finish_reason, output.request_finished) == ([7], "length", True)
    assert "a" not in live
    assert len(live) == 0
    assert live.find(seq.seq_id) is None
    with pytest.raises(KeyError):
        live.sequence(seq.seq_id)
    assert live.num_output_tokens == 2


def test_what_is_drawn_for_a_sequence_that_has_ended_is_dropped() -> None:
    live = live_after_one_step(n=2)
    first, second = live["a"].live_seqs
    live.abort("a", 0, "abort")
    assert live.append(token(first.seq_id)) == []
    assert live.append(token(second.seq_id))[0].index == 1
    counted = live.num_output_tokens
    live.abort("a", None, "abort")
    candidate = BeamCandidate(second.seq_id, 7, -0.5, -0.5, ())
    assert live.search(BeamCandidates("a", (candidate,))) == []
    assert live.num_output_tokens == counted


def test_an_id_taken_again_is_another_request() -> None:
    engine, _ = make_engine()
    engine.add_request(make_request("a", [1, 2, 3], max_tokens=8))
    engine.step()
    (old,) = engine._live["a"].live_seqs
    engine.abort("a")
    engine.add_request(make_request("a", [1, 2, 3], max_tokens=8))
    assert engine._live.append(token(old.seq_id)) == []
    candidate = BeamCandidate(old.seq_id, 7, -0.5, -0.5, ())
    assert engine._live.search(BeamCandidates("a", (candidate,))) == []
    assert engine._live["a"].live_seqs[0].num_output_tokens == 0


def test_nobody_is_aborted_by_an_unknown_id_or_index() -> None:
    live = live_after_one_step()
    assert live.abort("b", None, "abort") == []
    assert live.abort("a", 3, "abort") == []
    assert live.request_ids == ["a"]
