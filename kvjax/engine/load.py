"""The load an engine is put under: what is asked of it, and when.

A load is made on the host before anything runs, from a seed alone, so that every strategy gets the same one. Arrival times, lengths and
contents come from streams of their own (the children of `np.random.SeedSequence(seed)`): another request rate has the same prompts, and
more requests begin with the same prompts. Arrivals follow `get_request` of vLLM's benchmarks/serve.py (read at 009e6d4).
"""

import csv
import dataclasses
import io
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from kvjax import checks
from kvjax.errors import InputError, SpecError
from kvjax.models import Model
from kvjax.models.tokenizer import ByteTokenizer
from kvjax.quality import recall
from kvjax.sampling import Sampling

_ARRIVALS, _INPUTS, _OUTPUTS, _CONTENTS = range(4)  # the streams of a seed
_REDRAWS = 16
_PIECE_BYTES = 1 << 16

ARRIVAL_FIELDS = ("arrival", "timestamp")
INPUT_FIELDS = ("input_length", "input_len", "prompt_tokens")
OUTPUT_FIELDS = ("output_length", "output_len", "completion_tokens")
MAX_TOKENS_FIELDS = ("max_tokens", "output_tokens", "output_len", "output_length", "max_completion_tokens", "max_new_tokens")
"""What prompt files call the tokens to generate: OpenAI's requests, vLLM's custom data sets and what resembles them."""

LONGEST_WAIT = 1e7
"""Seconds (four months): a request that comes later than this is a slip."""

