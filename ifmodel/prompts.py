"""A cascade's prompts: which of them it knows, and their embeddings, from a file, from T5 or from the last call."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ifmodel.embeds import normalised
from ifmodel.lora_files import LoRA
from ifmodel.stage import StageFiles
from ifmodel.t5 import embed_each
from ifmodel.vocabulary import nearest_known


class Prompts:
    """Prompts to embeddings [B, 77, D_text] float32: `prompts(["a dog", ""])`, once `embed` has had these."""

    def __init__(
        self,
        stages: Sequence[StageFiles],
        embeds: dict[str, Tensor],
        before_t5: Callable[[], None],
        *,
        device: torch.device,
        loras: Sequence[tuple[LoRA, float]] = (),
        **t5,
    ):
        """stages: those that take the embeddings; the first has T5 and the vocabulary

        embeds: of `load_embeds`, which spare T5; before_t5: makes room for it
        device, loras, t5: as in `embed_each`
        Raises ValueError for embeddings that a stage cannot take.
        """
        self.stages, self.embeds, self.before_t5, self.device = stages, embeds, before_t5, device
        for_t5 = [(lora, scale) for lora, scale in loras if lora.text_encoder]
        self._t5 = {"device": device, "loras": for_t5, "revision": stages[0].revision, **t5}
        self._found: dict[str, Tensor] = {}  # by T5, for the last call
        self._vocabulary = None if loras else stages[0].vocabulary  # a LoRA may have taught it more
        for tensor in embeds.values():
            self._check_width(tensor)

    def check(self, prompts: Sequence[str], negative: str):
        """Warn of prompts beyond the model's vocabulary; refuse those that no file of embeddings has, without T5."""
        source, known = Path(self.stages[0].source), [*self.embeds]
        missing = [prompt for prompt in [*prompts, negative] if normalised(prompt) not in known]
        if known and missing and source.is_dir() and not (source / "tokenizer").is_dir():
            there = f"embedded are {', '.join(map(repr, known[:5]))}{', …' if len(known) > 5 else ''}"
            raise ValueError(f"there are no embeddings of {missing[0]!r}, and {source} has no T5: {there}")
        for prompt in dict.fromkeys(prompts) if self._vocabulary else ():
            if nearest := nearest_known(prompt, self._vocabulary):
                unknown = f"{source} does not know {prompt!r} and will draw something else; nearest to it are"
                warnings.warn(f"{unknown} {', '.join(nearest)}", stacklevel=5)  # at the caller of `Cascade.draw`

    def unknown(self, prompts: Sequence[str]) -> list[str]:
        """Those for which T5, or its cache, will be asked."""
        known = self.embeds | self._found
        return [prompt for prompt in prompts if normalised(prompt) not in known]

    def embed(self, prompts: Sequence[str]):
        """Have these at hand, and of others those of the file alone: memory does not grow from call to call."""
        more = {normalised(prompt): tensor for prompt, tensor in self._embed_each(self.unknown(prompts))}
        wanted = {normalised(prompt) for prompt in prompts}
        self._found = {name: tensor for name, tensor in (self._found | more).items() if name in wanted}

    def cache(self, prompts: Sequence[str]) -> Iterator[str]:
        """Embed into T5's cache, one at a time, so that drawing them needs no T5 and none stays in memory."""
        for prompt, _ in self._embed_each([prompt for prompt in prompts if normalised(prompt) not in self.embeds]):
            yield prompt

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        known = self.embeds | self._found
        return torch.stack([known[normalised(prompt)].to(self.device, torch.float32) for prompt in prompts])

    def _embed_each(self, prompts: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        if not prompts:
            return
        self.before_t5()
        for prompt, tensor in embed_each(self.stages[0].source, prompts, **self._t5):
            self._check_width(tensor)
            yield prompt, tensor

    def _check_width(self, tensor: Tensor):
        for files in self.stages:
            if tensor.shape[-1] != files.config.encoder_hid_dim:
                wanted = f"{files.source} takes those that are {files.config.encoder_hid_dim} wide"
                raise ValueError(f"embeddings are {tensor.shape[-1]} wide, of another text encoder: {wanted}")
