"""IF's prompts: tokens equal to T5Tokenizer's, embeddings equal to T5's, and a cache that spares T5."""

import json
import random
import shutil
import warnings

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel, T5Tokenizer, T5TokenizerFast

from ifmodel import t5
from ifmodel.embeds import load_embeds, save_embeds
from ifmodel.t5 import Tokenizer, embed_prompts

WORDS = [
    *("an", "oil", "painting", "of", "a", "snowy", "mountain", "village", "man", "wearing", "hat", "rocket", "ship"),
    *("photo", "dog", "people", "campfire"),
]
ODD = [
    *("🚀", "👩\u200d🚀", "一只狗", "雪山村庄", "éclair", "ﬁne", "½", "x²", "ＦＵＬＬ"),
    *("don't", '"quoted"', "—", "مرحبا", "हिन्दी"),
]
SPACES = [" ", "  ", "\t", "\n", "\u3000", "\u00a0", "\u200b", "\u2028", ""]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A model's tokenizer/ and text_encoder/, laid out as on the Hub, small and untrained."""
    folder = tmp_path_factory.mktemp("if")
    (folder / "tokenizer").mkdir()
    sentences = [" ".join(random.Random(i).choices(WORDS, k=6)) for i in range(200)]
    sentences += ["一只狗的照片", "雪山村庄的油画"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / "tokenizer" / "spiece"),
        vocab_size=160,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        minloglevel=2,
    )
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=160, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    return folder


def varied_prompts(count: int) -> list[str]:
    """Short, long and empty, plain and odd, with all kinds of space between and around."""
    draw = random.Random(0)
    prompts = ["", " ", "A PHOTO OF A DOG", "🚀"]
    while len(prompts) < count:
        words = [draw.choice(ODD if draw.random() < 0.3 else WORDS) for _ in range(draw.choice([1, 2, 5, 10, 40, 120]))]
        prompt = "".join(word + draw.choice(SPACES) for word in words)
        prompts.append(draw.choice(SPACES) + (prompt.title() if draw.random() < 0.3 else prompt))
    return prompts


def test_tokens_equal_t5_tokenizers(model_folder):
    ours, theirs = Tokenizer(model_folder / "tokenizer"), T5Tokenizer.from_pretrained(model_folder / "tokenizer")
    for prompt in varied_prompts(1000):
        tokens, mask = ours([prompt])
        expected = theirs(
            prompt.lower().strip(), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        )
        assert torch.equal(tokens, expected.input_ids), repr(prompt)
        assert torch.equal(mask, expected.attention_mask), repr(prompt)


def test_tokenizer_json_serves_where_there_is_no_spiece_model(model_folder, tmp_path):
    T5TokenizerFast.from_pretrained(model_folder / "tokenizer").save_pretrained(tmp_path)
    (tmp_path / "spiece.model").unlink(missing_ok=True)
    prompts = varied_prompts(100)
    expected = Tokenizer(model_folder / "tokenizer")(prompts)
    for found, tensor in zip(Tokenizer(tmp_path)(prompts), expected, strict=True):
        assert torch.equal(found, tensor)


def test_what_is_lost_of_a_long_prompt(model_folder):
    tokenizer = Tokenizer(model_folder / "tokenizer")
    assert tokenizer.lost("a photo of a dog") == ""
    long = "dog " * 300 + "hat"
    assert tokenizer.lost(long).endswith("dog hat")
    tokens, mask = tokenizer([long])
    assert tokens[0, -1] == 1 and mask.all()


