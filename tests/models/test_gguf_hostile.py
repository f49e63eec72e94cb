"""GGUF files that are damaged or made to do harm: one line each, at once, and without the memory they claim to need."""

import resource
import struct
import time

import numpy as np
import pytest
from made_gguf import Spec, byte_tokenizer, write

from kvjax.errors import KvjaxError, ModelError
from kvjax.models import load_model
from kvjax.models.gguf_file import read_header


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a good file, and where its header ends."""
    tokenizer = byte_tokenizer(merges=("a b", "ab c"), special=("<s>",), **{"ggml.bos_token_id": 3, "chat_template": "{{ messages }}"})
    file, _ = write(tmp_path_factory.mktemp("good"), Spec(tokenizer=tokenizer))
    start = min(tensor.start for tensor in read_header(file).tensors.values())
    return file.read_bytes(), start


def attempt(path) -> str | None:
    """What is said of a file; None when it loads."""
    try:
        load_model(path, random_weights=True)
        load_model(path)
    except KvjaxError as error:
        message = str(error)
    else:
        return None
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_every_truncation_is_noticed(tmp_path, whole):
    data, start = whole
    path = tmp_path / "cut.gguf"
    rng = np.random.default_rng(0)
    for length in (
        *range(0, 64),
        *rng.integers(64, start, 150).tolist(),
        start,
        *rng.integers(start, len(data), 20).tolist(),
        len(data) - 1,
    ):
        path.write_bytes(data[:length])
        message = attempt(path)
        assert message is not None
        signs = ("no GGUF file",) if length < 4 else ("goes beyond the end of the file", "is the file truncated?")
        assert any(sign in message for sign in signs), (length, message)


def test_changed_bytes_of_the_header(tmp_path, whole):
    data, start = whole
    path = tmp_path / "changed.gguf"
    rng = np.random.default_rng(1)
    before, messages = time.monotonic(), []
    for number in range(250):
        changed = bytearray(data)
        for _ in range(int(rng.integers(1, 4))):
            changed[int(rng.integers(0, 200 if number % 4 == 0 else start))] = int(
                rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))])
            )
        path.write_bytes(changed)
        messages.append(attempt(path))
    refused = {message for message in messages if message is not None}
    assert len(refused) > 40  # many things can be wrong, and are told apart
    assert None in messages  # and some changes do not matter
    assert time.monotonic() - before < 120


def header(*parts: bytes, version: int = 3, tensors: int = 0, entries: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + b"".join(parts)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)


HUGE = 2**63
ARRAY = text(b"a") + struct.pack("<I", 9)
MADE = {
    "version 1": (header(version=1), "version 1 files are not supported"),
    "version 9": (header(version=9), "version 9 files are not supported; supported: little-endian, versions 2 and 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian files are not supported"),
    "many tensors": (header(tensors=HUGE), f"it claims {HUGE} tensors"),
    "many entries": (header(entries=HUGE), f"it claims {HUGE} metadata entries"),
    "long key": (header(struct.pack("<Q", HUGE), entries=1), f"a metadata key of {HUGE} bytes"),
    "long string": (header(text(b"a"), struct.pack("<IQ", 8, HUGE), entries=1), f"metadata 'a' of {HUGE} bytes"),
    "string beyond": (header(text(b"a"), struct.pack("<IQ", 8, 999), entries=1), "metadata 'a' goes beyond the end of the file"),
    "long array": (header(ARRAY, struct.pack("<IQ", 4, HUGE), entries=1), f"metadata 'a' has {HUGE} elements"),
    "many strings": (header(ARRAY, struct.pack("<IQ", 8, HUGE), entries=1), f"metadata 'a' has {HUGE} elements"),
    "unknown type": (header(text(b"a"), struct.pack("<I", 77), entries=1), "metadata 'a' has the unknown type 77"),
    "nested arrays": (header(ARRAY, struct.pack("<IQ", 9, 1) * 50, b"\0" * 99, entries=1), "metadata 'a' is nested too deep"),
    "same key": (header(*[text(b"a") + struct.pack("<IB", 7, 1)] * 2, entries=2), "the metadata key 'a' stands there twice"),
    "not UTF-8": (header(text(b"\xff\xfe"), struct.pack("<IB", 7, 1), entries=1), "a metadata key is not UTF-8"),
    "alignment 0": (header(text(b"general.alignment"), struct.pack("<II", 4, 0), entries=1), "must be a power of two, not 0"),
    "alignment 3": (header(text(b"general.alignment"), struct.pack("<II", 4, 3), entries=1), "must be a power of two, not 3"),
    "alignment text": (header(text(b"general.alignment"), struct.pack("<I", 8), text(b"x"), entries=1), "must be a power of two, not 'x'"),
    "many axes": (header(tensor(b"t", (1,) * 5), tensors=1), "tensor 't' has 5 axes; 1 to 4 are possible"),
    "no axes": (header(tensor(b"t", ()), tensors=1), "tensor 't' has 0 axes"),
    "overflow": (header(tensor(b"t", (2**32, 2**32)), tensors=1), "tensor 't' goes beyond the end of the file"),
    "overflow to 0": (header(tensor(b"t", (2**62, 4, 4)), tensors=1), "tensor 't' goes beyond the end of the file"),
    "no elements": (header(tensor(b"t", (0, 4)), tensors=1), r"tensor 't' has shape \[4, 0\], which F32 cannot have"),
    "half a block": (header(tensor(b"t", (48,), kind=3), b"\0" * 999, tensors=1), r"tensor 't' has shape \[48\], which Q4_1 cannot have"),
    "tensor type": (header(tensor(b"t", (4,), kind=4), tensors=1), "tensor 't' has the unknown type 4"),
    "far offset": (header(tensor(b"t", (4,), offset=HUGE), b"\0" * 999, tensors=1), "tensor 't' goes beyond the end of the file"),
    "same tensor": (header(*[tensor(b"t", (4,))] * 2, b"\0" * 99, tensors=2), "tensor 't' stands there twice"),
    "a line break": (header(tensor(b"t\nt", (1,) * 5), tensors=1), r"tensor 't\\nt' has 5 axes"),
    "nothing else": (header(), "architecture None is not supported; supported: llama"),
    "only a name": (header(text(b"general.architecture"), struct.pack("<I", 8), text(b"llama"), entries=1), "block_count is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", MADE)
def test_made_to_do_harm(tmp_path, case):
    data, message = MADE[case]
    path = tmp_path / "harm.gguf"
    path.write_bytes(data)
    before = time.monotonic()
    with pytest.raises(ModelError, match=message) as error:
        load_model(path)
    assert "\n" not in str(error.value)
    assert time.monotonic() - before < 5


@pytest.mark.parametrize(("kind", "count"), [(0, 2**32), (8, 2**29), (9, 2**29)])
def test_a_claim_allocates_nothing(tmp_path, kind, count):
    """A sparse file that is large enough for what its header claims: gigabytes of metadata are refused, not read."""
    path = tmp_path / "sparse.gguf"
    path.write_bytes(header(ARRAY, struct.pack("<IQ", kind, count), entries=1))
    with path.open("r+b") as handle:
        handle.truncate(2**33)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ModelError, match=f"metadata 'a' has {count} elements, more than there is room for"):
        load_model(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert time.monotonic() - start < 5


def test_a_file_that_shrinks_meanwhile(tmp_path, whole):
    data, _ = whole
    path = tmp_path / "shrinks.gguf"
    path.write_bytes(data)
    file = read_header(path)
    last = max(file.tensors.values(), key=lambda info: info.start)
    path.write_bytes(data[: last.start + 10])
    with pytest.raises(ModelError, match=f"ends inside tensor {last.name}"):
        file.read(last, np.float32)


def test_a_directory_and_a_missing_file(tmp_path):
    for path in (tmp_path, tmp_path / "no.gguf"):
        with pytest.raises(ModelError, match=r"cannot be read: (Is a directory|No such file or directory)"):
            read_header(path)
