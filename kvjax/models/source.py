"""What a model's weights are and on what terms they come: kept with the model, so that every record can say it."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Source:
    """Where weights came from.

    Attributes:
      weights: how most of them were stored, such as "Q4_1": a score says something about these weights, not about the
        unquantised ones.
      license: the terms as the file or the registry states them, such as "Apache-2.0"; None when neither does.
    """

    weights: str
    license: str | None = None


def model_title(record: Mapping[str, Any]) -> str:
    """The model of a record with what its weights were and their licence, where known: for wherever scores are shown."""
    said = [f"weights {record['model_weights']}"] if record.get("model_weights") else []
    said += [record["model_license"]] if record.get("model_license") else []
    return str(record["model_id"]) + (f" ({', '.join(said)})" if said else "")
