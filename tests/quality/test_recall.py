"""Recall documents: what they contain, where, and how answers are judged."""

import sysconfig

import numpy as np
import pytest

from kvjax.errors import InputError
from kvjax.quality import recall
from kvjax.quality.recall import STATEMENT_BYTES, VALUE_DIGITS


@pytest.mark.parametrize("length", [64, 128, 384])
def test_training_document(length):
    for seed in range(40):
        document = recall.training_document(np.random.default_rng(seed), length, 2048)
        assert [len(part) for part in (document.tokens, document.positions, document.weights, document.answers)] == [length] * 4
        text = document.tokens.tobytes()
        asked = np.flatnonzero(document.answers)
        assert len(asked) % VALUE_DIGITS == 0
        assert len(asked) >= 2 * VALUE_DIGITS
        names = set()
        for at in asked[::VALUE_DIGITS]:
            assert document.answers[at : at + VALUE_DIGITS].all()
            name, value = text[at - 3 : at], text[at : at + VALUE_DIGITS]
            assert text[at - 4 : at - 3] == b"?"
            assert text[at + VALUE_DIGITS : at + VALUE_DIGITS + 1] == b";"
            stated = text.find(b"@" + name + value + b";")
            assert 0 <= stated < at - 4, f"{name} is asked before it is stated"
            assert (document.weights[stated + 1 : stated + 7] == 0).all(), "what nobody can predict has no weight"
            assert (document.weights[at : at + VALUE_DIGITS] == 8.0).all()
            names.add(name)
        assert len(names) == len(asked) // VALUE_DIGITS


def test_positions_jump_only_forward_and_stay_inside():
    documents = [recall.training_document(np.random.default_rng(seed), 128, 1000) for seed in range(40)]
    assert all((np.diff(d.positions) >= 1).all() and d.positions[-1] < 1000 and d.positions[0] >= 0 for d in documents)
    assert any(d.positions[-1] > 500 for d in documents), "some stand for longer texts"
    assert any((d.positions == np.arange(128)).all() for d in documents)
    plain = recall.training_document(np.random.default_rng(0), 128, 128)
    np.testing.assert_array_equal(plain.positions, np.arange(128))


def test_same_seed_same_document():
    one, two, other = (recall.training_document(np.random.default_rng(seed), 128, 2048).tokens for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()


def test_text_document_counts_every_byte():
    document = recall.text_document(np.random.default_rng(0), 100)
    assert document.tokens.tobytes() in recall.standard_library(False).tobytes()
    assert (document.weights == 1).all()
    assert not document.answers.any()


def test_names_are_distinct():
    facts = recall.draw_facts(np.random.default_rng(0), 2000)
    assert len({name for name, _ in facts}) == 2000
    assert all(len(name) == 3 and name.isalpha() and len(value) == 3 and value.isdigit() for name, value in facts)


def test_splits_share_no_file(tmp_path, monkeypatch):
    contents = {f"module_{i}.py": f"# number {i};\n".encode() for i in range(200)}
    for name, text in contents.items():
        (tmp_path / name).write_bytes(text)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").write_text("# left out")
    (tmp_path / "notes.txt").write_text("# left out")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    training, held_out = (recall.standard_library.__wrapped__(split).tobytes() for split in (False, True))
    for text in contents.values():
        assert (text in training) != (text in held_out)
    assert b"left out" not in training + held_out
    assert 0 < sum(text in held_out for text in contents.values()) < 30


def test_no_source_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(InputError, match="no Python source found under"):
        recall.standard_library.__wrapped__(True)


def test_held_out_share_of_this_interpreter():
    held_out, training = len(recall.standard_library(True)), len(recall.standard_library(False))
    assert 0.005 < held_out / (held_out + training) < 0.2


@pytest.mark.parametrize(("prompt_len", "num_facts"), [(952, 8), (100, 3), (18, 2), (9, 1)])
def test_recall_test(prompt_len, num_facts):
    test = recall.recall_test(np.random.default_rng(prompt_len), prompt_len, num_facts)
    prompt, continuation = test.prompt.tobytes(), test.continuation.tobytes()
    assert len(prompt) == prompt_len
    assert len(continuation) == num_facts * STATEMENT_BYTES
    assert sorted(test.depths) == pytest.approx([int(i * prompt_len / num_facts) / prompt_len for i in range(num_facts)])
    for question, (depth, answer) in enumerate(zip(test.depths, test.answers, strict=True)):
        start = round(depth * prompt_len)
        fact = prompt[start : start + STATEMENT_BYTES]
        assert continuation[question * STATEMENT_BYTES : (question + 1) * STATEMENT_BYTES] == b"?" + fact[1:]
        assert test.continuation[answer].tobytes() == fact[4:7]


@pytest.mark.parametrize(("prompt_len", "num_facts"), [(17, 2), (8, 1), (100, 0)])
def test_facts_must_fit(prompt_len, num_facts):
    with pytest.raises(
        InputError, match=f"a prompt of {prompt_len} bytes cannot hold {num_facts} facts of 8 bytes; use a prompt of at least"
    ):
        recall.recall_test(np.random.default_rng(0), prompt_len, num_facts)


def test_answered_needs_every_byte():
    test = recall.recall_test(np.random.default_rng(0), 200, 4)
    right = np.eye(256)[test.continuation]
    assert recall.answered(right, test).tolist() == [True] * 4
    for question in range(4):
        for digit in test.answers[question]:
            wrong = right.copy()
            wrong[digit] = np.eye(256)[ord("x")]
            assert recall.answered(wrong, test).tolist() == [q != question for q in range(4)]
    beside = right.copy()
    beside[np.setdiff1d(np.arange(len(right)), test.answers)] = 0
    assert recall.answered(beside, test).all(), "only the answers are judged"
