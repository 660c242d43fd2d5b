"""Chat template and tokenizer together: messages to token ids, token ids to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from configs.files import read_text
from configs.resolve import HostConfig
from engine.checkpoints.source import resolve_source
from server.text.chat_template import ChatTemplate
from server.text.generation_config import SamplingDefaults, load_defaults
from server.text.tokenizer import Tokenizer
from server.text.tokenizer_files import load_tokenizer


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
        text = self.template.render(messages, add_generation_prompt)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens. ValueError for invalid ids."""
        return self.tokenizer.decode(token_ids)


def load_codec(config: HostConfig) -> ChatCodec:
    """The codec of the model that `config` names.

    Raises:
        OSError, ValueError: the model's files are missing or invalid.
    """
    path = config.model.chat_template
    source = None if path is None else read_text(path)
    files = resolve_source(config.model.source, config.model.revision)
    tokenizer = load_tokenizer(files, config.files.dir, source)
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
    return ChatCodec(tokenizer, template, load_defaults(config, files))
