"""`python -m experiments.bench.scale`: what merging 70B and 400B models costs, on paper."""

from experiments.cli import entry

main = entry("bench.scale")

if __name__ == "__main__":
    main()
