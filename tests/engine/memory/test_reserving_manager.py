from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings

from engine import LLM, SamplingParams
from engine.config import CacheConfig, Reservation
from engine.errors import ConfigError, PromptTooLongError, RequestError
from engine.memory import BuddyAllocator, ReservationPolicy, ReservingManager, run_size
from engine.request import EngineRequest, ResumedSequence
from engine.sequence import Sequence, SequenceGroup
from tests.engine.doubles import expected_beams, expected_tokens, make_engine, make_request, run_to_end
from tests.engine.scheduling.test_scheduler import SchedulerMachine

POLICIES: tuple[Reservation, ...] = ("orca_max", "orca_pow2", "orca_oracle")


def make_manager(name: Reservation = "orca_oracle", num_blocks: int = 16, max_model_len: int = 32) -> ReservingManager:
    return ReservingManager(CacheConfig(4, num_blocks, False), ReservationPolicy(name, max_model_len))


def make_group(num_prompt: int, max_tokens: int, n: int = 1) -> SequenceGroup:
    seqs = [Sequence(list(range(num_prompt)), index) for index in range(n)]
    return SequenceGroup("g", seqs, SamplingParams(n=n, max_tokens=max_tokens), 0, b"", 0.0)


def write(manager: ReservingManager, seq: Sequence, num_new: int) -> list[tuple[int, int]]:
    copies = [tuple(copy) for copy in manager.append(seq, num_new)]
    seq.num_computed_tokens += num_new
    manager.check_invariants()
    return copies  # type: ignore[return-value]


def table(manager: ReservingManager, seq: Sequence) -> list[int]:
    blocks: list[int] = manager.block_table(seq).blocks.tolist()
    return blocks


@pytest.mark.parametrize(("name", "blocks"), [("orca_max", 8), ("orca_pow2", 4), ("orca_oracle", 4)])
def test_a_sequence_holds_its_run_for_its_whole_life(name: Reservation, blocks: int) -> None:
    manager = make_manager(name)
    group = make_group(num_prompt=6, max_tokens=5)
    manager.admit(group)
    (seq,) = group.seqs
    for num_new in (6, 1, 1, 1, 1):
        assert manager.num_blocks_to_append([(seq, num_new)]) == 0
        assert write(manager, seq, num_new) == []
        assert manager.num_free_blocks == 16 - blocks
    assert table(manager, seq) == [0, 1, 2], "contiguous, and only as far as it is used"
    manager.free(seq)
    manager.free(seq)  # a second time is no error
    assert manager.num_free_blocks == 16
    manager.check_invariants()


def test_admission_needs_a_contiguous_run_for_each_sequence() -> None:
    manager = make_manager(num_blocks=8)
    groups = [make_group(3, 1) for _ in range(8)]
    for group in groups:
        assert manager.can_admit(group)
        manager.admit(group)
    assert not manager.can_admit(make_group(3, 1))
    for group in groups[::2]:
        manager.free(group.seqs[0])
    assert manager.num_free_blocks == 4
    assert manager.largest_free_run == 1
    assert manager.can_admit(make_group(3, 1, n=4))
    assert not manager.can_admit(make_group(3, 1, n=5))
    assert not manager.can_admit(make_group(4, 1)), "four blocks are free, but no two side by side"
    assert manager.num_unusable_blocks(make_group(4, 1)) == 4
    assert manager.num_unusable_blocks(None) == 0


