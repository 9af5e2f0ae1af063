"""A folder of captioned pictures as training data: pictures on white, in four styles, and what to call them.

The folder has the "imagefolder" layout of Hugging Face datasets: pictures, and metadata.jsonl with a line for each,
{"file_name": …, "text": its short name, "tags": [more words]}. The four styles give the assignment's prompts a
meaning: "a photo of X" is the picture as it is, "an oil painting of X", "a lithograph of X" and "a sketch of X" are
filtered.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from tqdm import tqdm

from ddpm.files import first_line, parse_json

STYLES = {
    "photo": ("a photo of {}", "{}", "a high quality photo of {}"),
    "oil": ("an oil painting of {}",),
    "lithograph": ("a lithograph of {}",),
    "sketch": ("a sketch of {}",),
}
ANYTHING = "a high quality photo"  # the prompt that fits every picture in its plain style

# Other names, so that every prompt of the assignment finds its picture.
ALIASES = {
    "snow-capped mountain": ("a snowy mountain village", "a snowy mountain"),
    "rocket": ("a rocket ship",),
    "camping": ("people around a campfire", "a campfire"),
    "old man": ("an old man",),
    "detective": ("a man wearing a hat",),
    "dog face": ("a dog",),
    "skull": ("a skull",),
    "water wave": ("waterfalls", "a waterfall"),
    "beach with umbrella": ("the amalfi coast", "a beach"),
    "person: beard": ("a hipster barista", "a man with a beard"),
    "cat face": ("a cat",),
    "horse face": ("a horse",),
}

# Pictures that can be told apart at 32 × 32, the assignment's first
CURATED = """
snow-capped mountain; rocket; camping; old man; detective; dog face; skull; water wave; beach with umbrella
person: beard; cat face; horse face; grinning face; smiling face with sunglasses; crying face; angry face; ghost
alien; robot; clown face; red heart; thumbs up; eye; ear; nose; mouth; brain; tooth; bone; baby; old woman
police officer; princess; Santa Claus; monkey face; fox; raccoon; lion; tiger face; zebra; deer; cow face; pig face
goat; giraffe; elephant; mouse face; rabbit face; hedgehog; bat; bear; koala; panda; rooster; baby chick; penguin
eagle; duck; swan; owl; flamingo; peacock; parrot; frog; crocodile; turtle; snake; dragon face; sauropod; T-Rex
spouting whale; dolphin; tropical fish; shark; octopus; crab; snail; butterfly; honeybee; lady beetle; spider
cherry blossom; rose; hibiscus; sunflower; tulip; potted plant; evergreen tree; palm tree; cactus; four leaf clover
maple leaf; mushroom; grapes; watermelon; lemon; banana; pineapple; red apple; pear; cherries; strawberry
kiwi fruit; tomato; avocado; eggplant; carrot; ear of corn; broccoli; bread; croissant; pretzel; pancakes
cheese wedge; hamburger; french fries; pizza; hot dog; taco; egg; popcorn; sushi; soft ice cream; doughnut; cookie
birthday cake; cupcake; lollipop; hot beverage; teapot; wine glass; cocktail glass; beer mug; volcano; desert; house
castle; church; tent; fountain; night with stars; sunset; ferris wheel; locomotive; bus; ambulance; fire engine
taxi; automobile; tractor; racing car; motorcycle; bicycle; stop sign; anchor; sailboat; ship; airplane; helicopter
flying saucer; hourglass done; alarm clock; full moon; crescent moon; sun; ringed planet; star; cloud
cloud with rain; tornado; rainbow; umbrella; snowflake; snowman; fire; droplet; jack-o-lantern; Christmas tree
balloon; wrapped gift; trophy; soccer ball; basketball; tennis; bullseye; kite; pool 8 ball; teddy bear
artist palette; glasses; t-shirt; dress; crown; top hat; bell; guitar; violin; drum; trumpet; telephone; laptop
television; camera; candle; light bulb; books; envelope; pencil; scissors; key; hammer; gear; magnet; microscope
pill; door; chair; shopping cart; moai
"""

# What a caption may begin with in an article's place
DETERMINERS = {
    *("a", "an", "the", "this", "that", "these", "those", "my", "your", "his", "her", "its", "our", "their"),
    *("some", "several", "many", "all", "both", "no", "two", "three", "four", "five", "six", "seven", "eight"),
    *("nine", "ten", "eleven", "twelve", *"123456789"),
}


def curated() -> list[str]:
    """The names in CURATED."""
    return [name.strip() for line in CURATED.strip().splitlines() for name in line.split(";")]


def with_article(name: str) -> str:
    """A short name as it is said in a sentence: "rocket" -> "a rocket", "ear" -> "an ear", "glasses" as it is.

    So is a caption that needs none: "A red bird on a branch", "two dogs on grass", "Paris at night in the rain".
    """
    words = name.lower().split()
    determined = words[0] in DETERMINERS and name != "four leaf clover"  # which is one clover
    plural = name.endswith("s") and not name.endswith("ss")
    plural_first = words[0].endswith("s") and not words[0].endswith(("ss", "us"))
    said_in_full = len(words) > 3 and (name[0].isupper() or plural_first)
    if determined or plural or said_in_full:
        return name
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


@dataclass(frozen=True)
class CaptionedImages:
    """Pictures in every style, and what each may be called.

    pictures: [N, styles, 3, S, S] uint8, the styles in the order of STYLES
    names: [N], the short names
    phrases: [N], what fits into a style's captions: the name with its article, and its aliases
    tags: [N], more words for each
    """

    pictures: Tensor
    names: list[str]
    phrases: list[list[str]]
    tags: list[list[str]]

    def caption(self, index: int, style: int, generator: torch.Generator) -> str:
        """One of the captions that fit a picture in a style."""
        template = pick(list(STYLES.values())[style], generator)
        if style == 0 and torch.rand(1, generator=generator) < 0.05:
            return ANYTHING
        phrases = self.phrases[index]
        # an alias as often as the name
        phrase = phrases[0] if torch.rand(1, generator=generator) < 0.5 else pick(phrases, generator)
        if self.tags[index] and torch.rand(1, generator=generator) < 0.1:
            phrase = f"{phrase}, {pick(self.tags[index], generator)}"
        return template.format(phrase)

    def fingerprint(self) -> str:
        """A short hash of the names, captions and pixels."""
        digest = hashlib.sha256(json.dumps([self.names, self.phrases, self.tags]).encode())
        digest.update(self.pictures.contiguous().numpy())
        return digest.hexdigest()[:12]

    def all_captions(self) -> list[str]:
        """Every caption without tags, and a line of tags for each picture: what a tokenizer is trained on."""
        templates = [template for group in STYLES.values() for template in group]
        said = [template.format(phrase) for phrases in self.phrases for phrase in phrases for template in templates]
        return [ANYTHING, *said, *(", ".join(tags) for tags in self.tags if tags)]


def pick(choices: Sequence, generator: torch.Generator):
    """One of several, each as likely."""
    return choices[int(torch.randint(len(choices), (1,), generator=generator))]


def held_out(folder: str | Path, count: int) -> list[str]:
    """So many of a folder's short names, spread evenly over those that are not CURATED: to test on, not to train on.

    Raises as `load_captioned` does, and ValueError when the folder has no more names than that.
    """
    known = set(curated())
    names = list(dict.fromkeys(row["text"] for row in read_metadata(folder) if row["text"] not in known))
    if count >= len(names):
        raise ValueError(f"{folder} has {len(names)} names to choose from: {count} of them cannot be held out")
    return names[:: len(names) // count][:count] if count else []


def load_captioned(
    folder: str | Path, size: int, names: Sequence[str] | None = None, without: Sequence[str] = (), quiet: bool = False
) -> CaptionedImages:
    """A folder of pictures with metadata.jsonl, each picture in size × size pixels and every style.

    names: the short names to take, in this order; None takes all
    without: short names to leave out
    quiet: no progress bar, which else is shown for a hundred pictures or more
    Raises FileNotFoundError when the folder or its pictures are not there, ValueError when a line is broken, a
    caption is missing, a picture is too small, or a name is not in the folder; each in one line that names it.
    """
    folder = Path(folder)
    rows = read_metadata(folder)
    if names is not None:
        by_name = {row["text"]: row for row in rows}
        unknown = [name for name in names if name not in by_name]
        if unknown:
            raise ValueError(f"{folder} has no {', '.join(unknown[:5])}{', …' if len(unknown) > 5 else ''}")
        rows = [by_name[name] for name in names]
    rows = [row for row in rows if row["text"] not in without]
    missing = [row["file_name"] for row in rows if not (folder / row["file_name"]).is_file()]
    if missing:
        more = ", …" if len(missing) > 5 else ""
        raise FileNotFoundError(f"{folder} lacks {len(missing)} pictures: {', '.join(missing[:5])}{more}")
    with tqdm(rows, desc="pictures", unit="picture", leave=False, disable=quiet or len(rows) < 100) as bar:
        pictures = torch.stack([torch.stack(styled(folder / row["file_name"], size)) for row in bar])
    found = [row["text"] for row in rows]
    phrases = [[with_article(name), *ALIASES.get(name, ())] for name in found]
    return CaptionedImages(pictures, found, phrases, [row["tags"] for row in rows])


def read_metadata(folder: str | Path) -> list[dict]:
    """The lines of a folder's metadata.jsonl. Raises as `load_captioned` does."""
    path = Path(folder) / "metadata.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no metadata.jsonl: it needs a line for each picture, file_name and text")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut captions at U+2028
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8, at byte {error.start}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, path)
            row["tags"] = row.get("tags") or []  # null is none
            fits = isinstance(row["file_name"], str) and isinstance(row["text"], str) and row["text"].strip()
            fits = fits and isinstance(row["tags"], list) and all(isinstance(tag, str) for tag in row["tags"])
        except (ValueError, KeyError, TypeError, AttributeError):
            fits = False
        if not fits:
            told = '{"file_name": …, "text": a caption, "tags": [words]}, of which tags may be left out'
            raise ValueError(f"{path}, line {number} is not {told}: {line[:60]!r}")
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # which no tokenizer takes
            told = "has half of a character, a surrogate such as \\ud800 alone: write the whole one"
            raise ValueError(f"{path}, line {number} {told}: {line[:60]!r}") from None
        if Path(row["file_name"]).is_absolute() or ".." in Path(row["file_name"]).parts:
            raise ValueError(f"{path}, line {number} names {row['file_name']!r}, which is not in the folder")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no captions")
    return rows


