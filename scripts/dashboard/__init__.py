"""dashboard: the Grafana dashboard. `rows` says what it shows, `document` makes it what Grafana imports."""

from scripts.dashboard.document import dashboard
from scripts.dashboard.rows import GPU_ROW

__all__ = ["GPU_ROW", "dashboard"]
