"""speed: how fast this engine prefills, so that the service can weigh loading against computing."""

_SMOOTHING = 0.2
_TOKENS_MIN = 32  # less says more about overhead than about speed


class PrefillSpeed:
    """Tokens per second of what was computed lately."""

    def __init__(self) -> None:
        self.tokens_per_s = 0.0
        """0.0: nothing was measured yet."""

    def computed(self, tokens: int, seconds: float) -> None:
        """So many tokens went through the model in so long."""
        if tokens >= _TOKENS_MIN and seconds > 0:
            seen, known = tokens / seconds, self.tokens_per_s
            self.tokens_per_s = known + _SMOOTHING * (seen - known) if known else seen
