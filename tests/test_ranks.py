"""Rank plans: the paper's types and shares, assignment from the seed, clipping, YAML maps."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexlora.randomness import derive
from flexlora.ranks import (
    DISTRIBUTIONS,
    distinct,
    label,
    largest,
    map_plan,
    named_plan,
    read_plan,
    refuse_stray,
    resolve,
)
from flexlora.types import FlexLoraError

SHAPES = {
    "model.layers.0.self_attn.q_proj": (576, 576),
    "model.layers.0.self_attn.k_proj": (192, 576),
    "model.layers.0.mlp.down_proj": (576, 1536),
}


def test_paper_types_at_a_large_model() -> None:
    plan = named_plan("random", lora_r=8, hidden_size=2048)
    ranks = [tuple(resolve(t, SHAPES)[0].values()) for t in plan.types.values()]
    assert ranks == [(8, 8, 8), (30, 30, 30), (30, 30, 200), (200, 192, 200)]


def test_named_types_serve_a_model_with_fewer_targets() -> None:
    plan = named_plan("random", lora_r=8, hidden_size=2048)
    only = {"h.0.c_attn": (64, 64)}
    refuse_stray(plan, only)
    assert [resolve(t, only)[0] for t in plan.types.values()] == [{"h.0.c_attn": r} for r in (8, 30, 64, 64)]


def test_clipping_is_told() -> None:
    ranks, clipped = resolve({"*": 200}, SHAPES)
    assert ranks["model.layers.0.self_attn.k_proj"] == 192
    assert clipped == {"model.layers.0.self_attn.k_proj": 200}
    assert resolve({"*": 200}, SHAPES, max_rank=16)[0] == dict.fromkeys(SHAPES, 16)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_shares_of_many_clients(name: str) -> None:
    assert sum(DISTRIBUTIONS[name]) == pytest.approx(1)
    plan = named_plan(name, lora_r=8, hidden_size=2048)
    drawn = Counter(plan.type_of(client, 42) for client in range(4000))
    for kind, share in plan.shares.items():
        # five standard deviations of a binomial count
        assert abs(drawn[kind] / 4000 - share) < 5 * (share * (1 - share) / 4000) ** 0.5


def test_readme_shares_beside_those_of_the_release() -> None:
    assert DISTRIBUTIONS["heavy_tail"] == (0.85, 0.05, 0.05, 0.05)
    assert DISTRIBUTIONS["heavy_tail:release"] == (0.80, 0.05, 0.05, 0.10)
    assert DISTRIBUTIONS["normal"][1] == DISTRIBUTIONS["normal"][2] == max(DISTRIBUTIONS["normal"])


@given(st.integers(0, 2**31), st.integers(0, 200))
def test_a_type_is_drawn_by_seed_and_client_alone(seed: int, client: int) -> None:
    plan = named_plan("heavy_tail", lora_r=8, hidden_size=64)
    draw, ends = derive(seed, "rank", client) / 2**63, [*itertools.accumulate(plan.shares.values())]
    assert plan.type_of(client, seed) == next(
        name for name, end in zip(plan.shares, ends, strict=True) if draw < end or end > 0.999
    )


def test_seeds_differ() -> None:
    plan = named_plan("random", lora_r=8, hidden_size=64)
    assignments = {tuple(plan.type_of(c, seed) for c in range(40)) for seed in range(10)}
    assert len(assignments) == 10


def test_homo_is_lora_r() -> None:
    assert resolve(read_plan("homo", lora_r=5, hidden_size=64).types["homo"], SHAPES)[0] == dict.fromkeys(SHAPES, 5)


def test_map_names_clients_and_shares() -> None:
    given_map = {"types": {"a": 2, "b": {"q_proj": 3}}, "clients": {0: "b", 3: {"k_proj": 4}}, "shares": {"a": 1.0}}
    plan = map_plan(given_map, lora_r=8, hidden_size=64)
    assert [plan.type_of(c, 1) for c in range(4)] == ["b", "a", "a", "client_3"]
    assert resolve(plan.types["b"], SHAPES)[0] == {"model.layers.0.self_attn.q_proj": 3}


def test_map_from_a_file(tmp_path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("types: {a: 2, b: 3, c: 4, d: 5}\ndistribution: heavy_tail\n")
    assert read_plan(str(path), lora_r=8, hidden_size=64).shares == {"a": 0.85, "b": 0.05, "c": 0.05, "d": 0.05}


@pytest.mark.parametrize(
    ("given_map", "words"),
    [
        ({"types": {"a": 0}, "shares": {"a": 1}}, "rank 0"),
        ({"types": {"a": 4}, "shares": {"b": 1}}, "not among the types a"),
        ({"types": {"a": 4}, "shares": {"a": 0.5}}, "sum to 0.5"),
        ({"types": {"a": 4}}, "nobody gets one"),
        ({"kinds": {}}, "unknown key kinds"),
        ({"types": {"a": 4}, "clients": {0: "z"}}, "type z"),
        ({"types": {"a": 4}, "distribution": "random"}, "give four types"),
        ({"distribution": "normal", "shares": {"type1": 1.0}}, "both distribution and shares"),
        (
            {"types": {"client_3": 8}, "clients": {3: 16, 4: "client_3"}},
            "client 3 has ranks of its own.*rename that type",
        ),
    ],
)
def test_bad_maps_are_one_line(given_map: dict, words: str) -> None:
    with pytest.raises(FlexLoraError, match=words) as caught:
        map_plan(given_map, lora_r=8, hidden_size=64)
    assert "\n" not in str(caught.value)


def test_unknown_names_are_one_line() -> None:
    with pytest.raises(FlexLoraError, match="neither a file nor one of homo"):
        read_plan("hevy_tail", lora_r=8, hidden_size=64)
    with pytest.raises(FlexLoraError, match="w_proj, which is no adapted module"):
        refuse_stray(map_plan({"clients": {0: {"w_proj": 4}}}, lora_r=8, hidden_size=64), SHAPES)
    with pytest.raises(FlexLoraError, match="client 5 has no rank type"):
        map_plan({"clients": {0: 4}}, lora_r=8, hidden_size=64).type_of(5, 1)


def test_distinct_largest_label() -> None:
    small, large = {"a": 2, "b": 2}, {"a": 4, "b": 9}
    assert distinct([large, small, dict(small)]) == (small, large)
    assert largest([small, large, {"c": 1}]) == {"a": 4, "b": 9, "c": 1}
    assert [label(small), label(large), label({str(i): i for i in range(3, 18)})] == ["2", "4+9", "3…17"]
