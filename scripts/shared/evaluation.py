"""The exam of tiny-if by the options of a script: images are kept in --out, and there are a report and figures."""

import hashlib
import json
from argparse import Namespace
from collections.abc import Callable, Sequence

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
from ifmodel.tiny.measures import FAST, Exam, Sampler
from ifmodel.weights import fetch, find_weights


class Evaluation(Exam):
    """An exam whose images are drawn once, by all processes together; data, held: trained on, and held out."""

    def __init__(self, args: Namespace, data: CaptionedImages, held: CaptionedImages):
        device, dtype = pick(args)
        cascade = Cascade(args.model, device=device, dtype=dtype)
        trained = get_judge(args, data, cascade.sizes[0][0])
        super().__init__(cascade, trained, data, held, args.seed, args.variety, args.batch_size, rank() == 0)
        self.args, self.identity = args, identity_of(args.model)
        self.report = {"seed": args.seed, "things": len(data.names)}

    def draw(self, name: str, jobs: Sequence[Job], guidance_scale: float, sampler: Sampler = FAST) -> Tensor:
        """Images [N, 3, S, S] in [-1, 1] of all jobs, from --out if they are there."""
        asked = [(job.prompts(), list(job.seeds)) for job in jobs]
        made = (asked, guidance_scale, sampler, self.identity, str(self.cascade.dtype))
        digest = hashlib.sha256(repr(made).encode()).hexdigest()[:16]
        path = self.args.out / "images" / f"{name}_{digest}.safetensors"
        if not path.is_file():
            batches = [batch for job in jobs for batch in job.batches(self.batch_size)]
            mine = batches[rank() :: num_processes()]  # which may be none of a short list
            drawn = super().draw(name, mine, guidance_scale, sampler) if mine else torch.empty(0)
            shapes = [(len(batch.seeds), 3, self.side, self.side) for batch in batches]
            images = gathered(drawn.split([len(batch.seeds) for batch in mine]), shapes)
            if rank() == 0:
                save_tensors(path, {"images": torch.cat(images)}, {"name": name})
            wait()
        return load_tensors(path, ["images"])[0]["images"]

    def each(self, draw: Callable[[int], Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """As of `Exam`, shared among the processes."""
        mine = range(rank(), len(shapes), num_processes())
        return gathered(super().each(lambda k: draw(mine[k]), [shapes[k] for k in mine]), shapes)

    def show(self, name: str, rows: Sequence[Tensor], row_labels: Sequence[str] = (), labels: Sequence[str] = ()):
        """As a figure in --out."""
        if rank() == 0:
            options = {"row_labels": row_labels, "column_labels": labels, "zoom": max(1, 128 // rows[0].shape[-1])}
            images = [[x / 2 + 0.5 for x in row] for row in rows]
            save_grid(self.args.out / f"{name.replace('+', 'p')}.png", images, **options, seed=self.seed)

    def keep(self, section: str, measures):
        """Write the report each time, so that a late failure loses nothing."""
        self.report[section] = measures
        if rank() > 0:
            return
        write_atomically(self.args.out / "report.json", json.dumps(self.report, indent=2).encode())
        print(f"{section}: {json.dumps(measures)}", flush=True)


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
