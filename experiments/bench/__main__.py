"""`python -m experiments.bench`: time and memory of every method beside textbook code."""

from experiments.cli import entry

main = entry("bench")

if __name__ == "__main__":
    main()
