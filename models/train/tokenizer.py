"""The tokenizer: byte-level BPE, trained on the corpus, in the files that Hugging Face readers expect."""
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"


def train(books, vocab_size):
    """A tokenizer over the texts of the files `books`; ids 0 and 1 begin and end a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(BEGIN, special=True), AddedToken(END, special=True)],
        # Every byte is a token, so that any text can be encoded.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False)
    tokenizer.train([str(book) for book in books], trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the corpus yields {tokenizer.get_vocab_size()} tokens, not {vocab_size}: it is too small")
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(
            single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN}:1 $B:1", special_tokens=[(BEGIN, 0)])])
    return tokenizer


def save(tokenizer, folder, max_context):
    """Writes tokenizer.json and the two files that transformers reads beside it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "model_max_length": max_context,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {"0": {"content": BEGIN, **special}, "1": {"content": END, **special}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": BEGIN, "eos_token": END}, indent=1))
