"""CLIP's tokenizer: lower-cased, byte-level BPE (openai/CLIP, clip/simple_tokenizer.py; arXiv 2103.00020, section 2.4).

It reads the files of a published `tokenizer/` folder and gives the ids of transformers' CLIPTokenizer on that folder.
OpenAI's own code first repairs broken unicode (ftfy) and unescapes HTML entities: there such text has other ids.
"""

import json
import operator
import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from tokenizers import AddedToken, Encoding, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from torch import Tensor

from minibooth.errors import UserError, blaming

START, END = "<|startoftext|>", "<|endoftext|>"
SPECIAL = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}  # where the folder does not say
MAX_LENGTH = 77
# No token reaches over the border of a piece: a special token, a contraction, letters, one digit, or a run of the rest.
PIECE = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Prompts to ids: `tokenizer(["a photo of sks dog"])` is a LongTensor [B, max_length]."""

    def __init__(self, backend: Backend, start: int, end: int, pad: int, max_length: int):
        self.backend, self.start, self.end, self.pad, self.max_length = backend, start, end, pad, max_length

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> "Tokenizer":
        """Build from a folder's files, name to content: vocab.json and merges.txt or tokenizer.json, then its settings.

        Raises UserError if the vocabulary is missing or damaged, or does not hold a special token.
        """

        def parsed(name: str) -> dict:
            with blaming(name):
                return {**json.loads(files.get(name, b"{}"))}

        whole, config = parsed("tokenizer.json"), parsed("tokenizer_config.json")
        if whole:
            vocab, merges = whole["model"]["vocab"], whole["model"]["merges"]
        elif missing := [name for name in ("vocab.json", "merges.txt") if name not in files]:
            raise UserError(f"the tokenizer's folder lacks {' and '.join(missing)} (tokenizer.json would do instead)")
        else:
            vocab, merges = parsed("vocab.json"), files["merges.txt"].decode().splitlines()
            merges = [line for line in merges if line and not line.startswith("#version")]

        if "added_tokens_decoder" in config:
            by_id = config["added_tokens_decoder"]
            added = [by_id[id] for id in sorted(by_id, key=int)]
        else:  # the older way, in which the map overrules the configuration
            later = sorted(parsed("added_tokens.json").items(), key=operator.itemgetter(1))  # by id
            added = whole.get("added_tokens") or [{"content": token, "normalized": True} for token, _ in later]
            config |= parsed("special_tokens_map.json")
        special = {role: {"content": x} if isinstance(x := config.get(role) or y, str) else x for role, y in SPECIAL.items()}
        name = {role: token["content"] for role, token in special.items()}
        listed = {token["content"] for token in added}
        if unknown := sorted(set(name.values()) - vocab.keys() - listed):
            raise UserError(f"the tokenizer's vocabulary lacks the special token {' and '.join(unknown)}")

        backend = _byte_level_bpe(vocab, merges, name["unk_token"])
        # Added tokens are found in the text before it is cut. SD 2 pads with one: "!" is id 0 in a prompt too, though
        # OpenCLIP, which trained that text encoder, reads "!</w>" there (huggingface/diffusers#4153).
        added = added + [token for token in special.values() if token["content"] not in listed]
        backend.add_tokens([AddedToken(token["content"], normalized=token.get("normalized", False)) for token in added])

        length = config.get("model_max_length", MAX_LENGTH)
        length = operator.index(length) if length < 1e6 else MAX_LENGTH  # transformers writes 1e30 where none was set
        ids = backend.get_vocab()
        start, end, pad = (ids[name[f"{role}_token"]] for role in ("bos", "eos", "pad"))
        return cls(backend, start, end, pad, length)

    def __call__(self, texts: str | Iterable[str]) -> Tensor:
        """Ids [B, max_length]: start, as much of the text as fits, end, padding. A string is one text."""
        texts = [texts] if isinstance(texts, str) else texts
        rows = [[self.start, *self._encode(text).ids[: self.max_length - 2], self.end] for text in texts]
        return torch.tensor([row + [self.pad] * (self.max_length - len(row)) for row in rows])

    def tokens(self, text: str) -> list[str]:
        """The text's tokens without start, end and padding; a token that ends a word ends in `</w>`."""
        return self._encode(text).tokens

    def truncation_warnings(self, texts: Iterable[str]) -> Iterator[str]:
        """A line for each different text that is longer than max_length, with the part that is not read."""
        for text in dict.fromkeys(texts):
            for start, _ in self._encode(text).offsets[self.max_length - 2 :][:1]:
                yield f"a prompt is too long: {text[start:]!r} is not read"

    def _encode(self, text: str) -> Encoding:
        if re.search("[\ud800-\udfff]", text):  # bytes of a command line that are no UTF-8 become these
            raise UserError(f"the prompt {text!a} is no valid text; write it in UTF-8")
        return self.backend.encode(text)


def _byte_level_bpe(vocab: Mapping[str, int], merges: Iterable[str | list[str]], unknown: str) -> Backend:
    """CLIP's rules on a vocabulary; a merge is "a b" or, in files of recent years, ["a", "b"]."""
    pairs = [(a, b) for a, b in (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)]
    backend = Backend(BPE(dict(vocab), pairs, unk_token=unknown, end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    pieces = pre_tokenizers.Split(Regex(PIECE), "removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return backend
