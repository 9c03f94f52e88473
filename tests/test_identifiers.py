"""Identifiers: single, late, short words whose embeddings training has hardly moved; and what to doubt in a chosen one."""

import json

import pytest
import torch
from conftest import vocabulary

from minibooth import command, identifiers
from minibooth.dreambooth import identifier
from minibooth.dreambooth.identifier import named, prompt_warnings, rare_words
from minibooth.models.tokenizer import Tokenizer

WORDS = ["photo", "of", "dog", "cat", "sks", "zwx", "olis", "q", "longer", "qiv"]  # merged in this order


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes and, after them, WORDS; each merged letter by letter."""
    merges, vocab = [], [*(token for token in vocabulary() if len(token.removesuffix("</w>")) == 1)]
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append(" ".join(parts[:2]))
            parts[:2] = ["".join(parts[:2])]
            vocab.append(parts[0])
    vocab = list(dict.fromkeys([*vocab, "<|startoftext|>", "<|endoftext|>"]))
    numbers = json.dumps({token: i for i, token in enumerate(vocab)}).encode()
    return Tokenizer.from_files({"vocab.json": numbers, "merges.txt": "\n".join(dict.fromkeys(merges)).encode()})


def test_rare_words_are_short_late_single_tokens_and_the_least_moved_come_first(tokenizer, monkeypatch):
    vocab = tokenizer.backend.get_vocab()
    monkeypatch.setattr(identifier, "RARE", (vocab["cat</w>"] + 0.5) / len(vocab))
    x = 4 - torch.linspace(0, 2, len(vocab)) ** 2
    found = rare_words(tokenizer, torch.stack([x, torch.ones(len(vocab))], dim=1))
    assert [each.word for each in found] == ["zwx", "olis", "qiv"]
    moved = (x - x.mean()).abs() / (x - x.mean()).abs().quantile(0.5)
    assert [each.moved for each in found] == pytest.approx([moved[each.token].item() for each in found], rel=0.01)
    assert all(vocab[f"{each.word}</w>"] == each.token for each in found)


@pytest.mark.parametrize(
    "word, complaint",
    [
        ("zwx", None),
        ("qq", None),
        ("qqq", "3 tokens (q q q</w>)"),
        ("sks", "a rifle"),
        ("SKS", "a rifle"),
        ("xqzjk", "5 tokens"),
        ("a", None),
        ("dog", None),
    ],
)
def test_doubts_are_about_the_identifier_alone(tokenizer, word, complaint):
    found = list(prompt_warnings(tokenizer, f"a photo of {word} dog", "a photo of dog"))
    assert len(found) == (complaint is not None)
    assert complaint is None or complaint in found[0]


@pytest.mark.parametrize(
    "prompts",
    [(f"{word} zwx dog", "dog") for word in ("a", "an", "the", "of", "my", "this")]
    + [(f"zwx dog {word} snow", f"dog {word} snow") for word in ["in", "on", "at", "by", "with", "wearing", "near", "under"]]
    + [(f"zwx dog{mark}", "dog") for mark in ".,;:!?"]
    + [("photo zwx dog", "photo dog"), ("A zwx Dog in snow", "a dog IN snow")],
    ids=" / ".join,
)
def test_the_words_around_an_identifier_and_its_noun_are_none_of_them(prompts):
    found, noun = named(*prompts)
    assert (found, noun.lower()) == ("zwx", "dog")


def test_names_are_spelled_as_the_prompts_do():
    assert named("a photo of Zwx teddy bear", "a Teddy Bear") == ("Zwx", "Teddy Bear")


def test_what_is_no_identifier_is_not_doubted(tokenizer):
    assert [*prompt_warnings(tokenizer, "a photo of zwx dog", "dog")] == [*prompt_warnings(tokenizer, "a dog", "a dog")] == []
    assert [*prompt_warnings(tokenizer, "a photo of sks, a dog", "a dog")] == []


def test_what_is_cut_off_a_prompt_is_shown(tokenizer):
    long = "dog " * (tokenizer.max_length - 3)
    assert [*tokenizer.truncation_warnings([f"{long}zwx", "dog"])] == []
    found = [*tokenizer.truncation_warnings([f"{long}dog A zwx Hüte", "dog", f"{long}dog A zwx Hüte"])]
    assert found == ["a prompt is too long: 'A zwx Hüte' is not read"]


def test_a_common_word_is_doubted(tokenizer):
    assert "common word" in next(prompt_warnings(tokenizer, "b dog", "a dog"))


def test_the_command_lists_words_of_a_checkpoint(sd1, capsys):
    with pytest.raises(SystemExit) as end:
        command.run(identifiers.main, ["identifiers.py", "--model", str(sd1), "--count", "3"])
    assert end.value.code == 0
    with pytest.raises(SystemExit, match="2"):
        command.run(identifiers.main, ["identifiers.py", "--model", str(sd1), "--count=-5"])
    words = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert words and set(words) <= {"dog", "cat", "sks"} - {"sks"}


def test_the_command_lists_as_many_as_are_asked_for(sd1, capsys):
    for count in (1, 2):
        identifiers.main(["--model", str(sd1), "--count", str(count)])
        assert len(capsys.readouterr().out.splitlines()) == count
    with pytest.raises(SystemExit, match="2"):
        command.run(identifiers.main, ["identifiers.py"])
    assert "required: --model" in capsys.readouterr().err
