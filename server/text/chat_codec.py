"""Chat template and tokenizer together: messages to token ids, token ids to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from configs.files import read_text
from configs.resolve import HostConfig
from engine.checkpoints.source import resolve_source
from server.text.generation_config import SamplingDefaults, load_defaults
from server.text.template.chat_template import ChatTemplate
from server.text.tokens.tokenizer import Tokenizer
from server.text.tokens.tokenizer_files import load_tokenizer

ANSWER = "the answer"


class ChatCodec:
    """Encodes conversations exactly as the chat endpoint does. Threads may share it."""

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, defaults: SamplingDefaults | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.defaults = defaults or SamplingDefaults()  # of the model

    def encode(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool
    ) -> list[int]:
        """Ids of the rendered messages. ValueError when the template refuses them."""
        return self.tokenizer.encode_rendered(self.template.render(messages, add_generation_prompt))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens. ValueError for invalid ids."""
        return self.tokenizer.decode(token_ids)

    def ending_ids(self) -> frozenset[int]:
        """Ids that end an answer: the tokenizer's EOS, and the added token that the template
        writes after an answer, if it writes one."""
        found = (self.tokenizer.eos_token_id, self._after_an_answer())
        return frozenset(token_id for token_id in found if token_id is not None)

    def _after_an_answer(self) -> int | None:
        turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": ANSWER}]
        try:
            text = self.template.render(turns, False).text
        except ValueError:  # there is no template, or it takes no such conversation
            return None
        _, found, tail = text.rpartition(ANSWER)
        ids = self.tokenizer.encode(tail.lstrip(), add_special_tokens=False) if found else []
        return ids[0] if ids and ids[0] in self.tokenizer.added_ids else None


def load_codec(config: HostConfig) -> ChatCodec:
    """The codec of the model that `config` names.

    Raises:
        OSError, ValueError: the model's files are missing or invalid.
    """
    path = config.model.chat_template
    source = None if path is None else read_text(path)
    files = resolve_source(config.model.source, config.model.revision)
    tokenizer = load_tokenizer(files, config.files.dir, source)
    hidden = tokenizer.special_texts if config.model.special_tokens_in_content == "text" else ()
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens, hidden)
    return ChatCodec(tokenizer, template, load_defaults(config, files))
