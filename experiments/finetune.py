"""`python -m experiments.finetune suite=... task=all`: train experts ahead of the runs."""

from experiments.cli import entry

main = entry("finetune")

if __name__ == "__main__":
    main()
