"""Tokenizer: text to ids, ids to text, messages to text."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from engine.errors import RequestError
from engine.tokenization.chat_template import ChatTemplate
from engine.tokenization.token_bytes import TokenBytes


class Tokenizer:
    """A model's tokenizer, over the `tokenizers` library.

    Args:
        backend: vocabulary, merges, pre-tokenizer, and the post-processor that adds special tokens.
        special_tokens: texts by role: "bos_token", "eos_token", "unk_token", "pad_token".
        chat_template: one Jinja template, several by name, or None for a model without chat.

    Raises:
        ModelLoadError: the chat template does not compile.
        UnsupportedModelError: the decoder does not spell bytes.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        chat_template: str | Mapping[str, str] | None = None,
    ) -> None:
        # Files may ask for truncation or padding, for training; a server must not shorten prompts on its own.
        backend.no_truncation()
        backend.no_padding()
        self.special_tokens = dict(special_tokens)
        self.bos_token_id = self._special_id(backend, "bos_token")
        self.eos_token_id = self._special_id(backend, "eos_token")
        self._backend = backend
        self._bytes = TokenBytes(backend)
        self._whole_texts: dict[int, str | None] = {}
        self._special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self._chat_template = None if chat_template is None else ChatTemplate(chat_template, self.special_tokens)

    @staticmethod
    def load(folder: str | Path) -> Tokenizer:
        """What `save` wrote, or any folder with a tokenizer in Hugging Face form. Raises ModelLoadError."""
        from engine.errors import ModelLoadError
        from engine.tokenization.from_huggingface import tokenizer_from_hf_folder

        tokenizer = tokenizer_from_hf_folder(Path(folder))
        if tokenizer is None:
            raise ModelLoadError(f"{folder}: no tokenizer files")
        return tokenizer

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers reads too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / "tokenizer.json"), pretty=False)
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens}
        config["clean_up_tokenization_spaces"] = False
        if self._chat_template is not None:
            source = self._chat_template.source
            named = (
                [{"name": name, "template": text} for name, text in source.items()]
                if isinstance(source, Mapping)
                else []
            )
            config["chat_template"] = named or source
        (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")

    def with_chat_template(self, source: str | Mapping[str, str]) -> Tokenizer:
        """The same tokenizer with another chat template, or with its first. Raises ModelLoadError."""
        other = copy.copy(self)
        other._chat_template = ChatTemplate(source, self.special_tokens)
        return other

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; `add_special_tokens` puts what the model expects around a text, often a leading BOS.

        Special tokens that the text spells out become those tokens: chat templates rely on it, so leave
        `add_special_tokens` off for a rendered template. Other threads run meanwhile.
        """
        try:
            # The library's `encode` holds the GIL throughout, and works out offsets: of a batch it does neither.
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            ids: list[int] = encoding.ids
        except (TypeError, UnicodeEncodeError) as error:  # JSON can carry a lone surrogate; the library wants UTF-8
            raise RequestError("the text is not valid Unicode: it holds a lone surrogate", param="prompt") from error
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True, continuation: bool = False) -> str:
        """The text of the tokens; bytes that are no UTF-8 become U+FFFD.

        Args:
            continuation: the tokens continue a text, so a leading space is the text's own; otherwise the space that
                SentencePiece puts before a text is dropped.
        """
        data = b"".join(self._bytes[i] for i in ids if not (skip_special_tokens and i in self._special_ids))
        text = data.decode("utf-8", "replace")
        return text if continuation or not self._bytes.strips_leading_space else text.removeprefix(" ")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; b"" for an id beyond the vocabulary."""
        return self._bytes[token_id]

    def whole_text(self, token_id: int) -> str | None:
        """One token's text, if its bytes are whole characters; else None."""
        try:
            return self._whole_texts[token_id]
        except KeyError:
            return self._remember_text(token_id)

    def token_text(self, token_id: int) -> str:
        """One token as text, for log-probabilities; parts of characters show as U+FFFD."""
        return self._bytes[token_id].decode("utf-8", "replace")

    def is_special(self, token_id: int) -> bool:
        """Whether decoding skips the token: control tokens, not words."""
        return token_id in self._special_ids

    @property
    def strips_leading_space(self) -> bool:
        """Whether decoding from a text's start drops one leading space (SentencePiece)."""
        return self._bytes.strips_leading_space

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id; a model's own vocabulary may be padded beyond it."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """The text of a conversation, up to where the model's answer begins.

        Args:
            messages: each with "role" and "content", as the template wants them.
            kwargs: further variables of the template, such as `tools`.

        Raises:
            RequestError: there is no template, or it refuses the messages; names the parameter "messages".
        """
        if self._chat_template is None:
            raise RequestError("the model has no chat template; use completions", param="messages")
        return self._chat_template.render(messages, add_generation_prompt, **kwargs)

    def _remember_text(self, token_id: int) -> str | None:
        try:
            text = self._bytes[token_id].decode()
        except UnicodeDecodeError:
            text = None
        self._whole_texts[token_id] = text
        return text

    def _special_id(self, backend: tokenizers.Tokenizer, role: str) -> int | None:
        token = self.special_tokens.get(role)
        token_id: int | None = None if token is None else backend.token_to_id(token)
        return token_id
