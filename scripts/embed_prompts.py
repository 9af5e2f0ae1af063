"""Embed prompts with a model's T5, once, into a file that the experiments' scripts take as --embeds.

    python scripts/embed_prompts.py --model DeepFloyd/IF-I-XL-v1.0 --prompt "a photo of a dog" --prompt "a hat"
    python scripts/embed_prompts.py --model DeepFloyd/IF-I-XL-v1.0 --prompts prompts.txt --out out/mine.safetensors
    torchrun --nproc-per-node 8 scripts/embed_prompts.py --model DeepFloyd/IF-I-XL-v1.0 --prompts prompts.txt

The null prompt "" is always added, and so are the prompts of a file that is already at --out. T5 v1.1 XXL needs
9.5 GB in bfloat16, 11.5 GB in float16 (its `wo` layers stay in float32) and 19 GB in float32, but --low-memory reads it
layer by layer.
"""

from pathlib import Path

from shared.options import add_device_options, add_low_memory_option, check_writable, parser, pick, run
from shared.stages import model_name

from ddpm.tools.distributed import num_processes, rank, share, wait
from ifmodel.embeds import load_embeds, normalised, read_prompts, save_embeds
from ifmodel.offload import check_accelerate
from ifmodel.t5 import embed_each, embed_prompts


def main():
    options = parser(__doc__, "--model FOLDER_OR_HUB_ID ")
    help = "it holds tokenizer/ and text_encoder/"
    options.add_argument("--model", required=True, type=model_name, metavar="FOLDER_OR_HUB_ID", help=help)
    options.add_argument("--revision", help="branch, tag or commit of a Hub model")
    options.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    options.add_argument("--prompts", type=Path, metavar="FILE", help="a text file with a prompt on each line")
    add_low_memory_option(options)
    options.add_argument("--out", type=Path, default=Path("out/embeds.safetensors"), metavar="FILE.safetensors")
    add_device_options(options, float16=True)
    args = options.parse_args()

    device, dtype = pick(args, float16=True)
    check_writable(args.out, ".safetensors")
    if args.low_memory:
        check_accelerate()
    prompts = [*args.prompt, *(read_prompts(args.prompts) if args.prompts else [])]
    if not prompts:
        raise ValueError("there is nothing to embed: give --prompt, or --prompts with a file")
    embeds = load_embeds(args.out) if args.out.exists() else {}
    prompts, t5 = list(dict.fromkeys([*prompts, ""])), {"dtype": dtype, "device": device, "revision": args.revision}
    t5["low_memory"] = args.low_memory
    if num_processes() > 1:
        for _ in embed_each(args.model, share(prompts, "prompts"), **t5):
            pass  # into the cache, where the first process finds them
        wait()
        if rank() > 0:
            return
    found = embed_prompts(args.model, prompts, **t5)
    embeds |= {normalised(prompt): tensor for prompt, tensor in found.items()}
    save_embeds(args.out, embeds)
    width, name = next(iter(embeds.values())).shape[1], str(dtype).removeprefix("torch.")
    print(f"{args.out}: {len(embeds)} prompts, {width} wide, {name}")


if __name__ == "__main__":
    run(main)
