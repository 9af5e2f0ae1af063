"""What tiny-if is evaluated with: a cascade, a judge and drawings; images kept in --out, a report, and figures."""

import hashlib
import json
from argparse import Namespace
from collections.abc import Sequence

from shared.options import pick

import torch
from torch import Tensor

from ddpm.devices import pick_dtype
from ddpm.figures import save_grid
from ddpm.files import check_tensors, fingerprint, load_tensors, save_tensors, write_atomically
from ddpm.processes import gathered, num_processes, rank, wait
from ifmodel import Cascade
from ifmodel.jobs import Job
from ifmodel.tiny import judge
from ifmodel.tiny.data import CaptionedImages
from ifmodel.weights import fetch, find_weights

Sampler = tuple[str, float, int]  # its name, η, and how many steps
FAST: Sampler = ("dpm++", 1.0, 20)  # SDE-DPM-Solver++


class Evaluation:
    """The models, the judge, and the drawings: for training, and held out."""

    def __init__(self, args: Namespace, data: CaptionedImages, held: CaptionedImages):
        self.args, self.data, self.held = args, data, held
        device, dtype = pick(args)
        self.cascade = Cascade(args.model, device=device, dtype=dtype)
        self.side = self.cascade.sizes[0][0]
        self.identity = identity_of(args.model)
        self.judge = get_judge(args, data, self.side)
        self.report = {"seed": args.seed, "things": len(data.names)}

    def draw(self, name: str, jobs: Sequence[Job], guidance: float, sampler: Sampler = FAST) -> Tensor:
        """Images [N, 3, S, S] in [-1, 1] of all jobs, from --out if they are there."""
        kind, eta, steps = sampler
        asked = [(job.prompts(), list(job.seeds)) for job in jobs]
        digest = hashlib.sha256(repr((asked, guidance, sampler, self.identity, str(self.cascade.dtype))).encode())
        path = self.args.out / "images" / f"{name}_{digest.hexdigest()[:16]}.safetensors"
        if not path.is_file():
            size = self.args.batch_size
            settings = {"sampler": kind, "eta": eta, "num_steps": steps, "guidance_scale": guidance}
            batches = [batch for job in jobs for batch in job.batches(size)]
            mine = batches[rank() :: num_processes()]  # which may be none of a short list
            drawn = self.cascade.draw_all(mine, batch_size=size, progress=rank() == 0, **settings) if mine else []
            images = torch.cat(gathered(drawn, [(len(batch.seeds), 3, *self.cascade.sizes[0]) for batch in batches]))
            if rank() == 0:
                save_tensors(path, {"images": images.clamp(-1, 1)}, {"name": name})
            wait()
        return load_tensors(path, ["images"])[0]["images"]

    def prompts(self, name: str, prompts: Sequence[str], guidance: float, sampler: Sampler = FAST) -> Tensor:
        """Images of prompts, each from a seed of its own."""
        job = Job(list(prompts), range(self.args.seed, self.args.seed + len(prompts)))
        return self.draw(name, [job], guidance, sampler)

    def keep(self, section: str, measures):
        """Write the report each time, so that a late failure loses nothing."""
        self.report[section] = measures
        if rank() > 0:
            return
        write_atomically(self.args.out / "report.json", json.dumps(self.report, indent=2).encode())
        print(f"{section}: {json.dumps(measures)}", flush=True)

    def figure(self, name: str, rows: Sequence[Tensor], row_labels: Sequence[str], labels: Sequence[str]):
        """Rows of images in [-1, 1], of one size."""
        options = {"row_labels": row_labels, "column_labels": labels, "zoom": max(1, 128 // rows[0].shape[-1])}
        if rank() == 0:
            images = [[x / 2 + 0.5 for x in row] for row in rows]
            save_grid(self.args.out / name, images, **options, seed=self.args.seed)

    def things(self, x: Tensor) -> Tensor:
        """Which thing the judge sees in each of the images [N, 3, H, W]."""
        return judge.judged(self.judge, x)[0]

    def things_of(self, data: CaptionedImages, rows: Sequence[int]) -> Tensor:
        """Which of the things that the judge knows these drawings are of, [N]."""
        return torch.tensor([self.data.names.index(data.names[int(data.things[row])]) for row in rows])


def identity_of(model: str) -> str:
    """Of its weights: images of others are not these."""
    text_encoder = sorted(fetch(model, "text_encoder", ["*.safetensors"]).glob("*.safetensors"))
    return fingerprint(*find_weights(model), *text_encoder)


def get_judge(args: Namespace, data: CaptionedImages, side: int) -> judge.ImageJudge:
    """The judge of these drawings, trained once, by the first process, and kept in --out."""
    path = args.out / f"judge_{data.fingerprint()}_{side}_{args.judge_steps}_{args.seed}.safetensors"
    if not path.is_file() and rank() == 0:
        dtype = pick_dtype("auto", torch.device("cpu"))
        trained = judge.train_judge(data, steps=args.judge_steps, side=side, seed=args.seed, dtype=dtype)
        save_tensors(path, trained.state_dict(), {"steps": args.judge_steps})
    wait()
    found, (tensors, _) = judge.ImageJudge(len(data.names)), load_tensors(path)
    check_tensors(f"{path} is no judge of these drawings", found.state_dict(), tensors)
    found.load_state_dict(tensors)
    return found.eval()
