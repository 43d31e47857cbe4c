"""Small image data sets for tests."""

import datasets
import numpy as np
from PIL import Image

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def image_folder(folder, names=tuple(COLOURS), counts=(40, 12), size=(40, 36), seed=0):
    """A data set as the hub has them: parquet files with `image` and `label` columns."""
    rng = np.random.default_rng(seed)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    )
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in zip(("train", "test"), counts, strict=True):
        labels = [i % len(names) for i in range(count)]
        colours = [list(COLOURS.values())[label % 3] for label in labels]
        noise = rng.integers(0, 90, (count, size[1], size[0], 3))
        pictures = [np.clip(c + n - 45, 0, 255) for c, n in zip(colours, noise, strict=True)]
        rows = {
            "image": [Image.fromarray(p.astype(np.uint8)) for p in pictures],
            "label": labels,
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder
