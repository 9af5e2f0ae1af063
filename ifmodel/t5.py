"""From prompts to T5 embeddings: tokens, the encoder, and a cache so that the encoder is seldom needed.

IF's text encoder is T5 v1.1 XXL, 4.8 billion parameters and by far the largest part of the cascade. Its output
for a prompt never changes, so it is computed once, kept in a safetensors file, and T5 is loaded only when some
prompt is not known yet.
"""

import hashlib
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ddpm.tools.files import first_line, reading, write_atomically
from ddpm.tools.memory import check_memory, free_memory
from ifmodel.config import MAX_LAYERS
from ifmodel.embeds import NUM_TOKENS, normalised
from ifmodel.lora import merge_lora
from ifmodel.lora_files import LoRA
from ifmodel.offload import check_accelerate, offload
from ifmodel.weights import VARIANTS, fetch, index_names, shards_of, weight_patterns

CACHE = Path("~/.cache/pixel-diffusion/prompts").expanduser()
PAD, END = 0, 1


class Tokenizer:
    """Prompts to tokens as IF does: lower-cased, stripped, cut at 77 tokens with the end token, padded to 77.

    Raises ValueError for a prompt that is not valid Unicode.
    """

    def __init__(self, folder: str | Path):
        """folder: a repository's tokenizer/, with sentencepiece's spiece.model or, failing that, tokenizer.json.

        Raises FileNotFoundError when neither is there, ValueError when it cannot be read.
        """
        folder = Path(folder)
        if (folder / "spiece.model").is_file():
            from sentencepiece import SentencePieceProcessor

            with reading(folder / "spiece.model", "sentencepiece model"):
                model = SentencePieceProcessor(model_file=str(folder / "spiece.model"))
            self._encode, self._decode = model.encode, model.decode
            self.vocab_size = model.get_piece_size()
        elif (folder / "tokenizer.json").is_file():
            from transformers import PreTrainedTokenizerFast

            with reading(folder / "tokenizer.json", "tokenizer"):
                model = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
            self._encode, self._decode = lambda text: model.encode(text, add_special_tokens=False), model.decode
            self.vocab_size = len(model)
        else:
            raise FileNotFoundError(f"{folder} has neither spiece.model nor tokenizer.json")

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token numbers [B, 77] int64 and the attention mask [B, 77] int64, 1 up to the end token and 0 after it."""
        tokens = torch.full((len(prompts), NUM_TOKENS), PAD)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            numbers = [*self._numbers(prompt)[: NUM_TOKENS - 1], END]
            tokens[row, : len(numbers)] = torch.tensor(numbers)
            mask[row, : len(numbers)] = 1
        return tokens, mask

    def lost(self, prompt: str) -> str:
        """The part of a prompt that is cut off at 77 tokens; empty for nearly all."""
        return self._decode(self._numbers(prompt)[NUM_TOKENS - 1 :])

    def _numbers(self, prompt: str) -> list[int]:
        try:
            prompt.encode()
        except UnicodeEncodeError:  # a lone surrogate, from a terminal that is not UTF-8
            raise ValueError(f"the prompt {prompt!r} is not valid UTF-8: type it again") from None
        return self._encode(normalised(prompt))


def embed_prompts(source: str | Path, prompts: Sequence[str], **options) -> dict[str, Tensor]:
    """Embeddings [77, D_text] by prompt: `embed_each`, with its options, collected."""
    return dict(embed_each(source, prompts, **options))


def embed_each(
    source: str | Path,
    prompts: Sequence[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    cache: Path | None = CACHE,
    loras: Sequence[tuple[LoRA, float]] = (),
    low_memory: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Prompts and their embeddings [77, D_text], one at a time, those in the cache first.

    T5 is downloaded and loaded only for prompts that are not in the cache.

    source: a folder or Hub id that holds tokenizer/ and text_encoder/
    dtype: float32 reads the full-precision files where there are some; bfloat16 and float16 their own. In
        float16, T5's `wo` layers stay in float32 because they overflow
    cache: the folder that keeps embeddings, by model revision, dtype, LoRAs and prompt; None keeps nothing
    loras: those that change T5, each with its scale
    low_memory: stream T5's layers from its files, for each prompt; on a GPU only those that do not fit
    T5 is freed after the last. Warns of a prompt that is cut at 77 tokens, with the part that is lost, and of a
    damaged file in the cache, whose prompt is embedded again.
    Raises FileNotFoundError or ValueError when the tokenizer or T5 is missing, is damaged or does not fit in memory.
    """
    tokenizer = Tokenizer(fetch(source, "tokenizer", ["spiece.model", "tokenizer.json"], revision))
    prompts = list(dict.fromkeys(prompts))
    for prompt in prompts:
        if lost := tokenizer.lost(prompt):
            warnings.warn(f"prompt cut at {NUM_TOKENS} tokens, lost: {lost!r}", stacklevel=2)
    model = fetch(source, "text_encoder", ["config.json"], revision)  # a Hub model's folder is named by its commit
    files = {prompt: _cache_file(cache, model, dtype, prompt, loras) for prompt in prompts} if cache else {}
    unknown = []
    for prompt in prompts:
        tensor = _cached(files[prompt]) if cache and files[prompt].is_file() else None
        if tensor is None:
            unknown.append(prompt)
        else:
            yield prompt, tensor
    if not unknown:
        return
    folder, variant = _find_t5(source, dtype, revision)
    encoder = load_encoder(folder, tokenizer, dtype, device, variant, low_memory)
    for lora, scale in loras:
        merge_lora(encoder, lora, scale, part="text_encoder")
    for prompt in unknown:
        tensor = _encode(encoder, *(tensor.to(device) for tensor in tokenizer([prompt])), dtype)
        try:
            if cache:
                write_atomically(files[prompt], save({"prompt_embeds": tensor}))
        except OSError as error:
            warnings.warn(f"embeddings are not kept: {error}", stacklevel=2)
            cache = None
        yield prompt, tensor


@torch.no_grad()
def _encode(encoder: nn.Module, tokens: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """T5's output for the tokens of a prompt, [77, D_text], on the CPU."""
    return encoder(tokens, attention_mask=mask).last_hidden_state[0].to("cpu", dtype).contiguous()


def _find_t5(source: str | Path, dtype: torch.dtype, revision: str | None) -> tuple[Path, str | None]:
    """T5's folder, and which of its weights to read: those of the dtype where there are some, else others."""
    for variant in VARIANTS[dtype]:
        folder = fetch(source, "text_encoder", weight_patterns("model", variant), revision)
        if _encoder_files(folder, variant):
            return folder, variant
    raise FileNotFoundError(f"{folder} has no safetensors: {source} must hold T5's weights in text_encoder/")


def _encoder_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files of one precision that are there."""
    named = "*.safetensors" if variant is None else f"*.{variant}*.safetensors"
    return [file for file in sorted(folder.glob(named)) if variant or not re.search(r"\.(fp|bf)16", file.name)]


def load_encoder(
    folder: Path,
    tokenizer: Tokenizer,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    variant: str | None = None,
    low_memory: bool = False,
):
    """The T5 encoder of a text_encoder/, transformers' own, in evaluation mode.

    low_memory: a GPU holds what it can of it and the CPU nothing: the rest is read when it runs, see `offload`
    Raises ValueError when it is damaged, does not fit in memory, or knows fewer tokens than the tokenizer.
    """
    from transformers import T5Config, T5EncoderModel

    files = _encoder_files(folder, variant)
    with reading(folder, "T5 encoder"):
        config = T5Config.from_pretrained(folder)
        if not 1 <= config.num_layers <= MAX_LAYERS:
            raise ValueError(f"config.json has {config.num_layers} layers")
        with torch.device("meta"):
            encoder = T5EncoderModel(config).to(dtype).eval()
        for name in index_names("model", variant):
            if (folder / name).is_file():
                files = shards_of(folder / name)  # since transformers reads whatever it names
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, T5 in {folder} only {config.vocab_size}")
    if low_memory:
        return _by_layers(encoder, files, dtype, torch.device(device))
    size = sum(parameter.numel() for parameter in encoder.parameters())
    check_memory(size * dtype.itemsize, f"T5 in {str(dtype).removeprefix('torch.')}", device)
    with reading(folder, "T5 encoder"):
        options = {"dtype": dtype, "variant": variant, "use_safetensors": True, "output_loading_info": True}
        encoder, loading = T5EncoderModel.from_pretrained(folder, **options)
        if missing := sorted(loading["missing_keys"]):
            raise ValueError(f"it lacks {len(missing)} tensors: {', '.join(missing[:5])}")
    return encoder.to(device).eval()


def _by_layers(encoder: nn.Module, files: Sequence[Path], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """T5 on the meta device, read from its files when it runs.

    Not by transformers' device_map="disk", which computes T5's `wo` in float16, too, where it overflows.
    """
    check_accelerate()
    for name, module in encoder.named_modules():
        if name.endswith(".wo") and dtype == torch.float16:
            module.float()
    room = max(0, free_memory(device) - 2**29) if device.type == "cuda" else 0
    return offload(encoder, files, device, room)


def _cached(file: Path) -> Tensor | None:
    """The embeddings in a file of the cache; None, and a warning, when it is damaged."""
    try:
        return load_file(file)["prompt_embeds"]
    except (SafetensorError, KeyError, OSError) as error:
        warnings.warn(f"{file} is damaged ({first_line(error)}): its prompt is embedded again", stacklevel=3)
        return None


def _cache_file(
    cache: Path, model: Path, dtype: torch.dtype, prompt: str, loras: Sequence[tuple[LoRA, float]] = ()
) -> Path:
    """Where the cache keeps a prompt: named by the model and its revision, the dtype, the prompt and the LoRAs."""
    model = model.absolute()
    if model.parent.parent.name == "snapshots":  # the Hub's cache: models--owner--name/snapshots/commit/text_encoder
        identity = (model.parents[2].name, model.parent.name)
    else:
        weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(model.glob("*"))]
        identity = (str(model), weights)
    changes = [(lora.fingerprint(), scale) for lora, scale in loras]
    key = repr((identity, str(dtype), normalised(prompt), *changes))
    return cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
