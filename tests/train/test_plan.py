"""The cost of a stage, against arithmetic by hand and against what the paper reports."""

from pathlib import Path

import pytest

from codellama.model.config import ModelConfig
from codellama.recipe import load_recipe
from codellama.train.plan import memory, plan, plan_table

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FAMILIES = ("7b", "13b", "34b", "70b")


@pytest.fixture(scope="module")
def plans():
    return {
        size: {
            stage: plan(recipe, stage, "a100", 64)
            for recipe in [load_recipe(RECIPES / f"{size}.toml")]
            for stage in recipe.stages
        }
        for size in FAMILIES
    }


def test_hours_of_all_twelve_models_are_near_the_published_ones(plans):
    """Paper table 26: 1,400 thousand hours; 400 thousand of them for the first nine models."""
    hours = {size: sum(p["device_hours"] for p in plans[size].values()) for size in FAMILIES}
    assert sum(hours.values()) == pytest.approx(1.4e6, rel=0.1)
    assert 400e3 / (sum(hours.values()) - hours["70b"]) == pytest.approx(0.73, abs=0.02)
    co2_t = sum(p["co2_kg"] for stages in plans.values() for p in stages.values()) / 1000
    assert co2_t == pytest.approx(228.55, rel=0.1)


def test_flops_by_hand(plans):
    p = plans["7b"]["code"]
    assert p["tokens"] == 119_210 * 4_194_304
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32016 * 4096
    per_token = 6 * matrices + 6 * 32 * 4096 * 4096  # scores and values over half of the context
    assert p["flops"] == pytest.approx(p["tokens"] * per_token, rel=1e-12)
    assert p["device_hours"] == pytest.approx(p["flops"] / (312e12 * 0.45) / 3600, rel=1e-4)
    assert p["energy_kwh"] == pytest.approx(p["device_hours"] * 0.4, rel=1e-4)
    layout = {"devices": 64, "sequences_per_device": 16, "micro_batch": 1, "micro_batches": 16}
    assert p["layout"] == layout


def test_the_tree_of_each_family():
    """Fact sheet 1.4: what comes from what, with which vocabulary, rotation and context."""
    lines = {
        "7b": {"base": ["code"], "instruct": ["base", "code"],
               "python-long": ["python", "code-without-infilling"]},
        "34b": {"base": ["code"], "instruct": ["base", "code"], "python-long": ["python", "code"]},
        "70b": {"base": ["code"], "instruct": ["python", "code"], "python": ["code"]},
    }  # fmt: skip
    lines["13b"] = lines["7b"]
    for size, wanted in lines.items():
        recipe = load_recipe(RECIPES / f"{size}.toml")
        for stage, line in wanted.items():
            assert recipe.ancestry(stage)[1:] == line, (size, stage)
        for stage in recipe.stages.values():
            released = ModelConfig.named(stage.variant)
            ends = stage is recipe.stages.get("python-long") or stage is recipe.stages["base"]
            if ends:
                assert (stage.rope_theta, stage.seq_len) == (released.rope_theta, 16384)
            assert stage.fim_rate in (0.0, 0.9)
        infills = {name for name, stage in recipe.stages.items() if stage.fim_rate}
        assert infills == (set() if size == "34b" else {"code", "base"})


def test_memory_is_shared_by_the_devices():
    recipe = load_recipe(RECIPES / "7b.toml")
    config, stage = ModelConfig.named("7b"), recipe.stage("code")
    one, many = memory(config, stage, 1), memory(config, stage, 64)
    assert one.weights + one.gradients + one.optimizer == 16 * config.n_params
    assert many.weights * 64 == one.weights
    assert many.activations == one.activations
    assert memory(config, stage, 64, "full").activations < 0.2 * many.activations


def test_what_cannot_be_planned():
    recipe = load_recipe(RECIPES / "70b.toml")
    with pytest.raises(ValueError, match="expected one of a100, h100"):
        plan(recipe, "code", "tpu")
    with pytest.raises(ValueError, match="64 sequences a batch do not divide over 128 devices"):
        plan(recipe, "base", "a100", 128)


def test_table_ends_with_sums(plans):
    rows = plan_table(list(plans["34b"].values()))
    assert [row["stage"] for row in rows] == [*plans["34b"], "all"]
    hours = sum(p["device_hours"] for p in plans["34b"].values())
    assert rows[-1]["a100 hours"] == f"{hours:,.2f}"
