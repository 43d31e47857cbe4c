"""Made-up models and sentences behind the suites tiny_*, which run in seconds and offline.

They stay with the code, in this room alone, because they are how an installation is tried out:
`model-merging-run suite=tiny_text method=average` needs no download. Here are the encoder and the
sentences, in `eval.tiny.models` the language models, in `eval.tiny.suites` the kinds of suites.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel

from eval.cache import cached

FILLERS = "the a of and in it was then so very we saw some more near from with by at on"
TOPICS = {
    "animals": {"pets": "cat dog rabbit hamster", "farm": "cow horse sheep goat"},
    "weather": {"wet": "rain flood drizzle puddle", "dry": "sun drought dust heat"},
    "meals": {"sweet": "cake honey sugar jam", "salty": "chips olives ham pickles"},
}


def encoder() -> Path:
    """Folder of a BERT of 20 thousand random weights and a word-level tokenizer."""

    def build(folder: Path) -> None:
        topics = (
            word for topic in TOPICS.values() for words in topic.values() for word in words.split()
        )
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLERS.split(), *topics]
        tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        tokenizer.save(str(folder / "tokenizer.json"))
        config = BertConfig(
            vocab_size=len(words),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
            initializer_range=0.2,
        )
        config.save_pretrained(folder)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            save_file(BertModel(config).state_dict(), folder / "model.safetensors")

    return cached("tiny", {"version": 1, "topics": TOPICS, "fillers": FILLERS}, build)


def sentences(topic: str) -> list[tuple[str, str]]:
    """300 (sentence, label) pairs: fillers around one word that tells the label."""
    rng = random.Random(topic)
    examples = []
    for _ in range(300):
        label = rng.choice(sorted(TOPICS[topic]))
        words = rng.choices(FILLERS.split(), k=rng.randint(3, 8))
        words.insert(rng.randint(0, len(words)), rng.choice(TOPICS[topic][label].split()))
        examples.append((" ".join(words), label))
    return examples
