"""The identifier: a rare word that the model has no strong idea of. Ruiz et al. 2022, section 3.2 and the appendix.

The paper looks up rare tokens of T5's vocabulary, three letters or fewer, and joins them to a word. CLIP's vocabulary has whole
words; the later a word was merged into it, the rarer it was, and the less its embedding was pulled from the others' mean.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from minibooth.models.tokenizer import Tokenizer

RARE = 0.75  # where in the vocabulary, in order of merging, words begin to be rare
LETTERS = re.compile(r"[a-z]{3,4}</w>")
MEANINGS = {"sks": "a rifle, to the published models"}


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


def doubts(tokenizer: Tokenizer, instance_prompt: str, class_prompt: str) -> Iterator[str]:
    """What speaks against the words that the instance prompt has and the class prompt has not, a line each."""
    vocabulary = tokenizer.backend.get_vocab()
    for word in instance_prompt.lower().split():
        if not class_prompt or word in class_prompt.lower().split():
            continue
        tokens = tokenizer.tokens(word)
        if word in MEANINGS:
            yield f"the identifier {word!r} already means {MEANINGS[word]}"
        elif len(tokens) > 2:
            yield f"the identifier {word!r} is {len(tokens)} tokens ({' '.join(tokens)}); one is easier to learn"
        elif len(tokens) == 1 and vocabulary[tokens[0]] < RARE * len(vocabulary):
            yield f"the identifier {word!r} is a common word, whose meaning gets in the way"
