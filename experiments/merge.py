"""`python -m experiments.merge base=... experts.NAME=... output=...`: merge your checkpoints."""

from experiments.cli import entry

main = entry("merge")

if __name__ == "__main__":
    main()
