"""What the tests with a real engine need: a model, and an engine that has bad luck.

The model is a few hundred kilobytes with random weights, made on the spot: real files for a real engine, no download.
"""

from __future__ import annotations

import importlib
import json
import socket
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from runner.engines import mlx
from runner.engines.mlx import MlxEngine

LAYERS = 4
WORDS = tuple(f"word{number}" for number in range(300))
_END = "</s>"
_UNKNOWN = "<unk>"

# A template in the language of Hugging Face tokenizers that cannot be mistaken for a bare prompt.
TEMPLATE = "{% for message in messages %}word1 word2 {{ message['content'] }} word3{% endfor %}"


def make_model(folder: Path, *, seed: int = 7, chat_template: bool = False) -> Path:
    """Write a Llama of `LAYERS` layers, 4 attention heads and 2 key-value heads, whose words are `WORDS`."""
    mx: Any = importlib.import_module("mlx.core")
    utils: Any = importlib.import_module("mlx.utils")
    llama: Any = importlib.import_module("mlx_lm.models.llama")
    folder.mkdir(parents=True)
    vocabulary = {word: index for index, word in enumerate((*WORDS, _UNKNOWN, _END))}
    _write_tokenizer(folder, vocabulary, chat_template=chat_template)
    config: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(vocabulary),
        "tie_word_embeddings": False,
        "eos_token_id": vocabulary[_END],
    }
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    weights = dict(utils.tree_flatten(model.parameters()))
    for name, weight in weights.items():
        # Larger than usual, so that the text depends on every layer; the end of the text is made never to come by itself.
        if name.startswith("model.layers.") and "norm" not in name:
            weights[name] = weight * 4
    weights["lm_head.weight"][vocabulary[_END]] = 0.0
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


def reference_text(folder: Path, prompt: str, max_tokens: int) -> str:
    """What mlx-lm itself makes of the prompt, greedily, without any of our code."""
    mlx_lm: Any = importlib.import_module("mlx_lm")
    model, tokenizer = mlx_lm.load(str(folder))
    return "".join(
        response.text for response in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=max_tokens)
    )


def robbed_engine(config: dict[str, JsonValue]) -> MlxEngine:
    """An MLX engine whose port another program takes as soon as that is possible: between its engine's giving it free for MLX and MLX."""
    share = mlx._share_port  # pyright: ignore[reportPrivateUsage]
    robbers: list[socket.socket] = []

    def share_with_a_robber(bound: socket.socket) -> None:
        share(bound)
        robber = socket.socket()
        robber.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        robber.bind(bound.getsockname())
        robber.listen()
        robbers.append(robber)

    mlx._share_port = share_with_a_robber  # pyright: ignore[reportPrivateUsage]
    return mlx.mlx_engine(config)


def _write_tokenizer(folder: Path, vocabulary: dict[str, int], *, chat_template: bool) -> None:
    tokenizers: Any = importlib.import_module("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab=vocabulary, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([_UNKNOWN, _END])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END, "unk_token": _UNKNOWN}
    if chat_template:
        config["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
