"""`python -m experiments.tables suite=...`: tables and figures from records, and nothing else."""

from experiments.cli import entry

main = entry("tables")

if __name__ == "__main__":
    main()
