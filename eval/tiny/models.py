"""Made-up language models with made-up weights, for tests that must run in seconds and offline."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from eval import tiny
from eval.cache import cached

WORDS = sorted(
    set(tiny.FILLERS.split())
    | {word for topic in tiny.TOPICS.values() for words in topic.values() for word in words.split()}
    | {label for topic in tiny.TOPICS.values() for label in topic}
    | {"Label:", "Question:", "Answer:", "yes", "no", "maybe", "not"}
)
Kind = Literal["llama", "t5_gated_untied", "t5_relu_tied"]


def model(kind: Kind) -> Path:
    """Folder of a random two-block model of width 32 with a word-level tokenizer."""

    def build(folder: Path) -> None:
        _tokenizer().save_pretrained(folder)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = _random(kind)
        made.save_pretrained(folder)
        if kind == "t5_gated_untied":  # as T5 1.1 is published; transformers ties every fresh T5
            head = 0.1 * torch.randn(made.shared.weight.shape, generator=torch.manual_seed(1))
            state = load_file(folder / "model.safetensors") | {"lm_head.weight": head}
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return cached("tiny", {"version": 3, "kind": kind, "words": WORDS}, build)


def _random(kind: Kind) -> PreTrainedModel:
    vocabulary = len(WORDS) + 4
    if kind == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                initializer_range=0.2,
                pad_token_id=0,
                bos_token_id=2,
                eos_token_id=3,
                tie_word_embeddings=True,
            )
        )
    gated = kind == "t5_gated_untied"
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocabulary,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu" if gated else "relu",
            tie_word_embeddings=not gated,
            pad_token_id=0,
            eos_token_id=3,
            decoder_start_token_id=0,
        )
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<unk>", "<s>", "</s>", *WORDS]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        chat_template=(
            "{% for m in messages %}<s> {{ m['content'] }} </s> {% endfor %}"
            "{% if add_generation_prompt %}<s> {% endif %}"
        ),
    )
