"""serving: a small serving loop on the transformers adapter.

An arrival queue, prefill of one prompt at a time with its prefix loaded from the service,
batched decode of all running sequences, blocks saved as they fill. Read `loop` first, then
`slots` (the batch's cache) and `requests` (what goes in and comes out).
"""

from kvservice_adapters.serving.counting import ForwardCounter
from kvservice_adapters.serving.loop import FirstToken, ServingLoop, StepReport
from kvservice_adapters.serving.requests import (
    GREEDY,
    ArrivalQueue,
    FinishReason,
    QueueFull,
    Request,
    Result,
    Sampling,
    Waiting,
    WindowExceeded,
)
from kvservice_adapters.serving.slots import SlotCache

__all__ = [
    "GREEDY",
    "ArrivalQueue",
    "FinishReason",
    "FirstToken",
    "ForwardCounter",
    "QueueFull",
    "Request",
    "Result",
    "Sampling",
    "ServingLoop",
    "SlotCache",
    "StepReport",
    "Waiting",
    "WindowExceeded",
]
