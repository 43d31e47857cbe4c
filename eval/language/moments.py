"""Second moments of a decoder too large to hold several of, over texts of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from eval import streamed_statistics
from eval.language import checkpoints, judge
from eval.language.examples import Example, collate
from merging.errors import InputError
from merging.formats.checkpoints import open_checkpoint
from merging.layers import linear_layers


def read_texts(settings: Mapping[str, Any], count: int, sources: dict[str, str]) -> list[str]:
    """The first texts of a data set, wrapped in a chat template where one is named.

    settings: arguments of `datasets.load_dataset`, `field` and `chat_template`.
    sources: takes {repository: commit} of what came from the hub.
    """
    import datasets

    column, template = settings.get("field", "text"), settings.get("chat_template")
    source = {k: v for k, v in settings.items() if k not in {"field", "chat_template"}}
    try:
        with judge.noted(sources):
            texts = datasets.load_dataset(**source)[column][:count]
    except Exception as error:  # datasets has a dozen kinds for "not there"
        raise InputError(f"texts {source} cannot be loaded: {error}") from error
    if len(texts) < count:
        raise InputError(f"texts {source} are {len(texts)}, {count} were asked for")
    return [checkpoints.wrapped(text, template) for text in texts] if template else texts


def write(
    base: Path,
    expert: Path | None,
    tokenizer: Path,
    texts: Sequence[str],
    path: Path,
    *,
    about: Mapping[str, Any],
    batch_size: int,
    max_tokens: int,
    memory: int,
    device: str,
) -> streamed_statistics.Cost:
    """Stream packed second moments of all layers over all tokens of texts into a file.

    base, tokenizer: model folders. expert: through which they are measured; None: the base.
    Other arguments as in `streamed_statistics.collect`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", trust_remote_code=False)
    model.to(device)
    if expert is not None:
        with torch.no_grad():
            checkpoints.load_into(model, open_checkpoint(expert))
    tokens = [words(text)["input_ids"][:max_tokens] for text in texts]
    examples = [Example(own, len(own)) for own in tokens if own]
    return streamed_statistics.collect(
        model,
        lambda: (
            collate(examples[i : i + batch_size], device)
            for i in range(0, len(examples), batch_size)
        ),
        linear_layers(model),
        path,
        about=about,
        memory=memory,
        forward=lambda model, batch: model.base_model(
            batch["input_ids"], batch["attention_mask"], use_cache=False
        ),
        mask=lambda batch, name: batch["attention_mask"],
    )
