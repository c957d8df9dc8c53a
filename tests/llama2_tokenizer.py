"""Makes tests/data/sentencepiece.json, a small tokenizer of Llama 2's kind.

    pip install sentencepiece
    python3 tests/llama2_tokenizer.py tests/data/sentencepiece.json

SentencePiece is trained with Llama's settings on the calibration sample, and its model is written as transformers'
converters write that of Llama 2: merges are all ways to divide a token in two, in the order of the tokens' scores. The
committed file was made with sentencepiece 0.2.3.
"""

import json
import sys
import tempfile
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

SPACE = "\u2581"


def train(text):
    with tempfile.TemporaryDirectory() as folder:
        SentencePieceTrainer.train(
            input=str(text), model_prefix=f"{folder}/model", vocab_size=900, model_type="bpe", byte_fallback=True, split_digits=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
            character_coverage=0.985, max_sentence_length=100_000, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1,
        )
        return SentencePieceProcessor(f"{folder}/model.model")


def merges(model, vocabulary):
    found = []
    for piece, index in vocabulary.items():
        if model.is_control(index) or model.is_unknown(index) or model.is_byte(index):
            continue
        halves = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        pairs = [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(model.get_score(index), pair) for pair in pairs]
    found.sort(key=lambda merge: merge[0], reverse=True)
    return [list(pair) for _, pair in found]


def main():
    model = train(Path(__file__).parent.parent / "calibration-data" / "sample.txt")
    vocabulary = {model.id_to_piece(index): index for index in range(model.vocab_size())}
    special = [piece for piece, index in vocabulary.items() if model.is_control(index) or model.is_unknown(index)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": vocabulary[piece], "content": piece, **flags} for piece in special],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        ]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [vocabulary["<s>"]], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": vocabulary, "merges": merges(model, vocabulary),
        },
    }
    Path(sys.argv[1]).write_text(json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
