"""Experts whose files differ from their base's in names, buffers, ties, heads and towers."""

import pytest
import torch

import merging
from merging.errors import InputError
from merging.formats.checkpoints import StateDict
from merging.formats.fit import Fitted, fit, notes
from merging.formats.names import is_buffer, renamed, table_of

AVERAGE = merging.create("average")


def draw(seed, shapes):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def blocks(prefix="", count=2):
    shapes = {f"{prefix}embed.weight": (9, 4)}
    for i in range(count):
        shapes[f"{prefix}blocks.{i}.up.weight"] = (6, 4)
        shapes[f"{prefix}blocks.{i}.down.weight"] = (4, 6)
    return shapes


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def check_average(merged, base, experts):
    for name in base:
        plain = sum(expert[name] for expert in experts) / len(experts)
        torch.testing.assert_close(merged[name], plain, msg=name)
    assert merged.keys() == base.keys()


@pytest.mark.parametrize(
    ("of_base", "of_expert"),
    [
        ("", "module."),
        ("", "_orig_mod."),
        ("", "model."),
        ("", "module._orig_mod.model."),
        ("_orig_mod.", ""),
        ("model.", "_orig_mod.model."),
        ("encoder.", "bert.encoder."),
        ("net.model.", "module."),
    ],
)
def test_prefixes_are_told_in_the_bases(of_base, of_expert):
    base, a, b = (draw(seed, blocks()) for seed in range(3))
    merged = merging.merge_state_dicts(
        prefixed(base, of_base), {"a": prefixed(a, of_expert), "b": prefixed(b, of_base)}, AVERAGE
    )
    check_average(merged, prefixed(base, of_base), [prefixed(a, of_base), prefixed(b, of_base)])


def test_wrapped_blocks_within_names():
    base, a = (draw(seed, blocks()) for seed in range(2))
    wrapped = {name.replace("blocks.0.", "blocks.0._orig_mod."): t for name, t in a.items()}
    check_average(merging.merge_state_dicts(base, {"a": wrapped}, AVERAGE), base, [a])


def test_each_tower_has_a_prefix_of_its_own():
    shapes = blocks("language_model.model.") | blocks("vision_tower.", count=3)
    base, a = (draw(seed, shapes) for seed in range(2))
    other = {
        name.replace("language_model.model.", "model.language_model.").replace(
            "vision_tower.", "model.vision_tower."
        ): tensor
        for name, tensor in a.items()
    }
    check_average(merging.merge_state_dicts(base, {"a": other}, AVERAGE), base, [a])


def test_a_bare_backbone_with_models_that_have_heads_and_the_reverse():
    bare, a = (draw(seed, blocks()) for seed in range(2))
    full = prefixed(a, "bert.") | draw(5, {"classifier.weight": (3, 4), "classifier.bias": (3,)})
    merged = merging.merge_state_dicts(bare, {"a": full}, AVERAGE)
    check_average(merged, bare, [a])
    assert "classifier (2), which the base has not: left out" in merged.report.notes[0]

    base = prefixed(bare, "bert.") | draw(6, {"classifier.weight": (3, 4)})
    merged = merging.merge_state_dicts(base, {"a": a, "b": a}, AVERAGE)
    check_average(
        merged, base, [prefixed(a, "bert.") | {"classifier.weight": base["classifier.weight"]}]
    )
    assert "has nothing of classifier (1)" in merged.report.notes[0]


