"""UNets from a folder or the Hub: found, downloaded and memory-mapped, without a second copy in memory."""

import contextlib
import hashlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ddpm.tools.cpu import can_pack, pack_convolutions, plain_convolutions
from ddpm.tools.files import (
    FLOATS,
    check_tensors,
    first_line,
    mapped,
    opened,
    parse_json,
    read_small,
    write_atomically,
)
from ddpm.tools.memory import check_memory
from ifmodel.config import UNetConfig
from ifmodel.offload import offload
from ifmodel.unet import UNet

WEIGHTS = "diffusion_pytorch_model"
# Which files are looked for, in this order: None for the full precision
VARIANTS = {
    torch.float32: (None, "fp16", "bf16"),
    torch.bfloat16: ("bf16", "fp16", None),
    torch.float16: ("fp16", None, "bf16"),
}
SHIPPED = {f"tiny-if/{stage}": Path(__file__).parent / "tiny" / "weights" / stage for stage in ("I", "II")}
CHECKED = Path("~/.cache/pixel-diffusion/checked").expanduser()  # downloads whose sha256 was verified


def load_unet(
    source: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    variant: str | None = None,
    revision: str | None = None,
    pack: bool = False,
    room: int | None = None,
) -> UNet:
    """The UNet of a folder or a Hub repository, in evaluation mode.

    source: a folder that holds unet/, as diffusers saves it; a Hub id such as "DeepFloyd/IF-I-M-v1.0"; or one of
        SHIPPED, "tiny-if/I" (or "tiny-if") and "tiny-if/II", the small model that comes with this package
    variant: "fp16" or "bf16", as in diffusion_pytorch_model.fp16.safetensors; None for the full-precision file
    revision: the branch, tag or commit of a Hub repository
    pack: on the CPU, reorder the weights of convolutions for oneDNN at the first step, see `ddpm.tools.cpu`: faster,
        but a copy in memory, without gradients, deepcopy or a whole state_dict(); ignored where `can_pack` is false
    room: the bytes of the device that its weights may take, the rest is read from the files at every step (`offload`);
        None for all that it needs, and nothing is read again

    The UNet is built without memory and takes its weights from the memory-mapped files as they are: in the
    dtype of the file on the CPU, and not packed, they are not copied at all.
    Raises FileNotFoundError when a file is missing, ValueError when the config or the weights do not fit.
    """
    config = load_config(source, revision)
    files = find_weights(source, variant, revision)
    folder, on_cpu = files[0].parent, torch.device(device).type == "cpu"
    pack = pack and on_cpu and can_pack(dtype)
    with torch.device("meta"):
        unet = UNet(config).to(dtype).eval().requires_grad_(False)
    held = list(unet.parameters())
    stored = stored_dtypes(files)
    if odd := stored - FLOATS:
        raise ValueError(f"the weights in {folder} are {odd.pop()}, not floating-point numbers of 16 bits or more")
    if room is not None:
        check_tensors(f"the weights in {folder} do not fit its config.json", unet.state_dict(), mapped(files))
        return offload(unet, files, device, room)
    if pack and stored == {dtype}:  # a copy on top of the file; of a converted model it takes the place
        held += [convolution.weight for _, _, convolution in plain_convolutions(unet)]
    needed = sum(parameter.numel() for parameter in held) * dtype.itemsize
    check_memory(needed, f"{folder} in {str(dtype).removeprefix('torch.')}", device)
    loaded: dict[str, Tensor] = {}
    for path in files:
        with opened(path, device) as file:
            loaded |= {name: file.get_tensor(name).to(dtype) for name in file.keys()}  # noqa: SIM118
    check_tensors(f"the weights in {folder} do not fit its config.json", unet.state_dict(), loaded)
    unet.load_state_dict(loaded, assign=True)
    if not on_cpu:
        unet.to(memory_format=torch.channels_last)
    elif pack:
        pack_convolutions(unet)
    return unet


def find_weights(source: str | Path, variant: str | None = None, revision: str | None = None) -> list[Path]:
    """The safetensors files of a model's UNet in one precision, downloaded if need be. Raises as `load_unet` does."""
    return _weight_files(fetch(source, "unet", weight_patterns(WEIGHTS, variant), revision), variant)


def stored_dtypes(files: Sequence[Path]) -> set[torch.dtype]:
    """The dtypes of the tensors in safetensors files, which are mapped and not read. Raises ValueError if damaged."""
    return {tensor.dtype for tensor in mapped(files).values()}


def load_config(source: str | Path, revision: str | None = None) -> UNetConfig:
    """The config of a model's UNet, without its weights. Raises as `load_unet` does."""
    path, config = read_json(source, "unet", "config.json", revision)
    if config is None:
        trained = Path(source) / "model"
        meant = f"did you mean {trained}?" if (trained / "unet" / "config.json").is_file() else ""
        needed = meant or f"{source} must hold unet/config.json and its weights"
        raise FileNotFoundError(f"{path.parent} has no config.json: {needed}")
    try:
        return UNetConfig.from_dict(config)
    except ValueError as error:  # such as Stable Diffusion's upscaler, IF's own third stage
        raise ValueError(f"{source} is no IF model of a kind that is implemented here: {error}") from None


