"""Text to token ids and back, and chat templates. Imports no torch."""

from __future__ import annotations

from engine.tokenization.from_gguf import tokenizer_from_gguf
from engine.tokenization.from_huggingface import tokenizer_from_hf_folder
from engine.tokenization.incremental import IncrementalDetokenizer
from engine.tokenization.tokenizer import Tokenizer

__all__ = ["IncrementalDetokenizer", "Tokenizer", "tokenizer_from_gguf", "tokenizer_from_hf_folder"]
