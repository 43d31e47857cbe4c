"""The command lines."""

import merging  # noqa: F401  (before torch: it sets how threads wait)