def read_json(source: str | Path, subfolder: str, name: str, revision: str | None = None) -> tuple[Path, dict | None]:
    """Where a model's .json file is, and its fields; None when there is no such file. Raises ValueError if damaged."""
    path = fetch(source, subfolder, [name], revision) / name
    if not path.is_file():
        return path, None
    config = parse_json(read_small(path), path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not the config of a model: it holds a {type(config).__name__}")
    return path, config


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files of one precision: a single one, or the shards that an index names."""
    stem = WEIGHTS if variant is None else f"{WEIGHTS}.{variant}"
    single = folder / f"{stem}.safetensors"
    if single.is_file():
        return [single]
    for index in (folder / name for name in index_names(WEIGHTS, variant)):
        if not index.is_file():
            continue
        shards = shards_of(index)
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, which {index.name} names")
        return shards
    there = sorted(path.name for path in folder.glob("*.safetensors"))
    hint = f"it has {', '.join(there)}" if there else "it has no safetensors at all"
    raise FileNotFoundError(f"{folder} has no {single.name}: {hint}")


def shards_of(index: Path) -> list[Path]:
    """The files that an index of weights names. Raises ValueError when it names none, or one outside of its folder."""
    try:
        names = sorted({str(Path(name)) for name in parse_json(read_small(index), index)["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} does not say which files hold the weights: download it again") from None
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index} names {outside[0]}, which is not in its folder: download it again")
    if not names:
        raise ValueError(f"{index} names no files: download it again")
    return [index.with_name(name) for name in names]


def fetch(source: str | Path, subfolder: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """One subfolder of a model: that of a folder as it is, or of a Hub repository, downloaded to the Hub's cache.

    patterns: the files to download, such as "config.json"; nothing else is
    Raises ValueError, in one line that says what to do, when the repository is out of reach.
    """
    source = "tiny-if/I" if str(source) == "tiny-if" else source  # which has the text encoder
    if str(source) in SHIPPED:
        return SHIPPED[str(source)] / subfolder
    if Path(source).is_dir():
        return Path(source) / subfolder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    wanted = [f"{subfolder}/{pattern}".lstrip("/") for pattern in patterns]  # "" is the repository's own folder
    shipped = "" if "/" in str(source) else f" (shipped are tiny-if, {', '.join(SHIPPED)})"
    licence = f"accept its licence at https://huggingface.co/{source}, then run `hf auth login` or set HF_TOKEN"
    try:
        folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=wanted)) / subfolder
    except GatedRepoError:
        raise ValueError(f"{source} is gated: {licence}") from None
    except RepositoryNotFoundError:
        unseen = f"{source} is neither a folder nor a repository of the Hub that you can see"
        raise ValueError(f"{unseen}{shipped}") from None
    except Exception as error:  # whatever the network and its client may raise
        if isinstance(error, HfHubHTTPError) and getattr(error.response, "status_code", None) == 401:
            raise ValueError(f"the Hub refuses your token for {source}, it may have expired: {licence}") from None
        reason = first_line(error)
        raise ValueError(f"{source} is no folder, and could not be downloaded: {reason}{shipped}") from None
    for path in sorted(folder.glob("*.safetensors")):
        _check_download(path)
    return folder


def _check_download(path: Path):
    """Refuse a large file of the Hub's cache whose sha256 is not the one that it is named by; each is checked once."""
    blob = path.resolve()
    if not re.fullmatch("[0-9a-f]{64}", blob.name):
        return
    seen, now = CHECKED / blob.name, f"{blob.stat().st_size} {blob.stat().st_mtime_ns}"
    if seen.is_file() and seen.read_text() == now:
        return
    if blob.stat().st_size > 1e9:
        print(f"checking {path.name}, {blob.stat().st_size / 1e9:.1f} GB, once", file=sys.stderr)
    digest = hashlib.sha256()
    with blob.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    if digest.hexdigest() != blob.name:
        raise ValueError(f"{path} is damaged: its sha256 is not the Hub's; delete {blob} and run again")
    with contextlib.suppress(OSError):  # with no place to remember it, look again next time
        write_atomically(seen, now.encode())


def weight_patterns(stem: str, variant: str | None) -> list[str]:
    """The safetensors files of one precision, in one piece or in shards: never the .bin copies."""
    named = stem if variant is None else f"{stem}.{variant}"
    return ["config.json", f"{named}.safetensors", f"{named}-*-of-*.safetensors", *index_names(stem, variant)]


def index_names(stem: str, variant: str | None) -> list[str]:
    """What the index of a precision's shards may be called: diffusers has moved the variant in its name."""
    if variant is None:
        return [f"{stem}.safetensors.index.json"]
    return [f"{stem}.safetensors.index.{variant}.json", f"{stem}.safetensors.{variant}.index.json"]
