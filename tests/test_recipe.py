import json
from pathlib import Path

import pytest

from codellama.recipe import Recipe, load_recipe

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
TEXT = """
name = "x"
work = "work/x"

[[corpus.sources]]
name = "tree"
path = "src"

[model]
name = "tiny"
overrides = { hidden_size = 64, rope_theta = 2.5e5 }

[stages.code]
steps = 10
batch_tokens = 8192
micro_batch = 4
peak_lr = 1e-3

[stages.model]
init = "code"
steps = 5
batch_tokens = 2048
micro_batch = 1
peak_lr = 1
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_recipes_load(file):
    recipe = load_recipe(file)
    assert recipe.name == file.stem


def test_values_and_defaults(path):
    recipe = load_recipe(path)
    assert recipe.run_dir("code") == Path("work/x/runs/code")
    assert recipe.corpus_dir == Path("work/x/corpus")
    assert recipe.tokenizer_dir == Path("work/x/tokenizer")
    assert recipe.corpus.sources[0].path == "src"
    assert recipe.model.overrides == {"hidden_size": 64, "rope_theta": 2.5e5}
    assert isinstance(recipe.model.overrides["hidden_size"], int)
    stage = recipe.stage("code")
    # Code Llama paper 2.3 and 2.6.
    assert (stage.fim_rate, stage.spm_share) == (0.9, 0.5)
    assert stage.betas == (0.9, 0.95)
    assert stage.warmup_steps == 1000
    assert stage.final_lr_ratio == pytest.approx(1 / 30)
    assert recipe.stage("model").init == "code"
    assert recipe.stage("model").peak_lr == 1.0


def test_resolved_recipe_is_the_recipe(path):
    recipe = load_recipe(path, ["stages.code.betas=[0.8, 0.9]"])
    assert Recipe.model_validate_json(recipe.to_json()) == recipe
    assert json.loads(recipe.to_json())["stages"]["code"]["weight_decay"] == 0.1


def test_overrides(path):
    recipe = load_recipe(
        path,
        (
            "stages.code.steps=7",
            "stages.code.dtype=float32",
            "stages.code.compile=false",
            "stages.code.peak_lr=2",
            "stages.code.betas=[0.5, 0.6]",
            'work="elsewhere"',
            "model.overrides.num_hidden_layers=1",
            "stages.model.rope_theta=1e6",
        ),
    )
    stage = recipe.stage("code")
    assert (stage.steps, stage.dtype, stage.compile, stage.peak_lr) == (7, "float32", False, 2.0)
    assert stage.betas == (0.5, 0.6)
    assert recipe.work == Path("elsewhere")
    assert recipe.model.overrides["num_hidden_layers"] == 1
    assert recipe.stage("model").rope_theta == 1e6


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # Unknown keys, with what is accepted there.
        ("stages.code.step=1", r"unknown key 'stages\.code\.step'; accepted here: .*steps"),
        ("stages.model.name=1", r"unknown key 'stages\.model\.name'; accepted here: .*steps"),
        ("model.size=1", r"unknown key 'model\.size'; accepted here: name, overrides"),
        ("corpus.filters.min=1", r"'corpus\.filters\.min'; accepted here: .*min_bytes"),
        ("tokenizer.size=1", r"'tokenizer\.size'; accepted here: .*vocab_size"),
        ("stage.code.steps=1", r"unknown key 'stage'; accepted here: .*stages"),
        # Wrong types: nothing is converted.
        ("stages.code.steps=many", r"stages\.code\.steps: .*integer.*'many'"),
        ('stages.code.steps="100"', r"stages\.code\.steps: .*integer.*'100'"),
        ("stages.code.steps=true", r"stages\.code\.steps: .*integer.*True"),
        ("stages.code.steps=1.5", r"stages\.code\.steps: .*integer.*1\.5"),
        ("stages.code.compile=1", r"stages\.code\.compile: .*boolean.*1"),
        ("stages.code.peak_lr=true", r"stages\.code\.peak_lr: .*number.*True"),
        ("stages.code.betas=[0.9]", r"stages\.code\.betas"),
        ("name=3", r"name: .*string.*3"),
        ("work=3", r"work: .*string.*3"),
        ("model.overrides.hidden_size=wide", r"model\.overrides\.hidden_size.*'wide'"),
        # Values out of range.
        ("stages.code.steps=0", r"stages\.code\.steps: .*greater than 0.*0"),
        ("stages.code.fim_rate=1.1", r"stages\.code\.fim_rate: .*less than or equal to 1.*1\.1"),
        ("stages.code.peak_lr=inf", r"stages\.code\.peak_lr: .*finite"),
        ("stages.code.peak_lr=nan", r"stages\.code\.peak_lr"),
        ("stages.code.dtype=float16", r"stages\.code\.dtype: .*'bfloat16' or 'float32'.*float16"),
        ("stages.code.keep_states=1", r"stages\.code\.keep_states: .*greater than or equal to 2"),
        ("stages.code.batch_tokens=8191", r"batch_tokens = 8191 .*seq_len x micro_batch = 2048"),
        ("corpus.sources=[]", r"corpus\.sources: .*at least 1"),
        ('corpus.sources=[{name="a"}]', r'corpus\.sources\.0: "path" is needed'),
        ('corpus.sources=[{name="a", kind="pypi"}]', r'corpus\.sources\.0: .*"packages"'),
        # Overrides that are none.
        ("stages.code.steps", r"--set 'stages\.code\.steps': expected key\.subkey=value"),
        ("=1", "expected key"),
        ("name.a=1", r"there is no such place in the recipe"),
        ("corpus.sources.1.path=x", r"there is no such place in the recipe"),
    ],
)
def test_mistakes_are_named_in_one_line(path, override, message):
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(path, [override])
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value) or "--set" in str(error.value)


def test_override_of_an_item_of_a_list(path):
    recipe = load_recipe(path, ["corpus.sources.0.path=elsewhere", "corpus.sources.0.name=other"])
    (source,) = recipe.corpus.sources
    assert (source.name, source.path) == ("other", "elsewhere")


def test_random_weights_need_a_shape(path):
    path.write_text(TEXT.replace('[model]\nname = "tiny"', "").replace("overrides =", "#"))
    with pytest.raises(ValueError, match=r'init = "random" needs the section \[model\]'):
        load_recipe(path)


def test_missing_key_is_named(path):
    path.write_text(TEXT.replace("steps = 10\n", "", 1))
    with pytest.raises(ValueError, match=r"stages\.code\.steps: .*required") as error:
        load_recipe(path)
    assert "\n" not in str(error.value)


def test_several_mistakes_are_all_named(path):
    with pytest.raises(ValueError, match=r"model\.size.*stages\.code\.step'"):
        load_recipe(path, ["stages.code.step=1", "model.size=1"])


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no\.toml: no such recipe file"):
        load_recipe(tmp_path / "no.toml")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        load_recipe(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be read: Not a directory"):
        load_recipe(tmp_path / "file" / "x.toml")
    bad = tmp_path / "bad.toml"
    for content in (b"name = ", b"\xff\xfe\x00", b"[a]\n[a]\n"):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.toml: not a TOML file") as error:
            load_recipe(bad)
        assert "\n" not in str(error.value)


def test_unknown_stage_lists_those_there_are(path):
    with pytest.raises(ValueError, match="no stage 'cod' in recipe 'x'; it has code, model"):
        load_recipe(path).stage("cod")


def test_a_recipe_does_not_change(path):
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(path).name = "y"
