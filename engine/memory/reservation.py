"""How much memory a request reserves at admission: none (paged), or a run for its whole life, as Orca does (§6.1)."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import Reservation


@dataclass(frozen=True)
class ReservationPolicy:
    """The token slots that each sequence of a request reserves.

    - `orca_max`: as many as the longest sequence that the engine serves.
    - `orca_pow2`: the prompt, and the output's length rounded up to a power of two: at most twice what it fills.
    - `orca_oracle`: the prompt and the output's true length.

    No policy knows the future: pow2 and oracle take `max_tokens` for the output's length. That is its true length
    where the request fixes it (`ignore_eos` and no stop strings or tokens), as the paper's experiments do; any other
    request may end sooner and leaves the rest of its run unused.
    """

    name: Reservation
    max_model_len: int

    def bound(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        """The most tokens that a sequence can come to."""
        return final_length(num_prompt_tokens, max_tokens, self.max_model_len)

    def num_tokens(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        """Slots to reserve for one sequence; never fewer than `bound`."""
        bound = self.bound(num_prompt_tokens, max_tokens)
        if self.name == "orca_max":
            return self.max_model_len
        if self.name == "orca_pow2":
            output = bound - num_prompt_tokens
            return min(num_prompt_tokens + (1 << max(0, output - 1).bit_length()), self.max_model_len)
        assert self.name == "orca_oracle", "paged reserves nothing"
        return bound


def final_length(num_prompt_tokens: int, max_tokens: int | None, max_model_len: int) -> int:
    """Tokens of a sequence that neither end-of-sequence nor a stop ends before its limits do."""
    return max_model_len if max_tokens is None else min(num_prompt_tokens + max_tokens, max_model_len)
