"""`python -m experiments.statistics suite=... kind=...`: collect statistics ahead of the runs."""

from experiments.cli import entry

main = entry("statistics")

if __name__ == "__main__":
    main()
