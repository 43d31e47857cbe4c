"""What a tensor is, told by its name and shape alone: for checkpoints that come without a model.

The last part of a module's name says what it is (`mlp_tokens.fc1` is fc1), not any piece of the
whole: `shared_expert.up_proj`, `norm1.linear` and `time_embed.linear_1` are linear layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from merging.layers.layout import Layer

Shapes = Mapping[str, tuple[int, ...]]

# Output heads and CLIP's projections: nn.Linear by type, averaged by default, as a head belongs to
# one task's labels. The papers' own codes exclude `text_projection` alone: see `paper_layers`.
HEADS = frozenset(
    {
        "lm_head", "head", "classifier", "classification_head", "score", "qa_outputs", "cls",
        "decoder_head", "visual_projection", "text_projection", "proj_out", "embed_out",
    }
)  # fmt: skip
# The layer of a head of several layers that gives its output.
_LAST = frozenset({"out_proj", "decoder", "head", "fc", "out", "seq_relationship", "summary"})
_SINGLE = frozenset(
    {"head", "classifier", "proj_out", "cls", "score"}
)  # words of hidden layers too

_TABLE = re.compile(
    r"""(.*_)? (emb | embed | embeds | embedding | embeddings)              # word_embeddings
      | emb(ed(ding)?)?_(tokens|positions|in|table|layer)(_per_layer)?      # embed_tokens
      | w[tp]e | shared | lookup | .*embed_positions | .*position_bias | .*relative_attention_bias
      | .*(positional|position|token_type|segment)s?_(emb|embed|table|ids)\w*""",
    re.VERBOSE | re.IGNORECASE,
)
_NORM = re.compile(r"(.*_)?(norm|ln|layernorm|batchnorm|bn)_?\w?\d*", re.IGNORECASE)
_PROJECTION = frozenset({"weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"})
_CONVOLVED_BACK = re.compile(r"transpose|deconv|upconv|up_?sampl|upscal", re.IGNORECASE)
_EXPERTS = re.compile(r"expert|moe|input_linear|output_linear")

EMBEDDING, HEAD, NORM = "embedding", "output head", "norm"
VECTOR, CODES, PARAMETER = "no matrix", "not floating point", "parameter of no linear module"
STEM = "convolution of the input"
DEPTHWISE = "depthwise convolution"
UNKNOWN = "convolution whose layout its name does not tell"
VOCABULARY = "vocabulary side"


def is_head(path: str) -> bool:
    """Whether a module of this name gives a model's output, judged by its place.

    A word for heads counts at the model's own level (`classifier`, `classifier.out_proj`); within
    a block it is a hidden layer (`transformer_blocks.0.proj_out`).
    """
    pieces = path.split(".")
    if any(piece.isdigit() for piece in pieces):
        return False
    *outer, last = pieces
    if last in HEADS:
        return len(outer) <= (0 if last == "proj_out" else 2 if last in _SINGLE else 3)
    if last.endswith("_head") and len(outer) <= 1:
        return True
    return last in _LAST and any(piece in HEADS or piece == "heads" for piece in outer[:2])


def is_table(path: str) -> bool:
    """Whether a module's name says that it looks rows up: an embedding, a table of positions."""
    return bool(_TABLE.fullmatch(path.rpartition(".")[2]))


def kinds(shapes: Shapes, vocabulary: int | None = None) -> dict[str, Layer | str]:
    """For each tensor its layer, or the reason why it is none.

    vocabulary: the number of tokens, where it is known: a matrix with that many rows is no layer.
    """
    stored_back, ends = _conv1d_stored(shapes), _ends_of_heads(shapes)
    table = {}
    for name, shape in shapes.items():
        table[name] = kind = HEAD if name in ends else _kind(name, tuple(shape), shapes)
        if not isinstance(kind, Layer) or kind.experts or kind.kernel:
            continue
        if vocabulary and vocabulary > 256 and shape[0] == vocabulary:
            table[name] = VOCABULARY
        elif name in stored_back:
            path = name.rpartition(".")[0]
            packed = path.endswith("c_attn")
            whole, rest = divmod(shape[1], shape[0])
            parts = whole if packed and not rest and whole in (2, 3) else 1
            table[name] = Layer(parts, transposed=True)
    return table


def _ends_of_heads(shapes: Shapes) -> set[str]:
    """The last matrix of each head that is a sequence: `classifier.6.weight` of 0, 3 and 6."""
    last: dict[str, tuple[int, str]] = {}
    for name, shape in shapes.items():
        match = re.fullmatch(r"(.+)\.(\d+)\.weight", name)
        if match and len(shape) == 2 and is_head(match[1]):
            last[match[1]] = max(last.get(match[1], (-1, "")), (int(match[2]), name))
    return {name for _, name in last.values()}


