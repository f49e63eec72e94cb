"""What a model's weights are and on what terms they come: kept with the model, so that every record can say it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Source:
    """Where weights came from.

    Attributes:
      weights: how most of them were stored, such as "Q4_1": a score says something about these weights, not about the unquantised ones.
      license: the terms as the file or the registry states them, such as "Apache-2.0"; None when neither does.
    """

    weights: str
    license: str | None = None
