"""From a folder of books to token streams: CORPUS/{train,valid}/*.txt in, DATA/{train,valid}.bin and DATA/tokenizer out."""
from pathlib import Path

import numpy as np

import tokenizer
from recipe import BEGIN_OF_TEXT

SPLITS = ("train", "valid")


def prepare(corpus, data, shape):
    """Trains the tokenizer on the training books and packs every split into one stream of uint16 ids.

    Each book begins with the begin-of-text token, which the tokenizer's template adds; nothing else parts books.
    """
    corpus, data = Path(corpus), Path(data)
    books = {split: sorted((corpus / split).glob("*.txt")) for split in SPLITS}
    for split in SPLITS:
        if not books[split]:
            raise SystemExit(f"no books in {corpus / split}: put UTF-8 files NAME.txt there")
    trained = tokenizer.train(books["train"], shape.vocab_size)
    tokenizer.save(trained, data / "tokenizer", shape.max_context)
    for split in SPLITS:
        streams = [trained.encode(book.read_text(encoding="utf-8")).ids for book in books[split]]
        ids = np.concatenate([np.asarray(stream, np.uint16) for stream in streams])
        ids.tofile(data / f"{split}.bin")
        print(f"{split}: {len(streams)} books, {len(ids):,} tokens", flush=True)


def load(data, split, vocab_size):
    """The token ids of a split, `[tokens]` int64."""
    import torch
    path = Path(data) / f"{split}.bin"
    if not path.exists():
        raise SystemExit(f"{path} is missing: run `prepare` first")
    ids = np.fromfile(path, np.uint16)
    if ids.max() >= vocab_size or ids[0] != BEGIN_OF_TEXT:
        raise SystemExit(f"{path} is not of this recipe's tokenizer")
    return torch.from_numpy(ids.astype(np.int64))
