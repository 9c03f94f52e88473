"""The tokenizer gives the ids of transformers' CLIPTokenizer, whatever the folder looks like and the text holds."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from conftest import edit_json
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from minibooth.checkpoint.source import VOCABULARY
from minibooth.errors import UserError
from minibooth.models.tokenizer import Tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP = Path(os.environ.get("MINIBOOTH_CLIP", Path(__file__).resolve().parents[1] / "../shared/clip"))
NAMES = (*VOCABULARY, "tokenizer_config.json", "special_tokens_map.json")

# fmt: off
TEXTS = [
    "", " ", "   \t\n ", "a photo of sks dog", "A Photo OF sks DOG",
    "a photo of a sks dog, in the style of Van Gogh.", "  leading and trailing  ",
    "two  blanks\tone tab\na line\r\nanother\x0bvertical\x0cfeed", "no\u00a0break\u2003em\u200bzero\u3000wide",
    "\u2028line\u2029paragraph\u0085next", "null\x00bell\x07escape\x1bdelete\x7f", "\ufeffbyte order mark",
    "soft\u00adhyphen", "don't I'LL we've you're he'd I'm it's 'tis rock'n'roll", "DON'T WE'VE", "don\u2019t",
    "''s 's' 'S '' ' 'x", "should've'd", "0 12 345 6789", "3.14 1,000 1e-5", "x2 2x x2y 4k 8K",
    "½ ² ③ Ⅷ ٣ ४ 五", "!", "!!", "! !! !!!", "hi!", "!a!b!", "a!?b", "?!...,,,;;;---___",
    "(((masterpiece))), [best|worst:0.5] {a} <lora:x:1>",
    "#hash @at $5 50% a&b c*d e=f g+h i/j k\\l m~n o`p q^r", '"quoted" \u201ccurly\u201d', "a-b_c.d,e;f:g",
    "http://example.com/?q=1&r=2#frag", "me@example.com", "C:\\path\\file.txt",
    "<html>&amp;&lt;b&gt;&quot;&#39;</html>", "&amp;amp;", "café résumé naïve", "cafe\u0301 re\u0301sume\u0301",
    "A\u030a \u212b \u00c5", "e\u0301\u0302\u0303\u0304", "\u0301 lone accent",
    "Z\u0351a\u0352l\u0353g\u0354o\u0355", "İstanbul ISTANBUL ıstanbul iİIı", "ΑΣ Σας ΟΔΟΣ ς",
    "Straße STRASSE ẞ", "ǅ ǆ Ǆ", "ﬁ ﬂ ﬀ", "Ⅻ ⅻ", "K K Å", "Ω Ω", "ſ's 'ſ", "Привет МИР", "Ё ё Й й", "שלום עולם",
    "مرحبا بالعالم", "नमस्ते दुनिया", "สวัสดี", "안녕하세요 세계", "\u1112\u1161\u11ab decomposed",
    "こんにちは世界", "カタカナ ｶﾀｶﾅ が か\u3099", "一张狗的照片", "一a二b三", "漢字,仮名。", "𠮷野家", "😀",
    "😀😃 smile 😄", "👨\u200d👩\u200d👧\u200d👦 family", "🏳️\u200d🌈 flag 🇩🇪🇫🇷", "👍🏽", "❤️ ❤", "1️⃣ #️⃣",
    "☆★ ♥ ♪", "𝒞𝓁𝒾𝓅 𝐛𝐨𝐥𝐝", "ＦＵＬＬ ｗｉｄｔｈ １２３", "→←↑↓ ∑∫√∞ ≠≤≥", "€ £ ¥ ₿ ¢", "° ± × ÷ µ", "… — – ‐ ‑",
    "\U0010ffff \ue000 \uffff", "\u202eright to left\u202c", START, END, f"a {START} b", f"a{END}b",
    f"{END}{END} {START}", START.upper(), f"x {END.upper()} y", "<|StartOfText|>a", "<|endoftext |>",
    "<|endoftext|", "|endoftext|>", "<|pad|> <pad> [PAD] </s> <unk> [MASK]", "dog</w>", "</w>", "a</w>b",
    "Ġdog Ċ", "âĢĻ", "Ã©", "don’t mojibake", "sks", "zwx", "a [V] dog", "ohwx woman",
    "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", "supercalifragilisticexpialidocious", "e" * 600, "dog " * 74,
    "dog " * 75, "dog " * 76, "dog " * 500, "!" * 300, "1" * 100, "😀" * 60, "漢" * 90, "dog,cat;" * 60,
    ("word " * 74) + END, ("word " * 74) + "supercalifragilisticexpialidocious",
]
# fmt: on


def mixtures(count: int) -> list[str]:
    """Strings of random pieces: scripts, marks, blanks and special tokens side by side, as no list by hand has them."""
    draw = random.Random(0)
    ranges = "20-7f 0-20 a0-250 300-370 370-530 2000-2070 3040-3100 4e00-4f00 1f300-1f650 ac00-ad00"
    ranges = [tuple(int(end, 16) for end in pair.split("-")) for pair in ranges.split()]
    words = ["dog", "Photo", "I'LL", "don't", "!", "!!", START, END, END.upper(), "</w>", "  ", "42", "é", "İ", "&amp;"]

    def piece() -> str:
        return draw.choice(words) if draw.random() < 0.4 else chr(draw.randrange(*draw.choice(ranges)))

    return ["".join(piece() for _ in range(draw.randrange(1, 60))) for _ in range(count)]


TEXTS += mixtures(300)


def small_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A few hundred entries in CLIP's order: bytes, bytes that end a word, merges, special tokens."""
    trained = Backend(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    lines = [
        "a photo of a dog",
        "photos of dogs and cats",
        "the cat's hat",
        "résumé café",
        "don't I'll we've",
        "漢字 😀 😃",
    ]
    trainer = trainers.BpeTrainer(vocab_size=900, end_of_word_suffix="</w>", show_progress=False)
    trained.train_from_iterator([word for line in lines for word in line.split()], trainer)
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(merge) for merge in merges), START, END]
    return {entry: i for i, entry in enumerate(dict.fromkeys(entries))}, merges


