"""Task prompts: exact in length, the same by seed, and solvable by what stands in them."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from kvjax.errors import InputError, SpecError
from kvjax.models.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from kvjax.quality.tasks import TASKS, FileTask, Frame, fingerprint, parse_task, parse_tasks
from kvjax.quality.tasks.metrics import exact, match_all, match_any
from kvjax.quality.tasks.texts import WORDS, prose

ASKED = [name for name in TASKS if name not in ("prose", "code", "recall")]


class Bpe(HuggingFaceTokenizer):
    """A small byte-level BPE with a token that begins every text; with a chat template if asked for."""

    def __init__(self, path, templated):
        super().__init__(path)
        self.chat_template = "there is one" if templated else None

    def apply_chat_template(self, messages, add_generation_prompt=True):
        assert [message["role"] for message in messages] == ["user"]
        assert add_generation_prompt
        return f"<s><|user|>\n{messages[0]['content']}<|end|>\n<|model|>\n"

    def whole(self, ids):
        """The text, special tokens written out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def again(self, text):
        """The tokens of a text that has its special tokens written out."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=["<s>", "<|user|>", "<|end|>", "<|model|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator([*prose()[:400], " ".join(WORDS)], trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture(params=["bytes", "bpe", "bpe-chat"])
def tokenizer(request, bpe_file):
    return ByteTokenizer() if request.param == "bytes" else Bpe(bpe_file, request.param == "bpe-chat")


@pytest.mark.parametrize("name", [*(name for name in TASKS if name != "recall"), "kv(pairs=0)"])
@pytest.mark.parametrize("length", [1021, 1500])
def test_prompts_have_exactly_the_tokens_asked_for(tokenizer, name, length):
    task, frame = parse_task(name), Frame.of(tokenizer)
    examples = task.examples(frame, length, 6, seed=3)
    for one in examples:
        ids = one.context if task.fed else one.prompt()
        assert len(ids) == length
        if isinstance(tokenizer, Bpe):  # what the tokenizer makes of the whole text
            assert tokenizer.again(tokenizer.whole(ids)) == ids.tolist()
            text = tokenizer.whole(one.prompt())
            assert text.startswith("<s>")
            assert text.count("<s>") == 1
            if frame.templated and not task.fed:
                assert text.startswith("<s><|user|>\n")
                assert tokenizer.whole(one.turns[0].query).count("<|end|>\n<|model|>\n") == 1
                assert "<|end|>" not in tokenizer.whole(one.context)
        for turn in one.turns:
            assert len(turn.query) == len(one.turns[0].query), "all questions cost the same"
    assert fingerprint(examples) == fingerprint(task.examples(frame, length, 6, seed=3))
    assert fingerprint(examples) != fingerprint(task.examples(frame, length, 6, seed=4))
    assert fingerprint(examples[:2]) == fingerprint(task.examples(frame, length, 2, seed=3)), "the first of many are those of few"


def test_recall_is_the_task_of_the_bundled_models(bpe_file):
    task, frame = parse_task("recall(facts=3)"), Frame.of(ByteTokenizer())
    (one,) = task.examples(frame, 200, 1, seed=0)
    assert len(one.context) == 200
    text = one.prompt().astype(np.uint8).tobytes()
    for place in one.turns[0].asked:
        value, name = one.turns[0].query[place].astype(np.uint8).tobytes(), one.turns[0].query[place[0] - 3 : place[0]].astype(np.uint8)
        assert b"@" + name.tobytes() + value + b";" in text[:200]
    with pytest.raises(InputError, match="bytes"):
        task.examples(Frame.of(Bpe(bpe_file, False)), 200, 1, 0)


@pytest.fixture
def texts(bpe_file):
    """Contexts as texts, with what is asked: `texts(spec)` -> [(context, [(question, answers)])]."""
    frame = Frame.of(Bpe(bpe_file, False))

    def make(spec, length=1400, count=8):
        examples = parse_task(spec).examples(frame, length, count, seed=1)
        return [(frame.text(one.context), [(frame.text(t.query), t.answers) for t in one.turns], one.depths) for one in examples]

    return make


@pytest.mark.parametrize("spec", ["niah_single", "niah_single(haystack=repeat,digits=5)", "niah_multikey(keys=3)", "niah_multivalue"])
def test_needles_stand_where_they_are_said_to(texts, spec):
    for context, [(question, answers)], depths in texts(spec):
        (word,) = set(re.findall(r"secret codes? of the (\w+)", question))
        stated = re.findall(rf"secret codes? of the {word} is (\d+)\.", context)
        assert sorted(stated) == sorted(answers)
        for answer, depth in zip(answers, depths, strict=True):
            assert context.count(answer) == 1
            assert abs(context.index(answer) / len(context) - depth) < 0.15
        if spec.startswith("niah_multikey"):
            assert len(re.findall(r"secret code of the \w+ is", context)) == 3


def test_needles_are_spread_over_all_depths(texts):
    depths = [depths[0] for *_, depths in texts("niah_single", count=20)]
    assert np.histogram(depths, bins=5, range=(0, 1))[0].min() >= 3


def test_variables_follow_from_the_text(texts):
    for context, [(question, answers)], _ in texts("vt(hops=3)"):
        (value,) = re.findall(r"Which variables have the value (\d+)", question)
        known = {value}
        for name, source in re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)\.", context.rpartition("Text:")[2]):
            if source in known:
                known.add(name)
        assert known - {value} == set(answers)
        assert len(answers) == 4


@pytest.mark.parametrize("common", [3, 10])
def test_common_words_are_the_most_common(texts, common):
    for context, [(_, answers)], _ in texts(f"cwe(common={common})"):
        counts = Counter(re.findall(r"\w+", context.partition("List:")[2]))
        top = counts.most_common(common + 1)
        assert {word for word, _ in top[:common]} == set(answers)
        assert top[common - 1][1] > top[common][1]


def test_frequent_words_are_the_most_frequent(texts):
    for context, [(_, answers)], _ in texts("fwe(alpha=1.5)"):
        top = Counter(re.findall(r"[a-z]+", context.partition("Text:")[2])).most_common(4)
        assert [word for word, _ in top[:3]] == list(answers)
        assert top[2][1] > top[3][1]


def test_keys_have_the_values_asked_for(texts):
    for context, turns, _ in texts("kv(turns=4,pairs=0)"):
        pairs = json.loads(context[context.index("{") :])
        assert len(pairs) > 30
        assert len(turns) == 4
        for question, (answer,) in turns:
            (key,) = set(re.findall(r'key "(\w+)"', question))
            assert pairs[key] == answer
        assert len({question for question, _ in turns}) == 4


def test_keys_in_prose_have_the_values_asked_for(texts):
    for context, turns, depths in texts("kv(turns=3,pairs=5)"):
        pairs = dict(re.findall(r'The value of the key "(\w+)" is "(\d+)"\.', context))
        assert len(pairs) == 5
        assert len({question for question, _ in turns}) == 3
        for (question, (answer,)), depth in zip(turns, depths, strict=True):
            (key,) = set(re.findall(r'key "(\w+)"', question))
            assert pairs[key] == answer
            assert abs(context.index(answer) / len(context) - depth) < 0.15


def test_no_word_is_part_of_another():
    assert not [(one, other) for one in WORDS for other in WORDS if one != other and one in other]
    assert len(set(WORDS)) == len(WORDS)


def test_what_does_not_fit_is_said(bpe_file):
    for name in ASKED:
        with pytest.raises(InputError, match=rf"task {name} does not fit into 40 tokens; it takes at least \d+"):
            parse_task(name).examples(Frame.of(Bpe(bpe_file, True)), 40, 1, 0)
    with pytest.raises(InputError, match="no tokenizer"):
        Frame.of(None)


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("needle", SpecError, "unknown task 'needle'; choose from niah_single"),
        ("kv(turn=3)", SpecError, "task kv takes turns, pairs, digits"),
        ("kv(3)", SpecError, "cannot read task"),
        ("kv(turns=5)", InputError, "turns as a whole number from 1 to 4, not 5"),
        ("niah_single(haystack=hay)", InputError, "haystack=hay; choose from prose, repeat"),
        ("kv(", SpecError, "cannot read task"),
        ("", SpecError, "no task given"),
        ("kv,kv", SpecError, "named twice"),
        ("nowhere.jsonl", InputError, "nowhere.jsonl"),
    ],
)
def test_specs_that_mean_nothing(spec, error, words):
    with pytest.raises(error, match=re.escape(words) if "(" not in words else None) as raised:
        parse_tasks(spec)
    assert words in str(raised.value)


def test_specs_say_what_is_not_the_default():
    assert [task.describe() for task in parse_tasks("niah_single, kv(turns=3,digits=7)")] == ["niah_single", "kv(turns=3)"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "2: no JSON"),
        ("[]", "2: give an object"),
        ('{"prompt": "a", "context": "b", "question": "c", "answers": ["d"]}', "2: give either prompt, or context and question"),
        ('{"context": "b", "answers": ["d"]}', "2: give either prompt"),
        ('{"prompt": "a", "answers": []}', "2: answers must be a list"),
        ('{"prompt": "a", "answers": "d"}', "2: answers must be a list"),
        ('{"prompt": "", "answers": ["d"]}', "2: prompt must be a text"),
        ('{"prompt": "a", "answers": ["d"], "max_tokens": 0}', "2: max_tokens must be"),
        ('{"prompt": "a", "answer": ["d"]}', "2: unknown field 'answer'"),
    ],
)
def test_files_with_a_bad_line_are_refused_by_its_number(tmp_path, line, words):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a", "answers": ["b"]}\n' + line + "\n")
    with pytest.raises(InputError) as raised:
        parse_task(str(path))
    assert f"{path}:{words}" in str(raised.value)


def test_files_hold_examples(tmp_path, bpe_file):
    path = tmp_path / "mine.jsonl"
    rows = [{"context": "A dog is here.", "question": " What is here?", "answers": ["dog"], "max_tokens": 3}]
    path.write_text("\n".join(json.dumps(row) for row in [*rows, {"prompt": "Say cat.", "answers": ["cat", "Cat"], "opening": "It is"}]))
    task = parse_task(str(path))
    assert isinstance(task, FileTask)
    tokenizer = Bpe(bpe_file, True)
    one, two = task.examples(Frame.of(tokenizer), 0, 5, 0)
    assert tokenizer.whole(one.prompt()) == "<s><|user|>\nA dog is here. What is here?<|end|>\n<|model|>\n"
    assert tokenizer.whole(two.prompt()) == "<s><|user|>\nSay cat.<|end|>\n<|model|>\nIt is"
    assert (one.turns[0].max_new, two.turns[0].answers) == (3, ("cat", "Cat"))
    assert not task.pieces


def test_metrics():
    assert match_all(" It is ALPHA and beta.", ["alpha", "gamma"]) == 0.5
    assert match_any("beta", ["alpha", "Beta"]) == 1.0
    assert match_any("delta", ["alpha", "beta"]) == 0.0
    assert (exact(" 42.\n", ["42"]), exact("42 or so", ["42"]), exact("Ab", ["ab"])) == (1.0, 0.0, 0.0)