RampKind = Literal["linear", "exponential"]


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One request of a load.

    Attributes:
      index: its place in the load, from 0, in order of arrival.
      prompt: token ids, int32.
      max_tokens: how many tokens to generate.
      arrival: seconds since the load began.
      seed: of its sampling.
      sampling: how its tokens are chosen; None: as the engine has it.
      test: what its prompt can be asked; None if it states no facts. The questions fit the model's positions after the prompt.
    """

    index: int
    prompt: Int[np.ndarray, " N"]
    max_tokens: int
    arrival: float
    seed: int
    test: recall.RecallTest | None = None
    sampling: Sampling | None = None


@dataclasses.dataclass(frozen=True)
class Ramp:
    """A request rate that moves from `start` (first request) to `end` (last request), in requests/s, by the index of the request."""

    kind: RampKind
    start: float
    end: float

    def __post_init__(self):
        if self.kind not in get_args(RampKind):
            raise SpecError(f"unknown ramp {self.kind!r}; choose from {', '.join(get_args(RampKind))}")
        for name in ("start", "end"):
            if not (math.isfinite(rate := getattr(self, name)) and rate > 0):
                raise SpecError(f"ramp {name}={rate:g} is not a rate; give requests per second > 0")

    def rates(self, count: int) -> Float[np.ndarray, " R"]:
        """The rate of each of `count` requests. With p = i / (count - 1): start + (end - start) p, or start (end / start)^p."""
        progress = np.arange(count) / max(count - 1, 1)
        if self.kind == "linear":
            return self.start + (self.end - self.start) * progress
        return self.start * (self.end / self.start) ** progress


@dataclasses.dataclass(frozen=True)
class Load:
    """Requests in order of arrival.

    Attributes:
      kind: what the prompts are: `recall`, `text` or `random`; or where they come from: `prompts` (a file) or `trace`.
      request_rate: requests/s; inf: all at once, or under a ramp. Of a trace: 1 / the mean gap.
      burstiness: shape of the gamma distribution of gaps. Of a trace: (mean gap / its standard deviation)^2, its estimate by moments.
      ramp: what took the place of the rate.
    """

    kind: str
    requests: tuple[Request, ...]
    request_rate: float
    burstiness: float
    ramp: Ramp | None = None

    @property
    def total_input_tokens(self) -> int:
        return sum(len(r.prompt) for r in self.requests)

    @property
    def total_output_tokens(self) -> int:
        return sum(r.max_tokens for r in self.requests)

    @property
    def max_length(self) -> int:
        """Tokens of the longest request, prompt and output together."""
        return max(len(r.prompt) + r.max_tokens for r in self.requests)


def arrivals(
    rng: np.random.Generator, count: int, request_rate: float, burstiness: float = 1.0, ramp: Ramp | None = None
) -> Float[np.ndarray, " R"]:
    """When each of `count` requests arrives, in seconds since the start, as `vllm bench serve` has it.

    Gaps are drawn from Gamma(shape=burstiness, scale=1 / (rate * burstiness)): of mean 1 / rate, 1 a Poisson process, below 1 burstier,
    above 1 smoother, inf the constant 1 / rate. Arrivals are their running sum, stretched so that the last is exactly count / rate; the
    first request comes after its first gap. An infinite rate is all requests at 0.

    With a ramp each gap has its own request's rate, `request_rate` is not used, and, again as in vLLM, nothing is stretched.

    Raises SpecError when rate or burstiness is not above 0.
    """
    if not request_rate > 0:
        raise SpecError(f"request_rate={request_rate:g} is not a rate; give requests per second > 0, or inf for all at once")
    if not burstiness > 0:
        raise SpecError(f"burstiness={burstiness:g} is not above 0; 1 is a Poisson process, less is burstier, inf is evenly spaced")
    if ramp is None and math.isinf(request_rate):
        return np.zeros(count)
    rates = np.full(count, request_rate) if ramp is None else ramp.rates(count)
    with np.errstate(all="ignore"):  # what comes out is checked
        gaps = 1 / rates if math.isinf(burstiness) else rng.gamma(burstiness, 1 / (rates * burstiness))
    times = np.cumsum(gaps)
    if ramp is None and times[-1] > 0:  # a tiny burstiness may draw nothing but zeros
        times = times / times[-1] * (count / request_rate)
    return times


def _check_times(names: Sequence[str], times: Float[np.ndarray, " R"]) -> None:
    """Raises InputError for a request that arrives at no time, or never."""
    late = np.flatnonzero(~(times <= LONGEST_WAIT))
    if len(late):
        raise InputError(
            f"{names[late[0]]} would arrive after {times[late[0]]:g} s; give times or rates that end within {LONGEST_WAIT:g} s"
        )


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Always `tokens`."""

    tokens: int

    def __post_init__(self):
        if checks.whole("length", self.tokens, -checks.LARGEST) < 1:
            raise SpecError(f"a length of {self.tokens} tokens; give at least 1")

    @property
    def maximum(self) -> int:
        return self.tokens

    def sample(self, rng: np.random.Generator, count: int, maximum: Any = None, minimum: int = 1) -> Int[np.ndarray, " R"]:
        """`count` lengths; whether they fit is for the caller to check."""
        return np.full(count, self.tokens)

    def __str__(self):
        return str(self.tokens)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """From `low` to `high` tokens, both included, all alike."""

    low: int
    high: int

    def __post_init__(self):
        if not 1 <= checks.whole("low", self.low) <= checks.whole("high", self.high):
            raise SpecError(f"{self} is no range of lengths; give two lengths of at least 1 token, the smaller one first")

    @property
    def maximum(self) -> int:
        return self.high

    def sample(self, rng: np.random.Generator, count: int, maximum: Any = None, minimum: int = 1) -> Int[np.ndarray, " R"]:
        """`count` lengths; whether they fit is for the caller to check."""
        return rng.integers(self.low, self.high + 1, count)

    def __str__(self):
        return f"uniform({self.low},{self.high})"


@dataclasses.dataclass(frozen=True)
class LogNormal:
    """Lengths whose logarithm is normal: `median` tokens, standard deviation `sigma` of the natural logarithm."""

    median: int
    sigma: float

    def __post_init__(self):
        if checks.whole("median", self.median) < 1 or not (math.isfinite(self.sigma) and self.sigma >= 0):
            raise SpecError(f"{self}: give a median of at least 1 token and a sigma >= 0, such as lognormal(512,0.5)")

    @property
    def maximum(self) -> None:
        """None: any length may be drawn."""

    def sample(self, rng: np.random.Generator, count: int, maximum: int | Int[np.ndarray, " R"], minimum: int = 1) -> Int[np.ndarray, " R"]:
        """`count` lengths, clipped to `minimum` and `maximum` (one for all, or one each) and rounded."""
        logarithms = math.log(self.median) + self.sigma * rng.standard_normal(count)
        return np.rint(np.exp(np.clip(logarithms, np.log(minimum), np.log(maximum)))).astype(np.int64)

    def __str__(self):
        return f"lognormal({self.median},{self.sigma:g})"


