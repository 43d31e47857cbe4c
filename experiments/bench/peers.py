"""`python -m experiments.bench.peers`: whole merge commands beside mergekit's."""

from experiments.cli import entry

main = entry("bench.peers")

if __name__ == "__main__":
    main()
