"""DeepFloyd IF in plain PyTorch: the stage-1 and stage-2 UNets, loading the published weights as they are.

    from ifmodel import Cascade, load_unet

    images = Cascade("tiny-if").draw("a photo of a dog", seeds=[1, 2, 3])  # [3, 3, 128, 128] in [-1, 1]
    unet = load_unet("tiny-if/I")  # the small model that is shipped; or a folder, or a Hub id
    text = unet.encode_text(prompt_embeds)  # once per prompt
    out = unet(x_t, t, text)  # [B, 3, H, W] -> [B, 6, H, W], eps and v

Read in this order: `config` (which shapes a model has), `unet` (its layers, and how they are put together), `scheduler`
and `stage` (what each stage gives the algorithms), `jobs` (what can be drawn), `cascade` (both stages). `weights` and
`t5` bring the UNets and the prompts there (`prompts`: those of a cascade, `embeds`: files of them), `lora` changes them
(`lora_files`: what it reads), `dreambooth` trains a LoRA, `folder` fills a folder with images of many prompts,
`offload` runs UNets and T5 where they do not fit, `costs` says what a step takes, `vocabulary` warns of what a small
model does not know, and `tiny` is how that model was made.
"""

from ifmodel.cascade import Cascade
from ifmodel.config import UNetConfig
from ifmodel.lora import load_lora
from ifmodel.unet import Text, UNet
from ifmodel.weights import load_unet

__all__ = ["Cascade", "Text", "UNet", "UNetConfig", "load_lora", "load_unet"]
