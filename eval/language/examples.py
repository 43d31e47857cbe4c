"""Examples of prompt and answer as a decoder is trained and measured on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # cross_entropy's mark of a position without a label


class Example(NamedTuple):
    """Tokens of a prompt and its answer, and how many of them are the prompt's."""

    tokens: list[int]
    prompt: int


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> Example:
    """Tokenise as lm-eval scores it: the prompt alone, then prompt and answer as one string."""
    return Example(tokenizer(prompt + answer)["input_ids"], len(tokenizer(prompt)["input_ids"]))


def collate(examples: Sequence[Example], device: str = "cpu") -> dict[str, Tensor]:
    """Examples padded on the right: input_ids, attention_mask and labels, each (b, L).

    Labels are `IGNORED` outside the answers.
    """
    length = max(len(example.tokens) for example in examples)
    tokens = torch.zeros(len(examples), length, dtype=torch.long)
    mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, IGNORED)
    for i, (own, prompt) in enumerate(examples):
        tokens[i, : len(own)] = torch.tensor(own)
        mask[i, : len(own)] = 1
        labels[i, prompt : len(own)] = tokens[i, prompt : len(own)]
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def answer_logits(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits where an answer token is predicted, and those tokens.

    Returns (b, n, vocabulary) float32 and (b, n), n the positions at which any example of the
    batch has an answer; the others of an example are `IGNORED`. The output head, a fifth of a
    small model's work, runs at these positions alone.
    """
    following = batch["labels"][:, 1:]
    at = (following != IGNORED).any(0).nonzero()[:, 0]
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        logits_to_keep=at,
        use_cache=False,
    ).logits
    return logits.float(), following[:, at]


def answer_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean negative log-likelihood of the answers' tokens."""
    logits, tokens = answer_logits(model, batch)
    return cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=IGNORED)
