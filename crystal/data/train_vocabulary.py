"""Trains a sentencepiece vocabulary in a process of its own, so that it can be stopped; `tokenizer.py` starts it.

Run as a file: argv[1] is JSON of the trainer's settings, stdin one sentence a line, stdout the model. The trainer's
log goes to stderr, where it tells how far it is. What the trainer refuses is exit 3, its message alone on stdout.
"""

import io
import json
import sys


def main() -> None:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line.removesuffix(b"\n").decode("utf-8") for line in sys.stdin.buffer),
            model_writer=model,
            **json.loads(sys.argv[1]),
        )
    except (RuntimeError, OSError) as error:
        print(error)
        sys.exit(3)
    sys.stdout.buffer.write(model.getvalue())


if __name__ == "__main__":
    main()
