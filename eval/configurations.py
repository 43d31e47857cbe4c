"""What model configurations say of the same weights: where experts and base differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eval.companions import home

# What does not change what a model computes from its weights, or is judged by the weights' shapes.
_IGNORED = {
    "_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "id2label",
    "label2id", "use_cache", "vocab_size", "problem_type", "finetuning_task",
    "gradient_checkpointing", "auto_map", "quantization_config", "bos_token_id", "eos_token_id",
    "pad_token_id", "sep_token_id", "num_labels", "output_attentions", "output_hidden_states",
    "return_dict", "unsloth_version", "unsloth_fixed", "_attn_implementation",
    "attn_implementation", "attention_dropout", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "classifier_dropout", "hidden_dropout", "resid_pdrop",
    "embd_pdrop", "attn_pdrop", "dropout", "activation_dropout", "summary_first_dropout",
    "pretraining_tp", "initializer_range", "initializer_factor", "tie_word_embeddings",
    "task_specific_params", "use_mamba_kernels", "model_type", "type", "rope_type",
    "keys_to_ignore_at_inference", "max_length", "max_position_embeddings", "image_size",
    "num_queries", "is_decoder", "prefix", "layerdrop", "encoder_layerdrop", "decoder_layerdrop",
    "_commit_hash",
}  # fmt: skip

_TEXT = "text_config."


def differences(
    base: Path, experts: Mapping[str, Path], into: Mapping[str, str] | None = None
) -> list[str]:
    """What experts' config.json say otherwise than the base's of how weights are used.

    A setting that one of two configurations leaves out is not compared: versions differ in what
    they write.
    into: the experts of a part of the base, whose settings stand in a table of their own.
    """
    whole, found = dict(_settings(base)), []
    text = {n.removeprefix(_TEXT): v for n, v in whole.items() if n.startswith(_TEXT)}
    for task, path in experts.items():
        ours = text if task in (into or {}) else whole
        for name, value in _settings(path):
            if name in ours and ours[name] != value:
                found.append(
                    f"expert {task!r} ({path}): its configuration says {name}={value!r:.60}, "
                    f"the base's {ours[name]!r:.60}; the merge has the base's"
                )
    return found


def _settings(path: Path) -> Iterator[tuple[str, Any]]:
    """(name, value) of the settings in a config.json, those of its parts by dotted names.

    Settings of the rotary embedding go by their own name, wherever a version keeps them.
    """
    folder = home(path)
    try:
        content = json.loads((folder / "config.json").read_text()) if folder else {}
    except (OSError, ValueError):
        return
    waiting = [("", content)] if isinstance(content, dict) else []
    while waiting:
        prefix, table = waiting.pop()
        for key, value in table.items():
            if isinstance(value, dict) and key not in _IGNORED:
                part = "" if key in {"rope_parameters", "rope_scaling"} else f"{key}."
                waiting.append((prefix + part, value))
            elif key not in _IGNORED and value is not None:
                yield prefix + key, value