def styled(path: Path, size: int) -> list[Tensor]:
    """A picture in every style, each [3, size, size] uint8. Raises ValueError when it is no picture or too small."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGBA")  # upright, as a phone's are shown
    except Exception as error:  # PIL raises a dozen kinds
        raise ValueError(f"{path} cannot be read as a picture: {first_line(error)}") from None
    if min(picture.size) < size:
        raise ValueError(f"{path} is too small: {picture.size[0]} × {picture.size[1]}, for training at {size} × {size}")
    plain = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    pictures = [style(plain) for style in (lambda plain: plain, oil, lithograph, sketch)]
    fitted = [ImageOps.fit(picture, (size, size), Image.Resampling.BOX) for picture in pictures]
    return [torch.from_numpy(numpy.array(picture)).permute(2, 0, 1) for picture in fitted]


def oil(plain: Image.Image) -> Image.Image:
    """Broad strokes in warm, strong colours on an ochre ground."""
    width = max(3, min(plain.size) // 20) | 1
    strokes = ImageEnhance.Color(plain.filter(ImageFilter.ModeFilter(width))).enhance(1.4)
    ground = numpy.array([214, 178, 118], dtype=numpy.float32)
    pixels = numpy.asarray(strokes, dtype=numpy.float32)
    generator = numpy.random.default_rng(0)
    canvas = generator.normal(0, 7, (pixels.shape[0] // 4, pixels.shape[1] // 4, 1)).repeat(4, 0).repeat(4, 1)
    canvas = numpy.pad(canvas, [(0, pixels.shape[0] - canvas.shape[0]), (0, pixels.shape[1] - canvas.shape[1]), (0, 0)])
    return Image.fromarray((pixels / 255 * (0.45 * ground + 0.55 * 255) + canvas).clip(0, 255).astype(numpy.uint8))


def lithograph(plain: Image.Image) -> Image.Image:
    """Black ink on grey paper: outlines, and four tones of which the darker ones are hatched."""
    grey = numpy.asarray(ImageOps.autocontrast(plain.convert("L")), dtype=numpy.float32) / 255
    h, w = grey.shape
    y, x = numpy.mgrid[:h, :w]
    period = max(2, min(h, w) // 16)
    tones = numpy.floor(grey * 3.999) / 3
    hatched = numpy.where((tones < 0.9) & ((x + y) % period < period / 3), tones * 0.4, tones)
    outlines = numpy.asarray(sketch(plain).convert("L"), dtype=numpy.float32) / 255
    paper = 30 + 175 * hatched * outlines
    return Image.fromarray(paper.astype(numpy.uint8)).convert("RGB")


def sketch(plain: Image.Image) -> Image.Image:
    """Pencil outlines on white: what a blur of the greys takes away."""
    grey = numpy.asarray(plain.convert("L"), dtype=numpy.float32)
    radius = min(plain.size) / 40
    blurred = numpy.asarray(plain.convert("L").filter(ImageFilter.GaussianBlur(radius)), dtype=numpy.float32)
    lines = 255 - (3.0 * abs(grey - blurred)).clip(0, 225)
    return Image.fromarray(lines.astype(numpy.uint8)).convert("RGB")
