"""chat_model: the demo's small Llama with a tokenizer and a chat template, for OpenAI-compatible servers."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from kvservice.demo.model import ModelShape, write_model

_TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
_SPECIAL = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")


def write_chat_model(folder: Path, shape: ModelShape) -> None:
    """Write the model and a tokenizer that makes one token of every byte; the same bytes every time."""
    write_model(folder, shape)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Every id that the model can answer with has a text: what is beyond the bytes is spelled out.
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    specials = len(vocabulary)
    for number in range(specials + len(_SPECIAL), shape.vocabulary):
        vocabulary[f"Ġw{number}"] = number
    for offset, special in enumerate(_SPECIAL):
        vocabulary[special] = specials + offset
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(special, special=True) for special in _SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "chat_template": _TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.window_tokens,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
