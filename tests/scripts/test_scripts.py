"""Every script end to end on the committed digits, and every bad input: one clear line, exit status 2."""

import errno
import io
import json
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.datasets import MNIST

import ddpm.losses
from ddpm.mnist import ClassFlow, ClassUNet, TimeFlow, TimeUNet, UNet, sample_digits
from ddpm.mnist.checkpoint import SHIPPED, load_model, save_weights
from ddpm.mnist.data import FILES, load_mnist
from ddpm.mnist.judge import Judge
from ddpm.sampling import noise_source
from ddpm.schedule import linear_schedule
from ddpm.tools.files import load_tensors, save_tensors, write_atomically
from shared.options import add_output_options, parser, run
from tests.conftest import DATA, ROOT, settled

TRAIN = ("--data", DATA, "--width", 4, "--limit", 300)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A weights file of each kind, of small untrained models."""
    folder, files = tmp_path_factory.mktemp("weights"), {}
    torch.manual_seed(0)
    kinds = (UNet, TimeUNet, ClassUNet, TimeFlow, ClassFlow)
    models = {kind.__name__: settled(kind(4)) for kind in kinds}
    for name, model in {**models, "Judge": Judge(4)}.items():
        files[name] = folder / f"{name}.safetensors"
        save_weights(files[name], model, {})
    return files


def checked(path):
    """A PNG that is not blank, and what its metadata says."""
    with Image.open(path) as image:
        greys = image.convert("L").histogram()  # text and frames are black and white: images are what is between
        assert sum(greys[40:216]) > 0.01 * sum(greys)
        return image.size, image.text


# End to end


def test_the_documents_are_finished():
    for name in ("README.md", "weights.md", "scripts/README.md"):
        text = (ROOT / name).read_text()
        assert not re.findall(r"TODO|FIXME|XXX|[A-Z0-9]{4,}TEXT", text)
        for figure in re.findall(r"\]\((?:\.\./)?(\.github/figures/[^)]+)\)", text):
            assert (ROOT / figure).is_file(), figure
    for path in (ROOT / ".github" / "figures").glob("*.png"):
        with Image.open(path) as image:
            command = image.text["Command"]
        assert command.startswith("python scripts/")
        assert not re.search(r"[ =']/|\.\./", command), f"{path.name} names a folder of somebody's machine: {command}"


def stopped_after(steps: int, loss, seen=lambda *arguments: None):
    """A loss that also sends this process a Ctrl-C in its n-th step, and shows its arguments to `seen`."""
    count = []

    def loss_of(*arguments):
        count.append(1)
        if len(count) == steps:
            signal.raise_signal(signal.SIGINT)
        seen(*arguments)
        return loss(*arguments)

    return loss_of


def states_of_a_stopped_run(run_script, monkeypatch, name, loss, options, folder):
    """The states of a run, and of the same run stopped by Ctrl-C in its third step and resumed."""
    status, out, err = run_script(name, *options, "--out", folder / "whole")
    assert status == 0, err
    assert "trained" in out and "img/s" in err and "loss" in err
    with monkeypatch.context() as patched:
        patched.setattr(loss, stopped_after(3, pkgutil.resolve_name(loss)))
        status, _, err = run_script(name, *options, "--out", folder / "parts")
    assert status == 130
    assert "--resume" in err and "Traceback" not in err
    assert len(load_tensors(folder / "parts" / "state.safetensors")[0]["losses"]) == 3
    status, _, err = run_script(name, *options, "--out", folder / "parts", "--resume")
    assert status == 0, err
    return [load_tensors(folder / part / "state.safetensors")[0] for part in ("whole", "parts")]


@pytest.mark.parametrize("condition", ["time", "class"])
def test_train_ddpm_stopped_and_resumed_to_the_same_weights(run_script, monkeypatch, tmp_path, condition):
    options = ("--condition", condition, *TRAIN, "--epochs", 2, "--sample-epochs", 1, "--sample-steps", 2)
    whole, parts = states_of_a_stopped_run(
        run_script, monkeypatch, "train_ddpm", "ddpm.losses.ddpm_loss", options, tmp_path
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    for figure in ("loss.png", "samples_epoch01.png", "samples_epoch02.png"):
        _, metadata = checked(tmp_path / "whole" / figure)
        assert metadata["Seed"] == "20040805" and "train_ddpm.py --condition" in metadata["Command"]
    assert len((tmp_path / "whole" / "log.csv").read_text().splitlines()) == 3


def test_train_flow_stopped_and_resumed_to_the_same_weights(run_script, monkeypatch, tmp_path):
    options = ("--condition", "class", *TRAIN, "--epochs", 2, "--sample-steps", 2)
    name, loss = "train_flow", "ddpm.flow.flow_loss"
    whole, parts = states_of_a_stopped_run(run_script, monkeypatch, name, loss, options, tmp_path)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    for figure in ("loss.png", "samples_epoch01.png", "samples_epoch02.png"):
        checked(tmp_path / "whole" / figure)
    assert load_tensors(tmp_path / "whole" / "weights.safetensors")[1]["model"] == "ClassFlow"


def test_train_ddpm_drops_the_class_of_a_tenth(run_script, monkeypatch, tmp_path):
    dropped = []

    def seen(model, x_0, conditioning, *_):
        dropped.extend((conditioning[0].sum(1) == 0).tolist())

    monkeypatch.setattr("ddpm.losses.ddpm_loss", stopped_after(0, ddpm.losses.ddpm_loss, seen))
    options = ("--condition", "class", *TRAIN, "--epochs", 3, "--sample-epochs", 3, "--sample-steps", 1)
    status, _, err = run_script("train_ddpm", *options, "--out", tmp_path)
    assert status == 0, err
    assert sum(dropped) / len(dropped) == pytest.approx(0.1, abs=0.04)  # four standard errors


def test_train_denoiser_stopped_and_resumed_to_the_same_weights(run_script, monkeypatch, tmp_path):
    options = (*TRAIN, "--epochs", 2, "--batch-size", 128)
    whole, parts = states_of_a_stopped_run(
        run_script, monkeypatch, "train_denoiser", "ddpm.mnist.training.denoiser_loss", options, tmp_path
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    checked(tmp_path / "whole" / "denoised_epoch01.png")
    assert load_tensors(tmp_path / "whole" / "weights.safetensors")[1]["model"] == "UNet"


def test_train_denoiser_on_pure_noise_shows_the_mean_digit(run_script, tmp_path):
    options = (*TRAIN, "--epochs", 1, "--batch-size", 20, "--pure-noise", "--dtype", "float32", "--seed", 3)
    status, _, err = run_script("train_denoiser", *options, "--out", tmp_path)
    assert status == 0, err
    with Image.open(tmp_path / "denoised_epoch01.png") as image:
        found = re.match(r"pure noise, after epoch 1: ([\d.]+) RMS from the mean digit", image.text["Description"])
    answers = load_model(tmp_path / "state.safetensors")(noise_source(range(3, 13), (1, 28, 28))())
    mean_digit = load_mnist(DATA, "train", 300)[0].float().mean(0) / 255
    assert float(found[1]) == pytest.approx((answers - mean_digit).square().mean().sqrt().item(), abs=1e-4)


def test_sample_mnist_saves_what_it_draws(run_script, tmp_path, weights):
    out, save = tmp_path / "deep" / "digits.png", tmp_path / "digits.safetensors"
    common = ("--weights", weights["ClassUNet"], "--steps", 3, "--guidance", 2, "--out", out, "--save", save)
    status, printed, err = run_script("sample_mnist", *common, "--per-class", 2)
    assert status == 0, err
    assert printed.splitlines() == [str(out), str(save)]
    checked(out)
    saved, metadata = load_tensors(save)
    assert saved["images"].shape == (20, 1, 28, 28) and saved["images"].dtype == torch.float32
    assert saved["images"].min() >= 0 and saved["images"].max() <= 1
    assert saved["labels"].tolist() == [digit for digit in range(10) for _ in range(2)]
    assert saved["labels"].dtype == torch.int64
    assert metadata["seed"] == 20040805 and metadata["steps"] == 3

    model, labels = load_model(weights["ClassUNet"]), saved["labels"].tolist()
    options = {"num_steps": 3, "guidance_scale": 2.0}
    expected = sample_digits(model, labels, [20040805, 20040806] * 10, linear_schedule(model.num_timesteps), **options)
    torch.testing.assert_close(saved["images"], expected, atol=2e-2, rtol=0)  # --dtype auto may be bfloat16

    # the same digits again, and one more of each: the first two stay as they were
    run_script("sample_mnist", *common, "--per-class", 3)
    more = load_tensors(save)[0]["images"].view(10, 3, 1, 28, 28)
    torch.testing.assert_close(more[:, :2].flatten(0, 1), saved["images"], atol=1e-4, rtol=0)
    run_script("sample_mnist", *common, "--per-class", 1, "--seed", 20040806)
    shifted = load_tensors(save)[0]["images"]
    torch.testing.assert_close(shifted, more[:, 1], atol=1e-4, rtol=0)


def test_sample_mnist_draws_with_flows_and_samplers(run_script, tmp_path, weights):
    common = ("--steps", 3, "--per-class", 1, "--out", tmp_path / "digits.png")
    choices = [("ClassFlow",), ("ClassFlow", "--sampler", "heun", "--animate"), ("TimeFlow",)]
    choices += [("ClassUNet", "--sampler", "dpm++", "--eta", 1), ("TimeUNet", "--sampler", "ddim")]
    for name, *options in [
        *choices,
        ("ClassUNet", "--sampler", "dpm++", "--eta", 1),
        ("TimeUNet", "--sampler", "ddim"),
    ]:
        status, _, err = run_script("sample_mnist", "--weights", weights[name], *common, *options)
        assert status == 0, err
        checked(tmp_path / "digits.png")


def test_a_flow_that_begins_as_the_ddpm_has_its_own_recipe(run_script, tmp_path):
    """That of the shipped one; what is given counts for more."""
    options = ("--condition", "class", "--data", DATA, "--limit", 2, "--from-ddpm", "--sample-steps", 1, "--epochs", 1)
    status, _, err = run_script("train_flow", *options, "--out", tmp_path)
    assert status == 0, err
    files = tmp_path / "weights.safetensors", SHIPPED["flow_class"]
    recipe, shipped = (load_tensors(path)[1]["recipe"] for path in files)
    assert {**recipe, "epochs": 4} == {"average": 0.0, **shipped} and recipe["epochs"] == 1


def test_flows_and_ddpms_are_not_taken_for_one_another(refused, tmp_path, weights):
    out = ("--out", tmp_path / "digits.png")
    assert "for DDPMs" in refused("sample_mnist", "--weights", weights["ClassFlow"], "--sampler", "ddim", *out)
    assert "for flows" in refused("sample_mnist", "--weights", weights["ClassUNet"], "--sampler", "heun", *out)
    assert "eta is for" in refused("sample_mnist", "--weights", weights["ClassFlow"], "--eta", 1, *out)
    for name in ("TimeUNet", "TimeFlow"):
        told = refused("sample_mnist", "--weights", weights[name], "--guidance", 3, *out)
        assert f"--guidance needs a model with classes, and {weights[name]} has none: leave it out" in told
    assert "at least 1 step" in refused("sample_mnist", "--weights", weights["ClassFlow"], "--steps", 0, *out)
    gallery = refused("digits_gallery", "--data", DATA, "--weights", weights["ClassFlow"], "--out", tmp_path / "g")
    assert "holds a ClassFlow (a flow), but a ClassUNet is needed here" in gallery
    start = ("--condition", "class", *TRAIN, "--start", weights["ClassUNet"], "--out", tmp_path / "run")
    assert "holds a ClassUNet (not a flow), but a ClassFlow is needed" in refused("train_flow", *start)
    assert "--from-ddpm is for" in refused("train_flow", "--condition", "time", *TRAIN, "--from-ddpm")


def test_sample_mnist_without_classes(run_script, tmp_path, weights):
    save = tmp_path / "digits.safetensors"
    options = ("--weights", weights["TimeUNet"], "--steps", 2, "--per-class", 2, "--out", tmp_path / "a.png")
    status, _, err = run_script("sample_mnist", *options, "--save", save)
    assert status == 0, err
    saved = load_tensors(save)[0]
    assert saved["labels"].tolist() == [-1] * 20
    assert len({tuple(image.flatten().tolist()) for image in saved["images"]}) == 20


def test_denoise_mnist(run_script, tmp_path, weights):
    status, _, err = run_script("denoise_mnist", "--data", DATA, "--weights", weights["UNet"], "--out", tmp_path)
    assert status == 0, err
    (_, rows_b1), (_, rows_b3) = (checked(tmp_path / name)[0] for name in ("b1_noising.png", "b3_denoised.png"))
    assert rows_b3 > 1.8 * rows_b1


def test_evaluate_mnist_goes_on_where_it_was(run_script, tmp_path, weights):
    options = ("--data", DATA, "--weights", weights["ClassUNet"], "--denoiser", weights["UNet"], "--train-judge")
    options = (*options, "--samples", 200, "--steps", 1, "--digits", 50, "--out", tmp_path)
    status, _, err = run_script("evaluate/mnist", *options, "--guidance", 1)
    assert status == 0, err
    chunks = sorted((tmp_path / "samples").rglob("*.safetensors"))
    assert len(chunks) == 2
    first, made = json.loads((tmp_path / "report.json").read_text()), [chunk.stat().st_mtime_ns for chunk in chunks]
    run_script("evaluate/mnist", *options, "--guidance", 1, 3)
    second = json.loads((tmp_path / "report.json").read_text())
    assert [chunk.stat().st_mtime_ns for chunk in chunks] == made
    assert second["guidance"][0] == first["guidance"][0]
    assert [row["guidance"] for row in second["guidance"]] == [1, 3]
    assert second["denoiser_mse"].keys() == {"0.0", "0.2", "0.4", "0.5", "0.6", "0.8", "1.0"}
    assert second["fid_floor"] < second["guidance"][0]["fid"]  # an untrained model is further away than real digits
    checked(tmp_path / "guidance.png")
    checked(tmp_path / "misread_g1.png")


def test_flow_velocity(run_script, refused, tmp_path, weights):
    out = ("--data", DATA, "--weights", weights["TimeFlow"], "--out", tmp_path / "velocity.png")
    status, _, err = run_script("flow_velocity", *out)
    assert status == 0, err
    checked(tmp_path / "velocity.png")
    assert "--times must be" in refused("flow_velocity", *out, "--times", 2)


def test_evaluate_mnist_compares_samplers(run_script, refused, tmp_path, weights):
    curves = [f"{weights['ClassUNet']}:ddim", f"{weights['ClassFlow']}:heun"]
    options = ("--data", DATA, "--samples", 100, "--guidance", 1, "--evaluations", 1, 2, "--out", tmp_path)
    status, _, err = run_script("evaluate/mnist", *options, "--curves", *curves)
    assert status == 0, err
    made = json.loads((tmp_path / "samplers.json").read_text())["curves"]
    assert [[row["evaluations"] for row in made[curve]] for curve in curves] == [[1, 2], [2]]  # heun asks twice a step
    checked(tmp_path / "samplers.png")
    assert "--curves are WEIGHTS:SAMPLER" in refused("evaluate/mnist", *options, "--curves", "ddpm_class")


def test_digits_gallery_with_the_shipped_weights(run_script, tmp_path):
    """A real trained model: most anagrams of 6 and 9 are read in both views, and what is known stays known."""
    options = ("--data", DATA, "--samples", 10, "--steps", 15, "--dtype", "float32", "--only", "anagram", "inpaint")
    status, out, err = run_script("digits_gallery", *options, "--out", tmp_path)
    assert status == 0, err
    measures = json.loads((tmp_path / "measures.json").read_text())
    assert measures["anagram"]["both"] >= 0.7
    assert measures["inpaint"]["confirmed"] >= 0.7
    checked(tmp_path / "anagram.png")
    checked(tmp_path / "inpaint.png")
    assert "both" in out


def test_digits_gallery_draws_the_others(run_script, tmp_path, weights):
    options = ("--data", DATA, "--samples", 4, "--steps", 2, "--weights", weights["ClassUNet"], "--only")
    status, _, err = run_script("digits_gallery", *options, "sdedit", "hybrid", "--out", tmp_path)
    assert status == 0, err
    assert json.loads((tmp_path / "measures.json").read_text()).keys() >= {"sdedit", "hybrid", "steps", "guidance"}
    checked(tmp_path / "sdedit.png")
    checked(tmp_path / "hybrid.png")


def test_bench_mnist(run_script):
    options = ("--rounds", 1, "--steps", 1, "--batch-size", 4, "--sample-digits", 2)
    status, out, err = run_script("bench/mnist", "--data", DATA, "--dtype", "float32", *options)
    assert status == 0, err
    losses = [float(line.split("loss ")[1].split()[0]) for line in out.splitlines() if "images/s" in line]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # the same digits, timesteps and noise on both sides
    assert "ours is" in out and "× ours" in out and "outside convolutions" in out


@pytest.mark.parametrize("geometry", ["tiny", "tiny-II"])
def test_bench_if_compares_with_diffusers(run_script, tmp_path, geometry):
    out = tmp_path / "bench.json"
    options = ("--geometry", geometry, "--rounds", 1, "--size", 32, 32, "--dtype", "float32", "--out", out)
    status, told, err = run_script("bench/unet", *options, *(["--cold"] if geometry == "tiny" else []))
    assert status == 0, err
    report = json.loads(out.read_text())
    assert report["agreement"]["relative_error"] < 1e-4
    assert report["floor"]["seconds"] > 0
    for part in ("step", "sample"):
        assert set(report[part]) == {"ours", "diffusers, documented", "diffusers, tuned"}
        for side in report[part].values():
            assert 0 < side["min"] <= side["median"] <= side["max"]
        assert report[part]["ours"]["times_ours"] == 1
    if geometry == "tiny":
        assert report["cold"]["ours"]["peak_bytes"] > 1e8
        assert "from its start to the PNG" in told


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository's history")
def test_bench_page_makes_the_page_of_both_commits(run_script):
    status, out, err = run_script("bench/page", "HEAD", "--only", "A1,B2", "--avx2")
    assert status == 0, err
    rows = {line.split("  ")[0]: [float(cell) for cell in line.split()[-3:]] for line in out.splitlines()[2:]}
    assert rows.keys() == {"A1", "first figure", "whole"}
    for ours, earlier, ratio in rows.values():
        assert ours > 0 and earlier > 0 and ratio == pytest.approx(ours / earlier, rel=0.3)  # of rounded ones
    assert all(rows["A1"][side] < rows["whole"][side] for side in (0, 1))
    status, _, err = run_script("bench/page", "no-such-commit")
    assert status == 2 and "no commit 'no-such-commit'" in err


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository's history")
def test_bench_page_times_digits_of_both_commits(run_script, refused):
    status, out, err = run_script("bench/page", "HEAD", "--digits", 1)
    assert status == 0, err
    name, ours, earlier, ratio = out.splitlines()[-1].split()
    assert name == "whole" and float(ratio) == pytest.approx(float(ours) / float(earlier), rel=0.1)
    assert "leave it or --digits" in refused("bench/page", "HEAD", "--digits", 1, "--only", "A1")


@pytest.mark.parametrize("stage", [1, 2])
def test_bench_train_if_trains_the_same_on_both_sides(run_script, stage):
    options = ("--stage", stage, "--rounds", 1, "--steps", 1, "--batch-size", 2, "--dtype", "float32")
    status, out, err = run_script("bench/training", *options)
    assert status == 0, err
    losses = [float(line.split("loss ")[1].split()[0]) for line in out.splitlines() if "images/s" in line]
    assert len(losses) == 3
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)


@pytest.mark.parametrize(
    "name",
    sorted(
        str(path.relative_to(ROOT / "scripts").with_suffix(""))
        for path in (ROOT / "scripts").rglob("*.py")
        if "__main__" in path.read_text()
    ),
)
def test_help_shows_a_command(run_script, name):
    status, out, _ = run_script(name, "--help")
    assert status == 0
    assert f"python scripts/{name}.py" in out


# Bad input


@pytest.fixture
def sample(refused, weights, tmp_path):
    """sample_mnist with an --out that exists and must survive; returns the error line."""
    out = tmp_path / "digits.png"
    out.write_bytes(b"precious")

    def run(*arguments):
        line = refused("sample_mnist", "--weights", weights["ClassUNet"], "--out", out, *arguments)
        assert out.read_bytes() == b"precious"
        return line

    return run


@pytest.mark.parametrize("steps", ["0", "-3", "301"])
def test_impossible_steps(sample, steps):
    assert f"from 1 to 300, the timesteps of the schedule, not {steps}" in sample("--steps", steps)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--per-class", "0"], "'0' is not a whole number from 1 to 1000000"),
        (["--guidance", "nan"], "'nan' is not a finite number"),
        (["--guidance", "high"], "'high' is not a finite number"),
        (["--sampler", "ddim", "--eta", "2"], "eta must be from 0 to 1, not 2"),
        (["--device", "tpu"], "device 'tpu' is not on this machine: choose from auto"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--colour"], "unrecognized arguments: --colour (see --help)"),
        (["--num-inference-steps", "20"], "arguments: --num-inference-steps 20: did you mean --steps?"),
        (["--stpes", "20"], "unrecognized arguments: --stpes 20: did you mean --steps?"),
        (["--guidance-scale=3"], "unrecognized arguments: --guidance-scale=3: did you mean --guidance?"),
        (["--save", "digits.pt"], "digits.pt must end in .safetensors"),
    ],
)
def test_impossible_options(sample, arguments, said):
    assert said in sample(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there(sample, refused):
    assert "device 'cuda' is not on this machine" in sample("--device", "cuda")
    assert "device 'cuda'" in refused("train_denoiser", "--data", DATA, "--device", "cuda")


def test_outputs_that_cannot_be_written(refused, weights, tmp_path):
    (tmp_path / "file").write_text("in the way")
    below = tmp_path / "file" / "digits.png"
    assert "cannot write in" in refused("sample_mnist", "--weights", weights["ClassUNet"], "--out", below)
    (tmp_path / "folder.png").mkdir()
    assert "is a folder" in refused("sample_mnist", "--out", tmp_path / "folder.png")
    assert "must end in .png" in refused("sample_mnist", "--out", tmp_path / "digits.jpg")
    assert "cannot write in" in refused("train_denoiser", "--data", DATA, "--out", tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(refused, weights, tmp_path):
    tmp_path.chmod(0o500)
    line = refused("sample_mnist", "--weights", weights["ClassUNet"], "--out", tmp_path / "digits.png")
    tmp_path.chmod(0o700)
    assert "cannot write in" in line


def test_weights_that_are_missing_damaged_or_of_another_model(sample, refused, weights, tmp_path):
    def said(path):
        return sample("--weights", path)

    assert "no weights file at" in said(tmp_path / "nowhere.safetensors")
    assert "no weights file at ddpm_clas: name one, or one that is shipped (denoiser, " in said("ddpm_clas")
    path = tmp_path / "weights.safetensors"
    path.write_text("not safetensors at all")
    assert "is no whole safetensors file" in said(path)
    whole = weights["ClassUNet"].read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "is no whole safetensors file" in said(path)
    assert "holds a UNet, but a ClassUNet or TimeUNet or ClassFlow or TimeFlow is needed here" in said(weights["UNet"])
    assert "holds a Judge" in said(weights["Judge"])
    save_tensors(path, {"x": torch.zeros(1)}, {})
    assert "holds no MNIST model" in said(path)
    save_weights(path, ClassUNet(4), {"config": {"width": 5, "num_timesteps": 300}})
    assert "does not fit the ClassUNet that its metadata describes" in said(path)
    save_weights(path, ClassUNet(4), {"config": {"depth": 5}})
    assert "does not fit" in said(path)
    assert "is needed here" in refused("denoise_mnist", "--data", DATA, "--weights", weights["ClassUNet"])


def test_a_training_state_can_be_sampled_and_weights_cannot_be_resumed(run_script, refused, tmp_path):
    options, state = ("--condition", "class", *TRAIN, "--out", tmp_path), tmp_path / "state.safetensors"
    status, _, err = run_script("train_ddpm", *options, "--epochs", 1, "--sample-steps", 2)
    assert status == 0, err
    status, _, err = run_script("sample_mnist", "--weights", state, "--steps", 1, "--out", tmp_path / "a.png")
    assert status == 0, err
    shutil.copy(tmp_path / "weights.safetensors", state)
    assert "only a training state" in refused("train_ddpm", *options, "--resume")


def test_mnist_that_is_missing(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens there
    for script in (["train_denoiser"], ["train_ddpm", "--condition", "time"], ["bench/mnist"]):
        line = refused(*script, "--data", tmp_path / "nowhere")
        assert all(name in line for name in FILES)
        assert str(tmp_path / "nowhere" / "MNIST" / "raw") in line


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "empty", "scrambled"])
def test_mnist_that_is_damaged(refused, tmp_path, name, damage):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in FILES:
        (raw / file).write_bytes((DATA / "MNIST" / "raw" / file).read_bytes())
    whole = (raw / name).read_bytes()
    (raw / name).write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "scrambled": b"\xff" + whole}[damage])
    # both splits are read by this script
    line = refused("train_denoiser", "--data", tmp_path, "--width", 4, "--out", tmp_path / "run")
    assert "is damaged" in line and name in line
    assert not (tmp_path / "run" / "state.safetensors").exists()


def test_a_run_in_the_way(refused, run_script, tmp_path):
    options = ("train_denoiser", *TRAIN, "--epochs", 1, "--out", tmp_path)
    run_script(*options)
    before = (tmp_path / "weights.safetensors").read_bytes()
    assert "add --resume" in refused(*options)
    assert "another recipe" in refused(*options, "--resume", "--batch-size", 7)
    assert "another digits: 300, not 200" in refused(*options, "--resume", "--limit", 200)
    assert (tmp_path / "weights.safetensors").read_bytes() == before


def test_a_terminal_without_greek(monkeypatch):
    """Such as PYTHONIOENCODING=ascii: γ becomes a question mark."""
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), "ascii"))
    run(lambda: print("γ = 5", flush=True))
    assert out.buffer.getvalue() == b"? = 5\n"


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_closed_streams(tmp_path, closed):
    script = f"{ROOT / 'scripts' / 'forward_process.py'} --size 16 --out {tmp_path / 'out.png'}"
    for timestep, status in ((500, 0), (5000, 2)):
        command = f"{sys.executable} {script} --timesteps {timestep} {closed}"
        assert subprocess.run(command, shell=True, capture_output=True).returncode == status
        assert (tmp_path / "out.png").exists() == (status == 0)
        (tmp_path / "out.png").unlink(missing_ok=True)


def test_weights_are_not_overwritten_by_what_they_draw(refused, weights, tmp_path):
    before = weights["ClassUNet"].read_bytes()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(before)
    for named in (path, tmp_path):  # the file, the run's folder
        assert "would overwrite --weights" in refused("sample_mnist", "--weights", named, "--steps", 1, "--save", path)
    assert path.read_bytes() == before


def test_files_without_their_tensors_are_refused(tmp_path):
    save_tensors(tmp_path / "drawn.safetensors", {"labels": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match=r"drawn.safetensors has no 'images': delete it"):
        load_tensors(tmp_path / "drawn.safetensors", ["images", "labels"])


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    write_atomically(path, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device, not written") as error:
        write_atomically(path, b"new")
    assert error.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_tilde_is_home_even_where_the_shell_leaves_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    options = parser("")
    add_output_options(options, "out.png")
    assert options.parse_args(["--out=~/dog.png"]).out == Path("/home/me/dog.png")