def test_a_whole_clip_model_with_vision_towers():
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "projection_dim": 8,
    }  # fmt: skip
    vision = sizes | {"image_size": 16, "patch_size": 8}
    text = sizes | {"vocab_size": 40, "max_position_embeddings": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    torch.manual_seed(0)
    base = transformers.CLIPModel(config).state_dict()
    expert = transformers.CLIPVisionModel(config.vision_config).state_dict()
    merged = merging.merge_state_dicts(base, {"a": expert}, AVERAGE)
    for name, tensor in base.items():
        other = name.removeprefix("vision_model.") if name.startswith("vision_model.") else None
        own = next((expert[n] for n in (name, other) if n in expert), tensor)
        torch.testing.assert_close(merged[name], own, msg=name)
    assert "text_model" in merged.report.notes[0]


def test_tensors_that_are_missing_or_additional_are_still_problems():
    base, a = (draw(seed, blocks()) for seed in range(2))
    a.pop("blocks.1.up.weight")
    with pytest.raises(InputError, match="tensor 'blocks.1.up.weight' of the base is missing"):
        merging.merge_state_dicts(base, {"a": a}, AVERAGE)
    more = base | draw(3, {"blocks.2.up.weight": (6, 4)})
    with pytest.raises(InputError, match="tensor 'blocks.2.up.weight' is not in the base"):
        merging.merge_state_dicts(base, {"a": more}, AVERAGE)


def test_a_message_of_many_problems_is_short():
    base = draw(0, {f"blocks.{i}.x{j}.weight": (2, 3) for i in range(20) for j in range(20)})
    other = {name: tensor.mT for name, tensor in base.items()}
    with pytest.raises(InputError) as caught:
        merging.merge_state_dicts(base, {"a": other}, AVERAGE)
    assert len(caught.value.message) < 1500 and "and 394 more of them" in caught.value.message
    with pytest.raises(InputError) as caught:
        merging.merge_state_dicts(base, {"a": draw(1, {"blocks.0.x0.weight": (2, 3)})}, AVERAGE)
    assert "399 tensors ('blocks.0.x1.weight', " in caught.value.message
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("name", "shape", "buffer"),
    [
        ("embeddings.position_ids", (1, 8), True),
        ("layers.0.self_attn.rotary_emb.inv_freq", (4,), True),
        ("blocks.0.attn.bias", (1, 1, 8, 8), True),
        ("blocks.0.attn.bias", (8,), False),
        ("blocks.0.attn.masked_bias", (), True),
        ("attn_mask", (5, 5), True),
        ("final_logits_bias", (1, 9), True),
        ("blocks.0.mask_token", (1, 1, 8), False),
        ("encoder.bias", (4,), False),
    ],
)
def test_buffers_are_known_by_name(name, shape, buffer):
    assert is_buffer(name, shape) == buffer
    tensor = torch.ones(shape)
    base, a = (draw(seed, blocks()) for seed in range(2))
    for ours, theirs in ((base | {name: tensor}, a), (base, a | {name: tensor})):
        if buffer:
            merged = merging.merge_state_dicts(ours, {"a": theirs}, AVERAGE)
            assert merged.keys() == ours.keys()
        else:
            with pytest.raises(InputError, match=name):
                merging.merge_state_dicts(ours, {"a": theirs}, AVERAGE)


def test_masks_of_minus_infinity_are_kept_as_they_are():
    mask = torch.full((4, 4), -torch.inf).triu(1)
    base, a = (draw(seed, blocks()) | {"attn_mask": mask} for seed in range(2))
    for method in ("average", "ties", "actmat"):
        merged = merging.merge_state_dicts(base, {"a": a, "b": a}, merging.create(method))
        assert torch.equal(merged["attn_mask"], mask)


def test_running_variances_stay_positive():
    base = {"fc.weight": torch.zeros(4, 4), "bn.running_var": torch.full((3,), 0.1)}
    other = {"fc.weight": torch.ones(4, 4), "bn.running_var": torch.full((3,), 0.01)}
    method = merging.create("ties", alpha=3.0)
    merged = merging.merge_state_dicts(base, {"a": other, "b": other}, method)
    torch.testing.assert_close(merged["bn.running_var"], torch.full((3,), 0.01))


