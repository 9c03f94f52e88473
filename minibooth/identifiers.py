"""List rare words of a checkpoint's vocabulary that can stand for a subject."""

import sys
from collections.abc import Sequence

from minibooth import command
from minibooth.checkpoint.source import Source
from minibooth.dreambooth.identifier import rare_words


def main(argv: Sequence[str]) -> None:
    """Print the rarest, with how far training has moved them; nothing but the text encoder is read."""
    parser = command.Parser("python -m minibooth.identifiers", __doc__)
    parser.add_argument("--model", required=True, help=command.MODEL)
    command.source_flags(parser)
    parser.add_argument("--count", type=command.within(1), default=20, help="how many [20]")
    flags = parser.parse_args(command.normalise(argv))
    source = Source.open(flags.model, **{name: getattr(flags, name) for name in command.SOURCE})
    embeddings = source.weights["text_encoder"]["text_model.embeddings.token_embedding.weight"]
    for word, token, moved in rare_words(source.tokenizer(), embeddings)[: flags.count]:
        print(f"{word:6} token {token:5}  moved {moved:.2f}")


if __name__ == "__main__":
    command.run(main, sys.argv)
