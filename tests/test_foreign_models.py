"""Models that other programs saved, and folders that are damaged: read as diffusers reads them, or refused by name."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file

from ifmodel import load_unet
from ifmodel.config import UNetConfig
from ifmodel.weights import SHIPPED


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """tiny-if's stage 1 by diffusers, and the folder where it was saved."""
    unet = UNet2DConditionModel.from_pretrained(SHIPPED["tiny-if/I"] / "unet")
    return unet, tmp_path_factory.mktemp("foreign")


def test_an_ema_model_that_diffusers_saved_loads(tiny):
    unet, folder = tiny
    EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config).save_pretrained(
        folder / "ema" / "unet"
    )
    fields = json.loads((folder / "ema" / "unet" / "config.json").read_text())
    assert {"decay", "inv_gamma", "optimization_step"} <= fields.keys()
    ours = load_unet(folder / "ema")
    assert torch.equal(ours.conv_in.weight, unet.conv_in.weight)


@pytest.mark.parametrize("name", ["safetensors.index.fp16.json", "safetensors.fp16.index.json"])
def test_either_name_of_a_variants_index_is_found(tiny, tmp_path, name):
    unet, _ = tiny
    unet.half().save_pretrained(tmp_path / "unet", variant="fp16", max_shard_size="5MB")
    unet.float()
    (index,) = (tmp_path / "unet").glob("*.index*.json")
    index.rename(index.with_name(f"diffusion_pytorch_model.{name}"))
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    assert torch.equal(load_unet(tmp_path, variant="fp16").conv_in.weight, unet.conv_in.weight)


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ({"weight_map": {"conv_in.weight": "../outside.safetensors"}}, "../outside.safetensors"),
        ({"weight_map": {"conv_in.weight": "/outside.safetensors"}}, "/outside.safetensors"),
        ({"weight_map": {}}, "names no files"),
        ({"weight_map": [1]}, "does not say which files"),
    ],
)
def test_an_index_names_files_beside_it_and_no_others(tiny, tmp_path, index, told):
    (tmp_path / "unet").mkdir()
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "outside.safetensors")
    (tmp_path / "unet" / "config.json").write_bytes((SHIPPED["tiny-if/I"] / "unet" / "config.json").read_bytes())
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=told):
        load_unet(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "\xff"])
def test_a_config_that_is_no_json_is_refused(tmp_path, text):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="is not JSON"):
        load_unet(tmp_path)


def test_other_fields_are_still_refused():
    config = json.loads((SHIPPED["tiny-if/I"] / "unet" / "config.json").read_text())
    with pytest.raises(ValueError, match="dropout_of_ours"):
        UNetConfig.from_dict({**config, "dropout_of_ours": 0.5})
