"""Chat templates in the styles of published ones, and tokenizers with their special tokens.

Each marks what the assistant writes; `unmarked` removes the marks, as most published templates have none.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests import foreign_tokenizers
from trainer.data.tokenizers.byte_level import ALPHABET

_CHATML = """
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- else %}
        {{- message['content'] + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
_HEADERS = """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = '26 Jul 2024' %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set rest = messages %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' ~ date_string ~ '\n\n' }}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- '\n\n' }}
    {%- endfor %}
{%- endif %}
{{- system + '<|eot_id|>' }}
{%- for message in rest %}
    {%- if message.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}
        {{- (message.content | tojson if message.content is mapping else message.content) ~ '<|eot_id|>' }}
    {%- elif message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('one call at a time') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        {%- generation -%}
        {"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>
        {%- endgeneration %}
    {%- elif message.role == 'assistant' %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        {%- generation %}{{- message.content | trim }}<|eot_id|>{% endgeneration %}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
_BRACKETS = """
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{%- set state = namespace(first=true) %}
{{- bos_token }}
{%- if tools %}
    {{- '[AVAILABLE_TOOLS] ' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{%- for message in rest %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' }}
        {%- if state.first and system is defined %}
            {{- system + '\n\n' }}
        {%- endif %}
        {%- set state.first = false %}
        {{- message.content + '[/INST]' }}
    {%- elif message.tool_calls is defined and message.tool_calls %}
        {%- generation %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {{- call.function | tojson }}
            {%- if not loop.last %}{{- ', ' }}{% endif %}
        {%- endfor %}
        {{- ']' + eos_token }}
        {%- endgeneration %}
    {%- elif message.role == 'assistant' %}
        {%- generation %}
        {{- ' ' + message.content + eos_token }}
        {%- endgeneration %}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS] ' ~ message.content ~ '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('Only user, assistant, tool and a first system message, not ' + message.role) }}
    {%- endif %}
{%- endfor %}
"""
_TOOLS = """
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- '# Tools\n\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
        {%- if message.reasoning_content %}
            {{- '<think>\n' + message.reasoning_content.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls %}
            {%- if call.function %}{%- set call = call.function %}{% endif %}
            {{- '\n<tool_call>\n{"name": "' ~ call.name ~ '", "arguments": ' ~ (call.arguments | tojson) ~ '}' }}
            {{- '\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' ~ message.content ~ '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
_TURNS = """{{ bos_token }}{% set prefix = namespace(text='') %}
{% for tool in tools or [] %}{% set prefix.text = prefix.text ~ (tool | tojson) ~ '\n' %}{% endfor %}
{% for message in messages %}
{% if message['role'] == 'system' %}
{% set prefix.text = prefix.text ~ message['content'] | trim ~ '\n' %}
{% continue %}
{% endif %}
{% set role = {'assistant': 'model'}.get(message['role'], message['role']) %}
{{ '<start_of_turn>' + role + '\n' }}
{%- if role == 'user' and prefix.text %}
{{ prefix.text + '\n' }}{% set prefix.text = '' %}
{%- endif -%}
{% if role == 'model' %}{% generation %}{{ message['content'] | trim }}
{%- for call in message.get('tool_calls', []) %}
{{ '\n' ~ call['function']['name'] ~ call['function']['arguments'] | tojson }}
{%- endfor %}{{ '<end_of_turn>' }}{% endgeneration %}{{ '\n' }}
{%- else %}{{ message['content'] | trim + '<end_of_turn>\n' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""


@dataclass(frozen=True)
class Style:
    """A template, and a tokenizer for it."""

    name: str
    text: str
    special: Sequence[str]
    added: Sequence[str] = ()
    bos: str | None = None
    eos: str = "<|endoftext|>"
    byte_fallback: bool = False

    def write(self, folder: Path, *, marked: bool = True) -> Path:
        """Write the folder of a tokenizer with this template."""
        folder.mkdir(parents=True, exist_ok=True)
        content = _with_fallback(self) if self.byte_fallback else _byte_level(self)
        (folder / "tokenizer.json").write_text(json.dumps(content))
        options: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eos}
        if self.bos:
            options["bos_token"] = self.bos
        (folder / "tokenizer_config.json").write_text(json.dumps(options))
        (folder / "chat_template.jinja").write_text(self.text if marked else unmarked(self.text))
        return folder


STYLES = (
    Style("chatml", _CHATML, ("<|im_start|>", "<|im_end|>")),
    Style(
        "headers", _HEADERS, ("<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), bos="<|begin|>"
    ),
    Style(
        "brackets",
        _BRACKETS,
        ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
        bos="<s>",
        eos="</s>",
        byte_fallback=True,
    ),
    Style(
        "tools",
        _TOOLS,
        ("<|im_start|>", "<|im_end|>"),
        added=("<tool_call>", "</tool_call>", "<think>", "</think>"),
        eos="<|im_end|>",
    ),
    Style("turns", _TURNS, ("<bos>", "<start_of_turn>", "<end_of_turn>"), bos="<bos>"),
)


def unmarked(text: str) -> str:
    """Return a template without its marks of what the assistant writes."""
    for name in ("generation", "endgeneration"):
        for left in ("{%- ", "{% "):
            for right in (" -%}", " %}"):
                comment = f"{left[:1]}#{left[2:]}{name}{right[:-2]}#{right[-1:]}"
                text = text.replace(f"{left}{name}{right}", comment)
    return text


def _byte_level(style: Style) -> dict[str, Any]:
    library = Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), byte_level])
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=list(ALPHABET), show_progress=False)
    library.train_from_iterator([foreign_tokenizers.TEXT, '{"name": "add", "arguments": {"a": 1}}\n' * 9], trainer)
    library.add_special_tokens(list(dict.fromkeys(["<|endoftext|>", *style.special])))
    library.add_tokens([AddedToken(token, normalized=False) for token in style.added])
    return json.loads(library.to_str())


def _with_fallback(style: Style) -> dict[str, Any]:
    library = Tokenizer.from_str(json.dumps(foreign_tokenizers.byte_fallback()))
    library.add_special_tokens(list(style.special))
    return json.loads(library.to_str())
