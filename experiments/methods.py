"""`python -m experiments.methods`: write merging/README.md, the page of all methods."""

from experiments.report.methods import ROOT, page
from merging.formats.disk import write_synced

if __name__ == "__main__":
    write_synced(ROOT / "merging" / "README.md", page())
