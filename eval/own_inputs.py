"""Statistics of a checkpoint that belongs to no suite, on texts or images of the user's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

import merging
from eval import statistics
from merging.errors import InputError
from merging.formats.checkpoints import open_checkpoint
from merging.layers.stored import loaded_as
from merging.progress import track

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
Batch = dict[str, Tensor]


class Measured(NamedTuple):
    """How much was measured: layers whose inputs were seen, and inputs."""

    layers: int
    inputs: int


def measure(
    checkpoint: Path,
    output: Path,
    *,
    base: Path | None = None,
    texts: Path | None = None,
    images: Path | None = None,
    batches: int,
    batch_size: int,
    device: str = "cpu",
) -> Measured:
    """Write {weight name: (d_in, d_in) second moment of that layer's inputs} as safetensors.

    checkpoint: folder that transformers loads; with `base`, a PEFT adapter of that folder.
    texts: a file of one text a line, or .jsonl with the field "text". images: a folder.
    The first batches x batch_size of them are used. Raises InputError for what cannot be
    loaded, inputs that are too few, and a model of which no layer was reached.
    """
    folder = checkpoint if base is None else base
    inputs = read_texts(texts) if texts else read_images(images)
    if len(inputs) < batches * batch_size:
        raise InputError(
            f"{texts or images} holds {len(inputs)} inputs, {batches} x {batch_size} were asked "
            "for",
            hint=f"ask for fewer: statistics.batches={max(len(inputs) // batch_size, 1)} "
            f"statistics.batch_size={min(batch_size, len(inputs))}",
        )
    model = _model(folder, checkpoint if base is not None else None).to(device)
    prepare = _tokenised(folder) if texts else _pixels(folder)
    forward = _forward(model, images is not None)
    chunks = [inputs[i * batch_size : (i + 1) * batch_size] for i in range(batches)]

    def stream() -> Iterator[Batch]:
        for chunk in chunks:
            yield {k: v.to(device) for k, v in prepare(chunk).items()}

    padded = _reached(model, next(stream()), forward)

    def mask(batch: Batch, name: str) -> Tensor | None:
        return batch["attention_mask"] if padded[name] else None

    moments = statistics.second_moments(
        model, track(stream(), "second moments", batches), padded, forward=forward, mask=mask
    )
    stored = loaded_as(model, open_checkpoint(folder).keys())  # a merge knows names on disk
    moments = {name: moments[own] for name, own in stored.items() if own in moments}
    output.parent.mkdir(parents=True, exist_ok=True)
    statistics.save(output, moments, {"checkpoint": checkpoint.name, "inputs": len(chunks)})
    return Measured(len(moments), batches * batch_size)


def read_texts(path: Path) -> list[str]:
    """The texts of a file: its lines that are not empty, or the field "text" of JSON lines."""
    if not path.is_file():
        raise InputError(f"{path} does not exist, expected a file of one text a line")
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    if path.suffix != ".jsonl":
        return lines
    try:
        return [str(json.loads(line)["text"]) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'{path}: expected JSON objects with a field "text", a line each'
        ) from error


def read_images(folder: Path | None) -> list[Path]:
    """The image files below a folder, by name."""
    if folder is None or not folder.is_dir():
        raise InputError(f"{folder} is no folder, expected one of images")
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)


def _model(folder: Path, adapter: Path | None) -> nn.Module:
    """The model that a folder's config.json names, with an adapter merged in."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json, which says what the model is")
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        named = [getattr(transformers, n, None) for n in config.architectures or ()]
        kind = next((k for k in named if k is not None), transformers.AutoModel)
        model = kind.from_pretrained(folder, config=config, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"transformers cannot load {folder}: {error}") from error
    if config.is_encoder_decoder:
        raise InputError(
            f"{folder} is an encoder-decoder model, whose decoder needs targets beside the inputs",
            hint="measure it through a suite: suite=language7_t5_base, or one like it",
        )
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model


def _tokenised(folder: Path) -> Callable[[Sequence[str]], Batch]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    limit = min(tokenizer.model_max_length, 512)
    limit = min(
        limit,
        getattr(
            transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False),
            "max_position_embeddings",
            limit,
        ),
    )

    def prepare(texts: Sequence[str]) -> Batch:
        return dict(
            tokenizer(
                list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt"
            )
        )

    return prepare


def _pixels(folder: Path) -> Callable[[Sequence[Path]], Batch]:
    from PIL import Image

    processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)

    def prepare(paths: Sequence[Path]) -> Batch:
        images = [Image.open(path).convert("RGB") for path in paths]
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}

    return prepare


def _forward(model: nn.Module, images: bool) -> Callable[[nn.Module, Any], Any]:
    """Runs the model on one batch; of a model of two towers, the one of these inputs."""
    name = "get_image_features" if images else "get_text_features"
    if hasattr(model, name):
        return lambda model, batch: getattr(model, name)(**batch)
    return lambda model, batch: model(**batch)


def _reached(
    model: nn.Module, batch: Batch, forward: Callable[[nn.Module, Any], Any]
) -> dict[str, bool]:
    """Weight names of the linear layers that a batch passes through; True where padding would."""
    seen: dict[str, bool] = {}
    mask = batch.get("attention_mask")

    def note(name: str, z: Tensor) -> None:
        seen[name] = mask is not None and z.shape[:-1] == mask.shape

    with torch.no_grad(), statistics.observed(model, merging.linear_layers(model), note):
        forward(model, batch)
    if not seen:
        raise InputError("no linear layer of the model saw an input")
    return seen
