"""GPT-2's tokenizer files, vocab.json and merges.txt, which OPT shares: byte-level BPE."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from engine.errors import ModelLoadError

_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
_MODEL_TYPES = ("gpt2", "opt")
_END_OF_TEXT = "<|endoftext|>"  # every role that a GPT-2 folder does not fill


def is_gpt2_folder(folder: Path, tokenizer_config: Mapping[str, Any], model_config: Mapping[str, Any]) -> bool:
    """Whether the two files are there and go by GPT-2's rules; other models have files of these names too."""
    if not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        return False
    named = tokenizer_config.get("tokenizer_class")
    return named in _CLASSES if named else model_config.get("model_type") in _MODEL_TYPES


def read_gpt2_files(
    folder: Path, tokenizer_config: Mapping[str, Any], special_tokens: dict[str, str], added_tokens: Mapping[str, int]
) -> tokenizers.Tokenizer:
    """The tokenizer of the folder. Fills the roles of `special_tokens` that GPT-2's own folder leaves to its class.

    Args:
        added_tokens: added_tokens.json, ids of tokens beside the vocabulary.

    Raises:
        ModelLoadError: a file is malformed, or an added token gets another id than the folder says.
    """
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises bare Exception
        raise ModelLoadError(f"{folder}: vocab.json and merges.txt: {error}") from error
    backend = tokenizers.Tokenizer(model)
    prefix = bool(tokenizer_config.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    for role in ("bos_token", "eos_token", "unk_token"):
        if role not in special_tokens and backend.token_to_id(_END_OF_TEXT) is not None:
            special_tokens[role] = _END_OF_TEXT

    added = [*_added_tokens(folder, tokenizer_config, added_tokens)]
    for token_id, token in sorted(added, key=lambda entry: entry[0]):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise ModelLoadError(
                f"{folder}: added token {token.content!r} has id {token_id} there, but "
                f"{backend.token_to_id(token.content)} after the vocabulary"
            )
    known = {token.content for _, token in added}
    for role, text in special_tokens.items():
        if text not in known:
            entry = tokenizer_config.get(role)
            backend.add_tokens([_added_token(text, entry if isinstance(entry, dict) else {}, special=True)])
    return backend


def _added_tokens(
    folder: Path, tokenizer_config: Mapping[str, Any], added_tokens: Mapping[str, int]
) -> Iterator[tuple[int, AddedToken]]:
    """Tokens with the ids that the folder gives them: tokenizer_config.json's, then the older file's own."""
    entries = tokenizer_config.get("added_tokens_decoder") or {}
    try:
        for token_id, entry in entries.items():
            yield int(token_id), _added_token(entry["content"], entry, special=bool(entry.get("special", False)))
        known = {entry["content"] for entry in entries.values()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(
            f"{folder / 'tokenizer_config.json'}: malformed added_tokens_decoder: {error!r}"
        ) from error
    for text, token_id in added_tokens.items():
        if not isinstance(token_id, int):
            raise ModelLoadError(f"{folder / 'added_tokens.json'}: {text!r} has the id {token_id!r}, no integer")
        if text not in known:
            yield token_id, _added_token(text, {}, special=False)


def _added_token(text: str, entry: Mapping[str, Any], special: bool) -> AddedToken:
    """`entry` may say which white space around it the token takes with it."""
    flags = {name: bool(entry.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
    return AddedToken(text, normalized=False, special=special, **flags)
