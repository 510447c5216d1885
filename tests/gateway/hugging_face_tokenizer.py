"""An independent Llama 3 tokenizer: Hugging Face `tokenizers` built on the same ranks, as an oracle for ours."""

from __future__ import annotations

import base64
import functools
import importlib.metadata
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = {
    "<|begin_of_text|>": 128000,
    "<|end_of_text|>": 128001,
    "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007,
    "<|eom_id|>": 128008,
    "<|eot_id|>": 128009,
    "<|python_tag|>": 128010,
}


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's map of bytes to printable characters, in which `tokenizers` keeps byte-level vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {byte: chr(byte) for byte in printable}
    missing = (byte for byte in range(256) if byte not in alphabet)
    alphabet.update({byte: chr(256 + position) for position, byte in enumerate(missing)})
    return alphabet


@functools.cache
def load() -> Tokenizer:
    """Build the tokenizer: vocabulary and merges recovered from the ranks."""
    path = importlib.metadata.distribution("llama-models").locate_file("llama_models/llama3/tokenizer.model")
    ranks = {}
    for line in Path(str(path)).read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    alphabet = _byte_alphabet()

    def spell(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(left, right) for left, right in splits if left in ranks and right in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spell(left), spell(right)) for left, right in pairs]
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    vocabulary |= {f"<|unused_{rank}|>": rank for rank in range(len(ranks), 128_256) if rank not in SPECIALS.values()}
    vocabulary |= SPECIALS
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    return tokenizer


def encode(text: str) -> list[int]:
    """Return the token ids of a text with special tokens taken as such."""
    return load().encode(text, add_special_tokens=False).ids


def count(text: str) -> int:
    """Return the tokens of a text with special tokens taken as such."""
    return len(encode(text))
