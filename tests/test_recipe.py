import pytest

from lowmem.errors import LowmemError
from lowmem.recipe import field_names, load_recipe, recipe_names


def test_every_shipped_recipe_loads_and_survives_a_round_trip(tmp_path):
    assert {"quickstart", "seresnextaa101d_32x8d"} <= set(recipe_names())
    for name in recipe_names():
        recipe = load_recipe(name)
        file = tmp_path / f"{name}.toml"
        file.write_text(recipe.to_toml())
        assert load_recipe(str(file)) == recipe


def test_the_best_run_is_expressed_in_full():
    recipe = load_recipe("seresnextaa101d_32x8d")
    assert (recipe.model.name, recipe.model.dropout) == ("seresnextaa101d_32x8d", 0.5)
    assert (recipe.data.train_px, recipe.data.test_px, recipe.batch.size) == (224, 320, 32)
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay, recipe.schedule.warmup_epochs) == (5e-5, 1e-3, 10)
    assert [(reset.epoch, reset.lr) for reset in recipe.schedule.resets] == [(27, 1.248e-6)]
    assert (recipe.mixup.prob, recipe.mixup.alpha, recipe.loss.class_weights) == (0.5, 1.3, "reciprocal")


def test_overrides_reach_any_field():
    recipe = load_recipe(
        "quickstart",
        (
            "optimizer.lr=3e-4",
            "amp=bf16",
            "augment.crop_scale=[0.2, 0.9]",
            "batch.norm_batch=8",
            "optimizer.clip_norm=1",
        ),
    )
    assert recipe.optimizer.lr == 3e-4 and recipe.amp == "bf16" and recipe.augment.crop_scale == (0.2, 0.9)
    assert recipe.batch.num_atoms == 4 and recipe.optimizer.clip_norm == 1
    assert load_recipe("quickstart", ("batch.norm_batch=8", "batch.norm_batch=none")).batch.norm_batch is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimiser.lr=1", "optimizer.lr"),
        ("lr=1", "optimizer.lr"),
        ("optimizer.lr=-1", "greater than 0"),
        ("batch.size=0", "greater than or equal to 1"),
        ("batch.norm_batch=5", "does not divide size 32"),
        ("amp=fp64", "'bf16'"),
        ("augment.crop_scale=[0.9, 0.1]", "ascending"),
        ("optimizer.lr", "KEY=VALUE"),
        ("seed=nan", "seed"),
    ],
)
def test_a_wrong_override_names_the_key_and_what_is_possible(override, expected):
    with pytest.raises(LowmemError, match="(?s)" + expected.replace("[", r"\[")):
        load_recipe("quickstart", (override,))


def test_a_wrong_name_names_the_nearest_recipe():
    with pytest.raises(LowmemError, match="Did you mean quickstart"):
        load_recipe("quikstart")
    with pytest.raises(LowmemError, match="no recipe file"):
        load_recipe("nothing.toml")


def test_base_is_merged_and_loops_are_found(tmp_path):
    child = tmp_path / "child.toml"
    child.write_text('base = "quickstart"\nseed = 7\n[model]\ndropout = 0.5\n')
    recipe = load_recipe(str(child))
    assert recipe.seed == 7 and recipe.model.dropout == 0.5 and recipe.model.name == "tf_efficientnet_lite0"
    child.write_text('base = "child.toml"\n')
    with pytest.raises(LowmemError, match="back to itself"):
        load_recipe(str(child))


def test_unknown_keys_in_a_file_are_named(tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text('[model]\nname = "resnet18"\ndropuot = 0.1\n')
    with pytest.raises(LowmemError, match=r"model\.dropuot.*model\.dropout"):
        load_recipe(str(file))
    file.write_text("this is not toml")
    with pytest.raises(LowmemError, match="not a TOML file"):
        load_recipe(str(file))


def test_field_names_are_dotted():
    assert {"optimizer.lr", "model.name", "amp", "seed"} <= set(field_names())


def test_a_folder_of_a_recipes_name_does_not_hide_it(tmp_path, monkeypatch):
    (tmp_path / "quickstart").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quickstart").model.name == "tf_efficientnet_lite0"
