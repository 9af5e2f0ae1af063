"""Models that other programs saved, and folders that are damaged: read as diffusers reads them, or refused by name."""

import json
import shutil

import pytest
import torch
from diffusers import DDPMScheduler, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from reproduce import made_before
from safetensors.torch import save_file
from transformers import T5EncoderModel

from ddpm.tools.files import load_tensors
from ifmodel import load_unet
from ifmodel.config import UNetConfig
from ifmodel.stage import find_stage, find_variant, generate, stage_threshold, stage_variance
from ifmodel.t5 import Tokenizer, embed_prompts
from ifmodel.tiny.loading import read_metadata
from ifmodel.weights import SHIPPED
from shared.experiments import EXPERIMENTS
from tests.ifmodel.test_t5 import model_folder  # noqa: F401
from tests.ifmodel.test_unet import SCHEDULER
from tests.scripts.test_generate import PROMPT, cascade, own_cache, pixels  # noqa: F401


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


def test_stable_diffusion_is_refused_by_its_name(tmp_path):
    (tmp_path / "unet").mkdir()
    UNet2DConditionModel(block_out_channels=(32, 32, 32, 32)).save_config(tmp_path / "unet")
    with pytest.raises(ValueError, match=f"^{tmp_path} is no IF model of a kind that is implemented here: config"):
        load_unet(tmp_path)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", None])
def test_a_fixed_variance_is_diffusers(run_script, cascade, tmp_path, variance_type):  # noqa: F811
    """As DreamBooth saves it: the UNet still gives v, which is not used. None leaves the field out: fixed_small."""
    folder, stage_1, stage_2 = cascade
    said = {name: value for name, value in SCHEDULER.items() if name != "variance_type"} | {"sample_max_value": 1.5}
    said |= {"variance_type": variance_type} if variance_type else {}
    for name in ("stage_1", "stage_2"):
        path = shutil.copytree(folder / name, tmp_path / name) / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps({**said, "_class_name": "DDPMScheduler"}))
    pipelines = [IFPipeline(**stage_1.components, requires_safety_checker=False)]
    pipelines += [IFSuperResolutionPipeline(**stage_2.components, requires_safety_checker=False)]
    options = {"prompt": PROMPT, "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt"}
    image = {}
    for pipeline in pipelines:
        pipeline.scheduler = DDPMScheduler(**said)
        pipeline.set_progress_bar_config(disable=True)
        image = {"image": pipeline(**options, **image, generator=torch.Generator().manual_seed(7)).images}
    expected = (image["image"][0] * 127.5 + 127.5).permute(1, 2, 0).clamp(0, 255).numpy()

    options = ["--prompt", PROMPT, "--steps", 4, "--upscaler-steps", 4, "--guidance", 3, "--upscaler-guidance", 3]
    options += ["--noise-level", 250, "--seed", 7, "--dtype", "float32", "--device", "cpu"]
    for root in (tmp_path, folder):
        models = ["--model", root / "stage_1", "--upscaler", root / "stage_2"]
        status, _, err = run_script("generate", *options, *models, "--out", tmp_path / f"{root.name}.png")
        assert status == 0, err
    assert abs(pixels(tmp_path / f"{tmp_path.name}.png") - expected).max() <= 1.01
    assert abs(pixels(tmp_path / f"{folder.name}.png") - expected).max() > 10


def test_generate_takes_the_variance_of_a_model(cascade, tmp_path):  # noqa: F811
    folder = shutil.copytree(cascade[0] / "stage_1", tmp_path / "stage_1")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"variance_type": "fixed_large"}))
    assert stage_variance(folder) == find_stage(str(folder), 1, None).variance == "beta"
    assert stage_variance(tmp_path) == "learned_range"  # no file: as IF does
    unet, embeds = load_unet(folder), torch.zeros(1, 77, 24)
    options = {"seeds": [7], "num_steps": 3, "threshold": stage_threshold(folder, 1)}
    learned, fixed = (generate(unet, embeds, embeds, **options, variance=v) for v in ("learned_range", "beta"))
    assert (learned - fixed).abs().max() > 0.1


