"""Tensors by their names alone: an expert's names told in the base's, buffers, heads, towers.

Training and saving put things before a model's own names (`_orig_mod.`, `module.`, `model.`, the
backbone's name in a model with a head); files of one model differ in them more often than not.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

# Parts that torch.compile, FSDP and activation checkpointing put into names, wherever they wrap.
_WRAPPED = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
# What is computed from a configuration, and saved by some versions and not by others.
_BUFFER = re.compile(
    r"""(^|.*\.)( position_ids | token_type_ids | (original_)?inv_freq | cached_(cos|sin)
      | (cos|sin)_cached | masked_bias | relative_position_index | relative_coords_table
      | \w*mask | tril | triu | num_batches_tracked | final_logits_bias | _float_tensor
      | total_(ops|params) )$""",
    re.VERBOSE,
)
_CAUSAL = re.compile(r".*\b(attn|attention)\.bias$")  # GPT-2's and GPT-NeoX's masks, (1, 1, n, n)
# Modules that give a model's output: other in each of the models that share a backbone.
_HEAD = frozenset(
    {
        "lm_head", "head", "heads", "classifier", "classification_head", "score", "scores", "cls",
        "qa_outputs", "decoder_head", "visual_projection", "text_projection", "embed_out", "pooler",
        "logit_scale", "logit_bias", "predictions", "final_logits_bias", "lm_loss", "qa_classifier",
        "pre_classifier", "vocab_transform", "vocab_layer_norm", "vocab_projector", "v_head",
        "sequence_summary", "multi_choice_head", "generator_lm_head", "discriminator_predictions",
        "projector", "seq_relationship", "generator_predictions", "summary", "value_head",
        "masked_spec_embed",
    }
)  # fmt: skip
_LABELS = frozenset(
    {"head", "heads", "classifier", "classification_head", "score", "qa_outputs", "fc", "out_proj"}
)
_POSITIONS = re.compile(r"position|pos_emb|\bwpe\b|relative|patch|token_type|segment|time_emb")
_VOCABULARY = re.compile(r"embed|\bwte\b|\bshared\b|lm_head|predictions|logits_bias|output_proj")
_SAMPLE = 200
_DEPTH = 4  # components that may stand before a model's own names


def is_buffer(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor follows from the configuration: positions, masks, rotary frequencies."""
    return bool(_BUFFER.match(name) or (_CAUSAL.match(name) and len(shape) > 2))


def table_of(name: str) -> str:
    """What the rows of a table stand for: "vocabulary", "positions", "labels", or nothing known."""
    parts = name.split(".")
    if _POSITIONS.search(name):
        return "positions"
    if any(part in _LABELS for part in parts[-2:]) and "lm_head" not in parts:
        return "labels"
    return "vocabulary" if _VOCABULARY.search(name) else ""


def renamed(theirs: Iterable[str], ours: Collection[str]) -> dict[str, str]:
    """{an expert's name: the base's} for as many as have one, by the prefixes that fit best.

    Prefixes are exchanged as a whole: one for most names, then others for what is left, as models
    of several towers need. A second exchange has to place every name that begins with its prefix.
    """
    base = {_WRAPPED.sub("", name).lstrip("."): name for name in ours}
    plain = {name: _WRAPPED.sub("", name).lstrip(".") for name in theirs}
    matched = {name: base[short] for name, short in plain.items() if short in base}
    first = True
    while left := [name for name in plain if name not in matched]:
        taken = set(matched.values())
        free = {short for short, name in base.items() if name not in taken}
        if first and len(matched) < len(left):  # no names of their own fit by chance alone
            free, matched, left = set(base), {}, list(plain)
        exchange = _exchange([plain[name] for name in left], free, not matched)
        if exchange is None:
            break
        strip, add = exchange
        for name in left:
            short = plain[name]
            if short.startswith(strip) and (short := add + short.removeprefix(strip)) in free:
                matched[name] = base[short]
        first = False
    return matched


def _exchange(theirs: Sequence[str], ours: Collection[str], first: bool) -> tuple[str, str] | None:
    """(prefix to take away, prefix to put there) that places most names; None if none does.

    first: nothing is placed yet. What comes later has to place every name that begins with its
    prefix. Names of which little more than a leaf remains (`q.weight`) are told apart by nothing:
    they count only where all names are placed by adding or taking away one prefix.
    """
    ends: dict[str, list[str]] = defaultdict(list)  # what follows a prefix -> the prefixes
    for name in ours:
        for prefix, end in _cuts(name):
            ends[end].append(prefix)
    votes: Counter[tuple[str, str]] = Counter()
    for name in theirs[:: max(1, len(theirs) // _SAMPLE)]:
        for prefix, end in _cuts(name):
            votes.update((prefix, other) for other in ends.get(end, ())[:8])
    best, most = None, 0
    for (strip, add), _ in sorted(votes.most_common(50), key=lambda v: (-v[1], len(v[0][0]))):
        rests = [name.removeprefix(strip) for name in theirs if name.startswith(strip)]
        placed = [rest for rest in rests if add + rest in ours]
        shortest = min((rest.count(".") + 1 for rest in placed), default=0)
        every = len(placed) == len(theirs) and not (strip and add)
        telling = every or shortest > 2 or (shortest == 2 and len(placed) > 1)
        if telling and (first or len(placed) == len(rests)) and len(placed) > most:
            best, most = (strip, add), len(placed)
    return best


def _cuts(name: str) -> list[tuple[str, str]]:
    """(prefix, rest) for the first few places where a name can be cut; the prefix may be empty."""
    parts = name.split(".")
    return [
        (".".join(parts[:i]) + "." if i else "", ".".join(parts[i:]))
        for i in range(min(_DEPTH + 1, len(parts)))
    ]


def apart(names: Iterable[str], shared: Iterable[str]) -> tuple[list[str], list[str]]:
    """(heads and towers, the rest) of names that one of two models with a common backbone lacks.

    shared: the names that both have. A tower is a module at the model's own level with blocks of
    its own, none of which the other model has, beside blocks that it has.
    """
    shared = list(shared)
    tops = {name.partition(".")[0] for name in shared}
    blocks = any(re.search(r"\.\d+\.", name) for name in shared)
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[name.partition(".")[0]].append(name)
    kept: list[str] = []
    rest: list[str] = []
    for top, members in groups.items():
        tower = top not in tops and any(re.search(r"\.\d+\.", name) for name in members)
        for name in members:
            head = any(part in _HEAD for part in name.split("."))
            (kept if blocks and (head or tower) else rest).append(name)
    return kept, rest


def listed(names: Sequence[str], limit: int = 3) -> str:
    """Names for a sentence: the first few, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more


def top_parts(names: Iterable[str]) -> Mapping[str, int]:
    """{part of the model: number of tensors}, for a note on what was left out."""
    return Counter(name.partition(".")[0] for name in names)
