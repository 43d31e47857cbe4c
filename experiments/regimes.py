"""`python -m experiments.regimes`: methods in the regimes that merges meet, side by side."""

from experiments.cli import entry

main = entry("regimes")

if __name__ == "__main__":
    main()
