"""Faults of chat templates, of the tokens to learn, and of conversations."""

from tests.planted.fault import in_package

FAULTS = [
    in_package(
        "special tokens in a message are tokens",
        "data/chat/encode_chat.py",
        "if not has_match(inputs, self._names):",
        "if has_match(inputs, self._names):",
        "data/chat/test_encode_chat.py",
    ),
    in_package(
        "a token that begins before an answer is not learned",
        "data/tokenizers/rendered_tokens.py",
        'np.searchsorted(self.ends, start, side="right")',
        "np.searchsorted(self.starts, start)",
        "data/chat/test_rendered_tokens.py",
    ),
    in_package(
        "what a template shows before an answer is learned",
        "data/chat/turn_spans.py",
        "add_generation_prompt=is_answer)",
        "add_generation_prompt=False)",
        "data/chat/test_encode_chat.py",
    ),
    in_package(
        "a template that rewrites history passes",
        "data/chat/turn_spans.py",
        "if not text.startswith(shorter):",
        "if not text:",
        "data/chat/test_encode_chat.py",
    ),
    in_package(
        "loops of templates are not counted",
        "data/chat/sandbox.py",
        "recording.steps += 1",
        "recording.steps += 0",
        "data/chat/test_chat_template.py",
    ),
    in_package(
        "a revised text keeps what it had",
        "models/growing_text.py",
        "kept = min(_num_alike(self._tokens, tokens), len(tokens) - 1)",
        "kept = min(len(self._tokens), len(tokens) - 1)",
        "models/test_growing_text.py",
    ),
    in_package(
        "the newest exchange is forgotten first",
        "training/chat_session.py",
        "exchanges = self._exchanges[first:]",
        "exchanges = self._exchanges[: len(self._exchanges) - first]",
        "training/test_chat_session.py",
    ),
]