Lengths = Fixed | Uniform | LogNormal


def parse_lengths(spec: str) -> Lengths:
    """The distribution of lengths, in tokens, that a spec names: `512`, `uniform(256,768)` or `lognormal(512,0.5)`. Raises SpecError."""
    call = re.fullmatch(r"(uniform|lognormal)\((\d+),([\d.e+-]+)\)", spec.replace(" ", ""))
    kind: type[Lengths]
    numbers: tuple[Any, ...]
    try:
        if call is None:
            kind, numbers = Fixed, (int(spec),)
        elif call[1] == "uniform":
            kind, numbers = Uniform, (int(call[2]), int(call[3]))
        else:
            kind, numbers = LogNormal, (int(call[2]), float(call[3]))
    except ValueError:
        raise SpecError(f"cannot read lengths {spec!r}; write tokens such as 512, or uniform(256,768), or lognormal(512,0.5)") from None
    return kind(*numbers)


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """A prompt (token ids, int32), and what it can be asked."""

    prompt: Int[np.ndarray, " N"]
    test: recall.RecallTest | None = None


def documents(model: Model, input_lens: Sequence[int], seed: int, *, shared_prefix: int = 0, num_facts: int = 8) -> list[Document]:
    """Prompts of the given lengths: recall documents for a byte tokenizer, Python source for another, random ids without one.

    No two are the same (of prompts so short that chance makes them alike, 16 drawings find no other). A prompt depends on the seed, its
    place, its length and the prompts before it.

    Args:
      input_lens: tokens.
      shared_prefix: how many tokens at the start all prompts have in common; they count in the lengths, and state no fact.
      num_facts: most facts a recall document states. It states fewer, or none, where its own part is too short for them or their questions
        would not fit the model's positions after it.

    Raises InputError when a prompt is no longer than the shared prefix, SpecError when a count is negative.
    """
    if shared_prefix < 0 or num_facts < 0:
        raise SpecError(f"shared_prefix={shared_prefix} and num_facts={num_facts} have to be 0 or more")
    short = [index for index, length in enumerate(input_lens) if length <= shared_prefix]
    if short:
        raise InputError(
            f"request {short[0]}: a prompt of {input_lens[short[0]]} tokens has none of its own after a shared prefix of {shared_prefix}; "
            "use longer prompts or a shorter prefix"
        )
    prefix = _contents(model, _rng(seed, _CONTENTS, 0), shared_prefix)
    found: list[Document] = []
    seen: set[bytes] = set()
    for index, length in enumerate(input_lens):
        rng = _rng(seed, _CONTENTS, 1 + index)
        for _ in range(_REDRAWS):
            document = _document(model, rng, int(length), prefix, num_facts)
            if document.prompt.tobytes() not in seen:
                break
        seen.add(document.prompt.tobytes())
        found.append(document)
    return found


