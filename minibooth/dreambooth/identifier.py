"""The identifier: a rare word that the model has no strong idea of. Ruiz et al. 2022, section 3.2.

The paper takes rare tokens of T5's vocabulary, of three characters or fewer, and joins one to three of them to a word. CLIP's
vocabulary has whole words; the later a word was merged into it, the rarer it was, and the nearer its embedding stayed to their
mean.
"""

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from minibooth.models.tokenizer import Tokenizer

RARE = 0.75  # where in the vocabulary, in order of merging, words begin to be rare
LETTERS = re.compile(r"[a-z]{3,4}</w>")
MEANINGS = {"sks": "a rifle, to the published models"}
BEFORE = {"a", "an", "the", "of", "my", "this"}  # words of no identifier, nor first of a noun
BEHIND = {"in", "on", "at", "by", "with", "wearing", "near", "under"}  # of neither


class Identifier(NamedTuple):
    """A word that is one token; `moved` is its embedding's distance from the vocabulary's mean, over the median distance."""

    word: str
    token: int
    moved: float


def rare_words(tokenizer: Tokenizer, embeddings: Tensor) -> list[Identifier]:
    """Words of three or four letters that are single, late tokens, the least moved first; embeddings [V, D]."""
    distances = (embeddings.float() - embeddings.float().mean(dim=0)).norm(dim=1)
    moved = (distances / distances.median()).tolist()
    vocabulary = tokenizer.backend.get_vocab()
    late = {token: id for token, id in vocabulary.items() if id > RARE * len(vocabulary) and LETTERS.fullmatch(token)}
    found = [Identifier(token.removesuffix("</w>"), id, moved[id]) for token, id in late.items()]
    return sorted((each for each in found if each.word not in MEANINGS), key=lambda each: each.moved)


def named(instance_prompt: str, class_prompt: str) -> tuple[str, str]:
    """The identifier and the class noun, each of one word or more; both empty where the prompts do not show them.

    The identifier is what only the instance prompt has; the words behind it that the class prompt has, too, are the noun.
    """
    words, of_class = (re.split(r"[,.;:!?]", prompt)[0].split()[:77] for prompt in (instance_prompt, class_prompt))
    low, low_class = ([word.lower() for word in each] for each in (words, of_class))
    for place in range(1, len(low)):
        own = [*itertools.takewhile(lambda n: low[n] not in {*low_class, *BEFORE, *BEHIND}, range(place - 1, -1, -1))]
        for start in [n for n, word in enumerate(low_class) if own and word not in BEFORE]:
            pairs = zip(low[place:], low_class[start:], strict=False)
            if common := len([*itertools.takewhile(lambda pair: pair[0] == pair[1] not in BEHIND, pairs)]):
                return " ".join(words[own[-1] : place]), " ".join(of_class[start : start + common])
    return "", ""


def prompt_warnings(tokenizer: Tokenizer, instance_prompt: str, class_prompt: str) -> Iterator[str]:
    """What speaks against the words of the identifier, a line each."""
    vocabulary = tokenizer.backend.get_vocab()
    for word in named(instance_prompt, class_prompt)[0].lower().split():
        tokens = tokenizer.tokens(word)
        if word in MEANINGS:
            yield f"the identifier {word!r} already means {MEANINGS[word]}"
        elif len(tokens) > 2:
            yield f"the identifier {word!r} is {len(tokens)} tokens ({' '.join(tokens)}); one is easier to learn"
        elif len(tokens) == 1 and vocabulary[tokens[0]] < RARE * len(vocabulary):
            yield f"the identifier {word!r} is a common word, whose meaning gets in the way"
