"""Tokenizers: what they add, what they must not obey, what is no text; chat templates; tokenizers of GGUF files."""

import json
import pathlib
import unicodedata

import pytest
from made_gguf import byte_tokenizer

from kvjax.errors import InputError, ModelError
from kvjax.models import gguf_tokenizer
from kvjax.models.chat import ChatTemplate
from kvjax.models.gguf_file import GgufFile
from kvjax.models.tokenizer import ByteTokenizer, HuggingFaceTokenizer

FIXTURE = pathlib.Path(__file__).parent.parent / "fixtures" / "smollm2"
WORDS = {f"w{i}": i for i in range(100)} | {"[BOS]": 100, "[EOS]": 101, "?": 102}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]


def tokenizer_json(**changes) -> dict:
    added = [{"id": WORDS[t], "content": t, "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
             for t in ("[BOS]", "[EOS]")]  # fmt: skip
    template = {
        "type": "TemplateProcessing", "pair": [], "special_tokens": {"[BOS]": {"id": "[BOS]", "ids": [100], "tokens": ["[BOS]"]}},
        "single": [{"SpecialToken": {"id": "[BOS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    }  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": template, "decoder": None,
        "model": {"type": "WordLevel", "vocab": WORDS, "unk_token": "?"},
    } | changes  # fmt: skip


@pytest.fixture
def directory(tmp_path):
    """A function that writes a directory with a tokenizer.json and further files, and reads it."""

    def write(files: dict | None = None, **changes) -> HuggingFaceTokenizer:
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(**changes)))
        for name, content in (files or {}).items():
            (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return HuggingFaceTokenizer(tmp_path / "tokenizer.json")

    return write


HUNDRED = " ".join(f"w{i}" for i in range(100))


def test_truncation_of_the_file_is_not_obeyed(directory):
    truncation = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    assert directory(truncation=truncation).encode(HUNDRED) == [100, *range(100)]


def test_padding_of_the_file_is_not_obeyed(directory):
    padding = {"strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": 8, "pad_id": 0, "pad_type_id": 0, "pad_token": "w0"}
    assert directory(padding=padding).encode("w1 w2") == [100, 1, 2]


def test_dropout_of_the_file_is_not_obeyed(directory):
    bpe = {"type": "BPE", "dropout": 0.9, "unk_token": None, "fuse_unk": False, "byte_fallback": False,
           "continuing_subword_prefix": None, "end_of_word_suffix": None,
           "vocab": {"a": 0, "b": 1, "ab": 2, "abab": 3}, "merges": [["a", "b"], ["ab", "ab"]]}  # fmt: skip
    tokenizer = directory(model=bpe, post_processor=None, added_tokens=[])
    assert [tokenizer.encode("abab") for _ in range(20)] == [[3]] * 20


def test_special_tokens(directory):
    tokenizer = directory()
    assert tokenizer.encode("w1 [EOS] w2") == [100, 1, 101, 2]  # recognised in the text, and added in front
    assert tokenizer.encode("w1", add_special_tokens=False) == [1]
    assert tokenizer.decode([100, 1, 101, 2]) == "w1 w2"


def test_a_conversation_begins_once(directory):
    """A template that writes the first token itself: it must not be added again."""
    config = {"chat_template": "{{ bos_token }} {{ messages[0]['content'] }} {{ eos_token }}", "bos_token": "[BOS]",
              "eos_token": {"content": "[EOS]", "special": True}}  # fmt: skip
    tokenizer = directory({"tokenizer_config.json": config})
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w7"}]) == "[BOS] w7 [EOS]"
    assert tokenizer.encode_chat([{"role": "user", "content": "w7"}]) == [100, 7, 101]


def test_where_templates_are_found(directory):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    assert directory().chat_template is None
    assert directory({"tokenizer_config.json": {"chat_template": "plain"}}).apply_chat_template(HELLO) == "plain"
    assert directory({"tokenizer_config.json": {"chat_template": named}}).apply_chat_template(HELLO) == "named"
    assert directory({"chat_template.jinja": "a file"}).apply_chat_template(HELLO) == "a file"  # comes first
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is not readable JSON"):
        directory({"tokenizer_config.json": "{"})


def test_a_template_that_is_not_text(directory):
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: chat_template must be text"):
        directory({"tokenizer_config.json": {"chat_template": 3}})


@pytest.mark.parametrize("half", ["\ud800 high", "\udfff low", "ok \udc80 ok"])
def test_half_of_a_surrogate_pair_is_no_text(directory, half):
    at = half.index(next(c for c in half if "\ud800" <= c <= "\udfff"))
    message = f"this is no Unicode text: character {at} is U\\+{ord(half[at]):04X}, half of a surrogate pair"
    file = GgufFile(pathlib.Path("x"), {f"tokenizer.{k}": v for k, v in byte_tokenizer().items() if v is not None}, {})
    for tokenizer in (ByteTokenizer(), directory(), gguf_tokenizer.tokenizer(file)):
        with pytest.raises(InputError, match=message) as error:
            tokenizer.encode(half)
        str(error.value).encode()  # can be printed
        with pytest.raises(InputError, match="a text must be a str, not int"):
            tokenizer.encode(3)


def test_a_text_that_the_tokenizer_cannot_take(directory):
    tokenizer = directory(model={"type": "WordLevel", "vocab": {"[BOS]": 100, "[EOS]": 101}, "unk_token": "gone"})
    with pytest.raises(InputError, match=r"the tokenizer of this model cannot encode the text: .*UNK"):
        tokenizer.encode("w1")


@pytest.mark.parametrize("merges", [[["a", "b"]], [["a", "c"]], "a"])
def test_a_broken_tokenizer_file(directory, merges):
    """Some of them make the library panic."""
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a readable tokenizer\.json: ") as error:
        directory(model={"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": merges}, post_processor=None, added_tokens=[])
    assert "\n" not in str(error.value)


def test_ids_that_no_token_has(directory):
    for tokenizer in (ByteTokenizer(), directory()):
        with pytest.raises(InputError, match="token ids are"):
            tokenizer.decode([-1])
    with pytest.raises(InputError, match="byte-level token ids are 0 to 255"):
        ByteTokenizer().decode([256])


# ------------------------------------------------------------------------------------------------------------------------- templates


def test_no_template():
    with pytest.raises(InputError, match="this model has no chat template; give it plain text"):
        ByteTokenizer().apply_chat_template(HELLO)


def test_render():
    template = ChatTemplate(CHATML)
    assert template.render(HELLO) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert template.render(HELLO, add_generation_prompt=False) == "<|im_start|>user\nHello<|im_end|>\n"
    assert template.render([{"role": "user", "content": "<b>&{{ 1 }}"}], False) == "<|im_start|>user\n<b>&{{ 1 }}<|im_end|>\n"


def test_what_templates_of_transformers_use():
    source = (
        "{%- for m in messages %}\n    {%- if m.role == 'skip' %}{% continue %}{% endif %}\n"
        "    {% generation %}{{ m | tojson }}{% endgeneration %}\n{%- endfor %}{% if strftime_now('%Y') | int > 2000 %} now{% endif %}"
    )
    messages = [{"role": "skip", "content": "x"}, {"role": "user", "content": "é<'"}]
    assert ChatTemplate(source).render(messages).split() == ['{"role":', '"user",', '"content":', '"é<\'"}', "now"]


@pytest.mark.parametrize("messages", [[], "Hello", {"role": "user"}, [3], [{"role": "user"}], [{"role": "user", "content": None}]])
def test_what_is_no_conversation(messages):
    with pytest.raises(InputError, match="chat message"):
        ChatTemplate(CHATML).render(messages)


def test_a_template_refuses():
    with pytest.raises(InputError, match="the chat template does not take these messages: only users here"):
        ChatTemplate("{{ raise_exception('only\nusers  here') }}").render(HELLO)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{% include '/etc/passwd' %}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_a_template_stays_in_its_sandbox(source):
    with pytest.raises(InputError, match="the chat template does not take these messages: ") as error:
        ChatTemplate(source).render(HELLO)
    assert "\n" not in str(error.value)


def test_what_a_template_may_not_see_is_empty():
    assert ChatTemplate("[{{ raise_exception.__globals__ }}{{ strftime_now.__code__ }}{{ nothing }}]").render(HELLO) == "[]"


def test_a_broken_template():
    with pytest.raises(ModelError, match="the chat template is broken, line 2: "):
        ChatTemplate("\n{% for %}").render(HELLO)


# ---------------------------------------------------------------------------------------------------------------------- GGUF files


def of_metadata(**metadata):
    values = {f"tokenizer.{key.replace('__', '.')}": value for key, value in metadata.items() if value is not None}
    return gguf_tokenizer.tokenizer(GgufFile(pathlib.Path("x"), values, {}))


@pytest.fixture(scope="module")
def llama_cpp():
    return json.loads((FIXTURE / "pretokenizers.json").read_text())


@pytest.mark.parametrize("pre", ["smollm", "starcoder", "gpt-2", "llama-bpe", "smaug-bpe", "qwen2", "tekken", "default"])
def test_token_ids_are_those_of_llama_cpp(llama_cpp, pre):
    """But for two things that llama.cpp leaves out and the models' own tokenizers do.

    Texts for qwen2 are brought to normal form C; tekken tells cases, and marks from letters, beyond ASCII.
    """
    tokens = llama_cpp["tokens"]
    tokenizer = of_metadata(
        ggml__model="gpt2", ggml__pre=pre, ggml__tokens=tokens, ggml__merges=llama_cpp["merges"],
        ggml__token_type=[1] * (len(tokens) - 2) + [3, 3], ggml__bos_token_id=len(tokens) - 2, ggml__eos_token_id=len(tokens) - 1,
    )  # fmt: skip
    differ = []
    for text, ids in zip(llama_cpp["texts"], llama_cpp["ids"][pre], strict=True):
        if pre == "qwen2" and unicodedata.normalize("NFC", text) != text:
            assert tokenizer.encode(text) == tokenizer.encode(unicodedata.normalize("NFC", text))
        elif pre == "tekken" and any(c > "\x7f" and unicodedata.category(c) in ("Lu", "Ll", "Lt", "Mn", "Mc", "Me") for c in text):
            continue
        elif tokenizer.encode(text) != ids:
            differ.append(text)
    assert differ == []


def test_llama_cpp_tells_the_pre_tokenizers_apart(llama_cpp):
    """Otherwise the test above could not."""
    ids = {json.dumps(ids) for ids in llama_cpp["ids"].values()}
    assert len(ids) == 7  # smollm and starcoder are one


SPECIAL = ("<s>", "</s>", "<tool>")


def special(**changes):
    metadata = byte_tokenizer("gpt-2", merges=("a b",), special=SPECIAL)
    metadata |= {"ggml.bos_token_id": 257, "ggml.eos_token_id": 258} | {k.replace("__", "."): v for k, v in changes.items()}
    metadata["ggml.token_type"][-1] = 4  # <tool> is a word of the users'
    return of_metadata(**{key.replace(".", "__"): value for key, value in metadata.items()})


def test_special_tokens_of_a_file():
    tokenizer = special()
    assert tokenizer.encode("ab<s>ab<tool></s>") == [256, 257, 256, 259, 258]
    assert tokenizer.decode([257, 256, 259, 258]) == "ab<tool>"


@pytest.mark.parametrize(
    ("changes", "around"),
    [
        ({}, ([], [])),
        ({"ggml__add_bos_token": True}, ([257], [])),
        ({"ggml__add_eos_token": True}, ([], [258])),
        ({"ggml__add_bos_token": True, "ggml__add_eos_token": True}, ([257], [258])),
        ({"ggml__pre": "llama-bpe"}, ([257], [])),
        ({"ggml__pre": "llama-bpe", "ggml__add_bos_token": False}, ([], [])),
    ],
)
def test_tokens_around_a_text(changes, around):
    tokenizer = special(**changes)
    before, after = around
    assert tokenizer.encode("ab") == [*before, 256, *after]
    assert tokenizer.encode("ab", add_special_tokens=False) == [256]


def test_template_of_a_file():
    tokenizer = special(chat_template="{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", ggml__add_bos_token=True)
    assert tokenizer.encode_chat([{"role": "user", "content": "ab"}]) == [257, 256, 258]


@pytest.fixture(scope="module")
def pieces():
    return json.loads((FIXTURE / "sentencepiece.json").read_text())


def sentencepiece(pieces, **changes):
    return of_metadata(**{f"ggml__{key}": value for key, value in pieces["metadata"].items()} | changes)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_are_those_of_llama_cpp(pieces, prefix):
    tokenizer = sentencepiece(pieces, ggml__add_space_prefix=prefix)
    ids = pieces["ids"][str(prefix)]
    assert [text for text, expected in zip(pieces["texts"], ids, strict=True) if tokenizer.encode(text) != expected] == []
    kinds = {pieces["metadata"]["token_type"][index] for row in ids for index in row}
    assert kinds >= {1, 2, 3, 6}  # pieces, the unknown one and special tokens written out, bytes
    assert pieces["ids"]["True"] != pieces["ids"]["False"]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_and_back(pieces, prefix):
    tokenizer = sentencepiece(pieces, ggml__add_space_prefix=prefix)
    for text in pieces["texts"]:
        if "<s>" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_file_without_a_tokenizer():
    assert of_metadata() is None
    assert of_metadata(ggml__model="no_vocab") is None