def _document(model: Model, rng: np.random.Generator, length: int, prefix: Int[np.ndarray, " P"], num_facts: int) -> Document:
    """A prompt of `length` tokens that begins with `prefix`."""
    own = length - len(prefix)
    if isinstance(model.tokenizer, ByteTokenizer):
        after = model.config.max_position - length
        facts = min(num_facts, own // (recall.STATEMENT_BYTES + 1), after // recall.STATEMENT_BYTES)
        if facts > 0:
            test = recall.recall_test(rng, own, facts)
            prompt = np.concatenate([prefix, test.prompt]).astype(np.int32)
            depths = (len(prefix) + test.depths * own) / length
            return Document(prompt, dataclasses.replace(test, prompt=prompt.astype(np.uint8), depths=depths))
    return Document(np.concatenate([prefix, _contents(model, rng, length)[len(prefix) :]]))


def _contents(model: Model, rng: np.random.Generator, length: int) -> Int[np.ndarray, " N"]:
    """`length` tokens of held-out Python source; random ids without a tokenizer."""
    if model.tokenizer is None:
        return rng.integers(0, model.config.vocab_size, length, dtype=np.int32)
    if length == 0:
        return np.zeros(0, np.int32)
    ids: list[int] = []
    text, size = b"", 8 * length
    while len(ids) < length and len(text) < 512 * length:
        while len(text) < size:
            text += recall.filler(rng, min(size - len(text), _PIECE_BYTES), held_out=True)
        ids = model.tokenizer.encode(text.decode(errors="ignore"))
        size *= 2
    if len(ids) < length:
        raise InputError(f"the tokenizer of {model.config.name} makes fewer than {length} tokens of {len(text)} bytes of Python source")
    return np.asarray(ids[:length], np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """One line of a prompt file.

    Attributes:
      tokens: int32.
      max_tokens: None where the line does not say.
      where: file:line.
    """

    tokens: Int[np.ndarray, " N"]
    max_tokens: int | None
    where: str


def read_prompts(path: str | os.PathLike, model: Model) -> list[Prompt]:
    """Prompts from a JSONL file: `prompt` (text) or `prompt_token_ids` (a list of ids), and optionally one of MAX_TOKENS_FIELDS.

    Other fields are ignored. Raises InputError, which names file and line.
    """
    found = []
    for where, record in _records(pathlib.Path(path)):
        match [name for name in ("prompt", "prompt_token_ids") if name in record]:
            case ["prompt"]:
                text = record["prompt"]
                if not isinstance(text, str):
                    raise InputError(f"{where}: prompt is not text; give ids as prompt_token_ids")
                if model.tokenizer is None:
                    raise InputError(f"{where}: model {model.config.name} has no tokenizer for a text prompt; give prompt_token_ids")
                ids: Any = model.tokenizer.encode(checks.text(f"{where}: prompt", text))
            case ["prompt_token_ids"]:
                ids = record["prompt_token_ids"]
            case _:
                raise InputError(f"{where}: give either prompt (text) or prompt_token_ids (a list of ids)")
        if not (isinstance(ids, list) and ids and all(type(i) is int for i in ids)):
            raise InputError(f"{where}: a prompt is at least one token; prompt_token_ids is a list of whole numbers")
        size = model.config.vocab_size
        if not (0 <= min(ids) and max(ids) < size):
            raise InputError(f"{where}: token ids from {min(ids)} to {max(ids)}; model {model.config.name} has ids 0 to {size - 1}")
        lengths = {name: _whole(record, (name,), where, required=False) for name in MAX_TOKENS_FIELDS}
        said = {name: length for name, length in lengths.items() if length is not None}
        if len(set(said.values())) > 1:
            raise InputError(f"{where}: {' and '.join(f'{name}={length}' for name, length in said.items())} disagree; give one of them")
        found.append(Prompt(np.asarray(ids, np.int32), next(iter(said.values()), None), where))
    if not found:
        raise InputError(f"{path} holds no prompts; give one JSON object a line")
    return found


@dataclasses.dataclass(frozen=True)
class TraceEntry:
    """One request of a recorded trace: seconds since the first one, tokens, and file:line."""

    arrival: float
    input_length: int
    output_length: int
    where: str


def read_trace(path: str | os.PathLike, speed: float = 1.0) -> list[TraceEntry]:
    """A timed trace, in order of arrival: JSONL, or CSV with a header if the name ends in .csv.

    Fields: `arrival` or `timestamp` (seconds), `input_length`, `input_len` or `prompt_tokens`, `output_length`, `output_len` or
    `completion_tokens` (tokens). Others are ignored, such as a Mooncake trace's hash_ids.

    Args:
      speed: what times are divided by: 2 replays twice as fast, 1000 reads milliseconds.

    Raises InputError, which names file and line.
    """
    if not (math.isfinite(speed) and speed > 0):
        raise SpecError(f"speed={speed:g} is not a factor; 1 replays a trace as it was, 2 twice as fast")
    found = [
        TraceEntry(
            _number(record, ARRIVAL_FIELDS, where),
            _whole(record, INPUT_FIELDS, where),
            _whole(record, OUTPUT_FIELDS, where),
            where,
        )
        for where, record in _records(pathlib.Path(path))
    ]
    if not found:
        raise InputError(f"{path} holds no requests; give one a line, with {ARRIVAL_FIELDS[0]}, {INPUT_FIELDS[0]} and {OUTPUT_FIELDS[0]}")
    found.sort(key=lambda entry: entry.arrival)
    return [dataclasses.replace(entry, arrival=(entry.arrival - found[0].arrival) / speed) for entry in found]


def make_load(
    model: Model,
    *,
    num_requests: int | None,
    input_len: Lengths,
    output_len: Lengths,
    request_rate: float = math.inf,
    burstiness: float = 1.0,
    ramp: Ramp | None = None,
    seed: int = 0,
    prompts: str | os.PathLike | None = None,
    trace: str | os.PathLike | None = None,
    speed: float = 1.0,
    shared_prefix: int = 0,
    num_facts: int = 8,
) -> Load:
    """The load that a seed and these settings name.

    Args:
      num_requests: None: all that `prompts` or `trace` holds. Of a file the first ones are taken.
      input_len: how long prompts are; not used with `prompts` or `trace`. If unbounded, clipped to what the model's positions leave beside
        the longest output (the median, of an unbounded distribution).
      output_len: how many tokens are generated; not used with `trace`, nor for prompts that say it. If unbounded, clipped to what the
        prompt leaves of the positions.
      request_rate, burstiness, ramp: see `arrivals`; a trace has its own times.
      prompts: a file for `read_prompts`.
      trace: a file for `read_trace`, replayed at `speed`; prompts of its lengths are made up.
      shared_prefix, num_facts: see `documents`.

    Raises:
      SpecError: options that do not exist or do not go together.
      InputError: a file that cannot be used, or a request that the model has no room for.
    """
    _check_options(num_requests, request_rate, burstiness, ramp, seed, prompts, trace, speed, shared_prefix)
    room = model.config.max_position
    given: list[Prompt] = []
    if trace is not None:
        entries = _first(read_trace(trace, speed), num_requests, trace)
        times, inputs, outputs = (np.array([getattr(e, name) for e in entries]) for name in ("arrival", "input_length", "output_length"))
        names = [f"request {i} ({e.where})" for i, e in enumerate(entries)]
        request_rate, burstiness = _rate_and_burstiness(times)
    else:
        if prompts is not None:
            given = _first(read_prompts(prompts, model), num_requests, prompts)
            inputs = np.array([len(p.tokens) for p in given])
            names = [f"request {i} ({p.where})" for i, p in enumerate(given)]
        else:
            assert num_requests is not None
            beside = output_len.median if isinstance(output_len, LogNormal) else output_len.maximum
            inputs = input_len.sample(_rng(seed, _INPUTS), num_requests, max(room - beside, 1), shared_prefix + 1)
            names = [f"request {i}" for i in range(num_requests)]
        outputs = output_len.sample(_rng(seed, _OUTPUTS), len(inputs), np.maximum(room - inputs, 1))
        outputs = np.array([p.max_tokens or drawn for p, drawn in zip(given, outputs, strict=True)]) if given else outputs
        times = arrivals(_rng(seed, _ARRIVALS), len(inputs), request_rate, burstiness, ramp)
    seed = checks.seed("seed", seed, len(inputs), SpecError)
    _check_times(names, times)
    for name, length, new in zip(names, inputs, outputs, strict=True):
        if length + new > room:
            raise InputError(f"{name}: {length} prompt tokens and {new} new ones exceed the {room} positions of model {model.config.name}")
    if given:
        contents = [Document(p.tokens) for p in given]
    else:
        contents = documents(model, inputs.tolist(), seed, shared_prefix=shared_prefix, num_facts=num_facts)
    requests = tuple(
        Request(index, document.prompt, int(new), float(arrival), seed + index, document.test)
        for index, (document, new, arrival) in enumerate(zip(contents, outputs, times, strict=True))
    )
    return Load(_kind(model, requests, prompts, trace), requests, request_rate, burstiness, ramp)


def _check_options(
    num_requests: int | None, request_rate: float, burstiness: float, ramp: Ramp | None, seed: int,
    prompts: object, trace: object, speed: float, shared_prefix: int,
) -> None:  # fmt: skip
    """Raises SpecError for options of `make_load` that do not go together."""
    checks.seed("seed", seed, num_requests if isinstance(num_requests, int) else 1, SpecError)
    if num_requests is None and prompts is None and trace is None:
        raise SpecError("num_requests is missing; only a prompt file or a trace says by itself how many requests there are")
    if num_requests is not None and checks.whole("num_requests", num_requests, -checks.LARGEST) < 1:
        raise SpecError(f"num_requests={num_requests} asks nothing; give at least 1")
    if prompts is not None and trace is not None:
        raise SpecError("prompts and trace are both given; a load comes from one of them")
    if trace is not None and not (math.isinf(request_rate) and burstiness == 1 and ramp is None):
        raise SpecError("a trace has its own arrival times; leave out request_rate, burstiness and ramp, and use speed")
    if trace is None and speed != 1:
        raise SpecError(f"speed={speed:g} replays a trace; without one, set request_rate")
    if ramp is not None and not math.isinf(request_rate):
        raise SpecError(f"request_rate={request_rate:g} and a ramp are both given; a ramp has its own rates")
    if prompts is not None and shared_prefix:
        raise SpecError("shared_prefix is for prompts that are made up; those of a file are taken as they are")


def _kind(model: Model, requests: Sequence[Request], prompts: object, trace: object) -> str:
    """`Load.kind`."""
    if prompts is not None or trace is not None:
        return "trace" if prompts is None else "prompts"
    if model.tokenizer is None:
        return "random"
    return "recall" if any(r.test for r in requests) else "text"


def _rate_and_burstiness(times: Float[np.ndarray, " R"]) -> tuple[float, float]:
    """Those of given arrival times, by the mean and the standard deviation of the gaps. (inf, 1) for all at once."""
    gaps = np.diff(times)
    if not gaps.any():
        return math.inf, 1.0
    mean, std = float(gaps.mean()), float(gaps.std())
    return 1 / mean, (mean / std) ** 2 if std else math.inf


def _first[T](entries: list[T], count: int | None, path: object) -> list[T]:
    """The first `count`; all for None. Raises InputError when there are fewer."""
    if count is not None and count > len(entries):
        raise InputError(f"{path} holds {len(entries)} requests and num_requests={count} asks for more; give at most {len(entries)}")
    return entries[:count]


def _rng(seed: int, *stream: int) -> np.random.Generator:
    """The generator of one stream of a seed: that of the child which `SeedSequence.spawn` would give."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=stream))


def _records(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every record of a JSONL or CSV file, with file:line. Blank lines do not count. Raises InputError."""
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; give JSONL, or CSV with a header") from None
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
        try:
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise InputError(f"{where}: the row does not have the {len(reader.fieldnames or ())} values that the header names")
                yield where, row
        except csv.Error as error:
            raise InputError(f"{path}:{reader.line_num}: no CSV: {error}") from None
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: not a JSON object; write one a line")
        yield f"{path}:{number}", record


def _value(record: dict[str, Any], names: Sequence[str], where: str, required: bool) -> tuple[str, Any]:
    """The first of the fields that is there, and its value. Raises InputError when a required one is not."""
    for name in names:
        if record.get(name) is not None:
            return name, record[name]
    if required:
        raise InputError(f"{where}: {names[0]} is missing (also read: {', '.join(names[1:])})")
    return names[0], None


def _number(record: dict[str, Any], names: Sequence[str], where: str) -> float:
    """A finite number. Raises InputError."""
    name, value = _value(record, names, where, required=True)
    try:
        number = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{where}: {name}={value!r} is not a number of seconds")
    return number


def _whole(record: dict[str, Any], names: Sequence[str], where: str, required: bool = True) -> Any:
    """A whole number of at least 1; None for an optional field that is not there. Raises InputError."""
    name, value = _value(record, names, where, required)
    if value is None:
        return None
    try:
        number = int(value)
        whole = not isinstance(value, bool) and number >= 1 and number == float(value)
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise InputError(f"{where}: {name}={value!r} is not a number of tokens; give a whole number >= 1")
    return number
