"""An `Exam`: a cascade, its judge and held-out drawings. It draws the images that the measures need, and keeps them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm.tools.devices import pick_dtype
from ddpm.tools.distributed import gathered, num_processes, rank, wait
from ddpm.tools.figures import save_grid
from ddpm.tools.files import check_tensors, fingerprint, load_tensors, save_tensors
from ifmodel.cascade import Cascade
from ifmodel.jobs import Job
from ifmodel.tiny import judge
from ifmodel.tiny.data import CaptionedImages, show
from ifmodel.weights import fetch, find_weights

Sampler = tuple[str, float, int]  # its name, η, and how many steps
FAST: Sampler = ("dpm++", 1.0, 20)  # SDE-DPM-Solver++


@dataclass
class Exam:
    """What a measure needs. Under torchrun the processes share the images of each.

    cascade: of stage 1 alone; judge: see `train_judge`
    data: the drawings that both have learned from; held: others of the same things, or the same drawings
    folder: keeps what is drawn, and figures of it; None keeps nothing
    seed: of each measure's first image; variety: how much drawings vary, see `ifmodel.tiny.data.show`
    identity: what images are of, for the names of files: a hash of the cascade's weights, unless it has a LoRA, too
    Raises ValueError when there is a stage 2.
    """

    cascade: Cascade
    judge: judge.ImageJudge
    data: CaptionedImages
    held: CaptionedImages | None = None
    folder: Path | None = None
    seed: int = 20040805
    variety: float = 1.0
    batch_size: int = 25
    identity: str = ""

    def __post_init__(self):
        if len(self.cascade.stages) > 1:
            raise ValueError('the judge sees what stage 1 draws: give the cascade that alone, such as "tiny-if/I"')
        self.held, self.side = self.held or self.data, self.cascade.sizes[0][0]

    def draw(self, name: str, jobs: Sequence[Job], guidance_scale: float, sampler: Sampler = FAST) -> Tensor:
        """Images [N, 3, S, S] in [-1, 1] of all jobs, from the folder if they are there; name: what they are for."""
        if self.folder is None:
            return self.drawn(jobs, guidance_scale, sampler)
        asked = [(job.prompts(), list(job.seeds)) for job in jobs]
        self.identity = self.identity or identity_of(self.cascade.stages[0].source)
        made = repr((asked, guidance_scale, sampler, self.identity, str(self.cascade.dtype)))
        path = self.folder / "images" / f"{name}_{hashlib.sha256(made.encode()).hexdigest()[:16]}.safetensors"
        if not path.is_file():
            images = self.drawn(jobs, guidance_scale, sampler)
            if rank() == 0:
                save_tensors(path, {"images": images}, {"name": name})
            wait()
        return load_tensors(path, ["images"])[0]["images"]

    def drawn(self, jobs: Sequence[Job], guidance_scale: float, sampler: Sampler) -> Tensor:
        """Images [N, 3, S, S] in [-1, 1] of all jobs."""
        batches = [batch for job in jobs for batch in job.batches(self.batch_size)]
        mine = batches[rank() :: num_processes()]  # which may be none of a short list
        options = {"batch_size": self.batch_size, "guidance_scale": guidance_scale, "progress": rank() == 0}
        options |= dict(zip(("sampler", "eta", "num_steps"), sampler, strict=True))
        images = self.cascade.draw_all(mine, **options) if mine else []
        images = gathered(images, [(len(batch.seeds), 3, self.side, self.side) for batch in batches])
        return torch.cat(images).clamp(-1, 1)

    def ask(self, name: str, prompts: Sequence[str], guidance_scale: float, sampler: Sampler = FAST) -> Tensor:
        """Images of prompts, each from a seed of its own."""
        seeds = range(self.seed, self.seed + len(prompts))
        return self.draw(name, [Job(list(prompts), seeds)], guidance_scale, sampler)

    def each(self, draw: Callable[[int], Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """What draw(k) gives for every k, a tensor of the k-th shape."""
        mine = range(rank(), len(shapes), num_processes())
        return gathered([draw(k) for k in tqdm(mine, leave=False, disable=rank() > 0)], shapes)

    def show(self, name: str, rows: Sequence[Tensor], row_labels: Sequence[str] = (), labels: Sequence[str] = ()):
        """Keep a figure: rows of images in [-1, 1], labels of rows and of columns."""
        if self.folder is not None and rank() == 0:
            options = {"row_labels": row_labels, "column_labels": labels, "zoom": max(1, 128 // rows[0].shape[-1])}
            images = [[(x / 2 + 0.5).clamp(0, 1) for x in row] for row in rows]
            save_grid(self.folder / f"{name.replace('+', 'p')}.png", images, **options, seed=self.seed)

    def things(self, x: Tensor) -> Tensor:
        """Which thing the judge sees in each of the images [N, 3, H, W]."""
        return judge.judged(self.judge, x)[0]

    def things_of(self, data: CaptionedImages, rows: Sequence[int]) -> Tensor:
        """Which of the things that the judge knows these drawings are of, [N]."""
        return torch.tensor([self.data.names.index(data.names[int(data.things[row])]) for row in rows])

    def drawings(self, data: CaptionedImages, rows: Sequence[int], variety: float = 0.0, seed: int = 0) -> Tensor:
        """Drawings as stage 1 would draw them, [N, 3, S, S]."""
        return show(data, rows, self.side, torch.Generator().manual_seed(seed), variety)[0]


def identity_of(model: str) -> str:
    """Of its weights: images of others are not these."""
    text_encoder = sorted(fetch(model, "text_encoder", ["*.safetensors"]).glob("*.safetensors"))
    return fingerprint(*find_weights(model), *text_encoder)


def kept_judge(folder: Path, data: CaptionedImages, side: int, steps: int, seed: int) -> judge.ImageJudge:
    """The judge of these drawings, trained once, by the first process, and kept in the folder."""
    path = folder / f"judge_{data.fingerprint()}_{side}_{steps}_{seed}.safetensors"
    if not path.is_file() and rank() == 0:
        dtype = pick_dtype("auto", torch.device("cpu"))
        trained = judge.train_judge(data, steps=steps, side=side, seed=seed, dtype=dtype)
        save_tensors(path, trained.state_dict(), {"steps": steps})
    wait()
    found, (tensors, _) = judge.ImageJudge(len(data.names)), load_tensors(path)
    check_tensors(f"{path} is no judge of these drawings", found.state_dict(), tensors)
    found.load_state_dict(tensors)
    return found.eval()
