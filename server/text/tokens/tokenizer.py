"""Text to token ids and back. Uses only the `tokenizers` library: importing transformers would add
seconds to every start of the server."""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

import tokenizers

from server.text.letters import LetterEncoder, Rendered

SPACE_MARK = "▁"  # SentencePiece writes it for a space
INNER_SPACES = re.compile(rb"(?<=[^ ]) ")
INVALID_UNICODE = "text is not valid Unicode (a lone surrogate?)"
BYTE_PIECES = {f"<0x{value:02X}>": bytes([value]) for value in range(256)}


class Tokenizer:
    """A loaded tokenizer. Read-only after construction, so threads may share it.

    `special_tokens` maps the names templates use (bos_token, eos_token, ...) to their texts.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        chat_template: str | None,
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template  # Jinja source
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.added_ids = frozenset(added)  # special tokens, and markers that are not special
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self.special_texts = frozenset(added[index].content for index in self.special_ids)
        self._letters: LetterEncoder | None = None  # made when it is first needed
        self._making = threading.Lock()
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        self._piece_bytes = _piece_decoder(backend)
        self._known_bytes: dict[int, bytes] = {}  # of tokens seen so far
        self.strips_first_space = self._strips_first_space()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; special tokens written in it are recognised. `add_special_tokens` puts
        the model's BOS token in front, if it has one."""
        try:
            # A batch of one: unlike `encode`, it lets other threads run meanwhile.
            batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return list(batch[0].ids)
        except (TypeError, UnicodeError) as error:
            raise ValueError(INVALID_UNICODE) from error

    def encode_rendered(self, prompt: Rendered, add_special_tokens: bool = False) -> list[int]:
        """Ids of what a chat template wrote: special tokens that a client wrote are letters."""
        if not prompt.letters:
            return self.encode(prompt.text, add_special_tokens)
        with self._making:
            if self._letters is None:
                self._letters = LetterEncoder(self._backend)
        try:
            return self._letters.encode(prompt, add_special_tokens)
        except (TypeError, UnicodeError) as error:
            raise ValueError(INVALID_UNICODE) from error

    def to_json(self) -> str:
        """The tokenizer in the format of the `tokenizers` library."""
        return str(self._backend.to_str())

    def fewest_tokens(self, text: str) -> int:
        """A number of tokens that `text` has at least, found much faster than by encoding it."""
        while "  " in text:
            text = text.replace("  ", " ")
        by_words = (text.count(" ") - 1) // self._widest[1]
        return max(-(-len(text) // self._widest[0]), by_words)

    @functools.cached_property
    def _widest(self) -> tuple[int, int]:
        """The most bytes of a token; and the most words, with a space before each, that one token
        holds, whole or in part."""
        pieces = [self.token_bytes(index) for index in range(self.vocab_size)]
        added = self._backend.get_added_tokens_decoder().values()
        around = any(token.lstrip or token.rstrip for token in added)  # it takes spaces with it
        inner = max(len(INNER_SPACES.findall(piece)) for piece in pieces)
        return max(map(len, pieces)), inner + 1 + around

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence; broken UTF-8 shows as U+FFFD. ValueError for unknown ids."""
        for token_id in token_ids:
            self._check(token_id)
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds to a text; they may be part of a character. Empty for the
        unused ids at the end of a padded vocabulary."""
        found = self._known_bytes.get(token_id)
        if found is not None:
            return found
        self._check(token_id)
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        found = self._known_bytes[token_id] = self._piece_bytes(piece)
        return found

    def token_text(self, token_id: int) -> str:
        """`token_bytes` for display: incomplete characters show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def special_id(self, text: str) -> int | None:
        """The id of the special token that is written `text`."""
        found = self._backend.token_to_id(text)
        return found if found in self.special_ids else None

    def ids_of(self, texts: Iterable[str]) -> frozenset[int]:
        """The ids of those texts that are special tokens."""
        found = (self.special_id(text) for text in texts)
        return frozenset(index for index in found if index is not None)

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        found = None if text is None else self._backend.token_to_id(text)
        return None if found is None else int(found)

    def _check(self, token_id: int) -> None:
        # Models pad their vocabulary, so an id without a token is valid.
        if not 0 <= token_id < 2**32:
            raise ValueError(f"token id {token_id} is not in the vocabulary")

    def _strips_first_space(self) -> bool:
        """Whether decoding drops the space in front of the first word (Llama 2)."""
        letter = self._backend.token_to_id(SPACE_MARK + "a")
        return letter is not None and self._backend.decode([letter]) == "a"


def _piece_decoder(backend: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """The function from pieces to bytes, for GPT-2's or SentencePiece's notation."""
    kinds = json.dumps(json.loads(backend.decoder.__getstate__())) if backend.decoder else ""
    if '"ByteLevel"' in kinds:
        return byte_level_bytes
    if '"ByteFallback"' in kinds or '"Metaspace"' in kinds:
        return sentencepiece_bytes
    raise ValueError(
        f"tokenizer decoder {kinds or None} is not supported; ByteLevel, ByteFallback and "
        "Metaspace are"
    )


def _byte_letters() -> dict[str, int]:
    """Letter of GPT-2's notation -> byte: printable Latin-1 stands for itself, the other bytes have
    the code points from 256 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    letters = {chr(value): value for value in printable}
    letters.update((chr(256 + index), value) for index, value in enumerate(others))
    return letters


BYTE_LETTERS = _byte_letters()


def byte_level_bytes(piece: str) -> bytes:
    """Bytes of a byte-level piece. A piece with any other letter is plain text (added tokens)."""
    try:
        return bytes([BYTE_LETTERS[letter] for letter in piece])
    except KeyError:
        return piece.encode()


def sentencepiece_bytes(piece: str) -> bytes:
    """Bytes of a SentencePiece piece: `<0xE2>` is a byte, the mark is a space."""
    return BYTE_PIECES.get(piece) or piece.replace(SPACE_MARK, " ").encode()
