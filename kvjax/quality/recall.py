"""The recall task: facts stated early, filler in between, questions later.

    @qzk481; ... filler ... @abd007; ... filler ... ?qzk481;?abd007;

A fact is a three-letter name and a three-digit value, drawn at random, so an answer cannot be guessed (1 in 1,000) and must be read from
the KV cache. The filler is Python source, from the standard library of the interpreter that runs this. The same generator makes the
training documents (kvjax.train) and the workload that measures what a cache strategy forgets (kvjax.run).
"""

import dataclasses
import hashlib
import pathlib
import sysconfig
from functools import cache

import numpy as np
from jaxtyping import Float, Int

from kvjax.errors import InputError

STATE, ASK, END = b"@", b"?", b";"
NAME_LETTERS, VALUE_DIGITS = 3, 3
STATEMENT_BYTES = 1 + NAME_LETTERS + VALUE_DIGITS + 1
ANSWER = slice(1 + NAME_LETTERS, 1 + NAME_LETTERS + VALUE_DIGITS)  # the value inside a statement or question

_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "lib2to3", "idlelib", "__pycache__"}
_HELD_OUT_SHARE = 20  # one file in twenty, by the hash of its path


@cache
def standard_library(held_out: bool) -> Int[np.ndarray, " N"]:
    """Every .py file of the running Python's standard library, tests excluded, joined in path order; uint8.

    A file belongs to the held-out split when the SHA-256 of its relative path is 0 modulo 20.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _EXCLUDED & set(relative.parts):
            continue
        digest = hashlib.sha256(relative.as_posix().encode()).digest()
        if (digest[0] % _HELD_OUT_SHARE == 0) == held_out:
            texts.append(path.read_bytes())
    if not texts:
        raise InputError(f"no Python source found under {root}; kvjax uses the standard library's own files as filler text")
    return np.frombuffer(b"\n".join(texts), np.uint8)


@dataclasses.dataclass(frozen=True)
class Document:
    """One training row.

    Attributes:
      tokens: bytes, uint8.
      positions: where each byte is said to stand; gaps imitate a longer filler.
      weights: how much predicting each byte counts.
      answers: True on the bytes of an answer.
    """

    tokens: Int[np.ndarray, " S"]
    positions: Int[np.ndarray, " S"]
    weights: Float[np.ndarray, " S"]
    answers: np.ndarray


@dataclasses.dataclass(frozen=True)
class Weights:
    """Loss weight of each kind of byte in a recall or copy document (a byte of text counts 1).

    Random bytes that nobody can predict count nothing.
    """

    answer: float = 8.0
    copied: float = 2.0
    filler: float = 0.2
    syntax: float = 0.2


def draw_facts(rng: np.random.Generator, count: int) -> list[tuple[bytes, bytes]]:
    """`count` (name, value) pairs with distinct names."""
    names: dict[bytes, None] = {}
    while len(names) < count:
        names[bytes(rng.integers(ord("a"), ord("z") + 1, NAME_LETTERS, dtype=np.uint8))] = None
    return [(name, bytes(rng.integers(ord("0"), ord("9") + 1, VALUE_DIGITS, dtype=np.uint8))) for name in names]


def statement(mark: bytes, name: bytes, value: bytes) -> bytes:
    """`@namevalue;` or `?namevalue;`."""
    return mark + name + value + END


def filler(rng: np.random.Generator, size: int, held_out: bool = False) -> bytes:
    """`size` consecutive bytes of Python source from a random place."""
    text = standard_library(held_out)
    start = int(rng.integers(0, len(text) - size))
    return text[start : start + size].tobytes()


def training_document(rng: np.random.Generator, length: int, max_position: int, weights: Weights = Weights()) -> Document:
    """A row of `length` bytes: facts, questions about them and filler, in an order that states every fact before asking.

    Half of the rows ask everything at the end, the others anywhere after the fact. Positions may jump at a filler, up to
    `max_position`: a short row then trains the long distances that a long row would (after PoSE, arXiv:2309.10400).
    """
    most = max(2, length // (2 * STATEMENT_BYTES + 2))
    count = int(rng.integers(2, min(most, 16) + 1))
    facts = draw_facts(rng, count)
    if rng.random() < 0.5:
        events = [(STATE, f) for f in facts] + [(ASK, facts[i]) for i in rng.permutation(count)]
    else:
        events = []
        pending = [facts[i] for i in rng.permutation(count)]
        stated: list[tuple[bytes, bytes]] = []
        while pending or stated:
            if pending and (not stated or rng.random() < 0.6):
                stated.append(pending.pop())
                events.append((STATE, stated[-1]))
            else:
                events.append((ASK, stated.pop(int(rng.integers(len(stated))))))

    room = length - STATEMENT_BYTES * len(events)
    share = rng.dirichlet(np.full(len(events), 0.3))
    gaps = np.floor(share * room).astype(int)
    gaps[0] += room - gaps.sum()

    text, loss, jumps, answers = bytearray(), [], np.zeros(length, np.int32), np.zeros(length, bool)
    for (mark, (name, value)), gap in zip(events, gaps, strict=True):
        if gap:
            jumps[len(text)] = 1
            text += filler(rng, int(gap))
            loss += [weights.filler] * int(gap)
        start = len(text)
        text += statement(mark, name, value)
        asked = mark == ASK
        loss += [weights.syntax] + [0.0] * NAME_LETTERS
        loss += [weights.answer if asked else 0.0] * VALUE_DIGITS + [weights.syntax]
        answers[start + ANSWER.start : start + ANSWER.stop] = asked

    slack = max_position - length
    if slack > 0 and jumps.any() and rng.random() < 0.7:
        where = np.flatnonzero(jumps)
        total = int(rng.integers(0, slack + 1))
        jumps[where] = rng.multinomial(total, rng.dirichlet(np.full(len(where), 0.5)))
    else:
        jumps[:] = 0
    positions = np.arange(length, dtype=np.int32) + np.cumsum(jumps)
    return Document(np.frombuffer(bytes(text), np.uint8), positions.astype(np.int32), np.array(loss, np.float32), answers)


def copy_document(rng: np.random.Generator, length: int, weights: Weights = Weights()) -> Document:
    """A row of random strings, then the same strings again and again in random orders.

    Nearly every byte of a repetition can be told from the first occurrence, which teaches a young model to look things up far sooner than
    the few answers of a recall document do.
    """
    alphabet = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz0123456789", np.uint8)
    pieces = [rng.choice(alphabet, int(rng.integers(5, 10))) for _ in range(int(rng.integers(2, max(3, length // 16) + 1)))]
    text, loss = np.concatenate(pieces), np.zeros(sum(map(len, pieces)), np.float32)
    while len(text) < length:
        piece = pieces[int(rng.integers(len(pieces)))]
        text = np.concatenate([text, piece])
        loss = np.concatenate([loss, [0.0], np.full(len(piece) - 1, weights.copied, np.float32)])
    return Document(text[:length], np.arange(length, dtype=np.int32), loss[:length].astype(np.float32), np.zeros(length, bool))


def text_document(rng: np.random.Generator, length: int) -> Document:
    """A row of `length` consecutive bytes of Python source, every byte counted once."""
    tokens = np.frombuffer(filler(rng, length), np.uint8)
    return Document(tokens, np.arange(length, dtype=np.int32), np.ones(length, np.float32), np.zeros(length, bool))


@dataclasses.dataclass(frozen=True)
class RecallTest:
    """A prompt and the questions about it.

    Attributes:
      prompt: facts at evenly spaced depths, filler between; uint8.
      continuation: all questions with their true answers, in random order; uint8.
      depths: per question, where its fact stands in the prompt, 0 (start) to 1 (end).
      answers: per question, the indices into `continuation` of the answer's bytes; [Q, VALUE_DIGITS].
    """

    prompt: Int[np.ndarray, " N"]
    continuation: Int[np.ndarray, " T"]
    depths: Float[np.ndarray, " Q"]
    answers: Int[np.ndarray, "Q digits"]


def recall_test(rng: np.random.Generator, prompt_len: int, num_facts: int) -> RecallTest:
    """Facts at `num_facts` evenly spaced depths of a prompt of exactly `prompt_len` bytes of held-out filler.

    Raises InputError when the facts do not fit.
    """
    if num_facts < 1 or prompt_len < num_facts * (STATEMENT_BYTES + 1):
        raise InputError(
            f"a prompt of {prompt_len} bytes cannot hold {num_facts} facts of {STATEMENT_BYTES} bytes; "
            f"use a prompt of at least {max(num_facts, 1) * (STATEMENT_BYTES + 1)} bytes, and at least one fact"
        )
    facts = draw_facts(rng, num_facts)
    prompt = bytearray(filler(rng, prompt_len, held_out=True))
    stride = prompt_len / num_facts
    starts = [int(i * stride) for i in range(num_facts)]
    for start, (name, value) in zip(starts, facts, strict=True):
        prompt[start : start + STATEMENT_BYTES] = statement(STATE, name, value)
    order = rng.permutation(num_facts)
    continuation = b"".join(statement(ASK, *facts[i]) for i in order)
    offsets = np.arange(num_facts)[:, None] * STATEMENT_BYTES
    return RecallTest(
        prompt=np.frombuffer(bytes(prompt), np.uint8),
        continuation=np.frombuffer(continuation, np.uint8),
        depths=np.array([starts[i] / prompt_len for i in order]),
        answers=offsets + np.arange(ANSWER.start, ANSWER.stop),
    )


def answered(logits: Float[np.ndarray, "T V"], test: RecallTest) -> np.ndarray:
    """Whether each question was answered: every byte of the answer is the first choice given the bytes before it; bool [Q].

    Given the true answer so far at every byte, this is the case exactly when greedy decoding would have written the whole answer.

    Args:
      logits: entry t predicts byte t of `test.continuation` (what `kvjax.score` returns, batch row by row).
    """
    guess = np.asarray(logits).argmax(-1)
    return (guess[test.answers] == test.continuation[test.answers]).all(-1)