def long_form(content: str, normalized: bool = True, **more) -> dict:
    return {"content": content, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False} | more


TYPED = {role: long_form(END, __type="AddedToken") for role in ("eos_token", "unk_token")}
TYPED["bos_token"] = long_form(START, __type="AddedToken")
MAP = {"bos_token": long_form(START), "eos_token": long_form(END), "unk_token": long_form(END)}
DECODER = [("!", False), (START, True), (END, True)]

# what published folders hold beside the vocabulary: name -> (tokenizer_config.json, special_tokens_map.json)
SETTINGS = {
    "nothing": (None, None),
    "SD 1": (TYPED | {"pad_token": END, "model_max_length": 77}, MAP | {"pad_token": END}),
    "SD 2": (TYPED | {"pad_token": END, "model_max_length": 77}, MAP | {"pad_token": "!"}),
    "SD 2, map only": (None, MAP | {"pad_token": long_form("!", False)}),
    "SD 2, terse map": (None, {"pad_token": {"content": "!"}, "eos_token": {"content": END}}),
    "SD 2, config only": ({"pad_token": "!", "bos_token": START, "eos_token": END, "unk_token": END}, None),
    "XL": ({"added_tokens_decoder": DECODER, "pad_token": "!", "bos_token": START, "eos_token": END}, MAP),
    "a new token": ({"added_tokens_decoder": [*DECODER, ("<sks-dog>", False)], "pad_token": END}, None),
    "padding with a new token": ({"added_tokens_decoder": [*DECODER, ("<pad>", False)], "pad_token": "<pad>"}, None),
}


def write(folder: Path, vocab: dict[str, int], merges: list[tuple[str, str]], settings: str) -> None:
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    config, special_map = SETTINGS[settings]
    if config and "added_tokens_decoder" in config:
        entries = {
            str(vocab.get(content, len(vocab))): long_form(content, normalized, special=True)
            for content, normalized in config["added_tokens_decoder"]
        }
        config = config | {"added_tokens_decoder": entries}
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special_map)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))


def read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in NAMES if (folder / name).exists()}


