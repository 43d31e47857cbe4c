"""`python -m experiments.configs`: write configs/README.md, the page of all configuration files."""

from experiments.report.configs import CONFIGS, page
from merging.formats.disk import write_synced

if __name__ == "__main__":
    write_synced(CONFIGS / "README.md", page())
