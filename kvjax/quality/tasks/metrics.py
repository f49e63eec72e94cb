"""How an answer is judged: each takes what the model wrote and the right answers, and gives 0 to 1.

`match_all` and `match_any` are RULER's string matches (arXiv:2404.06654, section 4; its code calls the second "part"),
case ignored.
"""

from collections.abc import Callable, Mapping, Sequence

Metric = Callable[[str, Sequence[str]], float]


def match_all(written: str, answers: Sequence[str]) -> float:
    """Share of the answers that occur in what was written."""
    text = written.casefold()
    return sum(answer.casefold() in text for answer in answers) / len(answers)


def match_any(written: str, answers: Sequence[str]) -> float:
    """1 when at least one of the answers occurs in what was written."""
    text = written.casefold()
    return float(any(answer.casefold() in text for answer in answers))


def exact(written: str, answers: Sequence[str]) -> float:
    """1 when what was written, white space and a final full stop aside, is one of the answers to the letter."""
    return float(_trimmed(written) in {_trimmed(answer) for answer in answers})


def _trimmed(text: str) -> str:
    return text.strip().removesuffix(".").rstrip()


METRICS: Mapping[str, Metric] = {"match_all": match_all, "match_any": match_any, "exact": exact}