def test_embeddings_are_t5s_and_t5_is_needed_once(model_folder, tmp_path, monkeypatch):
    prompts = ["a photo of a dog", "", "a rocket ship"]
    found = embed_prompts(model_folder, prompts, cache=tmp_path)
    encoder = T5EncoderModel.from_pretrained(model_folder / "text_encoder").eval()
    tokens, mask = Tokenizer(model_folder / "tokenizer")(prompts)
    with torch.no_grad():
        expected = encoder(tokens, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(torch.stack([found[prompt] for prompt in prompts]), expected)

    def refuse(*_):
        raise AssertionError("T5 was loaded for prompts that are known")

    monkeypatch.setattr(t5, "load_encoder", refuse)
    again = embed_prompts(model_folder, [*prompts, " A photo of a DOG "], cache=tmp_path)
    assert torch.equal(again["a photo of a dog"], found["a photo of a dog"])
    assert torch.equal(again[" A photo of a DOG "], found["a photo of a dog"])
    for other in ({"dtype": torch.bfloat16}, {"cache": None}):
        with pytest.raises(AssertionError, match="T5 was loaded"):
            embed_prompts(model_folder, prompts, **{"cache": tmp_path, **other})


@pytest.mark.parametrize("damage", ["cut short", "empty", "another tensor"])
def test_a_damaged_file_in_the_cache_is_embedded_anew(model_folder, tmp_path, damage):
    found = embed_prompts(model_folder, ["a dog"], cache=tmp_path)["a dog"]
    (file,) = tmp_path.iterdir()
    if damage == "another tensor":
        save_file({"something": torch.zeros(1)}, file)
    else:
        file.write_bytes(file.read_bytes()[: 100 if damage == "cut short" else 0])
    with pytest.warns(UserWarning, match=r"safetensors is damaged \(.+\): its prompt is embedded again") as warned:
        again = embed_prompts(model_folder, ["a dog"], cache=tmp_path)["a dog"]
    assert torch.equal(again, found)
    assert len(warned) == 1 and "\n" not in str(warned[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(embed_prompts(model_folder, ["a dog"], cache=tmp_path)["a dog"], found)


def test_a_prompt_that_is_no_unicode_is_refused(model_folder, tmp_path):
    """Such as b"caf\\xe9" on the command line of a UTF-8 terminal, which Python reads as a lone surrogate."""
    with pytest.raises(ValueError, match="is not valid UTF-8") as error:
        embed_prompts(model_folder, ["caf\udce9"], cache=tmp_path)
    assert r"the prompt 'caf\udce9'" in str(error.value)


def test_a_t5_that_the_memory_cannot_hold_is_not_loaded(model_folder, monkeypatch):
    size = (model_folder / "text_encoder" / "model.safetensors").stat().st_size
    monkeypatch.setattr("ddpm.tools.memory.free_memory", lambda device: size // 2)
    embed_prompts(model_folder, ["a dog"], dtype=torch.bfloat16, cache=None)
    monkeypatch.setattr(T5EncoderModel, "from_pretrained", lambda *_, **__: pytest.fail("T5 was loaded"))
    with pytest.raises(ValueError, match=r"T5 in float32 needs about 0\.0 GB of memory, and 0\.0 GB are free"):
        embed_prompts(model_folder, ["a dog"], cache=None)


def test_another_model_has_another_cache(model_folder, tmp_path, monkeypatch):
    embed_prompts(model_folder, ["a dog"], cache=tmp_path / "cache")
    shutil.copytree(model_folder, tmp_path / "other")
    monkeypatch.setattr(t5, "_encode", lambda *_: torch.zeros(77, 24))
    assert embed_prompts(tmp_path / "other", ["a dog"], cache=tmp_path / "cache")["a dog"].abs().sum() == 0


def test_in_float16_the_wo_layers_stay_in_float32(model_folder):
    encoder = T5EncoderModel.from_pretrained(model_folder / "text_encoder", dtype=torch.float16)
    dtypes = {name: parameter.dtype for name, parameter in encoder.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if ".wo." in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if ".wo." not in name} == {torch.float16}
    half = embed_prompts(model_folder, ["a dog"], dtype=torch.float16, cache=None)["a dog"]
    full = embed_prompts(model_folder, ["a dog"], cache=None)["a dog"]
    torch.testing.assert_close(half.float(), full, atol=1e-2, rtol=1e-2)


def test_a_prompt_that_is_cut_is_told(model_folder):
    with pytest.warns(UserWarning, match="prompt cut at 77 tokens, lost: .*hat'"):
        embed_prompts(model_folder, ["dog " * 300 + "hat"], cache=None)


def test_embedding_files(tmp_path):
    embeds = {"a photo of a dog": torch.randn(77, 24), "": torch.zeros(77, 24), "雪山村庄": torch.ones(77, 24)}
    save_embeds(tmp_path / "embeds.safetensors", embeds)
    found = load_embeds(tmp_path / "embeds.safetensors")
    assert found.keys() == embeds.keys()
    assert all(torch.equal(found[prompt], embeds[prompt]) for prompt in embeds)

    torch.save({prompt: tensor.half()[None] for prompt, tensor in embeds.items()}, tmp_path / "course.pth")
    course = load_embeds(tmp_path / "course.pth")
    assert course["a photo of a dog"].shape == (77, 24) and course[""].dtype == torch.float16


class Trap:
    """What must not be run when a file is read."""

    def __reduce__(self):
        return (pytest.fail, ("a file ran code",))


def test_embedding_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no embeddings file at"):
        load_embeds(tmp_path / "nowhere.safetensors")
    torch.save({"a dog": Trap()}, tmp_path / "trap.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    torch.save({"a dog": torch.zeros(3)}, tmp_path / "flat.pth")
    (tmp_path / "short.safetensors").write_bytes(b"\x10\x00")
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("trap.pth", "tensor.pth", "flat.pth", "short.safetensors", "empty.pth"):
        with pytest.raises(ValueError, match="is no file of prompt embeddings") as error:
            load_embeds(tmp_path / name)
        assert "\n" not in str(error.value)


def test_embeddings_of_two_models_do_not_share_a_file(tmp_path):
    with pytest.raises(ValueError, match=r"all must be \[77, D\] of one model, these are \[77, 24\] and \[77, 32\]"):
        save_embeds(tmp_path / "both.safetensors", {"a": torch.zeros(77, 24), "b": torch.zeros(77, 32)})
    assert not (tmp_path / "both.safetensors").exists()


def test_a_t5_that_is_damaged_is_refused_and_nothing_is_cached(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    weights, cache = tmp_path / "model" / "text_encoder" / "model.safetensors", tmp_path / "cache"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"text_encoder is no T5 encoder"):
        embed_prompts(tmp_path / "model", ["a dog"], cache=cache)
    tensors = load_file(model_folder / "text_encoder" / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if ".wi_0." not in name}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 2 tensors: encoder\.block\.0\."):
        embed_prompts(tmp_path / "model", ["a dog"], cache=cache)
    weights.unlink()
    T5EncoderModel.from_pretrained(model_folder / "text_encoder").save_pretrained(weights.parent, max_shard_size="30KB")
    weights.with_name("model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"text_encoder is no T5 encoder"):
        embed_prompts(tmp_path / "model", ["a dog"], cache=cache)
    for shard in weights.parent.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(FileNotFoundError, match="has no safetensors"):
        embed_prompts(tmp_path / "model", ["a dog"], cache=cache)
    assert not cache.exists()


def test_half_precision_reads_the_fp16_files(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    encoder = T5EncoderModel.from_pretrained(model_folder / "text_encoder", dtype=torch.float16)
    encoder.save_pretrained(tmp_path / "model" / "text_encoder", variant="fp16")
    (tmp_path / "model" / "text_encoder" / "model.safetensors").write_text("must not be read")
    half = embed_prompts(tmp_path / "model", ["a dog"], dtype=torch.bfloat16, cache=None)["a dog"]
    full = embed_prompts(model_folder, ["a dog"], cache=None)["a dog"]
    torch.testing.assert_close(half.float(), full, atol=5e-2, rtol=5e-2)


def test_a_cache_that_cannot_be_written_is_only_a_warning(model_folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="embeddings are not kept"):
        found = embed_prompts(model_folder, ["a dog"], cache=tmp_path / "file" / "cache")
    assert found["a dog"].shape == (77, 24)


def test_a_folder_without_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither spiece\.model nor tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_text("not a model")
    with pytest.raises(ValueError, match="is no sentencepiece model"):
        Tokenizer(tmp_path)
