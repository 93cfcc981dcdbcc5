"""Data: sources -> documents -> corpus -> batches."""

import os

# Daft reads these when it is first imported. Its progress bars would mix with ours, and a data
# pipeline does not report to anyone unless the user asks for it.
os.environ.setdefault("DAFT_PROGRESS_BAR", "0")
os.environ.setdefault("DAFT_ANALYTICS_ENABLED", "0")