def _kind(name: str, shape: tuple[int, ...], shapes: Shapes) -> Layer | str:
    path, _, leaf = name.rpartition(".")
    last = path.rpartition(".")[2]
    if len(shape) < 2 or min(shape[:2]) < 2:
        return VECTOR if len(shape) < 4 else DEPTHWISE
    if is_head(path):
        return HEAD
    if is_table(path) or is_table(leaf):
        return EMBEDDING
    if _NORM.fullmatch(last) and leaf == "weight":
        return NORM
    if len(shape) > 2:
        return _stacked(path, leaf, shape, shapes)
    if leaf == "in_proj_weight":
        return Layer(parts=3 if shape[0] % 3 == 0 else 1)
    if leaf not in _PROJECTION:
        return PARAMETER
    return Layer(parts=packed_parts(last, shape))


def packed_parts(last: str, shape: tuple[int, ...]) -> int:
    """How many equal blocks of rows a matrix (d_out, d_in) of this name packs."""
    if last in {"qkv", "Wqkv"} and shape[0] == 3 * shape[1]:
        return 3
    return 2 if last in {"gate_up_proj", "gate_and_up_proj"} and shape[0] % 2 == 0 else 1


def _stacked(path: str, leaf: str, shape: tuple[int, ...], shapes: Shapes) -> Layer | str:
    """More than two dimensions: fused experts, or a convolution's kernel."""
    place = path if leaf == "weight" else f"{path}.{leaf}"
    if len(shape) == 3 and _EXPERTS.search(place):
        return Layer(experts=shape[0], transposed=_experts_stored_back(path, leaf, shapes))
    if leaf != "weight":
        return PARAMETER
    kernel = shape[2:]
    if len(shape) == 3 and kernel[0] > 64:
        return PARAMETER
    if shape[1] < STEM_CHANNELS:
        return STEM if shape[1] > 1 else DEPTHWISE
    if _CONVOLVED_BACK.search(path) and max(kernel) > 1:
        return UNKNOWN
    return Layer(kernel=kernel)


# What reads pixels or latents has at most four channels: red, green, blue and one more.
STEM_CHANNELS = 5


def _experts_stored_back(path: str, leaf: str, shapes: Shapes) -> bool:
    """Whether fused experts are (E, d_in, d_out), told by the two that follow one another.

    (E, 2 I, H) and (E, H, I) are (out, in); (E, H, 2 I) and (E, I, H) are (in, out).
    """
    first, second = _pair(path, leaf, shapes)
    if not first or not second:
        return False
    (a, b), (c, d) = first[1:], second[1:]
    rightly = b == c and a in (d, 2 * d)
    return a == d and b in (c, 2 * c) and not rightly


def _pair(
    path: str, leaf: str, shapes: Shapes
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Shapes of the projection into the experts' width and of the one back."""
    owner = path if leaf != "weight" else path.rpartition(".")[0]
    tail = "" if leaf != "weight" else ".weight"
    into = ("gate_up_proj", "gate_and_up_projs", "up_proj", "w1", "input_linear", "w13_weight")
    back = ("down_proj", "down_projs", "w2", "output_linear", "w2_weight")
    first = next((shapes[n] for x in into if (n := f"{owner}.{x}{tail}") in shapes), None)
    second = next((shapes[n] for x in back if (n := f"{owner}.{x}{tail}") in shapes), None)
    return first, second


def _conv1d_stored(shapes: Shapes) -> set[str]:
    """Matrices stored (d_in, d_out), as GPT-2's Conv1D does, told by the length of their biases.

    Squares tell nothing: they go with the model's other matrices of the same few names.
    """
    stored = set()
    for name, shape in shapes.items():
        bias = shapes.get(name.removesuffix("weight") + "bias")
        if name.endswith(".weight") and len(shape) == 2 and shape[0] != shape[1]:
            turned = (
                bias == (shape[1],)
                if bias
                else name.endswith("c_attn.weight") and shape[0] < shape[1]
            )
            if turned:
                stored.add(name)
    leaves = {_last(name) for name in stored}
    if not leaves & {"c_attn", "c_fc", "c_proj"}:
        return stored
    family = leaves | {"c_attn", "c_fc", "c_proj", "q_attn"}
    squares = {n for n, s in shapes.items() if len(s) == 2 and s[0] == s[1]}
    return stored | {n for n in squares if n.endswith(".weight") and _last(n) in family}


def _last(name: str) -> str:
    return name.split(".")[-2] if "." in name else name
