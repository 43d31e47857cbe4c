"""`python -m experiments.bench.gpu`: what a GPU makes of the methods, in a few minutes."""

from experiments.cli import entry

main = entry("bench.gpu")

if __name__ == "__main__":
    main()
