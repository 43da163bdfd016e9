"""Train a tokenizer on the training text: sentencepiece BPE, converted once to a Transformers tokenizer.

    python -m training.tokenizer --text corpus.txt --output outputs/tokenizer --vocab_size 400

The saved folder needs neither sentencepiece nor protobuf any more. Choices, and why:

- bytes as a fallback and no normalisation: every text can be written and comes back as it was (except the character
  U+2581, which sentencepiece itself uses for the space);
- no space is put before a text: the tokens of a text are then the tokens of its parts on either side of a special
  token, which is what lets labels be built segment by segment;
- special tokens are control symbols that no text yields, unless the caller asks the tokenizer to read them.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from defocus_mllm.console import run_script
from defocus_mllm.files import PARTIAL_PREFIX

UNKNOWN, BEGIN, END, PAD = "<unk>", "<s>", "</s>", "<pad>"
ADDED_TOKENS = {
    "image_token": "<image>",
    "user_token": "<|user|>",
    "assistant_token": "<|assistant|>",
    "system_token": "<|system|>",
}


def train_tokenizer(texts: Iterable[str], vocab_size: int, output_dir: str | Path) -> PreTrainedTokenizerFast:
    """Train on `texts`, save to `output_dir` (replaced as a whole) and return the reloaded Transformers tokenizer.

    `vocab_size` counts everything, special tokens included: it equals `len(tokenizer)` and is what a text_config wants.
    Raises ValueError with the feasible size if `texts` cannot fill that many tokens or need more, and if the converted
    tokenizer does not give the ids of sentencepiece on every one of `texts`.
    """
    corpus = [text for text in texts if text]
    if not corpus:
        raise ValueError("the tokenizer's training text is empty; give at least one non-empty line")
    model = _train_sentencepiece(corpus, vocab_size)
    output = Path(output_dir)
    output.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f"{PARTIAL_PREFIX}{output.name}-", dir=output.parent))
    try:
        tokenizer = _convert(model, building)
        _verify(tokenizer, model, dict.fromkeys(corpus))
        tokenizer.save_pretrained(building / "finished")
        _replace_folder(building / "finished", output)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return PreTrainedTokenizerFast.from_pretrained(output)


def _train_sentencepiece(corpus: list[str], vocab_size: int) -> bytes:
    """The serialised sentencepiece model; the corpus keeps its repetitions, which are the frequencies BPE merges by."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=model,
            vocab_size=vocab_size - len(ADDED_TOKENS),
            model_type="bpe",
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # The default of 4192 bytes would drop longer texts without a word.
            max_sentence_length=max(len(text.encode()) for text in corpus) + 1,
            unk_piece=UNKNOWN,
            bos_piece=BEGIN,
            eos_piece=END,
            pad_piece=PAD,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            num_threads=1,  # the merges must not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_explain_size(str(error), vocab_size)) from error
    return model.getvalue()


def _explain_size(message: str, vocab_size: int) -> str:
    """sentencepiece's complaint in terms of the caller's `vocab_size`."""
    if found := re.search(r"value <= (\d+)", message):
        largest = int(found.group(1)) + len(ADDED_TOKENS)
        return f"vocab_size {vocab_size} is too large for this text, which yields {largest} tokens; use <= {largest}"
    if found := re.search(r"\d+ vs (\d+)", message):
        smallest = int(found.group(1)) + len(ADDED_TOKENS)
        return (
            f"vocab_size {vocab_size} is too small: 256 bytes, the special tokens and the text's characters"
            f" need {smallest}; use >= {smallest}"
        )
    return f"sentencepiece could not train a vocabulary of {vocab_size}: {message}"


def _convert(model: bytes, folder: Path) -> PreTrainedTokenizerFast:
    """The same BPE as a Transformers tokenizer.

    LlamaTokenizer reads the sentencepiece file; the result is wrapped in PreTrainedTokenizerFast, the class that is
    reloaded from tokenizer.json word for word instead of being rebuilt from options.
    """
    (folder / "tokenizer.model").write_bytes(model)
    converted = LlamaTokenizer.from_pretrained(folder, add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=converted.backend_tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens=ADDED_TOKENS,
    )


def _verify(tokenizer: PreTrainedTokenizerFast, model: bytes, texts: Iterable[str]) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in texts:
        expected = reference.encode(text)
        actual = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if actual != expected:
            raise ValueError(
                f"the converted tokenizer disagrees with sentencepiece on {text[:80]!r}:"
                f" {actual[:20]} != {expected[:20]};"
                " install the versions of transformers and sentencepiece that pyproject.toml names"
            )


def _replace_folder(source: Path, target: Path) -> None:
    """Put `source` where `target` is; a folder cannot be replaced in one call unless it is empty."""
    source.chmod(0o755)
    if target.exists():
        os.replace(target, source.parent / "replaced")
    os.replace(source, target)


def read_texts(path: str | Path) -> list[str]:
    """The non-empty lines of a UTF-8 text file. Raises FileNotFoundError, or ValueError if it is not UTF-8 or empty."""
    path = Path(path)
    try:
        texts = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error
    if not texts:
        raise ValueError(f"{path} holds no text; give at least one non-empty line")
    return texts


def main(arguments: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(prog="python -m training.tokenizer", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--text", required=True, help="UTF-8 text file, one text a line")
    parser.add_argument("--output", required=True, help="folder to write (replaced)")
    parser.add_argument("--vocab_size", type=int, required=True, help="number of tokens, special tokens included")
    options = parser.parse_args(arguments)
    texts = read_texts(options.text)
    tokenizer = train_tokenizer(texts, options.vocab_size, options.output)
    count = sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    print(f"{options.output}: {len(tokenizer)} tokens; {len(texts)} lines take {count / len(texts):.1f} tokens each")


if __name__ == "__main__":
    run_script(main)
