"""Chat template and tokenizer together: messages to token ids, token ids to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from configs.resolve import HostConfig
from engine.checkpoints.source import resolve_source
from server.text.chat_template import ChatTemplate
from server.text.tokenizer import Tokenizer
from server.text.tokenizer_files import load_tokenizer


class ChatCodec:
    """Encodes conversations exactly as the chat endpoint does. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.tokenizer = tokenizer
        self.template = template

    def encode(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool
    ) -> list[int]:
        """Ids of the rendered messages. ValueError when the template refuses them."""
        return self.tokenizer.encode_rendered(self.template.render(messages, add_generation_prompt))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens. ValueError for invalid ids."""
        return self.tokenizer.decode(token_ids)


def load_codec(config: HostConfig) -> ChatCodec:
    """The codec of the model that `config` names.

    Raises:
        OSError, ValueError: the model's files are missing or invalid.
    """
    path = config.model.chat_template
    source = None if path is None else path.read_text(encoding="utf-8")
    files = resolve_source(config.model.source, config.model.revision)
    tokenizer = load_tokenizer(files, config.files.dir, source)
    hidden = tokenizer.special_texts if config.model.special_tokens_in_content == "text" else ()
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens, hidden)
    return ChatCodec(tokenizer, template)
