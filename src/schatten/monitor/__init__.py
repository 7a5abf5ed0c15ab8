"""Monitor: diagnostics of a running training, by one more line in its loop. docs/instruments.md shows it at work."""

from schatten.monitor.listing import Known, chosen, known, page
from schatten.monitor.monitor import Alarm, Monitor
from schatten.monitor.writers import JSONLines, TensorBoard, Writer

__all__ = ["Alarm", "JSONLines", "Known", "Monitor", "TensorBoard", "Writer", "chosen", "known", "page"]
