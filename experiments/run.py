"""`python -m experiments.run suite=... method=...`: merge, score, print, track."""

from experiments.cli import entry

main = entry("run")

if __name__ == "__main__":
    main()
