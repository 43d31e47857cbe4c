"""Questions as an encoder-decoder is trained on them, and answers ranked by their probability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import BaseModelOutput

from eval.language.examples import IGNORED
from eval.language.questions import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def padded(sequences: Sequence[Sequence[int]], value: int, device: str) -> Tensor:
    """(n, longest), filled up with `value` on the right."""
    longest = max(map(len, sequences))
    rows = [[*tokens, *[value] * (longest - len(tokens))] for tokens in sequences]
    return torch.tensor(rows, device=device)


def training_batch(examples: Sequence[Example], device: str) -> dict[str, Tensor]:
    """Prompts with their right answers: input_ids and attention_mask (b, L), labels (b, A)."""
    ids = padded([example.prompt for example in examples], IGNORED, device)
    answers = [example.choices[example.answer] for example in examples]
    mask = (ids != IGNORED).long()
    return {
        "input_ids": ids.clamp(min=0),
        "attention_mask": mask,
        "labels": padded(answers, IGNORED, device),
    }


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean negative log-likelihood of the right answers' tokens."""
    logits = model(**batch, use_cache=False).logits.float()  # (b, A, vocabulary)
    return cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)


def token_mask(batch: dict[str, Tensor], name: str) -> Tensor:
    """True for the tokens that are no padding among what the layer of this name is given.

    A decoder's layers see the answer, but its cross-attention's keys and values the prompt.
    """
    of_answer = name.startswith("decoder.") and not name.endswith(
        ("EncDecAttention.k.weight", "EncDecAttention.v.weight")
    )
    return batch["labels"] != IGNORED if of_answer else batch["attention_mask"].bool()


@torch.inference_mode()
def rank(
    model: PreTrainedModel, examples: Sequence[Example], device: str = "cpu", *, mean: bool = True
) -> Tensor:
    """Numbers (b,) of the choices whose tokens have the highest log-probability, in the mean or,
    without `mean`, in the sum.

    Each prompt is encoded once, however many choices it has.
    """
    batch = training_batch(examples, device)
    mask = batch["attention_mask"]
    encoded = model.get_encoder()(batch["input_ids"], mask).last_hidden_state  # (b, L, d)
    owner = torch.tensor([i for i, e in enumerate(examples) for _ in e.choices], device=device)
    labels = padded(
        [c for e in examples for c in e.choices], IGNORED, device
    )  # (sum of choices, A)
    logits = model(
        encoder_outputs=BaseModelOutput(encoded[owner]),
        attention_mask=mask[owner],
        labels=labels,
        use_cache=False,
    ).logits
    losses = cross_entropy(logits.float().mT, labels, ignore_index=IGNORED, reduction="none")
    scores = -losses.sum(1)
    if mean:
        scores /= (labels != IGNORED).sum(1)
    return torch.stack([own.argmax() for own in scores.split([len(e.choices) for e in examples])])
