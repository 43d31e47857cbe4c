"""`python -m experiments.extract base=... expert=... output=... rank=16`: an adapter of a model."""

from experiments.cli import entry

main = entry("extract")

if __name__ == "__main__":
    main()