@pytest.mark.parametrize(
    ("dtype", "there", "found"),
    [
        (torch.bfloat16, (None, "fp16", "bf16"), "bf16"),
        (torch.bfloat16, (None, "fp16"), "fp16"),
        (torch.float16, (None, "fp16", "bf16"), "fp16"),
        (torch.float16, ("bf16",), "bf16"),
        (torch.float32, (None, "fp16", "bf16"), None),
        (torch.float32, ("bf16",), "bf16"),
    ],
)
def test_each_dtype_reads_its_own_files_first(tmp_path, dtype, there, found):
    folder = shutil.copytree(SHIPPED["tiny-if/I"], tmp_path / "I", ignore=shutil.ignore_patterns("*.safetensors"))
    for variant in there:
        suffix = f".{variant}" if variant else ""
        (folder / "unet" / f"diffusion_pytorch_model{suffix}.safetensors").touch()
    assert find_variant(find_stage(str(folder), 1, None), dtype) == found


def test_a_t5_in_bfloat16_is_read_from_its_files(model_folder, tmp_path):  # noqa: F811
    encoder = T5EncoderModel.from_pretrained(model_folder / "text_encoder", dtype=torch.bfloat16)
    shutil.copytree(model_folder / "tokenizer", tmp_path / "tokenizer")
    encoder.save_pretrained(tmp_path / "text_encoder", variant="bf16")
    for dtype in (torch.bfloat16, torch.float32):
        found = embed_prompts(tmp_path, ["a dog"], dtype=dtype, cache=None)["a dog"]
        tokens, mask = Tokenizer(tmp_path / "tokenizer")(["a dog"])
        theirs = T5EncoderModel.from_pretrained(tmp_path / "text_encoder", variant="bf16", dtype=dtype)
        with torch.no_grad():
            assert torch.equal(found, theirs(tokens, attention_mask=mask).last_hidden_state[0])


def test_t5s_index_names_files_beside_it_and_no_others(model_folder, tmp_path):  # noqa: F811
    """Whole and valid, but for the folder that one of its files lies in."""
    folder = tmp_path / "model" / "text_encoder"
    shutil.copytree(model_folder / "tokenizer", tmp_path / "model" / "tokenizer")
    T5EncoderModel.from_pretrained(model_folder / "text_encoder").save_pretrained(folder, max_shard_size="30KB")
    embed_prompts(tmp_path / "model", ["a dog"], cache=None)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = min(content["weight_map"].values())
    (folder / first).rename(tmp_path / first)
    outside = {name: f"../../{file}" if file == first else file for name, file in content["weight_map"].items()}
    index.write_text(json.dumps({**content, "weight_map": outside}))
    with pytest.raises(ValueError, match=rf"names \.\./\.\./{first}, which is not in its folder"):
        embed_prompts(tmp_path / "model", ["a dog"], cache=None)


@pytest.mark.parametrize("name", ["../outside.png", "a/../../outside.png", "/outside.png"])
def test_metadata_names_images_of_its_folder_and_no_others(tmp_path, name):
    (tmp_path / "data").mkdir()
    row = {"file_name": name, "text": "a dog"}
    (tmp_path / "data" / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"line 1 names '.*outside\.png', which is not in the folder"):
        read_metadata(tmp_path / "data")
    (tmp_path / "data" / "metadata.jsonl").write_text(json.dumps({**row, "file_name": "inside/a..b.png"}))
    assert read_metadata(tmp_path / "data")[0]["file_name"] == "inside/a..b.png"


DEEP = "[" * 100_000 + "]" * 100_000


def test_json_that_is_nested_too_deeply_is_refused_wherever_it_is_read(tmp_path):
    (tmp_path / "metadata.jsonl").write_text(DEEP)
    with pytest.raises(ValueError, match="line 1 is not"):
        read_metadata(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "deep.safetensors", {"model": DEEP})
    with pytest.raises(ValueError, match="its metadata is not JSON"):
        load_tensors(tmp_path / "deep.safetensors")
    made = tmp_path / EXPERIMENTS[0].folder / "made.json"
    made.parent.mkdir()
    made.write_text(DEEP)
    assert made_before(EXPERIMENTS[0], tmp_path) is None  # so it is made anew
    (tmp_path / "tokenizer.json").write_text(DEEP)
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        Tokenizer(tmp_path)
    for name in ("unet", "scheduler"):
        (tmp_path / name).mkdir()
    (tmp_path / "unet" / "config.json").write_bytes((SHIPPED["tiny-if/I"] / "unet" / "config.json").read_bytes())
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(DEEP)
    with pytest.raises(ValueError, match="does not say which files"):
        load_unet(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(DEEP)
    with pytest.raises(ValueError, match="is not JSON"):
        stage_threshold(tmp_path, 1)