def assert_equal_to_transformers(folder: Path) -> None:
    theirs = pytest.importorskip("transformers").CLIPTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_files(read(folder))
    expected = theirs(TEXTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    different = [text for text, a, b in zip(TEXTS, ours(TEXTS), expected, strict=True) if not torch.equal(a, b)]
    assert not different
    assert [ours.tokens(text) for text in TEXTS] == [theirs.tokenize(text) for text in TEXTS]


@pytest.fixture(params=SETTINGS)
def folder(request, tmp_path) -> Path:
    write(tmp_path, *small_vocabulary(), request.param)
    return tmp_path


def test_ids_equal_transformers_on_a_small_vocabulary(folder):
    assert_equal_to_transformers(folder)


def test_a_folder_saved_by_transformers_gives_the_same_ids(folder, tmp_path_factory):
    """transformers 5 writes tokenizer.json and tokenizer_config.json, and no vocabulary of the older kind."""
    theirs = pytest.importorskip("transformers").CLIPTokenizer.from_pretrained(folder)
    saved = tmp_path_factory.mktemp("saved")
    theirs.save_pretrained(saved)
    assert "vocab.json" not in read(saved)
    assert_equal_to_transformers(saved)
    assert torch.equal(Tokenizer.from_files(read(saved))(TEXTS), Tokenizer.from_files(read(folder))(TEXTS))


def test_tokens_that_were_added_later_have_their_ids(tmp_path):
    """As transformers 4 wrote those of textual inversion, whatever their order in the file."""
    vocab, merges = small_vocabulary()
    write(tmp_path, vocab, merges, "SD 1")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<b>": len(vocab) + 1, "<sks-dog>": len(vocab)}))
    theirs = pytest.importorskip("transformers").CLIPTokenizer.from_pretrained(tmp_path)
    prompts = ["a photo of <sks-dog>", "<b><sks-dog> dog", "a <SKS-dog> <b>"]
    ours = Tokenizer.from_files(read(tmp_path))(prompts)
    assert torch.equal(ours, theirs(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids)
    late = {str(len(vocab) + n): {"content": token, "normalized": True} for n, token in ((1, "<b>"), (0, "<sks-dog>"))}
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder=late)
    (tmp_path / "added_tokens.json").unlink()
    assert torch.equal(Tokenizer.from_files(read(tmp_path))(prompts), ours)
    assert len(vocab) in ours[0] and len(vocab) + 1 in ours[1]


@pytest.mark.parametrize("settings", ["SD 1", "SD 2", "XL"])
def test_ids_equal_transformers_on_clips_vocabulary(settings, tmp_path):
    if not (CLIP / "vocab.json").is_file():
        pytest.skip("CLIP's vocabulary is not here: set MINIBOOTH_CLIP to a folder with its vocab.json and merges.txt")
    lines = (CLIP / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    write(tmp_path, json.loads((CLIP / "vocab.json").read_text()), [tuple(line.split()) for line in lines], settings)
    assert_equal_to_transformers(tmp_path)
    ours = Tokenizer.from_files(read(tmp_path))
    assert ours(["a photo of sks dog"])[0, :7].tolist() == [49406, 320, 1125, 539, 48136, 1929, 49407]
    assert ours.tokens("sks") == ["sks</w>"]


def test_a_row_is_start_text_end_and_padding(tmp_path):
    vocab, merges = small_vocabulary()
    write(tmp_path, vocab, merges, "SD 2")
    tokenizer = Tokenizer.from_files(read(tmp_path))
    short, long = tokenizer(["dog", "dog " * 500])
    assert short.dtype == torch.long and short.shape == (77,)
    ids = [vocab[token] for token in tokenizer.tokens("dog")]
    assert short.tolist() == [vocab[START], *ids, vocab[END]] + [vocab["!"]] * (77 - 2 - len(ids))
    assert long[0] == vocab[START] and long[-1] == vocab[END] and vocab["!"] not in long.tolist()


def test_a_string_is_one_text(tmp_path):
    write(tmp_path, *small_vocabulary(), "SD 1")
    tokenizer = Tokenizer.from_files(read(tmp_path))
    assert torch.equal(tokenizer("a dog"), tokenizer(["a dog"]))


@pytest.mark.parametrize("text", ["a dog \udcff", "\ud83d"])  # bytes that are no UTF-8, as Python hands them on; half an emoji
def test_what_is_no_valid_text_is_refused(text, tmp_path):
    write(tmp_path, *small_vocabulary(), "SD 1")
    tokenizer = Tokenizer.from_files(read(tmp_path))
    for ask in (tokenizer, tokenizer.tokens, lambda text: tokenizer(["a", text])):
        with pytest.raises(UserError, match=r"\\ud.*no valid text"):
            ask(text)


def test_a_silent_folder_pads_with_the_end_token(tmp_path):
    vocab, merges = small_vocabulary()
    write(tmp_path, vocab, merges, "nothing")
    assert Tokenizer.from_files(read(tmp_path))([""]).tolist() == [[vocab[START]] + [vocab[END]] * 76]


@pytest.mark.parametrize("stated, meant", [(77, 77), (16, 16), (int(1e30), 77), (None, 77)])
def test_the_length_is_the_folders_own_unless_absurd(stated, meant, tmp_path):
    write(tmp_path, *small_vocabulary(), "nothing")
    config = {} if stated is None else {"model_max_length": stated}
    files = read(tmp_path) | {"tokenizer_config.json": json.dumps(config).encode()}
    assert Tokenizer.from_files(files)(["a dog", "dog " * 99]).shape == (2, meant)


@pytest.mark.parametrize("there, missing", [((), ("vocab.json", "merges.txt")), (("vocab.json",), ("merges.txt",))])
def test_a_missing_vocabulary_is_named(there, missing, tmp_path):
    write(tmp_path, *small_vocabulary(), "SD 1")
    files = {name: data for name, data in read(tmp_path).items() if name in there or name == "tokenizer_config.json"}
    with pytest.raises(UserError) as error:
        Tokenizer.from_files(files)
    assert all(name in str(error.value) for name in missing)
    assert not any(f"{name} and" in str(error.value) for name in there)


def test_a_vocabulary_without_a_special_token_is_refused(tmp_path):
    vocab, merges = small_vocabulary()
    del vocab[START]
    write(tmp_path, vocab, merges, "SD 1")
    with pytest.raises(UserError, match="startoftext"):
        Tokenizer.from_files(read(tmp_path))
