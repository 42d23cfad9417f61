"""Chat templates: a bundle renders them as transformers does, to the token, and a bad one does no harm."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.chat import ChatTemplate, template_in
from gsx_engines.errors import BundleError
from gsx_engines.tokens import BundleTokenizer
from gsx_plugins.errors import UsageError
from tests.checkpoints import BASES
from tests.gsx.command_line import edit_json

# As published: SmolLM2-135M-Instruct's whole; of the others what makes them different.
TEMPLATES = {
    "SmolLM2": """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}""",  # noqa: E501
    "Llama 3": """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|im_start|>' + message['role'] + '\n\n'+ message['content'] | trim + '<|im_end|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}""",  # noqa: E501
    "Mistral": """{{- bos_token }}
{%- set ns = namespace(index=0) %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (ns.index % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}""",
    "generation, date, json": """{% for message in messages %}
    {% if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
    {% else %}{{ message | tojson }} {{ strftime_now('%Y') }} {{ dict(a=1) | tojson(indent=2) }}
    {% continue %}{% endif %}
{% endfor %}{{ tools is none }} {{ unk_token }}""",
}
CHATS: dict[str, list[dict[str, Any]]] = {
    "a question": [{"role": "user", "content": "Who are you? ä😀"}],
    "a history": [
        {"role": "user", "content": " the class "},
        {"role": "assistant", "content": "self"},
        {"role": "user", "content": "<|im_end|> and <s>"},
    ],
}


def with_template(bundle: Bundle, folder: Path, text: str | None) -> Bundle:
    """The bundle's tokenizer beside another template."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (bundle.directory / name).is_file():
            shutil.copyfile(bundle.directory / name, folder / name)
    if text is not None:
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    return Bundle(folder, bundle.manifest.model_copy(update={"chat_template": None}))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_of_transformers(base_bundles: dict[str, Bundle], tmp_path: Path, name: str, base: str) -> None:
    bundle = with_template(base_bundles[base], tmp_path, TEMPLATES[name])
    tokenizer = BundleTokenizer(bundle)
    template = ChatTemplate(bundle, tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for chat in CHATS.values():
        assert template.render(chat) == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        wanted = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert template.prompt(chat) == wanted


@pytest.mark.parametrize(
    ("name", "base", "token"),
    [("SmolLM2", "chat llama", "<|im_end|>"), ("Mistral", "piece mistral", "</s>"), ("SmolLM2", "piece mistral", None)],
)
def test_the_token_behind_an_answer_ends_it(
    base_bundles: dict[str, Bundle], tmp_path: Path, name: str, base: str, token: str | None
) -> None:
    """Also where the model's own files do not say that it ends a text."""
    bundle = with_template(base_bundles[base], tmp_path, TEMPLATES[name])
    decoder = bundle.manifest.decoder.model_copy(update={"eos_ids": (5,)})
    bundle = Bundle(tmp_path, bundle.manifest.model_copy(update={"decoder": decoder}))
    found = ChatTemplate(bundle, BundleTokenizer(bundle)).stop_ids
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert found == {5, *([theirs.convert_tokens_to_ids(token)] if token else [])}


def test_where_a_template_is_found(base_bundles: dict[str, Bundle], tmp_path: Path) -> None:
    with_template(base_bundles["chat llama"], tmp_path, None)
    assert template_in(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    edit_json(config, lambda v: v.update(chat_template="one"))
    assert (found := template_in(tmp_path)) is not None
    assert (found.file, found.text) == ("tokenizer_config.json", "one")
    named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    edit_json(config, lambda v: v.update(chat_template=named))
    assert (found := template_in(tmp_path)) is not None
    assert found.text == "three"
    (tmp_path / "chat_template.jinja").write_text("four")
    assert (found := template_in(tmp_path)) is not None
    assert (found.file, found.text) == ("chat_template.jinja", "four")


REFUSED = {
    "none": (None, UsageError, "has no chat template"),
    "not Jinja2": ("{% for", BundleError, "not valid Jinja2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_templates_that_cannot_be_used(base_bundles: dict[str, Bundle], tmp_path: Path, name: str) -> None:
    text, kind, words = REFUSED[name]
    bundle = with_template(base_bundles["chat llama"], tmp_path, text)
    with pytest.raises(kind, match=words):
        ChatTemplate(bundle, BundleTokenizer(bundle))


FAILING = {
    "what it says itself": ("{{ raise_exception('no such role') }}", "no such role"),
    "what is missing": ("{{ messages[0].content.title.format(1) + 1 }}", "refuses these messages"),
    "Python": ("{{ messages.__class__.__mro__ }}", "unsafe"),
    "a change of the messages": ("{{ messages.append(1) }}", "unsafe"),
    "a namespace into Python": ("{% set n = namespace(__class__=1) %}", "__class__"),
    "a file": ("{% include '/etc/passwd' %}", "no loader"),
    "without end": ("{% for n in range(10 ** 9) %}{{ n }}{% endfor %}", "Range too big"),
}


@pytest.mark.parametrize("name", FAILING)
def test_templates_that_fail(base_bundles: dict[str, Bundle], tmp_path: Path, name: str) -> None:
    text, words = FAILING[name]
    bundle = with_template(base_bundles["chat llama"], tmp_path, text)
    template = ChatTemplate(bundle, BundleTokenizer(bundle))
    with pytest.raises(UsageError, match=words):
        template.prompt(CHATS["a question"])


def test_the_manifest_names_the_template(chat_bundle: Path, tmp_path: Path) -> None:
    bundle = open_bundle(chat_bundle)
    entry = bundle.manifest.chat_template
    assert entry is not None
    assert entry.file == "chat_template.jinja"
    ChatTemplate(bundle, BundleTokenizer(bundle))
    damaged = shutil.copytree(chat_bundle, tmp_path / "copy")
    (damaged / "chat_template.jinja").write_text("another")
    with pytest.raises(BundleError, match=r"chat template does not match(.|\n)*changed after export"):
        ChatTemplate(open_bundle(damaged), BundleTokenizer(bundle))


def test_a_bundle_without_a_template_does_not_have_the_key(base_bundles: dict[str, Bundle]) -> None:
    assert "chat_template" not in base_bundles["chat llama"].manifest.model_dump(mode="json")
