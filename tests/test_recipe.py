"""Recipe and Plan: what they say, and what they refuse."""

from __future__ import annotations

import pytest

from cosmos_fast.recipe import Plan, Recipe


def test_recipe_and_plan_refuse_what_does_not_exist_yet() -> None:
    formats = (
        "dtype='bf16', linear='bf16', attention='bf16', vae='bf16', attention_head=0.0, attention_tail=0.0, "
        "attention_share=1.0, attention_mass=1.0"
    )
    assert str(Recipe.exact()) == f"Recipe(name='exact', {formats})"
    assert Recipe() == Recipe.exact() and Recipe.fp32().to_dict()["dtype"] == "fp32"
    for bad in (
        {"dtype": "fp16"},
        {"linear": "int4"},
        {"attention": "int8"},
        {"vae": "int8"},
        {"vae": "fp8", "dtype": "fp32"},
        {"name": ""},
        {"attention_share": 0, "attention": "fp8"},
        {"attention_mass": 1.5, "attention": "fp8"},
    ):
        with pytest.raises(ValueError, match=f"recipe: {next(iter(bad))} must be"):
            Recipe(**bad)
    with pytest.raises(ValueError, match="one of exact, fp32"):
        Recipe.preset("fast")
    assert Plan(device="cuda:1").to_dict()["device"] == "cuda:1" and "\n" not in str(Plan())
    for bad in (
        {"device": "tpu"}, {"device": "cuda:x"}, {"context": 0}, {"context": 2.0}, {"cfg": 3}, {"cfg": True},
        {"vae_encode_window": 6}, {"vae_encode_window": 0}, {"vae_decode_window": 0}, {"graphs": 1}, {"vae_encode_batch": 0}, {"exchange": "nccl"}, {"vae_strips": 1.5}, {"vae_encode_batch": 2, "vae_strips": 2}, {"vae_strips": 2, "cfg": 2},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"plan: {next(iter(bad))} must be"):
            Plan(**bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="plan: graphs need a CUDA device"):
        Plan(device="cpu", graphs=True)
    with pytest.raises(ValueError, match="plan: graphs need context=1, got 2"):
        Plan(graphs=True, context=2)
    assert Plan().exchange == "auto" and Plan(context=2, exchange="copies").to_dict()["exchange"] == "copies"


def test_shares_of_steps_in_full_precision_do_not_overlap() -> None:
    recipe = Recipe(name="careful", attention="fp8", attention_head=0.25, attention_tail=0.75)
    assert recipe.to_dict()["attention_head"] == 0.25
    for head, tail in ((-0.1, 0.0), (0.0, 1.1), (0.6, 0.5), (True, 0.0), ("0.1", 0.0), (float("nan"), 0.0)):
        with pytest.raises(ValueError, match="attention_head and attention_tail must be shares"):
            Recipe(attention_head=head, attention_tail=tail)  # type: ignore[arg-type]


def test_only_8_bit_attention_leaves_tiles_out() -> None:
    assert Recipe.preset("fp8_sparse").is_sparse and not Recipe.fp8().is_sparse
    for key in ("attention_share", "attention_mass"):
        with pytest.raises(
            ValueError, match="recipe: attention must be fp8 where not all key tiles are kept"
        ):
            Recipe(**{key: 0.5})
