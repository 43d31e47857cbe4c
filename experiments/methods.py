"""`python -m experiments.methods`: write merging/README.md, the page of all methods."""

from experiments.report.methods import ROOT, page

if __name__ == "__main__":
    (ROOT / "merging" / "README.md").write_text(page())
