"""Log-probabilities of an answer's tokens as OpenAI writes them."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanomolmo2.generation.answer import Answer
    from nanomolmo2.generation.vlm import VLM
    from nanomolmo2.processor import Processor

_BYTE = re.compile("<0x([0-9A-F]{2})>")  # of vocabularies with a token for every byte
_NEVER = -9999.0  # what OpenAI writes for a logarithm of nothing


def logprobs_json(answer: Answer, vlm: VLM) -> dict[str, Any]:
    """The tokens of the text, without what ended it; together their bytes are the text's."""
    processor = vlm.processor
    left = len(answer.text.encode("utf-8"))
    content = []
    for token in answer.logprobs:
        if left <= 0:
            break
        top = [_entry(processor, id, value) for id, value in token.top]
        content.append(
            {**_entry(processor, token.token, token.logprob or 0.0), "top_logprobs": top}
        )
        if not _is_hidden(processor, token.token):
            left -= len(content[-1]["bytes"])
    return {"content": content, "refusal": None}


def _entry(processor: Processor, id: int, logprob: float) -> dict[str, Any]:
    data = token_bytes(processor, id)
    return {
        "token": data.decode("utf-8", errors="replace"),
        "logprob": max(logprob, _NEVER),
        "bytes": list(data),
    }


def _is_hidden(processor: Processor, id: int) -> bool:
    """Whether a token is special, and so leaves nothing in the text."""
    return not processor.decode([id])


def token_bytes(processor: Processor, id: int) -> bytes:
    """The bytes of a token, of which a character may take several."""
    text = processor.decode([id], skip_special_tokens=False)
    if "\ufffd" not in text:
        return text.encode("utf-8")
    letters = processor.tokenizer.backend.id_to_token(id) or text
    if byte := _BYTE.fullmatch(letters):
        return bytes.fromhex(byte[1])
    table = _byte_letters()
    if all(letter in table for letter in letters):
        return bytes(table[letter] for letter in letters)
    return letters.encode("utf-8")


@lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level vocabularies write bytes (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + number): byte for number, byte in enumerate(others)}
