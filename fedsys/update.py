"""What one client contributes to a round."""

from dataclasses import dataclass, field

from fedsys.params import Params


@dataclass(frozen=True)
class Update:
    """A checked reply: finite, of the right names, shapes and dtypes."""

    client: int  # index in [0, num_clients)
    delta: Params  # x_n - x_t
    num_examples: int  # at least 1
    metrics: dict[str, float] = field(default_factory=dict)
