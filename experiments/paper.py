"""`python -m experiments.paper NAME`: one published table, from the hub to the printed row."""

from experiments.cli import entry

main = entry("paper")

if __name__ == "__main__":
    main()