def test_a_tie_that_experts_broke_is_broken():
    table = torch.randn(9, 4)
    base = {"embed_tokens.weight": table, "lm_head.weight": table}
    a, b = (draw(seed, {name: (9, 4) for name in base}) for seed in (1, 2))
    check_average(merging.merge_state_dicts(base, {"a": a, "b": b}, AVERAGE), base, [a, b])
    # one holds a copy, the other drops it: still tied
    copy = {"embed_tokens.weight": table + 1, "lm_head.weight": table + 1}
    alone = {"embed_tokens.weight": table + 3}
    merged = merging.merge_state_dicts(base, {"a": copy, "b": alone}, AVERAGE)
    assert merged["lm_head.weight"] is merged["embed_tokens.weight"]
    torch.testing.assert_close(merged["lm_head.weight"], table + 2)


def test_a_head_stored_as_a_copy_on_one_side():
    base, a, b = (draw(seed, blocks("model.")) for seed in range(3))
    table = "model.embed.weight"
    with_copy = base | {"lm_head.weight": base[table].clone()}
    merged = merging.merge_state_dicts(with_copy, {"a": a, "b": b}, AVERAGE)
    assert torch.equal(merged["lm_head.weight"], merged[table])
    check_average(
        merged,
        with_copy,
        [a | {"lm_head.weight": a[table]}, b | {"lm_head.weight": b[table]}],
    )
    copied = {"a": a | {"lm_head.weight": a[table].clone()}, "b": b}
    check_average(merging.merge_state_dicts(base, copied, AVERAGE), base, [a, b])
    own = {"a": a | {"lm_head.weight": a[table] + 1}}
    with pytest.raises(InputError, match="'lm_head.weight' is not in the base"):
        merging.merge_state_dicts(base, own, AVERAGE)


def test_a_base_that_unties_and_an_expert_that_ties():
    shapes = {"model.embed_tokens.weight": (9, 4), "model.layers.0.up.weight": (4, 4)}
    base = draw(0, shapes | {"lm_head.weight": (9, 4)})
    a = draw(1, shapes)
    merged = merging.merge_state_dicts(base, {"a": a}, AVERAGE)
    check_average(merged, base, [a | {"lm_head.weight": a["model.embed_tokens.weight"]}])
    assert "ties 'lm_head.weight' to its embedding" in merged.report.notes[0]


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("model.embed_tokens.weight", "vocabulary"),
        ("lm_head.weight", "vocabulary"),
        ("cls.predictions.bias", "vocabulary"),
        ("transformer.wte.weight", "vocabulary"),
        ("vision_model.embeddings.position_embedding.weight", "positions"),
        ("wpe.weight", "positions"),
        ("classifier.weight", "labels"),
        ("score.weight", "labels"),
        ("head.weight", "labels"),
        ("fc1.weight", ""),
    ],
)
def test_what_the_rows_of_a_table_stand_for(name, table):
    assert table_of(name) == table
    base = blocks() | {name: (5, 4)}
    other = StateDict(draw(1, base | {name: (7, 4)}))
    base = StateDict(draw(0, base))
    (fitted,) = fit(base, {"a": other}).values()
    assert bool(fitted.problems(base, common_rows=True)) == (table != "vocabulary")
    assert len(fitted.problems(base)) == 1


def test_notes_name_the_expert():
    base, a = (draw(seed, blocks()) for seed in range(2))
    head = {"lm_head.weight": torch.ones(9, 4)}
    fitted = fit(StateDict(base), {"a": StateDict(prefixed(a, "model.") | head, "FILE")})
    told = "expert 'a' (FILE) has lm_head (1), which the base has not: left out"
    assert list(notes(fitted)) == [told]


def test_names_that_have_nothing_in_common_are_not_matched():
    assert renamed(["a.x", "b.y"], ["c.z", "d.w"]) == {}
    assert renamed([], ["a"]) == {} and renamed(["a"], []) == {}


def test_one_expert_in_two_places_is_told_apart():
    """An interrupted merge into one part of a base is not continued by one into another."""
    source = StateDict({"up.weight": torch.ones(2, 2)})
    text, second = (Fitted(source, {f"{part}.up.weight": "up.weight"}) for part in ("text", "2"))
    assert text.stamp() != second.stamp()
    assert text.stamp() == Fitted(source, {"text.up.weight": "up.weight"}).stamp()
