"""What suites of language models that fit into memory share: a model folder, loaded and adapted."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
import transformers
from torch import Tensor, nn

from eval import training
from eval.backend import Finetuning, Trainable
from eval.language import checkpoints
from eval.recipes import LANGUAGE, Recipe
from merging.layers import linear_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class PretrainedBackend(Trainable):
    """Every parameter counts once: what modules share is one tensor, under its first name."""

    loader: ClassVar[str]  # of transformers
    settings = LANGUAGE

    @property
    @abstractmethod
    def title(self) -> str:
        """What adapters say they belong to."""

    @property
    @abstractmethod
    def folder(self) -> Path:
        """The base's model folder on this machine."""

    def base(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self._base.items()}

    @cached_property
    def _base(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.fresh().named_parameters()}

    def fresh(self) -> PreTrainedModel:
        model = getattr(transformers, self.loader).from_pretrained(
            self.folder, dtype=torch.float32, trust_remote_code=False
        )
        model.name_or_path = self.title
        return model.eval()

    @cached_property
    def network(self) -> PreTrainedModel:
        """A working copy whose weights are whatever was loaded last."""
        return self.fresh().requires_grad_(False).to(self.device)

    def load(self, state: Mapping[str, Tensor]) -> None:
        checkpoints.require_same(state, self._base, self.name)
        self.network.load_state_dict({name: state[name] for name in self._base}, strict=False)

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return transformers.AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)

    def learner(
        self, tasks: Sequence[str], finetuning: Finetuning, recipe: Recipe, seed: int
    ) -> nn.Module:
        model = self.fresh()
        if finetuning == "full":
            return model
        targets = [name.removesuffix(".weight") for name in linear_layers(model)]
        return training.add_lora(model, targets, recipe.r, recipe.alpha, seed)