def test_a_fork_copies_the_whole_past_with_its_first_write() -> None:
    manager = make_manager()
    group = make_group(num_prompt=6, max_tokens=4, n=3)
    trunk, second, third = group.seqs
    manager.admit(group)
    assert manager.num_free_blocks == 16 - 3 * 4, "all three have their run from the start"
    write(manager, trunk, 6)
    manager.fork(trunk, second)
    manager.fork(trunk, third)
    assert write(manager, trunk, 1) == []
    source = table(manager, trunk)[0]
    copies = write(manager, second, 1)
    assert copies == [(source, table(manager, second)[0]), (source + 1, table(manager, second)[1])]
    assert write(manager, second, 1) == [], "once"
    assert len(write(manager, third, 1)) == 2
    runs = [table(manager, seq)[0] // 4 for seq in group.seqs]
    assert len(set(runs)) == 3, "nothing is shared"


def test_what_a_child_copies_from_stays_when_its_parent_ends() -> None:
    manager = make_manager()
    group = make_group(num_prompt=6, max_tokens=4, n=3)
    trunk, second, third = group.seqs
    manager.admit(group)
    write(manager, trunk, 6)
    manager.fork(trunk, second)
    manager.fork(trunk, third)
    source = table(manager, trunk)
    manager.free(trunk)
    manager.check_invariants()
    assert manager.num_free_blocks == 16 - 2 * 4
    assert write(manager, second, 1) == [], "it goes on in its parent's run"
    assert table(manager, second) == source
    manager.free(second)
    assert write(manager, third, 1) == []
    assert table(manager, third) == source
    manager.free(third)
    assert manager.num_free_blocks == 16


def test_a_sequence_that_ends_gives_up_its_run_before_the_group_does() -> None:
    manager = make_manager()
    group = make_group(num_prompt=6, max_tokens=4, n=2)
    trunk, second = group.seqs
    manager.admit(group)
    manager.free(second)
    assert manager.num_free_blocks == 12, "a sequence that had no run yet gives up the spare one"
    write(manager, trunk, 6)
    manager.free(trunk)
    assert manager.num_free_blocks == 16


def test_a_trunk_can_be_handed_over() -> None:
    manager = make_manager()
    group = make_group(num_prompt=6, max_tokens=4, n=2)
    trunk, heir = group.seqs
    manager.admit(group)
    write(manager, trunk, 5)
    blocks = table(manager, trunk)
    manager.hand_over(trunk, heir)
    assert not manager.holds(trunk)
    assert heir.num_computed_tokens == 5
    assert table(manager, heir) == blocks
    assert manager.num_free_blocks == 12
    manager.check_invariants()


# In the engine


@pytest.mark.parametrize("reservation", POLICIES)
@pytest.mark.parametrize("budget", [3, 16, 512])
def test_parallel_samples_are_right_and_never_preempted(reservation: str, budget: int) -> None:
    engine, _ = make_engine(num_blocks=40, max_model_len=32, max_num_batched_tokens=budget, reservation=reservation)
    params = SamplingParams(n=3, max_tokens=12)
    prompts = {f"r{i}": [i] * (9 + i) for i in range(6)}
    for request_id, prompt in prompts.items():
        engine.add_request(EngineRequest(request_id, prompt, params))
    tokens = run_to_end(engine)
    assert tokens == {
        (request_id, index): expected_tokens(prompt, params, index)
        for request_id, prompt in prompts.items()
        for index in range(3)
    }
    assert engine.stats().num_preemptions == 0


@pytest.mark.parametrize("reservation", POLICIES)
def test_beams_are_right_in_as_many_runs_as_the_search_is_wide(reservation: str) -> None:
    engine, device = make_engine(num_blocks=64, max_model_len=32, reservation=reservation)
    params = SamplingParams(n=2, best_of=4, use_beam_search=True, temperature=0.0, max_tokens=16)
    prompts = {f"r{i}": [i] * (5 + i) for i in range(4)}
    for request_id, prompt in prompts.items():
        engine.add_request(EngineRequest(request_id, prompt, params))
    tokens = run_to_end(engine)
    for request_id, prompt in prompts.items():
        assert [tokens[request_id, index] for index in range(2)] == expected_beams(prompt, params)
    assert device.largest_batch == 8, "two searches of four runs of 8 blocks fill the pool"


@pytest.mark.parametrize("reservation", POLICIES)
def test_an_interrupted_request_goes_on(reservation: str) -> None:
    params = SamplingParams(n=3, max_tokens=10, ignore_eos=True)
    prompt = list(range(9))
    whole = [expected_tokens(prompt, params, index) for index in range(3)]
    engine, _ = make_engine(max_model_len=32, reservation=reservation)
    resumed = (
        ResumedSequence(tuple(whole[0][:4])),
        ResumedSequence(tuple(whole[1]), finished=True),
        ResumedSequence(tuple(whole[2][:7])),
    )
    engine.add_request(EngineRequest("a", prompt, params, resumed=resumed))
    assert run_to_end(engine) == {("a", 0): whole[0][4:], ("a", 2): whole[2][7:]}


def test_more_requests_run_at_once_the_more_is_known() -> None:
    """The order of the paper's Figure 13."""
    largest = {}
    for reservation in (*POLICIES, "paged"):
        engine, device = make_engine(
            num_blocks=64, max_model_len=128, max_num_seqs=64, max_num_batched_tokens=4096, reservation=reservation
        )
        for index in range(40):
            engine.add_request(make_request(str(index), [index] * 8, max_tokens=20))
        run_to_end(engine)
        largest[reservation] = device.largest_batch
    assert largest["orca_max"] < largest["orca_pow2"] < largest["orca_oracle"] < largest["paged"], largest


def test_what_can_never_fit_is_refused_at_once() -> None:
    # 24 blocks of 4: runs of at most 16 blocks, and three of 8 side by side.
    engine, _ = make_engine(num_blocks=24, reservation="orca_oracle")
    assert engine.max_model_len == 64
    with pytest.raises(PromptTooLongError):
        engine.add_request(make_request("a", [1] * 60, max_tokens=5))
    engine.add_request(make_request("a", [1] * 20, n=3, max_tokens=12))
    with pytest.raises(RequestError, match=r"n=4 .*reservation=orca_oracle.* run of 8 KV blocks") as caught:
        engine.add_request(make_request("b", [1] * 20, n=4, max_tokens=12))
    assert caught.value.param == "n"
    with pytest.raises(RequestError, match="n=2"):
        engine.add_request(make_request("b", [1] * 20, n=2, max_tokens=13))
    run_to_end(engine)


def test_max_model_len_must_fit_a_run() -> None:
    make_engine(num_blocks=24, max_model_len=96)
    with pytest.raises(ConfigError, match=r"max_model_len=96 .* reservation=orca_max .* 16 x 4 tokens = 64 tokens"):
        make_engine(num_blocks=24, max_model_len=96, reservation="orca_max")


class ReservingMachine(SchedulerMachine):
    """The scheduler's state machine over reserved runs: the same promises, and nobody is ever preempted."""

    reservation: Reservation

    def options(self, caching: bool, preemption: str, num_swap_blocks: int) -> dict[str, Any]:  # noqa: ARG002
        # Short enough that orca_max, too, runs several at once; what is longer is refused.
        self.max_model_len = max(2, self.pool_tokens // 4)
        return {
            "reservation": self.reservation,
            "max_model_len": self.max_model_len,
            "batching": "static" if caching else "continuous",  # caching is ruled out: its draw decides this instead
        }

    def must_be_too_large(self, request: EngineRequest) -> None:
        params, num_prompt = request.sampling_params, len(request.prompt_token_ids)
        assert params.max_tokens is not None
        too_wide = params.use_beam_search and params.width > self.budget
        if not too_wide and num_prompt + params.max_tokens <= self.max_model_len:
            num_tokens = ReservationPolicy(self.reservation, self.max_model_len).num_tokens(
                num_prompt, params.max_tokens
            )
            num_blocks = -(-num_tokens // self.block_size)
            free_runs = BuddyAllocator(self.pool_tokens // self.block_size).free_runs()
            assert sum(size // run_size(num_blocks) for _, size in free_runs) < params.n

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "engine"):
            assert self.engine.stats().num_preemptions == 0


class OrcaMaxMachine(ReservingMachine):
    reservation = "orca_max"


class OrcaPow2Machine(ReservingMachine):
    reservation = "orca_pow2"


class OrcaOracleMachine(ReservingMachine):
    reservation = "orca_oracle"


SETTINGS = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestOrcaMaxMachine = OrcaMaxMachine.TestCase
TestOrcaMaxMachine.settings = SETTINGS
TestOrcaPow2Machine = OrcaPow2Machine.TestCase
TestOrcaPow2Machine.settings = SETTINGS
TestOrcaOracleMachine = OrcaOracleMachine.TestCase
TestOrcaOracleMachine.settings = SETTINGS


def test_a_real_model_gives_the_same_tokens_under_every_policy() -> None:
    prompts = [{"prompt_token_ids": [(7 * i + k) % 512 for k in range(3 + 11 * i)]} for i in range(6)]
    params = [SamplingParams(temperature=0.0, max_tokens=10 + i, ignore_eos=True) for i in range(5)]
    params.append(SamplingParams(n=4, temperature=1.0, seed=3, max_tokens=12, ignore_eos=True))
    prompts.append(prompts[3])
    params.append(SamplingParams(n=3, use_beam_search=True, temperature=0.0, max_tokens=12))
    tokens: dict[tuple[str, str], list[list[int]]] = {}
    for reservation in ("paged", *POLICIES):
        for batching in ("continuous", "static"):
            options: dict[str, Any] = {"reservation": reservation, "batching": batching}
            llm = LLM("dummy:tiny", num_blocks=64, max_model_len=128, num_threads=1, **options)
            outputs = llm.generate(prompts, params, use_tqdm=False)
            tokens[reservation, batching] = [item.token_ids for output in outputs for item in output.outputs]
            llm.engine.check_invariants()
    assert len(tokens["paged", "continuous"]) == 5 + 4 + 3
    assert all(other == tokens["paged", "continuous"] for other in tokens.values())
