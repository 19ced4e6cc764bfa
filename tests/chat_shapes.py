"""Chat templates in the shapes that model families publish, without tools and other modalities."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Shape:
    """A chat template and the special tokens that it is made of."""

    template: str
    tokens: tuple[str, ...] = ()
    bos: str = "<s>"
    eos: str = "</s>"
    stop: str = ""
    """What ends a turn; EOS by default."""
    header: str = ""
    """What stands before a reply, behind the question."""


_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
)
_CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

SHAPES = {
    "chatml": Shape(
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
        "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        _CHATML,
        stop="<|im_end|>",
        header="<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama 2": Shape(
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}"
        "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
        "{% for message in loop_messages %}" + _ALTERNATE + "{% if loop.index0 == 0 and "
        "system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
        "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}"
        "{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}"
        "{% endif %}{% endfor %}",
        header=" [/INST] ",
    ),
    "llama 3": Shape(
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
        "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
        "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
        "{% endif %}",
        (*_LLAMA3, "<|end_of_text|>"),
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        stop="<|eot_id|>",
        header="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral 0.1": Shape(
        "{{ bos_token }}{% for message in messages %}" + _ALTERNATE + "{% if message['role'] == "
        "'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}"
        "{% endif %}{% endfor %}",
        header=" [/INST]",
    ),
    "mistral 0.2": Shape(
        "{{ bos_token }}{% for message in messages %}" + _ALTERNATE + "{% if message['role'] == "
        "'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
        "{% endif %}{% endfor %}",
        header=" [/INST] ",
    ),
    "mistral 0.3": Shape(
        "{{ bos_token }}{% for message in messages %}" + _ALTERNATE + "{% if message['role'] == "
        "'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}"
        "{% endif %}{% endfor %}",
        ("[INST]", "[/INST]"),
        header="[/INST] ",
    ),
    "gemma": Shape(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}" + _ALTERNATE + "{% if message['role'] == 'assistant' %}"
        "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        stop="<end_of_turn>",
        header="<end_of_turn>\n<start_of_turn>model\n",
    ),
    "zephyr": Shape(
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
        "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'system' %}\n"
        "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n"
        "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
        "{% endfor %}",
        header="</s>\n<|assistant|>\n",
    ),
    "phi 3": Shape(
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '<|user|>\n' + message['content'] + '<|end|>\n<|assistant|>\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + '<|end|>' + '\n' }}"
        "{% endif %}{% endfor %}",
        ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        eos="<|endoftext|>",
        stop="<|end|>",
        header="<|end|>\n<|assistant|>\n",
    ),
    "qwen 2.5": Shape(
        "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + "
        "messages[0]['content'] + '<|im_end|>\n' }}{%- else %}{{- '<|im_start|>system\nYou are "
        "Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
        "{%- for message in messages %}{%- if (message.role == 'user') or (message.role == "
        "'system' and not loop.first) or (message.role == 'assistant') %}{{- '<|im_start|>' + "
        "message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}",
        _CHATML,
        eos="<|im_end|>",
        header="<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen 3": Shape(
        "{%- set ns = namespace(last_query_index=messages|length - 1) %}"
        "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 "
        "%}{%- if message.role == 'user' %}{%- set ns.last_query_index = index %}{%- endif %}"
        "{%- endfor %}{%- for message in messages %}{%- if message.role == 'user' %}"
        "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
        "{%- elif message.role == 'assistant' %}{%- set content = message.content %}"
        "{%- set reasoning_content = '' %}{%- if '</think>' in message.content %}"
        "{%- set content = message.content.split('</think>')[-1].lstrip('\n') %}"
        "{%- set reasoning_content = message.content.split('</think>')[0].rstrip('\n')"
        ".split('<think>')[-1].lstrip('\n') %}{%- endif %}"
        "{%- if loop.index0 > ns.last_query_index %}{%- if loop.last or (not loop.last and "
        "reasoning_content) %}{{- '<|im_start|>' + message.role + '\n<think>\n' + "
        "reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}{%- else %}"
        "{{- '<|im_start|>' + message.role + '\n' + content }}{%- endif %}{%- else %}"
        "{{- '<|im_start|>' + message.role + '\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}"
        "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}"
        "{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is defined and enable_thinking is "
        "false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}",
        _CHATML,
        eos="<|im_end|>",
        header="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "vicuna": Shape(
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}"
        "{% set loop_messages = messages %}{% set system_message = 'A chat between a curious user "
        "and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
        "polite answers to the user\\'s questions.' %}{% endif %}{{ bos_token + system_message }}"
        "{% for message in loop_messages %}{% if message['role'] == 'user' %}"
        "{{ ' USER: ' + message['content'].strip() }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ASSISTANT: ' + message['content'].strip() + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}",
        header=" ASSISTANT: ",
    ),
    "deepseek r1": Shape(
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
        "{% endif %}{% set ns = namespace(is_first=false, system_prompt='') %}"
        "{%- for message in messages %}{%- if message['role'] == 'system' %}"
        "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}"
        "{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}"
        "{%- if message['role'] == 'user' %}{{'<\uff5cUser\uff5c>' + message['content']}}"
        "{%- endif %}"
        "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
        "{% set content = message['content'] %}{% if '</think>' in content %}"
        "{% set content = content.split('</think>')[-1] %}{% endif %}"
        "{{'<\uff5cAssistant\uff5c>' + content + '<\uff5cend▁of▁sentence\uff5c>'}}"
        "{%- endif %}{%- endfor -%}"
        "{% if add_generation_prompt %}{{'<\uff5cAssistant\uff5c><think>\\n'}}{% endif %}",
        (
            "<\uff5cbegin▁of▁sentence\uff5c>",
            "<\uff5cend▁of▁sentence\uff5c>",
            "<\uff5cUser\uff5c>",
            "<\uff5cAssistant\uff5c>",
        ),
        bos="<\uff5cbegin▁of▁sentence\uff5c>",
        eos="<\uff5cend▁of▁sentence\uff5c>",
        header="<\uff5cAssistant\uff5c>",
    ),
    "command-r": Shape(
        "{{ bos_token }}{% for message in messages %}{% set content = message['content'] %}"
        "{% if message['role'] == 'user' %}{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + "
        "content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% elif message['role'] == 'assistant' %}"
        "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>'  + content.strip() + "
        "'<|END_OF_TURN_TOKEN|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
        (
            *("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
            *("<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        ),
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        header="<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    ),
    "falcon": Shape(
        "{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
        "{% if message['role'] == 'system' %}{{ 'System: ' }}"
        "{% elif message['role'] == 'user' %}{{ 'User: ' }}"
        "{% elif message['role'] == 'assistant' %}{{ 'Falcon: ' }}{% endif %}"
        "{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '\n' + 'Falcon:' }}{% endif %}",
        ("<|endoftext|>",),
        eos="<|endoftext|>",
        header="\nFalcon: ",
    ),
}

_TEXTS = ["It is", " It is", " an", " 4", ": I", "\nIt", "\n\n", " [/INST]", "  ", "Reply"]


def _byte_level(merges: list[str]) -> Tokenizer:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 3 * len(merges), initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(merges * 2, trainer)
    return inner


def _words() -> Tokenizer:
    """As SentencePiece has it: a space belongs to the word behind it, and one begins a text."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=[*map(chr, range(33, 127)), "▁", "\n"],
        show_progress=False,
    )
    inner.train_from_iterator([text for text in _TEXTS if ":" not in text] * 2, trainer)
    return inner


KINDS = {
    "bytes": lambda: _byte_level([]),
    "merging bytes": lambda: _byte_level(_TEXTS),
    "words": _words,
}


def shaped_tokenizer(
    name: str, kind: str = "merging bytes", texts: list[str] | None = None
) -> PreTrainedTokenizerFast:
    """A small tokenizer with the template and the special tokens of a shape.

    Of bytes, it has tokens for the given texts.
    """
    shape = SHAPES[name]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(texts) if texts else KINDS[kind](),
        bos_token=shape.bos,
        eos_token=shape.eos,
        extra_special_tokens=list(shape.tokens),
    )
    if name in ("qwen 3", "deepseek r1"):  # of which they say that these are not special
        tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    tokenizer.chat_template = shape.template
    return tokenizer
